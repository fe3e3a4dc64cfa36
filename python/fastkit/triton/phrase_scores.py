"""phrase_scores and select_phrases in Triton.

    t = candidate / |candidate|,  u = (t - a) / |t - a|,  variance = u^T scatter u
    increment = sqrt(O^2 + 2 overlap) - O,  overlap = sum of (t . f)^2 over chosen rows f

Decomposition. ``phrase_scores_rows`` owns a candidate of an image set: its unit row t and its direction u.
``phrase_scores_variances`` owns ``BM`` candidates, and goes through tiles of the scatter: tiles of u scatter
are multiplied by u and summed, none is stored. ``phrase_scores_finish`` owns ``BM`` candidates: their
products with the chosen rows, increments and scores. Of a selection, ``phrase_scores_pick`` owns an image
set: the best score of those that are left; ``phrase_scores_follow`` owns a candidate, and adds the overlap
with the pick, or takes from its direction what lies along the pick's. Nothing is read back: k picks are 2 k
launches, with deflation 3 k.

Bytes. A candidate is read four times, by one program, and t and u are written; the scatter is read once for
``BM`` candidates, from the second-level cache; a pick reads t, with deflation u, and writes that.

Numerics. Products are IEEE's, in float32; O^2 and what is made of it in float64.
"""

# Triton's annotations know nothing of launches, nor of what is constant while a kernel is compiled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkit.reference.phrase_scores import LEAST, unit_rows


@triton.jit
def _row(pointer, begin, columns, BD: tl.constexpr):
    d = begin + tl.arange(0, BD)
    return tl.load(pointer + d, mask=d < columns, other=0.0).to(tl.float32)


@triton.jit
def _scales(pointer, columns, BD: tl.constexpr):
    # Which make a row of unit length: first by its largest number, so that no square overflows or vanishes.
    most = tl.zeros([BD], tl.float32)
    for begin in range(0, columns, BD):
        most = tl.maximum(most, tl.abs(_row(pointer, begin, columns, BD)))
    largest = tl.max(most, axis=0)
    large = 1.0 / tl.where(largest > 0.0, largest, 1.0)
    squares = tl.zeros([BD], tl.float32)
    for begin in range(0, columns, BD):
        x = _row(pointer, begin, columns, BD) * large
        squares += x * x
    length = tl.sqrt(tl.sum(squares, axis=0))
    return large, 1.0 / tl.where(length > 0.0, length, 1.0)


@triton.jit
def _growth(before, overlap):
    # sqrt(before + 2 overlap) - sqrt(before), without the difference; both in float64.
    both = before + 2 * overlap
    length = tl.sqrt(both) + tl.sqrt(before)
    return tl.where(length > 0.0, 2 * overlap / tl.where(length > 0.0, length, 1.0), 0.0)


