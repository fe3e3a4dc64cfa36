"""What runs phrase_scores and select_phrases: of each implementation an op, of one signature and fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit import _native
from fastkit.ops._checks import check_one_device
from fastkit.ops._define import define_triton

_WEIGHTS = "float variance_weight, float orthogonality_weight, float prior_weight"


def _fake_score(
    candidates: Tensor,
    centroid: Tensor,
    scatter: Tensor,
    chosen: Tensor | None,
    prior: Tensor | None,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("phrase_scores", candidates, centroid, scatter, chosen, prior)
    shape = _sets(candidates, centroid, scatter, chosen, prior), candidates.shape[1]
    return candidates.new_empty(shape), candidates.new_empty(shape), candidates.new_empty(shape)


def _fake_select(
    candidates: Tensor, centroid: Tensor, scatter: Tensor, prior: Tensor | None, k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("select_phrases", candidates, centroid, scatter, prior)
    shape = _sets(candidates, centroid, scatter, prior), k
    indices = candidates.new_empty(shape, dtype=torch.int64)
    return indices, candidates.new_empty(shape), candidates.new_empty(shape)


def _sets(*tensors: Tensor | None) -> int:
    """How many image sets these are of; an argument of one is all sets'."""
    return next((t.shape[0] for t in tensors if t is not None and t.shape[0] != 1), 1)


score: dict[str, Callable[..., Any]] = {
    "triton": define_triton(
        "phrase_scores_fwd(Tensor candidates, Tensor centroid, Tensor scatter, Tensor? chosen, Tensor? prior,"
        f" {_WEIGHTS}) -> (Tensor, Tensor, Tensor)",
        "phrase_scores.score",
        _fake_score,
    )
}
select: dict[str, Callable[..., Any]] = {
    "triton": define_triton(
        "select_phrases_fwd(Tensor candidates, Tensor centroid, Tensor scatter, Tensor? prior, int k,"
        f" bool deflate, {_WEIGHTS}) -> (Tensor, Tensor, Tensor)",
        "phrase_scores.select",
        _fake_select,
    )
}
if _native.REASON is None:
    score["cpu"] = torch.ops.fastkit.phrase_scores_fwd.default
    select["cpu"] = torch.ops.fastkit.select_phrases_fwd.default
    torch.library.register_fake("fastkit::phrase_scores_fwd", _fake_score)
    torch.library.register_fake("fastkit::select_phrases_fwd", _fake_select)
