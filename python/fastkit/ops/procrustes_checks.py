"""What polar and procrustes refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import FLOATING, check_tensors, shape


def check_polar(m: Tensor) -> None:
    check_tensors("polar", m=m)
    _check_dtype("polar", "m", m)
    if m.dim() < 2 or m.shape[-1] != m.shape[-2]:
        raise ValueError(
            f"polar: m must have shape (..., D, D), got {shape(m)};"
            " of a rectangular matrix, procrustes(torch.eye(m.shape[1]), m.mT) has the factor"
        )


def check_procrustes(source: Tensor, target: Tensor) -> None:
    op = "procrustes"
    check_tensors(op, source=source, target=target)
    _check_dtype(op, "source", source)
    if source.dim() != 2 or source.shape[1] < 1:
        raise ValueError(f"{op}: source must have shape (N, D) with D >= 1, got {shape(source)}")
    if target.device != source.device:
        raise RuntimeError(
            f"{op}: target must be on the device of source, {source.device}, got {target.device};"
            " move it with target.to(source.device)"
        )
    if target.dtype != source.dtype:
        raise TypeError(
            f"{op}: target must have the dtype of source, {source.dtype}, got {target.dtype};"
            " cast it with target.to(source.dtype)"
        )
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
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be floating point and real, got {tensor.dtype}; cast it to torch.float32"
        )
