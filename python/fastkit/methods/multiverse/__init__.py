"""Maximal multiverse learning: many orthogonal heads on one encoder, the weak ones eliminated."""

from fastkit.methods.multiverse.config import MultiverseConfig
from fastkit.methods.multiverse.elimination import HeadEliminator
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
