"""The nearest keys of each query: by product, cosine, squared distance, or CSLS."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms
from fastkit._dispatch import Impl, Kernels, choose, covered
from fastkit.ops._checks import FLOATING, HALF, check_tensors, widened
from fastkit.ops.topk_similarity_autograd import both_nearest, nearest, unit_rows
from fastkit.ops.topk_similarity_checks import check_csls, check_topk
from fastkit.ops.topk_similarity_triton import absent
from fastkit.reference import TopK

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}
Metric = Literal["dot", "cosine", "l2"]


def topk_similarity(
    queries: Tensor,  # (n, D)
    keys: Tensor,  # (m, D)
    k: int,
    *,
    metric: Metric = "dot",
    key_bias: Tensor | None = None,  # (m,)
    impl: Impl | None = None,
) -> TopK:  # values (n, k), indices (n, k)
    """The k keys that are nearest to each query, the nearest first, without the (n, m) matrix of scores.

    ::

        dot      score[i, j] = q_i . k_j + key_bias[j]                        the greatest, descending
        cosine   score[i, j] = (q_i / |q_i|) . (k_j / |k_j|) + key_bias[j]    the greatest, descending
        l2       score[i, j] = |q_i - k_j|^2                                  the least, ascending

    Equivalent to ``fastkit.reference.topk_similarity``: a stable sort of each row of scores. Of equal scores
    the lower index is first, and equal keys have equal scores.

    Args:
        queries: ``(n, D)``, D >= 1, float32, float64, bfloat16 or float16; any strides, n = 0 too.
        keys: ``(m, D)`` in the dtype of queries; any strides. It may be memory-mapped, as
            ``torch.from_numpy(numpy.load(file, mmap_mode="c"))``.
        k: how many, between 1 and m.
        metric: ``"dot"``, ``"cosine"`` or ``"l2"``. The cosine of a row of zeros with any other is 0, and
            that of a row with inf is NaN.
        key_bias: ``(m,)`` in the dtype of queries, or float32 for half-precision ones; what is added to the
            product with each key; not with ``"l2"``. -inf puts a key behind all others. Default: nothing.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that or raises. Default: the kernel
            where one covers the device, the dtype and k, which on a GPU is at most 128, else the reference.

    Returns:
        ``TopK(values, indices)``, each ``(n, k)``. values: the scores, float32, or float64 of float64
        queries. indices: int64, rows of keys. A score that is NaN, as of any key or query with NaN, is never
        chosen; where fewer than k scores of a query are numbers, the rest of its row is NaN and -1.

    Raises:
        ValueError: a shape, ``k``, ``metric`` or the name ``impl`` is not as above, or ``key_bias`` is given
            with ``"l2"``.
        TypeError: an argument is no dense tensor or int, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: scores are computed in float32, for float64 in float64; half precision is raised, nothing is
    rounded to it but gradients. Keys whose scores differ by less than rounding, ``D eps |q| |k|``, may come
    in either order; the order is always that of ``values``. Squared distances are sums of squares of
    differences: close pairs lose no digits. Rows are normalised over their largest element first, so that
    neither tiny nor huge ones are lost.

    Support: gradients of values to queries, keys and key_bias, of any order, as if the choice were fixed (at
    a tie it is one of several; ``torch.compile`` keeps the first order only); ``torch.func``,
    ``torch.vmap`` and forward mode run the reference; ``torch.compile(fullgraph=True)``; under autocast
    half precision is raised to float32. Rows of zeros, inf or NaN get no gradient from their cosine.

    Memory and work: ``n m D`` multiply-adds, and a selection. On the CPU lists of k for 2048 queries of each
    thread; the reference works on blocks of about 2^18 scores, and copies keys once; on a GPU a copy of the
    tables in bfloat16, where they are not in half precision, and a few lists of candidates a query. Backward
    takes ``n k D`` multiply-adds for each gradient, and buffers of 2^20 numbers; double backward keeps
    several of n k D. Saved for backward are the indices, and the arguments by reference, or their normalised
    rows.

    Source: exhaustive search. That products are selected from as they are made: Johnson, Douze, Jégou,
    "Billion-scale similarity search with GPUs", arXiv:1702.08734.

    Example:
        >>> import torch, fastkit.ops
        >>> keys = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])
        >>> fastkit.ops.topk_similarity(torch.tensor([[2.0, 1]]), keys, 3)
        TopK(values=tensor([[3., 2., 2.]]), indices=tensor([[2, 0, 3]]))
    """
    op = "topk_similarity"
    check_tensors(op, queries=queries, keys=keys, key_bias_=key_bias)
    if autocasts(queries):
        queries, keys, key_bias = widened(queries, keys, key_bias)
    check_topk(op, queries, keys, k, metric, key_bias)
    chosen = choose(op, impl, queries, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, queries, KERNELS, chosen, absent=absent(k))
    if transforms():
        return reference.topk_similarity(queries, keys, k, metric=metric, key_bias=key_bias)
    if metric == "cosine":
        queries, keys = unit_rows(queries, chosen), unit_rows(keys, chosen)
        key_bias = None if key_bias is None else key_bias.to(queries.dtype)
    return nearest(queries, keys, key_bias, k, metric == "l2", chosen)


def csls_topk(
    queries: Tensor,  # (n, D)
    keys: Tensor,  # (m, D)
    k: int,
    *,
    sources: Tensor | None = None,  # (s, D)
    neighbors: int = 10,
    impl: Impl | None = None,
) -> TopK:  # values (n, k), indices (n, k)
    """The k keys that are nearest to each query by cross-domain similarity local scaling (CSLS).

    ::

        score[i, j] = 2 cos(q_i, k_j) - r_i - p_j
        r_i = mean of the `neighbors` greatest cos(q_i, k_j) over all keys
        p_j = mean of the `neighbors` greatest cos(x, k_j) over all rows x of sources

    The penalty p_j is what a hub has, a key that is near to everything. r_i is the same for all keys, so the
    order is that of ``cos(q_i, k_j) - p_j / 2``: with the penalties at hand, it is
    ``topk_similarity(queries, keys, k, metric="cosine", key_bias=-p / 2)``. Equivalent to
    ``fastkit.reference.csls_topk``.

    Args:
        queries: ``(n, D)``, D >= 1, float32, float64, bfloat16 or float16; any strides.
        keys: ``(m, D)`` in the dtype of queries; any strides, memory-mapped too.
        k: how many, between 1 and m.
        sources: ``(s, D)`` in the dtype of queries: all of the queries' domain, where queries are a part of
            it, as the few words that are to be translated are of a vocabulary. Default: queries.
        neighbors: of how many cosines the means are; between 1 and the lesser of m and s.
        impl: as of ``topk_similarity``.

    Returns:
        ``TopK(values, indices)``, each ``(n, k)``, descending, ties by the lower index. values: the scores,
        float32, or float64 of float64 queries. A key or query with NaN or inf is never chosen, and nothing is
        chosen for it, as in ``topk_similarity``. Sources with NaN are left out; if fewer than ``neighbors``
        others are left, or fewer keys are numbers, nothing is chosen.

    Raises:
        ValueError: a shape, ``k``, ``neighbors`` or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor or int, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics, Support: as of ``topk_similarity`` by cosine; gradients flow through both means too. Keys are
    ranked by ``cos - p / 2``, before r is subtracted.

    Memory and work: ``2 n m D`` multiply-adds, or ``(2 n + s) m D`` with sources, on a GPU with those of the
    queries; normalised copies of the arguments, ``(n + m) neighbors`` values and indices of the means, and on
    the CPU lists of the shorter table for each thread, 16 bytes an entry, up to 512 MiB.

    Source: Conneau, Lample, Ranzato, Denoyer, Jégou, "Word Translation Without Parallel Data", ICLR 2018,
    arXiv:1710.04087.

    Example:
        >>> import torch, fastkit.ops
        >>> queries, keys = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [1, 3]])
        >>> fastkit.ops.csls_topk(queries, keys, 1, neighbors=1).indices
        tensor([[0],
                [1]])
    """
    op = "csls_topk"
    check_tensors(op, queries=queries, keys=keys, sources_=sources)
    if autocasts(queries):
        queries, keys, sources = widened(queries, keys, sources)
    check_csls(op, queries, keys, k, sources, neighbors)
    chosen = choose(op, impl, queries, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, queries, KERNELS, chosen, absent=absent(max(k, neighbors)))
    if transforms():
        return reference.csls_topk(queries, keys, k, sources=sources, neighbors=neighbors)
    queries, keys = unit_rows(queries, chosen), unit_rows(keys, chosen)
    if sources is None:
        of_queries, of_keys = both_nearest(queries, keys, neighbors, chosen)
    else:
        of_queries = nearest(queries, keys, None, neighbors, False, chosen)
        of_keys = nearest(keys, unit_rows(sources, chosen), None, neighbors, False, chosen)
    values, indices = nearest(queries, keys, -of_keys.values.mean(1) / 2, k, False, chosen)
    values = 2 * values - of_queries.values.mean(1, keepdim=True)
    return TopK(values, indices.masked_fill(values.detach().isnan(), -1))
