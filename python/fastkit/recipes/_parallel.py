"""Sentences of two languages, each the translation of the other's; docs/data.md describes the files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkit._command import Refusal
from fastkit.recipes import _text
from fastkit.recipes._experiment import sha256
from fastkit.recipes._options import check_folder

Pairs = list[tuple[str, str]]
LARGEST = 1000  # of the parts to look at meanwhile, and to test on
LEAST = 40  # pairs


class Parallel(NamedTuple):
    """Pairs of a source and a target, in three parts."""

    name: str
    train: Pairs
    valid: Pairs
    test: Pairs

    def facts(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        parts = self.train, self.valid, self.test
        return {
            "name": self.name,
            **{part: len(pairs) for part, pairs in zip(_text.PARTS, parts, strict=True)},
            "sha256": sha256(repr(pairs).encode() for pairs in parts),
        }


def load(folder: Path) -> Parallel:
    """source.txt and target.txt of ``folder``, each of which may be gzipped.

    Raises:
        Refusal: they are not there, or not as docs/data.md says.
    """
    check_folder(folder, "the folder that holds source.txt and target.txt")
    sides = [_text.read(folder, side).removesuffix("\n").split("\n") for side in ("source", "target")]
    if len(sides[0]) != len(sides[1]):
        raise Refusal(
            f"--data: source and target must have as many lines, got {len(sides[0])} and {len(sides[1])}"
        )
    stripped = ((source.strip(), target.strip()) for source, target in zip(*sides, strict=True))
    return _parted(folder.resolve().name, (pair for pair in stripped if all(pair)))


def _parted(name: str, pairs: Iterable[tuple[str, str]]) -> Parallel:
    """Of equal sources the first counts, so that no part has a sentence of another's."""
    different = list({source: (source, target) for source, target in reversed(list(pairs))}.values())[::-1]
    if len(different) < LEAST:
        raise Refusal(f"--data must have at least {LEAST} pairs with different sources, got {len(different)}")
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = min(LARGEST, len(different) // 10)
    shuffled = [different[i] for i in order]
    return Parallel(name, shuffled[2 * held_out :], shuffled[:held_out], shuffled[held_out : 2 * held_out])


# Made up

_SHARED = 0.4  # of the roots are spelled alike, as names are
_NOUNS, _ADJECTIVES, _VERBS, _PREPOSITIONS = 800, 240, 240, 12


def generated(sentences: int = 20_000) -> Parallel:
    """Two languages that share some of their roots, and differ in endings and in the order of words.

    ``adjective noun verb adjective noun preposition noun`` becomes
    ``noun adjective  preposition noun  noun adjective  verb``. Nouns have an ending for the plural, which in
    the second language their adjectives have too, and verbs one for the past.
    """
    return _parted("generated", _Languages(torch.Generator().manual_seed(1)).sentences(sentences))


class _Languages:
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.known: set[str] = set()
        self.endings = [(self._root("stnrm", 1), self._root("klvzd", 1)) for _ in range(2)]  # plural, past
        counts = _NOUNS, _ADJECTIVES, _VERBS, _PREPOSITIONS
        self.roots = [[self._pair() for _ in range(count)] for count in counts]
        self.zipf = [list(accumulate(1 / (rank + 2) for rank in range(count))) for count in counts]

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _chance(self, share: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < share)

    def _root(self, consonants: str, syllables: int) -> str:
        """One that there was not before."""
        while True:
            root = "".join(
                consonants[self._draw(len(consonants))] + "aeiou"[self._draw(5)] for _ in range(syllables)
            )
            if root not in self.known:
                self.known.add(root)
                return root

    def _pair(self) -> tuple[str, str]:
        syllables = 2 + self._draw(2)
        first = self._root("bdfgklmnprst", syllables)
        if self._chance(_SHARED):
            return first, first
        return first, self._root("dfhjkmnptvwz", syllables)

    def _word(self, kind: int) -> tuple[str, str]:
        at = torch.rand((), generator=self.generator).item() * self.zipf[kind][-1]
        return self.roots[kind][next(i for i, end in enumerate(self.zipf[kind]) if end >= at)]

    def _phrase(self) -> tuple[list[str], list[str]]:
        """A noun, perhaps with an adjective, in both languages."""
        noun, plural = self._word(0), self._chance(0.4)
        ending = self.endings[0] if plural else ("", "")
        one, other = [noun[0] + ending[0]], [noun[1] + ending[1]]
        if self._chance(0.5):
            adjective = self._word(1)
            one.insert(0, adjective[0])
            other.append(adjective[1] + ending[1])
        return one, other

    def sentence(self) -> tuple[str, str]:
        subject, object_ = self._phrase(), self._phrase()
        verb, past = self._word(2), self._chance(0.5)
        ending = self.endings[1] if past else ("", "")
        place: tuple[Sequence[str], Sequence[str]] = [], []
        if self._chance(0.4):
            preposition, phrase = self._word(3), self._phrase()
            place = [preposition[0], *phrase[0]], [preposition[1], *phrase[1]]
        one = [*subject[0], verb[0] + ending[0], *object_[0], *place[0]]
        other = [*subject[1], *place[1], *object_[1], verb[1] + ending[1]]
        return " ".join(one), " ".join(other)

    def sentences(self, count: int) -> list[tuple[str, str]]:
        return [self.sentence() for _ in range(count)]
