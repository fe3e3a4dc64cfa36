"""The lists of parameters that MTAdam steps; the contest is in ``mtadam_step.py``."""

from __future__ import annotations

from fastkit.bench.case import Case
from fastkit.bench.cases import mtadam_step as step

Shapes = tuple[tuple[int, ...], ...]


def cases(*, quick: bool = False) -> list[Case]:
    """A language model, BERT-base, and many small tensors."""
    if quick:
        return [step.case("100x1k", ((1000,),) * 100, warm=True, compile=False)]
    return [
        step.case("53M in 71", _decoder(7, 640, 29000)),
        step.case("BERT-base, 109M in 199", _encoder(12, 768, 30522)),
        step.case("1000x1k", ((1000,),) * 1000, warm=True),
    ]


def demo_cases(*, quick: bool = False) -> list[Case]:
    """A small model, in memory or in the caches."""
    shapes = _decoder(1, 64, 500) if quick else _decoder(4, 320, 10000)
    return [step.case(f"{_millions(shapes)} in {len(shapes)}", shapes, warm=quick, compile=not quick)]


def gpu_cases() -> list[Case]:
    """BERT-base, a model as large as fits with the copies of all contestants, and many small tensors."""
    large = _decoder(5, 2048, 32000)
    return [
        step.case("BERT-base, 109M in 199", _encoder(12, 768, 30522), device="cuda"),
        step.case(f"{_millions(large)} in {len(large)}", large, device="cuda"),
        step.case("1000x1k", ((1000,),) * 1000, device="cuda"),
    ]


def _millions(shapes: Shapes) -> str:
    return f"{sum(step.numel(shape) for shape in shapes) / 1e6:.3g}M"


def _decoder(layers: int, width: int, vocabulary: int) -> Shapes:
    """Tied embeddings, and layers of ten tensors: attention without biases, a wide layer of four widths."""
    layer = (
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        *((width,),) * 5,
    )
    return (vocabulary, width), *layer * layers


def _encoder(layers: int, width: int, vocabulary: int) -> Shapes:
    """As of transformers' BertModel."""
    square, row = (width, width), (width,)
    layer = (
        *(square, row) * 4,
        row,
        row,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        row,
        row,
        row,
    )
    return (vocabulary, width), (512, width), (2, width), row, row, *layer * layers, square, row
