"""Loads the compiled library once, or keeps the reason why it could not be."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from fastkit import __version__

LIBRARY = Path(__file__).with_name("_C.so")
_SCHEMA = Path(__file__).parents[2] / "csrc" / "schema.cpp"  # only there in a checkout
REINSTALL = "reinstall with `pip install --force-reinstall --no-deps fastkit`"
REBUILD = f"rebuild with `pip install --no-deps -e {_SCHEMA.parents[1]}`"

_warned = False


def _load(library: Path, schema: Path) -> tuple[dict[str, Any], str | None]:
    """Load ``library``. Returns (its build facts, None), or ({}, why it is not used and the cure)."""
    in_checkout = schema.is_file()
    cure = REBUILD if in_checkout else REINSTALL
    if not library.is_file():
        return {}, f"{library} is missing; {cure}"
    try:
        torch.ops.load_library(str(library))
        facts = json.loads(torch.ops.fastkit.build_info())
        schema_sha256, version = facts["schema_sha256"], facts["version"]
    except Exception as error:  # a foreign or broken file: whatever is wrong with it is the reason
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        return {}, f"{library} could not be loaded ({type(error).__name__}: {first_line}); {cure}"
    if refusal := facts.get("refusal"):  # of a setting, which no other build would mend
        return {}, refusal
    if in_checkout:
        if schema_sha256 != hashlib.sha256(schema.read_bytes()).hexdigest():
            return {}, f"{library} is stale: it was built from another csrc/schema.cpp; {cure}"
    elif version != __version__:
        return {}, f"{library} is stale: built for {version}, the package is {__version__}; {cure}"
    return facts, None


BUILD_INFO, REASON = _load(LIBRARY, _SCHEMA)
"""What the library says of itself, and why it is not used (None when it is)."""


def warn_once(reason: str) -> None:
    """Say, the first time a call falls back to the reference for want of a kernel here, why."""
    global _warned
    if torch.compiler.is_compiling() or _warned:
        return
    _warned = True
    warnings.warn(f"fastkit runs its slow reference implementations: {reason}", RuntimeWarning, stacklevel=4)
