"""topk_similarity and csls_topk against scores in float64: inputs, budgets, and what makes a choice right."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops.topk_similarity import Metric
from fastkit.reference import TopK
from fastkit.testing import Expected, assert_matches_reference


def make_tables(
    n: int, m: int, D: int, *, dtype: torch.dtype = torch.float32, repeated: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (n, D), keys (m, D) and a bias (m,), noise; where repeated, a third of the keys are others."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    queries, keys, bias = (torch.randn(shape, generator=generator) for shape in ((n, D), (m, D), (m,)))
    if repeated:
        of = torch.where(
            torch.rand(m, generator=generator) < 1 / 3,
            torch.randint(m, (m,), generator=generator),
            torch.arange(m),
        )
        keys, bias = keys[of], bias[of]
    return queries.to(dtype), keys.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))


def expected_scores(
    queries: Tensor, keys: Tensor, *, metric: Metric = "dot", key_bias: Tensor | None = None
) -> Expected:
    """All of them, (n, m), in float64, and how far rounding takes those in the arithmetic of queries."""
    u = _roundoff(queries)
    q, k = queries.detach().cpu().double(), keys.detach().cpu().double()
    D = q.shape[1]
    if metric == "l2":
        value = (q.unsqueeze(1) - k).square().sum(2)
        size, roundings = value, D + 4
    else:
        roundings = D + 2
        if metric == "cosine":
            roundings = 2 * D + 14  # of an element of a unit row: D / 2 of its norm, and 5
            q, k = _unit(q), _unit(k)
        value, size = q @ k.T, q.abs() @ k.abs().T
        if key_bias is not None:
            bias = key_bias.detach().cpu().double()
            value, size = value + bias, size + bias.abs()
    budget = u * (roundings * size + 2 * value.abs()) + torch.finfo(torch.float32).tiny
    return Expected(value, budget.masked_fill(~value.isfinite(), 0.0))


def expected_csls(
    queries: Tensor, keys: Tensor, *, sources: Tensor | None = None, neighbors: int = 10
) -> Expected:
    """All scores, (n, m), by the formula, and their budgets; without NaN."""
    u = _roundoff(queries)
    of_queries = expected_scores(queries, keys, metric="cosine")
    of_sources = (
        of_queries if sources is None else expected_scores(sources.to(queries.dtype), keys, metric="cosine")
    )
    rows = of_queries.value.topk(neighbors, dim=1).values.mean(1, keepdim=True)
    columns = of_sources.value.topk(neighbors, dim=0).values.mean(0)
    value = 2 * of_queries.value - rows - columns
    # Each of the largest errs by no more than the largest error; a mean has `neighbors` roundings.
    of_means = of_queries.budget.amax(1, keepdim=True) + of_sources.budget.amax(0)
    return Expected(value, 2 * of_queries.budget + of_means + u * (2 * neighbors + 12))


def assert_chosen(
    found: TopK, expected: Expected, k: int, *, least: bool = False, rounded: bool = False
) -> None:
    """Raise unless ``found`` are k of the greatest of the expected scores, or of the least.

    Its values are the scores of its indices, within their budgets; they are ordered, equal ones by index; no
    key is chosen twice; and none that is left out is better by more than the budgets. A score that is NaN is
    chosen by no index: NaN and -1 stand at the end of a row that has too few others. ``rounded``: values were
    rounded after they had been ranked, as those of CSLS; what is equal then may have been ranked otherwise.
    """
    values, indices = (t.detach().cpu() for t in found)
    scores, budgets = expected
    if values.dtype == torch.float64:
        budgets = 2 * budgets  # the oracle errs as well
    shape = (scores.shape[0], k)
    if values.shape != shape or indices.shape != shape or indices.dtype != torch.int64:
        raise AssertionError(f"values {tuple(values.shape)} and indices {tuple(indices.shape)}, not {shape}")
    if values.numel() == 0:
        return
    numbers = (~scores.isnan()).sum(1, keepdim=True)
    chosen = torch.arange(k, device=numbers.device) < numbers
    if not torch.equal(indices >= 0, chosen) or not torch.equal(values.isnan(), ~chosen):
        raise AssertionError("NaN and -1 must stand where a row has no number left, and nowhere else")
    if (indices >= scores.shape[1]).any():
        raise AssertionError("indices: beyond the keys")
    at = indices.clamp_min(0)
    want = scores.gather(1, at).masked_fill(~chosen, torch.nan)
    budget = budgets.gather(1, at)
    assert_matches_reference(values, want, budget, name="values")

    sign = 1.0 if least else -1.0
    later, earlier = sign * values[:, 1:], sign * values[:, :-1]
    both = chosen[:, 1:]
    if (both & (later < earlier)).any():
        raise AssertionError("values: not in order")
    if not rounded and (both & (later == earlier) & (indices[:, 1:] <= indices[:, :-1])).any():
        raise AssertionError("indices: of equal values the lower index must be first")
    taken = torch.zeros_like(scores, dtype=torch.int64).scatter_add_(1, at, chosen.long())
    if (taken > 1).any():
        raise AssertionError("indices: a key is chosen twice")
    # A key that is left out may be better than one that is chosen only by the errors of both.
    left = (sign * scores + budgets).masked_fill((taken > 0) | scores.isnan(), torch.inf)
    worst = (sign * want - budget).masked_fill(~chosen, -torch.inf).amax(1)
    over = (left < worst.unsqueeze(1)).nonzero()
    if len(over):
        query, key = over[0].tolist()
        raise AssertionError(f"indices: key {key} is better than the last that is chosen for query {query}")


def assert_lower_of_equal_keys(
    found: TopK, keys: Tensor, key_bias: Tensor | None = None, *, least: bool = False
) -> None:
    """Raise unless of equal keys, with equal biases, those with the lower indices are chosen, in order."""
    indices = found.indices.detach().cpu()
    table = keys.detach().cpu() if key_bias is None else torch.cat([keys, key_bias.unsqueeze(1)], 1).cpu()
    _, group = table.double().unique(dim=0, return_inverse=True)
    for row in indices:
        row = row[row >= 0]
        for of in group[row].unique():
            members = (group == of).nonzero().flatten()
            mine = row[group[row] == of]
            if not torch.equal(mine, members[: len(mine)]):
                raise AssertionError(f"keys {members.tolist()} are equal, chosen are {mine.tolist()}")


def _roundoff(x: Tensor) -> float:
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps / 2


def _unit(x: Tensor) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    return x / torch.where(largest == 0, 1.0, x.square().sum(1, keepdim=True).sqrt())
