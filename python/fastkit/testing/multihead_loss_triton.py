"""What is compiled of the Triton kernels of multihead_loss and orthogonality_penalty without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastkit.testing.aot import POINTERS, Variant, variant
from fastkit.triton import multihead_loss as kernels

_FLOATS = "loss", "dz", "class_weight", "g_weight", "g_bias", "g_loss", "g_x", "sums", "gram"
_COUNTS = "correct", "count"


def _variant(
    name: str, kernel: Any, constexprs: dict[str, Any], dtype: torch.dtype = torch.float32, *,
    dense: bool = True, ones: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """``dense``: sizes are multiples of 16. ``ones`` are integers that are 1 in the call."""
    warps = constexprs.pop("num_warps")
    wanted = "*i64" if constexprs.get("PROBLEM", 0) == 0 else "*fp32"
    pointers = {
        **dict.fromkeys(_FLOATS, "*fp32"), **dict.fromkeys(_COUNTS, "*i64"), "target": wanted,
        "active": "*i1", **dict.fromkeys(("x", "weight", "bias"), POINTERS[dtype]),
    }  # fmt: skip
    types = pointers | {"eps": "fp32", "width": "fp32"}
    multiples = {*pointers, *(("B", "H", "D", "x_row", "n", "begin") if dense else ())}
    constexprs |= dict.fromkeys((one for one in ones if one in kernel.arg_names), 1)
    return variant(name, kernel, warps, types, constexprs, multiples.__contains__)


def _forward(
    problem: str, classes: int, dtype: torch.dtype = torch.float32, *, masked: bool = False,
    weighted: bool = False, gradient: bool = True, **options: Any,
) -> Variant:  # fmt: skip
    flags = {
        "PROBLEM": kernels.PROBLEMS[problem], "MASKED": masked, "WEIGHTED": weighted, "GRADIENT": gradient,
    }  # fmt: skip
    words = [problem, f"{classes} classes", f"{dtype}".replace("torch.", "")]
    words += [name for name, on in (("masked", masked), ("weighted", weighted)) if on]
    words += [] if gradient else ["no gradient"]
    constexprs = kernels.forward_options(classes) | flags
    return _variant(", ".join(words), kernels.multihead_loss_forward, constexprs, dtype, **options)


def _backward(
    kernel: Any, settings: dict[str, Any], name: str, dtype: torch.dtype = torch.float32, *,
    problem: str = "single_label", masked: bool = False, **options: Any,
) -> Variant:  # fmt: skip
    flags = {"PROBLEM": kernels.PROBLEMS[problem], "MASKED": masked}
    return _variant(name + (", masked" if masked else ""), kernel, settings | flags, dtype, **options)


def _weights(classes: int, *, name: str | None = None, **options: Any) -> Variant:
    settings = kernels.weights_options(classes)
    return _backward(kernels.multihead_loss_weights, settings, name or f"{classes} classes", **options)


def _inputs(name: str, **options: Any) -> Variant:
    return _backward(kernels.multihead_loss_inputs, kernels.inputs_options(), name, **options)


def _slopes(kind: str, *, gradient: bool = True, **options: Any) -> Variant:
    flags = {"KIND": kernels.KINDS[kind], "GRADIENT": gradient}
    name = kind if gradient else f"{kind}, no gradient"
    return _variant(name, kernels.multihead_loss_slopes, kernels.slopes_options() | flags, **options)


_ONES = {"dense": False, "ones": ("B", "C", "D", "H", "n", "begin", "x_row")}

AOT_VARIANTS = [
    _forward("regression", 1, **_ONES),
    _weights(1, name="of one number", problem="regression", **_ONES),
    _inputs("of one number", problem="regression", **_ONES),
    _slopes("abs", **_ONES),
    _forward("single_label", 3),
    _forward("single_label", 3, gradient=False),
    _forward("single_label", 3, torch.bfloat16, masked=True, weighted=True),
    _forward("single_label", 3, torch.float16, masked=True, weighted=True, dense=False),
    _forward("single_label", 150, masked=True, weighted=True),
    _forward("multi_label", 150, masked=True, weighted=True),
    _forward("regression", 1, masked=True),
    _weights(3),
    _weights(150, dtype=torch.bfloat16, masked=True),
    _inputs("plain"),
    _inputs("bfloat16", dtype=torch.bfloat16, masked=True, dense=False),
    *(_slopes(kind) for kind in kernels.KINDS),
    _slopes("abs", gradient=False, dense=False),
]
