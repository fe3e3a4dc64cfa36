"""Triton kernels compiled ahead of time, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
"""The types of arguments that are tensors."""


class Variant(NamedTuple):
    """What Triton's launcher makes of a call: types of arguments, constants, and what 16 divides."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    warps: int


def variant(
    name: str,
    kernel: Any,
    warps: int,
    types: Mapping[str, str],
    constexprs: dict[str, Any],
    divides: Callable[[str], bool],
) -> Variant:
    """``types``: of all arguments but 32-bit integers; ``divides``: whether 16 divides that of a name."""
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
            continue
        signature[argument] = types.get(argument, "i32")
        if divides(argument):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return Variant(name, kernel, signature, constexprs, attributes, warps)


class Resources(NamedTuple):
    """Of a thread: registers, bytes of stack (spilled registers are there); of a program, shared bytes."""

    registers: int
    stack: int
    shared: int


def compiled(variant: Variant, capability: int) -> Resources:
    """Compile for compute capability ``capability`` / 10, as the launcher would."""
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attributes)
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": variant.warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared)
