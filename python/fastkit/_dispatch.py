"""Chooses the implementation of a call: what ``impl=`` means, for every op alike."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Literal

import torch

from fastkit import _native

Impl = Literal["reference", "cpu", "cuda", "triton"]
Kernels = Mapping[str, tuple[torch.dtype, ...]]
"""Of one op: implementation -> the dtypes that it covers. What is absent does not exist."""

IMPLS: tuple[Impl, ...] = ("reference", "cpu", "cuda", "triton")
_OF_DEVICE: dict[str, tuple[Impl, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the best one first
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # now: a traced function cannot look for it


def unavailable(impl: str, kernels: Kernels) -> str | None:
    """Why ``impl`` of an op cannot run in this installation, or None when it can."""
    if impl == "reference":
        return None
    if impl not in kernels:
        return "this op has no such implementation"
    if impl == "triton":
        if not _HAS_TRITON:
            return "triton is not installed; pip install 'fastkit[triton]'"
        return None if torch.cuda.is_available() or _interpreting() else "no CUDA device"
    if _native.REASON is not None:
        return _native.REASON
    if impl == "cuda":
        if _native.BUILD_INFO["cuda"] is None:
            return "the library was built without CUDA (no nvcc found); rebuild with FASTKIT_CUDA=ON"
        if not torch.cuda.is_available():
            return "no CUDA device"
    return None


def choose(op: str, impl: Impl | None, x: torch.Tensor, kernels: Kernels) -> Impl:
    """The implementation that runs ``op`` on tensors like ``x``.

    ``impl=None`` takes the first kernel of x's device that covers the dtype and can run, else the reference;
    a name runs exactly that or raises RuntimeError, and never falls back.
    """
    device = x.device.type
    if impl is None:
        here = _OF_DEVICE.get(device, ())
        covering: list[Impl] = [name for name in here if x.dtype in kernels.get(name, ())]
        for name in covering:
            if unavailable(name, kernels) is None:
                return name
        if covering:
            _native.warn_once()
        return "reference"
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)} or None, got {impl!r}")
    if impl == "reference":
        return impl
    reason = unavailable(impl, kernels)
    if reason is not None:
        raise RuntimeError(f'{op}: impl="{impl}" cannot run: {reason}; use impl="reference"')
    if device != ("cpu" if impl == "cpu" or (impl == "triton" and _interpreting()) else "cuda"):
        raise RuntimeError(f'{op}: impl="{impl}" cannot run on a {device} tensor; use impl=None')
    if x.dtype not in kernels[impl]:
        names = ", ".join(str(dtype) for dtype in kernels[impl])
        raise RuntimeError(f'{op}: impl="{impl}" covers {names}, got {x.dtype}; use impl="reference"')
    return impl


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
