"""How far from orthogonal the rows of many heads are, without a matrix of all pairs in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import Function, differentiates, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.multihead_loss_checks import check_penalty
from fastkit.ops.multihead_loss_penalty_products import run_forward
from fastkit.reference.multihead_loss_penalty import PenaltyKind

PENALTY_KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}


def orthogonality_penalty(
    weight: Tensor,  # (H, C, D)
    *,
    kind: PenaltyKind = "abs",
    huber_width: float = 1e-2,
    active: Tensor | None = None,  # (H,) bool
    center_classes: bool = False,
    impl: Impl | None = None,
) -> Tensor:  # ()
    """What the products of heads' rows of the same class add up to, each pair of heads counted once.

    ::

        sum over classes c and active heads h < g of rho(<weight[h, c], weight[g, c]>)

        abs, cos_abs          rho(t) = |t|
        squared, cos_squared  rho(t) = t^2
        huber                 rho(t) = t^2 / (2 width) for |t| <= width, |t| - width / 2 beyond

    ``cos_``: of rows divided by their norms, or by 1e-12 where they are shorter.

    Args:
        weight: ``(H, C, D)``, float32, float64, bfloat16 or float16; any strides.
        kind: rho. ``"abs"`` has a slope that jumps at 0, about which the products of pairs come to tremble,
            by some steps of the optimizer; that of ``"huber"`` does not. What is no cosine can be lowered by
            shorter rows.
        huber_width: of ``"huber"``, a normal number in the arithmetic; our choice.
        active: ``(H,)`` bool, the heads that take part; the others may hold NaN, and their gradient is 0.
            Default: all.
        center_classes: take the mean over classes from each head first. Softmax does not see that mean, and
            without this heads that decide alike may have it make their rows orthogonal.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or raises.
            Default: the kernel where one covers the device and dtype (Triton has no float64), else the
            reference; where that is for want of a kernel that another installation has, one warning says so.

    Returns:
        The penalty, ``()``, float32 for half precision, else in the dtype of weight; 0 for one head or none.

    Raises:
        ValueError: a shape, an option or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: products and sums are in float32 for half precision, else in the dtype of weight, under autocast
    too. The slope of ``abs`` is a sign, that of 0 is 0: where a product is 0 up to rounding, so is what its
    sign is. Deterministic; another number of threads may change last bits.

    Support: all derivatives to weight, those of ``abs`` and ``huber`` where they exist;
    ``torch.compile(fullgraph=True)``; ``torch.func``, ``torch.vmap`` and forward mode run the reference.

    Memory and work: with K active heads ``C K^2 D`` operations forward, ``3 C K^2 D`` with the gradient,
    which is formed in forward. A copy of the weight, and slopes of some 200 heads with all, for as many
    classes at a time as fill 4 MiB; one more copy for cosines, centered classes, and where some heads are not
    active.

    Source: Littwin, Wolf, "The Multiverse Loss for Robust Transfer Learning", CVPR 2016, and Malkiel, Wolf,
    "Maximal Multiverse Learning for Promoting Cross-Task Generalization of Fine-Tuned Language Models",
    EACL 2021; of what their penalty is made we know the idea alone: the kinds are our choice.

    Example:
        >>> import torch, fastkit.ops
        >>> heads = torch.tensor([[[1.0, 0]], [[0, 1]], [[1, 1]]])
        >>> fastkit.ops.orthogonality_penalty(heads)
        tensor(2.)
    """
    op = "orthogonality_penalty"
    check_tensors(op, weight=weight, active_=active)
    check_penalty(op, weight, kind, huber_width, active, center_classes)
    chosen = choose(op, impl, weight, PENALTY_KERNELS)
    if chosen == "reference" or transforms():
        return _reference(weight, kind, huber_width, active, center_classes)
    args = (weight, kind, float(huber_width), active, center_classes)
    if not torch.is_grad_enabled() or not differentiates(weight):
        return run_forward(*args, False, chosen)[0]
    return _OrthogonalityPenalty.apply(*args, chosen)[0]


def _reference(
    weight: Tensor, kind: PenaltyKind, huber_width: float, active: Tensor | None, center_classes: bool
) -> Tensor:
    with without_autocast(weight):
        return reference.orthogonality_penalty(
            weight, kind=kind, huber_width=huber_width, active=active, center_classes=center_classes
        )


class _OrthogonalityPenalty(Function):
    @staticmethod
    def forward(
        weight: Tensor, kind: PenaltyKind, huber_width: float, active: Tensor | None, center_classes: bool,
        chosen: Impl,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return run_forward(weight, kind, huber_width, active, center_classes, True, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, ctx.kind, ctx.huber_width, active, ctx.center_classes, _ = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, active, gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g = grad_outputs[0]
        if g is None:
            return (None,) * 6
        weight, active, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph
            with without_autocast(weight):
                penalty = _reference(weight, ctx.kind, ctx.huber_width, active, ctx.center_classes)
                (of_weight,) = torch.autograd.grad(penalty, weight, g, create_graph=True)
        else:
            of_weight = (gradient * g).to(weight.dtype)
        return of_weight, *((None,) * 5)
