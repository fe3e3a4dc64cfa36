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
    Keeps its inputs alone for backward.

    Source: Lutati, Zimerman, Wolf, EMNLP 2023, eq. 11-14, with the gates of MEGA.
    """
    single = all(t.dtype == torch.float32 for t in (logits, y, weight, residual))
    if not single or autocasts(y) or transforms() or choose("focus_gates", None, y, KERNELS) == "reference":
        return reference.focus_gates(logits, y, weight, residual)
    rows = logits.flatten(0, -2), y.flatten(0, -2), weight, residual.flatten(0, -2)
    if differentiates(*rows):
        return _FocusGates.apply(*rows).view_as(residual)
    return _run(*rows).view_as(residual)


def _run(logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return _update(logits, _reset(logits, y) @ weight.T, residual)


class _FocusGates(Function):
    @staticmethod
    def forward(logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return _run(logits, y, weight, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _Gradients.apply(grad_outputs[0], *ctx.saved_tensors)


class _Gradients(Function):
    @staticmethod
    def forward(
        go: Tensor, logits: Tensor, y: Tensor, weight: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = _reset(logits, y)
        glogits, gresidual = _update_bwd(go, logits, s @ weight.T, residual)
        gm = glogits[:, 2 * y.shape[1] :]  # what m is added to has the same gradient
        gweight = gm.T @ s
        del s  # the room for what follows
        gy = _reset_bwd_(glogits, gm @ weight, logits, y)
        return glogits, gy, gweight, gresidual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By PyTorch, of the gradient of the reference."""
        with torch.enable_grad():
            go, *inputs = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            first = torch.autograd.grad(reference.focus_gates(*inputs), inputs, go, create_graph=True)
            return torch.autograd.grad(first, (go, *inputs), grad_outputs, allow_unused=True)
