"""A text in words, in three parts: to train on, to look at, to test on; docs/data.md describes it."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit._command import Refusal
from fastkit.recipes import _text
from fastkit.recipes._experiment import sha256
from fastkit.recipes._options import check_folder

UNKNOWN, END = "<unk>", "<eos>"
SPECIAL = 2  # the two come first
MOST = 10_000  # words of an open vocabulary


class Corpus(NamedTuple):
    """Words as their places in ``words``: first <unk> and <eos>, then the most frequent."""

    name: str
    words: tuple[str, ...]
    train: Tensor  # (N,) int64, and so are the others
    valid: Tensor
    test: Tensor

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        parts = self.train, self.valid, self.test
        return {
            "name": self.name,
            **{part: len(tokens) for part, tokens in zip(_text.PARTS, parts, strict=True)},
            "words": len(self.words),
            "unknown": [round((tokens == 0).double().mean().item(), 6) for tokens in parts],
            "sha256": sha256(["\n".join(self.words).encode(), *(part.numpy().tobytes() for part in parts)]),
        }


def load(folder: Path, *, train_words: int | None = None, vocabulary: int | None = None) -> Corpus:
    """The text in ``folder``, train.txt, valid.txt and test.txt, each of which may be gzipped.

    Args:
        train_words: so many words of train.txt, ends of lines among them, are the training part.
        vocabulary: as many of its words, the most frequent, are known beside <unk> and <eos>. Default: all
            where <unk> is among them, as the vocabulary then is a closed one, else 10,000. Where all would be
            known and none is <unk>, those that occur once are it.

    Raises:
        Refusal: it is not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds train.txt, valid.txt and test.txt")
    train, valid, test = (words(_text.read(folder, part)) for part in _text.PARTS)
    return _of(folder.resolve().name, train, valid, test, train_words, vocabulary)


def generated(
    *, train_words: int | None = None, vocabulary: int | None = None, words: int = 60_000
) -> Corpus:
    """Made up: classes of words that follow each other, and words that like to follow a certain one."""
    generator = torch.Generator().manual_seed(0)
    classes, of_class = 30, 40

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    follows = [list(accumulate(row)) for row in torch.softmax(2 * randn(classes, classes), 1).tolist()]
    zipf = list(accumulate(1 / (rank + 1) for rank in range(of_class)))
    partner = torch.randperm(classes * of_class, generator=generator).tolist()
    tenth = words // 10  # of valid, and of test
    lines: list[list[str]] = [[]]
    word = 0
    for stop, own, next_class, next_word in torch.rand(words + 2 * tenth, 4, generator=generator).tolist():
        if stop < 0.08:
            lines.append([])
        if own < 0.3:
            word = partner[word]
        else:
            chosen = min(bisect(follows[word // of_class], next_class), classes - 1)
            word = chosen * of_class + bisect(zipf, next_word * zipf[-1])
        lines[-1].append(f"w{word}")
    found = [word for line in lines for word in (*line, END)]
    parts = found[:words], found[words : words + tenth], found[words + tenth : words + 2 * tenth]
    return _of("generated", *parts, train_words, vocabulary)


def words(text: str) -> list[str]:
    """Of each line its words, which have blanks between, and <eos>."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # after the last line's end
    return [word for line in lines for word in (*line.split(), END)]


def _of(
    name: str,
    train: list[str],
    valid: list[str],
    test: list[str],
    train_words: int | None,
    vocabulary: int | None,
) -> Corpus:
    if train_words is not None:
        if train_words > len(train):
            raise Refusal(
                f"--train-words must be at most {len(train)}, those of the training part, got {train_words};"
                " leave it out"
            )
        train = train[:train_words]
    counts = Counter(train)
    limit = vocabulary or (len(counts) if UNKNOWN in counts else MOST)
    by_count = sorted(counts.keys() - {UNKNOWN, END}, key=lambda word: (-counts[word], word))
    if UNKNOWN not in counts and len(by_count) <= limit:  # or <unk> would be a word that training never has
        by_count = [word for word in by_count if counts[word] > 1]
    known = (UNKNOWN, END, *by_count[:limit])
    places = {word: place for place, word in enumerate(known)}
    return Corpus(
        name, known, *(torch.tensor([places.get(w, 0) for w in part]) for part in (train, valid, test))
    )
