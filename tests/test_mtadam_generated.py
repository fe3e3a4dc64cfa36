"""mtadam_update_ and mtadam_square_sums of generated arguments: a right answer, or a refusal in words."""

import math

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    OWN_MEMORY,
    TAME,
    Made,
    arithmetic_of,
    assert_same_finiteness,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    found_in,
    kinds_of,
    mapped,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops import mtadam_square_sums, mtadam_update_
from fastkit.ops.mtadam import KERNELS
from fastkit.testing.mtadam import Inputs, expected_results, square_sum_budget

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

SHAPES = (1,), (2,), (7,), (16,), (40,), (), (0,), (3, 4), (5, 1), (2, 3, 4), (33, 3), (2, 0)
WRITTEN = "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "grad_norms", "steps"
MOMENTS = *["+normal"] * 10, "zeros", "zeros", "+subnormal", "nan", "+inf"

# Of options, besides the default: borders, and what is common.
OPTIONS = {
    "lr": (0.0, 1e-3, 2**-7, 1.0, 1, 1e-300, 1e30, Made((), torch.float64, values=(0.01,)), Made((1,))),
    "betas": ((0.9, 0.999, 0.9), (0.0, 0.0, 0.0), (0.5, 0.75, 0.5), [0.9, 0.5, 0], (1 - 2**-53, 0.5, 0.5)),
    "eps": (1e-8, 1e-3, 1.0, 0.0),
    "weight_decay": (0.0, 0.01, 1),
    "decoupled": (False, True),
    "alive_eps": (1e-10, 0.0, 1e-3),
    "max_scale": (None, 1.0, 0.01, 1e30, 2),
    "nonfinite": ("skip", "skip_term", "propagate"),
}


def update_call(choose):
    dtype, L = choose(OF_CALLS), choose((1, 1, 2, 3, 5))
    shapes = [choose(SHAPES) for _ in range(choose((1, 1, 2, 3)))]
    n, state = len(shapes), arithmetic_of(dtype)
    layout = choose(("dense", "dense", "dense", "reversed", "swapped"))  # of the state

    def each(**fields):
        return [drawn(choose, *shape, **fields) for shape in shapes]

    def moments(kinds):
        return each(dtype=state, kind=kinds, layout=layout)

    kinds = choose(
        (("normal",), ("normal",), ("normal", "integers", "zeros", "small", "large", "huge", "nan", "inf"))
    )
    grads = [grad for _ in range(L) for grad in each(dtype=dtype, kind=kinds)]
    call = {
        "params": each(dtype=dtype, layout=OWN_MEMORY),
        "grads": [grad if choose(range(8)) < 7 else None for grad in grads],
        "exp_avgs": moments(("normal", "normal", "zeros")),
        "exp_avg_sqs": [moment for _ in range(L) for moment in moments(MOMENTS)],
        "grad_norms": drawn(choose, n, L, dtype=state, kind=MOMENTS, layout=("dense", "offset")),
        "steps": Made((n,), state, values=(choose((0, 0, 1, 5, 1000)),) * n),
        "lr": 1e-2,
    }
    for name, values in OPTIONS.items():
        if choose((False, False, True)):
            call[name] = choose(values)
    if choose(range(4)) == 3:
        call["max_exp_avg_sqs"] = moments(MOMENTS)
    if choose(range(4)) == 3:
        call["ranks"] = [choose((1.0, 0.5, 3, 0.0)) for _ in range(L)]
    if choose(range(4)) == 3:
        call["anchor"] = choose(range(L))
    if choose(range(6)) == 5:
        call["square_sums"] = drawn(
            choose, n, L, dtype=torch.float64, kind=MOMENTS, layout=("dense", "offset")
        )
    if choose(range(6)) == 5:
        call["grad_scales"] = Made((L,), values=tuple(choose((1.0, 2.0, 1024.0)) for _ in range(L)))
    if choose(range(6)) == 5:
        call["found_inf"] = Made(choose(((), (1,), (1, 1))), values=(choose((0.0, 0.0, 1.0)),))
    call = spoiled(choose, call)
    for name in ("square_sums", "grad_scales", "found_inf"):
        if isinstance(call.get(name), Made) and call[name].layout == "zero":
            del call[name]  # in whose place PyTorch gives kernels an expanded zero, which they refuse
    return mtadam_update_, call


def sums_call(choose):
    dtype, L = choose(OF_CALLS), choose((1, 2, 3))
    shapes = [choose(SHAPES) for _ in range(choose((1, 2, 3)))]
    grads = [drawn(choose, *shape, dtype=dtype) for _ in range(L) for shape in shapes]
    call = {"grads": [grad if choose(range(8)) < 7 else None for grad in grads], "n": len(shapes)}
    return mtadam_square_sums, spoiled(choose, call)


def any_call(choose):
    return choose((update_call, update_call, update_call, sums_call))(choose)


