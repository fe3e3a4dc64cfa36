"""Second-order recursive filters, written for reading."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class IIRState(NamedTuple):
    """What a filter remembers of the samples before: the last two of y and of x, the newest first.

    ``y`` is of each filter of a bank, not of their sum. A packed call has S states, not B.
    """

    y: Tensor  # (B, C[, F], 2)
    x: Tensor  # (B, C, 2)


def iir_scan(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K[, F], 2)
    b: Tensor | None = None,  # (B|1, C|1, K[, F], 3)
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
) -> Tensor:  # (B, C, T)
    """``y[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y[t-1] - a2 y[t-2]``, (a, b) of chunk ``t // chunk``.

    Samples before the first are zero. A bank of F filters is the sum of its outputs. With ``cu_seqlens``,
    ``x`` is (1, C, total): sequence s is samples ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, a signal of its
    own whose chunks follow those of the sequence before it; ``chunk=None`` is one filter a sequence, or one
    for all.

    Arithmetic in float64 for float64 ``x``, else in float32. Work and memory are linear in T, backward too.
    """
    return iir_scan_with_state(x, a, b, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)[0]


def iir_scan_with_state(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K[, F], 2)
    b: Tensor | None = None,  # (B|1, C|1, K[, F], 3)
    state: IIRState | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
) -> tuple[Tensor, IIRState]:  # (B, C, T)
    """``iir_scan`` from a state, by default zero, and the state after the last sample.

    The state enters the first chunk whether or not history is carried from chunk to chunk. States are
    float64 for float64 ``x``, else float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bank = a.dim() == 5
    a = a.to(dtype) if bank else a.to(dtype).unsqueeze(3)
    if b is not None:
        b = b.to(dtype) if bank else b.to(dtype).unsqueeze(3)
    if state is None:
        batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        y_state = torch.zeros(batch, x.shape[1], a.shape[3], 2, dtype=dtype, device=x.device)
        x_state = y_state[:, :, 0]
    else:
        y_state = state.y.to(dtype) if bank else state.y.to(dtype).unsqueeze(2)
        x_state = state.x.to(dtype)
    start = IIRState(y_state, x_state)

    if cu_seqlens is None:
        y, end = _scan(x.to(dtype), a, b, start, chunk, carry)
    else:
        y, end = _packed_scan(x.to(dtype), a, b, start, chunk, carry, cu_seqlens)
    return y.to(x.dtype), end if bank else IIRState(end.y.squeeze(2), end.x)


def iir_step(
    x_t: Tensor,  # (B, C)
    a: Tensor,  # (B|1, C|1[, F], 2)
    b: Tensor | None,  # (B|1, C|1[, F], 3)
    state: IIRState,
) -> tuple[Tensor, IIRState]:  # (B, C)
    """``iir_scan_with_state`` of one sample."""
    b = None if b is None else b.unsqueeze(2)
    y, end = iir_scan_with_state(x_t.unsqueeze(-1), a.unsqueeze(2), b, state)
    return y.squeeze(-1), end


def sosfilt(
    x: Tensor,  # (..., T)
    sos: Tensor,  # (n_sections, 6)
) -> Tensor:  # (..., T)
    """``scipy.signal.sosfilt``: sections ``(b0, b1, b2, a0, a1, a2)``, each filters the output of the last.

    Coefficients are divided by a0, which scipy wants to be 1.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype).reshape(1, x.shape[:-1].numel(), x.shape[-1])
    for section in sos.to(dtype).unbind(0):
        b, a0, a = section.split([3, 1, 2])
        y = iir_scan(y, (a / a0).view(1, 1, 1, 2), (b / a0).view(1, 1, 1, 3))
    return y.reshape(x.shape).to(x.dtype)


def _scan(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K, F, 2)
    b: Tensor | None,  # (B|1, C|1, K, F, 3)
    state: IIRState,  # (B, C, F, 2), (B, C, 2)
    chunk: int | None,
    carry: bool,
) -> tuple[Tensor, IIRState]:
    a_chunks = a.unbind(2)
    b_chunks = None if b is None else b.unbind(2)
    chunk = x.shape[-1] if chunk is None else chunk

    y1, y2 = state.y.unbind(-1)  # (B, C, F)
    x1, x2 = state.x.unsqueeze(2).unbind(-1)  # (B, C, 1)
    ys = []
    for t, x0 in enumerate(x.unsqueeze(2).unbind(-1)):
        k = t // chunk
        if not carry and k > 0 and t % chunk == 0:
            x1 = x2 = torch.zeros_like(x1)
            y1 = y2 = torch.zeros_like(y1)
        a1, a2 = a_chunks[k].unbind(-1)
        u = x0
        if b_chunks is not None:
            b0, b1, b2 = b_chunks[k].unbind(-1)
            u = b0 * x0 + b1 * x1 + b2 * x2
        y0 = u - a1 * y1 - a2 * y2
        ys.append(y0)
        x1, x2, y1, y2 = x0, x1, y0, y1
    y = torch.stack(ys, -1).sum(2) if ys else x  # no samples in, none out
    return y, IIRState(torch.stack([y1, y2], -1), torch.stack([x1, x2], -1).squeeze(2))


def _packed_scan(
    x: Tensor,  # (1, C, total)
    a: Tensor,  # (1, C|1, K, F, 2)
    b: Tensor | None,  # (1, C|1, K, F, 3)
    state: IIRState,  # (S, C, F, 2), (S, C, 2)
    chunk: int | None,
    carry: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, IIRState]:
    lengths = [end - begin for begin, end in pairwise(cu_seqlens.tolist())]
    if not lengths:
        return x, state

    def per_sequence(coefficients: Tensor) -> list[Tensor]:
        if chunk is None and coefficients.shape[2] == 1:
            return [coefficients] * len(lengths)
        chunks = [1 if chunk is None else -(-length // chunk) for length in lengths]
        return list(coefficients.split(chunks, 2))

    xs = x.split(lengths, -1)
    filters_a = per_sequence(a)
    filters_b = [None] * len(lengths) if b is None else per_sequence(b)
    starts = zip(state.y.split(1), state.x.split(1), strict=True)
    ys, ends_y, ends_x = [], [], []
    for x_s, a_s, b_s, start in zip(xs, filters_a, filters_b, starts, strict=True):
        y, end = _scan(x_s, a_s, b_s, IIRState(*start), chunk, carry)
        ys.append(y)
        ends_y.append(end.y)
        ends_x.append(end.x)
    return torch.cat(ys, -1), IIRState(torch.cat(ends_y), torch.cat(ends_x))
