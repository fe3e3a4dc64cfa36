"""The shapes of iir_scan and its relatives; the contests are in ``iir_scan_<part>.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import iir_scan_chunks as chunks
from fastkit.bench.cases import iir_scan_step as step
from fastkit.bench.cases.iir_scan_modes import Bank, Fixed, Sections, TimeVarying
from fastkit.bench.cases.iir_scan_modes import case as mode_case

_DIRECTIONS = (False, True)  # forward, with backward


def cases(*, quick: bool = False) -> list[Case]:
    """A filter for each chunk in both layouts, beyond the caches and within them; the other modes; a step."""
    large = [((8, 256, 16384), False, False), ((8, 256, 16384), True, False)]
    small = [((1, 64, 16384), False, True), ((4, 512, 1024), True, True)]
    many = (1, 64, 1024) if quick else (8, 256, 16384)
    time = 16384 if quick else 480000
    modes = [
        (Fixed, (16, 1, time), False),
        (Fixed, (1, 1, time), False),
        (TimeVarying, many, False),
        (Bank, many, False),
        (Bank, many, True),
        (Sections, (16, 1, time), False),
    ]
    return [
        *(
            chunks.case(*size, view=view, backward=backward, warm=warm, compile=not quick)
            for size, view, warm in (small if quick else large + small)
            for backward in _DIRECTIONS
        ),
        *(
            mode_case(mode, size, view=view, backward=backward, warm=quick)
            for mode, size, view in modes
            for backward in _DIRECTIONS
        ),
        step.case(64, 512),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A filter for each chunk, as a layer has it: within the caches if ``quick``, else beyond them."""
    size = (4, 512, 1024) if quick else (8, 256, 4096)
    return [
        chunks.case(*size, view=True, backward=backward, warm=quick, compile=not quick, packages=False)
        for backward in _DIRECTIONS
    ]


def gpu_cases() -> list[Case]:
    """A filter for each chunk in both layouts, and a fixed one."""
    return [
        *(
            chunks.case(8, 256, 65536, view=view, backward=backward, device="cuda")
            for view in (False, True)
            for backward in _DIRECTIONS
        ),
        *(mode_case(Fixed, (16, 1, 480000), backward=backward, device="cuda") for backward in _DIRECTIONS),
    ]
