"""The matrices and tables of polar and procrustes; the contest is in ``procrustes_factor.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import procrustes_factor as factor


def cases(*, quick: bool = False) -> list[Case]:
    """Maps between embeddings, a larger one, a batch of small ones, and the map of two tables."""
    if quick:
        return [factor.polar_case(64, 64, warm=True), factor.procrustes_case(500, 64, warm=True)]
    return [
        factor.polar_case(300, 300),
        factor.polar_case(1024, 1024),
        factor.polar_case(64, 64, 64),
        factor.procrustes_case(5000, 300),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A map between embeddings, and the one of two tables."""
    D = 64 if quick else 300
    return [
        factor.polar_case(D, D, warm=quick, packages=False),
        factor.procrustes_case(1000 if quick else 5000, D, warm=quick, packages=False),
    ]


def gpu_cases() -> list[Case]:
    """Maps between embeddings, a larger one, and a batch."""
    shapes = (300, 300), (1024, 1024), (16, 300, 300)
    return [factor.polar_case(*shape, device="cuda") for shape in shapes]
