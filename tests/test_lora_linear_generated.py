"""lora_linear, column_norms and pruning of generated arguments: a right answer, or a refusal in words."""

import math
from unittest import mock

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    OWN_MEMORY,
    POSITIVE,
    SIZES,
    SIZES_AND_NONE,
    TAME,
    arithmetic_of,
    assert_same_finiteness,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    kinds_of,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops import (
    column_norms,
    lora_linear,
    lora_linear_with_stats,
    prune_rows_,
    prune_rows_grouped_,
)
from fastkit.ops.lora_linear import KERNELS
from fastkit.testing import Expected
from fastkit.testing import lora_linear as testing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

SCALES = 0.7, 0.7, 0.5, 1, -2.0, 3, 0, 1e-3, math.inf, math.nan
RATIOS = 0.0, 0.1, 0.25, 0.5, 0.9, 0, 1 - 2**-53, 2**-1074, 1.0, -0.0


def linear_call(choose):
    dtype, D, O, R = choose(OF_CALLS), choose(SIZES), choose(SIZES_AND_NONE), choose(SIZES)  # noqa: E741
    tokens = choose(((1,), (2,), (5,), (25,), (40,), (), (0,), (2, 3), (3, 1, 4), (2, 0)))
    adapter = choose((dtype, arithmetic_of(dtype)))
    call = {
        "x": drawn(choose, *tokens, D, dtype=dtype),
        "weight": drawn(choose, O, D, dtype=dtype),
        "bias": drawn(choose, O, dtype=dtype) if choose((False, True)) else None,
        "lora_a": drawn(choose, R, D, dtype=adapter),
        "lora_b": drawn(choose, O, R, dtype=adapter),
        "scale": choose(SCALES),
        "mask": drawn(choose, R, D, dtype=torch.bool, kind="integers") if choose((False, True)) else None,
        "lora_x": drawn(choose, *tokens, D, dtype=dtype) if choose((False, False, True)) else None,
    }
    return choose((lora_linear, lora_linear_with_stats)), spoiled(choose, call)


def norms_call(choose):
    rows = choose(((1,), (40,), (300,), (), (0,), (2, 3)))
    return column_norms, spoiled(choose, {"x": drawn(choose, *rows, choose(SIZES), dtype=choose(OF_CALLS))})


def prune_call(choose):
    R, D = choose(SIZES_AND_NONE), choose(SIZES_AND_NONE)
    call = {
        "lora_a": drawn(choose, R, D, dtype=choose(OF_CALLS), layout=OWN_MEMORY),
        "input_norm": drawn(choose, D, kind=POSITIVE),
        "ratio": choose(RATIOS),
    }
    return prune_rows_, spoiled(choose, call)


def grouped_call(choose):
    sizes = [(choose(SIZES_AND_NONE), choose(SIZES_AND_NONE)) for _ in range(choose((0, 1, 2, 3)))]
    call = {
        "lora_as": [drawn(choose, *size, dtype=choose(FLOATS), layout=OWN_MEMORY) for size in sizes],
        "input_norms": [drawn(choose, D, kind="+normal") for _, D in sizes],
        "ratio": choose(RATIOS),
    }
    return prune_rows_grouped_, spoiled(choose, call)


def any_call(choose):
    return choose((linear_call, linear_call, linear_call, linear_call, norms_call, prune_call, grouped_call))(
        choose
    )


def judge(op_and_call):
    op, call = op_and_call
    if op is column_norms:
        return verdict(op, call, check_norms)
    if op in (prune_rows_, prune_rows_grouped_):
        return verdict(op, call, check_pruned, also=("prune_rows_",), writes=("lora_a", "lora_as"))
    return verdict(op, call, check_linear, also=("lora_linear",))


def check_linear(call, found, plain):
    kinds, scale = kinds_of(call), float(call["scale"])
    if "huge" in kinds:
        return
    if not math.isfinite(scale) or not kinds <= set(TAME):
        for place, result in found.results.items():
            assert_same_finiteness(result, plain.results[place], place)
        return
    arguments = plain_values(found.arguments, None)
    shape = arguments["x"].shape
    gy = next(iter(found.cotangents.values()))
    del arguments["scale"]
    arguments |= {name: _rows(arguments[name]) for name in ("x", "lora_x")} | {"gy": _rows(gy)}
    arguments["mask"] = arguments["mask"] if arguments["mask"] is None else arguments["mask"].bool()
    arguments.pop("impl", None)
    expected = expected_results(testing.Inputs(**arguments), scale)
    if shape.numel() and found.arguments["x"].dtype.itemsize == 2 and arguments["bias"] is not None:
        # PyTorch rounds the product before it adds a bias that has gaps.
        product = arguments["x"].double() @ arguments["weight"].double().T
        value, budget = expected["y"]
        expected["y"] = Expected(value, budget + torch.finfo(arguments["x"].dtype).eps * product.abs())
    names = {"result": "y", "y": "y", "square_sum": "square_sum"}
    for answer in (found, plain):
        for place, result in answer.results.items():
            value, budget = expected[names[place]]
            assert_within(_rows(result) if names[place] == "y" else result, value, budget, place)
            assert names[place] != "y" or result.shape[:-1] == shape[:-1]
    for path, gradient in found.gradients.items():
        got = _rows(gradient) if path in ("x", "lora_x") else gradient
        assert_within(got, *expected[f"g{path}"], f"the gradient of {path}")


