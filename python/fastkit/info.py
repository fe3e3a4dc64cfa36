"""What would run on this machine, and why not the rest. It answers where torch cannot be imported, too."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkit import __version__

if TYPE_CHECKING:
    from fastkit._dispatch import Kernels

STEMS = (
    "icp",
    "iir_scan",
    "linear_cross_entropy",
    "lora_linear",
    "mtadam",
    "moments",
    "multihead_loss",
    "phrase_scores",
    "procrustes",
    "topk_similarity",
)


def available(stem: str) -> dict[str, bool | str]:
    """Of each implementation of an op: True, or the reason why it cannot run here."""
    from fastkit._dispatch import IMPLS, unavailable

    return {impl: unavailable(impl, kernels(stem)) or True for impl in IMPLS}


def kernels(stem: str) -> Kernels:
    """The op's native implementations and their dtypes."""
    if stem not in STEMS:
        raise ValueError(f"info: op must be one of {', '.join(STEMS)}, got {stem!r}")
    return importlib.import_module(f"fastkit.ops.{stem}").KERNELS


def report() -> dict[str, Any]:
    """What would run here, as plain data, fit for JSON. The keys:

    ok: whether the library is used and, on a machine with an NVIDIA GPU, every op that has kernels for it, in
        CUDA or in Triton, has one that runs
    next: None where that is so, else what to do next, in words
    fastkit, python, torch, triton: versions; None of what is not there, or cannot be imported
    threads: of torch, on the CPU; None without torch
    cuda_device: the name of the GPU that torch sees, or None
    library: file; loaded, whether it is used; and if not, reason. If so, version, schema_sha256, compiler,
        torch_target; cuda and cuda_archs of the build, None and "" without CUDA; cuda_driver, the newest CUDA
        that the driver runs, "" without a driver and in a build without CUDA; cpu_isas, those that this CPU
        has; cpu_isa, the one that is used; refusal, None
    ops: op -> implementation (reference, cpu, cuda, triton) -> True, or the reason why it cannot run; empty
        without a torch of 2.10 or later
    """
    library: dict[str, Any] = {"file": str(Path(__file__).with_name("_C.so")), "loaded": False}
    facts: dict[str, Any] = {
        "ok": False,
        "next": None,
        "fastkit": __version__,
        "python": platform.python_version(),
        "torch": None,
        "triton": _version("triton"),
        "threads": None,
        "cuda_device": None,
        "library": library,
        "ops": {},
    }
    try:
        import torch

        versions = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    except Exception as error:  # one of its libraries does not load, a folder has its name: anything
        lacking = library["reason"] = _without_torch(error)
        return facts | {"next": _cure(lacking)}

    from fastkit import _native
    from fastkit._dispatch import cuda_driver

    lacking = _native.REASON
    if _native.torch_too_old() is None:  # else the ops might not even be imported
        facts["ops"] = {stem: available(stem) for stem in STEMS}
    if lacking is not None:
        library["reason"] = lacking
    else:
        library |= {"loaded": True, **_native.BUILD_INFO, "cuda_driver": cuda_driver()}
        lacking = _lacking_on_gpu(facts["ops"])
    device = None
    try:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except RuntimeError as error:  # it is there, and cannot be used: taken, out of memory, broken
        lacking = lacking or f"the GPU cannot be used ({_first_line(error)}); look at nvidia-smi"
    return facts | versions | {"ok": lacking is None, "next": _cure(lacking), "cuda_device": device}


def describe(facts: dict[str, Any]) -> str:
    """The report as text."""
    library = facts["library"]
    lines = [
        f"fastkit {facts['fastkit']}, torch {facts['torch'] or 'none'}, Python {facts['python']},"
        f" triton {facts['triton'] or 'not installed'}",
    ]
    if facts["torch"]:
        lines.append(f"CPU: {facts['threads']} threads; GPU: {facts['cuda_device'] or 'none'}")
    if library["loaded"]:
        cuda, driver = library["cuda"], library["cuda_driver"]
        cuda = f"CUDA {cuda} ({f'driver for {driver}' if driver else 'no driver'})" if cuda else "no CUDA"
        lines.append(f"library: {library['compiler']}, {cuda}, CPU kernels for {library['cpu_isa']}")
    else:
        lines.append(f"library: not used: {library['reason']}")
    lines += _table(facts["ops"])
    if facts["next"]:
        lines.append(f"next: {facts['next']}")
    return "\n".join(lines)


def _table(ops: dict[str, dict[str, bool | str]]) -> list[str]:
    """A line for each op, and below each reason once."""
    if not ops:
        return []
    reasons: dict[bool | str, str] = {True: "yes"}
    rows = [["", *next(iter(ops.values()))]]
    for stem, answers in ops.items():
        rows.append([stem, *(reasons.setdefault(a, f"({len(reasons)})") for a in answers.values())])
    width = max(map(len, ops)) + 2
    lines = [f"{stem:{width}}" + "".join(f"{cell:11}" for cell in cells).rstrip() for stem, *cells in rows]
    return ["", *lines, *(f"{number} {reason}" for reason, number in reasons.items() if reason is not True)]


def _without_torch(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "torch is not installed; install torch with `pip install 'torch>=2.10'`"
    words = f"{type(error).__name__}: {_first_line(error)}"
    cure = "reinstall torch with `pip install --force-reinstall 'torch>=2.10'`"
    return f"torch cannot be imported ({words}); {cure}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _lacking_on_gpu(ops: dict[str, dict[str, bool | str]]) -> str | None:
    """Why the first op that has kernels for a GPU has none that runs; None without such an op, or a GPU."""
    import torch

    from fastkit._dispatch import cuda_driver

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    if not nvidia and (hidden or not cuda_driver()):
        return None
    for stem, answers in ops.items():
        reasons = [answers[impl] for impl in ("cuda", "triton") if impl in kernels(stem)]
        if reasons and True not in reasons:
            return str(reasons[0])
    return None


def _cure(reason: str | None) -> str | None:
    """What to do: a reason says it after its last "; ", but for what Triton lacks."""
    if reason is None:
        return None
    what, _, cure = reason.rpartition("; ")
    return cure.replace("unset it", "unset FASTKIT_CPU_ISA") if what else f"give Triton what it needs: {cure}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
