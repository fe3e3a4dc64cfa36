"""Which rows of a file are kept: what load_vectors does alike for every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Zeros = Literal["error", "drop", "eps", "keep"]
Duplicates = Literal["first", "error"]
BadLines = Literal["error", "skip"]

ZERO_EPS = 0.01  # the first number of what was a vector of zeros
_SHOWN = 5  # words in a message


@dataclass(frozen=True)
class Rules:
    """The options of load_vectors that hold for every format."""

    name: str  # of the file, for messages
    max_words: int | None = None
    lowercase: bool = False
    duplicates: Duplicates = "first"
    zeros: Zeros = "error"
    bad_lines: BadLines = "error"

    def error(self, message: str) -> ValueError:
        return ValueError(f"load_vectors: {self.name} {message}")


class Some:
    """How many words have a fault, and the first of them."""

    def __init__(self) -> None:
        self.count: int = 0
        self.words: list[str] = []

    def add(self, word: str) -> None:
        self.count += 1
        if len(self.words) < _SHOWN:
            self.words.append(word)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.words) else ""
        return f"{self.count} ({', '.join(map(repr, self.words))}{more})"


class KeptRows:
    """A table of what is kept of the rows that are read into its room.

    ``capacity`` rows are reserved, whose memory is taken as they are filled; for more the table is copied.
    """

    def __init__(self, rules: Rules, columns: int, capacity: int) -> None:
        self.rules: Rules = rules
        self.columns: int = columns
        self.words: list[str] = []
        self.notes: list[str] = []  # what the user is to be warned of
        self._not_finite, self._zero, self._same, self._lowered = Some(), Some(), Some(), Some()
        self._skipped, self._first_skipped = 0, ""
        self._forms: dict[str, str] = {}  # a word that is kept -> as it is in the file
        self._table = torch.empty(max(self.left(capacity), 1), columns)

    def left(self, rows: int) -> int:
        """How many of so many rows ``max_words`` leaves room for."""
        limit = self.rules.max_words
        return rows if limit is None else min(rows, limit - len(self.words))

    def room(self, rows: int) -> Tensor:
        """Rows behind those that are kept, to be written to: one or more, at most so many."""
        count = len(self.words)
        if count == len(self._table):
            table = torch.empty(count + max(rows, count // 2), self.columns)
            table[:count] = self._table
            self._table = table
        return self._table[count : count + rows]

    def keep(self, rows: Sequence[int], words: Iterable[str], zeros: Iterable[int]) -> None:
        """Of the room that was asked for last, the rows that the rules let stay, in their order.

        Args:
            rows: those with finite numbers, ascending.
            words: one for each.
            zeros: the rows of zeros.
        """
        first, forms, lowercase = len(self.words), self._forms, self.rules.lowercase
        zeros, stay = set(zeros), []
        for row, form in zip(rows, words, strict=True):
            word = form.lower() if lowercase else form
            if word in forms:
                (self._same if forms[word] == form else self._lowered).add(form)
            elif row in zeros and not self._takes_zero(form):
                pass
            else:
                forms[word] = form
                self.words.append(word)
                stay.append(row)
        if stay != list(range(len(stay))):
            self._table[first : first + len(stay)] = self._table[first + torch.tensor(stay)]
        if zeros and self.rules.zeros == "eps":
            self._table[[first + i for i, row in enumerate(stay) if row in zeros], 0] = ZERO_EPS

    def _takes_zero(self, word: str) -> bool:
        if self.rules.zeros in ("eps", "keep"):
            return True
        self._zero.add(word)
        return False

    def leave_out_not_finite(self, word: str) -> None:
        self._not_finite.add(word)

    def leave_out_line(self, message: str) -> None:
        """A line that is not as it must be: an error, or one that is skipped."""
        if self.rules.bad_lines == "error":
            raise self.rules.error(f"{message}; mend it, or pass bad_lines='skip'")
        self._first_skipped = self._first_skipped or message
        self._skipped += 1

    def finish(self) -> tuple[list[str], Tensor, dict[str, int]]:
        """Words, their rows, and how many were left out, by reason; ValueError if the rules refuse some."""
        rules = self.rules
        if self._not_finite.count and rules.bad_lines == "error":
            raise rules.error(
                f"must have numbers that are finite in float32, got NaN or inf for {self._not_finite} words;"
                " mend them, or pass bad_lines='skip'"
            )
        if self._zero.count and rules.zeros == "error":
            raise rules.error(
                f"must have no vectors of zeros, got them for {self._zero} words;"
                " pass zeros='drop', 'eps' or 'keep'"
            )
        if rules.duplicates == "error":
            if self._same.count:
                raise rules.error(
                    f"must have each word once, got {self._same} again;"
                    " pass duplicates='first' for the first of each"
                )
            if self._lowered.count:
                raise rules.error(
                    f"must have each word once, got {self._lowered} again because of lowercase=True; pass"
                    " duplicates='first' for the first of each, or lowercase=False"
                )
        if not self.words:
            raise rules.error("must have at least one vector, got none" + (self._left_out() or " in it"))
        if self._skipped:
            self.notes.append(f"has {self._skipped} bad lines, which were skipped; {self._first_skipped}")
        if self._not_finite.count:
            self.notes.append(f"has NaN or inf for {self._not_finite} words, which were left out")
        if self._same.count:
            self.notes.append(f"has {self._same} words again, of which the first was kept")
        count = len(self.words)
        table = self._table[:count]
        dropped = {
            "duplicates": self._same.count,
            "lowercased": self._lowered.count,
            "zeros": self._zero.count,
            "bad_lines": self._skipped + self._not_finite.count,
        }
        # A view holds all of the table's memory.
        return self.words, table if count >= len(self._table) * 7 // 8 else table.clone(), dropped

    def _left_out(self) -> str:
        found = {
            "skipped lines": self._skipped,
            "not finite": self._not_finite.count,
            "zeros": self._zero.count,
        }
        named = ", ".join(f"{name}: {count}" for name, count in found.items() if count)
        return f" ({named})" if named else ""
