"""What lora_linear and the pruning of its A refuse, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkit._autograd import transforms
from fastkit.ops._checks import FLOATING, arithmetic, check_device, check_tensors, shape


def check_rows(op: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: x must be floating point and real, got {x.dtype}; cast it to torch.float32")
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
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: scale must be a number, got {type(scale).__name__}; pass float(scale)")
    columns = x.shape[-1]
    if weight is not None:
        _check_like(op, "weight", weight, x)
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise ValueError(
                f"{op}: weight must have shape (O, D) with D = {columns}, got {shape(weight)};"
                " a transposed weight, as of Conv1D, is passed as weight.T"
            )
    outputs = (
        lora_b.shape[0] if weight is None and lora_b.dim() == 2 else -1 if weight is None else weight.shape[0]
    )
    if bias is not None:
        _check_like(op, "bias", bias, x)
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{op}: bias must have shape (O,) = ({outputs},), got {shape(bias)}")
    _check_adapter(op, "lora_a", lora_a, x)
    if lora_a.dim() != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != columns:
        raise ValueError(
            f"{op}: lora_a must have shape (R, D) with R >= 1 and D = {columns}, got {shape(lora_a)}"
        )
    _check_adapter(op, "lora_b", lora_b, x)
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
        _check_like(op, "lora_x", lora_x, x)
        if lora_x.shape != x.shape:
            raise ValueError(
                f"{op}: lora_x must have the shape of x, {shape(x)}, got {shape(lora_x)};"
                " it is x after dropout"
            )


def check_pruning(op: str, matrices: Sequence[Tensor], norms: Sequence[Tensor], ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{op}: ratio must be a number, got {type(ratio).__name__}; pass float(ratio)")
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
        if norm.device != matrix.device:
            raise RuntimeError(
                f"{op}: {of_norm} must be on the device of {name}, {matrix.device}, got {norm.device};"
                f" move it with {of_norm}.to({name}.device)"
            )
        if norm.dtype != torch.float32:
            raise TypeError(f"{op}: {of_norm} must be torch.float32, got {norm.dtype}; cast it")
        if tuple(norm.shape) != (matrix.shape[1],):
            raise ValueError(
                f"{op}: {of_norm} must have shape (D,) = ({matrix.shape[1]},), got {shape(norm)};"
                " column_norms(x) gives it"
            )


def check_values(norms: Sequence[Tensor]) -> None:
    """For the reference on a CPU; the CPU's kernel has the same check."""
    for norm in norms:
        if norm.device.type != "cpu" or torch.compiler.is_compiling() or transforms():
            continue
        bad = ~(norm.isfinite() & (norm >= 0))
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise RuntimeError(
                f"prune_rows_: input_norm must be finite and not negative, got {float(norm[i]):g} at index"
                f" {i}; leave out batches whose statistic is not finite"
            )


def _check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    check_device(op, name, tensor, x)
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype};"
            f" cast it with {name}.to(x.dtype), or run under torch.autocast"
        )


def _check_adapter(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    check_device(op, name, tensor, x)
    if tensor.dtype not in (x.dtype, arithmetic(x)):
        also = f" or {arithmetic(x)}" if arithmetic(x) != x.dtype else ""
        raise TypeError(
            f"{op}: {name} must be {x.dtype}{also} for x of {x.dtype}, got {tensor.dtype};"
            f" cast it with {name}.to(x.dtype), or run under torch.autocast"
        )
