"""What lora_linear promises: the modes of the table on its page.

``python tests/test_lora_linear_contract.py`` writes the table into docs/ops/lora_linear.md.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.lora_linear import KERNELS
from fastkit.testing.contract import CAPABILITIES, Contract, Mode, arithmetic_of

# The rows

SHAPES = {
    "x": (2, 3, 5),
    "lora_a": (3, 5),
    "lora_b": (4, 3),
    "bias": (4,),
    "weight": (4, 5),
    "lora_x": (2, 3, 5),
}
MASK = torch.rand(SHAPES["lora_a"], generator=torch.Generator().manual_seed(8)) < 0.5
FROZEN = (
    torch.randint(-8, 9, SHAPES["weight"], generator=torch.Generator().manual_seed(9)) / 8
)  # in any dtype
SCALE = 0.7


def inputs_of(leaves: tuple[str, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise; beside a half-precision x, A and B are float32."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(
            arithmetic_of(dtype) if name in ("lora_a", "lora_b") else dtype
        )
        for name in leaves
    )


def function_of(
    op: str, leaves: tuple[str, ...], mask: Tensor | None, impl: str | None
) -> Callable[..., tuple[Tensor, ...]]:
    run = partial(getattr(reference, op)) if impl is None else partial(getattr(ops, op), impl=impl)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        of = dict(zip(leaves, tensors, strict=True))
        x = of["x"]
        weight = of["weight"] if "weight" in of else FROZEN.to(x.dtype)
        adapter = (of["lora_a"], of["lora_b"], SCALE)
        results = run(x, weight, of.get("bias"), *adapter, mask=mask, lora_x=of.get("lora_x"))
        return (results,) if isinstance(results, Tensor) else tuple(results)

    return function


def mode(op: str, *more: str, bias: bool = True, mask: Tensor | None = None) -> Mode:
    """``more``: leaves besides x, A, B and the bias."""
    leaves = ("x", "lora_a", "lora_b", *(["bias"] if bias else []), *more)

    def dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (dtype,) if op == "lora_linear" else (dtype, torch.float32)

    return Mode(partial(inputs_of, leaves), partial(function_of, op, leaves, mask), dtypes)


MODES = {
    "lora_linear": mode("lora_linear"),
    "lora_linear, no bias": mode("lora_linear", bias=False),
    "lora_linear, mask": mode("lora_linear", mask=MASK),
    "lora_linear, lora_x": mode("lora_linear", "lora_x", mask=MASK),
    "lora_linear, trained weight": mode("lora_linear", "weight"),
    "lora_linear_with_stats": mode("lora_linear_with_stats", mask=MASK),
    "lora_linear_with_stats, lora_x": mode("lora_linear_with_stats", "lora_x"),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "every mode in float32, bfloat16 and float16, of CUDA tensors",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("lora_linear", CONTRACT, KERNELS)


@pytest.mark.native
def test_the_table_has_the_dtypes_of_triton():
    covered = [name for name in CAPABILITIES if getattr(torch, name, None) in KERNELS["triton"]]
    assert all(name in IMPLEMENTATIONS["triton"] for name in covered) and len(covered) == 3


if __name__ == "__main__":
    write_page("lora_linear", CONTRACT)
