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
from fastkit.recipes._experiment import sha256
from fastkit.recipes._glue import Array, Part, Task


class Transfer(NamedTuple):
    """A part of another set, and what its figures are of."""

    name: str
    part: Part
    classes: int  # of the set; those of the classifier may be others
    kept: tuple[int, int] = (0, 0)  # the class, of the classifier and of the set, beside which others are one

    @property
    def facts(self) -> dict[str, object]:
        return {
            "name": self.name, "rows": len(self.part.y), "classes": self.classes,
            "sha256": sha256(_glue.chunks(self.part)),
        }  # fmt: skip

    def accuracy(self, logits: Tensor) -> float:  # (N, C)
        """With two classes on one side and three on the other, all but the one that is kept are one."""
        p = logits.double().softmax(1)
        y = torch.from_numpy(self.part.y)
        if p.shape[1] != self.classes:
            mine, theirs = self.kept
            p, y = joined(p, mine), (y != theirs).long()
        return (p.argmax(1) == y).double().mean().item()


def joined(p: Tensor, kept: int) -> Tensor:
    """Shares of one class and of all others."""
    others = [c for c in range(p.shape[1]) if c != kept]
    return torch.stack([p[:, kept], p[:, others].sum(1)], 1)


def load(folders: Sequence[Path], task: Task, rows: int) -> list[Transfer]:
    """The first ``rows`` of a held-out part of each: of test if there is one, the matched one of two.

    Raises:
        Refusal: a folder is not as docs/data.md says, or its labels do not go with those of ``task``.
    """
    found: list[Transfer] = []
    for folder in folders:
        other = _glue.load(folder, kind="classification", target=None, option="--transfer")
        names = list(other.held_out)  # in which matched is before mismatched
        part = other.held_out[next((name for name in names if name.startswith("test")), names[0])]
        if (part.second is None) != (task.train.second is None):
            raise Refusal(
                f"--transfer must have {'pairs of ' if task.train.second is not None else ''}sentences as"
                f" --data has, got {folder}"
            )
        if other.name == task.name or other.name in (each.name for each in found):
            raise Refusal(f"--transfer must be other sets than --data, each once, got {other.name} again")
        kept = _kept(task.classes, other.classes, folder)
        found.append(Transfer(other.name, _first(part, rows), len(other.classes), kept))
    return found


def _kept(mine: Sequence[str], theirs: Sequence[str], folder: Path) -> tuple[int, int]:
    """Which class of two and of three is the same: of numbers the first, of names that which both have."""
    if mine == theirs:
        return 0, 0
    listed, got = ", ".join(mine)[:80], f"got {folder} with {', '.join(theirs)[:80]}"
    if {len(mine), len(theirs)} != {2, 3}:
        raise Refusal(
            f"--transfer must have the labels of --data, {listed}, or be of two where that is of three or"
            f" the other way round, {got}"
        )
    if all(label.isdecimal() for label in (*mine, *theirs)):
        return 0, 0
    common = [label for label in mine if label in theirs]
    if len(common) != 1:
        raise Refusal(
            f"--transfer must have a label in common with --data, {listed}, and one alone, or numbers as it"
            f" has, {got}; rename its labels"
        )
    return mine.index(common[0]), theirs.index(common[0])


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
