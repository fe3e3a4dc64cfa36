"""The raw ops of lora_linear made differentiable, to any order.

With ``A' = mask * A`` and xl what the low-rank part sees (x, or lora_x), the layer is
``y = x W^T + bias + s xl A'^T B^T``. Its backward is a sum of products of gy and the arguments, and so are
the gradients of the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastkit import _native
from fastkit._autograd import Function, differentiates, without_autocast
from fastkit._dispatch import Impl
from fastkit.ops import lora_linear_triton
from fastkit.ops._checks import arithmetic

if _native.REASON is None:
    _fwd_ = torch.ops.fastkit.lora_linear_fwd_.default
    _bwd_ = torch.ops.fastkit.lora_linear_bwd_.default
    torch.library.register_fake("fastkit::lora_linear_fwd_", lora_linear_triton.fake_forward_)
    torch.library.register_fake("fastkit::lora_linear_bwd_", lora_linear_triton.fake_backward_)


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    x: bool
    weight: bool
    bias: bool
    a: bool
    b: bool
    lora_x: bool


def lora(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, lora_x: Tensor | None,
    mask: Tensor | None, scale: float, needs_square_sum: bool, chosen: Impl,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (N, O) of x (N, D), and the column sums of squares, empty unless needed.

    Without a weight y is the low-rank part alone.
    """
    args = (x, weight, bias, a, b, lora_x, mask, scale, needs_square_sum, chosen)
    if differentiates(x, weight, bias, a, b, lora_x):
        return _LoRALinear.apply(*args)[:2]
    return _run(*args)[:2]


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, lora_x: Tensor | None,
    mask: Tensor | None, scale: float, needs_square_sum: bool, chosen: Impl,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the sums of squares, and h, which the backward takes."""
    y = x.new_zeros((x.shape[0], b.shape[0])) if weight is None else linear(x, weight, bias)
    # Selective checkpointing keeps what linear gave, and takes it again: it is not to be added to.
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportPrivateUsage]
        y = y.clone()
    forward_ = lora_linear_triton.forward_ if chosen == "triton" else _fwd_
    h, square_sum = forward_(y, x, lora_x, a, mask, b, scale, needs_square_sum)
    return y, square_sum, h


class _LoRALinear(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, lora_x: Tensor | None,
        mask: Tensor | None, scale: float, needs_square_sum: bool, chosen: Impl,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _run(x, weight, bias, a, b, lora_x, mask, scale, needs_square_sum, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, a, b, lora_x, mask, ctx.scale, _, ctx.chosen = inputs
        _, square_sum, h = output
        ctx.mark_non_differentiable(square_sum, h)
        ctx.set_materialize_grads(False)
        ctx.of_bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, a, b, lora_x, mask, h)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        gy = grad_outputs[0]
        if gy is None:
            return (None,) * 10
        x, weight, a, b, lora_x, mask, h = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:6])
        args = (gy, x, weight, a, b, lora_x, mask, h, ctx.scale, needs, ctx.chosen)
        if differentiates(gy, x, weight, a, b, lora_x):
            gx, gw, gbias, ga, gb, glx = _LoRALinearBackward.apply(*args)
        else:
            gx, gw, gbias, ga, gb, glx = _run_backward(*args)
        gbias = gbias.to(ctx.of_bias) if needs.bias else None
        gradients = (gx, gw, gbias, ga, gb, glx)
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *wanted, None, None, None, None


def _run_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, lora_x: Tensor | None,
    mask: Tensor | None, h: Tensor, scale: float, needs: Needs, chosen: Impl,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients; what is not needed is empty. In the dtypes of the forward, whatever is on by now."""
    with without_autocast(gy):
        gx = gw = glx = gy.new_empty(0)
        if needs.x and weight is not None:
            gx = gy @ weight
        elif needs.x:
            gx = x.new_empty(x.shape) if lora_x is None else x.new_zeros(x.shape)
        if needs.weight:
            gw = gy.T @ x
        if lora_x is not None and needs.lora_x:
            glx = lora_x.new_empty(lora_x.shape)
        target, wanted = (gx, needs.x) if lora_x is None else (glx, needs.lora_x)
        backward_ = lora_linear_triton.backward_ if chosen == "triton" else _bwd_
        ga, gb, gbias = backward_(
            target if wanted else None, gy, x if lora_x is None else lora_x, h, a, mask, b, scale,
            lora_x is None and weight is not None, needs.a or needs.b, needs.bias,
        )  # fmt: skip
        return gx, gw, gbias, ga.to(a.dtype), gb.to(b.dtype), glx


