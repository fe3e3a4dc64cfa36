"""Many linear heads on one input, and the loss of each; written for reading."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

Problem = Literal["single_label", "multi_label", "regression"]


class MultiheadLoss(NamedTuple):
    """What ``multihead_loss`` returns: of each head, 0 where it is not active; ``loss`` has gradients."""

    loss: Tensor  # (H,)
    correct: Tensor  # (H,) int64  # of what ``count`` counts
    count: Tensor  # () int64  # pyright: ignore[reportIncompatibleMethodOverride]


def multihead_loss(
    x: Tensor,  # (B, D)
    weight: Tensor,  # (H, C, D)
    bias: Tensor,  # (H, C)
    target: Tensor,  # (B,), or (B, C) of "multi_label"
    *,
    problem: Problem = "single_label",
    active: Tensor | None = None,  # (H,) bool
    class_weight: Tensor | None = None,  # (C,)
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> MultiheadLoss:
    """With ``z[h] = x weight[h]^T + bias[h]``, the loss of a head is the mean of

    - ``"single_label"``: the cross entropy of z and the class, as ``torch.nn.functional.cross_entropy`` has
      it, over rows whose target is not ``ignore_index``; 0 where there is none;
    - ``"multi_label"``: the binary cross entropy of each class, times its weight;
    - ``"regression"``: ``(z - target)^2``, C = 1.

    In float64 for float64 ``x``, else in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads, classes, _ = weight.shape
    on = torch.ones(heads, dtype=torch.bool, device=x.device) if active is None else active
    ignored = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if problem == "single_label":
        target = target.long()
        ignored = target == ignore_index
    z = torch.einsum(  # (H, B, C), of what counts
        "bd,hcd->hbc",
        x.to(dtype).masked_fill(ignored[:, None], 0.0),
        weight.to(dtype).masked_fill(~on[:, None, None], 0.0),
    ) + bias.to(dtype).masked_fill(~on[:, None], 0.0).unsqueeze(1)
    of_classes = z.new_ones(classes) if class_weight is None else class_weight.to(dtype)

    if problem == "single_label":
        unknown = ~ignored & ((target < 0) | (target >= classes))
        target = target.clamp(0, classes - 1)
        weights = of_classes[target].masked_fill(ignored, 0.0)
        far = z.logsumexp(2, keepdim=True) - z  # (H, B, C)
        losses = (1 - label_smoothing) * weights * far.gather(2, target.expand(heads, -1)[..., None])[..., 0]
        if label_smoothing:
            losses = losses + label_smoothing / classes * (of_classes * far).sum(2)
        losses = (losses * torch.where(unknown, torch.nan, 1.0)).masked_fill(ignored, 0.0)
        divisor = weights.sum()
        loss = losses.sum(1) / torch.where(divisor > 0, divisor, 1.0)  # of no rows 0
        right = (z.argmax(2) == target) & ~z.isnan().any(2) & ~ignored & ~unknown
        count = (~ignored).sum()
    elif problem == "multi_label":
        wanted = target.to(dtype)
        loss = binary_cross_entropy_with_logits(
            z, wanted.expand_as(z), of_classes.expand_as(z), reduction="none"
        ).mean((1, 2))
        right = ((z > 0) == (wanted > 0.5)) & ~z.isnan()
        count = torch.tensor(target.numel(), device=x.device)
    else:
        loss = (z[..., 0] - target.to(dtype)).square().mean(1)
        right = torch.zeros(heads, 1, dtype=torch.bool, device=x.device)
        count = torch.tensor(len(x), device=x.device)
    correct = right.flatten(1).sum(1)
    return MultiheadLoss(loss.masked_fill(~on, 0.0), correct.masked_fill(~on, 0), count)
