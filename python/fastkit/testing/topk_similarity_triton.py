"""What is compiled of the Triton kernels of topk_similarity without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastkit.testing.aot import POINTERS, Variant, variant
from fastkit.triton import topk_similarity as kernels

_FLOATS = ("addends", "bias", "norms", "bounds", "scores", "values")
_OF_DENSE = ("columns", "length", "query_row", "key_row")


def _variant(
    name: str, kernel: Any, options: dict[str, Any], table: torch.dtype, *, dense: bool,
    ones: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """``dense``: rows are multiples of 16 numbers. ``ones`` are integers that are 1 in the call."""
    warps = options.pop("num_warps")
    pointers = {
        **dict.fromkeys(("queries", "keys"), POINTERS[table]),
        **dict.fromkeys(_FLOATS, "*fp32"),
        **dict.fromkeys(("indices", "rough"), "*i32"),
        "chosen": "*i64",
    }
    multiples = {*pointers, "kept_of_all", *(_OF_DENSE if dense else ())}
    types = pointers | {"conversion": "fp32"}
    constexprs = options | dict.fromkeys(ones, 1)
    return variant(name, kernel, warps, types, constexprs, multiples.__contains__)


def _search(table: torch.dtype, n: int, k: int, *, adds: bool = False) -> Variant:
    """Of n queries."""
    options = kernels.search_options(n, k) | {"ADDS": adds, "RAISES": False}
    name = f"{options['BQ']} of {table}, {options['C']} kept{', addends' if adds else ''}"
    return _variant(name.replace("torch.", ""), kernels.topk_similarity_search, options, table, dense=True)


def _decide(table: torch.dtype, k: int, *, l2: bool = False, adds: bool = False) -> Variant:
    options = kernels.decide_options(k) | {"L2": l2, "ADDS": adds}
    name = f"{table}, {options['C']} kept{', distances' if l2 else ''}{', bias' if adds else ''}"
    dense = table != torch.float32  # as not of 300 columns
    return _variant(name.replace("torch.", ""), kernels.topk_similarity_decide, options, table, dense=dense)


def _of_one() -> list[Variant]:
    """One query, one key, one column."""
    search = kernels.search_options(1, 1) | {"ADDS": True, "RAISES": False}
    decide = kernels.decide_options(1) | {"L2": True, "ADDS": False}
    ones = ("m", "columns", "query_row", "key_row", "k")
    name, table = "of one number", torch.float32
    return [
        _variant(name, kernels.topk_similarity_search, search, torch.bfloat16, dense=True, ones=("n", "m")),
        _variant(name, kernels.topk_similarity_decide, decide, table, dense=False, ones=ones),
    ]


_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16

AOT_VARIANTS = [
    *_of_one(),
    *(_search(_BFLOAT, 10**4, k, adds=adds) for k in (1, 10, 20, 64, 128) for adds in (False, True)),
    *(_search(_BFLOAT, n, 10) for n in (64, 1)),
    *(_search(_HALF, n, 10) for n in (1, 10**4)),
    *(_decide(_FLOAT, k, l2=l2) for k in (1, 10, 20, 64, 128) for l2 in (False, True)),
    *(_decide(table, 10, adds=True) for table in (_FLOAT, _BFLOAT)),
    *(_decide(_HALF, 10, l2=l2) for l2 in (False, True)),
]
