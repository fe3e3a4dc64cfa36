"""Translations of mapped words: by CSLS, by the inverted softmax, or by the cosine alone.

Sources and targets are rows of norm 1, so that a product is a cosine. What a target is charged with, over all
sources, is computed once; then each query is a search of its own, with bits of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from fastkit import ops
from fastkit.methods._options import check_one_of
from fastkit.methods.word_translation.checks import as_pairs
from fastkit.methods.word_translation.settings import OP, Retrieval, Settings
from fastkit.methods.word_translation.tables import row_sums

_SCORES = 2**24  # of an inverted softmax at a time
_QUERIES = 4096  # of a score at a time


class Translations(NamedTuple):
    """What ``WordTranslator.translate`` returns."""

    scores: Tensor  # (n, k) float32, descending
    indices: Tensor  # (n, k) int64, rows of the target table


class Score(NamedTuple):
    """What ``WordTranslator.score`` returns."""

    precision: dict[int, float]  # k: the part of the queries with a right translation among the first k
    queries: int  # words with a translation among the pairs


class Index:
    """Both tables of a fit, in rows of norm 1, the sources mapped, with its options."""

    def __init__(self, sources: Tensor, targets: Tensor, settings: Settings) -> None:
        self.sources = sources  # (n, E)
        self.targets = targets  # (m, E)
        self.penalties: dict[Retrieval, Tensor | None] = {}  # those that were asked for
        self._settings = settings

    def penalty(self, retrieval: Retrieval) -> Tensor | None:
        """What each target is charged with, (m,), computed once.

        CSLS: the mean of its greatest cosines; ISF: the log of its sum of exp(beta cosine); NN: None.
        """
        if retrieval not in self.penalties:
            self.penalties[retrieval] = self._penalty(retrieval)
        return self.penalties[retrieval]

    def _penalty(self, retrieval: Retrieval) -> Tensor | None:
        if retrieval == "csls":
            return _mean_of_nearest(self.targets, self.sources, self._settings.neighbors)
        if retrieval == "isf":
            beta, blocks = self._settings.isf_beta, self.targets.split(max(1, _SCORES // len(self.sources)))
            return torch.cat([(block @ self.sources.mT).mul_(beta).logsumexp(1) for block in blocks])
        return None

    def search(
        self,
        queries: Tensor,  # (q, E) of norm 1
        k: int,
        retrieval: Retrieval | None,  # None: that of the fit
    ) -> Translations:
        """The k best targets of each query::

        csls    2 cos(q, y_j) - mean of the greatest cos(q, y) - penalty_j
        isf     exp(beta cos(q, y_j)) / sum over all sources of exp(beta cos(x, y_j))
        nn      cos(q, y_j)
        """
        retrieval = self._settings.retrieval if retrieval is None else retrieval
        check_one_of(OP, "retrieval", retrieval, get_args(Retrieval))
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self.targets):
            raise ValueError(f"{OP}: k must be between 1 and the {len(self.targets)} words of Y, got {k!r}")
        charged = self.penalty(retrieval)
        if charged is None:
            return Translations(*ops.topk_similarity(queries, self.targets, k))
        weight = 2.0 if retrieval == "csls" else self._settings.isf_beta
        values, indices = ops.topk_similarity(queries, self.targets, k, key_bias=-charged / weight)
        if retrieval == "isf":
            return Translations((values * weight).exp(), indices)
        nearest = _mean_of_nearest(queries, self.targets, self._settings.neighbors)
        return Translations(2 * values - nearest.unsqueeze(1), indices)

    def score(self, pairs: object, ks: Sequence[int], retrieval: Retrieval | None) -> Score:
        """Of the sources in ``pairs`` (P, 2)."""
        rows_of = as_pairs(pairs, self.sources, self.targets)
        if not ks or not all(isinstance(k, int) and 1 <= k <= len(self.targets) for k in ks):
            raise ValueError(f"{OP}: ks must be between 1 and the {len(self.targets)} words of Y, got {ks!r}")
        rows, query = rows_of[:, 0].unique(return_inverse=True)
        most = max(ks)
        found = torch.cat(
            [self.search(self.sources[some], most, retrieval).indices for some in rows.split(_QUERIES)]
        )
        hit = found[query] == rows_of[:, 1:]  # (P, most)
        rank = torch.where(hit.any(1), hit.int().argmax(1), most)
        best = torch.full_like(rows, most).scatter_reduce_(0, query, rank, "amin")
        return Score({k: (best < k).double().mean().item() for k in ks}, len(rows))


def _mean_of_nearest(queries: Tensor, keys: Tensor, neighbors: int) -> Tensor:
    return row_sums(ops.topk_similarity(queries, keys, neighbors).values) / neighbors
