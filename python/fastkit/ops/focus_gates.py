"""The gates of FocusLayer: what it does with the result of its attention.

Not among the public ops: it is a part of ``fastkit.nn.FocusLayer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import _native
from fastkit._autograd import Function, autocasts, differentiates, transforms, without_autocast
from fastkit._dispatch import choose
from fastkit.reference import focus_gates as reference

KERNELS = {"cpu": (torch.float32,)}
_BLOCK = 2**18  # elements of f: its logits are three times as large, and stay in a cache
_NARROW = 64  # of this width or less, logits are computed again as fast as they are written and read

if _native.REASON is None:
    _reset = torch.ops.fastkit.focus_gates_reset.default
    _update_ = torch.ops.fastkit.focus_gates_update_.default
    _update_bwd_ = torch.ops.fastkit.focus_gates_update_bwd_.default
    _reset_bwd_ = torch.ops.fastkit.focus_gates_reset_bwd_.default

    @torch.library.register_fake("fastkit::focus_gates_reset")
    def _fake_reset(logits: Tensor, y: Tensor) -> Tensor:
        return torch.empty_like(y)


def focus_gates(
    f: Tensor, y: Tensor, weight: Tensor, bias: Tensor, reset: Tensor, residual: Tensor
) -> Tensor:
    """``o = residual + sigmoid(u) (silu(h + (silu(r) y) reset^T) - residual)``, of ``f weight^T + bias``.

    f, y and residual (..., C); weight (3 C, C) and bias (3 C) of r, u and h, in turn; reset (C, C) -> o
    (..., C), in the dtype of residual. In float32 on a CPU by blocks of rows, so that what is made of the
    logits is never there whole; else PyTorch's operations. Keeps its inputs for backward, and the logits,
    which backward computes again where C is at most 64.

    Source: Lutati, Zimerman, Wolf, EMNLP 2023, eq. 11-14, with the gates of MEGA.
    """
    given = f, y, weight, bias, reset, residual
    single = all(t.dtype == torch.float32 for t in given)
    if not single or autocasts(f) or transforms() or choose("focus_gates", None, f, KERNELS) == "reference":
        return reference.focus_gates(*given)
    f, y, rows = (t.flatten(0, -2).contiguous() for t in (f, y, residual))
    given = f, y, weight, bias, reset, rows
    if differentiates(*given):
        return _FocusGates.apply(*given)[0].view_as(residual)
    return _run(*given, keeps=False)[0].view_as(residual)


def _blocks(f: Tensor) -> list[slice]:
    if torch.compiler.is_compiling():  # what is compiled has a block, of any number of rows
        return [slice(None)]
    step = max(1, _BLOCK // max(1, f.shape[1]))
    return [slice(begin, begin + step) for begin in range(0, len(f), step)]


def _run(
    f: Tensor, y: Tensor, weight: Tensor, bias: Tensor, reset: Tensor, residual: Tensor, *, keeps: bool
) -> tuple[Tensor, Tensor]:
    """The result; and the logits, or of them no row."""
    o = torch.empty_like(residual)
    kept = f.new_empty(len(f) if keeps else 0, len(weight))
    for rows in _blocks(f):
        logits = torch.addmm(bias, f[rows], weight.T)
        if keeps:
            kept[rows] = logits
        m = torch.mm(_reset(logits, y[rows]), reset.T, out=o[rows])
        _update_(m, logits, residual[rows])
    return o, kept


class _FocusGates(Function):
    @staticmethod
    def forward(
        f: Tensor, y: Tensor, weight: Tensor, bias: Tensor, reset: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _run(f, y, weight, bias, reset, residual, keeps=f.shape[1] > _NARROW)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        go, (kept, *inputs) = grad_outputs[0], ctx.saved_tensors
        if _batched(go):
            return _gradients_of_reference(go, *inputs)
        return _Gradients.apply(go, kept, *inputs, ctx.needs_input_grad)


def _batched(go: Tensor) -> bool:
    """Whether it is one of many gradients at once, for which the kernels that write in place have no rule."""
    if torch.compiler.is_compiling():
        return False
    return transforms() or torch._C._functorch.is_legacy_batchedtensor(go)  # pyright: ignore


def _gradients_of_reference(go: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Differentiable as often as wanted, to the graphs that go and the inputs have."""
    with torch.enable_grad(), without_autocast(go):
        inputs = tuple(t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(reference.focus_gates(*inputs), inputs, go, create_graph=True)


class _Gradients(Function):
    @staticmethod
    def forward(
        go: Tensor,
        kept: Tensor,
        f: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        reset: Tensor,
        residual: Tensor,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        """Of what needs one; of the others zeros, or what comes on the way."""
        needs_f, _, needs_weight, needs_bias, needs_reset, _ = needs
        go = go.contiguous()
        gy, gresidual = torch.empty_like(y), torch.empty_like(residual)
        gf = torch.empty_like(f) if needs_f else torch.zeros_like(f)
        gweight, gbias, greset = (torch.zeros_like(t) for t in (weight, bias, reset))
        with without_autocast(f):
            for rows in _blocks(f):
                # Of them u, h and then r become their gradients.
                logits = kept[rows].clone() if len(kept) else torch.addmm(bias, f[rows], weight.T)
                s = _reset(logits, y[rows])
                m = torch.mm(s, reset.T, out=gresidual[rows])
                _update_bwd_(logits, m, residual[rows], go[rows])
                gm = logits[:, 2 * y.shape[1] :]  # what m is added to has the same gradient
                if needs_reset:
                    greset.addmm_(gm.T, s)
                _reset_bwd_(logits, torch.mm(gm, reset, out=gy[rows]), y[rows])
                if needs_weight:
                    gweight.addmm_(logits.T, f[rows])
                if needs_bias:
                    gbias += logits.sum(0)
                if needs_f:
                    torch.mm(logits, weight, out=gf[rows])
        return gf, gy, gweight, gbias, greset, gresidual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """By PyTorch, of the gradient of the reference."""
        again = torch.is_grad_enabled()
        go, _, *inputs = ctx.saved_tensors
        with torch.enable_grad():
            go, *inputs = (
                t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (go, *inputs)
            )
            first = _gradients_of_reference(go, *inputs)
            second = torch.autograd.grad(
                first, (go, *inputs), grad_outputs, allow_unused=True, create_graph=again
            )
        return second[0], None, *second[1:], None
