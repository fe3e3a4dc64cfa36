"""linear_cross_entropy made differentiable, once.

Where the loss is one number, and the CPU's kernel runs, its gradients are formed in forward: backward scales
them in place, and gives them away. A gradient to lse, or a second backward through a retained graph, computes
the logits again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkit._autograd import Function, differentiates
from fastkit._dispatch import Impl
from fastkit.ops._checks import HALF
from fastkit.ops.linear_cross_entropy_products import Needs, Options, run_backward, run_forward


def loss_and_lse(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, options: Options, chosen: Impl,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of input (N, D) and target (N,)."""
    args = (input, linear_weight, linear_bias, target, weight, token_weight)
    if not torch.is_grad_enabled() or not differentiates(input, linear_weight, linear_bias):
        return run_forward(*args, *options, [False] * 3, chosen)[:2]
    needs = Needs(*(t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)))
    # Half precision would be rounded before it is scaled: fp16 would lose what a loss is scaled for.
    forms = options.reduction != "none" and chosen == "cpu" and input.dtype not in HALF
    return _LinearCrossEntropy.apply(*args, options, needs if forms else Needs(False, False, False), chosen)[
        :2
    ]


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, token_weight: Tensor | None, options: Options, forms: Needs, chosen: Impl,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        args = (input, linear_weight, linear_bias, target, weight, token_weight)
        return run_forward(*args, *options, list(forms), chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options, forms, ctx.chosen = inputs
        _, lse, *formed = output
        ctx.mark_non_differentiable(*formed)
        ctx.set_materialize_grads(False)
        ctx.of_bias = None if tensors[2] is None else tensors[2].dtype
        compiles = torch.compiler.is_compiling()
        ctx.save_for_backward(lse, *tensors, *(formed if compiles and any(forms) else ()))
        ctx.formed = formed if any(forms) and not compiles else None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g_loss, g_lse = grad_outputs[:2]
        if g_loss is None and g_lse is None:
            return (None,) * 9
        gradients = None
        formed, ctx.formed = ctx.formed, None
        if formed is not None and g_loss is not None and g_lse is None:
            gradients = _scaled(formed, g_loss)
        if gradients is None:
            lse, *saved = ctx.saved_tensors
            tensors, kept = saved[:6], saved[6:]
            if kept and g_lse is None:
                gradients = [t * g_loss for t in kept]
            else:
                needs = [bool(need) for need in ctx.needs_input_grad[:3]]
                gradients = run_backward(g_loss, g_lse, lse, *tensors, *ctx.options, needs, ctx.chosen)
        of_input, of_weight, of_bias = gradients
        if ctx.of_bias is not None:
            of_bias = of_bias.to(ctx.of_bias)
        gradients = (of_input, of_weight, of_bias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph
            gradients = tuple(_Once.apply(t, *grad_outputs[:2], *ctx.saved_tensors[1:4]) for t in gradients)
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
        return *wanted, *(None,) * 6


@torch.no_grad()  # with create_graph gradients are enabled here
def _scaled(formed: list[Tensor], of_loss: Tensor) -> list[Tensor] | None:
    """The gradients, in the memory of those for 1; None where a factor cannot give them."""
    try:
        factor = of_loss.item()
    except RuntimeError:  # it is no number: batched, fake or traced
        return [t * of_loss for t in formed]
    if not math.isfinite(factor):  # of 0, as of an ignored token, it makes NaN
        return None
    return formed if factor == 1.0 else [t.mul_(factor) for t in formed]


class _Once(Function):
    """A gradient, which depends on all others, and cannot be differentiated."""

    @staticmethod
    def forward(gradient: Tensor, *others: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(
            "linear_cross_entropy: second derivatives must be those of the reference, got a backward of a"
            ' backward; use impl="reference"'
        )
