"""The gates of FocusLayer, in PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def focus_gates(logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Logits (..., 3 C) of r, u and h; y and residual (..., C); weight (C, C) -> o (..., C)."""
    r, u, h = logits.chunk(3, -1)
    z = silu(h + linear(silu(r) * y, weight))
    return torch.lerp(residual, z.to(residual.dtype), u.sigmoid().to(residual.dtype))
