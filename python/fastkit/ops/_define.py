"""Ops whose bodies are in Python, and are opaque to compilers. Those of the library are in csrc/schema.cpp.

``torch.library.custom_op`` would do the same, and take five times as long at every import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_LIBRARIES = {
    name: torch.library.Library(name, "FRAGMENT") for name in ("fastkit_triton", "fastkit_products")
}


def define(
    library: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The op with a signature, ``name(...) -> ...``, and what runs it on a CPU and on a GPU."""
    name = signature.partition("(")[0]
    of = _LIBRARIES[library]
    of.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        of.impl(name, run, device)
    torch.library.register_fake(f"{library}::{name}", fake, lib=of)
    return getattr(getattr(torch.ops, library), name).default


def define_triton(signature: str, function: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op that ``fastkit.triton.<function>``, "stem.name", runs: on a CPU, in Triton's interpreter.

    Its module, and with it Triton, is imported when the op first runs.
    """
    module, name = function.split(".")

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastkit.triton.{module}"), name)(*args)

    return define("fastkit_triton", signature, run, fake)
