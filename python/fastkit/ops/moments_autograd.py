"""moments made differentiable, to any order.

With n the count, m the mean and c = x - m, whose weighted sum is zero, a change of the rows and weights has

    dn = sum of dw,    dm = sum of (w dx + dw c) / n,    dS = sum of w (dx c^T + c dx^T) + dw c c^T

so that for cotangents gn, gm, gS, with G = gS + gS^T,

    gx = w (gm / n + G c),    gw = gn + gm . c / n + c^T G c / 2

which are written in differentiable operations of PyTorch. Where n is 0 there is no mean: 1 / n and c are
taken as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import _native, reference
from fastkit._autograd import Function, differentiates, without_autocast
from fastkit._dispatch import Impl
from fastkit.ops import moments_triton
from fastkit.ops._checks import arithmetic
from fastkit.reference import Moments

if _native.REASON is None:
    _fwd = torch.ops.fastkit.moments_fwd.default
    torch.library.register_fake("fastkit::moments_fwd", moments_triton.fake)


def differentiable_moments(x: Tensor, weights: Tensor | None, chosen: Impl) -> Moments:
    if differentiates(x, weights):
        return Moments(*_Moments.apply(x, weights, chosen))
    return _run(x, weights, chosen)


def _run(x: Tensor, weights: Tensor | None, chosen: Impl) -> Moments:
    if chosen == "cpu":
        return Moments(*_fwd(x, weights))
    with without_autocast(x):
        if chosen == "triton":
            return Moments(*moments_triton.forward(x, weights))
        return reference.moments(x, weights=weights)


class _Moments(Function):
    @staticmethod
    def forward(x: Tensor, weights: Tensor | None, chosen: Impl) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, scatter = _run(x, weights, chosen)
        return count, mean, scatter

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weights, _ = inputs
        count, mean, _ = output
        if weights is None or not weights.requires_grad:
            ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, mean)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        gcount, gmean, gscatter = grad_outputs
        x, weights, mean = ctx.saved_tensors
        needs_x, needs_weights, _ = ctx.needs_input_grad
        with without_autocast(x):
            gradients = _gradients(gcount, gmean, gscatter, x, weights, mean.detach(), needs_x, needs_weights)
        return *gradients, None


def _gradients(
    gcount: Tensor | None, gmean: Tensor | None, gscatter: Tensor | None, x: Tensor, weights: Tensor | None,
    mean: Tensor, needs_x: bool, needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    gx = gw = None
    if gmean is not None or gscatter is not None:
        w = None if weights is None else weights.to(arithmetic(x))
        centred, inverse = _centred(x.to(arithmetic(x)), w, mean)
        of_mean = None if gmean is None else inverse * gmean
        of_scatter = None if gscatter is None else centred @ (gscatter + gscatter.T)
        if needs_x:
            terms = [term for term in (of_scatter, of_mean) if term is not None]
            gx = sum(terms[1:], terms[0]).expand_as(x)
            gx = (gx if w is None else w.unsqueeze(1) * gx).to(x.dtype)
        if needs_weights:
            terms = [] if of_mean is None else [centred @ of_mean]
            terms += [] if of_scatter is None else [(of_scatter * centred).sum(1) / 2]
            gw = sum(terms[1:], terms[0])
    if needs_weights and weights is not None:
        if gcount is not None:
            of_count = gcount.to(arithmetic(x)).expand(weights.shape)
            gw = of_count if gw is None else gw + of_count
        gw = None if gw is None else gw.to(weights.dtype)
    return gx, gw


def _centred(x: Tensor, w: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor | float]:
    """x less its mean, and 1 / count; the shift, a rounded mean, is a constant that makes no difference."""
    shifted = x - shift
    if w is None:
        inverse = 1.0 / max(x.shape[0], 1)
        return shifted - inverse * shifted.sum(0), inverse
    count = w.sum(dtype=torch.float64)
    exists = count != 0
    inverse = (exists / count.masked_fill(~exists, 1.0)).to(x.dtype)
    return exists.to(x.dtype) * (shifted - inverse * (w @ shifted)), inverse
