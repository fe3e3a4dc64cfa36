"""The series of ``run focus``, as tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from fastkit._command import Refusal
from fastkit.recipes import _images, _series
from fastkit.recipes._options import check_folder
from fastkit.recipes._series import Part, Series


class Source(NamedTuple):
    """Series, and what suits them where no option says otherwise."""

    series: Series
    kernel: int
    chunk: int  # a multiple of 8


@dataclass(frozen=True)
class Samples:
    x: Tensor  # (N, T, C)
    lengths: Tensor  # (N,)
    y: Tensor  # (N,)

    def take(self, chosen: Tensor) -> Samples:
        return Samples(self.x[chosen], self.lengths[chosen], self.y[chosen])


class Parts(NamedTuple):
    """What a table's rows are trained on, and what gives their figures."""

    train: Samples
    held_out: Samples


def samples(part: Part) -> Samples:
    x, lengths, y = (torch.from_numpy(array) for array in part)
    return Samples(x.mT.contiguous(), lengths, y)


def read(folder: Path | None) -> Source:
    """The folder's series, or images pixel by pixel; the digits, if there is no folder.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    if folder is None:
        return Source(digits(), kernel=1, chunk=8)
    check_folder(folder, "the folder that holds one .npz, or NAME_TRAIN.ts and NAME_TEST.ts")
    if _holds_images(folder):
        images = _images.load(folder)
        return Source(_pixel_by_pixel(images), kernel=1, chunk=math.lcm(8, images.train.x.shape[2]))
    series = _series.load(folder)
    series = series._replace(train=_series.standardised(series.train), test=_series.standardised(series.test))
    return Source(series, kernel=8, chunk=max(8, series.train.x.shape[2] // 4 // 8 * 8))


def _holds_images(folder: Path) -> bool:
    """Whether its one .npz has neither the lengths nor the names of classes that series have."""
    archives = list(folder.glob("*.npz"))
    if len(archives) != 1 or any(folder.glob("*_TRAIN.ts")):
        return False
    try:
        with ZipFile(archives[0]) as archive:
            names = archive.namelist()
    except (OSError, BadZipFile):
        return False  # the reader of series says so
    return "x_train.npy" in names and not {"len_train.npy", "len_test.npy", "classes.npy"} & {*names}


def _pixel_by_pixel(images: _images.Images) -> Series:
    """Row by row, a channel from -1 to 1."""

    def part(images: _images.Part) -> Part:
        x = (2 * images.x - 1).reshape(len(images.x), 1, -1)
        return Part(x, np.full(len(x), x.shape[2]), images.y)

    classes = [str(label) for label in range(images.classes)]
    return Series(images.name, part(images.train), part(images.test), classes)


def digits() -> Series:
    """scikit-learn's digits, each a series of 64 pixels, row by row of 8; 450 are to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = (images / 8 - 1).astype(np.float32)[:, None]
    lengths = np.full(len(labels), x.shape[2])
    train, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=1)
    train, test = (Part(x[chosen], lengths[chosen], labels[chosen]) for chosen in (train, test))
    return Series("digits", train, test, [str(digit) for digit in range(10)])


def validation(train: Samples) -> Parts:
    """The training part again: three quarters of it, and the quarter by which choices are made."""
    from sklearn.model_selection import train_test_split

    count, classes = len(train.y), len(train.y.unique())
    if train.y.bincount().eq(1).any() or count < 2 * classes:
        raise Refusal("--data must have at least 2 training series of each class, got a class with 1")
    fit, held_out = train_test_split(
        torch.arange(count).numpy(), test_size=max(count // 4, classes), stratify=train.y, random_state=0
    )
    return Parts(train.take(torch.from_numpy(fit)), train.take(torch.from_numpy(held_out)))
