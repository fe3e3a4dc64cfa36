"""The tables whose moments are taken; the contest is in ``moments_covariance.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import moments_covariance as covariance


def cases(*, quick: bool = False) -> list[Case]:
    """Word vectors, the features of an encoder, and rows of different weights."""
    if quick:
        return [covariance.case(2000, 64, weights=of, warm=True, compile=False) for of in (False, True)]
    return [
        covariance.case(200000, 300),
        covariance.case(20000, 768),
        covariance.case(200000, 300, weights=True),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A table of word vectors, in memory or in the caches."""
    return [covariance.case(2000 if quick else 20000, 300, warm=quick, compile=not quick)]


def gpu_cases() -> list[Case]:
    """A million word vectors."""
    return [covariance.case(1000000, 300, device="cuda")]
