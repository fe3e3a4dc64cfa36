"""What phrase_scores promises: the modes of the table on its page.

``python tests/test_phrase_scores_contract.py`` writes the table into docs/ops/phrase_scores.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.phrase_scores import KERNELS
from fastkit.testing.contract import Contract, Mode, arithmetic_of
from fastkit.testing.phrase_scores import make_image_set, stacked

# The rows

NAMES = "candidates", "centroid", "scatter", "chosen", "prior"


def inputs_of(names: tuple[str, ...], sets: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Rows about a common one; beside half-precision candidates scatter and prior are float32."""
    each = [
        make_image_set(5, 4, 2, mean=1.0, prior=True, dtype=dtype, seed=10 * seed + i)
        for i in range(max(sets, 1))
    ]
    inputs = stacked(each) if sets else each[0]
    return tuple(getattr(inputs, name) for name in names)


def function_of(names: tuple[str, ...], impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    run = reference.phrase_scores if impl is None else partial(ops.phrase_scores, impl=impl)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(**dict(zip(names, tensors, strict=True))))

    return function


def mode(*more: str, sets: int = 0) -> Mode:
    """``more``: leaves besides the first three; ``sets``: in front of all."""
    names: Any = (*NAMES[:3], *more)
    return Mode(
        partial(inputs_of, names, sets),
        partial(function_of, names),
        lambda dtype: (arithmetic_of(dtype),) * 3,
    )


MODES = {
    "phrase_scores": mode(),
    "phrase_scores, chosen": mode("chosen"),
    "phrase_scores, chosen, prior": mode("chosen", "prior"),
    "phrase_scores, all, image sets": mode("chosen", "prior", sets=2),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "every mode in float32, bfloat16 and float16, of CUDA tensors",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("phrase_scores", CONTRACT, KERNELS)


if __name__ == "__main__":
    write_page("phrase_scores", CONTRACT)
