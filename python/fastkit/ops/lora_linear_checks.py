"""What lora_linear and the pruning of its A refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkit._autograd import transforms
from fastkit.ops._checks import (
    FLOATING,
    MOST,
    check_device,
    check_floating,
    check_like,
    check_like_or_widened,
    check_not_expanded,
    check_not_negative,
    check_number,
    check_tensors,
    shape,
)

_CURE = "cast it with {name}.to(x.dtype), or run under torch.autocast"


def check_rows(op: str, x: Tensor) -> None:
    check_floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape (..., D), got a number; pass x[None]")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have D >= 1, got {shape(x)}; skip the call for D = 0")


def check_linear(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: Tensor | None,
    lora_x: Tensor | None,
) -> None:
    """``weight`` is None where the low-rank part is alone."""
    check_rows(op, x)
    check_number(op, "scale", scale)
    if isinstance(scale, int) and abs(scale) > MOST:
        raise ValueError(
            f"{op}: scale must be a number that float64 has, got one of {scale.bit_length()} bits"
        )
    columns = x.shape[-1]
    if weight is not None:
        check_like(op, "weight", weight, x, cure=_CURE)
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise ValueError(
                f"{op}: weight must have shape (O, D) with D = {columns}, got {shape(weight)};"
                " a transposed weight, as of Conv1D, is passed as weight.T"
            )
    outputs = (
        lora_b.shape[0] if weight is None and lora_b.dim() == 2 else -1 if weight is None else weight.shape[0]
    )
    if bias is not None:
        check_like(op, "bias", bias, x, cure=_CURE)
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{op}: bias must have shape (O,) = ({outputs},), got {shape(bias)}")
    check_like_or_widened(op, "lora_a", lora_a, x, cure=_CURE)
    if lora_a.dim() != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != columns:
        raise ValueError(
            f"{op}: lora_a must have shape (R, D) with R >= 1 and D = {columns}, got {shape(lora_a)}"
        )
    check_like_or_widened(op, "lora_b", lora_b, x, cure=_CURE)
    if tuple(lora_b.shape) != (outputs, lora_a.shape[0]):
        raise ValueError(
            f"{op}: lora_b must have shape (O, R) = ({outputs}, {lora_a.shape[0]}), got {shape(lora_b)}"
        )
    if mask is not None:
        check_device(op, "mask", mask, x)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: mask must be bool, True where A is kept, got {mask.dtype}; pass mask != 0"
            )
        if mask.shape != lora_a.shape:
            raise ValueError(
                f"{op}: mask must have the shape of lora_a, {shape(lora_a)}, got {shape(mask)};"
                " expand one that is shared by rows"
            )
    if lora_x is not None:
        check_like(op, "lora_x", lora_x, x, cure=_CURE)
        if lora_x.shape != x.shape:
            raise ValueError(
                f"{op}: lora_x must have the shape of x, {shape(x)}, got {shape(lora_x)};"
                " it is x after dropout"
            )


def check_pruning(op: str, matrices: Sequence[Tensor], norms: Sequence[Tensor], ratio: float) -> None:
    check_number(op, "ratio", ratio)
    if not 0.0 <= ratio < 1.0:
        raise ValueError(
            f"{op}: ratio must be in [0, 1), got {ratio}; it is the share of a row that is zeroed"
        )
    if len(matrices) != len(norms):
        raise ValueError(
            f"{op}: input_norms must be one for each of the {len(matrices)} matrices, got {len(norms)}"
        )
    for i, (matrix, norm) in enumerate(zip(matrices, norms, strict=True)):
        name, of_norm = (
            ("lora_a", "input_norm") if op == "prune_rows_" else (f"lora_as[{i}]", f"input_norms[{i}]")
        )
        check_tensors(op, **{name: matrix, of_norm: norm})
        if matrix.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be floating point and real, got {matrix.dtype}")
        if matrix.dim() != 2:
            raise ValueError(f"{op}: {name} must have shape (R, D), got {shape(matrix)}")
        if matrix.device != matrices[0].device:
            raise RuntimeError(
                f"{op}: {name} must be on the device of the first, {matrices[0].device}, got {matrix.device};"
                " prune those of each device by a call of their own"
            )
        check_device(op, of_norm, norm, matrix, name)
        if norm.dtype != torch.float32:
            raise TypeError(f"{op}: {of_norm} must be torch.float32, got {norm.dtype}; cast it")
        if tuple(norm.shape) != (matrix.shape[1],):
            raise ValueError(
                f"{op}: {of_norm} must have shape (D,) = ({matrix.shape[1]},), got {shape(norm)};"
                " column_norms(x) gives it"
            )


def check_written(op: str, matrices: list[Tensor]) -> None:
    """That no entry is written to twice, as far as that is told at a glance."""
    single = op == "prune_rows_"
    for i, matrix in enumerate(matrices):
        check_not_expanded(op, "lora_a" if single else f"lora_as[{i}]", matrix)
    if single or torch.compiler.is_compiling() or transforms():  # which have no addresses
        return
    first: dict[int, int] = {}
    for i, matrix in enumerate(matrices):
        j = first.setdefault(matrix.data_ptr(), i) if matrix.numel() else i
        if j != i:
            raise ValueError(
                f"{op}: lora_as must not share memory, got lora_as[{i}] at the address of lora_as[{j}];"
                " list each matrix once"
            )


def check_values(norms: Sequence[Tensor]) -> None:
    for norm in norms:
        cure = "leave out batches whose statistic is not finite"
        check_not_negative("prune_rows_", "input_norm", norm, cure)
