"""The shapes of FocusLayer and of its filters; the contests are in ``focus_layer_{heads,filter}.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import focus_layer_filter as filters
from fastkit.bench.cases import focus_layer_heads as heads


def cases(*, quick: bool = False) -> list[Case]:
    """The paper's setting of 1024 tokens, the default one, wider and longer."""
    if quick:
        return [heads.case(2, 128, 32, attn_chunk=16, bin_length=32, warm=True)]
    return [
        heads.case(32, 1024, 64, attn_chunk=32, bin_length=256),
        heads.case(32, 1024, 64, attn_chunk=32, bin_length=256, num_heads=4),
        heads.case(32, 1024, 64),
        heads.case(8, 4096, 64),
        heads.case(2, 16384, 64, softmax=False),
        heads.case(8, 1024, 512, num_heads=4),
        heads.case(2, 4096, 512, num_heads=4),
        heads.case(1, 16384, 512, num_heads=4, softmax=False),
        filters.case(32, 1024, 64, bin_length=256, taps=None),
        filters.case(32, 1024, 64, bin_length=256, taps=2048),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """None: its ops have theirs, and a demo is short."""
    return []


def gpu_cases() -> list[Case]:
    """As long as its attention would be slow."""
    return [heads.case(8, T, 512, num_heads=8, device="cuda", softmax=False) for T in (1024, 4096, 16384)]
