"""What would run on this machine, and why not the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import torch

from fastkit import __version__, _native
from fastkit._dispatch import IMPLS, Kernels, unavailable

STEMS = ("icp", "iir_scan", "lora_linear", "mtadam", "moments", "procrustes", "topk_similarity")


def available(stem: str) -> dict[str, bool | str]:
    """Of each implementation of an op: True, or the reason why it cannot run here."""
    return {impl: unavailable(impl, kernels(stem)) or True for impl in IMPLS}


def kernels(stem: str) -> Kernels:
    """The op's native implementations and their dtypes."""
    if stem not in STEMS:
        raise ValueError(f"info: op must be one of {', '.join(STEMS)}, got {stem!r}")
    return importlib.import_module(f"fastkit.ops.{stem}").KERNELS


def report() -> dict[str, Any]:
    """Versions, the library, and per op what each implementation answers; plain data, fit for JSON."""
    return {
        "fastkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "library": {"file": str(_native.LIBRARY), "loaded": _native.REASON is None}
        | ({"reason": _native.REASON} if _native.REASON else _native.BUILD_INFO),
        "ops": {stem: available(stem) for stem in STEMS},
    }


def describe(facts: dict[str, Any]) -> str:
    """The report as text."""
    library = facts["library"]
    lines = [
        f"fastkit {facts['fastkit']}, torch {facts['torch']}, Python {facts['python']},"
        f" triton {facts['triton'] or 'not installed'}",
        f"CPU: {facts['threads']} threads; GPU: {facts['cuda_device'] or 'none'}",
    ]
    if library["loaded"]:
        cuda = f"CUDA {library['cuda']}" if library["cuda"] else "no CUDA"
        lines.append(f"library: {library['compiler']}, {cuda}, CPU kernels for {library['cpu_isa']}")
    else:
        lines.append(f"library: not used: {library['reason']}")
    for stem, impls in facts["ops"].items():
        lines.append(stem)
        for impl, answer in impls.items():
            lines.append(f"  {impl:10} {'yes' if answer is True else answer}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
