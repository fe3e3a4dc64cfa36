"""Chooses the implementation of a call: what ``impl=`` means, for every op alike."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from fastkit import _native

Impl = Literal["reference", "cpu", "cuda", "triton"]
Kernels = Mapping[str, tuple[torch.dtype, ...]]
"""Of one op: implementation -> the dtypes that it covers. What is absent does not exist."""


class InPyTorch(dict[str, tuple[torch.dtype, ...]]):
    """Of an op whose kernel for CUDA is written in PyTorch's own operations: that needs no library."""


IMPLS: tuple[Impl, ...] = ("reference", "cpu", "cuda", "triton")
_OF_DEVICE: dict[str, tuple[Impl, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the best one first
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # now: a traced function cannot look for it


def unavailable(impl: str, kernels: Kernels) -> str | None:
    """Why ``impl`` of an op cannot run in this installation, or None when it can."""
    if impl == "reference":
        return None
    if impl not in kernels:
        return "this op has no such implementation"
    if impl == "cuda" and isinstance(kernels, InPyTorch):
        return _no_device()
    if impl == "triton":
        if not _HAS_TRITON:
            return "triton is not installed; pip install 'fastkit[triton]'"
        if _interpreting():
            return None
        return _no_device() or _missing_build_tool()
    if _native.REASON is not None:
        return _native.REASON
    if impl == "cuda":
        if _native.BUILD_INFO["cuda"] is None:
            return f"the library was built without CUDA; {_native.BUILD_CUDA}"
        reason, driver = _no_device(), cuda_driver()
        if not driver:
            return reason and "no CUDA device: there is no NVIDIA driver"
        return reason or _driver_too_old(driver, "the library", _native.BUILD_INFO["cuda"])
    return None


def check_impl(op: str, impl: Impl | None) -> None:
    """That there is such a name."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)} or None, got {impl!r}")


def choose(op: str, impl: Impl | None, x: torch.Tensor, kernels: Kernels) -> Impl:
    """The implementation that runs ``op`` on tensors like ``x``.

    ``impl=None`` takes the first kernel of x's device that covers the dtype and can run, else the reference;
    a name runs exactly that or raises RuntimeError, and never falls back.
    """
    device = x.device.type
    if impl is None:
        covering = _covering(x, kernels)
        for name in covering:
            if unavailable(name, kernels) is None:
                return name
        if covering:
            _native.warn_once(_why_not(covering, kernels))
        return "reference"
    check_impl(op, impl)
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


def covered(
    op: str, impl: Impl | None, x: torch.Tensor, kernels: Kernels, chosen: Impl, *, absent: str | None
) -> Impl:
    """What runs a call for which ``chosen`` was chosen, where ``absent`` of it has no kernel there."""
    if absent is None:
        return chosen
    lack = f'impl="{chosen}" has no {absent}'
    others: list[Impl] = [name for name in _covering(x, kernels) if name != chosen]
    if impl is not None:
        raise RuntimeError(f'{op}: {lack}; use impl="{others[0] if others else "reference"}"')
    _native.warn_once(f"{lack}; {_why_not(others, kernels)}" if others else lack)
    return "reference"


def _covering(x: torch.Tensor, kernels: Kernels) -> list[Impl]:
    """The implementations with kernels for x's device and dtype, the best one first."""
    return [name for name in _OF_DEVICE.get(x.device.type, ()) if x.dtype in kernels.get(name, ())]


def _why_not(impls: list[Impl], kernels: Kernels) -> str:
    return "; ".join(f'impl="{name}" cannot run: {unavailable(name, kernels)}' for name in impls)


def _no_device() -> str | None:
    """Why torch has no CUDA device, or None when it has one. Of a driver only a library with CUDA knows."""
    if torch.cuda.is_available():
        return None
    driver = cuda_driver()
    if not driver:
        return "no CUDA device"
    if torch.version.cuda is None:
        return "torch was built without CUDA, and there is an NVIDIA driver; install a CUDA build of torch"
    return _driver_too_old(driver, "torch", torch.version.cuda) or (
        "no CUDA device, though there is an NVIDIA driver; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    )


def _driver_too_old(driver: str, whose: str, cuda: str) -> str | None:
    """A driver runs what was built with any CUDA of its own major version, or of an older one."""
    if int(driver.split(".")[0]) >= int(cuda.split(".")[0]):
        return None
    return f"the driver is too old: it runs CUDA {driver}, {whose} has {cuda}; update the NVIDIA driver"


def cuda_driver() -> str:
    """The newest CUDA that the driver runs, as "13.0"; empty without one, and where no library can tell."""
    return _ask_driver()


def _missing_build_tool() -> str | None:
    return _search_build_tools()


# As torch.compiler.assume_constant_result has it, which would import the compiler: these cannot be traced.
cuda_driver._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_missing_build_tool._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _ask_driver() -> str:
    """Not at import: it opens the driver's library, if nothing has yet."""
    if not _native.BUILD_INFO.get("cuda"):
        return ""
    return torch.ops.fastkit.cuda_driver_version()


@functools.cache
def _search_build_tools() -> str | None:
    """What is not there of the C compiler and Python's headers, with which Triton builds its launcher.

    It is looked for where ``triton.runtime.build`` does, and headers also where gcc and clang do.
    """
    import sysconfig  # torch alone does not

    compiler = os.environ.get("CC")
    if compiler is not None:
        if shutil.which(compiler) is None:
            return f"no C compiler {compiler!r} (set CC)"
    elif shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler (set CC)"
    scheme = sysconfig.get_default_scheme()
    folders = [sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)]
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        folders += filter(None, os.environ.get(variable, "").split(os.pathsep))
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return "no Python.h (install python3-dev)"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
