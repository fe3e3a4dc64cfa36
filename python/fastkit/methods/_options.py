"""What every method refuses of its options alike, in words."""

from __future__ import annotations

import sys


def check_integer(op: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def check_number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return value


def check_positive(op: str, name: str, value: object) -> None:
    if not 0 < check_number(op, name, value) <= sys.float_info.max:  # an integer may be beyond every float
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def check_one_of(op: str, name: str, value: object, options: tuple[object, ...]) -> None:
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{op}: {name} must be one of {listed}, got {value!r}")
