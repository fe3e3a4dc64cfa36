"""The gates of FocusLayer: what it does with the result of its attention.

Not among the public ops: it is a part of ``fastkit.nn.FocusLayer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkit import _native
from fastkit._autograd import Function, autocasts, differentiates, transforms
from fastkit._dispatch import choose
from fastkit.reference import focus_gates as reference

KERNELS = {"cpu": (torch.float32,)}

if _native.REASON is None:
    _reset = torch.ops.fastkit.focus_gates_reset.default
    _update = torch.ops.fastkit.focus_gates_update.default
    _update_bwd = torch.ops.fastkit.focus_gates_update_bwd.default
    _reset_bwd_ = torch.ops.fastkit.focus_gates_reset_bwd_.default

    @torch.library.register_fake("fastkit::focus_gates_reset")
    def _fake_reset(logits: Tensor, y: Tensor) -> Tensor:
        return y.new_empty(y.shape)

    @torch.library.register_fake("fastkit::focus_gates_update")
    def _fake_update(logits: Tensor, m: Tensor, residual: Tensor) -> Tensor:
        return m.new_empty(m.shape)

    @torch.library.register_fake("fastkit::focus_gates_update_bwd")
    def _fake_update_bwd(go: Tensor, logits: Tensor, m: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return logits.new_empty(logits.shape), m.new_empty(m.shape)

    @torch.library.register_fake("fastkit::focus_gates_reset_bwd_")
    def _fake_reset_bwd(glogits: Tensor, gs: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return y.new_empty(y.shape)


def focus_gates(logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """``o = residual + sigmoid(u) (silu(h + (silu(r) y) weight^T) - residual)``.

    Logits (..., 3 C) of r, u and h, in turn; y and residual (..., C); weight (C, C) -> o (..., C), in the
    dtype of residual. In float32 on a CPU two passes over memory, and two back; else PyTorch's operations.
    Keeps for backward its inputs and two products, silu(r) y and that times weight.

    Source: Lutati, Zimerman, Wolf, EMNLP 2023, eq. 11-14, with the gates of MEGA.
    """
    single = all(t.dtype == torch.float32 for t in (logits, y, weight, residual))
    if not single or autocasts(y) or transforms() or choose("focus_gates", None, y, KERNELS) == "reference":
        return reference.focus_gates(logits, y, weight, residual)
    rows = logits.flatten(0, -2), y.flatten(0, -2), weight, residual.flatten(0, -2)
    if differentiates(*rows):
        return _FocusGates.apply(*rows)[0].view_as(residual)
    s = _reset(*rows[:2])
    return _update(rows[0], s @ weight.T, rows[3]).view_as(residual)


class _FocusGates(Function):
    @staticmethod
    def forward(logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = _reset(logits, y)
        m = s @ weight.T
        return _update(logits, m, residual), s, m

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, s, m = output
        ctx.mark_non_differentiable(s, m)
        ctx.save_for_backward(*inputs, s, m)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _Gradients.apply(grad_outputs[0], *ctx.saved_tensors)


class _Gradients(Function):
    @staticmethod
    def forward(
        go: Tensor, logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor, s: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        glogits, gresidual = _update_bwd(go, logits, m, residual)
        gm = glogits[:, 2 * m.shape[1] :]  # what m is added to has the same gradient
        gy = _reset_bwd_(glogits, gm @ weight, logits, y)
        return glogits, gy, gm.T @ s, gresidual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """By PyTorch, of the gradient of the reference."""
        with torch.enable_grad():
            go, *inputs = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            first = torch.autograd.grad(reference.focus_gates(*inputs), inputs, go, create_graph=True)
            return *torch.autograd.grad(first, (go, *inputs), grad_outputs, allow_unused=True), None, None
