"""multihead_loss and orthogonality_penalty of generated arguments: a right answer, or a refusal in words."""

import math
import random
from dataclasses import replace

import pytest
import torch
from generated import (
    OF_CALLS,
    POSITIVE,
    SIZES,
    TAME,
    Made,
    arithmetic_of,
    assert_same_finiteness,
    assert_within,
    check_generated,
    drawn,
    kinds_of,
    plain_values,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops import multihead_loss, orthogonality_penalty
from fastkit.ops.multihead_loss import KERNELS
from fastkit.testing import multihead_loss as testing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

PROBLEMS = *["single_label"] * 3, "multi_label", "regression"
SMOOTHING = *[0.0] * 8, *[0.1] * 8, 0, 0.5, 1 - 2**-53, 1e-30, -0.0, 1.0, math.nan
IGNORED = -100, -100, -100, -1, 0, 3, 2**40, 2**63
PENALTIES = "abs", "squared", "cos_abs", "cos_squared", "huber"
WIDTHS = *[1e-2] * 8, 0.5, 1, 3.0, 1e-30, 1e30, 1e-40, 0.0, -1.0, math.inf, math.nan
OF_FLAGS = "dense", "dense", "reversed", "stepped", "offset", "rows"


# The loss


def classes_of_rows(choose, rows, classes, ignore_index):
    """Targets of a single label; now and then one that is neither a class nor ignored."""
    numbers = random.Random(choose(range(1000)))
    allowed = [*range(classes), ignore_index] if choose((False, True)) else range(classes)
    values = numbers.choices(allowed, k=rows)
    if values and choose(range(24)) == 23:
        values[0] = choose((-1, classes, 2**31 - 1, -(2**31)))
    dtype = choose((torch.int64, torch.int64, torch.int32))
    info = torch.iinfo(dtype)
    values = tuple(min(max(v, info.min), info.max) for v in values)
    return Made((rows,), dtype, layout=choose(OF_FLAGS), values=values or None)


def some_of(choose, heads):
    """Which heads are active: all that there are by default, some, now and then none."""
    if choose((False, True)):
        return None
    share = choose((0.3, 0.7, 0.7, 1.0, 0.0))
    numbers = random.Random(choose(range(1000)))
    values = tuple(numbers.random() < share for _ in range(heads))
    return Made((heads,), torch.bool, layout=choose(OF_FLAGS), values=values)


def loss_call(choose):
    dtype, problem = choose(OF_CALLS), choose(PROBLEMS)
    B, H, C, D = (choose(SIZES) for _ in range(4))
    C = {"single_label": max(C, 2), "multi_label": C, "regression": 1}[problem]
    wide, ignored, single = arithmetic_of(dtype), choose(IGNORED), problem == "single_label"

    def without_gradient(*shape, **fields):
        made = drawn(choose, *shape, **fields)
        return made if choose(range(32)) == 31 else replace(made, grad=False)

    if single:
        target = classes_of_rows(choose, B, C, ignored)
    else:
        shape = (B, C) if problem == "multi_label" else (B,)
        target = without_gradient(*shape, dtype=choose((dtype, wide, torch.float64)))
    weighted = choose((False, True)) and (problem != "regression" or choose(range(16)) == 15)
    call = {
        "x": drawn(choose, B, D, dtype=dtype),
        "weight": drawn(choose, H, C, D, dtype=dtype),
        "bias": drawn(choose, H, C, dtype=choose((dtype, wide))),
        "target": target,
        "problem": problem,
        "active": some_of(choose, H),
        "class_weight": without_gradient(C, dtype=choose((dtype, wide)), kind=POSITIVE) if weighted else None,
        "label_smoothing": choose(SMOOTHING) if single or choose(range(16)) == 15 else 0.0,
        "ignore_index": ignored,
    }
    return multihead_loss, spoiled(choose, call)


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, check if op is multihead_loss else check_penalty)


