"""The shapes of iir_scan that a GPU is worth."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import iir_scan, iir_scan_modes


def cases() -> list[Case]:
    """A filter for every chunk in both layouts, and a fixed one, forward and with backward."""
    directions = (False, True)
    return [
        *(
            iir_scan.case(8, 256, 65536, view=view, backward=backward, device="cuda")
            for view in (False, True)
            for backward in directions
        ),
        *(
            iir_scan_modes.case(iir_scan_modes.Fixed, (16, 1, 480000), backward=backward, device="cuda")
            for backward in directions
        ),
    ]
