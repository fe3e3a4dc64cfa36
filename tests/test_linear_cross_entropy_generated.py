"""linear_cross_entropy of generated arguments: a right answer, or a refusal in words."""

import math
import random
from dataclasses import replace

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    POSITIVE,
    SIZES,
    SIZES_AND_NONE,
    TAME,
    Made,
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
from fastkit.ops import linear_cross_entropy, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS
from fastkit.testing import linear_cross_entropy as testing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

REDUCTIONS = "none", "sum", "mean"
SMOOTHING = *[0.0] * 8, *[0.1] * 8, 0, 0.5, 1 - 2**-53, 1e-30, -0.0, 1.0, math.nan
SOFTCAPS = *[None] * 8, *[3.0] * 8, 30, 1e-3, 1e30, 1e-40, 0.0, math.inf
ZETAS = *[0.0] * 8, *[1e-4] * 8, 0, 0.5, 1e30, -1e-4, math.nan
IGNORED = -100, -100, -100, -1, 0, 3, 2**40


def targets(choose, tokens, classes, ignore_index):
    """Of classes, and of what is ignored; now and then one that is neither."""
    numbers = random.Random(choose(range(1000)))
    allowed = [*range(classes), ignore_index] if choose((False, True)) else range(classes)
    values = numbers.choices(allowed, k=math.prod(tokens))
    if values and choose(range(24)) == 23:
        values[0] = choose((-1, classes, 2**31 - 1, -(2**31)))
    dtype = choose((torch.int64, torch.int64, torch.int32))
    if dtype == torch.int32:
        values = [min(max(v, -(2**31)), 2**31 - 1) for v in values]
    layout = choose(("dense", "dense", "reversed", "stepped", "offset", "rows"))
    return Made(tokens, dtype, layout=layout, values=tuple(values) or None)


def loss_call(choose):
    dtype, D, V = choose(OF_CALLS), choose(SIZES), choose(SIZES)
    tokens = choose(((1,), (2,), (5,), (25,), (40,), (), (0,), (2, 3), (3, 1, 4), (2, 0)))
    wide, ignored = arithmetic_of(dtype), choose(IGNORED)

    def maybe(*shape, grads=False, **fields):
        if choose((False, False, True)):
            return None
        made = drawn(choose, *shape, dtype=choose((dtype, wide)), **fields)
        return made if grads or choose(range(32)) == 31 else replace(made, grad=False)

    call = {
        "input": drawn(choose, *tokens, D, dtype=dtype),
        "linear_weight": drawn(choose, V, D, dtype=dtype),
        "target": targets(choose, tokens, V, ignored),
        "linear_bias": maybe(V, grads=True),
        "weight": maybe(V, kind=POSITIVE),
        "reduction": choose(REDUCTIONS),
        "ignore_index": ignored,
        "label_smoothing": choose(SMOOTHING),
        "softcap": choose(SOFTCAPS),
        "z_loss": choose(ZETAS),
        "token_weight": maybe(*tokens),
        "check": choose((False, True)),
    }
    return choose((linear_cross_entropy, linear_cross_entropy_with_lse)), spoiled(choose, call)


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, check, also=("linear_cross_entropy",))


def check(call, found, plain):
    kinds = kinds_of(call)
    numbers = [float(call[name] or 0) for name in ("label_smoothing", "softcap", "z_loss")]
    if "huge" in kinds or max(numbers) > 1e10:
        return
    # Squares of a large lse overflow, those of float64 in the oracle too; and its logits err by more than 1,
    # so that any class may have the probability.
    large, wide = "large" in kinds, found.arguments["input"].dtype == torch.float64
    if not kinds <= set(TAME) or (large and (wide or call["z_loss"])):
        for place, result in found.results.items():
            assert_same_finiteness(result, plain.results[place], place)
        assert_no_other_nan(call, found, plain)
        return
    expected = expected_results(call, found)
    for answer in (found, plain):
        lse = answer.results.get("lse")
        loss = answer.results["result" if lse is None else "loss"]
        assert_near(loss.flatten() if call["reduction"] == "none" else loss, expected["loss"], "loss")
        if lse is not None:
            assert_near(lse.flatten(), expected["lse"], "lse")
    if large:
        assert_no_other_nan(call, found, plain)
        return
    for path, gradient in found.gradients.items():
        got = gradient.reshape(-1, gradient.shape[-1]) if path == "input" else gradient
        assert_near(got, expected[f"g{path}"], f"the gradient of {path}")


def assert_no_other_nan(call, found, plain):
    """Gradients that the reference has are numbers here too; where all tokens have a part, no others are.

    The reference multiplies NaN of the classes by the 0 of a token that has none, which is passed over here.
    """
    counts = call["weight"] is None and call["token_weight"] is None
    counts = counts and not (found.arguments["target"].long() == call["ignore_index"]).any()
    for path, gradient in found.gradients.items():
        expected = plain.gradients[path]
        got = gradient if counts else gradient.masked_fill(~expected.isfinite(), torch.nan)
        assert_same_finiteness(got, expected, f"the gradient of {path}")


