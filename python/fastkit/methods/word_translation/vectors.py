"""Word vectors, and the files that hold them."""

from __future__ import annotations

import gzip
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fastkit._sync import replace_file
from fastkit.methods.word_translation import vector_arrays as arrays
from fastkit.methods.word_translation.vector_arrays import Words
from fastkit.methods.word_translation.vector_rows import BadLines, Duplicates, Rules, Zeros
from fastkit.methods.word_translation.vector_text import Errors, Header, read_text, write_text

_LOAD, _SAVE = "load_vectors", "save_vectors"
_TEXT = (".vec", ".txt", ".vec.gz", ".txt.gz")
_SUFFIXES = (*_TEXT, ".npz", ".npy", ".safetensors")
_GZIP_LEVEL = 6


@dataclass(frozen=True, eq=False, repr=False)
class Vectors:
    """Words and a vector for each, the most frequent word first where the file has that order.

    Attributes:
        words: n different strings; None where a file has none.
        vectors: ``(n, D)``, float32.
        dropped: how many rows of the file were left out, by reason: ``"duplicates"``, ``"lowercased"`` (that
            lower-casing has made duplicates), ``"zeros"``, ``"bad_lines"``.

    ``len(v)`` is n, ``word in v`` and ``v.index(word)`` look a word up, ``v[word]`` is its vector.
    """

    words: list[str] | None
    vectors: Tensor
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2:
            raise ValueError(f"Vectors: vectors must have shape (n, D), got {tuple(self.vectors.shape)}")
        if self.words is not None and len(self.words) != len(self.vectors):
            raise ValueError(
                f"Vectors: words must be as many as vectors, got {len(self.words)} and {len(self.vectors)}"
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def __contains__(self, word: object) -> bool:
        return word in self._rows

    def __getitem__(self, word: str) -> Tensor:
        return self.vectors[self.index(word)]

    def index(self, word: str) -> int:
        """The row of a word; KeyError if there is none."""
        try:
            return self._rows[word]
        except KeyError:
            raise KeyError(f"Vectors: word must be one of {len(self)}, got {word!r}") from None

    @cached_property
    def _rows(self) -> dict[str, int]:
        if self.words is None:
            raise ValueError("Vectors: these have no words to look up; pass words= to load_vectors")
        return {word: row for row, word in reversed(list(enumerate(self.words)))}

    def __repr__(self) -> str:
        return (
            f"Vectors({len(self)} {'words' if self.words else 'vectors'} of {self.vectors.shape[1]} numbers)"
        )


def load_vectors(
    path: str | os.PathLike[str],
    *,
    max_words: int | None = None,
    header: Header = "auto",
    lowercase: bool = False,
    duplicates: Duplicates = "first",
    zeros: Zeros = "error",
    bad_lines: BadLines = "error",
    errors: Errors = "strict",
    words: Words | None = None,
) -> Vectors:
    r"""Read word vectors, in the order of the file: for most files that of frequency.

    ::

        .vec .txt, and .vec.gz .txt.gz      a line for each word: it, and its numbers
        .npz                                arrays words (n,), strings, and vectors (n, D); no others are read
        .npy                                vectors (n, D); words of NAME.words.txt or NAME.txt beside it
        .safetensors                        a tensor vectors (n, D); words in the metadata, or as of .npy

    Text is UTF-8; a word ends at the first blank, and between numbers are one or more. Blanks are spaces and
    tabs and nothing else, so that a word may hold U+00A0 or U+0085. Lines end with ``\n`` or ``\r\n``; empty
    ones, and blanks at the end of a line, do not count. A byte order mark is not part of the first word.

    Args:
        path: the file; its name's end says what it is.
        max_words: how many words are kept at most; what comes after them is not read. Default: all.
        header: whether the first line of a text is ``count dim``. ``"auto"``: it is if it is two whole
            numbers, unless dim is not 1 and the second line has one number too, as in a table of one column.
        lowercase: lower-case the words, as the published method does. Of words that become equal by that the
            first is kept, or they are refused, as ``duplicates`` says.
        duplicates: ``"first"`` keeps the first of equal words, with a warning if they were equal in the file;
            ``"error"`` refuses them.
        zeros: what is done with a vector of zeros, which has no direction: ``"error"``; ``"drop"`` it;
            ``"eps"``: its first number becomes 0.01, as in the published method; ``"keep"``.
        bad_lines: ``"error"``, or ``"skip"``, with a warning: lines with another number of numbers than the
            header says or, without one, the first line has; with a field that is no number; with a word that
            is empty or not UTF-8; and, in any format, vectors with NaN or inf.
        errors: what is done with bytes that are not UTF-8: ``"strict"``: the line is a bad one; ``"ignore"``,
            ``"replace"`` as of ``bytes.decode``.
        words: for .npy and .safetensors, a list of words or the name of a text file with one a line.

    Returns:
        ``Vectors(words, vectors, dropped)``.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: an option is none of the above; the file is empty, cut off, or not what its name says; it
            has bad lines, duplicates or zeros that the options refuse: the message names the file and the
            line, or how many words there are and the first five. Pickled objects are refused, never read.
        ImportError: safetensors is needed, and not installed.

    There is one RuntimeWarning for each kind of what is left out, but for zeros that are dropped and words
    that lower-casing has made equal; and one for a header with another count than the file has lines.

    Numerics: a number of a text is rounded once, to the float32 next to it, of two equally near the even one.
    ``numpy.float32(float(text))`` rounds twice, and on occasion ends on the other side: 7.038531e-26 does.
    Other formats are converted to float32.

    Memory and work: beside the result a few MiB; for .npz also its arrays, and where a .gz has no header up
    to twice the result, while it grows. Lines are parsed on PyTorch's threads.

    Example:
        >>> import pathlib, tempfile
        >>> from fastkit.methods.word_translation import load_vectors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "two.vec")
        ...     _ = path.write_text("2 3\nthe 0.5 1 -2\nof 1e-3 2 0\n")
        ...     found = load_vectors(path)
        >>> found.words, found["the"]
        (['the', 'of'], tensor([ 0.5000,  1.0000, -2.0000]))
    """
    path = _checked_path(_LOAD, path)
    if max_words is not None and (
        isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 1
    ):
        raise ValueError(f"{_LOAD}: max_words must be a positive integer or None, got {max_words!r}")
    _check_option("header", header, ("auto", True, False))
    _check_option("lowercase", lowercase, (True, False))
    _check_option("duplicates", duplicates, get_args(Duplicates))
    _check_option("zeros", zeros, get_args(Zeros))
    _check_option("bad_lines", bad_lines, get_args(BadLines))
    _check_option("errors", errors, get_args(Errors))
    suffix = _suffix(_LOAD, path)
    if words is not None and suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{_LOAD}: words must be None for {suffix}, which has its own; leave it out")
    if not path.is_file():
        kind, what = (IsADirectoryError, "a folder") if path.is_dir() else (FileNotFoundError, "none")
        raise kind(f"{_LOAD}: path must be a file, got {what}: {path}")
    rules = Rules(str(path), max_words, lowercase, duplicates, zeros, bad_lines)
    has_words = True
    if suffix == ".npz":
        kept = arrays.read_npz(path, rules, errors=errors)
    elif suffix == ".npy":
        kept, has_words = arrays.read_npy(path, rules, words=words, errors=errors)
    elif suffix == ".safetensors":
        kept, has_words = arrays.read_safetensors(path, rules, words=words, errors=errors)
    else:
        kept = read_text(path, rules, header=header, errors=errors)
    found, vectors, dropped = kept.finish()
    for note in kept.notes:
        warnings.warn(f"{_LOAD}: {path} {note}", RuntimeWarning, stacklevel=2)
    return Vectors(found if has_words else None, vectors, dropped)


def save_vectors(path: str | os.PathLike[str], words: Sequence[str] | None, vectors: Tensor) -> None:
    """Write word vectors, in float32, so that ``load_vectors`` reads the same words and the same bits.

    ::

        .vec .txt               text with a header; numbers in the fewest digits that are read back so
        .vec.gz .txt.gz         the same, packed; the same vectors always give the same bytes
        .npz                    arrays words and vectors
        .npy                    vectors; words in NAME.words.txt beside it, one a line
        .safetensors            a tensor vectors; metadata: words, as JSON, and format: fastkit word vectors 1

    A file is replaced whole: a process that is stopped leaves the old one or the new one. Of an .npy the
    words are taken away before and brought after, so that none are left that are not its own. Vectors of
    zeros are written; to read them, pass ``zeros="keep"``.

    Args:
        path: the file; its name's end says what it is to be.
        words: n different strings that are not empty; for .npy and .safetensors they may be None.
        vectors: ``(n, D)``, n and D >= 1, floating; float64 is rounded to float32.

    Raises:
        ValueError: there are no vectors, or not a word for each; a number is not finite in float32; words are
            equal, empty, or the format cannot hold one: text no space, tab, line feed or carriage return,
            .npy neither of the last two, .npz no NUL at the end. The message names the word. Nothing is
            written.
        TypeError: vectors is no floating tensor, or a word no string.
        FileNotFoundError: the folder is not there.
        ImportError: safetensors is needed, and not installed.
    """
    path = _checked_path(_SAVE, path)
    suffix = _suffix(_SAVE, path)
    table = _checked_table(vectors)
    if words is not None:
        words = _checked_words(words, len(table), suffix)
    elif suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{_SAVE}: words must be given for {suffix}, got None; save an .npy")
    if path.is_dir() or not path.parent.is_dir():
        kind, what = (
            (IsADirectoryError, "a folder") if path.is_dir() else (FileNotFoundError, "one in no folder")
        )
        raise kind(f"{_SAVE}: path must be a file in a folder that is there, got {what}: {path}")
    if suffix == ".npz":
        replace_file(path, lambda file: arrays.write_npz(file, words or [], table))
    elif suffix == ".npy":
        beside = arrays.words_file(path)
        beside.unlink(missing_ok=True)
        replace_file(path, lambda file: arrays.write_npy(file, table))
        if words is not None:
            text = "".join(f"{word}\n" for word in words).encode()
            replace_file(beside, lambda file: file.write_bytes(text))
    elif suffix == ".safetensors":
        metadata = {"format": arrays.FORMAT} if words is None else arrays.metadata_of(words)
        if len(metadata.get("words", "")) > arrays.LARGEST_METADATA:
            raise ValueError(
                f"{_SAVE}: words must be shorter for .safetensors, got {len(table)}; save an .npz"
            )
        replace_file(path, lambda file: arrays.write_safetensors(file, metadata, table))
    else:
        replace_file(path, lambda file: _write_text(file, suffix, words or [], table))


def _write_text(path: Path, suffix: str, words: Sequence[str], table: Tensor) -> None:
    with path.open("wb") as file:
        if not suffix.endswith(".gz"):
            write_text(file, words, table)
            return
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            write_text(packed, words, table)  # pyright: ignore[reportArgumentType]


def _checked_path(op: str, path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path must be a string or a path, got {type(path).__name__}")
    return Path(path)


def _suffix(op: str, path: Path) -> str:
    name = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(
            f"{op}: path must end in one of {', '.join(_SUFFIXES)}, got {path}; rename or convert it"
        )
    return suffix


def _check_option(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"{_LOAD}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _checked_table(vectors: object) -> Tensor:
    """Dense, float32, on the CPU."""
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        got = str(vectors.dtype) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise TypeError(
            f"{_SAVE}: vectors must be a floating tensor, got {got}; pass torch.as_tensor(...).float()"
        )
    if vectors.ndim != 2 or vectors.numel() == 0:
        raise ValueError(
            f"{_SAVE}: vectors must have shape (n, D) with n and D >= 1, got {tuple(vectors.shape)}"
        )
    table = vectors.detach().to("cpu", torch.float32).contiguous()
    finite = torch.isfinite(table).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten()
        raise ValueError(
            f"{_SAVE}: vectors must be finite in float32, got {len(rows)} rows that are"
            f" not, of which the first is {int(rows[0])}"
        )
    return table


def _checked_words(words: Sequence[str], count: int, suffix: str) -> list[str]:
    if isinstance(words, (str, bytes)) or not isinstance(words, Sequence):
        raise TypeError(f"{_SAVE}: words must be a list of strings, got {type(words).__name__}")
    if len(words) != count:
        raise ValueError(f"{_SAVE}: words must be as many as vectors, got {len(words)} and {count}")
    refused = {".npz": "", ".safetensors": "", ".npy": "\r\n"}.get(suffix, " \t\r\n")
    seen: set[str] = set()
    for row, word in enumerate(words):
        if not isinstance(word, str):
            raise TypeError(f"{_SAVE}: words must be strings, got {type(word).__name__} at {row}")
        fault = None
        if not word:
            fault = "must not be empty"
        elif word in seen:
            fault = "must differ from each other"
        elif any(character in word for character in refused):
            fault = f"must have none of {', '.join(map(repr, refused))} in {suffix}"
        elif suffix == ".npz" and word.endswith("\0"):
            fault = f"must not end in NUL in {suffix}"
        elif not _is_encodable(word):
            fault = "must be text that UTF-8 has"
        if fault is not None:
            raise ValueError(f"{_SAVE}: words {fault}, got {word!r} at {row}")
        seen.add(word)
    return list(words)


def _is_encodable(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
