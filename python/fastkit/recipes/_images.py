"""Grey images and their classes, divided into a training and a test part; docs/data.md describes the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkit._command import Refusal
from fastkit.recipes._npz import Array, described, hash_of, read_arrays
from fastkit.recipes._options import check_folder


class Part(NamedTuple):
    """N images with a class each."""

    x: Array  # (N, H, W) float32, 0 to 1
    y: Array  # (N,) int64, 0 to classes - 1


class Images(NamedTuple):
    """A data set with its own division; each class is in the training part."""

    name: str
    train: Part
    test: Part
    classes: int

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        return {
            "name": self.name,
            "train": len(self.train.y),
            "test": len(self.test.y),
            "size": list(self.train.x.shape[1:]),
            "classes": self.classes,
            "sha256": hash_of([*self.train, *self.test]),
        }


def digits() -> Images:
    """scikit-learn's digits, 8 x 8; a stratified three tenths of the 1797 are to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    flat, y = load_digits(return_X_y=True)
    x = (flat / 16).astype(np.float32).reshape(-1, 8, 8)
    train, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=0)
    train, test = (Part(x[chosen], y[chosen].astype(np.int64)) for chosen in (train, test))
    return Images("digits", train, test, 10)


_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(folder: Path) -> Images:
    """The data set in ``folder``, one .npz.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds one .npz of images")
    archives = sorted(folder.glob("*.npz"))
    if len(archives) != 1:
        names = ", ".join(path.name for path in archives) or "none"
        raise Refusal(f"--data must hold one .npz of images, got {names} in {folder}")
    path = archives[0]
    arrays = read_arrays(path, _KEYS)
    train, test = (_part(path, arrays, part) for part in ("train", "test"))
    if train.x.shape[1:] != test.x.shape[1:]:
        raise Refusal(
            f"{path}: train and test must have images of one size, got {train.x.shape[1:]} and"
            f" {test.x.shape[1:]}"
        )
    there = np.unique(train.y)
    classes = len(there)
    if classes < 2 or there[-1] >= classes:
        found = ", ".join(map(str, there[:20])) + (", ..." if classes > 20 else "")
        raise Refusal(
            f"{path}: y_train must have two classes at least, numbered from 0 on without gaps, got {found}"
        )
    if test.y.max() >= classes:
        raise Refusal(
            f"{path}: y_test must have classes of y_train, 0 to {classes - 1}, got {int(test.y.max())}"
        )
    return Images(path.stem, train, test, classes)


def _part(path: Path, arrays: Mapping[str, Array], part: str) -> Part:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.ndim != 3 or min(x.shape) < 1 or min(x.shape[1:]) < 2:
        raise Refusal(
            f"{path}: x_{part} must be grey images, of shape (images, height, width), one at least and of"
            f" 2 x 2 at least, got {described(x)}"
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise Refusal(
            f"{path}: y_{part} must be integers of shape {x.shape[:1]}, one for each image of x_{part}, got"
            f" {described(y)}"
        )
    if y.min() < 0:
        raise Refusal(f"{path}: y_{part} must be classes from 0 on, got {int(y.min())}")
    if x.dtype == np.uint8:
        return Part(x.astype(np.float32) / 255, y.astype(np.int64))
    if x.dtype.kind != "f" or not ((x >= 0) & (x <= 1)).all():  # NaN is neither
        found = f"{described(x)}" if x.dtype.kind != "f" else f"{x.min()} to {x.max()}"
        raise Refusal(
            f"{path}: x_{part} must be uint8, or floats from 0 to 1, got {found}; divide by the largest value"
        )
    return Part(x.astype(np.float32), y.astype(np.int64))
