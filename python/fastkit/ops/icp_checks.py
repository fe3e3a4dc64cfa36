"""What icp_epoch refuses, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit._autograd import transforms
from fastkit.ops._checks import (
    HALF,
    MOST,
    check_device,
    check_int,
    check_like,
    check_number,
    check_tensors,
    may_look_at,
    shape,
)

DTYPES = (torch.float32, torch.float64)
MOST_ROWS = 2**31
EPOCHS = 2**32  # which a word of the counter holds


def check_arguments(
    op: str, source: Tensor, target: Tensor, w_xy: Tensor, w_yx: Tensor, seeds: Tensor
) -> None:
    if source.dtype not in DTYPES:
        cure = "cast it with source.float()" if source.dtype in HALF else "cast it to torch.float32"
        raise TypeError(f"{op}: source must be torch.float32 or torch.float64, got {source.dtype}; {cure}")
    _check_table(op, "source", "n", source)
    check_like(op, "target", target, source, "source")
    _check_table(op, "target", "m", target)
    columns = source.shape[1]
    if target.shape[1] != columns:
        raise ValueError(
            f"{op}: target must have shape (m, D) with D = {columns}, as source has, got {shape(target)};"
            " bring both tables to one width first, as by their principal axes"
        )
    for name, w in (("w_xy", w_xy), ("w_yx", w_yx)):
        check_like(op, name, w, source, "source")
        if w.dim() != 3 or tuple(w.shape[1:]) != (columns, columns):
            raise ValueError(
                f"{op}: {name} must have shape (R, D, D) with D = {columns}, got {shape(w)};"
                f" a single map is passed as {name}[None]"
            )
    restarts = w_xy.shape[0]
    if restarts == 0:
        raise ValueError(f"{op}: w_xy must have R >= 1 restarts, got {shape(w_xy)}; skip the call for R = 0")
    if w_yx.shape[0] != restarts:
        raise ValueError(
            f"{op}: w_yx must have the R of w_xy, {restarts}, got {shape(w_yx)}; a restart has a map each way"
        )
    _check_int64(op, "seeds", seeds, source, "(R,)", (restarts,), "torch.arange(R) will do")


def check_options(
    op: str,
    rows: tuple[int, int],
    epoch: int,
    batch_size: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    cycle_weight: float,
    mutual_only: bool,
) -> None:
    check_int(op, "epoch", epoch)
    if not 0 <= epoch < EPOCHS:
        raise ValueError(f"{op}: epoch must be at least 0 and below 2^32, got {epoch}; count from 0")
    check_int(op, "batch_size", batch_size)
    if not isinstance(mutual_only, bool):
        raise TypeError(f"{op}: mutual_only must be a bool, got {type(mutual_only).__name__}")
    if batch_size < 1:
        raise ValueError(f"{op}: batch_size must be at least 1, got {batch_size}")
    if batch_size >= 2**63:
        raise ValueError(f"{op}: batch_size must be below 2^63, got {batch_size}; pass the rows of a table")
    if batch_size > min(rows) and not mutual_only:
        raise ValueError(
            f"{op}: batch_size must be at most the rows of the smaller table, {min(rows)}, got {batch_size};"
            " pass min(batch_size, len(source), len(target))"
        )
    check_number(op, "lr", lr)
    if not 0 < lr <= MOST:
        raise ValueError(f"{op}: lr must be finite and greater than 0, got {lr}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: betas must be two numbers, those of Adam's moments, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(op, f"betas[{i}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"{op}: betas[{i}] must be in [0, 1), got {beta}")
    check_number(op, "eps", eps)
    if not 0 < eps <= MOST:
        raise ValueError(
            f"{op}: eps must be finite and greater than 0, got {eps}; without it a gradient of 0 gives 0 / 0"
        )
    check_number(op, "cycle_weight", cycle_weight)
    if not 0 <= cycle_weight <= MOST:
        raise ValueError(f"{op}: cycle_weight must be finite and not negative, got {cycle_weight}")


def check_pairs(
    op: str, pairs: tuple[Tensor, Tensor] | None, source: Tensor, target: Tensor, restarts: int
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the two, or None twice. Their values are looked at on a CPU, where that waits for nothing."""
    if pairs is None:
        return None, None
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
        got = f"{len(pairs)} of them" if isinstance(pairs, (tuple, list)) else type(pairs).__name__
        raise TypeError(
            f"{op}: pairs must be two tensors, nearest_target and nearest_source, or None, got {got}"
        )
    check_tensors(op, **{"pairs[0]": pairs[0], "pairs[1]": pairs[1]})
    tables = (("n", source, "target", target), ("m", target, "source", source))
    for i, (nearest, (size, rows, name, others)) in enumerate(zip(pairs, tables, strict=True)):
        want = (restarts, rows.shape[0])
        cure = "one row for all restarts is expanded with .expand(R, -1)"
        _check_int64(op, f"pairs[{i}]", nearest, source, f"(R, {size})", want, cure)
        count = others.shape[0]
        if not may_look_at(nearest):
            continue
        outside = (nearest < 0) | (nearest >= count)
        if bool(outside.any()):
            at = tuple(int(j) for j in outside.nonzero()[0])
            raise ValueError(
                f"{op}: pairs[{i}] must be rows of {name}, at least 0 and below {count}, got"
                f" {int(nearest[at])} at index {at}; leave out restarts that have found no pairs"
            )
    return pairs[0], pairs[1]


def refuse_transforms(op: str) -> None:
    if transforms():
        raise RuntimeError(
            f"{op}: has no derivative, and no rule for torch.func transforms or forward mode; call it outside"
            " of them, and pass what vmap would batch as restarts"
        )


def _check_table(op: str, name: str, size: str, table: Tensor) -> None:
    if table.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape ({size}, D), got {shape(table)}")
    if 0 in table.shape:
        raise ValueError(f"{op}: {name} must have {size} >= 1 and D >= 1, got {shape(table)}")
    if table.shape[0] >= MOST_ROWS:
        raise ValueError(
            f"{op}: {name} must have fewer than 2^31 rows, got {shape(table)}; pass the most frequent ones"
        )


def _check_int64(
    op: str, name: str, tensor: Tensor, source: Tensor, sizes: str, want: tuple[int, ...], cure: str
) -> None:
    check_device(op, name, tensor, source, "source")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be torch.int64, got {tensor.dtype}; cast it with {name}.long()")
    if tuple(tensor.shape) != want:
        raise ValueError(f"{op}: {name} must have shape {sizes} = {want}, got {shape(tensor)}; {cure}")
