"""What topk_similarity and csls_topk promise: the modes of the table on their page.

``python tests/test_topk_similarity_contract.py`` writes the table into docs/ops/topk_similarity.md.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import IMPLS, unavailable
from fastkit.ops.topk_similarity import KERNELS
from fastkit.testing.contract import CAPABILITIES, Contract, Mode, arithmetic_of

PAGE = Path(__file__).parents[1] / "docs" / "ops" / "topk_similarity.md"

native = pytest.mark.native
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp
]


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


@native
@pytest.mark.parametrize("impl", CONTRACT.running)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("mode", MODES)
def test_cell(mode, capability, impl):
    reason = unavailable(impl, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    CONTRACT.check(mode, capability, impl)


@native
def test_the_table_has_every_implementation():
    assert set(IMPLEMENTATIONS) == set(IMPLS)
    for impl in IMPLS:
        if impl != "reference" and impl not in KERNELS:
            assert unavailable(impl, KERNELS) in IMPLEMENTATIONS[impl]


def test_page_has_the_table():
    if not PAGE.is_file():
        pytest.skip("the tests are here without the documentation")
    text = PAGE.read_text()
    assert text == CONTRACT.on_page(text), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    PAGE.write_text(CONTRACT.on_page(PAGE.read_text()))
