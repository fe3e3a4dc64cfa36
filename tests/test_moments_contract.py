"""What moments and merge_moments promise: the modes of the table on their page.

``python tests/test_moments_contract.py`` writes the table into docs/ops/moments.md.
"""

from collections.abc import Callable
from functools import partial

import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit.ops.moments import KERNELS
from fastkit.testing.contract import Contract, Mode, arithmetic_of

# The rows


def inputs_of(weighted: bool, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise around 1, and positive weights; beside half precision in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(7, 3, generator=generator, dtype=torch.float64)
    weights = 0.1 + torch.rand(7, generator=generator, dtype=torch.float64)
    return (x.to(dtype), weights.to(arithmetic_of(dtype))) if weighted else (x.to(dtype),)


def function_of(impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    """Without weights the count is a number of rows, which has no gradient."""
    run = reference.moments if impl is None else partial(ops.moments, impl=impl)

    def function(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        found = run(x, weights=weights)
        return found[1:] if weights is None else tuple(found)

    return function


def merged_of(impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    """The moments of the first rows and of the others."""
    run, merge = (reference, reference) if impl is None else (ops, ops)
    options = {} if impl is None else {"impl": impl}

    def function(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        parts = (run.moments(x[rows], weights=weights[rows], **options) for rows in (slice(3), slice(3, 7)))
        return tuple(merge.merge_moments(*parts))

    return function


def dtypes_of(weighted: bool, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    mean_and_scatter = (arithmetic_of(dtype),) * 2
    return (torch.float64, *mean_and_scatter) if weighted else mean_and_scatter


MODES = {
    "moments": Mode(partial(inputs_of, False), function_of, partial(dtypes_of, False)),
    "moments, weights": Mode(partial(inputs_of, True), function_of, partial(dtypes_of, True)),
    "merge_moments of two": Mode(partial(inputs_of, True), merged_of, partial(dtypes_of, True)),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "no: this op has no such implementation",
    "triton": "every mode but float64, of CUDA tensors; in tests/interpreted_moments_triton.py",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("moments", CONTRACT, KERNELS)


if __name__ == "__main__":
    write_page("moments", CONTRACT)