def assert_near(got, expected, name):
    """Where the value is a number: not the mean over no token."""
    value, budget = expected
    assert_within(got, value, torch.where(value.isfinite(), budget, 0.0), name)


def expected_results(call, found):
    arguments = plain_values(found.arguments, None)
    x, reduction = arguments["input"], call["reduction"]
    tokens = math.prod(x.shape[:-1])
    cotangents = found.cotangents
    with_lse = "lse" in cotangents
    loss = cotangents["loss" if with_lse else "result"]
    inputs = testing.Inputs(
        x.reshape(tokens, x.shape[-1]),
        arguments["linear_weight"],
        arguments["target"].long().flatten(),
        arguments["linear_bias"],
        arguments["weight"],
        None if arguments["token_weight"] is None else arguments["token_weight"].flatten(),
        loss.flatten() if reduction == "none" else loss,
        cotangents["lse"].flatten() if with_lse else torch.zeros(tokens),
    )
    names = "reduction", "ignore_index", "label_smoothing", "softcap", "z_loss"
    return testing.expected_results(inputs, {name: call[name] for name in names}, with_lse=with_lse)


def test_generated_calls():
    check_generated(loss_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(loss_call, judge, 10_000)


def test_an_ignore_index_that_no_int64_has():
    arguments = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 0])
    expected = linear_cross_entropy(*arguments)
    for impl in ("cpu", "reference"):
        for ignore_index in (2**63 - 1, -(2**63)):
            assert torch.equal(
                linear_cross_entropy(*arguments, ignore_index=ignore_index, impl=impl), expected
            )
        for ignore_index, bits in ((2**63, 64), (10**400, 1329)):
            words = (
                rf"^linear_cross_entropy: ignore_index must be a number that int64 has, got one of {bits} "
            )
            with pytest.raises(ValueError, match=words):
                linear_cross_entropy(*arguments, ignore_index=ignore_index, impl=impl)


@pytest.mark.parametrize("softcap", [1e-40, 1e39])
def test_a_softcap_that_the_arithmetic_has_not(softcap):
    """In float32 it would be subnormal or infinite; float64 has it."""
    arguments = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 0])
    for impl in ("cpu", "reference"):
        words = r"^linear_cross_entropy: softcap must be between 1.17549e-38 and 3.40282e\+38, as logits of"
        for x, weight in (arguments[:2], (t.half() for t in arguments[:2])):
            with pytest.raises(ValueError, match=words):
                linear_cross_entropy(x, weight, arguments[2], softcap=softcap, impl=impl)
        x, weight = (t.double() for t in arguments[:2])
        loss = linear_cross_entropy(x, weight, arguments[2], softcap=softcap, impl=impl)
        torch.testing.assert_close(loss, torch.tensor(4.0, dtype=torch.float64).log())


def test_an_ignore_index_beyond_int32_is_no_target_of_int32():
    """Though it would be 0 in as many bits."""
    x, weight, target = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1, 0])
    for impl in ("cpu", "reference"):
        found = linear_cross_entropy(x, weight, target.int(), ignore_index=2**40, impl=impl)
        assert torch.equal(found, linear_cross_entropy(x, weight, target, impl=impl))
        with pytest.raises(
            RuntimeError, match=r"target must be in \[0, 4\) or ignore_index = 1099511627775, got -1"
        ):
            linear_cross_entropy(x, weight, target.int() - 1, ignore_index=2**40 - 1, impl=impl)


# The raw ops


def raw_call(choose):
    dtype, N, c = (
        choose((torch.float32, torch.float32, torch.float64, *FLOATS)),
        choose(SIZES_AND_NONE),
        choose(SIZES),
    )
    first, name = choose((0, 0, 3, 20)), choose(("sums", "gradient"))
    numbers = random.Random(choose(range(1000)))
    target = Made((N,), torch.int64, values=tuple(numbers.choices(range(first + c + 5), k=N)))
    logits = drawn(choose, N, c, dtype=dtype, kind="normal", layout=("dense", "dense", "rows", "offset"))
    weight = choose((None, drawn(choose, first + c, dtype=dtype, kind="+normal", layout="dense")))
    common = {"first": first, "softcap": choose((0.0, 0.0, 2.0)), "class_weight": weight}
    dense = {"kind": "normal", "layout": "dense"}
    if name == "sums":
        state = drawn(choose, N, 4, dtype=dtype, **dense)
        call = {
            "state": state,
            "logits": logits,
            "target": target,
            **common,
            "smooths": choose((False, True)),
        }
    else:
        dz = drawn(choose, N, c, dtype=dtype, kind="normal", layout=("dense", "rows", "offset"))
        lse, coefficients = drawn(choose, N, dtype=dtype, **dense), drawn(choose, N, 3, dtype=dtype, **dense)
        call = {
            "dz": dz,
            "logits": logits,
            "target": target,
            "lse": lse,
            "coefficients": coefficients,
            **common,
        }
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return f"linear_cross_entropy_{name}_", list(call.values()), [0]


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
