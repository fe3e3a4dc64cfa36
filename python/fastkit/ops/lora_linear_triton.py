"""The Triton kernels of lora_linear as PyTorch ops, with the signatures and fakes of the native ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define_triton


def fake_forward_(
    y: Tensor, x: Tensor, lora_x: Tensor | None, a: Tensor, mask: Tensor | None, b: Tensor, scale: float,
    needs_square_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_one_device("lora_linear", x, y, lora_x, a, mask, b)
    h = x.new_empty((x.shape[0], a.shape[0]), dtype=arithmetic(x))
    return h, x.new_empty(a.shape[1] if needs_square_sum else 0, dtype=torch.float32)


def fake_backward_(
    gx: Tensor | None, gy: Tensor, x: Tensor, h: Tensor, a: Tensor, mask: Tensor | None, b: Tensor,
    scale: float, adds: bool, needs_adapter: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_one_device("lora_linear", x, gx, gy, h, a, mask, b)
    return (
        h.new_empty(a.shape if needs_adapter else 0),
        h.new_empty(b.shape if needs_adapter else 0),
        h.new_empty(b.shape[0] if needs_bias else 0),
    )


def fake_column_square_sums(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


forward_: Callable[..., Any] = define_triton(
    "lora_linear_fwd_(Tensor(a!) y, Tensor x, Tensor? lora_x, Tensor a, Tensor? mask, Tensor b, float scale,"
    " bool needs_square_sum) -> (Tensor, Tensor)",
    "lora_linear.forward_",
    fake_forward_,
)
backward_: Callable[..., Any] = define_triton(
    "lora_linear_bwd_(Tensor(a!)? gx, Tensor gy, Tensor x, Tensor h, Tensor a, Tensor? mask, Tensor b,"
    " float scale, bool adds, bool needs_adapter, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    "lora_linear.backward_",
    fake_backward_,
)
column_square_sums: Callable[..., Any] = define_triton(
    "column_square_sums(Tensor x) -> Tensor", "lora_linear.column_square_sums", fake_column_square_sums
)
