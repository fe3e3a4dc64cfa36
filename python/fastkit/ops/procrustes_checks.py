"""What polar and procrustes refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import check_floating, check_like, shape


def check_polar(op: str, m: Tensor) -> None:
    _check_dtype(op, "m", m)
    if m.dim() < 2 or m.shape[-1] != m.shape[-2]:
        raise ValueError(
            f"{op}: m must have shape (..., D, D), got {shape(m)};"
            " of a rectangular matrix, procrustes(torch.eye(m.shape[1]), m.mT) has the factor"
        )


def check_procrustes(op: str, source: Tensor, target: Tensor) -> None:
    _check_dtype(op, "source", source)
    if source.dim() != 2 or source.shape[1] < 1:
        raise ValueError(f"{op}: source must have shape (N, D) with D >= 1, got {shape(source)}")
    check_like(op, "target", target, source, "source")
    if target.dim() != 2 or target.shape[0] != source.shape[0] or target.shape[1] < 1:
        raise ValueError(
            f"{op}: target must have shape (N, E) with N = {source.shape[0]} and E >= 1, got {shape(target)};"
            " row i of source belongs to row i of target"
        )


def check_finite(op: str, m: Tensor, count: int) -> None:  # (B, P, Q), some of `count` matrices
    bad = int((~m.isfinite().flatten(1).all(1)).sum())
    if bad:
        what = "m" if op == "polar" else "source and target"
        raise torch.linalg.LinAlgError(  # pyright: ignore[reportPrivateImportUsage]
            f"{op}: {what} must be finite and not overflow, got NaN or inf in {bad} of {count} matrices;"
            " leave out what is not finite"
        )


def _check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(
            f"{op}: {name} must be real, got {tensor.dtype}; the unitary factor is u @ vh of torch.linalg.svd"
        )
    check_floating(op, name, tensor)
