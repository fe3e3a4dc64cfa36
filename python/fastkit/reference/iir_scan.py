"""Second-order recursive filters, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor


def iir_scan(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K, 2)
    b: Tensor | None = None,  # (B|1, C|1, K, 3)
    *,
    chunk: int | None = None,
    carry: bool = True,
) -> Tensor:  # (B, C, T)
    """``y[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y[t-1] - a2 y[t-2]``, (a, b) of chunk ``t // chunk``.

    Arithmetic in float64 for float64 ``x``, else in float32. Work and memory are linear in T, backward too.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a_chunks = a.to(dtype).unbind(2)
    b_chunks = None if b is None else b.to(dtype).unbind(2)
    chunk = x.shape[-1] if chunk is None else chunk

    zero = torch.zeros(x.shape[:2], dtype=dtype, device=x.device)
    x1 = x2 = y1 = y2 = zero
    ys = []
    for t, x0 in enumerate(x.to(dtype).unbind(-1)):
        if not carry and t % chunk == 0:
            x1 = x2 = y1 = y2 = zero
        k = t // chunk
        a1, a2 = a_chunks[k].unbind(-1)
        u = x0
        if b_chunks is not None:
            b0, b1, b2 = b_chunks[k].unbind(-1)
            u = b0 * x0 + b1 * x1 + b2 * x2
        y0 = u - a1 * y1 - a2 * y2
        ys.append(y0)
        x1, x2, y1, y2 = x0, x1, y0, y1
    return torch.stack(ys, -1).to(x.dtype)
