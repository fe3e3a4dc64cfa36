"""Second-order recursive filters in Triton: one filter a row, fixed or of chunks, forward and backward.

A step of a recursion is an affine map of two numbers. Forward it takes (y[t-1], y[t-2]) to (y[t], y[t-1]);
backward, ``l[t] = gy[t] - a1[t+1] l[t+1] - a2[t+2] l[t+2]`` runs from the end in transposed form. Maps
compose, so that a scan over the six numbers of a map, a 2x2 matrix and a vector, gives every state at once.

Decomposition. A *walk* is a segment of time of one row: all of it; or a chunk, where history ends with it
(``carry=False``); or, where rows are too few to fill a GPU, a piece of it, in three launches:
``iir_scan_reduce`` takes each piece to its map, ``iir_scan_link`` goes through the maps of a row, and
``iir_scan_walk`` starts each piece from its state. A program owns LANES walks, and passes through them in
tiles of (LANES, BLOCK) samples. Where time has stride 1 a tile is long, and its lanes are any walks; where
channels have, its lanes are neighbouring channels. ``iir_scan_gradients`` does the rest of backward: a
program for LANES pieces of chunks.

Bytes a sample, e the size of x and c that of a coefficient: forward 2e, of split time 3e. Backward e + c (gy;
l, in the dtype of the arithmetic), of split time e more, and then 3e + c (l, x, y; gx); without b the second
is 2e + c, or c + e where l is gx, as it is if x has the dtype of the arithmetic. Coefficients, and sums over
chunks, add to this as chunks get short.

Numerics. Arithmetic in the dtype of the coefficients: signals are raised as they are loaded, results rounded
as they are stored. Every sum has a fixed order. The matrices of a scan are products over up to BLOCK samples,
so that an unstable filter may give NaN where a loop over time still has inf.
"""

# Triton's annotations know nothing of launches, nor of what is constant while a kernel is compiled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a tile
PIECE = 4  # tiles whose coefficient gradients one program sums
FILL = 512  # programs that a GPU wants, at least


@triton.jit
def _then(m00, m01, m10, m11, v0, v1, n00, n01, n10, n11, w0, w1):
    # The map (m, v), and after it (n, w).
    return (
        n00 * m00 + n01 * m10,
        n00 * m01 + n01 * m11,
        n10 * m00 + n11 * m10,
        n10 * m01 + n11 * m11,
        n00 * v0 + n01 * v1 + w0,
        n10 * v0 + n11 * v1 + w1,
    )


@triton.jit
def _walks(batch, channels, segments, CHANNEL_LANES: tl.constexpr, LANES: tl.constexpr):
    # Batch entry, channel and segment of each lane, (LANES, 1), and whether there is one. Of walks and of
    # channels there may be 2^31; of programs and of the segments of a row there are fewer.
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)[:, None]
    if CHANNEL_LANES:
        blocks = (channels - 1) // LANES + 1
        channel = (program % blocks).to(tl.int64) * LANES + lane
        segment = program // blocks % segments + tl.zeros_like(lane)
        entry = program // blocks // segments + tl.zeros_like(channel)
        valid = channel < channels
    else:
        walk = program.to(tl.int64) * LANES + lane
        segment = (walk % segments).to(tl.int32)
        channel = walk // segments % channels
        entry = walk // segments // channels
        valid = entry < batch
    return entry, channel, segment, valid


@triton.jit
def _last(values, column, BLOCK: tl.constexpr):
    # The last sample of a tile, (LANES, 1).
    return tl.sum(tl.where(column == BLOCK - 1, values, 0.0), axis=1)[:, None]


