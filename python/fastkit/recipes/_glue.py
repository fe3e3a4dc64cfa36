"""Labelled sentences and pairs of them in tables, as GLUE has them; docs/data.md describes them."""

from __future__ import annotations

import gzip
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkit._command import Refusal
from fastkit.recipes._experiment import sha256
from fastkit.recipes._options import check_folder

Array = np.ndarray[Any, Any]


class Part(NamedTuple):
    """N sentences, or pairs of them."""

    first: list[str]
    second: list[str] | None
    y: Array  # (N,) int64, 0 to classes - 1; float32 for regression


class Task(NamedTuple):
    """A data set: what is trained on, and the labelled parts that it is judged by."""

    name: str
    kind: str  # a key of METRICS
    train: Part
    held_out: dict[str, Part]  # "dev", "test", or "dev_matched" and the like
    classes: list[str]  # empty for regression
    left_out: int  # lines without a label, or of another number of fields

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        parts = {"train": self.train, **self.held_out}
        return {
            "name": self.name,
            "task": self.kind,
            **{name: len(part.y) for name, part in parts.items()},
            "classes": self.classes,
            "left_out": self.left_out,
            "sha256": sha256(chunk for part in parts.values() for chunk in chunks(part)),
        }


def chunks(part: Part) -> list[bytes]:
    """What tells it from other parts, to be hashed."""
    # No field holds a line break.
    return ["\n".join(texts).encode() for texts in (part.first, part.second or [])] + [part.y.tobytes()]


# Metrics


def _accuracy(y: Array, logits: Array) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(1) == y).mean())}


def _accuracy_and_f1(y: Array, logits: Array) -> dict[str, float]:
    from sklearn.metrics import f1_score

    zero: Any = {"zero_division": 0}  # where no line is of class 1, by the model or in truth
    return {**_accuracy(y, logits), "f1": float(f1_score(y, logits.argmax(1), **zero))}


def _matthews(y: Array, logits: Array) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": float(matthews_corrcoef(y, logits.argmax(1)))}


def _correlations(y: Array, logits: Array) -> dict[str, float]:
    """NaN where all predictions are the same."""
    from scipy.stats import pearsonr, spearmanr

    found = logits[:, 0].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant
        pearson: Any = pearsonr(y, found)
        spearman: Any = spearmanr(y, found)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}


Metric = Callable[[Array, Array], dict[str, float]]  # y (N,), logits (N, classes or 1) -> figures

METRICS: Mapping[str, Metric] = {
    "cola": _matthews, "sst2": _accuracy, "mrpc": _accuracy_and_f1, "stsb": _correlations,
    "qqp": _accuracy_and_f1, "mnli": _accuracy, "qnli": _accuracy, "rte": _accuracy,
    "classification": _accuracy, "regression": _correlations,
}  # fmt: skip
_REGRESSIONS = ("stsb", "regression")
_BINARY = ("cola", "sst2", "mrpc", "qqp", "qnli", "rte")
_F1 = ("mrpc", "qqp")  # which is of the class "1"
_GLUE = (*_BINARY, "stsb", "mnli")

# Tables

# The first whose columns are all there is read; names in lower case.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
    ("premise", "hypothesis"),
    ("sentence",),
)
_LABELS = ("gold_label", "is_duplicate", "quality", "label", "score")
# What a column says of the task, where neither --task nor the folder's name does.
_TELLING = {"is_duplicate": "qqp", "quality": "mrpc", "gold_label": "mnli", "score": "regression"}
_COLA = ["source", "label", "star", "sentence"]  # its files have no header
_NONE = ("", "-")  # the label of pairs on which annotators disagreed