def judge(op_and_call):
    op, call = op_and_call
    if op is mtadam_square_sums:
        return verdict(op, call, check_sums)
    return verdict(op, call, check_update, writes=WRITTEN)


def check_sums(call, found, plain):
    if "huge" in kinds_of(call):
        return
    grads, n = found.arguments["grads"], call["n"]
    for i in range(n):
        for term, grad in enumerate(grads[i::n]):
            for answer in (found, plain):
                got = answer.results["result"][i, term]
                if grad is None:
                    assert got == 0
                    continue
                value = plain_values(grad).square().sum()
                if grad.dtype == torch.float64:  # whose sum is summed in float64 too, and so is the oracle's
                    budget = 2 * square_sum_budget(value, grad.numel(), grad.dtype)
                else:
                    budget = square_sum_budget(value, grad.numel(), grad.dtype)
                assert_within(got, value, budget, f"({i}, {term})")


def check_update(call, found, plain):
    kinds = kinds_of(call)
    if "huge" in kinds or not found.arguments["params"]:
        return
    results = {place: t for place, t in found_in(found.arguments, torch.Tensor) if place.startswith(WRITTEN)}
    others = {place: t for place, t in found_in(plain.arguments, torch.Tensor) if place.startswith(WRITTEN)}
    torch.testing.assert_close(results["steps"], others["steps"], rtol=0, atol=0, equal_nan=True)
    tame = kinds <= set(TAME)
    before = plain_values(mapped(Made.tensor, call), None)
    if any((v < 0).any() for v in (*before["exp_avg_sqs"], *(before.get("max_exp_avg_sqs") or ()))):
        return  # which no squares are
    usual = tame and call.get("lr") != 1e-300
    if kinds & {"large", "small"} or call.get("lr") == 1e30 or (call.get("weight_decay") or 0) > 1e15:
        return  # where it overflows depends on the order of products
    if "subnormal" in kinds and call.get("eps") == 0.0:
        return  # which are zero on some processors, and divided by
    if not usual or call.get("eps") == 0.0 or (1 - 2**-53) in call.get("betas", ()):
        for place, result in results.items():
            kept = finite_params(before["params"], place)  # another one may make its moments NaN
            assert_same_finiteness(result[kept], others[place][kept], place)
        return
    options = {name: before.pop(name) for name in list(before) if name not in Inputs._fields}
    options = {"betas": (0.9, 0.999, 0.9)} | options
    before["max_exp_avg_sqs"] = before.get("max_exp_avg_sqs") or None
    options.pop("impl", None)
    options["lr"] = float(options["lr"]) if isinstance(options["lr"], int) else options["lr"]
    inputs = Inputs(**before)
    try:
        expected = expected_results(inputs, **options)
    except ValueError as error:
        assert "eps is too small" in str(error)
        return
    for name, (value, budget) in expected.items():
        assert_within(results[name], value, budget, name)
        assert_within(others[name], value, budget, f"{name} of the reference")


def finite_params(params, place):
    if not place.endswith("]"):
        return ...
    return params[int(place[place.index("[") + 1 : -1]) % len(params)].isfinite()


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


def step(**changed):
    tensors = {"params": [torch.ones(2)], "grads": [torch.ones(2)], "exp_avgs": [torch.zeros(2)]}
    tensors |= {"exp_avg_sqs": [torch.zeros(2)], "grad_norms": torch.zeros(1, 1), "steps": torch.zeros(1)}
    mtadam_update_(**(tensors | {"lr": 0.1} | changed))


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_lists_are_lists(name):
    for value, kind in ((0.5, "float"), (torch.ones(1, 2), "Tensor")):
        with pytest.raises(
            TypeError, match=rf"^mtadam_update_: {name} must be a list of tensors, got {kind}"
        ):
            step(**{name: value})
    with pytest.raises(
        TypeError, match=r"^mtadam_square_sums: grads must be a list of tensors, got NoneType"
    ):
        mtadam_square_sums(None, 1)


def test_options_of_other_types():
    for value in (None, "yes", 1):
        with pytest.raises(TypeError, match=r"^mtadam_update_: decoupled must be True or False, got"):
            step(decoupled=value)
    with pytest.raises(ValueError, match=r"^mtadam_update_: anchor must be the index of one of the 1 terms"):
        step(anchor=False)
    with pytest.raises(ValueError, match=r"^mtadam_square_sums: grads must be n for each term.* of n = True"):
        mtadam_square_sums([torch.ones(2)], True)
    for name in ("lr", "eps", "weight_decay", "alive_eps", "max_scale"):
        with pytest.raises(ValueError, match=rf"^mtadam_update_: {name} must be finite and not negative"):
            step(**{name: 10**400})


