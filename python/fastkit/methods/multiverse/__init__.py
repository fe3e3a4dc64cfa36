"""Maximal multiverse learning: many orthogonal heads on one encoder, the weak ones eliminated."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastkit.methods.multiverse.elimination import HeadEliminator

if TYPE_CHECKING:
    from fastkit.methods.multiverse.config import MultiverseConfig
    from fastkit.methods.multiverse.model import (
        MultiverseForSequenceClassification,
        MultiverseOutput,
        fold_heads,
    )

__all__ = [
    "HeadEliminator",
    "MultiverseConfig",
    "MultiverseForSequenceClassification",
    "MultiverseOutput",
    "fold_heads",
]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for: ``HeadEliminator`` does without."""
    if name == "MultiverseConfig":
        return import_module("fastkit.methods.multiverse.config").MultiverseConfig
    if name in __all__:
        return getattr(import_module("fastkit.methods.multiverse.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
