"""What the commands of ``python -m fastkit`` share; it imports nothing that could fail."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec


class Refusal(ValueError):
    """A command that cannot start or go on, in words: they are printed without a traceback."""


def positive(text: str) -> int:
    """A count, as the type of an option."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def positive_number(text: str) -> float:
    """A rate or a weight, as the type of an option."""
    number = float(text)
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def require(**packages: str) -> None:
    """Refuses where a module is missing; ``require(sklearn="scikit-learn")``: module and package."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise Refusal(f"{', '.join(missing)} not found; install with pip install 'fastkit[recipes]'")
