"""The candidates of phrase_scores and select_phrases; the contest is in ``phrase_scores_set.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import phrase_scores_set as image_set


def cases(*, quick: bool = False) -> list[Case]:
    """A step of a decoder, 1000 candidates beside six phrases; and seven of them chosen, by either rule."""
    if quick:
        return [
            image_set.scores_case(100, 32, 2, images=50, warm=True, compile=False),
            image_set.selection_case(100, 32, 3, images=50, warm=True),
        ]
    return [
        image_set.scores_case(1000, 256, 6, images=500, warm=True),
        image_set.selection_case(1000, 256, 7, images=500, warm=True),
        image_set.selection_case(1000, 256, 7, images=500, deflate=True, warm=True),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A step of a decoder."""
    size = (100, 32, 2) if quick else (1000, 256, 6)
    return [image_set.scores_case(*size, images=50 if quick else 500, warm=True, compile=False)]


def gpu_cases() -> list[Case]:
    """The same."""
    return [
        image_set.scores_case(1000, 256, 6, images=500, device="cuda"),
        image_set.selection_case(1000, 256, 7, images=500, device="cuda"),
    ]
