"""Count, mean and scatter of rows in Triton.

    count = sum of w,  mean = sum of w x / count,  scatter = sum of w (x - mean) (x - mean)^T

Decomposition. The rows are cut into pieces. ``moments_means`` owns a block of columns of a piece, and gives
the piece's count n and its weighted mean s, summed in float64 and rounded to float32. ``moments_products``
owns a tile of the lower half of a piece's scatter, and gives T = sum of w (x - s) (x - s)^T, and, on the
diagonal, t = sum of w (x - s), which is what s lacks. ``moments_merge`` owns a tile of the result, and goes
through the pieces in their order, in float64: of the rows before, with N, m and S, and of a piece, whose mean
is s + t / n,

    d = s + t / n - m,  S += T - t t^T / n + (N n / (N + n)) d d^T,  m += n / (N + n) d,  N += n

Bytes. x is read once for the means, and for each tile the two blocks of columns it is made of, most of them
from the second-level cache: at D = 300, six times each. A piece writes D^2 numbers, of which half are used.
No copy of x is made.

Numerics. Rows are shifted by the mean of their own piece, so that a drift of the rows takes no digits, and a
constant column is zero. Of many rows the products are "tf32x3": factors are cut in two parts of 11 bits, and
the product of the low ones is left out, an error of at most 8 roundings of float32 a product; tensor cores
may cut off where others round, over the ``BT`` rows of a step alone. Both are small beside the roundings of a
sum of so many. Of fewer rows products are IEEE's.
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

FILL = 1024  # programs that a GPU wants, at least
MANY = 4096  # rows, beside whose roundings those of "tf32x3" are few
TILE = 64  # columns, by which a tile of the scatter has so many
MERGED = 32


@triton.jit
def _places(begin, end, SIZE: tl.constexpr):
    # Indices from `begin` on, in 64 bits, and which of them are before `end`.
    index = begin + tl.arange(0, SIZE)
    return index.to(tl.int64), index < end


@triton.jit
def _inverse(count):
    # Of no weight there is no mean: it is taken as zero.
    return tl.where(count != 0.0, 1.0 / tl.where(count != 0.0, count, 1.0), 0.0)


@triton.jit
def moments_means(
    x, weights, counts, means, rows, columns, length, x_row, x_column, w_row,
    WEIGHTED: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # counts (pieces) and means (pieces, columns) over pieces of `length` rows. Sizes and strides along which
    # memory is dense come in units of UNIT, so that the compiler knows how wide loads may be.
    columns *= UNIT
    piece = tl.program_id(1).to(tl.int64)
    c, inside = _places(tl.program_id(0) * BC, columns, BC)
    x += c[None, :] * x_column
    sums = tl.zeros([BT, BC], tl.float64)
    counted = tl.zeros([BT], tl.float64)
    end = tl.minimum((piece + 1) * length, rows)
    for begin in range(piece * length, end, BT):
        t, valid = _places(begin, end, BT)
        tile = tl.load(x + t[:, None] * (x_row * UNIT), mask=valid[:, None] & inside[None, :], other=0.0)
        tile = tile.to(tl.float64)
        if WEIGHTED:
            w = tl.load(weights + t * w_row, mask=valid, other=0.0).to(tl.float64)
            tile *= w[:, None]
            counted += w
        else:
            counted += valid.to(tl.float64)
        sums += tile
    count = tl.sum(counted, axis=0)
    mean = tl.sum(sums, axis=0) * _inverse(count)
    tl.store(means + piece.to(tl.int64) * columns + c, mean.to(tl.float32), mask=inside)
    tl.store(counts + piece, count, mask=tl.program_id(0) == 0)


@triton.jit
def moments_products(
    x, weights, means, rest, products, rows, columns, length, x_row, x_column, w_row,
    WEIGHTED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # Of rows less the mean of their piece: rest (pieces, columns), the weighted sum, and products (pieces,
    # columns, columns), the lower half, in whole tiles.
    columns *= UNIT
    blocks = tl.cdiv(columns, BC)
    lower, left = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if left <= lower:
        piece = tl.program_id(1).to(tl.int64)
        i, of_i = _places(lower * BC, columns, BC)
        j, of_j = _places(left * BC, columns, BC)
        means += piece * columns
        mean_i = tl.load(means + i, mask=of_i, other=0.0)
        mean_j = tl.load(means + j, mask=of_j, other=0.0)
        sums = tl.zeros([BT, BC], tl.float32)
        product = tl.zeros([BC, BC], tl.float32)
        begins = piece * length
        end = tl.minimum(begins + length, rows)
        for begin in range(begins, end, BT):
            t, valid = _places(begin, end, BT)
            row = x + t[:, None] * (x_row * UNIT)
            x_i = tl.load(row + i[None, :] * x_column, mask=valid[:, None] & of_i[None, :], other=0.0)
            x_j = tl.load(row + j[None, :] * x_column, mask=valid[:, None] & of_j[None, :], other=0.0)
            x_i = tl.where(valid[:, None], x_i.to(tl.float32) - mean_i[None, :], 0.0)
            x_j = tl.where(valid[:, None], x_j.to(tl.float32) - mean_j[None, :], 0.0)
            if WEIGHTED:
                x_i *= tl.load(weights + t * w_row, mask=valid, other=0.0).to(tl.float32)[:, None]
            sums += x_i
            product = tl.dot(tl.trans(x_i), x_j, product, input_precision=PRECISION)
        products += piece * columns * columns
        tl.store(products + i[:, None] * columns + j[None, :], product, mask=of_i[:, None] & of_j[None, :])
        tl.store(rest + piece * columns + i, tl.sum(sums, axis=0), mask=of_i & (lower == left))


@triton.jit
def moments_merge(
    counts, means, rest, products, count, mean, scatter, pieces, columns, area, BC: tl.constexpr
):  # fmt: skip
    # The moments of all pieces, in their order; both halves of the scatter from the lower one. `area` is the
    # square of `columns`.
    blocks = tl.cdiv(columns, BC)
    lower, left = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if left <= lower:
        i, of_i = _places(lower * BC, columns, BC)
        j, of_j = _places(left * BC, columns, BC)
        of_tile = of_i[:, None] & of_j[None, :] & (i[:, None] >= j[None, :])
        diagonal = i[:, None] == j[None, :]
        total = tl.zeros([], tl.float64)
        mean_i = tl.zeros([BC], tl.float64)
        mean_j = tl.zeros([BC], tl.float64)
        sums = tl.zeros([BC, BC], tl.float64)
        for piece in range(pieces):
            of_piece = tl.load(counts + piece)
            inverse = _inverse(of_piece)
            both = total + of_piece
            share = of_piece * _inverse(both)
            rest_i = tl.load(rest + i, mask=of_i, other=0.0).to(tl.float64)
            rest_j = tl.load(rest + j, mask=of_j, other=0.0).to(tl.float64)
            off_i = tl.load(means + i, mask=of_i, other=0.0).to(tl.float64) + rest_i * inverse - mean_i
            off_j = tl.load(means + j, mask=of_j, other=0.0).to(tl.float64) + rest_j * inverse - mean_j
            product = tl.load(products + i[:, None] * columns + j[None, :], mask=of_tile, other=0.0)
            product = product.to(tl.float64)
            within = product - rest_i[:, None] * rest_j[None, :] * inverse
            rounded = diagonal & (product >= 0.0) & (within < 0.0)  # no sum of squares is below zero
            sums += tl.where(rounded, 0.0, within)
            sums += (total * share) * off_i[:, None] * off_j[None, :]
            mean_i += share * off_i
            mean_j += share * off_j
            total = both
            means += columns
            rest += columns
            products += area
        half = sums.to(tl.float32)
        tl.store(scatter + i[:, None] * columns + j[None, :], half, mask=of_tile)
        tl.store(scatter + j[None, :] * columns + i[:, None], half, mask=of_tile)
        tl.store(mean + i, mean_i.to(tl.float32), mask=of_i & (left == 0))
        tl.store(count, total, mask=tl.program_id(0) == 0)


def forward(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (D,) and scatter (D, D) of the rows of x (N, D)."""
    rows, columns = x.shape
    if not rows:
        zeros = x.new_zeros((columns, columns), dtype=torch.float32)
        return zeros.new_zeros((), dtype=torch.float64), zeros.new_zeros(columns), zeros
    blocks = triton.cdiv(columns, TILE)
    pieces, length = _pieces(blocks * (blocks + 1) // 2, rows)
    count = x.new_empty((), dtype=torch.float64)
    counts = count.new_empty(pieces)
    mean = x.new_empty(columns, dtype=torch.float32)
    means, rest = (mean.new_empty((pieces, columns)) for _ in range(2))
    products, scatter = mean.new_empty((pieces, columns, columns)), mean.new_empty((columns, columns))
    unit = _unit(x)
    # Weights that are not there are read nowhere.
    of_weights = x if weights is None else weights
    of_rows = (x.stride(0) // unit, x.stride(1), of_weights.stride(0))
    sizes = (rows, columns // unit, length, *of_rows)
    options = {"WEIGHTED": weights is not None, "UNIT": unit}
    with torch.cuda.device_of(x):
        moments_means[(blocks, pieces)](x, of_weights, counts, means, *sizes, **options, **means_options())
        moments_products[(blocks * blocks, pieces)](
            x, of_weights, means, rest, products, *sizes, **options, **products_options(rows)
        )
        merged = triton.cdiv(columns, MERGED)
        moments_merge[(merged * merged,)](
            counts, means, rest, products, count, mean, scatter, pieces, columns, columns**2, BC=MERGED,
            num_warps=4,
        )  # fmt: skip
    return count, mean, scatter


def means_options() -> dict[str, Any]:
    return {"BT": 32, "BC": TILE, "num_warps": 4}


def products_options(rows: int) -> dict[str, Any]:
    """Without tensor cores factors fill registers, and steps are short."""
    precision, steps = ("tf32x3", 32) if rows >= MANY else ("ieee", 16)
    return {"PRECISION": precision, "BT": steps, "BC": TILE, "num_warps": 4}


def _unit(x: Tensor) -> int:
    """The largest power of two up to 16 that divides the number of columns and the stride of dense rows."""
    sizes = x.shape[1] | x.stride(0) | 16 if x.stride(1) == 1 else 1
    return sizes & -sizes


def _pieces(programs: int, rows: int) -> tuple[int, int]:
    """How many pieces of the rows fill the GPU with what there are ``programs`` of, and the size of each."""
    blocks = triton.cdiv(rows, 256)
    length = triton.cdiv(blocks, min(blocks, triton.cdiv(FILL, programs))) * 256
    return triton.cdiv(rows, length), length
