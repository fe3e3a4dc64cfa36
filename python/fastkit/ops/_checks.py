"""The dtypes that ops have, and what every op refuses alike, in words.

``like`` is the tensor that others are held to, and ``of`` its name in the message.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastkit._autograd import transforms

HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float64, *HALF)
MOST = sys.float_info.max  # an int may be larger, which no float64 is


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on x."""
    return torch.float32 if x.dtype in HALF else x.dtype


def widened(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Half precision in float32: what autocast does to ops whose results would not survive its rounding."""
    return tuple(t.float() if t is not None and t.dtype in HALF else t for t in tensors)


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """That they are dense tensors; a name with a trailing underscore may also be None."""
    for name, tensor in tensors.items():
        if type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested:
            continue
        if tensor is None and name.endswith("_"):
            continue
        name = name.removesuffix("_")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()")
        if tensor.is_nested:
            raise TypeError(f"{op}: {name} must be dense, got a nested tensor; pass its tensors one by one")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {tensor.layout}; pass {name}.to_dense()")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be floating point and real, got {tensor.dtype}; cast it to torch.float32"
        )


def check_device(op: str, name: str, tensor: Tensor, like: Tensor, of: str = "x") -> None:
    if tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of {of}, {like.device}, got {tensor.device};"
            f" move it with {name}.to({of}.device)"
        )


_CAST = "cast it with {name}.to({of}.dtype)"


def check_like(op: str, name: str, tensor: Tensor, like: Tensor, of: str = "x", *, cure: str = _CAST) -> None:
    """Device and dtype. ``cure`` is formatted with name, of, and the dtype of the arithmetic."""
    check_device(op, name, tensor, like, of)
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {of}, {like.dtype}, got {tensor.dtype};"
            f" {cure.format(name=name, of=of, dtype=arithmetic(like))}"
        )


def check_like_or_widened(
    op: str, name: str, tensor: Tensor, like: Tensor, of: str = "x", *, cure: str = _CAST
) -> None:
    """As ``check_like``, but the dtype may also be that of the arithmetic."""
    check_device(op, name, tensor, like, of)
    if tensor.dtype not in (like.dtype, arithmetic(like)):
        also = f" or {arithmetic(like)}" if arithmetic(like) != like.dtype else ""
        raise TypeError(
            f"{op}: {name} must be {like.dtype}{also} for {of} of {like.dtype}, got {tensor.dtype};"
            f" {cure.format(name=name, of=of, dtype=arithmetic(like))}"
        )


def may_look_at(tensor: Tensor) -> bool:
    """Whether values can be had, without waiting for a device."""
    eager = not torch.compiler.is_compiling() and not transforms()
    return eager and tensor.device.type == "cpu" and type(tensor.detach()) is Tensor  # else a fake one


def check_not_negative(op: str, name: str, tensor: Tensor, cure: str) -> None:  # (n,)
    """And finite; where values may be looked at. A CPU's kernel does it as it reads them."""
    if not may_look_at(tensor):
        return
    tensor = tensor.detach()
    bad = ~(tensor.isfinite() & (tensor >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise RuntimeError(
            f"{op}: {name} must be finite and not negative, got {float(tensor[i]):g} at index {i}; {cure}"
        )


def check_one_device(op: str, like: Tensor, *others: Tensor | None) -> None:
    """For fake implementations: one argument on the meta device is enough for the dispatcher to call them."""
    for other in others:
        if other is not None and other.device != like.device:
            raise RuntimeError(f"{op}: tensors must be on one device, got {like.device}, {other.device}")


def check_not_expanded(op: str, name: str, tensor: Tensor) -> None:
    """For what is written to, entry by entry."""
    strides = tensor.stride()
    if 0 in strides and any(n > 1 and step == 0 for n, step in zip(tensor.shape, strides, strict=True)):
        raise ValueError(
            f"{op}: {name} must have its own memory for each entry, got an expanded tensor of shape"
            f" {shape(tensor)}; pass {name}.clone()"
        )


def check_int(op: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}; pass int({name})")


def check_number(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}; pass float({name})")
