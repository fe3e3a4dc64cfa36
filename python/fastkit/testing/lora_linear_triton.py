"""What is compiled of the Triton kernels of lora_linear without a GPU."""

# pyright: reportPrivateUsage=false
# the tiles that the kernels are launched with

from __future__ import annotations

from typing import Any

import torch

from fastkit.testing.aot import POINTERS, Variant, variant
from fastkit.triton import lora_linear as kernels

_SIGNALS = ("x", "v", "y")
_ADAPTERS = ("a", "b")
_SUMS = ("h", "squares", "products", "sums", "projected", "parts", "out")
_FLAGS = ("SQUARES", "PRODUCTS", "SUMS", "PROJECTS", "ADDS", "MASKED")


def _variant(
    name: str, kernel: Any, warps: int, signal: torch.dtype = torch.float32,
    adapter: torch.dtype = torch.float32, ones: tuple[str, ...] = (), **options: Any,
) -> Variant:  # fmt: skip
    """``ones`` are integers that are 1 in the call, and so constants of the kernel."""
    flags = dict.fromkeys((flag for flag in _FLAGS if flag in kernel.arg_names), False)
    constexprs = {**flags, **dict.fromkeys(ones, 1), **options}
    types = {
        **dict.fromkeys(_SIGNALS, POINTERS[signal]),
        **dict.fromkeys(_ADAPTERS, POINTERS[adapter]),
        **dict.fromkeys(_SUMS, "*fp32"),
        "mask": "*i1",
        "scale": "fp32",
    }
    return variant(name, kernel, warps, types, constexprs, lambda a: a not in ("rank", "pieces", "scale"))


def _of_tile(
    name: str, kernel: Any, tile: kernels._Tile, signal: torch.dtype, adapter: torch.dtype, *ones: str,
    **flags: bool,
) -> Variant:  # fmt: skip
    types = f"{signal}" if signal == adapter else f"{signal} and {adapter}"
    name = f"{name}, rank {tile.ranks}, {types}".replace("torch.", "")
    options = tile.options(torch.empty(0, dtype=signal))
    return _variant(name, kernel, options.pop("num_warps"), signal, adapter, ones, **options, **flags)


def _project(signal: torch.dtype, adapter: torch.dtype, rank: int, *, squares: bool = False) -> Variant:
    tile = kernels._project_tile(torch.empty(0, dtype=signal), rank)
    name, ones = ("squares", ("x_column", "a_column")) if squares else ("gradient", ("x_column", "a_rank"))
    return _of_tile(name, kernels.lora_linear_project, tile, signal, adapter, *ones, SQUARES=squares)


def _gather(signal: torch.dtype, rank: int, *, by_rank: bool = False) -> Variant:
    tile = kernels._gather_tile(torch.empty(0, dtype=signal), rank)
    ones = ("v_column", "product_column" if by_rank else "product_rank")
    name = "of A" if by_rank else "of B and bias"
    kernel = kernels.lora_linear_gather
    return _of_tile(name, kernel, tile, signal, signal, *ones, PRODUCTS=True, SUMS=not by_rank)


def _fused(adapter: torch.dtype) -> Variant:
    tile = kernels._fused_tile(torch.empty(0, 4096, dtype=torch.bfloat16), 16)
    assert tile is not None
    flags = {"PRODUCTS": True, "SUMS": True, "PROJECTS": True}
    ones = ("v_column", "b_rank", "product_rank")
    name, kernel = "of B, bias and h", kernels.lora_linear_gather
    return _of_tile(name, kernel, tile, torch.bfloat16, adapter, *ones, **flags)


def _square_sums(signal: torch.dtype) -> Variant:
    tile = kernels._gather_tile(torch.empty(0, dtype=signal), 0)
    kernel = kernels.lora_linear_gather
    return _of_tile("of columns", kernel, tile, signal, signal, "v_column", "rank", SUMS=True, SQUARES=True)


def _expand(signal: torch.dtype, adapter: torch.dtype, *, adds: bool = True) -> Variant:
    name, one = ("adds", "b_rank") if adds else ("gradient", "b_column")
    tile = kernels._expand_tile()
    return _of_tile(name, kernels.lora_linear_expand, tile, signal, adapter, one, ADDS=adds)


_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16

AOT_VARIANTS = [
    *(_project(_FLOAT, _FLOAT, rank, squares=True) for rank in (16, 32)),
    *(_project(_BFLOAT, _FLOAT, rank, squares=True) for rank in (16, 32, 64)),
    *(_project(_HALF, _FLOAT, rank, squares=True) for rank in (16, 32)),
    _project(_BFLOAT, _BFLOAT, 16, squares=True),
    _project(_BFLOAT, _BFLOAT, 64),
    _project(_FLOAT, _FLOAT, 16),
    *(_gather(_FLOAT, rank) for rank in (16, 32)),
    *(_gather(_BFLOAT, rank) for rank in (32, 64)),
    _gather(_HALF, 32),
    *(_gather(signal, 16, by_rank=True) for signal in (_FLOAT, _BFLOAT)),
    *(_fused(adapter) for adapter in (_FLOAT, _BFLOAT)),
    *(_square_sums(signal) for signal in (_FLOAT, _BFLOAT)),
    _expand(_FLOAT, _FLOAT),
    *(_expand(_BFLOAT, adapter) for adapter in (_FLOAT, _BFLOAT)),
    _expand(_HALF, _FLOAT),
    _expand(_BFLOAT, _BFLOAT, adds=False),
    _variant("masked", kernels.lora_linear_sum, 4, MASKED=True, ROWS=32, BLOCK=64, ones=("mask_column",)),
    _variant("of few parts", kernels.lora_linear_sum, 4, ROWS=2, BLOCK=512),
]
