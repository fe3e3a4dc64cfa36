"""The tables that are searched; the contests are in ``topk_similarity_<part>.py``."""

from __future__ import annotations

import torch

from fastkit.bench.case import Case
from fastkit.bench.cases import topk_similarity_csls as csls
from fastkit.bench.cases import topk_similarity_search as search


def cases(*, quick: bool = False) -> list[Case]:
    """Vocabularies, by product and CSLS; words to be translated; one query."""
    if quick:
        small = (512, 1000, 64)
        return [
            *(search.case(*small, metric=metric, warm=True, compile=False) for metric in ("dot", "cosine")),
            csls.case(*small, warm=True, compile=False),
        ]
    return [
        search.case(20000, 20000, 300),
        csls.case(10000, 10000, 300),
        csls.case(20000, 20000, 300),
        search.case(1500, 200000, 300, metric="cosine"),
        search.case(1, 200000, 300),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """Small vocabularies, or what fits the caches, by product and CSLS."""
    if quick:
        return [
            search.case(512, 1000, 64, warm=True, compile=False, packages=False),
            csls.case(512, 1000, 64, warm=True, compile=False),
        ]
    return [search.case(2500, 2500, 300, packages=False), csls.case(2500, 2500, 300)]


def gpu_cases() -> list[Case]:
    """Large vocabularies, in bfloat16 too."""
    return [
        *(
            search.case(200000, 200000, 300, dtype=dtype, device="cuda")
            for dtype in (torch.bfloat16, torch.float32)
        ),
        csls.case(50000, 50000, 300, device="cuda"),
    ]
