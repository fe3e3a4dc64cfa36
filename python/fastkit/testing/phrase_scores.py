"""phrase_scores and select_phrases against float64: inputs, and budgets that their arithmetic gives.

Values are those of ``fastkit.reference`` on the same numbers in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.ops.phrase_scores import Orthogonality
from fastkit.reference import PhraseScores, PhraseSelection
from fastkit.reference.phrase_scores import LEAST
from fastkit.testing import Expected, assert_matches_reference


class ImageSet(NamedTuple):
    """The tensors of a call; with image sets in front, or of one."""

    candidates: Tensor  # ([G,] m, D)
    centroid: Tensor  # ([G,] D)
    scatter: Tensor  # ([G,] D, D)
    chosen: Tensor | None  # ([G,] S, D)
    prior: Tensor | None  # ([G,] m)


def make_image_set(
    m: int,
    D: int,
    S: int | None = None,
    *,
    images: int = 50,
    mean: float = 2.0,
    prior: bool = False,
    repeated: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ImageSet:
    """Unit rows about a common one, as encoders give them; the scatter of such rows of images.

    ``mean``: the length of what is common, in deviations of a column. ``repeated``: a third of the candidates
    are others.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common = mean * randn(D)

    def rows(count: int) -> Tensor:
        return torch.nn.functional.normalize(common + randn(count, D), dim=-1)

    candidates, (centroid,), of_images = rows(m), rows(1), rows(images)
    if repeated:
        other = torch.randint(m, (m,), generator=generator)
        candidates = torch.where(torch.rand(m, 1, generator=generator) < 1 / 3, candidates[other], candidates)
    arithmetic = torch.promote_types(dtype, torch.float32)
    return ImageSet(
        candidates.to(dtype),
        centroid.to(dtype),
        reference.moments(of_images).scatter.to(arithmetic),
        None if S is None else rows(S).to(dtype),
        randn(m).to(arithmetic) if prior else None,
    )


def stacked(sets: list[ImageSet]) -> ImageSet:
    """With a dimension in front."""
    stacks: list[Any] = [None if t[0] is None else torch.stack(t) for t in zip(*sets, strict=True)]
    return ImageSet(*stacks)


def expected_scores(inputs: ImageSet, weights: dict[str, float] | None = None) -> dict[str, Expected]:
    """``score``, ``variance`` and ``increment`` of one image set.

    A direction errs by what its unit rows do, by its length before it was one; where rounding decides whether
    it is long enough, the whole variance is the budget.
    """
    (candidates, centroid, scatter, chosen, prior), u = _doubles(inputs)
    t, e = _unit(candidates), _error_of_unit(candidates.shape[1], u)
    directions, error, decides = _directions(t - _unit(centroid), 2 * e + u)
    variance = _variance(directions, error, decides, scatter, u)
    increment = Expected(torch.zeros_like(variance.value), torch.zeros_like(variance.value))
    if chosen is not None and len(chosen) > 0:
        increment = _increment(t, _unit(chosen), u)
    return _scored(variance, increment, prior, weights or {}, u)


def expected_deflated(
    inputs: ImageSet, picks: list[int], weights: dict[str, float] | None = None
) -> dict[str, Expected]:
    """``score`` and ``variance`` of one image set, beside the directions of the picks."""
    (candidates, centroid, scatter, _, prior), u = _doubles(inputs)
    D = candidates.shape[1]
    t, e = _unit(candidates), _error_of_unit(D, u)
    directions, error, decides = _directions(t - _unit(centroid), 2 * e + u)
    # What Gram and Schmidt leave is exact for picks that are off by their own errors and some roundings; a
    # space turns by that, over the least singular value of the rows that span it.
    basis, taken, of_picks = directions[:0], directions[:0], 0.0
    for pick in picks:
        rest, _, _ = _directions(_left(directions[pick : pick + 1], basis), 0.0)
        if not rest.any():
            continue
        basis, taken = torch.cat([basis, rest]), torch.cat([taken, directions[pick : pick + 1]])
        of_picks = max(of_picks, float(error[pick]))
    if len(taken):
        of_rounding = u * (2 * D + 16)
        least = torch.linalg.svdvals(taken)[-1]
        turned = (of_picks + of_rounding) * len(taken) ** 0.5 / least
        directions, error, again = _directions(_left(directions, basis), error + turned + of_rounding)
        decides = decides | again
    variance = _variance(directions, error, decides, scatter, u)
    nothing = Expected(torch.zeros_like(variance.value), torch.zeros_like(variance.value))
    return _scored(variance, nothing, prior, weights or {}, u)


