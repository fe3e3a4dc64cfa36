"""What the names of a model's modules say: which block one is in, and which name a user has meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# The first such part of a name is the block: T5 has block.3.layer.0 and ALBERT-like groups are no blocks.
_BLOCK = re.compile(r"^(?:(?P<of>.*?)\.)?(?P<kind>layers|layer|h|blocks|block)\.(?P<index>\d+)(?:\.|$)")


def block_of(name: str) -> tuple[str, int] | None:
    """The stack and the index of the block that a module is in, as its name has it."""
    found = _BLOCK.match(name)
    if found is None:
        return None
    return ".".join(filter(None, (found["of"], found["kind"]))), int(found["index"])


def is_named(name: str, key: str) -> bool:
    """Whether ``key`` is the module's name or its end, from a dot on."""
    return name == key or name.endswith(f".{key}")


def nearest(key: str, names: Iterable[str]) -> str:
    """A sentence with the ends of names that are most like ``key``, or with some if none is like it."""
    names = list(dict.fromkeys(names))
    parts = key.count(".") + 1
    ends = [".".join(name.split(".")[-parts:]) for name in names]
    close = difflib.get_close_matches(key, list(dict.fromkeys(ends)), n=3)
    if close and key not in close:
        return f"the nearest are {', '.join(close)}"
    ends = list(dict.fromkeys(_end(name) for name in names))
    if not ends:
        return "it has no linear layer"
    return f"it has {', '.join(ends[:8])}{', ...' if len(ends) > 8 else ''}"


def _end(name: str) -> str:
    """What tells a module from others of its block."""
    found = _BLOCK.match(name)
    return name[found.end() :] or name if found else name
