"""What contests of different ops share: who may compete here, and results with an error of their own."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fastkit._dispatch import Impl, Kernels, unavailable
from fastkit.bench.case import Call, Skip

DeviceType = Literal["cpu", "cuda"]

SAME_WORK = "mm, same work"  # the label of what ``make_product`` makes


class Yardstick(NamedTuple):
    """What a call gives that does something else than the op, for comparison; and its own error."""

    result: Any
    measure: Callable[[Any], float]


def makers_of_ours(
    device: DeviceType, kernels: Kernels, make: Callable[[Impl | None], Call]
) -> dict[str, Callable[[], Call]]:
    """fastkit; on a GPU, each implementation that the op has for one. ``make`` is given its ``impl``."""
    if device == "cpu":
        return {"fastkit": partial(make, None)}
    return {f"fastkit {impl}": partial(_make_available, impl, kernels, make) for impl in _of_gpu(kernels)}


def _make_available(impl: Impl, kernels: Kernels, make: Callable[[Impl | None], Call]) -> Call:
    reason = unavailable(impl, kernels)
    if reason is not None:
        raise Skip(reason)
    return make(impl)


def our_others(device: DeviceType, kernels: Kernels) -> frozenset[str]:
    """The implementations that ours, the first, is not called faster than."""
    return frozenset() if device == "cpu" else frozenset(f"fastkit {impl}" for impl in _of_gpu(kernels)[1:])


def _of_gpu(kernels: Kernels) -> list[Impl]:
    impls: tuple[Impl, ...] = ("cuda", "triton")
    return [impl for impl in impls if impl in kernels]


def make_product(multiply_adds: int, device: DeviceType, dtype: torch.dtype = torch.float32) -> Call:
    """One product of large matrices that has so many multiply-adds: the floor of ops that are products.

    The second matrix is a square of 2048, or, of less work than its cube, a smaller one.
    """
    side = min(2048, round(multiply_adds ** (1 / 3)))
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(rows, side, generator=generator, device=device).to(dtype)
        for rows in (round(multiply_adds / side**2), side)
    )
    out = a.new_empty(len(a), side)

    def call() -> Yardstick:
        return Yardstick((torch.mm(a, b, out=out),), partial(_error_of_product, a, b))

    return call


def _error_of_product(a: torch.Tensor, b: torch.Tensor, result: tuple[torch.Tensor]) -> float:
    """Of some rows, beyond what rounding to the dtype makes."""
    rows = torch.linspace(0, len(a) - 1, 16).long()
    expected = a[rows].double() @ b.double()
    allowed = torch.finfo(a.dtype).eps * expected.abs()
    beyond = ((result[0][rows].double() - expected).abs() - allowed).clamp_min(0)
    return float(beyond.amax() / expected.abs().amax())


def compiler(device: DeviceType) -> Callable[..., Any]:
    """torch.compile for one shape, or a Skip where it has no compiler to call."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise Skip("torch.compile needs the headers of Python (Python.h)")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise Skip("torch.compile needs a C++ compiler")
    if device == "cuda" and find_spec("triton") is None:
        raise Skip("torch.compile needs triton")
    torch.compiler.reset()  # what is compiled for other shapes counts against a limit
    return partial(torch.compile, fullgraph=True, dynamic=False)


def load(module: str) -> Any:
    """The module, or a Skip that says what is the matter with its package."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise Skip(f"{package} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts of a package that are not used here
            return import_module(module)
    except (ImportError, OSError):  # built for another torch; what it says has paths of this machine
        raise Skip(f"{package} is installed, but does not load") from None
