"""What moments and merge_moments refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import (
    check_device,
    check_floating,
    check_like_or_widened,
    check_not_negative,
    check_tensors,
    shape,
)
from fastkit.reference import Moments


def check_moments(op: str, x: Tensor, weights: Tensor | None) -> None:
    check_floating(op, "x", x)
    if x.dim() != 2:
        raise ValueError(
            f"{op}: x must have shape (N, D), got {shape(x)}; pass x.reshape(-1, D), or x[None] for one row"
        )
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x must have D >= 1, got {shape(x)}; skip the call for D = 0")
    if weights is None:
        return
    check_like_or_widened(op, "weights", weights, x, cure="cast it with {name}.to({dtype})")
    if tuple(weights.shape) != (x.shape[0],):
        raise ValueError(f"{op}: weights must have shape (N,) = ({x.shape[0]},), got {shape(weights)}")


def check_values(op: str, weights: Tensor | None) -> None:
    if weights is not None:
        check_not_negative(op, "weights", weights, "leave that row out, or give it the weight 0")


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
            check_device(op, f"{name}.{field}", tensor, a.mean, "a.mean")
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"{op}: b must have the D of a, {a.mean.shape[0]}, got {b.mean.shape[0]};"
            " only rows of one width can be merged"
        )
