"""What is compiled of the Triton kernels of moments without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastkit.testing.aot import POINTERS, Variant, variant
from fastkit.triton import moments as kernels

_FLOATS = ("means", "rest", "products", "mean", "scatter")


def _variant(
    name: str, kernel: Any, options: dict[str, Any], x: torch.dtype = torch.float32,
    weights: torch.dtype | None = None, ones: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """Of 300 columns: divisible by 4. ``x_column``, ``w_row`` and ``ones`` are 1 in the call."""
    warps = options.pop("num_warps")
    constexprs = options | dict.fromkeys((one for one in ones if one in kernel.arg_names), 1)
    if "WEIGHTED" in kernel.arg_names:
        constexprs |= {"WEIGHTED": weights is not None, "UNIT": 4, "x_column": 1, "w_row": 1}
    types = {"x": POINTERS[x], "weights": POINTERS[weights or x], "counts": "*fp64", "count": "*fp64"}
    types |= dict.fromkeys(_FLOATS, "*fp32")
    return variant(name, kernel, warps, types, constexprs, lambda a: a in types or a == "length")


def _products(x: torch.dtype, rows: int, weights: torch.dtype | None = None) -> Variant:
    options = kernels.products_options(rows)
    name = f"{options['PRECISION']}, {x}, weights {weights}".replace("torch.", "")
    return _variant(name, kernels.moments_products, options, x, weights)


def _means(x: torch.dtype, weights: torch.dtype | None = None) -> Variant:
    name = f"{x}, weights {weights}".replace("torch.", "")
    return _variant(name, kernels.moments_means, kernels.means_options(), x, weights)


def _of_one() -> list[Variant]:
    """One row of one column."""
    ones = ("rows", "columns", "x_row", "pieces", "area")
    calls = [
        (kernels.moments_means, kernels.means_options()),
        (kernels.moments_products, kernels.products_options(1)),
        (kernels.moments_merge, {"BC": kernels.MERGED, "num_warps": 4}),
    ]
    return [_variant("of one number", kernel, options, ones=ones) for kernel, options in calls]


_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16

AOT_VARIANTS = [
    *_of_one(),
    *(_means(x) for x in (_FLOAT, _BFLOAT, _HALF)),
    *(_means(x, weights) for x, weights in ((_BFLOAT, _BFLOAT), (_HALF, _FLOAT), (_FLOAT, _FLOAT))),
    *(_products(x, rows) for x in (_FLOAT, _BFLOAT, _HALF) for rows in (1, kernels.MANY)),
    *(_products(_FLOAT, rows, _FLOAT) for rows in (1, kernels.MANY)),
    *(_products(x, kernels.MANY, weights) for x, weights in ((_BFLOAT, _BFLOAT), (_HALF, _FLOAT))),
    _variant("merge", kernels.moments_merge, {"BC": kernels.MERGED, "num_warps": 4}),
]
