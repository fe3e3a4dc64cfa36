"""reference.lora_linear against NumPy, plain modules and the oracle; the budgets of its results."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from fastkit.reference import LinearWithStats, lora_linear, lora_linear_with_stats
from fastkit.testing import LinearSize, assert_matches_reference, sizes
from fastkit.testing.lora_linear import SCALE, check, expected_results, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

SIZES = sizes("lora_linear")
OPTIONS = [dict(zip(("bias", "mask", "lora_x"), c, strict=True)) for c in itertools.product((0, 1), repeat=3)]
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def call(op, inputs, scale=SCALE, **options):
    x, weight, bias, a, b, mask, lora_x, _ = inputs
    return op(x, weight, bias, a, b, scale, mask=mask, lora_x=lora_x, **options)


def result_and_gradients(op, inputs):
    """y, and the gradients to all but the mask, for the cotangent gy."""
    names = "x", "weight", "bias", "lora_a", "lora_b", "lora_x"
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in names
        if (tensor := getattr(inputs, name)) is not None
    }
    y = call(op, inputs._replace(**leaves))
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.gy)
    return {"y": y.detach(), **{f"g{name}": g for name, g in zip(leaves, gradients, strict=True)}}


# Against NumPy and plain modules


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[1], SIZES[4], SIZES[7]], ids=str)
def test_is_the_formula_in_numpy(size, options):
    """Element by element, each a sum over columns and ranks."""
    inputs = make_inputs(size, dtype=torch.float64, **options)
    x, weight, bias, a, b, mask, lora_x, _ = (None if t is None else t.numpy() for t in inputs)
    xl = x if lora_x is None else lora_x
    expected = np.zeros((size.N, size.O))
    for n, o in np.ndindex(expected.shape):
        frozen = sum(x[n, d] * weight[o, d] for d in range(size.D))
        low_rank = sum(
            xl[n, d] * a[r, d] * b[o, r] for r, d in np.ndindex(a.shape) if mask is None or mask[r, d]
        )
        expected[n, o] = frozen + (0 if bias is None else bias[o]) + SCALE * low_rank
    y, square_sum = call(lora_linear_with_stats, inputs)
    assert torch.equal(call(lora_linear, inputs), y)
    budgets = expected_results(inputs)
    assert_matches_reference(y, torch.from_numpy(expected), budgets["y"].budget)
    squares = torch.from_numpy(np.square(x).sum(0))
    assert_matches_reference(square_sum, squares, budgets["square_sum"].budget)


@pytest.mark.parametrize("dropped", [False, True])
def test_is_a_linear_layer_and_two_beside_it(dropped):
    """As PEFT adds them; gradients of its parameters too."""
    D, O, R = 9, 7, 4  # noqa: E741
    inputs = make_inputs(LinearSize(12, D, O, R), mask=False, lora_x=dropped, dtype=torch.float64)
    base, down = nn.Linear(D, O, dtype=torch.float64), nn.Linear(D, R, False, dtype=torch.float64)
    up = nn.Linear(R, O, False, dtype=torch.float64)
    parameters = (base.weight, base.bias, down.weight, up.weight)
    for parameter, value in zip(parameters, inputs[1:5], strict=True):
        parameter.data = value
    x = inputs.x.requires_grad_()
    xl = x if inputs.lora_x is None else inputs.lora_x.requires_grad_()
    y = base(x) + SCALE * up(down(xl))
    leaves = [x, *parameters, *([xl] if dropped else [])]
    expected = [y.detach(), *torch.autograd.grad(y, leaves, inputs.gy)]
    found = result_and_gradients(lora_linear, inputs)
    budgets = expected_results(inputs)
    for (name, result), want in zip(found.items(), expected, strict=True):
        assert_matches_reference(result, want, budgets[name].budget, name=name)


def test_any_axes_before_the_last_are_tokens():
    inputs = make_inputs(LinearSize(24, 7, 5, 3), lora_x=True, dtype=torch.float64)
    y, square_sum = call(lora_linear_with_stats, inputs)
    for shape in ((24,), (4, 6), (2, 3, 4), (1, 24, 1)):
        shaped = inputs._replace(x=inputs.x.view(*shape, 7), lora_x=inputs.lora_x.view(*shape, 7))
        y_shaped, square_sum_shaped = call(lora_linear_with_stats, shaped)
        assert torch.equal(y_shaped, y.view(*shape, 5)) and torch.equal(square_sum_shaped, square_sum)
    one = inputs._replace(x=inputs.x[3], lora_x=inputs.lora_x[3])
    y_one, square_sum_one = call(lora_linear_with_stats, one)
    assert y_one.shape == (5,) and torch.equal(square_sum_one, inputs.x[3].square().float())


def test_no_token_has_sums_of_zero():
    inputs = make_inputs(LinearSize(0, 3, 2, 1))
    y, square_sum = call(lora_linear_with_stats, inputs)
    assert y.shape == (0, 2) and torch.equal(square_sum, torch.zeros(3))


@pytest.mark.parametrize("adapter", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_low_rank_part_in_float32_stored_once(dtype, adapter):
    adapter = dtype if adapter == "same" else torch.float32
    inputs = make_inputs(LinearSize(13, 25, 9, 4), dtype=dtype, adapter=adapter)
    y, square_sum = call(lora_linear_with_stats, inputs)
    kept = inputs.lora_a.float() * inputs.mask
    low_rank = (inputs.x.float() @ kept.T) @ inputs.lora_b.float().T
    frozen = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    assert torch.equal(y, (frozen.float() + SCALE * low_rank).to(dtype))
    assert square_sum.dtype == torch.float32
    assert torch.equal(square_sum, inputs.x.float().square().sum(0))


def test_no_gradient_flows_through_the_statistic():
    x, weight, _, a, b, *_ = make_inputs(LinearSize(3, 4, 2, 1))
    _, square_sum = lora_linear_with_stats(x.requires_grad_(), weight, None, a, b, SCALE)
    assert not square_sum.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    inputs = make_inputs(LinearSize(3, 5, 4, 2), dtype=torch.float64, **options)
    some = {
        name: t.requires_grad_()
        for name, t in inputs._asdict().items()
        if t is not None and name not in ("mask", "gy")
    }

    def layer(*values):
        return call(lora_linear, inputs._replace(**dict(zip(some, values, strict=True))))

    assert gradcheck(layer, list(some.values()))


# The oracle


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_oracle_is_the_reference(size, options):
    """Gradients written out against autograd."""
    inputs = make_inputs(size, dtype=torch.float64, **options)
    expected = expected_results(inputs)
    found = result_and_gradients(lora_linear, inputs)
    found["square_sum"] = call(lora_linear_with_stats, inputs).square_sum
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert_matches_reference(result, *expected[name], name=name)


# Budgets accept every honest order


@pytest.mark.parametrize("adapter", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_accepts_the_reference(dtype, adapter):
    adapter = torch.float32 if adapter == "float32" and dtype.itemsize == 2 else dtype
    for size, options in itertools.product((SIZES[6], SIZES[12]), (OPTIONS[0], OPTIONS[-1])):
        check(make_inputs(size, dtype=dtype, adapter=adapter, **options), impl="reference")


def merged(x, weight, bias, a, b, scale, mask, lora_x):
    """One product with W + s B A'."""
    assert lora_x is None
    return nn.functional.linear(x, weight + scale * b @ (a * mask), bias)


