"""Many linear heads on one input, and the loss of each, by one product for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.multihead_loss_autograd import Options, loss_of_heads
from fastkit.ops.multihead_loss_checks import check_heads
from fastkit.reference import MultiheadLoss
from fastkit.reference.multihead_loss import Problem

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}


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
    impl: Impl | None = None,
) -> MultiheadLoss:
    """The loss of each of H linear heads on one input, and how many rows each has right.

    With z the logits of head h, cw the class weights, t a row's target::

        z = x weight[h]^T + bias[h]
        single_label  sum over rows of (1 - eps) cw[t] (lse z - z[t]) + eps / C sum_c cw[c] (lse z - z[c]),
                      by the sum of cw[t], over rows whose target is not ignore_index
        multi_label   mean over rows and classes of cw[c] (log(1 + e^z[c]) - t[c] z[c])
        regression    mean over rows of (z - t)^2

    eps is ``label_smoothing``. Equivalent to a loop over heads of ``torch.nn.functional.linear`` and
    ``cross_entropy``, ``binary_cross_entropy_with_logits`` or ``mse_loss``, but for rows of which none
    counts: their loss is 0.

    Args:
        x: ``(B, D)``, float32, float64, bfloat16 or float16; any strides, a row at least.
        weight: ``(H, C, D)``, in the dtype of x. C >= 2 with a single label, 1 in regression.
        bias: ``(H, C)``, in the dtype of x, or float32 for half precision.
        target: ``(B,)`` int64 or int32, a class in [0, C) or ``ignore_index``; floating point ``(B, C)`` of
            ``"multi_label"``, and ``(B,)`` of ``"regression"``.
        problem: ``"single_label"``, ``"multi_label"`` or ``"regression"``.
        active: ``(H,)`` bool, the heads that take part. The others cost no product, may hold NaN, and have 0
            for loss, count of right rows and gradient. Default: all.
        class_weight: ``(C,)``, not negative, dtype as of bias; not in regression. Default: 1 each.
        label_smoothing: eps in [0, 1), of a single label.
        ignore_index: the target of a row that does not count; what it holds may be NaN. Of a single label.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or raises.
            Default: the kernel where one covers the device and dtype (Triton has no float64), else the
            reference; where that is for want of a kernel that another installation has, one warning says so.

    Returns:
        ``MultiheadLoss(loss, correct, count)``: loss ``(H,)``, float32 for half precision, else in the dtype
        of x; correct ``(H,)`` int64, of a single label the rows whose first largest logit is the target's, of
        several the pairs of row and class for which ``z > 0`` says what ``target > 0.5`` does, of regression
        0; count ``()`` int64, out of how many: rows that count, pairs, rows. Gradients flow through the loss.

    Raises:
        ValueError: a shape, an option or the name ``impl`` is not as above; ``target`` or ``class_weight``
            requires grad.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, or on a CPU a target is no
            class, or a class weight negative or not finite. (On a GPU, and while compiling, that is not
            looked at: a target that is no class makes the losses NaN.)

    Numerics: logits, softmax and sums are in float32 for half precision, else in the dtype of x, whatever
    autocast does to x and weight. On a CPU a share below e^-87 (float64: e^-708) is 0. Deterministic: on a
    CPU whatever the number of threads.

    Support: all derivatives to x, weight and bias; ``torch.compile(fullgraph=True)``; ``torch.func``,
    ``torch.vmap`` and forward mode run the reference; autocast casts x, weight and bias as it does for
    ``linear``.

    Memory and work: with K active heads ``2 B K C D`` operations forward, ``4 B K C D`` backward; the logits
    of all heads, ``4 B K C`` bytes for float32, whose gradients take their place, and on a CPU a copy of x.
    Where some heads are not active, a copy of the active ones' weight; half precision is widened, x and
    weight as a whole.

    Source: Malkiel, Wolf, "Maximal Multiverse Learning for Promoting Cross-Task Generalization of Fine-Tuned
    Language Models", EACL 2021.

    Example:
        >>> import torch, fastkit.ops
        >>> x, heads = torch.eye(2), torch.stack([torch.eye(2), torch.zeros(2, 2)])
        >>> fastkit.ops.multihead_loss(x, heads, torch.zeros(2, 2), torch.tensor([0, 1]))
        MultiheadLoss(loss=tensor([0.3133, 0.6931]), correct=tensor([2, 1]), count=tensor(2))
    """
    op = "multihead_loss"
    check_tensors(
        op, x=x, weight=weight, bias=bias, target=target, active_=active, class_weight_=class_weight
    )
    x, weight, bias = _autocast(x, weight, bias)
    check_heads(op, x, weight, bias, target, problem, active, class_weight, label_smoothing, ignore_index)
    chosen = choose(op, impl, x, KERNELS)
    if chosen == "reference" or transforms():
        with without_autocast(x):
            return reference.multihead_loss(
                x, weight, bias, target, problem=problem, active=active, class_weight=class_weight,
                label_smoothing=label_smoothing, ignore_index=ignore_index,
            )  # fmt: skip
    options = Options(problem, float(label_smoothing), ignore_index)
    return loss_of_heads(x, weight, bias, target, active, class_weight, options, chosen)


def _autocast(*tensors: Tensor) -> tuple[Any, ...]:
    """Under autocast all in its dtype, as for ``linear``; float64 stays."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if t.dtype in (torch.float32, *HALF) else t for t in tensors)
