"""The Triton kernels of iir_scan as PyTorch ops. Triton is imported when the first of them runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_CHUNK = 16  # below, a chunk is no work for a program
MAX_TIME = 2**30  # times are 32-bit numbers, a tile beyond the end included

_library = torch.library.Library("fastkit_triton", "FRAGMENT")
_SIGNATURES = (
    "iir_scan_fwd(Tensor x, Tensor a, Tensor? b, int chunk, bool carry) -> Tensor",
    "iir_scan_bwd(Tensor gy, Tensor x, Tensor y, Tensor a, Tensor? b, int chunk, bool carry, bool needs_x,"
    " bool needs_coefficients) -> (Tensor, Tensor, Tensor)",
)
for _signature in _SIGNATURES:
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


def _forward(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
    from fastkit.triton import iir_scan

    return iir_scan.forward(x, a, b, chunk, carry)


def _backward(
    gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool, needs_x: bool,
    needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastkit.triton import iir_scan

    return iir_scan.backward(gy, x, y, a, b, chunk, carry, needs_x, needs_coefficients)


for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _library.impl("iir_scan_fwd", _forward, _device)
    _library.impl("iir_scan_bwd", _backward, _device)


@torch.library.register_fake("fastkit_triton::iir_scan_fwd", lib=_library)
def _(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("fastkit_triton::iir_scan_bwd", lib=_library)
def _(
    gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool, needs_x: bool,
    needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = (x.shape[0], x.shape[1], a.shape[2])
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        a.new_empty((*rows, 2) if needs_coefficients else 0),
        a.new_empty((*rows, 3) if needs_coefficients and b is not None else 0),
    )


forward: Callable[..., Any] = torch.ops.fastkit_triton.iir_scan_fwd.default
backward: Callable[..., Any] = torch.ops.fastkit_triton.iir_scan_bwd.default


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
