"""Labelled time series in the formats of the UCR archive; docs/data.md describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkit._command import Refusal
from fastkit.recipes._npz import Array, described, hash_of, read_arrays
from fastkit.recipes._options import check_folder


class Part(NamedTuple):
    """N series of C channels; behind its length, a series is padded with zeros."""

    x: Array  # (N, C, T) float32
    lengths: Array  # (N,) int64
    y: Array  # (N,) int64, 0 to classes - 1


class Series(NamedTuple):
    """A data set with the archive's own division."""

    name: str
    train: Part
    test: Part
    classes: list[str]

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        return {
            "name": self.name,
            "train": len(self.train.y),
            "test": len(self.test.y),
            "channels": self.train.x.shape[1],
            "longest": int(max(self.train.lengths.max(), self.test.lengths.max())),
            "classes": self.classes,
            "sha256": hash_of([*self.train, *self.test]),
        }


def load(folder: Path) -> Series:
    """The data set in ``folder``: one .npz, or NAME_TRAIN.ts and NAME_TEST.ts.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds one .npz, or NAME_TRAIN.ts and NAME_TEST.ts")
    archives, trains = sorted(folder.glob("*.npz")), sorted(folder.glob("*_TRAIN.ts"))
    if len(archives) + len(trains) != 1:
        names = ", ".join(path.name for path in [*archives, *trains]) or "neither"
        raise Refusal(f"--data must hold one .npz or one NAME_TRAIN.ts, got {names} in {folder}")
    return _read_npz(archives[0]) if archives else _read_ts_pair(trains[0])


def standardised(part: Part) -> Part:
    """Each channel of each series with mean 0 and variance 1 over its length; a constant one is 0."""
    inside = np.arange(part.x.shape[2]) < part.lengths[:, None, None]
    count = part.lengths[:, None, None]
    x = part.x.astype(np.float64)
    centred = np.where(inside, x - x.sum(2, keepdims=True, where=inside) / count, 0)
    std = np.sqrt((centred**2).sum(2, keepdims=True) / count)
    scale = np.abs(x).max(2, keepdims=True)
    flat = std <= 1e-12 * scale  # what rounding in float64 leaves of a constant
    return part._replace(x=(centred / np.where(flat, np.inf, std)).astype(np.float32))


def _checked(name: str, where: object, train: Part, test: Part, classes: Sequence[str]) -> Series:
    """What must hold whatever the format; ``where`` is the file or folder that messages name."""
    train = _checked_part(f"{where}, train part", train, classes)
    test = _checked_part(f"{where}, test part", test, classes)
    if train.x.shape[1] != test.x.shape[1]:
        raise Refusal(
            f"{where}: train and test must have the same channels, got {train.x.shape[1]} and"
            f" {test.x.shape[1]}"
        )
    unseen = [name for label, name in enumerate(classes) if label in test.y and label not in train.y]
    if unseen:
        raise Refusal(
            f"{where}: each class of the test part must be in the train part, got {', '.join(unseen)} in the"
            " test part alone"
        )
    return Series(name, train, test, list(classes))


def _checked_part(where: str, part: Part, classes: Sequence[str]) -> Part:
    x, lengths, y = part
    if len(y) == 0:
        raise Refusal(f"{where} must have series, got none")
    if lengths.min() < 1 or lengths.max() > x.shape[2]:
        raise Refusal(f"{where}: lengths must be 1 to {x.shape[2]}, got {lengths.min()} to {lengths.max()}")
    if y.min() < 0 or y.max() >= len(classes):
        raise Refusal(f"{where}: labels must be 0 to {len(classes) - 1}, got {y.min()} to {y.max()}")
    inside = np.arange(x.shape[2]) < lengths[:, None, None]
    with np.errstate(over="ignore"):
        x = np.where(inside, x, 0).astype(np.float32)[:, :, : lengths.max()]
    if not np.isfinite(x).all():
        raise Refusal(
            f"{where}: values must be finite in float32, got NaN or infinity; fill the gaps, or leave those"
            " series out"
        )
    return Part(x, lengths.astype(np.int64), y.astype(np.int64))


# .npz

_KEYS = ("x_train", "len_train", "y_train", "x_test", "len_test", "y_test", "classes")


def _read_npz(path: Path) -> Series:
    arrays = read_arrays(path, _KEYS)
    classes = arrays["classes"]
    if classes.ndim != 1 or classes.dtype.kind not in "Uiu":
        raise Refusal(f"{path}: classes must be a list of names, got {described(classes)}")
    names = [str(name) for name in classes.tolist()]
    return _checked(path.stem, path, _npz_part(path, arrays, "train"), _npz_part(path, arrays, "test"), names)


def _npz_part(path: Path, arrays: Mapping[str, Array], part: str) -> Part:
    x, lengths, y = (arrays[f"{key}_{part}"] for key in ("x", "len", "y"))
    if x.ndim != 3 or 0 in x.shape[1:] or x.dtype.kind not in "fiu":
        raise Refusal(
            f"{path}: x_{part} must be numbers of shape (series, channels, time), got {described(x)}"
        )
    for key, array in ((f"len_{part}", lengths), (f"y_{part}", y)):
        if array.shape != x.shape[:1] or array.dtype.kind not in "iu":
            raise Refusal(
                f"{path}: {key} must be integers of shape {x.shape[:1]}, one for each series of x_{part}, got"
                f" {described(array)}"
            )
    return Part(x, lengths, y)


# .ts


def _read_ts_pair(train_path: Path) -> Series:
    name = train_path.name.removesuffix("_TRAIN.ts")
    test_path = train_path.with_name(f"{name}_TEST.ts")
    if not test_path.is_file():
        raise Refusal(f"--data must hold {test_path.name} beside {train_path.name}, got {train_path.parent}")
    (classes, train), (test_classes, test) = _read_ts(train_path), _read_ts(test_path)
    if classes != test_classes:
        raise Refusal(
            f"{test_path}: @classLabel must be that of {train_path.name}, {' '.join(classes)}, got"
            f" {' '.join(test_classes)}"
        )
    return _checked(name, train_path.parent, train, test, classes)


def _read_ts(path: Path) -> tuple[list[str], Part]:
    try:
        lines = enumerate(path.read_text("utf8").splitlines(), 1)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} must be a text in UTF-8, got one that cannot be read ({error})") from error
    content = ((n, line.strip()) for n, line in lines if line.strip() and not line.lstrip().startswith("#"))
    classes = _read_header(path, content)
    series: list[list[Array]] = []
    y: list[int] = []
    for number, line in content:
        where = f"{path}, line {number}"
        *channels, label = (field.strip() for field in line.split(":"))
        if label not in classes:
            raise Refusal(f"{where} must end with one of the classes {' '.join(classes)}, got {label[:40]!r}")
        try:
            series.append([np.array(channel.split(","), dtype=np.float64) for channel in channels])
        except ValueError as error:
            gap = "; fill the gaps, or leave that series out" if "?" in line else ""
            raise Refusal(f"{where} must have numbers with commas between, got: {error}{gap}") from error
        y.append(classes.index(label))
        if not channels or len(channels) != len(series[0]):
            raise Refusal(f"{where} must have {len(series[0]) or 1} channels, got {len(channels)}")
        if len({len(channel) for channel in series[-1]}) != 1:
            raise Refusal(f"{where}: the channels of a series must have one length, got several")
    if not series:
        raise Refusal(f"{path} must have series after @data, got none")
    lengths = np.array([len(channels[0]) for channels in series])
    x = np.zeros((len(series), len(series[0]), lengths.max()))
    for row, channels in zip(x, series, strict=True):
        row[:, : len(channels[0])] = channels
    return classes, Part(x, lengths, np.array(y))


def _read_header(path: Path, lines: Iterator[tuple[int, str]]) -> list[str]:
    """Up to @data; returns the classes."""
    classes: list[str] = []
    for number, line in lines:
        tag, *values = line.split()
        match tag.lower(), [value.lower() for value in values[:1]]:
            case "@data", _:
                if classes:
                    return classes
                break
            case "@timestamps", ["true"]:
                raise Refusal(f"{path}: @timeStamps must be false, got true; leave the times out")
            case "@classlabel", ["true"]:
                classes = values[1:]
            case _:
                pass
        if not line.startswith("@"):
            raise Refusal(f"{path}, line {number} must be a tag, or come after @data, got {line[:40]!r}")
    raise Refusal(f"{path} must have @classLabel true with the classes, and then @data, got no such lines")
