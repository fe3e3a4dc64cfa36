"""mtadam_update_ and mtadam_square_sums: against the reference, memory, graphs."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch.library import opcheck

from fastkit import ops
from fastkit._threads import threads
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.mtadam import update_
from fastkit.testing import assert_matches_reference
from fastkit.testing.mtadam import (
    Options,
    check,
    cloned,
    compare,
    expected_results,
    make_grads,
    make_inputs,
    raw_arguments,
    square_sum_budget,
)

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

RAW = torch.ops.fastkit
CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf

# Around vectors (4 to 16), what is summed at a time (16 to 64), blocks (16384); no axes and several.
SHAPES = [
    (),
    (1,),
    (7,),
    (8,),
    (9,),
    (31,),
    (33,),
    (3, 5),
    (2, 3, 4),
    (4097,),
    (16383,),
    (16384,),
    (16385,),
    (40000,),
]
# Enough for two threads, of which large tensors are shared.
SHARED = [(5,)] * 25 + [(40000,), (3000,), (9000,), (3, 4099)]


def update(inputs, op=ops.mtadam_update_, **options):
    *tensors, maxima = inputs
    op(*tensors, max_exp_avg_sqs=maxima, **{**Options()._asdict(), **options})
    return inputs


def check_steps(inputs, count, *, missing=(), **options):
    """Each from what the one before has left."""
    for step in range(count):
        check(inputs, **options)
        grads = make_grads(inputs.params, inputs.terms, seed=100 + step, missing=missing)
        inputs = inputs._replace(grads=grads)


def assert_same_bits(inputs, others, names=None):
    """Of all results; a NaN is equal to itself."""
    of_others = others.results()
    for name, got in inputs.results().items():
        if names is None or name.partition("[")[0] in names:
            torch.testing.assert_close(got.detach(), of_others[name].detach(), rtol=0, atol=0, equal_nan=True)


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


# Memory


LAYOUTS = {
    "dense": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "columns_of_more": lambda t: torch.cat([t + 1, t, t - 1], 3)[..., t.shape[3] : 2 * t.shape[3]],
    "every_other": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "rows_of_more": lambda t: torch.cat([t + 1, t, t - 1])[len(t) : 2 * len(t)],
    "repeated": lambda t: t[:, :1].clone().expand_as(t),
}


@pytest.mark.parametrize("of_param", [name for name in LAYOUTS if name != "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(impl, dtype, of_param):
    """Of parameters, of gradients, and of state that has not those of its parameter."""
    for of_grad, of_state in product(LAYOUTS, ("its own", "dense")):
        inputs = make_inputs([(4, 6, 5, 7)], 2, dtype=dtype)
        param = LAYOUTS[of_param](inputs.params[0])
        grads = [LAYOUTS[of_grad](inputs.grads[0]), inputs.grads[1]]
        like = param if of_state == "its own" else inputs.params[0]
        zeros = [torch.zeros_like(like, dtype=torch.float32) for _ in range(3)]
        base = param if param._base is None else param._base
        before = base.clone()
        inputs = inputs._replace(
            params=[param], grads=grads, exp_avgs=zeros[:1], exp_avg_sqs=zeros[1:], max_exp_avg_sqs=None
        )
        check(inputs, impl=impl, weight_decay=2.0**-4)
        torch.as_strided(before, param.shape, param.stride(), param.storage_offset()).copy_(param)
        assert torch.equal(base, before)  # nothing beside it was written to


def test_an_expanded_gradient(impl):
    """Of a sum, as autograd gives it: one number for all."""
    for shape in ((4099,), (3, 5), ()):
        inputs = make_inputs([shape], 2)
        one = torch.tensor(0.3)
        wanted = update(
            cloned(inputs)._replace(grads=[one.expand(shape).clone(), *inputs.grads[1:]]), impl=impl
        )
        update(inputs._replace(grads=[one.expand(shape), *inputs.grads[1:]]), impl=impl)
        assert_same_bits(inputs, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_slices(impl, dtype):
    """Give the same bits, and nothing beside them is written to."""
    for offset in (1, 2, 3):
        inputs = make_inputs([(4, 5), (67,), (4099,)], 2, dtype=dtype, steps=1, amsgrad=True)
        wanted = update(cloned(inputs), impl=impl)
        memory = []

        def sliced(tensors, memory=memory, offset=offset):
            for t in tensors:
                memory.append(torch.full((t.numel() + offset + 5,), 7.0, dtype=t.dtype))
                part = memory[-1][offset : offset + t.numel()].view(t.shape)
                yield part.copy_(t)

        moved = inputs._replace(
            **{
                name: list(sliced(tensors))
                for name, tensors in inputs._asdict().items()
                if isinstance(tensors, list)
            },
            grad_norms=next(sliced([inputs.grad_norms])),
            steps=next(sliced([inputs.steps])),
        )
        update(moved, impl=impl)
        assert_same_bits(moved, wanted)
        assert all((whole[:offset] == 7).all() and (whole[-5:] == 7).all() for whole in memory)


def test_gradients_are_not_written_to(impl):
    inputs = make_inputs(SHAPES, 2)
    grads = [g.clone() for g in inputs.grads]
    update(inputs, impl=impl, weight_decay=0.1)
    assert all(map(torch.equal, inputs.grads, grads))


def test_negated_views_are_read_as_they_are_meant(impl):
    """As autograd gives them through the imaginary part of a conjugate."""
    inputs = make_inputs([(33,)], 2)
    negated = torch.complex(torch.zeros(33), -inputs.grads[1]).conj().imag
    assert negated.is_neg() and torch.equal(negated, inputs.grads[1])
    wanted = update(cloned(inputs), impl=impl)
    update(inputs._replace(grads=[inputs.grads[0], negated]), impl=impl)
    assert_same_bits(inputs, wanted)


# Bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(native, dtype):
    inputs = make_inputs(SHARED, 3, dtype=dtype, steps=1, amsgrad=True)
    wanted = update(cloned(inputs), impl=native)
    sums = ops.mtadam_square_sums(inputs.grads, len(SHARED), impl=native)
    for count in (1, 2, 3):
        with threads(count):
            for _ in range(2):
                assert_same_bits(update(cloned(inputs), impl=native), wanted)
                again = ops.mtadam_square_sums(inputs.grads, len(SHARED), impl=native)
                assert torch.equal(again, sums)


def test_the_same_call_gives_the_same_bits(impl):
    inputs = make_inputs(SHAPES, 3, steps=1)
    wanted = update(cloned(inputs), impl=impl)
    for _ in range(5):
        assert_same_bits(update(cloned(inputs), impl=impl), wanted)


@pytest.mark.parametrize("cuts", [(0, 3, 3), (0, 2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_a_step(impl, dtype, cuts):
    """The same bits, but for m, which is rounded between them, and what follows from it."""
    options = Options(weight_decay=2.0**-4, ranks=(1.0, 0.5, 2.0), anchor=cuts[1] - 1)._asdict()
    inputs = make_inputs([(9,), (4, 5), (4097,)], 3, dtype=dtype, steps=2, amsgrad=True, missing=[(1, 1)])
    once = update(cloned(inputs), impl=impl, **options)
    expected = expected_results(inputs, **options)
    n = len(inputs.params)
    for first, end in pairwise(cuts):
        *tensors, maxima = inputs._replace(grads=inputs.grads[n * first : n * end])
        more = {"impl": impl, "first": first, "applies": (first, end) == cuts[-2:]}
        update_(*tensors, max_exp_avg_sqs=maxima, **options, **more)
    assert_same_bits(inputs, once, {"exp_avg_sqs", "max_exp_avg_sqs", "grad_norms", "steps"})
    if cuts == (0, 3, 3):
        assert_same_bits(inputs, once)
    compare(inputs, expected)


def test_terms_that_are_in_no_piece_count(impl):
    """Their moments stay, in the denominator too: wherever the last piece ends."""
    for first, end in ((0, 2), (1, 2), (1, 3), (3, 3)):
        inputs = make_inputs([(33,)], 3, steps=2, amsgrad=True)
        largest = 0 if first else 2
        inputs.exp_avg_sqs[largest].fill_(1e6)
        *tensors, maxima = inputs._replace(grads=inputs.grads[first:end])
        more = {"impl": impl, "first": first, "applies": True}
        update_(*tensors, max_exp_avg_sqs=maxima, **Options()._asdict(), **more)
        assert (inputs.exp_avg_sqs[largest] == 1e6).all() and (maxima[0] == 1e6).all(), (first, end)


# Graphs


def test_parameters_that_require_gradients(impl):
    inputs = make_inputs([(9,), (4, 5)], 2)
    wanted = update(cloned(inputs), impl=impl)
    params = [torch.nn.Parameter(inputs.params[0].clone()), inputs.params[1].clone().requires_grad_()]
    update(inputs._replace(params=params), impl=impl)
    assert all(map(torch.equal, params, wanted.params))
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in params)
    twice = params[0] * 2
    grads = [g.clone().requires_grad_() for g in inputs.grads]
    update(inputs._replace(params=[twice, params[1]], grads=grads), impl=impl)
    assert not inputs.exp_avgs[0].requires_grad
    assert not ops.mtadam_square_sums(grads, 2, impl=impl).requires_grad


def test_a_graph_that_saved_a_parameter_refuses_to_run_backward(impl):
    inputs = make_inputs([(9,), (7,)], 2)
    params = [p.requires_grad_() for p in inputs.params]
    y = sum(p.square().sum() for p in params)
    versions = [p._version for p in params]
    update(inputs, impl=impl)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode(impl):
    outside = make_inputs([(9,), (7,)], 2)
    wanted = update(cloned(outside), impl=impl)
    with torch.inference_mode():
        inside = make_inputs([(9,), (7,)], 2)
        assert inside.params[0].is_inference() and not outside.params[0].is_inference()
        sums = ops.mtadam_square_sums(inside.grads, 2, impl=impl)
        update(inside, impl=impl, square_sums=sums)
        update(outside, impl=impl)
    for inputs in (inside, outside):
        assert_same_bits(inputs, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(native, dtype):
    tests = TRACED if dtype == torch.float32 else CHECKS
    inputs = make_inputs([(9,), (4, 5)], 2, dtype=dtype, missing=[(1, 0)], amsgrad=True)
    opcheck(RAW.mtadam_square_sums.default, (inputs.grads, 2), test_utils=tests)
    more = {"lr_tensor": torch.tensor(0.1, dtype=torch.float64), "grad_scales": torch.ones(2)}
    for changed in ({}, more):
        opcheck(RAW.mtadam_update_.default, raw_arguments(inputs, **changed), test_utils=tests)


def test_compiles_to_one_graph(native):
    def step(inputs, lr, scales):
        sums = ops.mtadam_square_sums(inputs.grads, len(inputs.params), impl=native)
        options = {"lr": lr, "grad_scales": scales, "square_sums": sums, "impl": native}
        update(inputs, weight_decay=0.1, ranks=(1.0, 0.5), **options)
        return sums, inputs.params[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    lr, scales = torch.tensor(0.1), torch.tensor([1.0, 2.0])
    for shapes in ([(9,), (4, 5)], [(33,), (7, 2)]):
        inputs = make_inputs(shapes, 2, missing=[(1, 0)], amsgrad=True)
        inputs.params[1].requires_grad_()
        others = cloned(inputs)
        with torch.no_grad():
            for _ in range(2):
                results, wanted = compiled(inputs, lr, scales), step(others, lr, scales)
                assert all(map(torch.equal, results, wanted))
        assert_same_bits(inputs, others)


# Square sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sums(impl, dtype):
    shapes = [*SHAPES, (0,), (3, 4099)]
    for L in (1, 3):
        inputs = make_inputs(shapes, L, dtype=dtype, missing=[(1, 2), (0, 5), (1, 5), (2, 5)])
        sums = ops.mtadam_square_sums(inputs.grads, len(shapes), impl=impl)
        assert sums.shape == (len(shapes), L) and sums.dtype == torch.float64 and sums.is_contiguous()
        for j, grad in enumerate(inputs.grads):
            found = sums[j % len(shapes), j // len(shapes)]
            if grad is None:
                assert found == 0
                continue
            want = grad.double().square().sum()
            budget = square_sum_budget(want, grad.numel(), dtype)
            assert_matches_reference(found, want, budget * (1 + (dtype == torch.float64)), name=str(j))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_square_sums_that_lose_all_that_they_can(native, dtype):
    """Ones, and behind them squares below the last digit of one: none of them is added to a running sum."""
    info = torch.finfo(dtype)
    for ones in (4, 8, 16, 32, 64):
        grad = torch.full((4096,), math.sqrt(info.eps / 2) * 0.9999, dtype=dtype)
        grad[:ones] = 1
        want = ones + (4096 - ones) * float(grad[-1].double().square())
        found = float(ops.mtadam_square_sums([grad], 1, impl=native))
        assert abs(found - want) <= 66 * info.eps * want, ones


def test_square_sums_of_any_strides(impl):
    dense = torch.randn(4, 6, 5, 7, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    want = dense.double().square().sum()
    for name, layout in LAYOUTS.items():
        grad = layout(dense)
        want = grad.double().square().sum()
        sums = ops.mtadam_square_sums([dense[0], grad, None, grad], 2, impl=impl)
        budget = square_sum_budget(want, 840, torch.float32)
        assert_matches_reference(sums[1], want.expand(2), budget.expand(2), name=name)
        assert sums[0, 1] == 0 and sums[1, 0] == sums[1, 1]


def test_square_sums_that_are_not_finite(impl):
    for dtype in DTYPES:
        grads = [torch.ones(4100, dtype=dtype) for _ in range(6)]
        grads[1][4099], grads[3][0], grads[5][7] = NAN, INF, -INF
        sums = ops.mtadam_square_sums(grads, 2, impl=impl)
        assert sums[0].tolist() == [4100.0] * 3
        assert sums[1].isnan().tolist() == [True, False, False]
        assert sums[1].isinf().tolist() == [False, True, True]
    large = torch.full((4,), 300.0, dtype=torch.float16)  # whose squares float16 has not
    assert ops.mtadam_square_sums([large], 1, impl=impl).tolist() == [[360000.0]]


def test_defaults_are_those_of_the_paper(impl):
    inputs = make_inputs([(33,)], 2)
    *tensors, _ = cloned(inputs)
    ops.mtadam_update_(*tensors, lr=0.1, impl=impl)
    options = {"betas": (0.9, 0.999, 0.9), "eps": 1e-8, "anchor": 0, "alive_eps": 1e-10, "nonfinite": "skip"}
    update(inputs, lr=0.1, impl=impl, **options)
    assert all(map(torch.equal, (*inputs.params, *inputs.exp_avg_sqs), (*tensors[0], *tensors[3])))
