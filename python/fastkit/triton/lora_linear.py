"""The low-rank part beside a frozen linear layer in Triton, forward and backward.

Products with the frozen weight are PyTorch's. With ``A' = mask * A``, and xl what the low-rank part sees::

    h = xl A'^T,  y += s h B^T
    gh = s gy B,  gx (+)= gh A',  gA = mask * gh^T xl,  gB = s gy^T h,  gbias = sum of gy over the tokens

Decomposition. Three kernels go through (tokens, columns) matrices, a tile of (BT, BC) at a time.
``lora_linear_project`` owns BT tokens and passes through the columns, to h or gh. ``lora_linear_gather`` owns
BC columns and passes through a piece of the tokens, to the gradients of A and B and to sums of columns; at
small ranks it gives its part of gh as well, so that gy is read once. ``lora_linear_expand`` owns the tile it
adds to. Ranks are padded to BR, at least 16; of ranks beyond BR, other programs read the same tiles at the
same time. Where a sum is cut, over columns or over tokens, ``lora_linear_sum`` adds up its parts.

Bytes an element of x, y or gy, e its size and r the rank. Forward e (x) and 2e (y), and 8 / BT for the
squares of x. Backward e (gy), e (x) and 2e (gx); for gh from the same read of gy 8 r / BC, else e (gy again).
What tiles need of A', B, h and gh is 4 r / BT and 4 r / BC, of which the second-level cache gives most.

Numerics. Sums in float32 and in a fixed order; tensor cores may cut off where others round. Products of
float32 tensors are those of IEEE. Beside half precision, h and gh are not rounded to it, nor are A and B
where they are float32: see ``_dot``.
"""

# Triton's annotations know nothing of launches, nor of what is constant while a kernel is compiled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FILL = 512  # programs that a GPU wants, at least
FUSED_RANK = 16  # up to which gh comes with the gradient of B, in bfloat16
FUSED_PARTS = 2**27  # numbers, of gh over the blocks of columns, that are worth the memory


