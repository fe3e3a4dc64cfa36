"""Data sets of the same task on which a classifier is tested as it is, and whose labels may be others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkit._command import Refusal
from fastkit.recipes import _glue
from fastkit.recipes._glue import Array, Part, Task


class Transfer(NamedTuple):
    """A part of another set, and what its figures are of."""

    name: str
    part: Part
    classes: int  # of the set; those of the classifier may be others

    @property
    def facts(self) -> dict[str, object]:
        return {"name": self.name, "rows": len(self.part.y), "classes": self.classes}

    def accuracy(self, logits: Tensor) -> float:  # (N, C)
        """With two classes on one side and three on the other, the second and the third are one."""
        p = logits.double().softmax(1)
        y = torch.from_numpy(self.part.y)
        if p.shape[1] != self.classes:
            p, y = joined(p), y.clamp(max=1)
        return (p.argmax(1) == y).double().mean().item()


def joined(p: Tensor) -> Tensor:
    """Shares of the first class and of all others."""
    return torch.stack([p[:, 0], p[:, 1:].sum(1)], 1) if p.shape[1] > 2 else p


def load(folders: Sequence[Path], task: Task, rows: int) -> list[Transfer]:
    """The first ``rows`` of the test part of each, or of its dev or train part where it has none.

    Raises:
        Refusal: a folder is not as docs/data.md says, or its labels do not go with those of ``task``.
    """
    found: list[Transfer] = []
    for folder in folders:
        other = _glue.load(folder, kind="classification", target=None)
        part = next((other.held_out[name] for name in ("test", "dev") if name in other.held_out), other.train)
        if (part.second is None) != (task.train.second is None):
            raise Refusal(
                f"--transfer must have {'pairs of ' if task.train.second is not None else ''}sentences as"
                f" --data has, got {folder}"
            )
        mine, theirs = task.classes, other.classes
        if mine != theirs and {len(mine), len(theirs)} != {2, 3}:
            raise Refusal(
                f"--transfer must have the labels of --data, {', '.join(mine)[:80]}, or be of two where that"
                f" is of three or the other way round, got {folder} with {', '.join(theirs)[:80]}"
            )
        if other.name == task.name or other.name in (each.name for each in found):
            raise Refusal(f"--transfer must be other sets than --data, each once, got {other.name} again")
        found.append(Transfer(other.name, _first(part, rows), len(theirs)))
    return found


def generated(task: Task) -> Transfer:
    """Of the recipe's own set: longer sentences, as two of its own end to end."""
    part = task.held_out["test"]
    pairs = [(i, i + 1) for i in range(0, len(part.y) - 1, 2) if part.y[i] == part.y[i + 1]]
    texts = [f"{part.first[i]} {part.first[j]}" for i, j in pairs]
    return Transfer("longer opinions", Part(texts, None, _labels(part.y, pairs)), len(task.classes))


def _labels(y: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    return np.array([y[i] for i, _ in pairs])


def _first(part: Part, rows: int) -> Part:
    second = None if part.second is None else part.second[:rows]
    return Part(part.first[:rows], second, part.y[:rows])
