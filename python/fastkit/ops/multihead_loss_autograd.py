"""multihead_loss made differentiable, as often as is asked for.

The kernel forms ``dz``, the gradient of each head's loss to its logits, in forward; backward is two products.
With ``create_graph`` backward is that of the reference, which has all further derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import Function, differentiates, without_autocast
from fastkit._dispatch import Impl
from fastkit.ops.multihead_loss_products import run_backward, run_forward
from fastkit.reference import MultiheadLoss
from fastkit.reference.multihead_loss import Problem


class Options(NamedTuple):
    """What the losses are made of, besides tensors."""

    problem: Problem
    label_smoothing: float
    ignore_index: int


def loss_of_heads(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, active: Tensor | None,
    class_weight: Tensor | None, options: Options, chosen: Impl,
) -> MultiheadLoss:  # fmt: skip
    args = (x, weight, bias, target, active, class_weight)
    if not torch.is_grad_enabled() or not differentiates(x, weight, bias):
        return MultiheadLoss(*run_forward(*args, *options, False, chosen)[:3])
    return MultiheadLoss(*_MultiheadLoss.apply(*args, options, chosen)[:3])


class _MultiheadLoss(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, active: Tensor | None,
        class_weight: Tensor | None, options: Options, chosen: Impl,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return run_forward(x, weight, bias, target, active, class_weight, *options, True, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options, ctx.chosen = inputs
        _, correct, count, dz = output
        ctx.mark_non_differentiable(correct, count, dz)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g_loss = grad_outputs[0]
        if g_loss is None:
            return (None,) * 8
        dz, *tensors = ctx.saved_tensors
        x, weight, bias, target, active, class_weight = tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph
            return *_by_reference(
                g_loss, (x, weight, bias), needs, target, active, class_weight, ctx.options
            ), *((None,) * 5)
        problem, _, ignore_index = ctx.options
        found = run_backward(g_loss, dz, x, weight, target, active, problem, ignore_index, needs, ctx.chosen)
        return *(
            g.to(t.dtype) if need else None
            for g, t, need in zip(found, (x, weight, bias), needs, strict=True)
        ), *((None,) * 5)


def _by_reference(
    g_loss: Tensor, leaves: tuple[Tensor, Tensor, Tensor], needs: list[bool], target: Tensor,
    active: Tensor | None, class_weight: Tensor | None, options: Options,
) -> list[Tensor | None]:  # fmt: skip
    problem, label_smoothing, ignore_index = options
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    with without_autocast(leaves[0]):
        loss = reference.multihead_loss(
            *leaves, target, problem=problem, active=active, class_weight=class_weight,
            label_smoothing=label_smoothing, ignore_index=ignore_index,
        ).loss  # fmt: skip
        found = iter(torch.autograd.grad(loss, wanted, g_loss, create_graph=True))
    return [next(found) if need else None for need in needs]