@triton.jit
def _bfloat16_and_rest(v):
    # What is not finite has no rest.
    high = v.to(tl.bfloat16)
    rest = v - high.to(tl.float32)
    return high, tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def _dot(p, q, sums, PRECISION: tl.constexpr):
    # sums + p q. Products of two half-precision numbers are exact in float32. A float32 number is the sum of
    # three of bfloat16, 8 of its 24 bits each, so that its products with bfloat16 are exact too. The rest is
    # left to PRECISION: "tf32x3" cuts both factors in two parts of 11 bits and leaves out the product of the
    # low ones, an error of at most 8 roundings of float32; of 2 beside float16, which one part holds.
    if PRECISION == "ieee":
        sums = tl.dot(p.to(tl.float32), q.to(tl.float32), sums, input_precision="ieee")
    elif p.dtype == q.dtype and p.dtype != tl.float32:
        sums = tl.dot(p, q, sums)
    elif p.dtype == tl.bfloat16:
        high, rest = _bfloat16_and_rest(q)
        middle, rest = _bfloat16_and_rest(rest)
        sums = tl.dot(p, rest.to(tl.bfloat16), sums)
        sums = tl.dot(p, middle, sums)
        sums = tl.dot(p, high, sums)
    elif q.dtype == tl.bfloat16:
        high, rest = _bfloat16_and_rest(p)
        middle, rest = _bfloat16_and_rest(rest)
        sums = tl.dot(rest.to(tl.bfloat16), q, sums)
        sums = tl.dot(middle, q, sums)
        sums = tl.dot(high, q, sums)
    else:
        sums = tl.dot(p.to(tl.float32), q.to(tl.float32), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _places(begin, end, SIZE: tl.constexpr):
    # Indices from `begin` on, in 64 bits, and which of them are before `end`.
    index = begin + tl.arange(0, SIZE)
    return index.to(tl.int64), index < end


@triton.jit
def lora_linear_project(
    x, a, h, squares, tokens, columns, rank, length, x_token, x_column, a_rank, a_column,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # h (pieces, tokens, rank) = x a^T over pieces of `length` columns; squares (blocks of tokens, columns),
    # summed over each block.
    ranks = tl.cdiv(rank, BR)
    block, of_ranks, piece = tl.program_id(0) // ranks, tl.program_id(0) % ranks, tl.program_id(1)
    t, valid = _places(block.to(tl.int64) * BT, tokens, BT)
    r, kept = _places(of_ranks * BR, rank, BR)
    x += t[:, None] * x_token
    a += r[None, :] * a_rank
    squares += block.to(tl.int64) * columns
    end = tl.minimum((piece + 1) * length, columns)
    sums = tl.zeros([BT, BR], tl.float32)
    for begin in range(piece * length, end, BC):
        c, inside = _places(begin, end, BC)
        tile = tl.load(x + c[None, :] * x_column, mask=valid[:, None] & inside[None, :], other=0.0)
        of_a = tl.load(a + c[:, None] * a_column, mask=inside[:, None] & kept[None, :], other=0.0)
        sums = _dot(tile, of_a, sums, PRECISION)
        if SQUARES:
            raised = tile.to(tl.float32)
            tl.store(squares + c, tl.sum(raised * raised, axis=0), mask=inside & (of_ranks == 0))
    h += (piece.to(tl.int64) * tokens + t[:, None]) * rank + r[None, :]
    tl.store(h, sums, mask=valid[:, None] & kept[None, :])


@triton.jit
def lora_linear_gather(
    v, h, b, products, sums, projected, tokens, columns, rank, length,
    v_token, v_column, b_column, b_rank, product_column, product_rank,
    PRODUCTS: tl.constexpr, SUMS: tl.constexpr, SQUARES: tl.constexpr, PROJECTS: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # Over pieces of `length` tokens, products = v^T h, (columns, rank) in either order, and sums (columns),
    # of v or of its squares. projected (blocks of columns, tokens, rank) = v b over each block.
    ranks = tl.cdiv(rank, BR)
    block, of_ranks = tl.program_id(0) // ranks, tl.program_id(0) % ranks
    piece = tl.program_id(1).to(tl.int64)
    c, inside = _places(block * BC, columns, BC)
    r, kept = _places(of_ranks * BR, rank, BR)
    v += c[None, :] * v_column
    h += r[None, :]
    of_block = inside[:, None] & kept[None, :]
    if PROJECTS:
        of_b = tl.load(b + c[:, None] * b_column + r[None, :] * b_rank, mask=of_block, other=0.0)
        projected += block.to(tl.int64) * tokens * rank + r[None, :]
    gathered = tl.zeros([BC, BR], tl.float32)
    # Beside products registers are few.
    summed = tl.zeros([1 if PRODUCTS else BT, BC], tl.float32)
    end = tl.minimum((piece + 1) * length, tokens)
    for begin in range(piece * length, end, BT):
        t, valid = _places(begin, end, BT)
        tile = tl.load(v + t[:, None] * v_token, mask=valid[:, None] & inside[None, :], other=0.0)
        of_tokens = valid[:, None] & kept[None, :]
        if PRODUCTS:
            of_h = tl.load(h + t[:, None] * rank, mask=of_tokens, other=0.0)
            gathered = _dot(tl.trans(tile), of_h, gathered, PRECISION)
        if PROJECTS:
            part = _dot(tile, of_b, tl.zeros([BT, BR], tl.float32), PRECISION)
            tl.store(projected + t[:, None] * rank, part, mask=of_tokens)
        if SUMS:
            raised = tile.to(tl.float32)
            if SQUARES:
                raised *= raised
            summed += tl.sum(raised, axis=0, keep_dims=True) if PRODUCTS else raised
    if PRODUCTS:
        products += piece * columns * rank
        tl.store(products + c[:, None] * product_column + r[None, :] * product_rank, gathered, mask=of_block)
    if SUMS:
        tl.store(sums + piece * columns + c, tl.sum(summed, axis=0), mask=inside & (of_ranks == 0))


@triton.jit
def lora_linear_expand(
    y, h, b, tokens, columns, rank, scale, y_token, b_column, b_rank,
    ADDS: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # y (+)= scale h b^T
    blocks = tl.cdiv(columns, BC)
    t, valid = _places((tl.program_id(0) // blocks).to(tl.int64) * BT, tokens, BT)
    c, inside = _places(tl.program_id(0) % blocks * BC, columns, BC)
    h += t[:, None] * rank
    b += c[None, :] * b_column
    y += t[:, None] * y_token + c[None, :]
    of_tile = valid[:, None] & inside[None, :]
    if ADDS:
        before = tl.load(y, mask=of_tile, other=0.0)
    sums = tl.zeros([BT, BC], tl.float32)
    for begin in range(0, rank, BR):
        r, kept = _places(begin, rank, BR)
        of_h = tl.load(h + r[None, :], mask=valid[:, None] & kept[None, :], other=0.0)
        of_b = tl.load(b + r[:, None] * b_rank, mask=kept[:, None] & inside[None, :], other=0.0)
        sums = _dot(of_h, of_b, sums, PRECISION)
    sums *= scale
    if ADDS:
        sums += before.to(tl.float32)
    tl.store(y, sums.to(y.dtype.element_ty), mask=of_tile)


@triton.jit
def lora_linear_sum(
    parts, out, mask, count, pieces, columns, scale, mask_row, mask_column,
    MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # out (count) = scale times the sum over the first axis of parts (pieces, count); zero where mask, which
    # has rows of `columns`, is false.
    i, inside = _places(tl.program_id(0).to(tl.int64) * BLOCK, count, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, pieces, ROWS):
        piece, there = _places(begin, pieces, ROWS)
        at = parts + piece[:, None] * count + i[None, :]
        sums += tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    total = tl.sum(sums, axis=0) * scale
    if MASKED:
        kept = tl.load(mask + i // columns * mask_row + i % columns * mask_column, mask=inside, other=0)
        total = tl.where(kept != 0, total, 0.0)
    tl.store(out + i, total, mask=inside)


def forward_(
    y: Tensor, x: Tensor, lora_x: Tensor | None, a: Tensor, mask: Tensor | None, b: Tensor, scale: float,
    needs_square_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y += scale h b^T``; h (N, R), and the column sums of squares of x (D,), empty unless needed."""
    seen = x if lora_x is None else lora_x
    with torch.cuda.device_of(x):
        h, square_sum = _project(seen, _kept(a, mask), 1.0, squares=needs_square_sum and lora_x is None)
        if needs_square_sum and lora_x is not None:
            square_sum = column_square_sums(x)
        _expand_(y, h, b, scale, adds=True)
    return h, square_sum


def backward_(
    gx: Tensor | None, gy: Tensor, x: Tensor, h: Tensor, a: Tensor, mask: Tensor | None, b: Tensor,
    scale: float, adds: bool, needs_adapter: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``gx (+)= gh a``; ga (R, D), gb (O, R) and gbias (O,), empty where not needed."""
    ga, gb, gbias, gh = (h.new_empty(0) for _ in range(4))
    with torch.cuda.device_of(gy):
        if needs_adapter or needs_bias:
            of_h = h.contiguous() if needs_adapter else None
            fused = _fused_tile(gy, b.shape[1]) if needs_adapter else None
            gb, gbias, gh = _gather(gy, of_h, b if fused else None, scale, fused=fused, sums=needs_bias)
        if (gx is not None or needs_adapter) and not gh.numel():
            gh, _ = _project(gy, b.T, scale)
        if needs_adapter:
            ga, _, _ = _gather(x, gh, None, 1.0, mask=mask, by_rank=True)
        if gx is not None:
            _expand_(gx, gh, _kept(a, mask).T, 1.0, adds=adds)
    return ga, gb, gbias


def column_square_sums(x: Tensor) -> Tensor:
    """The sum of squares of each column of x (N, D), float32."""
    with torch.cuda.device_of(x):
        return _gather(x, None, None, 1.0, sums=True, squares=True)[1]


def _kept(a: Tensor, mask: Tensor | None) -> Tensor:
    return a if mask is None else torch.where(mask, a, 0.0)


class _Tile(NamedTuple):
    tokens: int
    ranks: int
    columns: int
    warps: int

    def options(self, like: Tensor) -> dict[str, Any]:
        return {
            "PRECISION": _precision(like), "BT": self.tokens, "BR": self.ranks, "BC": self.columns,
            "num_warps": self.warps,
        }  # fmt: skip


def _precision(like: Tensor) -> str:
    """Of what ``_dot`` does not make exact. Triton's interpreter has no product of bfloat16 numbers."""
    compiled = isinstance(lora_linear_expand, triton.JITFunction)
    return "tf32x3" if like.dtype != torch.float32 and compiled else "ieee"


def _padded(rank: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(rank)))


# Products of float32 run without tensor cores, and their factors fill registers: the inner axis is short, BC
# in project, BT in gather, BR in expand. Beside float16, so do the parts that "tf32x3" cuts factors into.


def _project_tile(x: Tensor, rank: int) -> _Tile:
    if x.dtype == torch.float32:
        return _Tile(64, _padded(rank, 32), 32, 8)
    if x.dtype == torch.float16:
        return _Tile(64, _padded(rank, 32), 64, 8)
    ranks = _padded(rank, 64)
    return _Tile(64, ranks, 128 if ranks == 16 else 64, 4)


def _gather_tile(v: Tensor, rank: int) -> _Tile:
    """For rank 0, of sums alone."""
    if v.dtype != torch.bfloat16:
        return _Tile(32, _padded(rank, 32), 64, 4 if v.dtype == torch.float32 else 8)
    ranks = _padded(rank, 64)
    return _Tile(32 if ranks == 64 else 64, ranks, 128, 4)


def _fused_tile(gy: Tensor, rank: int) -> _Tile | None:
    """Of the pass over gy that gives gh and the gradient of B, where that is better than two passes.

    The parts of gh are written and read: in blocks of 256 columns a quarter of what gy has, at rank 16.
    """
    blocks = triton.cdiv(gy.shape[1], 256)
    worth = gy.dtype == torch.bfloat16 and rank <= FUSED_RANK and blocks * gy.shape[0] * rank <= FUSED_PARTS
    return _Tile(32, 16, 256, 8) if worth else None


def _expand_tile() -> _Tile:
    return _Tile(64, 16, 64, 4)


def _pieces(programs: int, size: int, block: int) -> tuple[int, int]:
    """How many pieces of an axis fill the GPU with what there are ``programs`` of, and the size of each."""
    blocks = triton.cdiv(size, block)
    length = triton.cdiv(blocks, min(blocks, triton.cdiv(FILL, programs))) * block
    return triton.cdiv(size, length), length


def _project(x: Tensor, a: Tensor, scale: float, *, squares: bool = False) -> tuple[Tensor, Tensor]:
    """``scale x a^T`` (N, R), and the column sums of squares of x if needed."""
    tokens, columns = x.shape
    rank = a.shape[0]
    square_sum = x.new_zeros(columns if squares else 0, dtype=torch.float32)
    if not tokens:
        return x.new_empty((0, rank), dtype=torch.float32), square_sum
    tile = _project_tile(x, rank)
    blocks = triton.cdiv(tokens, tile.tokens)
    programs = blocks * triton.cdiv(rank, tile.ranks)
    pieces, length = _pieces(programs, columns, tile.columns)
    h = x.new_empty((pieces, tokens, rank), dtype=torch.float32)
    of_blocks = x.new_empty((blocks, columns) if squares else (1, 0), dtype=torch.float32)
    lora_linear_project[(programs, pieces)](
        x, a, h, of_blocks, tokens, columns, rank, length, *x.stride(), *a.stride(), SQUARES=squares,
        **tile.options(x),
    )  # fmt: skip
    return _sum(h, scale), _sum(of_blocks, 1.0) if squares else square_sum


def _gather(
    v: Tensor, h: Tensor | None, b: Tensor | None, scale: float, *, mask: Tensor | None = None,
    by_rank: bool = False, sums: bool = False, squares: bool = False, fused: _Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``scale v^T h`` (C, R), or masked (R, C) by rank; the sums of v or of its squares (C,); ``scale v b``.

    Without h, sums or b the result in its place is empty.
    """
    tokens, columns = v.shape
    rank = 0 if h is None else h.shape[1]
    shape = (0,) if h is None else (rank, columns) if by_rank else (columns, rank)
    empty = v.new_empty((1, 0), dtype=torch.float32)
    if not tokens:
        zeros = empty.new_zeros
        return zeros(shape), zeros(columns if sums else 0), zeros(0 if b is None else (0, rank))
    tile = fused or _gather_tile(v, rank)
    blocks = triton.cdiv(columns, tile.columns)
    programs = blocks * max(1, triton.cdiv(rank, tile.ranks))
    pieces, length = _pieces(programs, tokens, tile.tokens)
    products = empty if h is None else empty.new_empty((pieces, *shape))
    summed = empty.new_empty((pieces, columns)) if sums else empty
    projected = empty if b is None else empty.new_empty((blocks, tokens, rank))
    lora_linear_gather[(programs, pieces)](
        v, empty if h is None else h, empty if b is None else b, products, summed, projected,
        tokens, columns, max(1, rank), length, *v.stride(), *((0, 0) if b is None else b.stride()),
        *((1, columns) if by_rank else (rank, 1)),
        PRODUCTS=h is not None, SUMS=sums, SQUARES=squares, PROJECTS=b is not None, **tile.options(v),
    )  # fmt: skip
    return _sum(products, scale, mask), _sum(summed, 1.0), _sum(projected, scale)


def _expand_(y: Tensor, h: Tensor, b: Tensor, scale: float, *, adds: bool) -> None:
    """``y (+)= scale h b^T``; the columns of y have stride 1."""
    tokens, columns = y.shape
    if not tokens:
        return
    tile = _expand_tile()
    programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(columns, tile.columns)
    lora_linear_expand[(programs,)](
        y, h, b, tokens, columns, h.shape[1], scale, y.stride(0), *b.stride(), ADDS=adds, **tile.options(y)
    )


def _sum(parts: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Over the first axis, times ``scale``; zero where ``mask`` is false."""
    if not parts.numel():
        return parts.new_empty(0)
    if parts.shape[0] == 1 and scale == 1.0 and mask is None:
        return parts[0]
    out = torch.empty_like(parts[0])
    rows = min(32, triton.next_power_of_2(parts.shape[0]))
    block = 2048 // rows if rows > 4 else 512
    lora_linear_sum[(triton.cdiv(out.numel(), block),)](
        parts, out, out if mask is None else mask, out.numel(), parts.shape[0], out.shape[-1], scale,
        *((0, 0) if mask is None else mask.stride()), MASKED=mask is not None, ROWS=rows, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out
