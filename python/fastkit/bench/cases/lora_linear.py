"""The shapes of lora_linear and of the pruning of its A; the contests are in ``lora_linear_<part>.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import lora_linear_layer as layer
from fastkit.bench.cases import lora_linear_prune as prune

_DIRECTIONS = (False, True)  # forward, with backward


def cases(*, quick: bool = False) -> list[Case]:
    """Layers of an encoder and of a larger model, as they are fine-tuned; pruning by what they see."""
    if quick:
        return [
            layer.case(256, 256, 256, 8, backward=True, warm=True, compile=False),
            prune.case(256, 256, 8, warm=True),
        ]
    shapes = (768, 768, 8), (768, 3072, 8), (4096, 4096, 12)
    return [
        *(layer.case(2048, *shape, backward=backward) for shape in shapes for backward in _DIRECTIONS),
        *(prune.case(2048, D, R) for D, R in ((768, 8), (4096, 12))),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A layer of an encoder, in training, and its pruning."""
    tokens = 256 if quick else 2048
    return [
        layer.case(tokens, 768, 768, 8, backward=True, warm=quick, compile=not quick, packages=False),
        prune.case(tokens, 768, 8, warm=quick),
    ]


def gpu_cases() -> list[Case]:
    """Layers of large models in bfloat16."""
    return [
        *(
            layer.case(16384, D, D, 16, backward=backward, device="cuda")
            for D in (4096, 8192)
            for backward in _DIRECTIONS
        ),
        prune.case(16384, 4096, 16, device="cuda"),
    ]