def scaled_a(x, weight, bias, a, b, scale, mask, lora_x):
    return (x @ weight.T + ((x if lora_x is None else lora_x) @ (scale * a * mask).T) @ b.T) + bias


def concatenated(x, weight, bias, a, b, scale, mask, lora_x):
    """A product of [x, h, 1] with [W, s B, bias]."""
    h = (x if lora_x is None else lora_x) @ (a * mask).T
    one = torch.ones_like(x[:, :1])
    return torch.cat([one, h, x], 1) @ torch.cat([bias.unsqueeze(1), scale * b, weight], 1).T


def split_columns(x, weight, bias, a, b, scale, mask, lora_x):
    """Partial sums over halves of the columns, as of a tensor-parallel layer."""
    half = x.shape[1] // 2
    cuts = slice(half), slice(half, None)
    xl, kept = x if lora_x is None else lora_x, a * mask
    frozen = sum(x[:, c] @ weight[:, c].T for c in cuts)
    return frozen + scale * sum((xl[:, c] @ kept[:, c].T) @ b.T for c in cuts) + bias


def split_tokens(x, weight, bias, a, b, scale, mask, lora_x):
    """Gradients of A, B and the bias are sums over pieces."""
    xl = x if lora_x is None else lora_x
    pieces = zip(x.split(7), xl.split(7), strict=True)
    layer = lambda rows, low: scaled_a(rows, weight, bias, a, b, scale, mask, low)  # noqa: E731
    return torch.cat([layer(*piece) for piece in pieces])


def with_statistic(layer):
    def op(x, weight, bias, a, b, scale, *, mask=None, lora_x=None, impl=None):
        y = layer(x, weight, bias, a, b, scale, mask, lora_x)
        return LinearWithStats(y, x.detach().square().sum(0).float())

    return op


def plant(monkeypatch, op):
    """In the place of the ops that ``check`` calls."""
    monkeypatch.setattr("fastkit.ops.lora_linear_with_stats", op)
    monkeypatch.setattr("fastkit.ops.lora_linear", lambda *args, **options: op(*args, **options).y)


