"""What topk_similarity and csls_topk promise: the modes of the table on their page.

``python tests/test_topk_similarity_contract.py`` writes the table into docs/ops/topk_similarity.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.topk_similarity import KERNELS
from fastkit.testing.contract import Contract, Mode, arithmetic_of

# The rows

SHAPES = {"queries": (4, 3), "keys": (6, 3), "sources": (5, 3), "key_bias": (6,)}


def inputs_of(leaves: tuple[str, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise; beside half-precision tables the bias is float32."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(
            arithmetic_of(dtype) if name == "key_bias" else dtype
        )
        for name in leaves
    )


def function_of(
    op: str, leaves: tuple[str, ...], options: dict[str, Any], impl: str | None
) -> Callable[..., tuple[Tensor, ...]]:
    run = partial(getattr(reference, op)) if impl is None else partial(getattr(ops, op), impl=impl)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        """The values: other tests are about the indices."""
        of = dict(zip(leaves[2:], tensors[2:], strict=True))
        return (run(*tensors[:2], 3, **of, **options).values,)

    return function


def mode(op: str, *more: str, **options: Any) -> Mode:
    """``more``: leaves besides queries and keys."""
    leaves = ("queries", "keys", *more)
    return Mode(
        partial(inputs_of, leaves),
        partial(function_of, op, leaves, options),
        lambda dtype: (arithmetic_of(dtype),),
    )


MODES = {
    "topk_similarity, dot": mode("topk_similarity"),
    "topk_similarity, dot, key_bias": mode("topk_similarity", "key_bias"),
    "topk_similarity, cosine, key_bias": mode("topk_similarity", "key_bias", metric="cosine"),
    "topk_similarity, l2": mode("topk_similarity", metric="l2"),
    "csls_topk": mode("csls_topk", neighbors=2),
    "csls_topk, sources": mode("csls_topk", "sources", neighbors=2),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "k up to 128, all but float64, of CUDA tensors; in tests/interpreted_topk_similarity_triton.py",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("topk_similarity", CONTRACT, KERNELS)


if __name__ == "__main__":
    write_page("topk_similarity", CONTRACT)
