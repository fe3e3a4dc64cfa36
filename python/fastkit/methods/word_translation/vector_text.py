"""Text of word vectors, a line for each word: read in blocks into one table, and written.

The first line may say how many vectors there are, and of how many numbers. A word ends at the first blank,
which is a space or a tab and nothing else: a word may have any other character, U+00A0 and U+0085 too, at
which Python splits.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fastkit.methods.word_translation.vector_lines import format_rows, is_number, parse_lines, split_fields
from fastkit.methods.word_translation.vector_rows import KeptRows, Rules

Array = np.ndarray[Any, Any]
Header = Literal["auto"] | bool
Errors = Literal["strict", "ignore", "replace"]

_BLOCK = 4 << 20  # bytes that are read at a time, if no line is longer: they stay in a cache
_LONGEST_LINE = 64 << 20
_SPARE_ROWS = 16  # for empty lines
_WRITTEN_ROWS = 2048  # at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEADER = re.compile(rb"([0-9]{1,18})[ \t]+([0-9]{1,18})[ \t]*\r?")
_SHOWN_BYTES = 40


def read_text(path: Path, rules: Rules, *, header: Header, errors: Errors) -> KeptRows:
    """The vectors of a file, which is unpacked while it is read if its name ends in .gz."""
    packed = path.name.lower().endswith(".gz")
    size = path.stat().st_size
    if size == 0:
        raise rules.error("must have vectors, got an empty file")
    with gzip.open(path) if packed else path.open("rb") as file:
        reader = _Reader(rules, header, errors, size * 4 if packed else size)
        for block, end in _blocks(file, rules, packed):
            if reader.read(block, end):
                break
        return reader.finish()


def write_text(file: BufferedIOBase, words: Sequence[str], vectors: Tensor) -> None:
    file.write(b"%d %d\n" % vectors.shape)
    for begin in range(0, len(words), _WRITTEN_ROWS):
        rows = format_rows(vectors[begin : begin + _WRITTEN_ROWS])
        some = words[begin : begin + _WRITTEN_ROWS]
        file.write(b"".join(b"%b %b\n" % (word.encode(), row) for word, row in zip(some, rows, strict=True)))


class _Reader:
    """Takes blocks of whole lines, until enough words are kept."""

    def __init__(self, rules: Rules, header: Header, errors: Errors, size: int) -> None:
        self._rules, self._header, self._errors = rules, header, errors
        self._size = size  # of the text, or about so
        self._lines = 0  # that were read
        self._empty = 0  # of these
        self._skipped: list[str] = []  # before it was known how many columns there are
        self._announced: tuple[int, int] | None = None
        self._kept: KeptRows | None = None
        self._full = False

    def read(self, block: bytearray, end: int) -> bool:
        """The lines of the bytes [0, end); true if no more are wanted."""
        begin = self._read_header(block, end) if self._lines == 0 else 0
        while begin < end and not self._full:
            if self._kept is None:
                begin = self._start(block, begin, end)
            else:
                begin = self._read_some(self._kept, block, begin, end)
        return self._full

    def finish(self) -> KeptRows:
        if self._kept is None:
            raise self._rules.error(f"must have vectors, got none in {self._lines} lines")
        if self._announced is not None:
            count, found = self._announced[0], self._lines - self._empty - 1
            says = f"has {count} vectors as its first line says, but"
            if found > count:
                self._kept.notes.append(f"{says} more lines, which were read too")
            elif found < count and not self._full:
                self._kept.notes.append(f"{says} only {found} lines: it may be cut off")
        return self._kept

    def _read_header(self, block: bytearray, end: int) -> int:
        """Where the lines begin that are vectors."""
        begin = len(_BYTE_ORDER_MARK) if block.startswith(_BYTE_ORDER_MARK) else 0
        line, behind = _line_at(block, begin, end)
        match = None if self._header is False else _HEADER.fullmatch(line)
        if match is None:
            if self._header is True:
                raise self._rules.error(f"must begin with a line of two whole numbers, got {_shown(line)}")
            return begin
        count, columns = int(match[1]), int(match[2])
        if self._header == "auto" and columns != 1:
            second, following = _line_at(block, behind, end)
            while following < end and not split_fields(second)[-1]:
                second, following = _line_at(block, following, end)
            if len(split_fields(second)) == 2:  # the first line of a table of one column
                return begin
        if not 1 <= columns <= _LONGEST_LINE // 2:
            raise self._rules.error(
                f"must have 1 to {_LONGEST_LINE // 2} numbers a line, got {columns} in line 1"
            )
        self._announced = count, columns
        self._lines = 1
        return behind

    def _start(self, block: bytearray, begin: int, end: int) -> int:
        """Find out how many columns there are: where the first line is that has some."""
        if self._announced is not None:
            columns = self._announced[1]
        else:
            line, behind = _line_at(block, begin, end)
            word, *fields = split_fields(line)
            columns = len(fields)
            if columns == 0:
                self._lines += 1
                if not word:
                    self._empty += 1
                elif self._rules.bad_lines == "skip":
                    self._skipped.append(
                        f"line {self._lines} must have numbers behind its word {_shown(word)}"
                    )
                else:
                    raise self._rules.error(
                        f"line {self._lines} must have numbers behind its word {_shown(word)}, got none;"
                        " mend it, or pass bad_lines='skip'"
                    )
                return behind
        if self._announced is not None:
            expected = self._announced[0]
        else:
            expected = self._size * block.count(b"\n", begin, end) // (end - begin) * 21 // 20
        most = self._size // (2 * columns + 1)
        self._kept = KeptRows(self._rules, columns, min(expected, most) + _SPARE_ROWS)
        for message in self._skipped:
            self._kept.leave_out_line(message)
        return begin

    def _read_some(self, kept: KeptRows, block: bytearray, begin: int, end: int) -> int:
        columns = kept.columns
        room = kept.room(kept.left((end - begin) // (2 * columns + 1) + 1))
        lines = parse_lines(block, begin, end, room).numpy()
        lines[:, :3] += begin
        good = (lines[:, 3] == columns) & (lines[:, 4] <= 0) & (lines[:, 1] > lines[:, 0])
        for i in np.flatnonzero(~good).tolist():
            self._take_bad(kept, self._lines + i + 1, bytes(block[lines[i, 0] : lines[i, 2]]))
        rows = np.flatnonzero(good)
        spans = list(zip(lines[rows, 0].tolist(), lines[rows, 1].tolist(), strict=True))
        text = memoryview(block)
        try:
            words = [str(text[first:last], "utf-8", self._errors) for first, last in spans]
        except UnicodeDecodeError:
            words = None
        if words is None or "" in words:
            rows, words = self._decode_each(kept, block, rows, spans)
        kept.keep(rows.tolist(), words, rows[lines[rows, 4] < 0].tolist())
        self._full = kept.left(1) == 0
        self._lines += len(lines)
        behind = block.find(b"\n", lines[-1, 2], end)
        return end if behind < 0 else behind + 1

    def _take_bad(self, kept: KeptRows, number: int, line: bytes) -> None:
        """A line without a word, or without numbers, or without finite ones."""
        word, *found = split_fields(line)
        if not word and not found:
            self._empty += 1
        elif not word:
            kept.leave_out_line(
                f"line {number} must begin with a word, got a blank before {_shown(found[0])}"
            )
        elif len(found) != kept.columns:
            said = " as line 1 says" if self._announced is not None else ""
            kept.leave_out_line(
                f"line {number} must have {kept.columns} numbers behind its word{said}, got"
                f" {len(found)} fields behind {_shown(word)}"
            )
        elif none := next((i for i, field in enumerate(found, 1) if not is_number(field)), None):
            kept.leave_out_line(
                f"line {number} must have numbers behind its word, got {_shown(found[none - 1])}, the"
                f" field {none} behind {_shown(word)}"
            )
        else:
            kept.leave_out_not_finite(word.decode(errors="replace"))

    def _decode_each(
        self, kept: KeptRows, block: bytearray, rows: Array, spans: list[tuple[int, int]]
    ) -> tuple[Array, list[str]]:
        """The rows whose words are UTF-8, and these."""
        decoded, words = [], []
        for row, (first, last) in zip(rows.tolist(), spans, strict=True):
            word = bytes(block[first:last])
            try:
                text = word.decode(errors=self._errors)
            except UnicodeDecodeError:
                text = ""
            if text:
                decoded.append(row)
                words.append(text)
            else:
                kept.leave_out_line(
                    f"line {self._lines + row + 1} must have a word in UTF-8, got {_shown(word)}"
                )
        return np.array(decoded, dtype=np.int64), words


def _blocks(file: BufferedIOBase, rules: Rules, packed: bool) -> Iterator[tuple[bytearray, int]]:
    """Buffers, each with where its whole lines end; it is written to when the next is asked for."""
    block, held = bytearray(_BLOCK), 0
    while True:
        end = held
        while end < len(block) and (read := _read_into(file, memoryview(block)[end:], rules, packed)):
            end += read
        if end < len(block):  # the end of the file
            if end > 0:
                yield block, end
            return
        whole = block.rfind(b"\n", held, end) + 1
        if whole > 0:
            yield block, whole
            held = end - whole
            block[:held] = block[whole:end]
        elif len(block) >= _LONGEST_LINE:
            raise rules.error(f"must have lines of at most {_LONGEST_LINE} bytes, got a longer one")
        else:
            held, block = end, block + bytes(len(block))


def _read_into(file: BufferedIOBase, room: memoryview, rules: Rules, packed: bool) -> int:
    if not packed:
        return file.readinto(room)
    try:
        return file.readinto(room)
    except (EOFError, OSError, zlib.error) as error:
        raise rules.error(f"must be a whole gzip file, got one that cannot be unpacked ({error})") from error


def _line_at(block: bytearray, begin: int, end: int) -> tuple[bytes, int]:
    """The line that begins there, and where the next does."""
    feed = block.find(b"\n", begin, end)
    last = end if feed < 0 else feed
    return bytes(block[begin:last]).removesuffix(b"\r"), min(last + 1, end)


def _shown(text: bytes) -> str:
    """For a message."""
    more = "..." if len(text) > _SHOWN_BYTES else ""
    return repr(text[:_SHOWN_BYTES].decode(errors="backslashreplace")) + more
