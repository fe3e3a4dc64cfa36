"""What moments and merge_moments refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit._autograd import transforms
from fastkit.ops._checks import FLOATING, arithmetic, check_device, check_tensors, shape
from fastkit.reference import Moments


def check_moments(op: str, x: Tensor, weights: Tensor | None) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: x must be floating point and real, got {x.dtype}; cast it to torch.float32")
    if x.dim() != 2:
        raise ValueError(
            f"{op}: x must have shape (N, D), got {shape(x)}; pass x.reshape(-1, D), or x[None] for one row"
        )
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x must have D >= 1, got {shape(x)}; skip the call for D = 0")
    if weights is None:
        return
    check_device(op, "weights", weights, x)
    if weights.dtype not in (x.dtype, arithmetic(x)):
        also = f" or {arithmetic(x)}" if arithmetic(x) != x.dtype else ""
        raise TypeError(
            f"{op}: weights must be {x.dtype}{also} for x of {x.dtype}, got {weights.dtype};"
            f" cast it with weights.to({arithmetic(x)})"
        )
    if tuple(weights.shape) != (x.shape[0],):
        raise ValueError(f"{op}: weights must have shape (N,) = ({x.shape[0]},), got {shape(weights)}")


def check_values(op: str, weights: Tensor | None) -> None:
    """On a CPU, where that waits for nothing: a value cannot be looked at in a traced function."""
    if weights is None or weights.device.type != "cpu" or torch.compiler.is_compiling() or transforms():
        return
    weights = weights.detach()
    if type(weights) is not Tensor:  # a fake one
        return
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise RuntimeError(
            f"{op}: weights must be finite and not negative, got {float(weights[i]):g} at index {i};"
            " leave that row out, or give it the weight 0"
        )


def check_merge(op: str, a: Moments, b: Moments) -> None:
    for name, some in (("a", a), ("b", b)):
        if not isinstance(some, Moments):
            raise TypeError(
                f"{op}: {name} must be a Moments, got {type(some).__name__}; pass what moments returns,"
                " or Moments(count, mean, scatter)"
            )
        check_tensors(op, **{f"{name}.{field}": tensor for field, tensor in some._asdict().items()})
        if some.count.dtype != torch.float64 or some.count.dim() != 0:
            raise TypeError(
                f"{op}: {name}.count must be a torch.float64 of shape (), got {some.count.dtype} of shape"
                f" {shape(some.count)}; cast it with {name}.count.double()"
            )
        if some.mean.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{op}: {name}.mean must be torch.float32 or torch.float64, got {some.mean.dtype};"
                f" cast it with {name}.mean.float()"
            )
        if some.mean.dim() != 1:
            raise ValueError(f"{op}: {name}.mean must have shape (D,), got {shape(some.mean)}")
        if some.scatter.dtype != some.mean.dtype:
            raise TypeError(
                f"{op}: {name}.scatter must have the dtype of {name}.mean, {some.mean.dtype}, got"
                f" {some.scatter.dtype}; cast it with {name}.scatter.to({name}.mean.dtype)"
            )
        columns = some.mean.shape[0]
        if tuple(some.scatter.shape) != (columns, columns):
            raise ValueError(
                f"{op}: {name}.scatter must have shape (D, D) = ({columns}, {columns}),"
                f" got {shape(some.scatter)}"
            )
        for field, tensor in some._asdict().items():
            if tensor.device != a.mean.device:
                raise RuntimeError(
                    f"{op}: {name}.{field} must be on the device of a.mean, {a.mean.device}, got"
                    f" {tensor.device}; move it with {name}.{field}.to(a.mean.device)"
                )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"{op}: b must have the D of a, {a.mean.shape[0]}, got {b.mean.shape[0]};"
            " only rows of one width can be merged"
        )