def load(folder: Path, *, kind: str | None = None, target: str | None = None, option: str = "--data") -> Task:
    """The data set in ``folder``: train, and dev or test or both, as .tsv or .tsv.gz.

    Args:
        kind: a key of ``METRICS``; found by the folder's name or the columns without it.
        target: the column of the labels; the first known one without it.
        option: what gave the folder, for messages.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds train.tsv or train.tsv.gz, and dev or test beside it", option)
    paths = {name: path for name in _PARTS if (path := _path(folder, name, option)) is not None}
    if "train" not in paths:
        raise Refusal(f"{option} must hold train.tsv or train.tsv.gz, got neither in {folder}")
    tables = {name: _read(path, name, target) for name, path in paths.items()}
    train = tables.pop("train")
    if train is None:
        raise Refusal(f"{paths['train']} must have labels, got a column of labels in none of its lines")
    held_out = {name: table for name, table in tables.items() if table is not None}
    if not held_out:
        raise Refusal(f"{option} must hold a labelled dev or test part, got train alone in {folder}")
    kind = kind or _kind_of(folder.resolve().name, train)
    for name, table in held_out.items():
        if (table.second is None) != (train.second is None):
            raise Refusal(f"{paths[name]} must have sentences or pairs of them as {paths['train'].name} has")
    classes = [] if kind in _REGRESSIONS else _classes(paths["train"], train, kind)
    parts = {name: _part(paths[name], table, classes) for name, table in {"train": train, **held_out}.items()}
    left_out = sum(table.left_out for table in (train, *held_out.values()))
    return Task(folder.resolve().name, kind, parts.pop("train"), parts, classes, left_out)


_PARTS = (
    "train", "dev", "dev_matched", "dev_mismatched", "test", "test_matched", "test_mismatched",
)  # fmt: skip


class _Table(NamedTuple):
    first: list[str]
    second: list[str] | None
    labels: list[str]
    lines: list[int]  # where each stands, for messages
    column: str  # of the labels
    texts: tuple[str, ...]  # columns of the sentences
    left_out: int


def _path(folder: Path, name: str, option: str) -> Path | None:
    found = [path for suffix in (".tsv", ".tsv.gz") if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise Refusal(f"{option} must hold one file a part, got {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _read(path: Path, part: str, target: str | None) -> _Table | None:
    """None for a part without labels."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} must be a table in UTF-8, got one that cannot be read ({error})") from error
    # By line feeds alone: sentences hold other characters that str.splitlines takes for line breaks.
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    if rows[-1] == [""]:
        rows.pop()
    if rows and len(rows[0]) == 4 and rows[0][1] in ("0", "1"):
        header, start = _COLA, 1
    else:
        header, start = [name.strip().lower() for name in rows[0]] if rows else [], 2
        rows = rows[1:]
    texts = next((names for names in _TEXTS if all(name in header for name in names)), None)
    if texts is None:
        raise Refusal(
            f"{path} must have a header with sentence, or sentence1 and sentence2, or GLUE's names for them,"
            f" got {', '.join(header)[:80] or 'nothing'}"
        )
    names = _LABELS if target is None else (target.lower(),)
    column = next((name for name in names if name in header), None)
    if column is None:
        if part.startswith("test"):
            return None
        raise Refusal(
            f"{path} must have a column of labels, {' or '.join(names)}, got {', '.join(header)[:80]}"
        )
    places, place = [header.index(name) for name in texts], header.index(column)
    whole = [(n, row) for n, row in enumerate(rows, start) if len(row) == len(header)]
    if len(rows) - len(whole) > len(rows) // 100:
        line = next(n for n, row in enumerate(rows, start) if len(row) != len(header))
        raise Refusal(
            f"{path}, line {line} must have {len(header)} fields as the header has, got"
            f" {len(rows[line - start])}; a sentence may hold neither tab nor line break"
        )
    kept = [(n, row) for n, row in whole if row[place].strip() not in _NONE]
    if part.startswith("test") and all(_number(row[place].strip()) == -1 for _, row in kept):
        return None  # as some copies of GLUE fill what is not known
    if not kept:
        raise Refusal(f"{path} must have lines with a label, got none")
    first, *second = ([row[i] for _, row in kept] for i in places)
    return _Table(
        first,
        second[0] if second else None,
        [row[place].strip() for _, row in kept],
        [n for n, _ in kept],
        column,
        texts,
        len(rows) - len(kept),
    )


def _kind_of(folder: str, train: _Table) -> str:
    plain = re.sub("[^a-z0-9]", "", folder.lower().removeprefix("glue"))
    if plain in _GLUE:
        return plain
    if train.column in _TELLING:
        return _TELLING[train.column]
    if train.texts == ("question", "sentence"):
        return "qnli"
    numbers = [_number(label) for label in train.labels]
    fractions = any(number is not None and not number.is_integer() for number in numbers)
    return "regression" if fractions and None not in numbers else "classification"


def _classes(path: Path, train: _Table, kind: str) -> list[str]:
    names = set(train.labels)
    numbered = all(re.fullmatch("[0-9]+", name) for name in names)
    classes = sorted(names, key=int if numbered else None)
    if len(classes) < 2 or (kind in _BINARY and len(classes) > 2):
        wanted = "2" if kind in _BINARY else "at least 2"
        raise Refusal(f"{path} must have {wanted} labels, got {', '.join(classes)[:80]}")
    if kind in _F1 and classes != ["0", "1"]:
        raise Refusal(
            f"{path} must have the labels 0 and 1 for {kind}, whose F1 is that of 1, got"
            f" {', '.join(classes)[:80]}; rename them, or take --task classification"
        )
    if len(classes) > 1000:
        raise Refusal(
            f"{path} must have at most 1000 labels, got {len(classes)}; for scores take --task regression"
        )
    return classes


def _part(path: Path, table: _Table, classes: Sequence[str]) -> Part:
    if not classes:
        scores = [_number(label) for label in table.labels]
        if None in scores:
            place = scores.index(None)
            raise Refusal(
                f"{path}, line {table.lines[place]} must have a number as {table.column}, got"
                f" {table.labels[place][:40]!r}"
            )
        return Part(table.first, table.second, np.array(scores, dtype=np.float32))
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = next((i for i, label in enumerate(table.labels) if label not in numbers), None)
    if unknown is not None:
        raise Refusal(
            f"{path}, line {table.lines[unknown]} must have a label of the train part,"
            f" {', '.join(classes)[:80]}, got {table.labels[unknown][:40]!r}"
        )
    return Part(table.first, table.second, np.array([numbers[label] for label in table.labels]))


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if np.isfinite(np.float32(number)) else None


# Without a folder


def generated() -> Task:
    """Opinions in a language of 37 words: what most words say, each turned by a "not" in front of it."""
    draw = random.Random(0)
    words = [
        f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "sa") for b in ("n", "r", "s", "t", "lu", "mi")
    ]
    good, bad, other = words[:12], words[12:24], words[24:]

    def part(count: int) -> Part:
        sentences, labels = [], []
        while len(labels) < count:
            opinion, sentence = 0, []
            for _ in range(draw.randint(3, 9)):
                word = draw.choice(draw.choice((good, bad, other)))
                turned = word not in other and draw.random() < 0.3
                sentence += ["not", word] if turned else [word]
                opinion += (1 - 2 * turned) * ((word in good) - (word in bad))
            if opinion:
                sentences.append(" ".join(sentence))
                labels.append(int(opinion > 0))
        return Part(sentences, None, np.array(labels))

    return Task(
        "opinions", "classification", part(4000), {"dev": part(500), "test": part(1000)}, ["0", "1"], 0
    )
