"""moments against its float64 oracle: inputs, and budgets derived from its sums."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.testing import Expected, assert_matches_reference


class RowsSize(NamedTuple):
    """The shape of one call; its str is a test id such as ``N17-D33``."""

    N: int
    D: int

    def __str__(self) -> str:
        return f"N{self.N}-D{self.D}"


# Rows around what kernels may take at a time (4, 8, 96, 192, 256, 1024, 1920), columns around vectors (4, 8,
# 16) and tiles (24, 48, 96).
SIZES = [
    RowsSize(0, 3),
    RowsSize(1, 1),
    RowsSize(1, 17),
    RowsSize(2, 5),
    RowsSize(3, 1),
    RowsSize(5, 49),
    RowsSize(9, 8),
    RowsSize(16, 16),
    RowsSize(17, 33),
    RowsSize(31, 48),
    RowsSize(65, 25),
    RowsSize(191, 7),
    RowsSize(257, 97),
    RowsSize(1025, 24),
    RowsSize(5000, 3),
    RowsSize(95, 23),
    RowsSize(97, 47),
    RowsSize(1921, 26),
]


class Inputs(NamedTuple):
    """The arguments of a call, and cotangents of its results."""

    x: Tensor
    weights: Tensor | None
    gcount: Tensor
    gmean: Tensor
    gscatter: Tensor


def make_inputs(
    size: RowsSize,
    *,
    weights: str | None = None,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Noise around ``offset``, its columns correlated.

    ``weights``: None, "positive", or "some" of which half are zero; in the dtype of x.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N, D = size
    common = randn(N, 1)
    w = None
    if weights is not None:
        w = (0.1 + torch.rand(N, generator=generator)).to(dtype)
    if weights == "some" and w is not None:
        w = w.masked_fill(torch.rand(N, generator=generator) < 0.5, 0.0)
    return Inputs(
        (offset + randn(N, D) + common).to(dtype),
        w,
        randn(1)[0].double(),
        randn(D).to(torch.promote_types(dtype, torch.float32)),
        randn(D, D).to(torch.promote_types(dtype, torch.float32)),
    )


def expected_results(inputs: Inputs) -> dict[str, Expected]:
    """``count``, ``mean`` and ``scatter`` of ``ops.moments``, and the gradients for the cotangents.

    Those are ``gx`` and, where there are weights, ``gweights``.
    """
    inputs = Inputs(*(None if t is None else t.cpu() for t in inputs))  # pyright: ignore[reportArgumentType]
    stored, arithmetic = inputs.x.dtype, inputs.gmean.dtype
    u, tiny = torch.finfo(arithmetic).eps / 2, torch.finfo(arithmetic).tiny
    x, gcount, gmean, gscatter = (t.double() for t in (inputs.x, *inputs[2:]))
    N, D = x.shape
    w = x.new_ones(N) if inputs.weights is None else inputs.weights.double()

    def result(value: Tensor, error: Tensor, dtype: torch.dtype = arithmetic) -> Expected:
        """Rounded once more, as it is stored."""
        budget = error + torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(dtype).tiny
        return Expected(value, 2 * budget if arithmetic == torch.float64 else budget)

    count = w.sum()
    inverse = 1 / count if count != 0 else torch.zeros_like(count)
    shift = inverse * (w @ x)
    rest = inverse * (w @ (x - shift))
    mean, centred = shift + rest, (count != 0) * (x - shift - rest)  # the mean itself would round the rows
    scatter = (w.unsqueeze(1) * centred).T @ centred

    # How far the rows can be from centred: first by a mean of x, then by one of what is left.
    deviation = inverse * (w @ centred.abs())
    shifted = u * (N + 2) * inverse * (w @ x.abs())
    off = u * (N + 4) * (deviation + shifted)
    square = (scatter.diagonal() + count * shifted**2).clamp_min(0).sqrt()
    error_scatter = u * (N + 10) * torch.outer(square, square) + count * torch.outer(off, off)
    results = {
        "count": Expected(count, 2.0**-52 * (N if inputs.weights is not None else 0) * count),
        "mean": result(mean, off),
        "scatter": result(scatter, error_scatter + N * tiny),
    }

    both = gscatter + gscatter.T
    row = centred.abs() + shifted  # what is rounded of each row
    error_row = 3 * u * row + off
    of_scatter, size = centred @ both, row @ both.abs()
    error = u * (D + 3) * size + error_row @ both.abs() + D * tiny
    of_mean = inverse * gmean
    error_x = error + 4 * u * of_mean.abs()
    weight = w.unsqueeze(1)
    results["gx"] = result(weight * (of_scatter + of_mean), weight * error_x + 2 * u * weight * size, stored)
    if inputs.weights is not None:
        value = gcount + centred @ of_mean + (of_scatter * centred).sum(1) / 2
        error_w = (error * row + size * error_row).sum(1) / 2 + u * (D + 3) * (size * row).sum(1) / 2
        error_w = error_w + error_row @ of_mean.abs() + u * (D + 6) * (row @ of_mean.abs())
        error_w = error_w + 3 * u * (gcount.abs() + row @ of_mean.abs() + (size * row).sum(1) / 2)
        results["gweights"] = result(value, error_w, inputs.weights.dtype)
    return results


def expected_of_stream(inputs: Inputs, rows: Sequence[int], state: torch.dtype) -> dict[str, Expected]:
    """``mean`` and ``scatter`` of chunks of so many rows, merged from left to right.

    Chunks are rounded as ``moments`` rounds them, their sum to ``state`` after each.
    """
    v = torch.finfo(state).eps / 2
    pieces = [0, *torch.tensor(rows).cumsum(0).tolist()]
    total = expected_results(inputs)
    count, mean, scatter = (
        0.0,
        torch.zeros_like(total["mean"].value),
        torch.zeros_like(total["scatter"].value),
    )
    error_mean, error_scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
    for begin, end in pairwise(pieces):
        cut = slice(begin, end)
        weights = None if inputs.weights is None else inputs.weights[cut]
        chunk = expected_results(inputs._replace(x=inputs.x[cut], weights=weights))
        of_chunk = float(chunk["count"].value)
        if of_chunk == 0:
            continue
        difference = chunk["mean"].value - mean
        share = of_chunk / (count + of_chunk)
        between = count * share
        off = error_mean + chunk["mean"].budget
        apart = torch.outer(difference.abs(), off)
        error_scatter = error_scatter + chunk["scatter"].budget
        error_scatter = error_scatter + between * (apart + apart.T + torch.outer(off, off))
        error_mean = (1 - share) * error_mean + share * chunk["mean"].budget
        mean = mean + share * difference
        scatter = scatter + chunk["scatter"].value + between * torch.outer(difference, difference)
        count += of_chunk
        error_mean = error_mean + (v + 2.0**-50) * mean.abs()
        error_scatter = error_scatter + (v + 2.0**-50) * (scatter.abs() + scatter.diagonal().max())
    return {
        "mean": Expected(total["mean"].value, error_mean + total["mean"].budget * 2.0**-20),
        "scatter": Expected(total["scatter"].value, error_scatter),
    }


def check(inputs: Inputs, *, impl: Impl | None = None) -> dict[str, Tensor]:
    """Runs ``ops.moments`` and its gradients, and returns them.

    Raises AssertionError unless each is within its budget of what it is in float64, and the scatter
    symmetric, with no negative number on its diagonal.
    """
    x = inputs.x.detach().requires_grad_()
    weights = None if inputs.weights is None else inputs.weights.detach().requires_grad_()
    found = ops.moments(x, weights=weights, impl=impl)
    leaves, outputs, cotangents = [x], [found.mean, found.scatter], [inputs.gmean, inputs.gscatter]
    if weights is not None:
        leaves, outputs, cotangents = [x, weights], [*outputs, found.count], [*cotangents, inputs.gcount]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    results = {name: tensor.detach() for name, tensor in found._asdict().items()}
    results |= dict(zip(("gx", "gweights"), gradients, strict=False))
    for name, (value, budget) in expected_results(inputs).items():
        assert_matches_reference(results[name], value, budget, name=name)
    if not torch.equal(results["scatter"], results["scatter"].T):
        raise AssertionError("scatter: not symmetric")
    if (results["scatter"].diagonal() < 0).any():
        raise AssertionError("scatter: a negative number on the diagonal")
    with torch.no_grad():
        alone = ops.moments(inputs.x, weights=inputs.weights, impl=impl)
    for name, tensor in alone._asdict().items():
        if not torch.equal(tensor, results[name]):
            raise AssertionError(f"{name}: other bits where no gradient is asked for")
    return results
