"""lora_linear against its float64 oracle: inputs, and budgets derived from its products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.testing import Expected, LinearSize, assert_matches_reference

SCALE = 0.7


class Inputs(NamedTuple):
    """The arguments of a call, in its order, and a cotangent of y."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    mask: Tensor | None
    lora_x: Tensor | None
    gy: Tensor


def make_inputs(
    size: LinearSize,
    *,
    bias: bool = True,
    mask: bool = True,
    lora_x: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Noise; half of A is pruned. ``adapter``: the dtype of A and B, by default that of the rest."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    N, D, O, R = size  # noqa: E741
    return Inputs(
        randn(N, D),
        randn(O, D),
        randn(O) if bias else None,
        randn(R, D, of=adapter or dtype),
        randn(O, R, of=adapter or dtype),
        torch.rand(R, D, generator=generator) < 0.5 if mask else None,
        randn(N, D) if lora_x else None,
        randn(N, O),
    )


def expected_results(inputs: Inputs) -> dict[str, Expected]:
    """``y`` and ``square_sum`` of ``ops.lora_linear_with_stats``, and the gradients for the cotangent gy.

    Those are ``gx``, ``gweight``, ``glora_a``, ``glora_b``, and where there are such arguments ``gbias`` and
    ``glora_x``.
    """
    inputs = Inputs(*(None if t is None else t.cpu() for t in inputs))  # pyright: ignore[reportArgumentType]
    x, weight, bias, a, b, mask, lora_x, gy = inputs
    stored, arithmetic = x.dtype, torch.promote_types(x.dtype, torch.float32)
    u = torch.finfo(arithmetic).eps / 2
    tiny = torch.finfo(arithmetic).tiny
    base = torch.finfo(stored).eps if stored.itemsize == 2 else 0.0  # the frozen product is rounded by itself
    kept = a if mask is None else a.masked_fill(~mask, 0.0)
    x, weight, b, kept, gy = (t.double() for t in (x, weight, b, kept, gy))
    xl = x if lora_x is None else lora_x.double()
    bias = x.new_zeros(len(b)) if bias is None else bias.double()
    N, O = gy.shape  # noqa: E741
    D, R = x.shape[1], b.shape[1]

    def sized(*factors: Tensor) -> Tensor:
        """The product of the absolute values."""
        product = factors[0].abs()
        for factor in factors[1:]:
            product = product @ factor.abs()
        return product

    def result(value: Tensor, error: Tensor, dtype: torch.dtype = stored) -> Expected:
        """Rounded once more, as it is stored."""
        budget = error + torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).tiny
        return Expected(value, 2 * budget if arithmetic == torch.float64 else budget)

    h, gh = xl @ kept.T, SCALE * (gy @ b)
    error_h, error_gh = u * D * sized(xl, kept.T) + tiny, u * (O + 2) * SCALE * sized(gy, b) + tiny
    frozen, frozen_gx = x @ weight.T + bias, gy @ weight
    size_y = sized(x, weight.T) + bias.abs()
    error_y = u * (D + 2) * size_y + base * (frozen.abs() + u * (D + 2) * size_y)
    error_y = error_y + SCALE * (error_h @ b.T.abs() + u * (R + 3) * sized(h, b.T))
    error_frozen = u * O * sized(gy, weight)
    error_frozen = error_frozen + base * (frozen_gx.abs() + error_frozen)
    low_gx = gh @ kept
    error_low = error_gh @ kept.abs() + u * (R + 2) * sized(gh, kept)
    results = {
        "y": result(frozen + SCALE * (h @ b.T), error_y),
        "square_sum": result(x.square().sum(0), u * (N + 1) * x.square().sum(0), torch.float32),
        "gx": result(frozen_gx + low_gx, error_frozen + error_low)
        if lora_x is None
        else result(frozen_gx, error_frozen),
        "gweight": result(gy.T @ x, u * N * sized(gy.T, x)),
        "glora_a": result(gh.T @ xl, error_gh.T @ xl.abs() + u * (N + 1) * sized(gh.T, xl), a.dtype),
        "glora_b": result(
            SCALE * (gy.T @ h),
            SCALE * (gy.T.abs() @ error_h + u * (N + 2) * sized(gy.T, h)),
            inputs.lora_b.dtype,
        ),
    }
    if mask is not None:
        value, budget = results["glora_a"]
        results["glora_a"] = Expected(value.masked_fill(~mask, 0.0), budget.masked_fill(~mask, 0.0))
    if inputs.bias is not None:
        results["gbias"] = result(gy.sum(0), u * (N + 1) * gy.abs().sum(0))
    if lora_x is not None:
        results["glora_x"] = result(low_gx, error_low)
    return results


def check(inputs: Inputs, *, impl: Impl | None = None) -> dict[str, Tensor]:
    """Runs ``ops.lora_linear_with_stats`` and its gradients, and returns them.

    Raises AssertionError unless each is within its budget of what it is in float64, and y the same without
    the statistic.
    """
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in ("x", "weight", "bias", "lora_a", "lora_b", "lora_x")
        if (tensor := getattr(inputs, name)) is not None
    }
    x, weight, a, b = (leaves[name] for name in ("x", "weight", "lora_a", "lora_b"))
    bias, lora_x = leaves.get("bias"), leaves.get("lora_x")
    options = {"mask": inputs.mask, "lora_x": lora_x, "impl": impl}
    y, square_sum = ops.lora_linear_with_stats(x, weight, bias, a, b, SCALE, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.gy)
    results = {"y": y.detach(), "square_sum": square_sum}
    results |= {f"g{name}": g for name, g in zip(leaves, gradients, strict=True)}
    for name, (value, budget) in expected_results(inputs).items():
        assert_matches_reference(results[name], value, budget, name=name)
    with torch.no_grad():
        alone = ops.lora_linear(x, weight, bias, a, b, SCALE, **options)
    if not torch.equal(alone, results["y"]):
        raise AssertionError("y: lora_linear gives other bits than lora_linear_with_stats")
    return results
