"""The shapes of multihead_loss and its penalty; the contest is in ``multihead_loss_training.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import multihead_loss_training as training


def cases(*, quick: bool = False) -> list[Case]:
    """Heads on what a BERT of base size gives: a hundred, which fit the caches, and a thousand."""
    if quick:
        return [training.case(8, 20, 3, 64, warm=True, compile=False)]
    return [training.case(32, H, 3, 768, warm=H < 1000, compile=H < 1000) for H in (100, 1000)]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """As many heads as the recipe has."""
    if quick:
        return [training.case(8, 20, 3, 64, warm=True, compile=False)]
    return [training.case(32, 128, 3, 768)]


def gpu_cases() -> list[Case]:
    """The same, and many classes."""
    return [
        *(training.case(32, H, 3, 768, device="cuda") for H in (100, 1000)),
        training.case(64, 128, 150, 768, device="cuda"),
    ]