def test_the_meta_device_has_no_values():
    tensors = {"params": [torch.ones(2)], "grads": [torch.ones(2)], "exp_avgs": [torch.zeros(2)]}
    tensors |= {"exp_avg_sqs": [torch.zeros(2)], "grad_norms": torch.zeros(1, 1), "steps": torch.zeros(1)}
    meta = {k: [t.to("meta") for t in v] if isinstance(v, list) else v.to("meta") for k, v in tensors.items()}
    with pytest.raises(
        RuntimeError, match=r"^mtadam_update_: params must have values, got tensors on the meta"
    ):
        mtadam_update_(**meta, lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"^mtadam_update_: lr must have a value, got a tensor on the meta"
    ):
        step(lr=torch.ones((), device="meta"))


def test_a_gradient_whose_sign_is_yet_to_be_turned():
    """As the imaginary part of a conjugate is: in a list of optional tensors nobody turns it."""
    z = torch.complex(torch.zeros(3), torch.tensor([1.0, -2.0, 3.0]))
    params = []
    for grad in (z.conj().imag, z.conj().imag.resolve_neg()):
        params.append(torch.ones(3))
        moments = {"exp_avgs": [torch.zeros(3)], "exp_avg_sqs": [torch.zeros(3)]}
        step(params=[params[-1]], grads=[grad], **moments)
    assert torch.equal(*params)


def test_a_gradient_of_zeros_without_memory():
    """As autograd has them: a gradient, not None."""
    steps, moments = torch.zeros(1), [torch.ones(2)]
    step(steps=steps, grads=[torch._efficientzerotensor((2,))], exp_avg_sqs=moments)
    assert steps == 1 and torch.equal(moments[0], torch.full((2,), 0.999))


@pytest.mark.parametrize("last", [torch.ones(2), None])
def test_a_negated_view_of_state(last):
    """PyTorch would turn its sign, before and after, but fails at lists that may have None."""
    steps = torch.complex(torch.zeros(1), torch.tensor([-3.0])).conj().imag
    grads, norms, moments = [torch.ones(2), last], torch.zeros(1, 2), [torch.zeros(2), torch.zeros(2)]
    step(steps=steps, grads=grads, grad_norms=norms, exp_avg_sqs=moments)
    assert steps == 4


@pytest.mark.parametrize("terms", [1, 2])
def test_a_second_moment_that_is_nan_reaches_the_parameter(terms):
    """It was taken as 0, and the step was divided by eps."""
    params, moments = [torch.ones(3)], [torch.full((3,), torch.nan), torch.ones(3)][:terms]
    grads, norms = [torch.ones(3)] * terms, torch.zeros(1, terms)
    step(params=params, grads=grads, exp_avgs=[torch.zeros(3)], exp_avg_sqs=moments, grad_norms=norms)
    assert params[0].isnan().all()


# The raw ops


def raw_call(choose):
    dtype, L, n = choose(FLOATS), choose((1, 2, 3)), choose((1, 2, 3))
    shapes = [choose(SHAPES) for _ in range(n)]
    state, folded = arithmetic_of(dtype), choose((L, L, 1))
    first = choose(range(L - folded + 1))

    def each(count, kind="normal", layout=("dense", "offset"), dtype=dtype):
        return [
            drawn(choose, *s, dtype=dtype, kind=kind, layout=layout) for _ in range(count) for s in shapes
        ]

    grads = [grad if choose(range(8)) < 7 else None for grad in each(folded)]
    if choose(range(4)) == 3:
        call = spoiled(choose, {"grads": grads, "n": n}, faults=(0, 0, 1, 1, 2))
        call.pop("impl", None)
        return "mtadam_square_sums", list(call.values())
    norms = drawn(choose, n, L, dtype=state, kind="+normal", layout="dense")
    call = {
        "params": each(1, layout=OWN_MEMORY),
        "grads": grads,
        "exp_avgs": each(1, dtype=state),
        "exp_avg_sqs": each(L, "+normal", dtype=state),
        "max_exp_avg_sqs": each(choose((0, 0, 1)), "+normal", dtype=state),
        "grad_norms": norms,
        "steps": Made((n,), state, values=(3,) * n),
        "square_sums": None,
        "lr": 0.01,
        "lr_tensor": choose((None, Made((), torch.float64, values=(0.01,)))),
        "betas": choose(([0.9, 0.999, 0.9], [0.9, 0.999, 0.9], [0.9])),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled": choose((False, True)),
        "ranks": choose(([], [1.0] * L, [1.0])),
        "anchor": choose(range(L)),
        "alive_eps": 1e-10,
        "max_scale": choose((math.inf, 2.0)),
        "nonfinite": choose(("skip", "skip_term", "propagate")),
        "grad_scales": choose((None, Made((L,), kind="+normal"))),
        "found_inf": choose((None, Made((), values=(0.0,)))),
        "first": first,
        "applies": choose((False, True)),
    }
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return "mtadam_update_", list(call.values()), [0, 2, 3, 4, 5, 6]


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
