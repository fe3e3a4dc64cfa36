"""The Triton kernels of iir_scan as PyTorch ops: of single filters, without states or packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit.ops._define import define_triton

MIN_CHUNK = 16  # below, a chunk is no work for a program
MAX_TIME = 2**30  # times are 32-bit numbers, a tile beyond the end included


def _fake_forward(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool, needs_x: bool,
    needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = (x.shape[0], x.shape[1], a.shape[2])
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        a.new_empty((*rows, 2) if needs_coefficients else 0),
        a.new_empty((*rows, 3) if needs_coefficients and b is not None else 0),
    )


forward: Callable[..., Any] = define_triton(
    "iir_scan_fwd(Tensor x, Tensor a, Tensor? b, int chunk, bool carry) -> Tensor",
    "iir_scan.forward",
    _fake_forward,
)
backward: Callable[..., Any] = define_triton(
    "iir_scan_bwd(Tensor gy, Tensor x, Tensor y, Tensor a, Tensor? b, int chunk, bool carry, bool needs_x,"
    " bool needs_coefficients) -> (Tensor, Tensor, Tensor)",
    "iir_scan.backward",
    _fake_backward,
)


def absent(x: Tensor, a: Tensor, chunk: int | None, cu_seqlens: Tensor | None) -> str | None:
    """What of a call the kernels do not have, or None where they cover it."""
    if cu_seqlens is not None:
        return "packed sequences"
    if a.dim() == 5 and a.shape[3] > 1:
        return "banks"
    if chunk is not None and chunk < MIN_CHUNK:
        return f"chunks of less than {MIN_CHUNK} samples"
    if x.shape[2] > MAX_TIME:
        return f"rows of more than {MAX_TIME} samples"
    return None
