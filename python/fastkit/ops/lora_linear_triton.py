"""The Triton kernels of lora_linear as PyTorch ops. Triton is imported when the first of them runs.

They have the signatures of the native ops in csrc/schema.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastkit_triton", "FRAGMENT")
_SIGNATURES = (
    "lora_linear_fwd_(Tensor(a!) y, Tensor x, Tensor? lora_x, Tensor a, Tensor? mask, Tensor b, float scale,"
    " bool needs_square_sum) -> (Tensor, Tensor)",
    "lora_linear_bwd_(Tensor(a!)? gx, Tensor gy, Tensor x, Tensor h, Tensor a, Tensor? mask, Tensor b,"
    " float scale, bool adds, bool needs_adapter, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    "column_square_sums(Tensor x) -> Tensor",
)
for _signature in _SIGNATURES:
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


def _forward_(
    y: Tensor, x: Tensor, lora_x: Tensor | None, a: Tensor, mask: Tensor | None, b: Tensor, scale: float,
    needs_square_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastkit.triton import lora_linear

    return lora_linear.forward_(y, x, lora_x, a, mask, b, scale, needs_square_sum)


def _backward_(
    gx: Tensor | None, gy: Tensor, x: Tensor, h: Tensor, a: Tensor, mask: Tensor | None, b: Tensor,
    scale: float, adds: bool, needs_adapter: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastkit.triton import lora_linear

    return lora_linear.backward_(gx, gy, x, h, a, mask, b, scale, adds, needs_adapter, needs_bias)


def _column_square_sums(x: Tensor) -> Tensor:
    from fastkit.triton import lora_linear

    return lora_linear.column_square_sums(x)


for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _library.impl("lora_linear_fwd_", _forward_, _device)
    _library.impl("lora_linear_bwd_", _backward_, _device)
    _library.impl("column_square_sums", _column_square_sums, _device)


@torch.library.register_fake("fastkit_triton::lora_linear_fwd_", lib=_library)
def _(
    y: Tensor, x: Tensor, lora_x: Tensor | None, a: Tensor, mask: Tensor | None, b: Tensor, scale: float,
    needs_square_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = x.new_empty((x.shape[0], a.shape[0]), dtype=torch.float32)
    return h, x.new_empty(a.shape[1] if needs_square_sum else 0, dtype=torch.float32)


@torch.library.register_fake("fastkit_triton::lora_linear_bwd_", lib=_library)
def _(
    gx: Tensor | None, gy: Tensor, x: Tensor, h: Tensor, a: Tensor, mask: Tensor | None, b: Tensor,
    scale: float, adds: bool, needs_adapter: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        h.new_empty(a.shape if needs_adapter else 0),
        h.new_empty(b.shape if needs_adapter else 0),
        h.new_empty(b.shape[0] if needs_bias else 0),
    )


@torch.library.register_fake("fastkit_triton::column_square_sums", lib=_library)
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


forward_: Callable[..., Any] = torch.ops.fastkit_triton.lora_linear_fwd_.default
backward_: Callable[..., Any] = torch.ops.fastkit_triton.lora_linear_bwd_.default
column_square_sums: Callable[..., Any] = torch.ops.fastkit_triton.column_square_sums.default
