"""A linear layer and the cross entropy of what it gives, with all logits in memory; written for reading."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

Reduction = Literal["none", "sum", "mean"]


class LinearCrossEntropy(NamedTuple):
    """What ``linear_cross_entropy_with_lse`` returns."""

    loss: Tensor  # (), or (...) with reduction="none"
    lse: Tensor  # (...): the logarithm of the sum of e^logit, 0 where a token is ignored


def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,), of the classes
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,  # (...)
) -> Tensor:
    """The loss of ``linear_cross_entropy_with_lse``."""
    return linear_cross_entropy_with_lse(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss,
        token_weight=token_weight,
    ).loss  # fmt: skip


def linear_cross_entropy_with_lse(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
) -> LinearCrossEntropy:
    """With z the logits, t the target, cw the class weights and w the token's weight, a token's loss is

    ``w ((1 - eps) cw[t] (lse - z[t]) + eps / V sum_v cw[v] (lse - z[v]) + zeta lse^2)``.

    In float64 for float64 ``input``, else in float32. ``mean`` divides by the sum of ``cw[t]``. Tokens whose
    target is ``ignore_index`` take no part; where it is no class, the loss and its gradients are NaN.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    vocabulary = linear_weight.shape[0]
    classes = target.flatten().long()
    ignored = classes == ignore_index
    unknown = ~ignored & ((classes < 0) | (classes >= vocabulary))
    classes = classes.clamp(0, vocabulary - 1)

    rows = input.reshape(-1, input.shape[-1]).to(dtype).masked_fill(ignored[:, None], 0.0)
    z = linear(rows, linear_weight.to(dtype), None if linear_bias is None else linear_bias.to(dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(1)
    class_weight = lse.new_ones(vocabulary) if weight is None else weight.to(dtype)
    target_weight = class_weight[classes]
    losses = (1 - label_smoothing) * target_weight * (lse - z.gather(1, classes[:, None])[:, 0])
    if label_smoothing:
        losses = losses + label_smoothing / vocabulary * (class_weight * (lse[:, None] - z)).sum(1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    if token_weight is not None:
        losses = losses * token_weight.flatten().to(dtype).masked_fill(ignored, 0.0)
    losses = (losses * torch.where(unknown, torch.nan, 1.0)).masked_fill(ignored, 0.0)  # its gradients too
    lse = lse.masked_fill(ignored, 0.0).view(target.shape)

    if reduction == "none":
        return LinearCrossEntropy(losses.view(target.shape), lse)
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / target_weight.masked_fill(ignored, 0.0).sum()
    return LinearCrossEntropy(loss, lse)
