"""A dictionary of words as pairs of rows of two tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowPairs(NamedTuple):
    """What ``row_pairs`` returns."""

    pairs: Tensor  # (P, 2) int64: a row of the source table, a row of the target table
    coverage: float  # found / words
    found: int  # source words of the dictionary with a translation, both in their tables
    words: int  # source words of the dictionary


def row_pairs(
    dictionary: Iterable[tuple[str, str]], source_words: Sequence[str], target_words: Sequence[str]
) -> RowPairs:
    """The rows of pairs of words, without those of which a word is in no table.

    Words are compared as they are: lower-case what the tables have in lower case. Of a word that is in a
    table twice the first row counts, and a pair that comes twice is one.

    Args:
        dictionary: pairs ``(source word, target word)``; a word may have several translations.
        source_words, target_words: the word of each row.

    Returns:
        ``RowPairs(pairs, coverage, found, words)``: for ``WordTranslator.score`` or ``fit``, and what part of
        the dictionary's source words is among them.

    Raises:
        ValueError: the dictionary is empty, an entry is not two words, or no pair is in the tables.

    Example:
        >>> from fastkit.methods.word_translation import row_pairs
        >>> entries = [("cat", "Katze"), ("cat", "Kater"), ("dog", "Hund")]
        >>> row_pairs(entries, ["dog", "cat"], ["Katze", "Maus"])
        RowPairs(pairs=tensor([[1, 0]]), coverage=0.5, found=1, words=2)
    """
    rows = [
        {word: row for row, word in reversed(list(enumerate(words)))}
        for words in (source_words, target_words)
    ]
    sources: dict[str, None] = {}
    pairs: dict[tuple[int, int], None] = {}
    for entry in dictionary:
        if isinstance(entry, str) or len(entry) != 2:
            raise ValueError(f"row_pairs: dictionary must have pairs of words, got {entry!r}")
        source, target = entry
        sources[source] = None
        if source in rows[0] and target in rows[1]:
            pairs[rows[0][source], rows[1][target]] = None
    if not sources:
        raise ValueError("row_pairs: dictionary must have pairs of words, got none")
    if not pairs:
        raise ValueError(
            f"row_pairs: dictionary must have a pair whose words are both in the tables, got {len(sources)}"
            " source words without one; compare upper and lower case, and which language comes first"
        )
    found = len({source for source, _ in pairs})
    return RowPairs(torch.tensor(list(pairs)), found / len(sources), found, len(sources))
