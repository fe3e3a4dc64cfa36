"""How well phrases tell the images of a set apart, and a choice of some that do; written for reading."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

LEAST = 1e-3
"""The length below which what is left of a direction is noise, and its variance 0: our choice."""


class PhraseScores(NamedTuple):
    """What ``phrase_scores`` returns, of each candidate."""

    score: Tensor  # ([G,] m)
    variance: Tensor  # ([G,] m)
    increment: Tensor  # ([G,] m)


class PhraseSelection(NamedTuple):
    """What ``select_phrases`` returns, in the order of choice."""

    indices: Tensor  # ([G,] k) int64, rows of the candidates
    scores: Tensor  # ([G,] k)
    variances: Tensor  # ([G,] k)


def phrase_scores(
    candidates: Tensor,  # ([G,] m, D)
    centroid: Tensor,  # ([G,] D)
    scatter: Tensor,  # ([G,] D, D)
    chosen: Tensor | None = None,  # ([G,] S, D)
    *,
    variance_weight: float = 10.0,
    orthogonality_weight: float = 80.0,
    prior: Tensor | None = None,  # ([G,] m)
    prior_weight: float = 8.0,
) -> PhraseScores:
    """``prior_weight prior + variance_weight V - orthogonality_weight Delta`` of each candidate.

    With rows of unit length, V is the scatter along the direction from the centroid to the candidate, and
    Delta what the candidate adds to ``|F F^T - I|`` of the chosen rows F. In float64 for float64 candidates,
    else in float32.
    """
    t, a = unit_rows(candidates), unit_rows(centroid)
    scatter = scatter.to(t.dtype)
    variance = _along(_directions(t - a.unsqueeze(-2)), scatter)
    increment = torch.zeros_like(variance)
    if chosen is not None:
        f = unit_rows(chosen)
        before = 2 * (f @ f.mT).triu(1).square().sum((-2, -1))  # of unit rows the diagonal is I's
        overlap = (t @ f.mT).square().sum(-1)
        increment = increment + _growth(before.unsqueeze(-1), overlap)
    score = variance_weight * variance - orthogonality_weight * increment
    if prior is not None:
        score = score + prior_weight * prior.to(t.dtype)
    return PhraseScores(score, *(each.expand_as(score) for each in (variance, increment)))


def select_phrases(
    candidates: Tensor,  # ([G,] m, D)
    scatter: Tensor,  # ([G,] D, D)
    k: int,
    *,
    centroid: Tensor,  # ([G,] D)
    prior: Tensor | None = None,  # ([G,] m)
    orthogonality: str = "penalty",
    variance_weight: float = 10.0,
    orthogonality_weight: float = 80.0,
    prior_weight: float = 8.0,
) -> PhraseSelection:
    """k times the candidate that ``phrase_scores`` has best beside those that were chosen, each once.

    With "deflate" there is no Delta: V is the scatter along what of the direction is orthogonal to those that
    were chosen, taken to unit length. Of equal scores the lower index is chosen.
    """
    t, a = unit_rows(candidates), unit_rows(centroid)
    scatter = scatter.to(t.dtype)
    directions = _directions(t - a.unsqueeze(-2))
    variance = _along(directions, scatter)
    base = torch.zeros_like(variance)
    if prior is not None:
        base = base + prior_weight * prior.to(t.dtype)
    base, variance = torch.broadcast_tensors(base, variance)
    shape = base.shape[:-1]
    t, directions = (rows.expand(*shape, *rows.shape[-2:]) for rows in (t, directions))
    free = torch.ones_like(base, dtype=torch.bool)
    overlap, before = torch.zeros_like(base), base.new_zeros(*shape, 1)
    rest, basis = directions, directions[..., :0, :]
    picks: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(k):
        score = base + variance_weight * variance
        if orthogonality == "penalty":
            score = score - orthogonality_weight * _growth(before, overlap)
        # A score that overflows comes before those that are taken, which have the least number there is.
        finite = score.clamp_min(torch.finfo(score.dtype).min)
        best = finite.masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
        picks.append((best, score.gather(-1, best), variance.gather(-1, best)))
        free = free.scatter(-1, best, value=False)
        row = best.unsqueeze(-1).expand(*shape, 1, t.shape[-1])
        if orthogonality == "penalty":
            before = before + 2 * overlap.gather(-1, best)
            overlap = overlap + (t @ t.gather(-2, row).mT).squeeze(-1).square()
        else:
            basis = torch.cat([basis, rest.gather(-2, row)], dim=-2)
            rest = _directions(_left(directions, basis))
            variance = _along(rest, scatter)
    return PhraseSelection(*(torch.cat(each, dim=-1) for each in zip(*picks, strict=True)))


def unit_rows(rows: Tensor) -> Tensor:
    """Divided first by their largest numbers, of whose squares none overflows and not all vanish."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.detach().abs().amax(-1, keepdim=True)
    return normalize(rows / largest.masked_fill(largest == 0, 1), dim=-1)


def _directions(rows: Tensor) -> Tensor:
    """Of unit length; 0 where there is next to nothing."""
    near = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True) <= LEAST
    return normalize(rows.masked_fill(near, 1), dim=-1).masked_fill(near, 0)  # with derivatives of 0, too


def _along(directions: Tensor, scatter: Tensor) -> Tensor:
    return ((directions @ scatter) * directions).sum(-1).clamp_min(0)


def _growth(before: Tensor, overlap: Tensor) -> Tensor:
    """``sqrt(before + 2 overlap) - sqrt(before)``, without the difference."""
    after = before + 2 * overlap
    return 2 * overlap / (_root(after) + _root(before)).masked_fill(after == 0, 1)


def _root(x: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _left(rows: Tensor, basis: Tensor) -> Tensor:
    """What of each row is orthogonal to the basis, by two passes."""
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return rows