@triton.jit
def _scanned_tile(
    step, x, a, b, begin, first, end, valid,
    time, chunk, length, x_time, a_chunk, a_tap, b_chunk, b_tap,
    HAS_B: tl.constexpr, REVERSE: tl.constexpr, VARYING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Times of a tile, which of them exist, and the maps from before the tile to after each sample.
    t = begin + (tl.cdiv(length, BLOCK) * BLOCK - 1 - step if REVERSE else step)
    inside = valid & (t < end)
    known = valid
    if VARYING:
        # Backward, the map of a sample has the coefficients of the one after.
        k = ((tl.minimum(t + 1, time - 1) if REVERSE else t) // chunk).to(tl.int64)
        a = a + k * a_chunk
        known = inside
    a1 = tl.load(a, mask=known, other=0.0)
    a2 = tl.load(a + a_tap, mask=known, other=0.0)
    at = x + t.to(tl.int64) * x_time
    v = tl.load(at, mask=inside, other=0.0).to(a1.dtype)
    if HAS_B:
        if VARYING:
            b = b + k * b_chunk
        x1 = tl.load(at - x_time, mask=inside & (t - 1 >= first), other=0.0).to(a1.dtype)
        x2 = tl.load(at - x_time - x_time, mask=inside & (t - 2 >= first), other=0.0).to(a1.dtype)
        v = v * tl.load(b, mask=known, other=0.0)
        v += x1 * tl.load(b + b_tap, mask=known, other=0.0)
        v += x2 * tl.load(b + b_tap + b_tap, mask=known, other=0.0)
    zero = tl.zeros_like(v)
    if REVERSE:
        maps = (zero - a1, zero + 1.0, zero - a2, zero, v, zero)
    else:
        maps = (zero - a1, zero - a2, zero + 1.0, zero, v, zero)
    m00, m01, m10, m11, v0, v1 = tl.associative_scan(maps, 1, _then)
    return t, inside, m00, m01, m10, m11, v0, v1


@triton.jit
def iir_scan_reduce(
    x, a, b, maps, batch, channels, time, chunk, length, segments,
    x_batch, x_channel, x_time, a_batch, a_channel, a_chunk, a_tap, b_batch, b_channel, b_chunk, b_tap,
    HAS_B: tl.constexpr, REVERSE: tl.constexpr, VARYING: tl.constexpr,
    CHANNEL_LANES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each segment to its map: maps is (6, rows, segments), segments in the order of the walk.
    entry, channel, segment, valid = _walks(batch, channels, segments, CHANNEL_LANES, LANES)
    x += entry * x_batch + channel * x_channel
    a += entry * a_batch + channel * a_channel
    if HAS_B:
        b += entry * b_batch + channel * b_channel
    begin = segment * length
    end = tl.minimum(begin + length, time)
    column = tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros([LANES, 1], maps.dtype.element_ty)
    m00, m01, m10, m11, v0, v1 = zero + 1.0, zero, zero, zero + 1.0, zero, zero
    for start in range(0, length, BLOCK):
        _, _, n00, n01, n10, n11, w0, w1 = _scanned_tile(
            start + column, x, a, b, begin, 0, end, valid,
            time, chunk, length, x_time, a_chunk, a_tap, b_chunk, b_tap, HAS_B, REVERSE, VARYING, BLOCK,
        )  # fmt: skip
        m00, m01, m10, m11, v0, v1 = _then(
            m00, m01, m10, m11, v0, v1,
            _last(n00, column, BLOCK), _last(n01, column, BLOCK), _last(n10, column, BLOCK),
            _last(n11, column, BLOCK), _last(w0, column, BLOCK), _last(w1, column, BLOCK),
        )  # fmt: skip
    order = segments - 1 - segment if REVERSE else segment
    maps += (entry * channels + channel) * segments + order
    plane = batch * channels * segments  # small: only few walks are cut
    tl.store(maps, m00, mask=valid)
    tl.store(maps + plane, m01, mask=valid)
    tl.store(maps + 2 * plane, m10, mask=valid)
    tl.store(maps + 3 * plane, m11, mask=valid)
    tl.store(maps + 4 * plane, v0, mask=valid)
    tl.store(maps + 5 * plane, v1, mask=valid)


@triton.jit
def iir_scan_link(maps, states, rows, segments, BLOCK: tl.constexpr):
    # The state before each segment, from zero: states is (2, rows, segments), and zero where a walk starts.
    row = tl.program_id(0)
    maps += row * segments
    states += row * segments
    plane = rows * segments
    column = tl.arange(0, BLOCK)[None, :]
    p0 = tl.zeros([1, 1], maps.dtype.element_ty)
    p1 = tl.zeros([1, 1], maps.dtype.element_ty)
    for start in range(0, segments, BLOCK):
        s = start + column
        inside = s < segments
        m00, m01, m10, m11, v0, v1 = tl.associative_scan(
            (
                tl.load(maps + s, mask=inside, other=0.0),
                tl.load(maps + plane + s, mask=inside, other=0.0),
                tl.load(maps + 2 * plane + s, mask=inside, other=0.0),
                tl.load(maps + 3 * plane + s, mask=inside, other=0.0),
                tl.load(maps + 4 * plane + s, mask=inside, other=0.0),
                tl.load(maps + 5 * plane + s, mask=inside, other=0.0),
            ),
            1,
            _then,
        )
        q0 = m00 * p0 + m01 * p1 + v0
        q1 = m10 * p0 + m11 * p1 + v1
        tl.store(states + s + 1, q0, mask=s + 1 < segments)
        tl.store(states + plane + s + 1, q1, mask=s + 1 < segments)
        p0 = _last(q0, column, BLOCK)
        p1 = _last(q1, column, BLOCK)


@triton.jit
def iir_scan_walk(
    x, y, a, b, states, batch, channels, time, chunk, length, segments,
    x_batch, x_channel, x_time, y_batch, y_channel, y_time,
    a_batch, a_channel, a_chunk, a_tap, b_batch, b_channel, b_chunk, b_tap,
    HAS_B: tl.constexpr, HAS_STATES: tl.constexpr, REVERSE: tl.constexpr, VARYING: tl.constexpr,
    RESTART: tl.constexpr, CHANNEL_LANES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # y from x; or, REVERSE, l from gy. RESTART: segments are chunks, and know nothing of each other.
    entry, channel, segment, valid = _walks(batch, channels, segments, CHANNEL_LANES, LANES)
    x += entry * x_batch + channel * x_channel
    y += entry * y_batch + channel * y_channel
    a += entry * a_batch + channel * a_channel
    if HAS_B:
        b += entry * b_batch + channel * b_channel
    begin = segment * length
    end = tl.minimum(begin + length, time)
    first = tl.zeros_like(begin)
    if RESTART:
        first = begin
        a += segment.to(tl.int64) * a_chunk
        if HAS_B:
            b += segment.to(tl.int64) * b_chunk
    if HAS_STATES:
        order = segments - 1 - segment if REVERSE else segment
        states += (entry * channels + channel) * segments + order
        p0 = tl.load(states, mask=valid, other=0.0)
        p1 = tl.load(states + batch * channels * segments, mask=valid, other=0.0)
    else:
        p0 = tl.zeros([LANES, 1], a.dtype.element_ty)
        p1 = tl.zeros([LANES, 1], a.dtype.element_ty)
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(0, length, BLOCK):
        t, inside, m00, m01, m10, m11, v0, v1 = _scanned_tile(
            start + column, x, a, b, begin, first, end, valid,
            time, chunk, length, x_time, a_chunk, a_tap, b_chunk, b_tap, HAS_B, REVERSE, VARYING, BLOCK,
        )  # fmt: skip
        q0 = m00 * p0 + m01 * p1 + v0
        q1 = m10 * p0 + m11 * p1 + v1
        tl.store(y + t.to(tl.int64) * y_time, q0.to(y.dtype.element_ty), mask=inside)
        p0 = _last(q0, column, BLOCK)
        p1 = _last(q1, column, BLOCK)


@triton.jit
def iir_scan_gradients(
    l, x, y, b, gx, ga, gb, batch, channels, time, chunk, chunks, length, pieces,  # noqa: E741
    l_batch, l_channel, l_time, x_batch, x_channel, x_time, y_batch, y_channel, y_time,
    gx_batch, gx_channel, gx_time, b_batch, b_channel, b_chunk, b_tap,
    HAS_B: tl.constexpr, CARRY: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_COEFFICIENTS: tl.constexpr,
    CHANNEL_LANES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # gx = b0 l[t] + b1 l[t+1] + b2 l[t+2], the b of the later sample; ga, gb, (rows, chunks, pieces, taps):
    # sums of -l[t] y[t-i] and of l[t] x[t-i] over each piece of a chunk, `length` samples.
    entry, channel, segment, valid = _walks(batch, channels, chunks * pieces, CHANNEL_LANES, LANES)
    l += entry * l_batch + channel * l_channel  # noqa: E741
    arithmetic = l.dtype.element_ty
    k = segment // pieces
    start_of_chunk = k * chunk
    end_of_chunk = tl.minimum(start_of_chunk + chunk, time)
    begin = start_of_chunk + segment % pieces * length
    end = tl.minimum(begin + length, end_of_chunk)
    if CARRY:
        first = tl.zeros_like(k)
        last = tl.zeros_like(k) + time
    else:
        first = start_of_chunk
        last = end_of_chunk
    if NEEDS_X:
        gx += entry * gx_batch + channel * gx_channel
        if HAS_B:
            b += entry * b_batch + channel * b_channel
            after = b + tl.minimum(k + 1, chunks - 1).to(tl.int64) * b_chunk
            b += k.to(tl.int64) * b_chunk
            b0 = tl.load(b, mask=valid, other=0.0)
            b1 = tl.load(b + b_tap, mask=valid, other=0.0)
            b2 = tl.load(b + b_tap + b_tap, mask=valid, other=0.0)
            b1_after = tl.load(after + b_tap, mask=valid, other=0.0)
            b2_after = tl.load(after + b_tap + b_tap, mask=valid, other=0.0)
    if NEEDS_COEFFICIENTS:
        y += entry * y_batch + channel * y_channel
        ga1 = tl.zeros([LANES, BLOCK], arithmetic)
        ga2 = tl.zeros([LANES, BLOCK], arithmetic)
        if HAS_B:
            x += entry * x_batch + channel * x_channel
            gb0 = tl.zeros([LANES, BLOCK], arithmetic)
            gb1 = tl.zeros([LANES, BLOCK], arithmetic)
            gb2 = tl.zeros([LANES, BLOCK], arithmetic)
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(0, length, BLOCK):
        t = begin + start + column
        inside = valid & (t < end)
        at = l + t.to(tl.int64) * l_time
        l0 = tl.load(at, mask=inside, other=0.0)
        if NEEDS_X:
            if HAS_B:
                l1 = tl.load(at + l_time, mask=inside & (t + 1 < last), other=0.0)
                l2 = tl.load(at + l_time + l_time, mask=inside & (t + 2 < last), other=0.0)
                g = b0 * l0
                g += tl.where(t + 1 < end_of_chunk, b1, b1_after) * l1
                g += tl.where(t + 2 < end_of_chunk, b2, b2_after) * l2
            else:
                g = l0
            tl.store(gx + t.to(tl.int64) * gx_time, g.to(gx.dtype.element_ty), mask=inside)
        if NEEDS_COEFFICIENTS:
            one_before = inside & (t - 1 >= first)
            two_before = inside & (t - 2 >= first)
            at = y + t.to(tl.int64) * y_time
            ga1 -= l0 * tl.load(at - y_time, mask=one_before, other=0.0).to(arithmetic)
            ga2 -= l0 * tl.load(at - y_time - y_time, mask=two_before, other=0.0).to(arithmetic)
            if HAS_B:
                at = x + t.to(tl.int64) * x_time
                gb0 += l0 * tl.load(at, mask=inside, other=0.0).to(arithmetic)
                gb1 += l0 * tl.load(at - x_time, mask=one_before, other=0.0).to(arithmetic)
                gb2 += l0 * tl.load(at - x_time - x_time, mask=two_before, other=0.0).to(arithmetic)
    if NEEDS_COEFFICIENTS:
        place = (entry * channels + channel) * chunks * pieces + segment
        tl.store(ga + 2 * place, tl.sum(ga1, axis=1)[:, None], mask=valid)
        tl.store(ga + 2 * place + 1, tl.sum(ga2, axis=1)[:, None], mask=valid)
        if HAS_B:
            tl.store(gb + 3 * place, tl.sum(gb0, axis=1)[:, None], mask=valid)
            tl.store(gb + 3 * place + 1, tl.sum(gb1, axis=1)[:, None], mask=valid)
            tl.store(gb + 3 * place + 2, tl.sum(gb2, axis=1)[:, None], mask=valid)


def forward(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
    """y, in the layout of x."""
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _walk(x, y, a, b, chunk, carry, reverse=False)
    return y


def backward(
    gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool,
    needs_x: bool, needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """gx in the layout of x, and per row ga (B, C, K, 2), gb (B, C, K, 3). What is not needed is empty."""
    batch, channels, time = x.shape
    chunks = a.shape[2]
    # Without b, l is gx; but sums want it in the dtype of the arithmetic.
    is_gx = b is None and needs_x and (x.dtype == a.dtype or not needs_coefficients)
    l = torch.empty_like(x, dtype=x.dtype if is_gx else a.dtype)  # noqa: E741
    gx = l if is_gx else torch.empty_like(x) if needs_x else x.new_empty(0)
    with_b = needs_coefficients and b is not None
    if not x.numel():
        ga = a.new_zeros((batch, channels, chunks, 2) if needs_coefficients else 0)
        return gx, ga, a.new_zeros((batch, channels, chunks, 3) if with_b else 0)
    chunk = min(chunk, time)
    tile = _tile(x, chunk)
    length = min(chunk, PIECE * tile.block)
    pieces = triton.cdiv(chunk, length)
    ga = a.new_empty((batch, channels, chunks, pieces, 2) if needs_coefficients else 0)
    gb = a.new_empty((batch, channels, chunks, pieces, 3) if with_b else 0)
    with torch.cuda.device_of(x):
        _walk(gy, l, a, None, chunk, carry, reverse=True)
        if needs_coefficients or not is_gx:
            taps = a if b is None else b.expand(batch, channels, -1, -1)
            results = gx if needs_x else l
            iir_scan_gradients[(tile.programs(x, chunks * pieces),)](
                l, x, y, taps, results, ga, gb, batch, channels, time, chunk, chunks, length, pieces,
                *l.stride(), *x.stride(), *y.stride(), *results.stride(), *taps.stride(),
                HAS_B=b is not None, CARRY=carry, NEEDS_X=needs_x and not is_gx,
                NEEDS_COEFFICIENTS=needs_coefficients, **tile.options(),
            )  # fmt: skip
    return gx, _joined(ga, pieces), _joined(gb, pieces)


def _joined(sums: Tensor, pieces: int) -> Tensor:
    """(B, C, K, pieces, taps) summed over the pieces of a chunk."""
    if not sums.numel():
        return sums
    return sums.squeeze(3) if pieces == 1 else sums.sum(3, dtype=torch.float64).to(sums.dtype)


class _Tile(NamedTuple):
    channel_lanes: bool
    lanes: int
    block: int
    warps: int

    def programs(self, x: Tensor, segments: int) -> int:
        batch, channels, _ = x.shape
        if self.channel_lanes:
            return batch * segments * triton.cdiv(channels, self.lanes)
        return triton.cdiv(batch * channels * segments, self.lanes)

    def options(self) -> dict[str, int | bool]:
        return {
            "CHANNEL_LANES": self.channel_lanes, "LANES": self.lanes, "BLOCK": self.block,
            "num_warps": self.warps,
        }  # fmt: skip


def _tile(x: Tensor, length: int) -> _Tile:
    """For walks of this length through signals in the layout of x."""
    rows, channels = x.shape[0] * x.shape[1], x.shape[1]
    block = max(16, triton.next_power_of_2(length))
    if channels > 1 and x.stride(1) == 1 and x.stride(2) != 1:
        # A line of 128 bytes, of which a warp reads several.
        lanes = min(triton.next_power_of_2(channels), 128 // x.element_size(), TILE // 16)
        block = min(TILE // lanes, block)
        return _Tile(True, lanes, block, _warps(x, lanes * block))
    block = min(TILE, block)
    lanes = min(TILE // block, triton.next_power_of_2(rows * triton.cdiv(x.shape[2], length)))
    return _Tile(False, lanes, block, _warps(x, lanes * block))


def _warps(x: Tensor, samples: int) -> int:
    """8 samples a thread, or 4 in float64, whose maps would not fit into registers."""
    return max(1, samples // (128 if x.dtype == torch.float64 else 256))


def _walk(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool, *, reverse: bool
) -> None:
    """The recursion from x to y."""
    batch, channels, time = y.shape
    chunks = a.shape[2]
    restart = not carry and chunks > 1
    chunk = min(chunk, time)
    length = chunk if restart else time
    segments = chunks if restart else 1
    tile = _tile(y, length)
    programs = tile.programs(y, segments)
    split = not restart and programs < FILL and time >= 4 * tile.block
    if split:
        length = triton.cdiv(time, min(triton.cdiv(FILL, programs), triton.cdiv(time, tile.block)))
        length = triton.cdiv(length, tile.block) * tile.block
        segments = triton.cdiv(time, length)
        programs = tile.programs(y, segments)

    a = a.expand(batch, channels, -1, -1)
    taps = a if b is None else b.expand(batch, channels, -1, -1)
    sizes = (batch, channels, time, chunk, length, segments)
    strides = (*a.stride(), *taps.stride())
    options = {"HAS_B": b is not None, "REVERSE": reverse, "VARYING": carry and chunks > 1, **tile.options()}
    states = a
    if split:
        rows = batch * channels
        maps, states = a.new_empty(6, rows, segments), a.new_zeros(2, rows, segments)
        iir_scan_reduce[(programs,)](x, a, taps, maps, *sizes, *x.stride(), *strides, **options)
        block = min(TILE, max(16, triton.next_power_of_2(segments)))
        iir_scan_link[(rows,)](maps, states, rows, segments, BLOCK=block, num_warps=_warps(x, block))
    iir_scan_walk[(programs,)](
        x, y, a, taps, states, *sizes, *x.stride(), *y.stride(), *strides,
        HAS_STATES=split, RESTART=restart, **options,
    )  # fmt: skip
