"""What is compiled of the Triton kernels of linear_cross_entropy without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastkit.testing.aot import POINTERS, Variant, variant
from fastkit.triton import linear_cross_entropy as kernels

_FLOATS = ("state", "logits", "lse", "coefficients", "class_weight")


def _variant(
    name: str, kernel: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32, *,
    dense: bool = True, ones: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """``dense``: blocks are of multiples of 16 classes. ``ones`` are integers that are 1 in the call."""
    warps = options.pop("num_warps")
    pointers = {**dict.fromkeys(_FLOATS, "*fp32"), "dz": POINTERS[dtype], "target": "*i64"}
    multiples = {*pointers, *(("first", "c", "dz_row", "logits_row") if dense else ())}
    types = pointers | {"softcap": "fp32"}
    constexprs = options | dict.fromkeys((one for one in ones if one in kernel.arg_names), 1)
    return variant(name, kernel, warps, types, constexprs, multiples.__contains__)


def _sums(*, caps: bool = False, smooths: bool = False, weighted: bool = False, **options: Any) -> Variant:
    flags = {"CAPS": caps, "SMOOTHS": smooths, "WEIGHTED": weighted}
    kernel = kernels.linear_cross_entropy_sums
    return _variant(_name([], options, **flags), kernel, kernels.sums_options() | flags, **options)


def _gradient(dtype: torch.dtype, *, caps: bool = False, weighted: bool = False, **options: Any) -> Variant:
    flags = {"CAPS": caps, "WEIGHTED": weighted}
    name = _name([f"{dtype}".replace("torch.", "")], options, **flags)
    kernel = kernels.linear_cross_entropy_gradient
    return _variant(name, kernel, kernels.gradient_options() | flags, dtype, **options)


def _name(words: list[str], options: dict[str, Any], **flags: bool) -> str:
    words = words + [name.lower() for name, given in flags.items() if given]
    if not options.get("dense", True):
        words.append("of one number" if "ones" in options else "any rows")
    return ", ".join(words or ["plain"])


_ONES = {"dense": False, "ones": ("first", "c", "dz_row", "logits_row")}
_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16

AOT_VARIANTS = [
    _sums(**_ONES),
    _gradient(_FLOAT, **_ONES),
    *(_sums(smooths=smooths, weighted=weighted, caps=caps) for caps in (False, True)
      for smooths, weighted in ((False, False), (True, False), (True, True))),
    _sums(caps=True, smooths=True, weighted=True, dense=False),
    *(_gradient(dtype) for dtype in (_FLOAT, _BFLOAT, _HALF)),
    *(_gradient(dtype, caps=True, weighted=True) for dtype in (_FLOAT, _BFLOAT)),
    _gradient(_BFLOAT, caps=True, weighted=True, dense=False),
]  # fmt: skip
