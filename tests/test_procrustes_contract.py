"""What polar and procrustes promise: the modes of the table on their page.

``python tests/test_procrustes_contract.py`` writes the table into docs/ops/procrustes.md.
"""

from collections.abc import Callable
from functools import partial

import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit.ops.procrustes import KERNELS, polar, procrustes
from fastkit.reference.procrustes import polar as reference_polar
from fastkit.reference.procrustes import procrustes as reference_procrustes
from fastkit.testing.contract import Contract, Mode

# The rows


def noise(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return (torch.eye(3, dtype=dtype) + 0.3 * noise(dtype, seed, 2, 3, 3),)


def tables(columns: int, of_target: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """The target is a map of the source, and noise: the product is not near a singular one."""
    source = noise(torch.float64, seed, 8, columns)
    target = source @ torch.eye(columns, of_target, dtype=torch.float64)
    return source.to(dtype), (target + 0.3 * noise(torch.float64, seed + 100, 8, of_target)).to(dtype)


def function_of(op: Callable, reference: Callable, impl: str | None) -> Callable[..., tuple[Tensor, ...]]:
    run = reference if impl is None else partial(op, impl=impl)
    return lambda *leaves: (run(*leaves),)


def mode(inputs: Callable, op: Callable, reference: Callable) -> Mode:
    return Mode(inputs, partial(function_of, op, reference), lambda dtype: (dtype,))


MODES = {
    "polar": mode(matrix, polar, reference_polar),
    "procrustes": mode(partial(tables, 3, 3), procrustes, reference_procrustes),
    "procrustes, D < E": mode(partial(tables, 2, 3), procrustes, reference_procrustes),
    "procrustes, D > E": mode(partial(tables, 3, 2), procrustes, reference_procrustes),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "every mode, of CUDA tensors",
    "triton": "no: this op has no such implementation",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, {})

test_cell, test_the_table, test_page_has_the_table = checks_of("procrustes", CONTRACT, KERNELS)


if __name__ == "__main__":
    write_page("procrustes", CONTRACT)
