"""The restarts and tables of icp_epoch; the contest is in ``icp_epoch.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import icp_epoch as epoch


def cases(*, quick: bool = False) -> list[Case]:
    """Many restarts of principal components, and one of whole embeddings."""
    if quick:
        return [epoch.case(4, 300, 16, warm=True, compile=False)]
    return [epoch.case(32, 2000, 25), epoch.case(1, 5000, 300)]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A few restarts, without the compiled form: the slowest, and as long to build as all else takes."""
    size, warm = ((4, 300, 16), True) if quick else ((8, 2000, 25), False)
    return [epoch.case(*size, warm=warm, compile=False)]


def gpu_cases() -> list[Case]:
    """As many restarts as word translation begins with, and one of whole embeddings."""
    return [epoch.case(256, 2000, 25, device="cuda"), epoch.case(1, 5000, 300, device="cuda")]
