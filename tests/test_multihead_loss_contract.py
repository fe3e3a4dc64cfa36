"""What multihead_loss and orthogonality_penalty promise: the modes of the table on their page.

``python tests/test_multihead_loss_contract.py`` writes the table into docs/ops/multihead_loss.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.multihead_loss import KERNELS
from fastkit.ops.multihead_loss_penalty import PENALTY_KERNELS
from fastkit.testing.contract import Contract, Mode, arithmetic_of

# The rows

B, H, C, D = 6, 4, 5, 3
ACTIVE = torch.tensor([True, True, False, True])
WEIGHTS = torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0])  # in any dtype
TARGETS = {
    "single_label": torch.tensor([3, -100, 0, 4, 3, 1]),
    "multi_label": torch.linspace(0, 1, B * C, dtype=torch.float64).view(B, C),
    "regression": torch.linspace(-1, 2, B, dtype=torch.float64),
}


def inputs_of(problem: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise; beside a half-precision x the bias is float32."""
    generator = torch.Generator().manual_seed(seed)
    classes = 1 if problem == "regression" else C
    shapes = (B, D), (H, classes, D), (H, classes)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(dtype), bias.to(arithmetic_of(dtype))


def function_of(problem: str, options: dict[str, Any], impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    run = reference.multihead_loss if impl is None else partial(ops.multihead_loss, impl=impl)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        of = dict(options)
        if "class_weight" in of:
            of["class_weight"] = of["class_weight"].to(x.dtype)
        return (run(x, weight, bias, TARGETS[problem], problem=problem, **of).loss,)

    return function


def mode(problem: str, **options: Any) -> Mode:
    return Mode(
        partial(inputs_of, problem),
        partial(function_of, problem, options),
        lambda dtype: (arithmetic_of(dtype),),
    )


def heads_of(dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise, of which no product is near 0."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(H, 2, D, generator=generator, dtype=torch.float64).to(dtype),)


def penalty_of(options: dict[str, Any], impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    run = reference.orthogonality_penalty if impl is None else partial(ops.orthogonality_penalty, impl=impl)
    return lambda weight: (run(weight, **options),)


def penalty(**options: Any) -> Mode:
    return Mode(heads_of, partial(penalty_of, options), lambda dtype: (arithmetic_of(dtype),))


MODES = {
    "multihead_loss, single_label": mode("single_label"),
    "multihead_loss, single_label, all options": mode(
        "single_label", active=ACTIVE, class_weight=WEIGHTS, label_smoothing=0.1
    ),
    "multihead_loss, multi_label, all options": mode("multi_label", active=ACTIVE, class_weight=WEIGHTS),
    "multihead_loss, regression, active": mode("regression", active=ACTIVE),
    "orthogonality_penalty, abs": penalty(kind="abs"),
    "orthogonality_penalty, squared, active": penalty(kind="squared", active=ACTIVE),
    "orthogonality_penalty, cos_abs, centered": penalty(kind="cos_abs", center_classes=True),
    "orthogonality_penalty, cos_squared, active": penalty(kind="cos_squared", active=ACTIVE),
    "orthogonality_penalty, huber": penalty(kind="huber", huber_width=0.7),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "every mode in float32, bfloat16 and float16, of CUDA tensors",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("multihead_loss", CONTRACT, KERNELS)


@pytest.mark.native
def test_both_ops_have_the_same_implementations():
    assert PENALTY_KERNELS == KERNELS


if __name__ == "__main__":
    write_page("multihead_loss", CONTRACT)
