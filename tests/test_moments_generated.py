"""moments and merge_moments of generated arguments: a right answer, or a refusal in words."""

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    POSITIVE,
    SIZES,
    SIZES_AND_NONE,
    Refusal,
    arithmetic_of,
    assert_gradients_near,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    in_float64,
    kinds_of,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops.moments import KERNELS, merge_moments, moments
from fastkit.reference import Moments
from fastkit.testing.moments import Inputs, expected_results

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]


def moments_call(choose):
    dtype, N, D = choose(OF_CALLS), choose(SIZES_AND_NONE), choose(SIZES)
    weights = None
    if choose((False, True)):
        weights = drawn(choose, N, dtype=choose((dtype, arithmetic_of(dtype))), kind=POSITIVE)
    return moments, spoiled(choose, {"x": drawn(choose, N, D, dtype=dtype), "weights": weights})


def merge_call(choose):
    D = choose(SIZES)

    def some():
        dtype = choose((torch.float32, torch.float64))
        count = drawn(choose, dtype=torch.float64, kind=POSITIVE)
        return Moments(count, drawn(choose, D, dtype=dtype), drawn(choose, D, D, dtype=dtype))

    return merge_moments, spoiled(choose, {"a": some(), "b": some()})


def any_call(choose):
    return choose((moments_call, moments_call, moments_call, merge_call))(choose)


def judge(op_and_call):
    op, call = op_and_call
    if op is merge_moments:
        return verdict(op, call, check_merge, differs=has_no_kernel)
    return verdict(op, call, check)


def has_no_kernel(call, found, plain):
    return isinstance(found, Refusal) and 'impl="cpu" cannot run: this op has no such' in found.text


def check(call, found, plain):
    kinds, x = kinds_of(call), found.arguments["x"]
    if kinds & {"huge", "subnormal"}:  # weights may be so small that they are zero
        return
    arguments = plain_values(found.arguments, None)
    gradients = [found.cotangents[name].double() for name in ("count", "mean", "scatter")]
    gradients[1:] = [g.to(arithmetic_of(x.dtype)) for g in gradients[1:]]
    expected = expected_results(Inputs(arguments["x"], arguments["weights"], *gradients))
    for answer in (found, plain):
        for name, result in answer.results.items():
            assert_within(result, *expected[name], name)
        assert torch.equal(answer.results["scatter"].nan_to_num(), answer.results["scatter"].mT.nan_to_num())
    if not kinds & {"nan", "inf"}:
        for path, gradient in found.gradients.items():
            assert_within(gradient, *expected[f"g{path}"], f"the gradient of {path}")


def check_merge(call, found, plain):
    """In float64, and rounded once."""
    if "huge" in kinds_of(call):
        return
    exact = in_float64(merge_moments, found)
    (a, b), roundoff = (plain_values(found.arguments[name]) for name in "ab"), 2.0**-50
    apart = (b.mean - a.mean).abs()
    counts = a.count.abs() + b.count.abs()
    sizes = {
        "count": counts,
        "mean": a.mean.abs() + b.mean.abs(),
        "scatter": a.scatter.abs() + b.scatter.abs() + counts * torch.outer(apart, apart),
    }
    for name, value in exact.results.items():
        got = found.results[name]
        info = torch.finfo(got.dtype)
        budget = info.eps * value.abs() + roundoff * sizes[name] + info.tiny
        assert_within(got, value, budget, name)
    if kinds_of(call) <= {"normal", "integers"}:
        assert_gradients_near(found, exact.gradients)


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_refused_weight_is_told_in_the_op_s_words_alone(impl):
    with pytest.raises(
        RuntimeError, match=r"^moments: weights must be finite and not negative, got -1 at index 1"
    ):
        moments(torch.ones(2, 3), weights=torch.tensor([1.0, -1.0]), impl=impl)


# The raw op


def raw_call(choose):
    dtype, N, D = choose(FLOATS), choose(SIZES_AND_NONE), choose(SIZES)
    weights = None
    if choose((False, True)):
        weights = drawn(choose, N, dtype=choose((dtype, arithmetic_of(dtype))), kind="+normal")
    call = {"x": drawn(choose, N, D, dtype=dtype), "weights": weights}
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return "moments_fwd", list(call.values())


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
