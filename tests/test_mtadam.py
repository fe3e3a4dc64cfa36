"""mtadam_update_ against the reference: options, what comes with gradients, what is not finite."""

import math
from itertools import product

import pytest
import torch
from mtadam_steps import DTYPES, SHAPES, SHARED, assert_same_bits, check_steps, update

from fastkit import ops
from fastkit._threads import threads
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.mtadam import check, cloned, make_grads, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

NAN, INF = math.nan, math.inf


# Values


@pytest.mark.parametrize("L", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(kernel, dtype, L):
    shapes = SHAPES if L <= 3 else [(), (7,), (33,), (4097,)]
    check_steps(make_inputs(shapes, L, dtype=dtype, seed=L, amsgrad=L == 2), 2, impl=kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_small_and_large_ones(native, dtype):
    with threads(2):
        check_steps(make_inputs(SHARED, 2, dtype=dtype), 2, impl=native)


def test_an_empty_parameter_takes_its_steps(impl):
    """As those of any parameter that a term reaches, and beside others."""
    inputs = make_inputs([(0,), (3,), (2, 0)], 2, missing=[(1, 0)])
    check_steps(inputs, 2, impl=impl)
    assert inputs.steps.tolist() == [2, 2, 2]


OPTIONS = {
    "amsgrad": {},
    "decay": {"weight_decay": 2.0**-3},
    "decoupled": {"weight_decay": 2.0**-3, "decoupled": True},
    "ranks": {"ranks": (0.5, 4.0, 1.0)},
    "rank_0": {"ranks": (1.0, 0.0, 2.0)},
    "rank_0_of_the_anchor": {"ranks": (0.0, 1.0, 2.0), "weight_decay": 2.0**-3},
    "other_anchor": {"anchor": 1},
    "last_anchor": {"anchor": 2, "ranks": (0.25, 4.0, 0.5)},
    "max_scale": {"anchor": 1, "max_scale": 4.0},
    "max_scale_below_1": {"max_scale": 0.125, "ranks": (1.0, 2.0, 4.0)},
    "dead": {"alive_eps": 1.0},  # short tensors of the third term
    "dead_anchor": {"alive_eps": 1.0, "anchor": 2},
    "all_dead": {"alive_eps": 1e9, "ranks": (2.0, 2.0, 2.0)},
    "betas": {"betas": (0.5, 0.75, 0.25), "eps": 2.0**-10},
    "no_memory": {"betas": (0.0, 0.0, 0.0)},
    "no_rate": {"lr": 0.0, "weight_decay": 0.5, "decoupled": True},
    "no_eps": {"eps": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(impl, dtype, name):
    shapes = [(9,), (31, 3), (1029,)]
    for steps in (0, 3):
        inputs = make_inputs(shapes, 3, dtype=dtype, steps=steps, amsgrad=name == "amsgrad")
        check(inputs, impl=impl, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_usual_constants(impl, dtype):
    """That float32 has not; as few elements that errors which they share pass for chance."""
    inputs = make_inputs([(300,), (7, 5), ()], 2, dtype=dtype)
    check_steps(inputs, 3, impl=impl, lr=1e-3, betas=(0.9, 0.999, 0.9), weight_decay=0.01, ranks=(1.0, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_missing_gradients(impl, dtype):
    missing = [(0, 0), (1, 1), (2, 1), (0, 2), (1, 2), (1, 3)]
    for amsgrad in (False, True):
        inputs = make_inputs([(9,), (33,), (4, 5), (4097,)], 3, dtype=dtype, missing=missing, amsgrad=amsgrad)
        check_steps(inputs, 3, missing=missing, impl=impl, weight_decay=2.0**-4)


def test_a_tensor_that_no_term_reaches_is_untouched(impl):
    missing = [(term, 1) for term in range(3)]
    inputs = make_inputs([(9,), (33,), (8,)], 3, steps=5, missing=missing, amsgrad=True)
    before = cloned(inputs)
    update(inputs, impl=impl, weight_decay=0.1, betas=(0.5, 0.5, 0.5))
    after, old = inputs.results(), before.results()
    for name, tensor in after.items():
        if name.partition("[")[0] in ("grad_norms", "steps"):
            assert torch.equal(tensor[1], old[name][1]) and not torch.equal(tensor, old[name])
        else:
            of_it = int(name.partition("[")[2][:-1]) % 3 == 1
            assert torch.equal(tensor, old[name]) == of_it, name
    apart = make_inputs([(9,), (33,), (8,)], 3, steps=5, missing=missing, amsgrad=True)
    update(apart._replace(grads=[None] * 9), impl=impl, weight_decay=0.1)
    assert_same_bits(apart, before)


def test_no_tensors(impl):
    """Are no step."""
    ops.mtadam_update_([], [], [], [], torch.zeros(0, 2), torch.zeros(0), lr=0.1, impl=impl)


# What comes with the gradients


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rate_in_a_tensor(impl, dtype, decoupled):
    """Of any real dtype, with one element."""
    options = {"impl": impl, "weight_decay": 0.25, "decoupled": decoupled}
    rates = (torch.float32, torch.float64, torch.bfloat16)
    for of, shape in product(rates, ((), (1,))):
        lr = torch.full(shape, 0.1, dtype=of)
        inputs = make_inputs([(33,), (1,), (2, 3)], 2, dtype=dtype)
        as_number = update(cloned(inputs), **{**options, "lr": float(lr)})
        check(inputs, **{**options, "lr": lr.requires_grad_()})
        if impl != "reference":
            assert_same_bits(inputs, as_number)


def test_rate_in_a_tensor_of_one_for_a_number(impl):
    """A parameter without axes stays one."""
    check(make_inputs([()], 2), impl=impl, lr=torch.tensor([0.125]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sums_are_taken_as_they_are_given(impl, dtype):
    inputs = make_inputs([(9,), (33,), (4097,)], 3, dtype=dtype, missing=[(1, 0)])
    sums = ops.mtadam_square_sums(inputs.grads, 3, impl=impl)
    alone, given, other = cloned(inputs), cloned(inputs), cloned(inputs)
    update(alone, impl=impl)
    check(given, impl=impl, square_sums=sums)
    assert_same_bits(given, alone)
    wrong = sums * torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    check(other, impl=impl, square_sums=wrong)
    assert_matches_reference(
        other.grad_norms.double(), wrong.sqrt(), torch.finfo(other.grad_norms.dtype).eps * wrong.sqrt()
    )
    assert all((p != q).any() for p, q in zip(other.params, alone.params, strict=True))


def test_given_square_sums_decide_what_is_finite(impl):
    """Nothing else looks at the gradients, as nobody can of a shard."""
    inputs = make_inputs([(9,), (8,)], 2)
    sums = ops.mtadam_square_sums(inputs.grads, 2, impl=impl)
    inputs.grads[0][3] = NAN
    sums[1, 1] = INF
    before = cloned(inputs)
    update(inputs, impl=impl, square_sums=sums)
    assert inputs.params[0].isnan().nonzero().tolist() == [[3]]
    assert torch.equal(inputs.params[1], before.params[1]) and inputs.steps.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_scales(impl, dtype):
    """What gradients are divided by; of powers of two bit for bit."""
    sizes = (1.0, 30.0, 0.25)
    scales = torch.tensor([8.0, 0.5, 64.0])
    inputs = make_inputs([(9,), (33,), (4097,)], 3, dtype=dtype, sizes=sizes, missing=[(0, 1)])
    plain = update(cloned(inputs), impl=impl, weight_decay=0.1)
    scaled = [None if g is None else g * scales[j // 3].to(dtype) for j, g in enumerate(inputs.grads)]
    update(inputs._replace(grads=scaled), impl=impl, weight_decay=0.1, grad_scales=scales)
    assert_same_bits(inputs, plain)
    others = make_inputs([(9,), (33,), (700,)], 3, dtype=dtype, sizes=sizes)
    check_steps(others, 2, impl=impl, grad_scales=torch.tensor([3.0, 0.1, 1e4]), alive_eps=1e-2)


def test_found_inf(impl):
    """Nothing is written where it is not 0."""
    for found in (torch.ones(()), torch.tensor([2.0]), torch.tensor(NAN)):
        inputs = make_inputs([(9,), (33,)], 2, steps=3, amsgrad=True)
        before = cloned(inputs)
        update(inputs, impl=impl, weight_decay=0.1, found_inf=found)
        assert_same_bits(inputs, before)
    inputs = make_inputs([(9,), (33,)], 2, steps=3, amsgrad=True)
    without = update(cloned(inputs), impl=impl)
    update(inputs, impl=impl, found_inf=torch.zeros(1))
    assert_same_bits(inputs, without)


# What is not finite


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skip(impl, dtype, value):
    """The tensor is as before, and others as without it."""
    for term in range(3):
        inputs = make_inputs([(9,), (4100,), (7,)], 3, dtype=dtype, steps=2, amsgrad=True)
        inputs.grads[term * 3 + 1][-1] = value
        wanted = cloned(inputs)
        for k in range(3):
            wanted.grads[k * 3 + 1] = None
        update(wanted, impl=impl, weight_decay=0.1)
        update(inputs, impl=impl, weight_decay=0.1)
        assert_same_bits(inputs, wanted)
        assert inputs.steps.tolist() == [3, 2, 3]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skip_term(impl, dtype, value):
    """As with a gradient of zeros."""
    for term in range(3):
        inputs = make_inputs([(9,), (4100,), (7,)], 3, dtype=dtype, steps=2, amsgrad=True)
        inputs.grads[term * 3 + 1][-1] = value
        wanted = cloned(inputs)
        wanted.grads[term * 3 + 1].zero_()
        for of in (wanted, inputs):
            update(of, impl=impl, weight_decay=0.1, nonfinite="skip_term")
        assert_same_bits(inputs, wanted)
        assert inputs.steps.tolist() == [3, 3, 3]
        assert all(p.isfinite().all() for p in inputs.params)


def test_skip_term_of_all_terms(impl):
    """Is a step of zeros."""
    inputs = make_inputs([(9,)], 2, steps=2)
    wanted = cloned(inputs)
    for grad, zeros in zip(inputs.grads, wanted.grads, strict=True):
        grad.fill_(INF), zeros.zero_()
    for of in (wanted, inputs):
        update(of, impl=impl, nonfinite="skip_term")
    assert_same_bits(inputs, wanted)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("term", [0, 1, 2])
def test_propagate(impl, term, value):
    """A parameter, and what is kept of it, is NaN where its gradient is not finite; other tensors are not."""
    for dtype in DTYPES:
        inputs = make_inputs([(9,), (4100,)], 3, dtype=dtype, steps=2)
        inputs.grads[term * 2 + 1][4099] = value
        plain = cloned(inputs)
        plain.grads[1::2] = [None] * 3
        update(plain, impl=impl)
        update(inputs, impl=impl, nonfinite="propagate")
        results, others = inputs.results(), plain.results()
        assert all(torch.equal(results[f"{k}[0]"], others[f"{k}[0]"]) for k in ("params", "exp_avgs"))
        assert inputs.steps.tolist() == [3, 3]
        for name in ("params[1]", "exp_avgs[1]", f"exp_avg_sqs[{term * 2 + 1}]"):
            assert results[name][4099].isnan(), name
        # where n_a is infinite, all that it balances is not finite
        spoilt = term == 0 and not math.isnan(value)
        assert spoilt or inputs.params[1][:4099].isfinite().all()


@pytest.mark.parametrize("term", [0, 1, 2])
def test_a_maximum_of_nan_is_nan(impl, term):
    """Whichever term it comes from."""
    inputs = make_inputs([(33,)], 3, steps=2, amsgrad=True)
    inputs.grads[term][[5, 32]] = NAN
    update(inputs, impl=impl, nonfinite="propagate")
    assert inputs.max_exp_avg_sqs[0].isnan().nonzero().flatten().tolist() == [5, 32]


def test_a_norm_whose_square_float32_has_not_is_not_finite(impl):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs([(9,), (7,)], 2, dtype=dtype)
        inputs.grads[2].fill_(1e20)
        before = cloned(inputs)
        sums = ops.mtadam_square_sums(inputs.grads, 2, impl=impl)
        assert sums.isinf().tolist() == [[False, True], [False, False]]
        update(inputs, impl=impl)
        assert inputs.steps.tolist() == [0, 1]
        assert torch.equal(inputs.params[0], before.params[0])
    inputs = make_inputs([(9,)], 2, dtype=torch.float64)
    inputs.grads[1].fill_(1e20)
    check(inputs, impl=impl)
    assert inputs.steps.tolist() == [1]


# Terms that come and go


@pytest.mark.parametrize(("silent", "largest"), [(200, 10.0), (300, 1.0)])
@pytest.mark.parametrize("zeros", ["zeros", "none"])
def test_a_term_that_wakes_is_bounded(impl, zeros, silent, largest):
    """By rank n_a / (1 - b3), and by rank n_a where its norm has died meanwhile."""
    rank = 2.0
    options = {"impl": impl, "betas": (0.0, 0.0, 0.9), "ranks": (1.0, rank)}  # v_l = h_l^2
    inputs = make_inputs([(50,)], 2)
    update(inputs, **options)
    of_silence = None if zeros == "none" else torch.zeros(50)
    for _ in range(silent):
        update(inputs._replace(grads=[inputs.grads[0], of_silence]), **options)
    assert (inputs.grad_norms[0, 1] > 1e-10) == (largest == 10.0)
    wakes = inputs._replace(grads=[inputs.grads[0], 1e6 * inputs.grads[1]])
    update(wakes, **options)
    anchor, h = float(inputs.grad_norms[0, 0]), float(inputs.exp_avg_sqs[1].sqrt().norm())
    assert h == pytest.approx(largest * rank * anchor, rel=1e-5)
    assert h <= rank * anchor / (1 - 0.9) * (1 + 1e-6)


def test_a_term_that_comes_late_begins_with_its_own_norm(impl):
    inputs = make_inputs([(50,)], 2, missing=[(1, 0)])
    for _ in range(5):
        update(inputs, impl=impl)
    assert inputs.grad_norms[0, 1] == 0
    late = make_inputs([(50,)], 2).grads[1]
    check(inputs._replace(grads=[inputs.grads[0], late]), impl=impl)
    torch.testing.assert_close(inputs.grad_norms[0, 1], late.norm())


def test_the_anchor_comes_late(impl):
    """Until then the first term that is alive takes its place."""
    inputs = make_inputs([(50,), (7,)], 3, missing=[(1, 0), (0, 1)])
    check(inputs, impl=impl, anchor=1)
    check(inputs._replace(grads=make_grads(inputs.params, 3, seed=7)), impl=impl, anchor=1)


def test_defaults_are_those_of_the_paper(impl):
    inputs = make_inputs([(33,)], 2)
    *tensors, _ = cloned(inputs)
    ops.mtadam_update_(*tensors, lr=0.1, impl=impl)
    options = {"betas": (0.9, 0.999, 0.9), "eps": 1e-8, "anchor": 0, "alive_eps": 1e-10, "nonfinite": "skip"}
    update(inputs, lr=0.1, impl=impl, **options)
    assert all(map(torch.equal, (*inputs.params, *inputs.exp_avg_sqs), (*tensors[0], *tensors[3])))
