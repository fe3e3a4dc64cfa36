"""What a fit refuses of its tables and pairs, in words."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from fastkit.methods.word_translation.settings import OP, Settings


def check_tables(x: Tensor, y: Tensor, settings: Settings, *, supervised: bool) -> None:
    """That both can be aligned with these options."""
    if x.device != y.device:
        raise RuntimeError(
            f"{OP}: Y must be on the device of X, {x.device}, got {y.device}; move one of them"
        )
    if x.shape[1] != y.shape[1]:
        if not settings.allow_rect:
            raise ValueError(
                f"{OP}: Y must have as many columns as X, {x.shape[1]}, got {y.shape[1]}; pass"
                " allow_rect=True for a semi-orthogonal map"
            )
        for name, value, ours in (
            ("refine", settings.refine, "reciprocal_icp"),
            ("transfer", "" if supervised else settings.transfer, "icp"),
        ):
            if value == ours:
                raise ValueError(
                    f'{OP}: {name}="{ours}" must have tables of one width, got {x.shape[1]} and {y.shape[1]}'
                    f' columns; pass {name}="procrustes"'
                )
    for name, table in (("X", x), ("Y", y)):
        _check_table(name, table, settings, supervised)


def _check_table(name: str, table: Tensor, settings: Settings, supervised: bool) -> None:
    rows, columns = table.shape
    if rows < settings.neighbors:
        raise ValueError(
            f"{OP}: {name} must have at least neighbors={settings.neighbors} rows, got {rows}; lower"
            " neighbors"
        )
    if supervised:
        return
    if settings.components > columns:
        raise ValueError(
            f"{OP}: {name} must have at least components={settings.components} columns, got {columns}; lower"
            " components"
        )
    used = min(rows, settings.words)
    for option in ("components", "batch_size"):
        if used < getattr(settings, option):
            raise ValueError(
                f"{OP}: {name} must have at least {option}={getattr(settings, option)} rows of the first"
                f" words={settings.words}, got {used}; lower {option}, or pass more rows"
            )
    if rows < columns:
        raise ValueError(
            f"{OP}: {name} must have at least as many rows as columns, {columns}, got {rows}; pass more"
            " words, or fewer principal components of them"
        )


def warn_of_few(known: Tensor, x: Tensor, y: Tensor) -> None:
    least = min(x.shape[1], y.shape[1])
    if len(known) < least:
        warnings.warn(
            f"{OP}: pairs should be at least as many as columns, {least}, got {len(known)}: the map is not"
            " unique",
            stacklevel=4,  # fit, which no_grad wraps, and its caller
        )


def as_pairs(value: object, x: Tensor, y: Tensor) -> Tensor:  # (P, 2) int64, on the device of x
    """Rows of both tables that belong together."""
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
        value = torch.from_numpy(value.astype(np.int64))
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype == torch.bool:
        got = value.dtype if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__
        raise TypeError(f"{OP}: pairs must be a tensor or an array of int64, got {got}")
    if value.dim() != 2 or value.shape[1] != 2:
        raise ValueError(f"{OP}: pairs must have shape (P, 2), rows of X and of Y, got {tuple(value.shape)}")
    if not len(value):
        raise ValueError(
            f"{OP}: pairs must have at least one pair, got none; are all words out of the tables?"
        )
    pairs = value.to(x.device, torch.int64)
    for column, (name, table) in enumerate((("X", x), ("Y", y))):
        outside = (pairs[:, column] < 0) | (pairs[:, column] >= len(table))
        if outside.any():
            row = pairs[outside, column][0].item()
            raise ValueError(f"{OP}: pairs must have rows of {name} below {len(table)}, got {row}")
    return pairs
