"""Loads the compiled library once, or keeps the reason why it could not be."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fastkit import __version__

LIBRARY = Path(__file__).with_name("_C.so")
_SCHEMA = Path(__file__).parents[2] / "csrc" / "schema.cpp"  # only there in a checkout
# A reason ends with its cure, after its last "; ": `python -m fastkit info` shows that as what to do next.
_INSTALL = "pip install --force-reinstall --no-deps PATH"
REBUILD = f"rebuild with `pip install --no-deps -e {_SCHEMA.parents[1]}`"
REINSTALL = f"reinstall with `{_INSTALL}`, of its wheel or checkout"
BUILD_HERE = f"build it on this machine with `{_INSTALL}`, of its checkout"
BUILD_CUDA = f"build it where nvcc is, with `FASTKIT_CUDA=ON {_INSTALL}`, of its checkout"
BUILD_NATIVE = f"build it on this machine with `FASTKIT_NATIVE=ON {_INSTALL}`, of its checkout"

_warned = False


def _load(library: Path, schema: Path) -> tuple[dict[str, Any], str | None]:
    """Load ``library``. Returns (its build facts, None), or ({}, why it is not used and the cure)."""
    in_checkout = schema.is_file()
    # Of a library that is not whole, and of one that is whole but not for this machine.
    mend, build = (REBUILD, REBUILD) if in_checkout else (REINSTALL, BUILD_HERE)
    if reason := torch_too_old():
        return {}, reason
    if not library.is_file():
        if in_checkout:
            return {}, f"{library} is missing: this checkout has not been built; {mend}"
        if _is_pure_python(library.parent):
            return {}, f"this is a pure-Python build, without the library; {BUILD_NATIVE}"
        return {}, f"{library} is missing: this installation is damaged; {mend}"
    try:
        if sys.platform == "linux":
            if fault := _foreign(library):
                return {}, f"{library} was built for another platform ({fault}); {build}"
            if fault := _damaged(library):
                return {}, f"{library} is damaged: {fault}; {mend}"
        torch.ops.load_library(str(library))  # pyright: ignore[reportUnknownMemberType]
        facts: dict[str, Any] = json.loads(torch.ops.fastkit.build_info())
        schema_sha256, version = facts["schema_sha256"], facts["version"]
    except Exception as error:  # whatever is wrong with it is the reason
        return {}, f"{library} {_in_words(error)}; {build}"
    if refusal := facts.get("refusal"):  # of a setting, which no other build would mend
        return {}, refusal
    if in_checkout:
        if schema_sha256 != hashlib.sha256(schema.read_bytes()).hexdigest():
            return {}, f"{library} is stale: it was built from another csrc/schema.cpp; {mend}"
    elif version != __version__:
        return {}, f"{library} is stale: built for {version}, the package is {__version__}; {mend}"
    return facts, None


def torch_too_old() -> str | None:
    """Before 2.10 torch lacks what the library and the package call."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) >= (2, 10):
        return None
    return f"torch {torch.__version__} is too old; upgrade torch with `pip install 'torch>=2.10'`"


def _is_pure_python(package: Path) -> bool:
    """Whether pip installed ``package`` from a wheel for every platform (py3-none-any)."""
    import importlib.metadata  # only here: it takes longer than all else

    try:
        found = importlib.metadata.distribution("fastkit")
    except importlib.metadata.PackageNotFoundError:
        return False
    is_this = Path(str(found.locate_file("fastkit"))).resolve() == package.resolve()
    return is_this and "Root-Is-Purelib: true" in (found.read_text("WHEEL") or "")


def _in_words(error: Exception) -> str:
    """Why a library was refused that is for this platform, and whole."""
    loaders = error.__cause__ or error  # around it, torch's own words have the path alone
    words = (str(loaders).strip() or repr(loaders)).splitlines()[0]
    if lacks := re.search(r"version [`'](\w+)_([\d.]+)' not found", words):
        return f"needs {lacks[1]} {lacks[2]}, and this system has an older one"
    if lacks := re.search(r"undefined symbol: (\w+)", words):
        return f"needs {lacks[1]}, which torch {torch.__version__} does not have"
    return f"could not be loaded ({type(loaders).__name__}: {words})"


# --- on Linux: files that the loader refuses in obscure words, or crashes on --------------------------------

_OTHER_SYSTEMS = {b"MZ": "Windows", b"\xcf\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS"}
_PROCESSORS = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}  # e_machine of ELF


def _foreign(library: Path) -> str | None:
    """For which other platform it is, by its first 20 bytes and those of this process's own file."""
    theirs, ours = _head(library), _head(Path("/proc/self/exe"))
    for magic, system in _OTHER_SYSTEMS.items():
        if theirs.startswith(magic):
            return system
    # Of ELF: 32 or 64 bits, the order of bytes, and the processor.
    if not _is_elf(theirs) or (theirs[4:6], theirs[18:20]) == (ours[4:6], ours[18:20]):
        return None
    return f"{_processor(theirs)}, this is {_processor(ours)}"


def _damaged(library: Path) -> str | None:
    """Whether it is no library, or ends before what is mapped of it: to read there would end the process."""
    head, size = _head(library), library.stat().st_size
    if not _is_elf(head):
        return "it is not a library"
    if head[4:6] != b"\x02\x01":  # not of 64 bits with the lowest byte first, of which the offsets below are
        return None
    needed = 64
    if size >= needed:
        (start,), (count,) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<H", head, 56)
        needed = start + 56 * count  # the table of what is mapped
        if size >= needed:
            with library.open("rb") as file:
                file.seek(start)
                parts = struct.iter_unpack("<8xQ16xQ16x", file.read(56 * count))
            needed = max([needed, *(offset + length for offset, length in parts)])
    return f"it ends after {size} of {needed} bytes" if size < needed else None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _is_elf(head: bytes) -> bool:
    return len(head) >= 20 and head.startswith(b"\x7fELF")


def _processor(head: bytes) -> str:
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return f"{_PROCESSORS.get(machine, f'processor {machine}')} of {32 * head[4]} bits"


BUILD_INFO, REASON = _load(LIBRARY, _SCHEMA)
"""What the library says of itself, and why it is not used (None when it is)."""


def warn_once(reason: str) -> None:
    """Say, the first time a call falls back to the reference for want of a kernel here, why."""
    global _warned
    if torch.compiler.is_compiling() or _warned:
        return
    _warned = True
    warnings.warn(f"fastkit runs its slow reference implementations: {reason}", RuntimeWarning, stacklevel=4)
