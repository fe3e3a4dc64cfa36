"""What every op refuses alike, in words."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float64, *HALF)


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on x."""
    return torch.float32 if x.dtype in HALF else x.dtype


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """That they are dense tensors; a name with a trailing underscore may also be None."""
    for name, tensor in tensors.items():
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            continue
        if tensor is None and name.endswith("_"):
            continue
        name = name.removesuffix("_")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}; pass {name}.to_dense()")


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device};"
            f" move it with {name}.to(x.device)"
        )
