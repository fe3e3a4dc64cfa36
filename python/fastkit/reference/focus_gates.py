"""The gates of FocusLayer, in PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def focus_gates(
    f: Tensor, y: Tensor, weight: Tensor, bias: Tensor, reset: Tensor, residual: Tensor
) -> Tensor:
    """f, y, residual (..., C); weight (3 C, C) and bias (3 C) of r, u and h; reset (C, C) -> o (..., C)."""
    return mix(linear(f, weight, bias), y, lambda s: linear(s, reset), residual)


def mix(logits: Tensor, y: Tensor, reset: Callable[[Tensor], Tensor], residual: Tensor) -> Tensor:
    """Of logits (..., 3 C)."""
    r, u, h = logits.chunk(3, -1)
    z = silu(h + reset(silu(r) * y))
    return torch.lerp(residual, z.to(residual.dtype), u.sigmoid().to(residual.dtype))