@triton.jit
def phrase_scores_rows(
    candidates, centroid, unit, directions, m, columns, of_candidates, of_centroid, LEAST: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    # unit and directions (G, m, columns). ``of_``: numbers from an image set to the next, 0 where all share.
    row, image_set = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    candidates += image_set * of_candidates + row * columns
    centroid += image_set * of_centroid
    to = (image_set * m + row) * columns
    large, scale = _scales(candidates, columns, BD)
    large_a, scale_a = _scales(centroid, columns, BD)
    far = tl.zeros([BD], tl.float32)
    for begin in range(0, columns, BD):
        u = _row(candidates, begin, columns, BD) * large * scale
        u -= _row(centroid, begin, columns, BD) * large_a * scale_a
        far += u * u
    length = tl.sqrt(tl.sum(far, axis=0))
    inverse = tl.where(length > LEAST, 1.0 / tl.where(length > LEAST, length, 1.0), 0.0)
    for begin in range(0, columns, BD):
        d = begin + tl.arange(0, BD)
        t = _row(candidates, begin, columns, BD) * large * scale
        u = (t - _row(centroid, begin, columns, BD) * large_a * scale_a) * inverse
        tl.store(unit + to + d, t, mask=d < columns)
        tl.store(directions + to + d, u, mask=d < columns)


@triton.jit
def phrase_scores_variances(
    directions, scatter, variance, m, columns, of_scatter, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    image_set = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    directions += (image_set * m + i[:, None]) * columns
    scatter += image_set * of_scatter
    total = tl.zeros([BM], tl.float32)
    for first in range(0, columns, BN):
        j = first + tl.arange(0, BN)
        product = tl.zeros([BM, BN], tl.float32)
        for begin in range(0, columns, BK):
            k = begin + tl.arange(0, BK)
            u = tl.load(directions + k[None, :], mask=(i < m)[:, None] & (k < columns)[None, :], other=0.0)
            s = tl.load(
                scatter + k[:, None].to(tl.int64) * columns + j[None, :],
                mask=(k < columns)[:, None] & (j < columns)[None, :], other=0.0,
            )  # fmt: skip
            product = tl.dot(u, s, product, input_precision="ieee")
        u = tl.load(directions + j[None, :], mask=(i < m)[:, None] & (j < columns)[None, :], other=0.0)
        total += tl.sum(product * u, axis=1)
    total = tl.where(total < 0.0, 0.0, total)  # NaN stays
    tl.store(variance + image_set * m + i, total, mask=i < m)


@triton.jit
def phrase_scores_finish(
    unit, chosen, before, prior, variance, increment, score, m, columns, count, of_chosen, of_before,
    of_prior, of_variance, of_increment, by_prior, PRIOR: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    # ``of_variance``, ``of_increment`` and ``by_prior`` are the weights; ``count`` rows have been chosen.
    image_set = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    unit += (image_set * m + i[:, None]) * columns
    chosen += image_set * of_chosen
    overlap = tl.zeros([BM], tl.float32)
    for first in range(0, count, BS):
        s = first + tl.arange(0, BS)
        product = tl.zeros([BM, BS], tl.float32)
        for begin in range(0, columns, BK):
            k = begin + tl.arange(0, BK)
            t = tl.load(unit + k[None, :], mask=(i < m)[:, None] & (k < columns)[None, :], other=0.0)
            f = tl.load(
                chosen + s[None, :].to(tl.int64) * columns + k[:, None],
                mask=(k < columns)[:, None] & (s < count)[None, :], other=0.0,
            )  # fmt: skip
            product = tl.dot(t, f, product, input_precision="ieee")
        overlap += tl.sum(product * product, axis=1)
    grown = _growth(tl.load(before + image_set * of_before), overlap.to(tl.float64))
    of_row = image_set * m + i
    total = of_variance * tl.load(variance + of_row, mask=i < m, other=0.0).to(tl.float64)
    total -= of_increment * grown.to(tl.float32).to(tl.float64)
    if PRIOR:
        given = tl.load(prior + image_set * of_prior + i, mask=i < m, other=0.0).to(tl.float64)
        total += by_prior * given
    tl.store(increment + of_row, grown.to(tl.float32), mask=i < m)
    tl.store(score + of_row, total.to(tl.float32), mask=i < m)


@triton.jit
def phrase_scores_pick(
    directions, prior, variance, overlap, taken, before, pick, indices, scores, variances, m, columns, j, k,
    of_prior, of_variance, of_increment, by_prior, PRIOR: tl.constexpr, DEFLATE: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    # Place j of k. taken is 1 of one that has been chosen; with deflation pick is its direction.
    image_set = tl.program_id(0).to(tl.int64)
    own = image_set * m
    so_far = tl.load(before + image_set)
    best_score, best = tl.full([], -float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for first in range(0, m, BM):
        i = first + tl.arange(0, BM)
        free = tl.load(taken + own + i, mask=i < m, other=1) == 0
        total = of_variance * tl.load(variance + own + i, mask=i < m, other=0.0).to(tl.float64)
        if not DEFLATE:
            x = tl.load(overlap + own + i, mask=i < m, other=0.0)
            grown = _growth(so_far, x.to(tl.float64))
            total -= of_increment * grown.to(tl.float32).to(tl.float64)
        if PRIOR:
            total += by_prior * tl.load(prior + image_set * of_prior + i, mask=i < m, other=0.0).to(
                tl.float64
            )
        score = total.to(tl.float32)
        score = tl.where(free & (score == score), score, -float("inf"))
        most = tl.max(score, axis=0)
        place = tl.min(tl.where(free & (score == most), i, 2147483647), axis=0)
        found = (place < 2147483647) & ((best < 0) | (most > best_score))
        best_score, best = tl.where(found, most, best_score), tl.where(found, place, best)
    of_best = own + best
    tl.store(indices + image_set * k + j, best.to(tl.int64))
    tl.store(scores + image_set * k + j, best_score)
    tl.store(variances + image_set * k + j, tl.load(variance + of_best))
    tl.store(before + image_set, so_far + 2 * tl.load(overlap + of_best).to(tl.float64))
    tl.store(taken + of_best, 1)
    if DEFLATE:
        for first in range(0, columns, BM):
            d = first + tl.arange(0, BM)
            u = tl.load(directions + of_best * columns + d, mask=d < columns, other=0.0)
            tl.store(pick + image_set * columns + d, u, mask=d < columns)


@triton.jit
def phrase_scores_follow(
    rows, pick, indices, overlap, part, m, columns, j, k, LEAST: tl.constexpr, DEFLATE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    # rows: unit rows, whose overlap with the pick at place j is added; with deflation directions.
    row, image_set = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of_row = image_set * m + row
    here = rows + of_row * columns
    if DEFLATE:
        other = pick + image_set * columns
        for _ in range(2):
            products = tl.zeros([BD], tl.float32)
            for begin in range(0, columns, BD):
                products += _row(here, begin, columns, BD) * _row(other, begin, columns, BD)
            along = tl.sum(products, axis=0)
            for begin in range(0, columns, BD):
                d = begin + tl.arange(0, BD)
                left = _row(here, begin, columns, BD) - along * _row(other, begin, columns, BD)
                tl.store(here + d, left, mask=d < columns)
            tl.debug_barrier()
        squares = tl.zeros([BD], tl.float32)
        for begin in range(0, columns, BD):
            left = _row(here, begin, columns, BD)
            squares += left * left
        length = tl.sqrt(tl.sum(squares, axis=0))
        of_all = tl.load(part + of_row) * length
        inverse = tl.where(of_all > LEAST, 1.0 / tl.where(of_all > LEAST, length, 1.0), 0.0)
        tl.debug_barrier()
        for begin in range(0, columns, BD):
            d = begin + tl.arange(0, BD)
            tl.store(here + d, _row(here, begin, columns, BD) * inverse, mask=d < columns)
        tl.store(part + of_row, of_all)
    else:
        best = tl.load(indices + image_set * k + j)
        other = rows + (image_set * m + best) * columns
        products = tl.zeros([BD], tl.float32)
        for begin in range(0, columns, BD):
            products += _row(here, begin, columns, BD) * _row(other, begin, columns, BD)
        along = tl.sum(products, axis=0)
        tl.store(overlap + of_row, tl.load(overlap + of_row) + along * along)


def score(
    candidates: Tensor, centroid: Tensor, scatter: Tensor, chosen: Tensor | None, prior: Tensor | None,
    variance_weight: float, orthogonality_weight: float, prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Score, variance and increment (G, m); float32, with image sets in front, of one or of G."""
    prepared = _Prepared(candidates, centroid, scatter, chosen, prior)
    G, m, D = prepared.unit.shape
    variance = prepared.variance
    increment, total = torch.empty_like(variance), torch.empty_like(variance)
    before, count = variance.new_zeros(1, dtype=torch.float64), 0
    if chosen is not None and chosen.shape[1] > 0:
        chosen, count = unit_rows(chosen), chosen.shape[1]
        gram = torch.bmm(chosen, chosen.mT).double()
        gram.diagonal(dim1=1, dim2=2).zero_()
        before = gram.square().sum((1, 2))
    options = finish_options()
    with torch.cuda.device_of(variance):
        phrase_scores_finish[(triton.cdiv(m, options["BM"]), G)](
            prepared.unit, variance if chosen is None else chosen, before, _or(prior, variance), variance,
            increment, total, m, D, count, 0 if chosen is None else _step(chosen), min(len(before) - 1, 1),
            0 if prior is None else _step(prior), variance_weight, orthogonality_weight, prior_weight,
            PRIOR=prior is not None, **options,
        )  # fmt: skip
    return total, variance, increment


def select(
    candidates: Tensor, centroid: Tensor, scatter: Tensor, prior: Tensor | None, k: int, deflate: bool,
    variance_weight: float, orthogonality_weight: float, prior_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Indices, scores and variances (G, k)."""
    prepared = _Prepared(candidates, centroid, scatter, prior)
    G, m, D = prepared.unit.shape
    variance, rows = prepared.variance, prepared.directions if deflate else prepared.unit
    overlap, part = torch.zeros_like(variance), torch.ones_like(variance)
    taken = torch.zeros_like(variance, dtype=torch.int32)
    before, pick = variance.new_zeros(G, dtype=torch.float64), variance.new_empty(G, D)
    indices, scores = variance.new_empty(G, k, dtype=torch.int64), variance.new_empty(G, k)
    variances = torch.empty_like(scores)
    with torch.cuda.device_of(variance):
        for j in range(k):
            phrase_scores_pick[(G,)](
                prepared.directions, _or(prior, variance), variance, overlap, taken, before, pick, indices,
                scores, variances, m, D, j, k, 0 if prior is None else _step(prior), variance_weight,
                orthogonality_weight, prior_weight, PRIOR=prior is not None, DEFLATE=deflate,
                **pick_options(),
            )  # fmt: skip
            if j + 1 < k:
                phrase_scores_follow[(m, G)](
                    rows, pick, indices, overlap, part, m, D, j, k, LEAST=LEAST, DEFLATE=deflate,
                    **rows_options(D),
                )  # fmt: skip
                if deflate:
                    prepared.measure()
    return indices, scores, variances


class _Prepared:
    """Unit rows, directions and variances of all image sets."""

    def __init__(self, candidates: Tensor, centroid: Tensor, scatter: Tensor, *others: Tensor | None) -> None:
        given = (candidates, centroid, scatter, *others)
        G, (_, m, D) = max(len(t) for t in given if t is not None), candidates.shape
        self.scatter = scatter
        self.unit = candidates.new_empty(G, m, D)
        self.directions = torch.empty_like(self.unit)
        self.variance = candidates.new_empty(G, m)
        with torch.cuda.device_of(candidates):
            phrase_scores_rows[(m, G)](
                candidates, centroid, self.unit, self.directions, m, D, _step(candidates), _step(centroid),
                LEAST=LEAST, **rows_options(D),
            )  # fmt: skip
        self.measure()

    def measure(self) -> None:
        (G, m, D), options = self.unit.shape, variances_options()
        with torch.cuda.device_of(self.unit):
            phrase_scores_variances[(triton.cdiv(m, options["BM"]), G)](
                self.directions, self.scatter, self.variance, m, D, _step(self.scatter), **options
            )


def rows_options(columns: int) -> dict[str, Any]:
    return {"BD": min(1024, triton.next_power_of_2(columns)), "num_warps": 4}


def variances_options() -> dict[str, Any]:
    return {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4}


def finish_options() -> dict[str, Any]:
    return {"BM": 32, "BS": 16, "BK": 32, "num_warps": 4}


def pick_options() -> dict[str, Any]:
    return {"BM": 1024, "num_warps": 4}


def _step(tensor: Tensor) -> int:
    """From an image set to the next."""
    return 0 if len(tensor) == 1 else tensor.stride(0)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What is not there is read nowhere."""
    return other if tensor is None else tensor