def expected_results(inputs, scale):
    """Of any scale; the budgets are of a positive one, and -s b is s (-b)."""
    if scale < 0:
        inputs = inputs._replace(lora_b=-inputs.lora_b)
    with mock.patch.object(testing, "SCALE", abs(scale)):
        expected = testing.expected_results(inputs)
    if scale < 0:
        value, budget = expected["glora_b"]
        expected["glora_b"] = Expected(-value, budget)
    return expected


def _rows(x):
    return x if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_norms(call, found, plain):
    if "huge" in kinds_of(call):
        return
    x = plain_values(found.arguments["x"], None)
    rows = x.double().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    eps, tiny = torch.finfo(arithmetic_of(x.dtype)).eps, torch.finfo(torch.float32).tiny
    norm = rows.square().sum(0).sqrt()
    error = (len(rows) + 3) * eps / 2 * norm.square() + len(rows) * tiny
    root = (error / norm.clamp(min=1e-19)).clamp(max=error.sqrt())
    for answer in (found, plain):
        budget = root + torch.finfo(torch.float32).eps * norm + tiny
        assert_within(answer.results["result"], norm, budget, "result")


def check_pruned(call, found, plain):
    """The same bits; what is kept is as it was."""
    for name, mask in found.results.items():
        assert mask.dtype == torch.bool and torch.equal(mask, plain.results[name])
    for name in ("lora_a", "lora_as"):
        many, others = (answer.arguments.get(name, []) for answer in (found, plain))
        pairs = [(many, others)] if isinstance(many, torch.Tensor) else zip(many, others, strict=True)
        for one, other in pairs:
            assert torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


def test_a_scale_that_no_float_has():
    arguments = torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1)
    with pytest.raises(
        ValueError, match=r"^lora_linear: scale must be a number that float64 has, got one of 1329"
    ):
        lora_linear(*arguments, 10**400)
    y, of_reference = (lora_linear(*arguments, 2**70, impl=impl) for impl in ("cpu", "reference"))
    assert torch.equal(y, of_reference)


def test_norms_that_require_grad_are_refused_without_a_warning():
    norm = torch.tensor([1.0, -1.0]).requires_grad_()
    for impl in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match=r"^prune_rows_: input_norm must be finite and not neg"):
            prune_rows_(torch.ones(1, 2), norm, 0.5, impl=impl)


# The raw ops


def raw_call(choose):
    name = choose(("lora_linear_fwd_", "lora_linear_bwd_", "column_square_sums", "prune_rows_"))
    dtype, D, O, R = choose(FLOATS), choose(SIZES_AND_NONE), choose(SIZES_AND_NONE), choose(SIZES)  # noqa: E741
    N, wide, adapter = (
        choose((*SIZES_AND_NONE, 100)),
        arithmetic_of(dtype),
        choose((dtype, arithmetic_of(dtype))),
    )
    rows = "dense", "dense", "offset", "rows"

    def of(*shape, dtype=dtype, **fields):
        return drawn(choose, *shape, dtype=dtype, kind="normal", **fields)

    def maybe(make):
        return make() if choose((False, True)) else None

    masked = maybe(lambda: of(R, D, dtype=torch.bool))
    written = [0]
    if name == "column_square_sums":
        call, written = {"x": of(N, D)}, []
    elif name == "prune_rows_":
        sizes = [(choose(SIZES_AND_NONE), choose(SIZES_AND_NONE)) for _ in range(choose((1, 2, 3)))]
        call = {
            "matrices": [of(*size, dtype=choose(FLOATS), layout=OWN_MEMORY) for size in sizes],
            "norms": [drawn(choose, D, kind="+normal") for _, D in sizes],
            "ratio": choose(RATIOS),
            "masks": [of(*size, dtype=torch.bool, layout="dense") for size in sizes],
        }
        written = [0, 3]
    elif name == "lora_linear_fwd_":
        call = {"y": of(N, O, layout=rows), "x": of(N, D), "lora_x": maybe(lambda: of(N, D))}
        call |= {"a": of(R, D, dtype=adapter), "mask": masked, "b": of(O, R, dtype=adapter)}
        call |= {"scale": choose((0.7, 1.0)), "needs_square_sum": choose((False, True))}
    else:
        gx = maybe(lambda: of(N, D, layout=rows))
        call = {"gx": gx, "gy": of(N, O), "x": of(N, D), "h": of(N, R, dtype=wide)}
        call |= {"a": of(R, D, dtype=adapter), "mask": masked, "b": of(O, R, dtype=adapter), "scale": 0.7}
        call |= {key: choose((False, True)) for key in ("adds", "needs_adapter", "needs_bias")}
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return name, list(call.values()), written


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)


@pytest.mark.native
def test_raw_backward_without_columns():
    """Its gradients were not written."""
    gy, x, h, a, b = (torch.ones(shape) for shape in ((2, 3), (2, 0), (2, 1), (1, 0), (3, 1)))
    with pytest.raises(RuntimeError, match=r"^lora_linear: .* with R >= 1 and D >= 1"):
        torch.ops.fastkit.lora_linear_bwd_(None, gy, x, h, a, None, b, 1.0, False, True, True)
