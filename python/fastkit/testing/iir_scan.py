"""iir_scan against its float64 oracle: inputs, and budgets derived from the recursion."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.testing import Size, assert_matches_reference


def make_inputs(
    size: Size, *, radius: float = 0.9, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a, b and a cotangent of y: noise, pole pairs at ``radius`` and any angle, any numerator."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows = (size.B, size.C)
    chunks = 1 if size.chunk is None else -(-size.T // size.chunk)
    angle = math.pi * torch.rand(*rows, chunks, generator=generator, dtype=dtype)
    a = torch.stack([-2 * radius * angle.cos(), torch.full_like(angle, radius**2)], -1)
    b = torch.randn(*rows, chunks, 3, generator=generator, dtype=dtype)
    x, gy = torch.randn(2, *rows, size.T, generator=generator, dtype=dtype)
    return x, a, b, gy


class Expected(NamedTuple):
    """A result in float64, and how far from it rounding may take each element."""

    value: Tensor
    budget: Tensor


# How often a term of one step of the recursion may be rounded: 5 times in order (a product and four sums),
# and some more where a kernel enters a tile with a state that it has combined from others.
_ROUNDINGS = 8


def expected_results(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    gy: Tensor,
    *,
    chunk: int | None = None,
    carry: bool = True,
) -> dict[str, Expected]:
    """``y`` of ``ops.iir_scan`` and, for its cotangent ``gy``, the gradients ``gx``, ``ga`` and ``gb``.

    The recursion is ``A y = B x``. A kernel rounds each step: what it computes solves ``A z = B x + d`` with
    ``|d| <= e (|B| |x| + |A - 1| |y|)``, e a few units of rounding. Hence ``|z - y| <= |A^-1| |d|``, where
    ``|A^-1|`` holds the absolute impulse responses: the error of a step is filtered like a sample. Backward,
    ``l = A^-T gy`` has the same bound with the transposes; ``gx = B^T l`` adds the rounding of its products,
    and the gradient of a coefficient that of ``sum l[t] y[t-i]`` over its chunk, n terms in any order.

    The matrices are dense, ``(T, T)`` for each row of coefficients: for small sizes only.
    """
    time = x.shape[-1]
    chunk = time if chunk is None else chunk
    arithmetic = torch.finfo(a.dtype)

    def rounded(magnitude: Tensor, roundings: int = _ROUNDINGS) -> Tensor:
        # A subnormal number may be flushed to zero: an error of up to tiny.
        return roundings * (arithmetic.eps / 2 * magnitude + arithmetic.tiny)

    def matrix(a: Tensor, b: Tensor | None = None) -> Tensor:
        """(B|1, C|1, T, T): row s is the response to an impulse at s."""
        rows = a.shape[:2]
        impulses = torch.eye(time, dtype=a.dtype, device=a.device).expand(rows.numel(), time, time)
        a = a.flatten(0, 1).unsqueeze(1)
        b = None if b is None else b.flatten(0, 1).unsqueeze(1)
        return reference.iir_scan(impulses, a, b, chunk=chunk, carry=carry).unflatten(0, rows)

    def fir(taps: Tensor) -> Tensor:
        return matrix(torch.zeros_like(taps[..., 1:]), taps)

    def apply(matrix: Tensor, signal: Tensor) -> Tensor:
        return (signal.unsqueeze(-2) @ matrix).squeeze(-2)

    def delayed(signal: Tensor, lag: int) -> Tensor:
        history = pad(signal, (lag, 0))[..., :time]
        return history if carry else history * (torch.arange(time, device=x.device) % chunk >= lag)

    def per_chunk(summands: Tensor) -> Tensor:
        return pad(summands, (0, -time % chunk)).unflatten(-1, (-1, chunk)).sum(-1)

    def expect(value: Tensor, budget: Tensor, dtype: torch.dtype) -> Expected:
        stored = torch.finfo(dtype)
        budget = budget + stored.eps * (value.abs() + stored.tiny)
        return Expected(value, 2 * budget if dtype == torch.float64 else budget)  # the oracle's too

    leaves = [t.detach().double().requires_grad_() for t in (x, a, b) if t is not None]
    output = reference.iir_scan(*leaves, chunk=chunk, carry=carry)
    gx, ga, *gb = torch.autograd.grad(output, leaves, gy.double())
    x64, a64, *b64 = (leaf.detach() for leaf in leaves)
    y64, gy64 = output.detach(), gy.double()

    inverse = matrix(a64)
    feedback = fir(pad(a64.abs(), (1, 0)))
    taps = fir(b64[0].abs()) if b64 else torch.eye(time, dtype=torch.float64, device=x.device)
    error_y = apply(inverse.abs(), rounded(apply(taps, x64.abs()) + apply(feedback, y64.abs())))
    adjoint = apply(inverse.mT, gy64).abs()
    error_l = apply(inverse.abs().mT, rounded(gy64.abs() + apply(feedback.mT, adjoint)))

    def sum_budget(coefficients: Tensor, lags: range, signal: Tensor, error: Tensor) -> Tensor:
        sharing = x[..., 0].numel() // max(1, coefficients[..., 0, 0].numel())
        terms = min(chunk, time) + sharing
        budgets = []
        for lag in lags:
            magnitude = delayed(signal.abs(), lag)
            budget = error_l * magnitude + adjoint * delayed(error, lag)
            budgets.append(per_chunk(budget + rounded(adjoint * magnitude, terms)))
        return torch.stack(budgets, -1).sum_to_size(coefficients.shape)

    expected = {
        "y": expect(y64, error_y, x.dtype),
        "gx": expect(gx, apply(taps.mT, error_l + rounded(adjoint)), x.dtype),
        "ga": expect(ga, sum_budget(a, range(1, 3), y64, error_y), a.dtype),
    }
    if b is not None:
        no_error = torch.zeros_like(x64)
        expected["gb"] = expect(gb[0], sum_budget(b, range(3), x64, no_error), b.dtype)
    return expected


def check(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    gy: Tensor | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    impl: Impl | None = None,
) -> dict[str, Tensor]:
    """Assert that ``ops.iir_scan`` and each of its gradients are within budget; return them by name."""
    gy = torch.randn_like(x) if gy is None else gy
    leaves = [t.detach().requires_grad_() for t in (x, a, b) if t is not None]
    y = ops.iir_scan(*leaves, chunk=chunk, carry=carry, impl=impl)
    gradients = torch.autograd.grad(y, leaves, gy)
    names: list[str] = ["y", "gx", "ga", "gb"]
    results = dict(zip(names, (y.detach(), *gradients), strict=False))
    expected = expected_results(x, a, b, gy, chunk=chunk, carry=carry)
    for name, result in results.items():
        assert_matches_reference(result, *expected[name], name=name)
    return results
