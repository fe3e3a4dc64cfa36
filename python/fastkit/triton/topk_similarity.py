"""The k nearest keys of each query in Triton, found by rough scores and decided by exact ones.

Decomposition. ``topk_similarity_search`` owns BQ queries and passes through a piece of the keys, a tile of BK
scores at a time. They are rough: products of operands in half precision, on tensor cores. Of each query it
keeps the C best scores of the piece. Only scores above the worst that is kept are looked at, which after some
tiles are rare. ``topk_similarity_decide`` owns one query. It takes together what was kept of all pieces,
computes the scores of these C keys again, in float32 and from the given tables, and orders them by score and
index.

A rough score is off by at most e, see ``_error``. What was not kept has no better rough score than the worst
that was, w. So if w + e is less than the k-th exact score, nothing is missing; else, as where more than C
keys are equal, the same program computes the exact scores of all keys. Nothing waits for the device.

An exact score is a sum in an order that the number of columns alone decides: equal keys have equal scores.

Operands are the tables as they are if they are in half precision, dense, and have a multiple of 16 columns;
else copies. Squared distances |q - x|^2 are ranked by q . x - |x|^2 / 2, with the mean of the keys subtracted
from both, lest the squares be much larger than their difference.

Bytes. The operands of the keys are read once for each block of queries, from the second-level cache where it
holds what is read at the same time. Of n queries and m keys there are never n m scores: between the kernels
there are 8 C bytes a query and piece.
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

FILL = 256  # programs that a GPU wants, at least
LANES = tl.constexpr(32)  # of an exact sum
NOTHING = tl.constexpr(-(2**31))  # before any score
LAST = tl.constexpr(2**31 - 1)  # after any index


@triton.jit
def _rank(score):
    # Whole numbers in the order of scores, zeros alike; nothing of NaN.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), NOTHING)


@triton.jit
def _score(rank):
    bits = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    return tl.where(rank == NOTHING, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _keep(kept, indices, offered, at, LEAST: tl.constexpr):
    # Rows of `kept`, with their indices, take what is greater than their least from rows of `offered`, whose
    # indices are `at`. Of equals the lower index is better, if those that are kept are lower than `at`.
    best = tl.max(offered, axis=1)
    least = tl.min(kept, axis=1)
    while tl.max((best > least).to(tl.int32), axis=0) > 0:
        first = tl.min(tl.where(offered == best[:, None], at, LAST), axis=1)[:, None]
        last = tl.max(tl.where(kept == least[:, None], indices, NOTHING), axis=1)[:, None]
        leaves = (indices == last) & (best > least)[:, None]
        kept = tl.where(leaves, best[:, None], kept)
        indices = tl.where(leaves, first, indices)
        offered = tl.where(at == first, LEAST, offered)
        best = tl.max(offered, axis=1)
        least = tl.min(kept, axis=1)
    return kept, indices


@triton.jit
def topk_similarity_search(
    queries, keys, addends, scores, indices, n, m, columns, length,
    ADDS: tl.constexpr, RAISES: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    # scores and indices (n, pieces, C): of each piece of `length` keys those with the greatest products, an
    # addend of their own added. What is less than any number, or NaN, counts as the least number; -inf stands
    # where there was no key.
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    piece = tl.program_id(1)
    d = tl.arange(0, BD)
    queries += q[:, None] * columns
    slots = tl.arange(0, C)
    kept = tl.full([BQ, C], -float("inf"), tl.float32)
    at = tl.zeros([BQ, C], tl.int32) - 1 - slots[None, :]
    for begin in range(piece * length, tl.minimum((piece + 1) * length, m), BK):
        j = begin + tl.arange(0, BK)
        of_keys = keys + j[:, None].to(tl.int64) * columns
        products = tl.zeros([BQ, BK], tl.float32)
        for first in range(0, columns, BD):
            inside = first + d < columns
            left = tl.load(queries + (first + d)[None, :], mask=(q < n)[:, None] & inside[None, :], other=0.0)
            right = tl.load(
                of_keys + (first + d)[None, :], mask=(j < m)[:, None] & inside[None, :], other=0.0
            )
            if RAISES:
                left, right = left.to(tl.float32), right.to(tl.float32)
            products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
        if ADDS:
            products += tl.load(addends + j, mask=j < m, other=0.0)[None, :]
        products = tl.where(products >= -3.4028234663852886e38, products, -3.4028234663852886e38)
        products = tl.where((j < m)[None, :], products, -float("inf"))
        kept, at = _keep(kept, at, products, j[None, :], -float("inf"))
    place = (q[:, None] * tl.num_programs(1) + piece) * C + slots[None, :]
    tl.store(scores + place, kept, mask=(q < n)[:, None])
    tl.store(indices + place, at, mask=(q < n)[:, None])


@triton.jit
def _exact(query, keys, bias, at, there, columns, key_row, L2: tl.constexpr, ADDS: tl.constexpr):
    # The scores of the keys `at`, of squared distances their negatives. Lanes first, then pairs of them.
    R: tl.constexpr = at.shape[0]
    keys += at[:, None].to(tl.int64) * key_row
    sums = tl.zeros([R, LANES], tl.float32)
    for first in range(0, columns, LANES):
        d = first + tl.arange(0, LANES)
        inside = d < columns
        q = tl.load(query + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = tl.load(keys + d[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if L2:
            q = q - x
            x = q
        sums = tl.fma(q, x, sums)
    even, odd = tl.split(tl.reshape(sums, [R, LANES // 2, 2]))
    even, odd = tl.split(tl.reshape(even + odd, [R, LANES // 4, 2]))
    even, odd = tl.split(tl.reshape(even + odd, [R, LANES // 8, 2]))
    even, odd = tl.split(tl.reshape(even + odd, [R, LANES // 16, 2]))
    even, odd = tl.split(even + odd)
    score = even + odd
    if L2:
        score = 0.0 - score
    if ADDS:
        score += tl.load(bias + at, mask=there, other=0.0)
    return tl.where(there, _rank(score), NOTHING)


@triton.jit
def _in_order(ranks, indices, k):
    # The k best of (1, C), ranks and indices; and the rank of the last.
    slots = tl.arange(0, ranks.shape[1])[None, :]
    ordered = ranks
    found = indices
    best = tl.max(ranks)
    for place in range(k):
        best = tl.max(ranks)
        at = tl.min(tl.where(ranks == best, indices, LAST))
        ordered = tl.where(slots == place, best, ordered)
        found = tl.where(slots == place, at, found)
        ranks = tl.where(indices == at, NOTHING, ranks)
    return ordered, found, best


@triton.jit
def _error(size, largest, most, columns, conversion):
    # How far the rough score of a query whose operand has the norm `size`, with a key's of norm up to
    # `largest`, can be from the exact one. `conversion` is what rounding to operands takes of a product. Sums
    # take less than 4 roundings of float32 a column, on tensor cores too; `most` is the largest addend. What
    # is too small for float32 is in `tiny` and the last term. A 64th is for roundings of norms and of this.
    tiny = columns * 2.0**-60
    share = conversion + (columns + 32) * 2.0**-22
    share *= 1.0 + 2.0**-6 + columns * 2.0**-20
    return share * (size + tiny) * (largest + tiny) + most * 2.0**-20 + (columns + 32) * 2.0**-120


@triton.jit
def topk_similarity_decide(
    queries, keys, bias, norms, bounds, scores, rough, values, chosen, m, columns, query_row, key_row, k,
    kept_of_all, conversion, L2: tl.constexpr, ADDS: tl.constexpr, C: tl.constexpr, MERGED: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    # values and chosen (n, k), NaN and -1 where there are too few numbers. scores and rough (n, kept_of_all)
    # are those of the search and their indices; norms (n) those of the queries' operands; bounds, the largest
    # norm of a key's and the largest addend.
    row = tl.program_id(0).to(tl.int64)
    queries += row * query_row
    scores += row * kept_of_all
    rough += row * kept_of_all
    values += row * k
    chosen += row * k
    slots = tl.arange(0, C)[None, :]
    kept = tl.load(scores + slots)
    at = tl.load(rough + slots)
    for begin in range(C, kept_of_all, MERGED):
        more = begin + tl.arange(0, MERGED)[None, :]
        offered = tl.load(scores + more, mask=more < kept_of_all, other=-float("inf"))
        of_offered = tl.load(rough + more, mask=more < kept_of_all, other=0)
        kept, at = _keep(kept, at, offered, of_offered, -float("inf"))
    worst = tl.min(kept)
    of_list = tl.reshape(at, [C])
    ranks = _exact(queries, keys, bias, of_list, of_list >= 0, columns, key_row, L2, ADDS)
    ranks, at, last = _in_order(tl.reshape(ranks, [1, C]), at, k)
    last = _score(last)

    size = tl.load(norms + row)
    largest = tl.load(bounds)
    most = tl.load(bounds + 1)
    if L2:
        # By the triangle, a distance is off by what both operands are.
        far = tl.sqrt(0.0 - last) + conversion * (size + largest) + columns * 2.0**-60
        last = (size * size - far * far) / 2
        error = _error(size + largest, size + largest, most, columns, 0.0)
    else:
        error = _error(size, largest, most, columns, conversion)
    # Of a query with NaN nothing is chosen: its norm is NaN. inf, of what is beyond float32, decides nothing.
    misses = (worst > -float("inf")) & ((worst < last - error) == 0)
    if (misses | (error == float("inf"))) & (size == size):
        ranks = tl.full([1, C], NOTHING, tl.int32)
        at = -1 - slots
        for begin in range(0, m, BK):
            j = begin + tl.arange(0, BK)
            offered = _exact(queries, keys, bias, j, j < m, columns, key_row, L2, ADDS)
            offered = tl.reshape(offered, [1, BK])
            ranks, at = _keep(ranks, at, offered, j[None, :], NOTHING)
        ranks, at, _ = _in_order(ranks, at, k)
    best = _score(ranks)
    tl.store(values + slots, 0.0 - best if L2 else best, mask=slots < k)
    tl.store(chosen + slots, tl.where(ranks == NOTHING, -1, at).to(tl.int64), mask=slots < k)


def forward(
    queries: Tensor, keys: Tensor, key_bias: Tensor | None, k: int, l2: bool
) -> tuple[Tensor, Tensor]:
    """values and indices (n, k) of queries (n, D), keys (m, D) and a bias (m,); k <= 128."""
    n, m = len(queries), len(keys)
    values = queries.new_empty((n, k), dtype=torch.float32)
    chosen = queries.new_empty((n, k), dtype=torch.int64)
    if not n:
        return values, chosen
    if m >= 2**31:
        raise RuntimeError(
            f"topk_similarity: keys must have fewer than 2^31 rows on a GPU, got {m}; pass parts of them"
        )
    queries, keys = _dense_rows(queries), _dense_rows(keys)
    centre = _centre(keys) if l2 else None
    rough_queries, rough_keys = _operand(queries, centre), _operand(keys, centre)
    norms, of_keys = _norms(rough_queries), _norms(rough_keys)
    bias = addends = None if key_bias is None else key_bias.float().contiguous()
    largest = of_keys.nan_to_num(nan=0.0, posinf=torch.inf).amax()
    most = torch.zeros_like(largest)
    if bias is not None:
        most = bias.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    if l2:
        addends = of_keys.square() / -2
    bounds = torch.stack([largest, most])

    options = search_options(n, k)
    programs = triton.cdiv(n, options["BQ"])
    pieces, length = _pieces(programs, m, options["BK"])
    scores = values.new_empty((n, pieces, options["C"]))
    rough = scores.new_empty(scores.shape, dtype=torch.int32)
    with torch.cuda.device_of(queries):
        topk_similarity_search[(programs, pieces)](
            rough_queries, rough_keys, norms if addends is None else addends, scores, rough, n, m,
            rough_keys.shape[1], length, ADDS=addends is not None, RAISES=_interpreted(), **options,
        )  # fmt: skip
        topk_similarity_decide[(n,)](
            queries, keys, norms if bias is None else bias, norms, bounds, scores, rough, values, chosen, m,
            keys.shape[1], queries.stride(0), keys.stride(0), k, pieces * options["C"],
            _conversion(queries, rough_queries, l2), L2=l2, ADDS=bias is not None, **decide_options(k),
        )  # fmt: skip
    return values, chosen


def _candidates(k: int) -> int:
    """As many scores as are within error of the k-th, in most tables: more than k, a power of two."""
    return max(16, triton.next_power_of_2(k + 8 + k // 2))


def search_options(n: int, k: int) -> dict[str, Any]:
    kept = _candidates(k)
    most = {128: 64, 256: 32}.get(kept, 128)  # what registers hold
    rows = min(most, max(32, triton.next_power_of_2(n)))
    return {"BQ": rows, "BK": 64, "BD": 64, "C": kept, "num_warps": 8}


def decide_options(k: int) -> dict[str, Any]:
    kept = _candidates(k)
    return {"C": kept, "MERGED": 256, "BK": 64, "num_warps": 4 if kept <= 64 else 8}


def _pieces(programs: int, size: int, block: int) -> tuple[int, int]:
    """How many pieces of the keys fill the GPU with what there are ``programs`` of, and the size of each."""
    blocks = triton.cdiv(size, block)
    length = triton.cdiv(blocks, min(blocks, triton.cdiv(FILL, programs))) * block
    return triton.cdiv(size, length), length


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _centre(keys: Tensor) -> Tensor:
    """Their mean; any other would be as right, and a column without a mean has none."""
    mean = keys.mean(0, dtype=torch.float32)
    return torch.where(mean.isfinite(), mean, 0.0)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def _operand(x: Tensor, centre: Tensor | None) -> Tensor:
    """x, less the centre, in half precision, in multiples of 16 columns."""
    rows, columns = x.shape
    dense = x.is_contiguous() and columns % 16 == 0
    if centre is None and dense and x.dtype != torch.float32:
        return x
    half = torch.bfloat16 if centre is not None or x.dtype == torch.float32 else x.dtype
    operand = x.new_zeros((rows, triton.cdiv(columns, 16) * 16), dtype=half)
    if centre is None:
        operand[:, :columns].copy_(x)
    else:
        torch.sub(x, centre, out=operand[:, :columns])
    return operand


def _conversion(x: Tensor, operand: Tensor, l2: bool) -> float:
    """What rounding to operands takes of a product at most, by its share, or, of distances, of a row."""
    if l2:
        return 2.0**-9 * (1 + 2.0**-6)
    return 0.0 if operand.dtype == x.dtype else 2.0**-8 * (1 + 2.0**-6)


def _interpreted() -> bool:
    """Triton's interpreter has no product of bfloat16 numbers."""
    return not isinstance(topk_similarity_search, triton.JITFunction)