def check(
    inputs: ImageSet, weights: dict[str, float] | None = None, *, impl: Impl | None = None
) -> PhraseScores:
    """Runs phrase_scores, and returns what it did.

    Raises AssertionError unless each result of each image set is within its budget of what it is in float64.
    """
    weights = weights or {}
    candidates, centroid, scatter, chosen, prior = inputs
    found = ops.phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl=impl, **weights)
    shape = (*_shape_of_sets(inputs), candidates.shape[-2])
    for name, result in zip(found._fields, found, strict=True):
        assert result.dtype == _arithmetic(inputs) and result.shape == shape, name
    for g, one in enumerate(_each(inputs)):
        expected = expected_scores(one, weights)
        for name, result in zip(found._fields, found, strict=True):
            assert_matches_reference(result[g] if len(shape) > 1 else result, *expected[name], name=name)
    return found


def check_selection(
    inputs: ImageSet,
    k: int,
    weights: dict[str, float] | None = None,
    *,
    orthogonality: Orthogonality = "penalty",
    impl: Impl | None = None,
) -> PhraseSelection:
    """Runs select_phrases, and returns what it did.

    Raises AssertionError unless each pick is another one, its score and variance are within their budgets,
    beside the picks before it, and no candidate that was left is better by more than the budgets of both.
    """
    weights = weights or {}
    candidates, centroid, scatter, _, prior = inputs
    found = ops.select_phrases(
        candidates, scatter, k, centroid=centroid, prior=prior, orthogonality=orthogonality, impl=impl,
        **weights,
    )  # fmt: skip
    shape = (*_shape_of_sets(inputs), k)
    assert found.indices.dtype == torch.int64
    assert found.scores.dtype == found.variances.dtype == _arithmetic(inputs)
    assert [t.shape for t in found] == [shape] * 3
    for g, one in enumerate(_each(inputs)):
        mine = PhraseSelection(*(t[g] if len(shape) > 1 else t for t in found))
        _check_picks(mine, one, weights, orthogonality)
    return found


def _check_picks(
    found: PhraseSelection, inputs: ImageSet, weights: dict[str, float], orthogonality: str
) -> None:
    picks = found.indices.tolist()
    m = inputs.candidates.shape[0]
    assert len({*picks}) == len(picks) and all(0 <= i < m for i in picks), f"indices: {picks} of {m}"
    for j, pick in enumerate(picks):
        if orthogonality == "penalty":
            expected = expected_scores(inputs._replace(chosen=inputs.candidates[picks[:j]]), weights)
        else:
            expected = expected_deflated(inputs, picks[:j], weights)
        score, budget = expected["score"]
        for name, got in (("score", found.scores[j]), ("variance", found.variances[j])):
            value, allowed = (t[pick : pick + 1] for t in expected[name])
            assert_matches_reference(got.reshape(1), value, allowed, name=f"{name} of pick {j}")
        left = torch.ones(m, dtype=torch.bool)
        left[picks[:j]] = False
        better = left & (score - budget > score[pick] + budget[pick])
        if better.any():
            others = better.nonzero().flatten().tolist()
            raise AssertionError(f"indices: {others} are better than {pick}, which is pick {j}")


def _scored(
    variance: Expected, increment: Expected, prior: Tensor | None, weights: dict[str, float], u: float
) -> dict[str, Expected]:
    of_variance = weights.get("variance_weight", 10.0)
    of_increment = weights.get("orthogonality_weight", 80.0)
    terms = [of_variance * variance.value, -of_increment * increment.value]
    if prior is not None:
        terms.append(weights.get("prior_weight", 8.0) * prior)
    size = sum(term.abs() for term in terms)
    budget = of_variance * variance.budget + of_increment * increment.budget + 5 * u * size
    return {
        "score": Expected(sum(terms), budget),  # pyright: ignore[reportArgumentType]
        "variance": variance,
        "increment": increment,
    }


