"""iir_scan as it can be written in PyTorch: sample by sample, and all chunks at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

Form = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (x, a, b, chunk) -> y


def steps(u: Tensor, y1: Tensor, y2: Tensor, a1: Tensor, a2: Tensor) -> list[Tensor]:
    """``y[t] = u[t] - a1 y[t-1] - a2 y[t-2]`` along the first axis of u."""
    ys = [y2, y1]
    for u_t in u.unbind():
        ys.append(u_t.addcmul(a2, ys[-2], value=-1).addcmul(a1, ys[-1], value=-1))
    return ys[2:]


def last_steps(u: Tensor, y1: Tensor, y2: Tensor, a1: Tensor, a2: Tensor) -> list[Tensor]:
    return steps(u, y1, y2, a1, a2)[-2:]


def loop(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """Sample by sample: the numerator for all of time at once, then two operations a sample."""
    axis = _time_axis(x)
    u = numerator(x, b, chunk).flatten(axis, axis + 1).movedim(axis, 0)
    ys = [torch.zeros_like(u[0])] * 2
    coefficients = a.permute(2, 3, 0, 1).contiguous()
    for u_k, (a1, a2) in zip(u.split(chunk), coefficients.unbind(), strict=True):
        ys += steps(u_k, ys[-1], ys[-2], a1, a2)
    return torch.stack(ys[2:], axis).movedim(axis, -1)


def chunk_parallel(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    chunk: int,
    *,
    steps: Callable[..., list[Tensor]] = steps,
    last_steps: Callable[..., list[Tensor]] = last_steps,
) -> Tensor:
    """All chunks at once, sample by sample: from zero to see how each ends, then from its true start.

    With A a chunk's state transition, its true end is the end from zero plus ``A**chunk`` times its start:
    the one loop over chunks carries two numbers a row.
    """
    axis = _time_axis(x)
    u = numerator(x, b, chunk).movedim(axis + 1, 0)
    if axis == 2:
        u = u.contiguous()  # one transposition now, not a strided read in every step
    a1, a2 = _coefficients(a, axis)

    y1 = y2 = 0 * a1  # not zeros: a state that depends on a, as later ones do, is compiled with them
    for block in u.split(_BLOCK):
        y2, y1 = last_steps(block, y1, y2, a1, a2)
    y1, y2 = _starts(y1, y2, _power(a1, a2, chunk), axis)
    ys: list[Tensor] = []
    for block in u.split(_BLOCK):
        ys += steps(block, y1, y2, a1, a2)
        y2, y1 = ys[-2:]
    return torch.stack(ys, axis + 1).flatten(axis, axis + 1).movedim(axis, -1)


_BLOCK = 8  # steps compiled together; backward takes 6 s to compile at 8 and 95 s at 16


def _time_axis(x: Tensor) -> int:
    """Where time is in the memory of x: the forms work in the order (B, C, T) or (B, T, C) that x has."""
    return 2 if x.stride(-1) == 1 else 1


def _coefficients(c: Tensor, axis: int) -> tuple[Tensor, ...]:
    """(B, C, K, n) -> n of (B, C, K) or (B, K, C)."""
    return c.permute(3, 0, 1, 2).movedim(3, 1 + axis).contiguous().unbind()


def numerator(x: Tensor, b: Tensor, chunk: int) -> Tensor:
    """``b0 x[t] + b1 x[t-1] + b2 x[t-2]`` as (B, C, K, chunk) or (B, K, chunk, C)."""
    axis = _time_axis(x)
    x = x.movedim(2, axis)
    u0, u1, u2 = (pad(x, (0, 0) * (2 - axis) + (lag, -lag)).unflatten(axis, (-1, chunk)) for lag in range(3))
    b0, b1, b2 = (t.unsqueeze(axis + 1) for t in _coefficients(b, axis))
    return (b0 * u0).addcmul(b1, u1).addcmul(b2, u2)


def _power(a1: Tensor, a2: Tensor, n: int) -> list[Tensor]:
    """((-a1, -a2), (1, 0)) to the n-th, n a power of two; squared in float64, or errors would grow with n."""
    p, q = -a1.double(), -a2.double()
    r, s = torch.ones_like(p), torch.zeros_like(p)
    while n > 1:
        p, q, r, s = p * p + q * r, q * (p + s), r * (p + s), s * s + q * r
        n //= 2
    return [t.to(a1.dtype) for t in (p, q, r, s)]


def _starts(z1: Tensor, z2: Tensor, transition: list[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, from the zero-state ends (z1, z2) and the chunks' transitions."""
    starts: list[tuple[Tensor, Tensor]] = []
    y1 = y2 = torch.zeros_like(z1.select(axis, 0))
    chunks = (t.unbind(axis) for t in (z1, z2, *transition))
    for u1, u2, p, q, r, s in zip(*chunks, strict=True):
        starts.append((y1, y2))
        y1, y2 = u1.addcmul(p, y1).addcmul(q, y2), u2.addcmul(r, y1).addcmul(s, y2)
    first, second = zip(*starts, strict=True)
    return torch.stack(first, axis), torch.stack(second, axis)