class _LoRALinearBackward(Function):
    """gx = gy W (+ gl), gW = gy^T x, gbias = sum gy, gA = mask * (s gy B)^T xl, gB = s gy^T xl A'^T, with
    gl = s gy B A' the gradient to xl.

    For cotangents v of these its value is <gy, t>, where t is the tangent of y in direction v; its own
    gradients follow factor by factor, in differentiable products.
    """

    @staticmethod
    def forward(
        gy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, lora_x: Tensor | None,
        mask: Tensor | None, h: Tensor, scale: float, needs: Needs, chosen: Impl,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return _run_backward(gy, x, weight, a, b, lora_x, mask, h, scale, needs, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gy, x, weight, a, b, lora_x, mask, _, ctx.scale, ctx.needs, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, weight, a, b, lora_x, mask)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        gy, x, weight, a, b, lora_x, mask = ctx.saved_tensors
        needs = ctx.needs
        wanted = (needs.x, needs.weight, needs.bias, needs.a or needs.b, needs.a or needs.b, needs.lora_x)
        vx, vw, vbias, va, vb, vlx = (v if w else None for v, w in zip(grad_outputs, wanted, strict=True))
        xl, vl = (x, vx) if lora_x is None else (lora_x, vlx)
        dtype = arithmetic(x)
        gy_, xl_, b_, kept = (
            t.to(dtype) for t in (gy, xl, b, a if mask is None else a.masked_fill(~mask, 0.0))
        )
        gh = ctx.scale * (gy_ @ b_)
        to_gy, to_x, to_weight, to_a, to_b, to_xl = _Sum(), _Sum(), _Sum(), _Sum(), _Sum(), _Sum()
        if vx is not None and weight is not None:
            to_gy.add(vx @ weight.T)
            to_weight.add(gy.T @ vx)
        if vw is not None:
            to_gy.add(x @ vw.T)
            to_x.add(gy @ vw)
        if vbias is not None:
            to_gy.add(vbias.to(gy.dtype).expand_as(gy))
        if vl is not None:
            vl_ = vl.to(dtype)
            vh = vl_ @ kept.T
            to_gy.add(ctx.scale * (vh @ b_.T))
            to_a.add(gh.T @ vl_)
            to_b.add(ctx.scale * (gy_.T @ vh))
        if va is not None:
            va_ = va.to(dtype) if mask is None else va.to(dtype).masked_fill(~mask, 0.0)
            vh = xl_ @ va_.T
            to_gy.add(ctx.scale * (vh @ b_.T))
            to_b.add(ctx.scale * (gy_.T @ vh))
            to_xl.add(gh @ va_)
        if vb is not None:
            vb_ = vb.to(dtype)
            vgh = ctx.scale * (gy_ @ vb_)
            to_gy.add(ctx.scale * ((xl_ @ kept.T) @ vb_.T))
            to_a.add(vgh.T @ xl_)
            to_xl.add(vgh @ kept)
        of_a = to_a.of(a)
        if of_a is not None and mask is not None:
            of_a = of_a.masked_fill(~mask, 0.0)
        if lora_x is None:
            for term in to_xl.terms:
                to_x.add(term)
        of_lora_x = None if lora_x is None else to_xl.of(lora_x)
        return (
            to_gy.of(gy), to_x.of(x), None if weight is None else to_weight.of(weight), of_a, to_b.of(b),
            of_lora_x, None, None, None, None, None,
        )  # fmt: skip


class _Sum:
    """Terms of a gradient."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, term: Tensor) -> None:
        self.terms.append(term)

    def of(self, like: Tensor) -> Tensor | None:
        return sum(self.terms[1:], self.terms[0]).to(like.dtype) if self.terms else None
