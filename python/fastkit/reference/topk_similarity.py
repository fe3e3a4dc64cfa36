"""The nearest keys of each query, by product, cosine, distance or CSLS; written for reading."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 2**18
"""About so many scores exist at a time, or so many numbers of chosen keys: no (n, m) matrix."""


class TopK(NamedTuple):
    """What ``topk_similarity`` and ``csls_topk`` return, the best first."""

    values: Tensor  # (n, k), NaN where nothing could be chosen
    indices: Tensor  # (n, k) int64, rows of the keys, -1 where nothing could be chosen


def topk_similarity(
    queries: Tensor,  # (n, D)
    keys: Tensor,  # (m, D)
    k: int,
    *,
    metric: str = "dot",
    key_bias: Tensor | None = None,  # (m,)
) -> TopK:
    """The k keys with the greatest product (dot, cosine) or the least squared distance (l2) to each query.

    A key's bias is added to its product. Of equal scores the lower index is first. A score that is NaN is
    never chosen; where too few others are left, the rest of the row is NaN and -1.

    In float64 for float64 queries, else in float32. Each pair is summed alike, column by column in order, so
    that equal keys have equal scores, which no matrix product promises.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    if metric == "cosine":
        queries, keys = unit_rows(queries), unit_rows(keys)
    bias = keys.new_zeros(len(keys)) if key_bias is None else key_bias.to(dtype)
    columns = keys.detach().T.contiguous().T
    rows = max(1, SCORES // (len(keys) + k * keys.shape[1]))
    blocks = [_nearest(block, keys, columns, bias, k, metric) for block in queries.split(rows)]
    return TopK(torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks]))


def csls_topk(
    queries: Tensor,  # (n, D)
    keys: Tensor,  # (m, D)
    k: int,
    *,
    sources: Tensor | None = None,  # (s, D), by default the queries
    neighbors: int = 10,
) -> TopK:
    """The k keys with the greatest cross-domain similarity local scaling to each query.

    That is twice the cosine, less the query's mean cosine with its ``neighbors`` nearest keys, less the key's
    with its ``neighbors`` nearest sources.
    """
    sources = queries if sources is None else sources
    of_queries = topk_similarity(queries, keys, neighbors, metric="cosine").values.mean(1, keepdim=True)
    of_keys = topk_similarity(keys, sources, neighbors, metric="cosine").values.mean(1)
    values, indices = topk_similarity(queries, keys, k, metric="cosine", key_bias=-of_keys / 2)
    values = 2 * values - of_queries
    return TopK(values, indices.masked_fill(values.detach().isnan(), -1))


def unit_rows(x: Tensor) -> Tensor:  # (n, D)
    """Each row over its norm, for any scale; zeros of a row of zeros, NaN of a row with inf or NaN.

    Such rows pass no gradient on.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    regular = (largest > 0) & largest.isfinite()
    scaled = torch.where(regular, x, 1.0) / torch.where(regular, largest, 1.0)
    norm = _scores(scaled, scaled, "dot").sqrt().unsqueeze(1)
    return torch.where(regular, scaled / norm, 0.0 * largest)


def _nearest(
    queries: Tensor,  # (b, D)
    keys: Tensor,  # (m, D)
    columns: Tensor,  # (m, D), keys without a gradient, column by column in memory
    bias: Tensor,  # (m,)
    k: int,
    metric: str,
) -> TopK:
    scores = _scores(queries.detach().unsqueeze(1), columns, metric)
    distances = scores if metric == "l2" else -(scores + bias.detach())
    nearest = distances.argsort(dim=1, stable=True)[:, :k]  # NaN is greater than any number
    none = distances.gather(1, nearest).isnan()
    # The same scores again, of what is chosen alone, and with gradients.
    chosen = keys[nearest].masked_fill(none.unsqueeze(2), 0.0)
    values = _scores(queries.unsqueeze(1).masked_fill(none.unsqueeze(2), 0.0), chosen, metric)
    if metric != "l2":
        values = values + bias[nearest]
    return TopK(values.masked_fill(none, math.nan), nearest.masked_fill(none, -1))


def _scores(queries: Tensor, keys: Tensor, metric: str) -> Tensor:  # (..., D), (..., D)
    total = queries.new_zeros(())
    for q, k in zip(queries.unbind(-1), keys.unbind(-1), strict=True):
        total = total + ((q - k).square() if metric == "l2" else q * k)
    return total
