"""What linear_cross_entropy promises: the modes of the table on its page.

``python tests/test_linear_cross_entropy_contract.py`` writes the table into docs/ops/linear_cross_entropy.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.linear_cross_entropy import KERNELS
from fastkit.testing.contract import CAPABILITIES, Contract, Mode, Refusal, arithmetic_of

# The rows

SHAPES = {"input": (2, 3, 5), "linear_weight": (7, 5), "linear_bias": (7,)}
TARGET = torch.tensor([[3, -100, 0], [6, 3, 1]])
OPTIONS = {
    "weight": torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0, 1.0, 0.25]),  # in any dtype
    "token_weight": torch.tensor([[1.5, 1.0, -0.5], [0.0, 2.0, 1.0]]),
    "label_smoothing": 0.1,
    "softcap": 3.0,
    "z_loss": 0.01,
}


def inputs_of(leaves: tuple[str, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise; beside a half-precision input the bias is float32."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(
            arithmetic_of(dtype) if name == "linear_bias" else dtype
        )
        for name in leaves
    )


def function_of(
    op: str, reduction: str, options: dict[str, Any], impl: str | None
) -> Callable[..., tuple[Tensor, ...]]:
    run = partial(getattr(reference, op)) if impl is None else partial(getattr(ops, op), impl=impl)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        of = {k: v.to(x.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        results = run(x, weight, TARGET, linear_bias=bias, reduction=reduction, **of)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    return function


def mode(op: str, reduction: str, *, bias: bool = False, **options: Any) -> Mode:
    def dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (arithmetic_of(dtype),) * (1 if op == "linear_cross_entropy" else 2)

    leaves = ("input", "linear_weight", *(["linear_bias"] if bias else []))
    return Mode(partial(inputs_of, leaves), partial(function_of, op, reduction, options), dtypes)


MODES = {
    "linear_cross_entropy, mean": mode("linear_cross_entropy", "mean"),
    "linear_cross_entropy, sum, bias, all options": mode("linear_cross_entropy", "sum", bias=True, **OPTIONS),
    "linear_cross_entropy, none": mode("linear_cross_entropy", "none"),
    "linear_cross_entropy_with_lse, mean": mode("linear_cross_entropy_with_lse", "mean"),
    "linear_cross_entropy_with_lse, none, bias, all options": mode(
        "linear_cross_entropy_with_lse", "none", bias=True, **OPTIONS
    ),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "every mode in float32, bfloat16 and float16, of CUDA tensors",
}

SECOND = Refusal("linear_cross_entropy: second derivatives must be those of the reference", ("cpu",))
REFUSALS = {(mode, capability): SECOND for mode in MODES for capability in ("2nd", "3rd")}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, REFUSALS)

test_cell, test_the_table, test_page_has_the_table = checks_of("linear_cross_entropy", CONTRACT, KERNELS)


@pytest.mark.native
def test_the_table_has_the_dtypes_of_triton():
    covered = [name for name in CAPABILITIES if getattr(torch, name, None) in KERNELS["triton"]]
    assert all(name in IMPLEMENTATIONS["triton"] for name in covered) and len(covered) == 3


if __name__ == "__main__":
    write_page("linear_cross_entropy", CONTRACT)
