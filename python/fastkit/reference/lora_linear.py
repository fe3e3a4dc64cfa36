"""A frozen linear layer with a masked low-rank addition, and the pruning of its A; written for reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class LinearWithStats(NamedTuple):
    """What ``lora_linear_with_stats`` returns."""

    y: Tensor  # (..., O)
    square_sum: Tensor  # (D,) float32: of each column of x, over all tokens


def lora_linear(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (O, D)
    bias: Tensor | None,  # (O,)
    lora_a: Tensor,  # (R, D)
    lora_b: Tensor,  # (O, R)
    scale: float,
    *,
    mask: Tensor | None = None,  # (R, D), True where A is kept
    lora_x: Tensor | None = None,  # (..., D), what the low-rank part sees instead of x
) -> Tensor:  # (..., O)
    """``x W^T + bias + scale (lora_x (mask * A)^T) B^T``.

    The low-rank part in float64 for float64 ``x``, else in float32; its sum with the frozen part is rounded
    to the dtype of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = lora_a.to(dtype)
    if mask is not None:
        a = a.masked_fill(~mask, 0.0)
    low_rank = linear(linear((x if lora_x is None else lora_x).to(dtype), a), lora_b.to(dtype))
    return (linear(x, weight, bias).to(dtype) + scale * low_rank).to(x.dtype)


def lora_linear_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
) -> LinearWithStats:
    """``lora_linear``, and the sum of squares of each column of ``x``, through which no gradient flows."""
    y = lora_linear(x, weight, bias, lora_a, lora_b, scale, mask=mask, lora_x=lora_x)
    return LinearWithStats(y, _square_sums(x).float())


def column_norms(x: Tensor) -> Tensor:  # (..., D) -> (D,)
    """The L2 norm of each column over all rows, float32; no gradient flows through it."""
    return _square_sums(x).sqrt().float()


def _square_sums(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.detach().reshape(-1, x.shape[-1]).to(dtype).square().sum(0)


def prune_rows_(lora_a: Tensor, input_norm: Tensor, ratio: float) -> Tensor:  # (R, D), (D,) -> (R, D)
    """Zero the ``floor(ratio D)`` entries of each row with the least ``|A| input_norm``.

    Returns what is kept. Of equal ones the first go. A NaN is greater than any number.
    """
    dtype = torch.promote_types(lora_a.dtype, torch.float32)
    score = lora_a.detach().to(dtype).abs() * input_norm.to(dtype)
    score.masked_fill_(score.isnan(), torch.nan)  # CUDA's sort looks at its bits
    pruned = score.argsort(dim=1, stable=True)[:, : math.floor(ratio * lora_a.shape[1])]
    mask = torch.ones_like(lora_a, dtype=torch.bool).scatter_(1, pruned, False)
    with torch.no_grad():
        lora_a.masked_fill_(~mask, 0.0)
    return mask


def prune_rows_grouped_(
    lora_as: Sequence[Tensor], input_norms: Sequence[Tensor], ratio: float
) -> list[Tensor]:
    """``prune_rows_`` of each matrix with its norms."""
    return [prune_rows_(a, norm, ratio) for a, norm in zip(lora_as, input_norms, strict=True)]
