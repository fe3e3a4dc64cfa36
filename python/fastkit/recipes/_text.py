"""A text in characters, in three parts: to train on, to choose by, to test on; docs/data.md describes it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit._command import Refusal
from fastkit.recipes._experiment import sha256
from fastkit.recipes._options import check_folder

PARTS = ("train", "valid", "test")


class Text(NamedTuple):
    """Characters as their places in ``characters``; one that the training part lacks comes after the last."""

    name: str
    characters: str
    train: Tensor  # (N,) int64, and so are the others
    valid: Tensor
    test: Tensor

    @property
    def vocabulary(self) -> int:
        return len(self.characters) + 1

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        parts = self.train, self.valid, self.test
        return {
            "name": self.name,
            **{part: len(tokens) for part, tokens in zip(PARTS, parts, strict=True)},
            "characters": len(self.characters),
            "unknown": [int((tokens == len(self.characters)).sum()) for tokens in parts],
            "sha256": sha256([self.characters.encode(), *(tokens.numpy().tobytes() for tokens in parts)]),
        }


def descriptions() -> Text:
    """What scikit-learn says of its data sets; the last two tenths are to choose by, and to test on."""
    from sklearn import datasets

    names = "breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"
    text = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    tenth = len(text) // 10
    return _of("descriptions", text[: -2 * tenth], text[-2 * tenth : -tenth], text[-tenth:])


def load(folder: Path) -> Text:
    """The text in ``folder``, train.txt, valid.txt and test.txt, each of which may be gzipped.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds train.txt, valid.txt and test.txt")
    return _of(folder.resolve().name, *(read(folder, part) for part in PARTS))


def read(folder: Path, part: str) -> str:
    """``part``.txt of a folder of ``--data``, or ``part``.txt.gz; a Refusal where there is no such text."""
    path, packed = folder / f"{part}.txt", folder / f"{part}.txt.gz"
    if not path.is_file() and not packed.is_file():
        raise Refusal(f"--data must hold {part}.txt or {part}.txt.gz, got neither in {folder}")
    try:
        raw = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
        text = raw.decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise Refusal(
            f"{folder}: {part} must be text in UTF-8, got one that cannot be read ({error})"
        ) from error
    if len(text) < 2:
        raise Refusal(f"{folder}: {part} must have at least 2 characters, got {len(text)}")
    return text


def _of(name: str, train: str, valid: str, test: str) -> Text:
    characters = "".join(sorted(set(train)))
    places = {character: place for place, character in enumerate(characters)}

    def tokens(text: str) -> Tensor:
        return torch.tensor([places.get(character, len(characters)) for character in text])

    return Text(name, characters, tokens(train), tokens(valid), tokens(test))
