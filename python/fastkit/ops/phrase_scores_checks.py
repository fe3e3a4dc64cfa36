"""What phrase_scores and select_phrases refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import (
    MOST,
    arithmetic,
    check_floating,
    check_int,
    check_like_or_widened,
    check_number,
    may_look_at,
    shape,
)

ORTHOGONALITY = ("penalty", "deflate")


def check_sets(
    op: str,
    candidates: Tensor,
    centroid: Tensor,
    scatter: Tensor,
    chosen: Tensor | None,
    prior: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; on a CPU that vectors have a direction, and that numbers are numbers."""
    check_floating(op, "candidates", candidates)
    if candidates.dim() not in (2, 3) or candidates.shape[-2] == 0 or candidates.shape[-1] == 0:
        raise ValueError(
            f"{op}: candidates must have shape (m, D), or (G, m, D) for G image sets, with a candidate and a"
            f" column at least, got {shape(candidates)}"
        )
    count, columns = candidates.shape[-2:]
    sets = candidates.shape[0] if candidates.dim() == 3 else None
    for name, tensor, letters, expected in (
        ("centroid", centroid, "(D,)", (columns,)),
        ("scatter", scatter, "(D, D)", (columns, columns)),
        ("chosen", chosen, "(S, D)", (None, columns)),
        ("prior", prior, "(m,)", (count,)),
    ):
        if tensor is None:
            continue
        check_like_or_widened(op, name, tensor, candidates, "candidates")
        dims = len(expected)
        fits = all(size in (None, n) for n, size in zip(tensor.shape[-dims:], expected, strict=False))
        if tensor.dim() not in (dims, dims + 1) or not fits:
            sizes = f"m = {count}" if name == "prior" else f"D = {columns}"
            raise ValueError(
                f"{op}: {name} must have shape {letters}, or with the image sets in front, where {sizes}, got"
                f" {shape(tensor)}"
            )
        if tensor.dim() > dims:
            sets = _one_number_of_sets(op, name, tensor, sets)
    if sets == 0:
        raise ValueError(f"{op}: there must be an image set at least, got none")
    _check_rows(op, "candidates", candidates)
    _check_rows(op, "centroid", centroid)
    if chosen is not None:
        _check_rows(op, "chosen", chosen)
    for name, tensor in (("scatter", scatter), ("prior", prior)):
        if tensor is not None:
            _check_finite(op, name, tensor)


def check_weights(op: str, **weights: float) -> None:
    for name, weight in weights.items():
        check_number(op, name, weight)
        least = -MOST if name == "prior_weight" else 0
        if not least <= weight <= MOST:
            kind = "finite" if name == "prior_weight" else "finite and not negative"
            raise ValueError(f"{op}: {name} must be {kind}, got {weight}")


def check_selection(op: str, candidates: Tensor, k: int, orthogonality: str) -> None:
    check_int(op, "k", k)
    count = candidates.shape[-2]
    if not 1 <= k <= count:
        raise ValueError(f"{op}: k must be between 1 and the number of candidates, {count}, got {k}")
    if orthogonality not in ORTHOGONALITY:
        names = " or ".join(map(repr, ORTHOGONALITY))
        raise ValueError(f"{op}: orthogonality must be {names}, got {orthogonality!r}")


def _one_number_of_sets(op: str, name: str, tensor: Tensor, sets: int | None) -> int:
    if sets is not None and tensor.shape[0] != sets:
        raise ValueError(
            f"{op}: {name} must be of as many image sets as the arguments before, {sets}, or of none in"
            f" particular, got {tensor.shape[0]}"
        )
    return tensor.shape[0]


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    """What is subnormal in the arithmetic has no direction that survives it."""
    if not may_look_at(rows):
        return
    largest = rows.detach().abs().amax(-1).to(arithmetic(rows))
    bad = ~(largest.isfinite() & (largest >= torch.finfo(largest.dtype).tiny))
    if bool(bad.any()):
        what = "the vector" if largest.dim() == 0 else f"row {_first(bad)}"
        raise RuntimeError(
            f"{op}: {name} must be finite and not all zeros, got {what} that has no direction; leave it out"
        )


def _check_finite(op: str, name: str, tensor: Tensor) -> None:
    if not may_look_at(tensor):
        return
    tensor = tensor.detach()
    least, most = tensor.aminmax()
    if not bool((most - least).isfinite()):  # of NaN both are NaN
        bad = ~tensor.isfinite()
        if bool(bad.any()):  # else the difference alone is not
            place = _first(bad)
            raise RuntimeError(f"{op}: {name} must be finite, got {float(tensor[place]):g} at {place}")


def _first(bad: Tensor) -> int | tuple[int, ...]:
    place = torch.nonzero(bad)[0].tolist()
    return place[0] if len(place) == 1 else tuple(place)