@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("layer", [merged, scaled_a, concatenated, split_columns, split_tokens])
def test_budget_accepts_another_order(layer, size, lora_x, monkeypatch):
    """In float32, with the gradients that autograd makes of it."""
    if lora_x and layer is merged:
        return
    plant(monkeypatch, with_statistic(layer))
    check(make_inputs(size, lora_x=lora_x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_budget_accepts_half_precision_that_is_rounded_once(dtype, monkeypatch):
    """All of it in float32, the frozen product too."""

    def layer(x, *others):
        others = [t.float() if isinstance(t, torch.Tensor) and t.dtype == dtype else t for t in others]
        return scaled_a(x.float(), *others).to(dtype)

    def op(x, *args, mask=None, lora_x=None, impl=None):
        return LinearWithStats(layer(x, *args, mask, lora_x), x.detach().float().square().sum(0))

    plant(monkeypatch, op)
    check(make_inputs(LinearSize(24, 33, 17, 4), lora_x=True, dtype=dtype))


# and reject planted faults


def honest(x, weight, bias, a, b, scale, *, mask=None, lora_x=None):
    return lora_linear_with_stats(x, weight, bias, a, b, scale, mask=mask, lora_x=lora_x)


def mask_ignored(*args, mask, lora_x):
    return honest(*args, mask=None, lora_x=lora_x)


def mask_inverted(*args, mask, lora_x):
    return honest(*args, mask=~mask, lora_x=lora_x)


def one_entry_of_the_mask_wrong(*args, mask, lora_x):
    mask = mask.clone()
    mask[-1, -1] ^= True
    return honest(*args, mask=mask, lora_x=lora_x)


def scale_squared(*args, **options):
    return honest(*args[:-1], args[-1] ** 2, **options)


def scale_forgotten(*args, **options):
    return honest(*args[:-1], 1.0, **options)


def bias_twice(*args, **options):
    y, square_sum = honest(*args, **options)
    return LinearWithStats(y + args[2], square_sum)


def bias_detached(x, weight, bias, *args, **options):
    return honest(x, weight, bias.detach() + 0 * bias, *args, **options)


def one_wrong_element(*args, **options):
    y, square_sum = honest(*args, **options)
    off = torch.zeros_like(y)
    off.view(-1)[y.abs().argmax()] = 1e-3
    return LinearWithStats(y * (1 + off), square_sum)


def small_gain(*args, **options):
    y, square_sum = honest(*args, **options)
    return LinearWithStats(y * (1 + 1e-5), square_sum)


def small_gain_of_the_gradient(x, *args, **options):
    y, square_sum = honest(x, *args, **options)
    return LinearWithStats((1 + 1e-5) * y - 1e-5 * y.detach(), square_sum)


def last_token_forgotten(x, *args, mask, lora_x):
    kept = torch.ones_like(x[:, :1])
    kept[-1] = 0
    return honest(x, *args, mask=mask, lora_x=lora_x * kept)


def last_column_forgotten(x, *args, mask, lora_x):
    kept = torch.ones_like(x[0])
    kept[-1] = 0
    return honest(x, *args, mask=mask, lora_x=lora_x * kept)


def last_rank_forgotten(x, weight, bias, a, b, scale, **options):
    kept = torch.ones_like(b[0])
    kept[-1] = 0
    return honest(x, weight, bias, a, b * kept, scale, **options)


def dropped_out_frozen_part(x, *args, mask, lora_x):
    y, _ = honest(lora_x + 0 * x, *args, mask=mask, lora_x=lora_x)
    return LinearWithStats(y, honest(x, *args).square_sum)


def lora_x_ignored(x, *args, mask, lora_x):
    return honest(x, *args, mask=mask, lora_x=x + 0 * lora_x)


def statistic_of_lora_x(x, *args, mask, lora_x):
    y, _ = honest(x, *args, mask=mask, lora_x=lora_x)
    return LinearWithStats(y, honest(lora_x, *args).square_sum)


def statistic_of_means(x, *args, **options):
    y, square_sum = honest(x, *args, **options)
    return LinearWithStats(y, square_sum / len(x))


def statistic_without_the_last_token(x, *args, **options):
    y, _ = honest(x, *args, **options)
    return LinearWithStats(y, honest(x[:-1], *args).square_sum)


def statistic_in_half_precision(*args, **options):
    y, square_sum = honest(*args, **options)
    return LinearWithStats(y, square_sum.bfloat16().float())


def gradient_of_a_not_masked(x, weight, bias, a, b, scale, *, mask, lora_x):
    through = a.detach() * mask + (a - a.detach())
    return honest(x, weight, bias, through, b, scale, lora_x=lora_x)


def weight_frozen(x, weight, *args, **options):
    return honest(x, weight.detach() + 0 * weight, *args, **options)


def a_in_half_precision(x, weight, bias, a, *args, **options):
    return honest(x, weight, bias, a.half().float(), *args, **options)


class RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gh):
        return gh.bfloat16().to(gh.dtype)


def rounded_cotangent_of_h(x, weight, bias, a, b, scale, *, mask, lora_x):
    """As a backward in two products of half precision."""
    h = RoundedGradient.apply(lora_x @ (a * mask).T)
    y = nn.functional.linear(x, weight, bias) + scale * h @ b.T
    return LinearWithStats(y, x.detach().square().sum(0))


@pytest.mark.parametrize(
    ("fault", "result"),
    [
        (mask_ignored, "y"),
        (mask_inverted, "y"),
        (one_entry_of_the_mask_wrong, "y"),
        (scale_squared, "y"),
        (scale_forgotten, "y"),
        (bias_twice, "y"),
        (bias_detached, "gbias"),
        (one_wrong_element, "y"),
        (small_gain, "y"),
        (small_gain_of_the_gradient, "gx"),
        (last_token_forgotten, "y"),
        (last_column_forgotten, "y"),
        (last_rank_forgotten, "y"),
        (dropped_out_frozen_part, "y"),
        (lora_x_ignored, "y"),
        (statistic_of_lora_x, "square_sum"),
        (statistic_of_means, "square_sum"),
        (statistic_without_the_last_token, "square_sum"),
        (statistic_in_half_precision, "square_sum"),
        (gradient_of_a_not_masked, "glora_a"),
        (weight_frozen, "gweight"),
        (a_in_half_precision, "y"),
        (rounded_cotangent_of_h, "glora_a"),
    ],
)
def test_budget_rejects(fault, result, monkeypatch):
    inputs = make_inputs(LinearSize(100, 65, 40, 8), lora_x=True)
    plant(monkeypatch, lambda *args, impl, **options: honest(*args, **options))
    check(inputs)
    plant(monkeypatch, lambda *args, impl, **options: fault(*args, **options))
    with pytest.raises(AssertionError, match=f"^{result}: "):
        check(inputs)


def test_budget_rejects_gradients_of_half_precision_products(monkeypatch):
    """As a backward in two products would be: the one between is in float32, whatever the dtype of x."""
    inputs = make_inputs(LinearSize(100, 65, 40, 8), dtype=torch.bfloat16, adapter=torch.float32)

    def layer(x, weight, bias, a, b, scale, *, mask, lora_x, impl, through=RoundedGradient.apply):
        h = through(x.float() @ (a * mask).T)
        y = nn.functional.linear(x, weight, bias) + scale * h @ b.T
        return LinearWithStats(y.to(x.dtype), x.detach().float().square().sum(0))

    plant(monkeypatch, partial(layer, through=lambda h: h))
    check(inputs)
    plant(monkeypatch, layer)
    with pytest.raises(AssertionError, match=r"^gx: "):
        check(inputs)


@pytest.mark.parametrize(
    "name", ["y", "gx", "gweight", "gbias", "glora_a", "glora_b", "glora_x", "square_sum"]
)
def test_budget_rejects_one_wrong_element_of(name):
    inputs = make_inputs(LinearSize(100, 65, 40, 8), lora_x=True)
    value, budget = expected_results(inputs)[name]
    assert_matches_reference(value, value, budget)
    wrong = value.clone()
    wrong.view(-1)[value.abs().argmax()] *= 1 + 1e-3
    with pytest.raises(AssertionError, match=r"^result: 1 of \d+ elements are over budget"):
        assert_matches_reference(wrong, value, budget)


def test_budget_allows_no_error_where_a_is_pruned():
    inputs = make_inputs(LinearSize(5, 7, 9, 4))
    value, budget = expected_results(inputs)["glora_a"]
    assert not value[~inputs.mask].any() and not budget[~inputs.mask].any()
    almost = value.masked_fill(~inputs.mask, torch.finfo(torch.float64).tiny)
    with pytest.raises(AssertionError, match="over budget"):
        assert_matches_reference(almost, value, budget)


def test_check_notices_that_the_statistic_changes_y(monkeypatch):
    monkeypatch.setattr("fastkit.ops.lora_linear", lambda *a, impl, **o: lora_linear(*a, **o) + 1e-30)
    inputs = make_inputs(LinearSize(1, 1, 1, 1), mask=False, bias=False)
    with pytest.raises(AssertionError, match="other bits"):
        check(inputs._replace(x=torch.zeros(1, 1)), impl="reference")
