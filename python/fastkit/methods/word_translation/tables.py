"""Tables of embeddings: what is refused of them, their preprocessing, and maps applied to their rows.

What is computed for a row here has the same bits whatever other rows are in the table: sums over columns are
a tree, or one column after another, by element-wise operations. No matrix product promises that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastkit._threads import threads
from fastkit.methods.word_translation.settings import OP, Step

_SHOWN = 5  # rows in a message
_LARGEST = 1e15  # squares and sums of which are far from the end of float32
_ROWS = 8192  # of a table in float64 at a time
_BLOCK = 2**16  # entries of a mapped block on the CPU: it stays in a cache while columns are added up


def as_table(name: str, value: object) -> Tensor:  # (n, D) float32
    """A tensor or an array of finite rows, none of zeros."""
    if isinstance(value, np.ndarray):
        if not np.issubdtype(value.dtype, np.floating):
            raise TypeError(
                f"{OP}: {name} must be of floats, got {value.dtype}; pass {name}.astype('float32')"
            )
        with np.errstate(over="ignore"):  # it becomes inf, which is refused below
            value = np.ascontiguousarray(value, dtype=np.float32)
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    if type(value) is not Tensor and not isinstance(value, torch.nn.Parameter):
        raise TypeError(f"{OP}: {name} must be a tensor or a numpy array, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{OP}: {name} must be dense, got {value.layout}; pass {name}.to_dense()")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{OP}: {name} must be of floats, got {value.dtype}; pass {name}.float()")
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(f"{OP}: {name} must have rows and columns, got shape {tuple(value.shape)}")
    table = value.detach().float().contiguous()
    _refuse_rows(f"{name} must be finite, got NaN or inf", ~table.isfinite().all(1), "drop them")
    _refuse_rows(f"{name} must have no row of zeros, got zeros", (table == 0).all(1), "drop them")
    if table.numel() and not table.abs().amax() <= _LARGEST:
        raise ValueError(f"{OP}: {name} must have entries up to {_LARGEST:g}, got larger ones; divide it")
    return table


def _refuse_rows(what: str, are: Tensor, cure: str) -> None:
    rows = are.nonzero().flatten()
    if len(rows):
        listed = ", ".join(map(str, rows[:_SHOWN].tolist()))
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        raise ValueError(f"{OP}: {what} in {_plural(len(rows))} {listed}{more}; {cure}")


def _plural(count: int) -> str:
    return "row" if count == 1 else "rows"


# Preprocessing


def preprocessed(name: str, table: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """The table after the steps, and the mean that each "center" took away (steps, D); zeros of others."""
    means = table.new_zeros(len(steps), table.shape[1])
    for i, step in enumerate(steps):
        if step == "center":
            means[i] = _mean(table)
            table = table - means[i]
            zero = (table == 0).all(1)
            _refuse_rows(f"{name} must have rows that differ from their mean, got none", zero, "drop them")
        else:
            table = unit(table)
    return table, means


def apply_steps(table: Tensor, steps: Sequence[Step], means: Tensor) -> Tensor:
    """The same with the means of before."""
    for step, mean in zip(steps, means, strict=True):
        table = table - mean if step == "center" else unit(table)
    return table


def _mean(table: Tensor) -> Tensor:
    total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    with threads(1):
        for block in table.split(_ROWS):
            total += block.double().sum(0)
    return (total / len(table)).float()


def unit(table: Tensor) -> Tensor:  # (n, D)
    """Each row over its norm, for any scale; a row of zeros as it is."""
    largest = table.abs().amax(1, keepdim=True)
    scaled = table / torch.where(largest > 0, largest, 1.0)
    norm = row_sums(scaled * scaled).sqrt_().unsqueeze(1)
    return scaled.div_(torch.where(norm > 0, norm, 1.0))


def row_sums(table: Tensor) -> Tensor:  # (n, D) -> (n,)
    """The sum of each row, by halves: the same bits whatever other rows there are."""
    while (columns := table.shape[1]) > 1:
        half = columns // 2
        folded = table[:, :half] + table[:, half : 2 * half]
        if columns % 2:
            folded[:, 0] += table[:, -1]
        table = folded
    return table[:, 0]


def mapped(table: Tensor, w: Tensor) -> Tensor:  # (n, D), (E, D) -> (n, E)
    """``table @ w.T``, summed column after column: the same bits whatever other rows there are."""
    columns = w.T.contiguous()
    result = table.new_zeros(len(table), len(w))
    rows = max(1, _BLOCK // len(w)) if table.device.type == "cpu" else max(1, len(table))
    for block, total in zip(table.split(rows), result.split(rows), strict=True):
        product = torch.empty_like(total)
        for x, c in zip(block.T.contiguous().unsqueeze(2), columns, strict=True):
            total += torch.mul(x, c, out=product)
    return result