def check(call, found, plain):
    for name in ("correct", "count"):
        assert found.results[name].dtype == torch.int64, name
    assert torch.equal(found.results["count"], plain.results["count"])
    kinds = kinds_of(call)
    weights = call["class_weight"]
    # The sum of subnormal weights, by which losses are divided, has no inverse in the arithmetic.
    if "huge" in kinds or (weights is not None and weights.kind.endswith("subnormal")):
        return
    # Logits that are large err by more than 1, so that any class may have the probability; and squares of
    # them overflow, those of float64 in the oracle too.
    large = "large" in kinds
    if not kinds <= set(TAME) or (large and found.arguments["x"].dtype == torch.float64):
        assert_same_finiteness(found.results["loss"], plain.results["loss"], "loss")
        assert_no_other_nan(found, plain)
        return
    expected = expected_results(call, found)
    for answer in (found, plain):
        for name in ("loss", "correct"):
            assert_near(answer.results[name].to(found.results["loss"].dtype), expected[name], name)
    if large:
        assert_no_other_nan(found, plain)
        return
    for path, gradient in found.gradients.items():
        assert_near(gradient, expected[f"g{path}"], f"the gradient of {path}")


def assert_no_other_nan(found, plain):
    """Of a head whose loss is a number, gradients that the reference has are numbers here too; others may be
    NaN as a whole, and with them that of x.
    """
    known = plain.results["loss"].isfinite()
    for path, gradient in found.gradients.items():
        expected = plain.gradients[path]
        if path == "x":
            certain = expected.isfinite() & known.all()
        else:
            certain = expected.isfinite() & known.view(-1, *[1] * (expected.dim() - 1))
        assert (gradient.isfinite() | ~certain).all(), f"the gradient of {path}"


def assert_near(got, expected, name):
    value, budget = expected
    assert_within(got, value.double(), torch.where(value.isfinite(), budget, 0.0), name)


def expected_results(call, found):
    arguments = plain_values(found.arguments, None)
    names = "x", "weight", "bias", "target", "active", "class_weight"
    inputs = testing.Inputs(*(arguments[name] for name in names), found.cotangents["loss"])
    # Of float64 beside float32 the op takes what is left in float32; classes of int32 are those of int64.
    of = inputs.g_loss.dtype if inputs.target.is_floating_point() else torch.int64
    inputs = inputs._replace(target=inputs.target.to(of))
    options = {name: call[name] for name in ("problem", "label_smoothing", "ignore_index")}
    return testing.expected_results(inputs, options)


# The penalty


def penalty_call(choose):
    dtype, (H, C, D) = choose(OF_CALLS), (choose(SIZES) for _ in range(3))
    call = {
        "weight": drawn(choose, H, C, D, dtype=dtype),
        "kind": choose(PENALTIES),
        "huber_width": choose(WIDTHS),
        "active": some_of(choose, H),
        "center_classes": choose((False, False, True)) and (C > 1 or choose(range(8)) == 7),
    }
    return orthogonality_penalty, spoiled(choose, call)


def check_penalty(call, found, plain):
    kinds = kinds_of(call)
    if "huge" in kinds:
        return
    # Squares of products that are large overflow; those of float64 in the oracle too.
    wide = found.arguments["weight"].dtype == torch.float64
    if not kinds <= set(TAME) or (wide and "large" in kinds):
        active = found.arguments["active"]
        if active is not None and active.sum() <= 1:  # no pair: the reference multiplies NaN by the others' 0
            assert found.results["result"] == 0
        else:
            assert_same_finiteness(found.results["result"], plain.results["result"], "penalty")
        return
    arguments = plain_values(found.arguments, None)
    heads = testing.Heads(arguments["weight"], arguments["active"], found.cotangents["result"])
    options = {name: call[name] for name in ("kind", "huber_width", "center_classes")}
    expected, _ = testing.expected_penalty(heads, options)
    for answer in (found, plain):
        assert_near(answer.results["result"], expected["penalty"], "penalty")
    for path, gradient in found.gradients.items():
        assert_near(gradient, expected[f"g{path}"], f"the gradient of {path}")


def any_call(choose):
    return choose((loss_call, loss_call, loss_call, penalty_call, penalty_call))(choose)


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)