def _variance(directions: Tensor, error: Tensor, decides: Tensor, scatter: Tensor, u: float) -> Expected:
    """Of unit directions, each off by ``error`` in norm; whether one is 0, rounding may decide."""
    D = directions.shape[1]
    along = directions @ scatter
    value = (along * directions).sum(1)
    norm = torch.linalg.matrix_norm(scatter, 2)
    size = ((directions.abs() @ scatter.abs()) * directions.abs()).sum(1)
    moved = 2 * error * torch.linalg.vector_norm(along, dim=1) + error.square() * norm
    budget = moved + u * (2 * D + 4) * size
    # Where it is taken for 0 there is nothing of it left, else what it is before that.
    budget = torch.where(decides, norm, budget)
    return Expected(value.clamp_min(0), budget)


def _increment(t: Tensor, f: Tensor, u: float) -> Expected:
    """Between the ends of what overlap and distance may be: it grows with the one, falls with the other."""
    D, S = t.shape[1], len(f)

    def products(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        size = left.abs() @ right.abs().T
        return left @ right.T, u * (D + 2) * size + 2 * _error_of_unit(D, u)

    def squares(p: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return p.square(), 2 * p.abs() * error + error.square() + u * (S * S + 2) * p.square()

    overlap, error = (x.sum(1) for x in squares(*products(t, f)))
    before, of_before = (2 * x.triu(1).sum() for x in squares(*products(f, f)))

    def growth(before: Tensor, overlap: Tensor) -> Tensor:
        after = (before + 2 * overlap).sqrt()
        return 2 * overlap / (after + before.sqrt()).masked_fill(after == 0, 1)

    value = growth(before, overlap)
    most = growth((before - of_before).clamp_min(0), overlap + error)
    least = growth(before + of_before, (overlap - error).clamp_min(0))
    return Expected(value, torch.maximum(most - value, value - least) + 6 * u * value)


def _directions(rows: Tensor, error: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To unit length, or 0; how far each is off; and whether rounding decides which."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    eps = torch.finfo(torch.float32).eps
    off = torch.as_tensor(error, dtype=rows.dtype, device=rows.device).expand(len(rows))
    decides = (length.squeeze(1) - LEAST).abs() <= off + eps * LEAST  # which float32 has not exactly
    found = torch.where(length > LEAST, rows / length.clamp_min(LEAST), 0.0)
    off = 2 * off / length.squeeze(1).clamp_min(LEAST)
    return found, off.masked_fill(length.squeeze(1) <= LEAST, 0.0), decides


def _left(rows: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _unit(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(-1, keepdim=True)
    rows = rows / largest.masked_fill(largest == 0, 1)
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def _error_of_unit(D: int, u: float) -> float:
    """In norm: the square root of a sum of D squares, its inverse, two products and quotients."""
    return u * (D / 2 + 6)


def _doubles(inputs: ImageSet) -> tuple[ImageSet, float]:
    dtype = _arithmetic(inputs)
    u = torch.finfo(dtype).eps / 2 * (2 if dtype == torch.float64 else 1)  # the oracle errs as well
    doubles: list[Any] = [None if t is None else t.detach().cpu().double() for t in inputs]
    return ImageSet(*doubles), u


def _arithmetic(inputs: ImageSet) -> torch.dtype:
    return torch.promote_types(inputs.candidates.dtype, torch.float32)


def _shape_of_sets(inputs: ImageSet) -> tuple[int, ...]:
    dims = 2, 1, 2, 2, 1
    return next(
        (t.shape[:1] for t, dim in zip(inputs, dims, strict=True) if t is not None and t.dim() > dim), ()
    )


def _each(inputs: ImageSet) -> list[ImageSet]:
    """One set after the other; what has no dimension in front is all sets'."""
    dims, sets = (2, 1, 2, 2, 1), _shape_of_sets(inputs)

    def of(t: Tensor | None, dim: int, g: int) -> Any:
        return t[g] if t is not None and t.dim() > dim else t

    return [
        ImageSet(*(of(t, dim, g) for t, dim in zip(inputs, dims, strict=True)))
        for g in range(sets[0] if sets else 1)
    ]
