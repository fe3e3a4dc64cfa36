"""Translations of mapped words: by CSLS, by the inverted softmax, or by the cosine alone.

Sources and targets are rows of norm 1, so that a product is a cosine. What a target is charged with, over all
sources, is computed once; then each query is a search of its own, with bits of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkit import ops
from fastkit.methods.word_translation.settings import Retrieval
from fastkit.methods.word_translation.tables import row_sums

_SCORES = 2**24  # of an inverted softmax at a time


class Translations(NamedTuple):
    """What ``WordTranslator.translate`` returns."""

    scores: Tensor  # (n, k) float32, descending
    indices: Tensor  # (n, k) int64, rows of the target table


def penalty(
    sources: Tensor, targets: Tensor, retrieval: Retrieval, *, neighbors: int, beta: float
) -> Tensor | None:  # (m,)
    """CSLS: the mean of a target's greatest cosines; ISF: log of its sum of exp(beta cosine); NN: nothing."""
    if retrieval == "csls":
        return _mean_of_nearest(targets, sources, neighbors)
    if retrieval == "isf":
        rows = max(1, _SCORES // len(sources))
        return torch.cat([(block @ sources.mT).mul_(beta).logsumexp(1) for block in targets.split(rows)])
    return None


def search(
    queries: Tensor,  # (q, E) of norm 1
    targets: Tensor,  # (m, E) of norm 1
    k: int,
    retrieval: Retrieval,
    charged: Tensor | None,  # (m,) of ``penalty``
    *,
    neighbors: int,
    beta: float,
) -> Translations:
    """The k best targets of each query::

    csls    2 cos(q, y_j) - mean of the greatest cos(q, y) - penalty_j
    isf     exp(beta cos(q, y_j)) / sum over all sources of exp(beta cos(x, y_j))
    nn      cos(q, y_j)
    """
    if charged is None:
        return Translations(*ops.topk_similarity(queries, targets, k))
    weight = 2.0 if retrieval == "csls" else beta
    values, indices = ops.topk_similarity(queries, targets, k, key_bias=-charged / weight)
    if retrieval == "isf":
        return Translations((values * beta).exp(), indices)
    return Translations(2 * values - _mean_of_nearest(queries, targets, neighbors).unsqueeze(1), indices)


def _mean_of_nearest(queries: Tensor, keys: Tensor, neighbors: int) -> Tensor:
    return row_sums(ops.topk_similarity(queries, keys, neighbors).values) / neighbors
