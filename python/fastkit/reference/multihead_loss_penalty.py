"""How far from orthogonal the rows of many heads are; written for reading."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PenaltyKind = Literal["abs", "squared", "cos_abs", "cos_squared", "huber"]
LEAST_NORM = 1e-12  # of a row, by which its cosines are divided


def orthogonality_penalty(
    weight: Tensor,  # (H, C, D)
    *,
    kind: PenaltyKind = "abs",
    huber_width: float = 1e-2,
    active: Tensor | None = None,  # (H,) bool
    center_classes: bool = False,
) -> Tensor:  # ()
    """``sum over classes c and pairs h < g of active heads of rho(<weight[h, c], weight[g, c]>)``.

    ``rho(t)`` is ``|t|``, ``t^2``, the same two of the cosine, or Huber's: ``t^2 / (2 width)`` up to the
    width, and ``|t| - width / 2`` beyond. ``center_classes`` takes the mean over classes from each head
    before. In float64 for float64 ``weight``, else in float32.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if active is not None:
        w = w.masked_fill(~active[:, None, None], 0.0)  # rho(0) = 0
    if center_classes:
        w = w - w.mean(1, keepdim=True)
    w = w.transpose(0, 1)  # (C, K, D)
    if kind in ("cos_abs", "cos_squared"):
        w = w / torch.linalg.vector_norm(w, dim=2, keepdim=True).clamp_min(LEAST_NORM)
    gram = w @ w.transpose(1, 2)  # (C, K, K)
    if kind in ("abs", "cos_abs"):
        each = gram.abs()
    elif kind in ("squared", "cos_squared"):
        each = gram.square()
    else:
        size = gram.abs()
        each = torch.where(size <= huber_width, gram.square() / (2 * huber_width), size - huber_width / 2)
    return each.triu(1).sum()
