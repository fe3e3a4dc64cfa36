"""Lines of text, a word and its numbers, into rows, and rows into text; by the library, or without it."""

from __future__ import annotations

import math
import re
import struct
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from fastkit import _native

_BLANKS = re.compile(rb"[ \t]+")
_DIGITS = rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(_DIGITS + rb"|[+-]?(?:inf|infinity|nan)", re.IGNORECASE)


def parse_lines(text: bytearray, begin: int, end: int, rows: Tensor) -> Tensor:
    """Lines of the bytes [begin, end), one at least, at most as many as ``rows (M, D)`` has, into these.

    Returns:
        ``lines (L, 5)``, int64: where a line begins (from ``begin`` on), where its word ends, where it ends,
        how many fields follow the word, and of D of them the first that is no finite number, counted from 1;
        0 where all are, -1 where these are zero. The row of a line without D numbers is NaN.
    """
    if _native.REASON is not None:
        _native.warn_once(_native.REASON)
        return parse_in_python(bytes(memoryview(text)[begin:end]), rows)
    seen = torch.frombuffer(text, dtype=torch.uint8, count=end - begin, offset=begin)
    return torch.ops.fastkit.parse_vectors_.default(seen, rows)


def format_rows(rows: Tensor) -> list[bytes]:
    """Each row of ``(N, D)`` as numbers with blanks between, the shortest that are read back as they are."""
    if _native.REASON is not None:
        _native.warn_once(_native.REASON)
        return format_in_python(rows)
    text, lengths = torch.ops.fastkit.format_vectors.default(rows)
    whole, width = memoryview(text.numpy().reshape(-1)), text.shape[1]
    return [bytes(whole[i * width : i * width + n]) for i, n in enumerate(lengths.tolist())]


def split_fields(line: bytes) -> list[bytes]:
    """The word, which may be empty, and the fields behind it."""
    fields = _BLANKS.split(line)
    return fields[:-1] if len(fields) > 1 and not fields[-1] else fields


def is_number(field: bytes) -> bool:
    return _NUMBER.fullmatch(field) is not None


def parse_in_python(text: bytes, rows: Tensor) -> Tensor:
    """What the library does, slowly."""
    numbers, columns = rows.numpy(), rows.shape[1]
    lines: list[tuple[int, int, int, int, int]] = []
    begin = 0
    while begin < len(text) and len(lines) < len(rows):
        feed = text.find(b"\n", begin)
        end = len(text) if feed < 0 else feed
        line = text[begin:end].removesuffix(b"\r")
        word, *fields = split_fields(line)
        values = [_to_float32(field) for field in fields[:columns]]
        row = numbers[len(lines)]
        row[:] = np.nan
        fault = next((i for i, x in enumerate(values, 1) if x is None or not np.isfinite(x)), 0)
        if len(fields) == columns and None not in values:
            row[:] = values
            if not row.any():
                fault = -1
        lines.append((begin, begin + len(word), begin + len(line), len(fields), fault))
        begin = end + 1
    return torch.tensor(lines, dtype=torch.int64).reshape(-1, 5)


def format_in_python(rows: Tensor) -> list[bytes]:
    return [" ".join(map(str, row)).encode() for row in rows.numpy()]


def _to_float32(field: bytes) -> np.float32 | None:
    """The float32 next to the number, rounded once; None if it is none."""
    if not is_number(field):
        return None
    value = float(field)
    if _is_midpoint(value):
        exact = Decimal(field.decode())
        if exact != Decimal(value):  # the number is beside the midpoint of two floats, and its double is not
            value = math.nextafter(value, math.inf if exact > Decimal(value) else -math.inf)
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(value)


def _is_midpoint(value: float) -> bool:
    """Whether a double is halfway between two floats."""
    if abs(value) < 2.0**-126:
        return abs(value) * 2.0**150 % 2 == 1
    return (
        math.isfinite(value) and struct.unpack("<Q", struct.pack("<d", value))[0] & 0x1FFFFFFF == 0x10000000
    )
