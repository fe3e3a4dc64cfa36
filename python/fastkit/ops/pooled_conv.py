"""A long causal convolution, of which only maxima of cells are kept: what sets the filters of AdaptiveIIR.

Not among the public ops: ``fastkit.nn.GlobalConv.maxima`` is what it is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import _native
from fastkit._autograd import Function, differentiates
from fastkit._dispatch import choose
from fastkit.reference import pooled_conv as reference

KERNELS = {"cpu": (torch.float32, torch.float64)}

if _native.REASON is None:
    _fwd = torch.ops.fastkit.pooled_conv_fwd.default
    _bwd = torch.ops.fastkit.pooled_conv_bwd.default

    @torch.library.register_fake("fastkit::pooled_conv_fwd")
    def _fake_fwd(x: Tensor, taps: Tensor, block: int, pool: int) -> tuple[Tensor, Tensor]:
        B, T, C = x.shape
        size = B, (T - 1) // block, C, pool
        return x.new_empty(size), x.new_empty(size, dtype=torch.int32)

    @torch.library.register_fake("fastkit::pooled_conv_bwd")
    def _fake_bwd(
        gmaxima: Tensor, places: Tensor, x: Tensor, taps: Tensor, block: int, pool: int
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), taps.new_empty(taps.shape)


def pooled_conv(x: Tensor, taps: Tensor, block: int, pool: int) -> Tensor:
    """The largest ``y[t] = sum_n taps[n] x[t-n]`` of each of ``pool`` cells of a block, of all but the last.

    x (B, T, C), T >= 1, and taps (C, n), float32 or float64 -> (B, K - 1, C, pool), with K blocks of
    ``block`` samples, the last of which may be short. A maximum depends on no sample behind its block, to the
    last bit. Differentiable to any order; a gradient is the first of equal maxima's.

    Numerics: on a CPU a direct sum in the dtype of x; elsewhere sums of products of spectra.

    Complexity: O(B C T n) multiply-adds for large T; nothing of the size of x is kept but x.
    """
    if choose("pooled_conv", None, x, KERNELS) == "reference":
        return reference.pooled_conv(x, taps, block, pool)
    if differentiates(x, taps):
        return _PooledConv.apply(x, taps, block, pool)[0]
    return _fwd(x, taps, block, pool)[0]


class _PooledConv(Function):
    @staticmethod
    def forward(x: Tensor, taps: Tensor, block: int, pool: int) -> tuple[Tensor, Tensor]:
        return _fwd(x, taps, block, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, taps, *ctx.call = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, taps, output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, taps, places = ctx.saved_tensors
        return *_Gradients.apply(grad_outputs[0], places, x, taps, *ctx.call), None, None


class _Gradients(Function):
    """Of what is linear in x and in the taps, once it is known which samples are the maxima."""

    @staticmethod
    def forward(
        gmaxima: Tensor, places: Tensor, x: Tensor, taps: Tensor, block: int, pool: int
    ) -> tuple[Tensor, Tensor]:
        return _bwd(gmaxima, places, x, taps, block, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gmaxima, places, x, taps, *ctx.call = inputs
        ctx.save_for_backward(gmaxima, places, x, taps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """``<gx, u> + <gtaps, v>`` is ``<gmaxima, u * taps + x * v>`` at the places, in each linear."""
        gmaxima, places, x, taps = ctx.saved_tensors
        of_x, of_taps = grad_outputs
        block, pool = ctx.call
        ggmaxima = _at(of_x, taps, places, block) + _at(x, of_taps, places, block)
        gx, _ = _Gradients.apply(gmaxima, places, x, of_taps, block, pool)
        _, gtaps = _Gradients.apply(gmaxima, places, of_x, taps, block, pool)
        return ggmaxima, None, gx, gtaps, None, None


def _at(x: Tensor, taps: Tensor, places: Tensor, block: int) -> Tensor:
    """The convolution at the places of the maxima."""
    K = places.shape[1]
    y = reference.convolution_in_blocks(x[:, : K * block].mT, taps, block)  # (B, C, K block)
    index = places.long().permute(0, 2, 1, 3)  # (B, C, K, pool)
    return y.unflatten(2, (K, block)).gather(3, index).transpose(1, 2)
