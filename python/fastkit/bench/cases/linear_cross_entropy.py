"""The shapes of linear_cross_entropy; the contest is in ``linear_cross_entropy_loss.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import linear_cross_entropy_loss as loss


def cases(*, quick: bool = False) -> list[Case]:
    """Vocabularies from a small one to that of a language model, in training; evaluation; all options."""
    if quick:
        return [
            loss.case(256, 1000, 64, everything=every, warm=True, compile=False) for every in (False, True)
        ]
    return [
        *(loss.case(2048, V, 512) for V in (1000, 10000, 32000)),
        loss.case(2048, 32000, 512, backward=False),
        loss.case(2048, 10000, 512, everything=True),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A vocabulary whose logits are larger than the caches."""
    if quick:
        return [loss.case(256, 1000, 64, warm=True, compile=False, packages=False)]
    return [loss.case(512, 8000, 256, packages=False)]


def gpu_cases() -> list[Case]:
    """The output layers of Gemma 2 2B, Llama 3 8B and GPT-2 in bfloat16, and one without gradients."""
    layers = (256000, 2304), (128256, 4096), (50257, 768)
    return [
        *(loss.case(8192, V, D, device="cuda") for V, D in layers),
        loss.case(8192, 128256, 4096, backward=False, device="cuda"),
    ]
