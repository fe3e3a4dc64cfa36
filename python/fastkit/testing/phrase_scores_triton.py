"""What is compiled of the Triton kernels of phrase_scores without a GPU."""

from __future__ import annotations

from typing import Any

from fastkit.reference.phrase_scores import LEAST
from fastkit.testing.aot import Variant, variant
from fastkit.triton import phrase_scores as kernels

_DOUBLE = ("before",)
_WEIGHTS = ("of_variance", "of_increment", "by_prior")
_FLOATS = (
    "candidates", "centroid", "unit", "directions", "scatter", "variance", "chosen", "prior", "increment",
    "score", "overlap", "pick", "scores", "variances", "rows", "part",
)  # fmt: skip


def _variant(
    name: str, kernel: Any, options: dict[str, Any], ones: tuple[str, ...] = (), **flags: Any
) -> Variant:
    """Of 256 columns, unless ``ones``, arguments that are 1 in the call, name others."""
    warps = options.pop("num_warps")
    constexprs = options | flags | dict.fromkeys((one for one in ones if one in kernel.arg_names), 1)
    if "LEAST" in kernel.arg_names:
        constexprs["LEAST"] = LEAST
    types = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_WEIGHTS, "fp32")
    types |= dict.fromkeys(_DOUBLE, "*fp64") | {"indices": "*i64", "taken": "*i32"}
    pointers = (*_FLOATS, *_DOUBLE, "indices", "taken")
    divided = (*pointers, "columns", "of_candidates", "of_centroid", "of_scatter", "of_chosen")
    return variant(name, kernel, warps, types, constexprs, lambda a: a in divided)


def _all(name: str, columns: int, ones: tuple[str, ...] = ()) -> list[Variant]:
    rows, deflated = kernels.phrase_scores_rows, f"{name}, deflation"
    follow, pick = kernels.phrase_scores_follow, kernels.phrase_scores_pick
    return [
        _variant(name, rows, kernels.rows_options(columns), ones),
        _variant(name, kernels.phrase_scores_variances, kernels.variances_options(), ones),
        _variant(name, kernels.phrase_scores_finish, kernels.finish_options(), ones, PRIOR=True),
        _variant(name, pick, kernels.pick_options(), ones, PRIOR=True, DEFLATE=False),
        _variant(deflated, pick, kernels.pick_options(), ones, PRIOR=False, DEFLATE=True),
        _variant(name, follow, kernels.rows_options(columns), ones, DEFLATE=False),
        _variant(deflated, follow, kernels.rows_options(columns), ones, DEFLATE=True),
    ]


AOT_VARIANTS = [
    *_all("of one number", 1, ("m", "columns", "count", "k")),
    *_all("1024 columns", 1024),
    *_all("256 columns", 256),
]
