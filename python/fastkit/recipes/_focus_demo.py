"""What ``python -m fastkit demo`` trains: a classifier of digits with adaptive filters, and without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from fastkit.nn import AdaptiveIIR
from fastkit.recipes._experiment import seeded
from fastkit.recipes._focus_classify import Training
from fastkit.recipes._focus_series import digits, samples

_CHANNELS = 32


class PixelClassifier(nn.Module):
    """Beyond one pixel, all but the filters looks at one pixel at a time; needs torch alone."""

    def __init__(self, *, filtered: bool) -> None:
        super().__init__()
        self.embedding: nn.Linear = nn.Linear(1, _CHANNELS)
        self.filters: nn.ModuleList = nn.ModuleList(
            AdaptiveIIR(_CHANNELS, chunk=8, parameterization="triangle") if filtered else nn.Identity()
            for _ in range(2)
        )
        self.mlps: nn.ModuleList = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(_CHANNELS),
                nn.Linear(_CHANNELS, 2 * _CHANNELS),
                nn.GELU(),
                nn.Linear(2 * _CHANNELS, _CHANNELS),
            )
            for _ in range(2)
        )
        self.head: nn.Linear = nn.Linear(_CHANNELS, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, 64, 1), (B,) -> (B, 10)
        h = self.embedding(x)
        for filter, mlp in zip(self.filters, self.mlps, strict=True):
            h = h + mlp(filter(h))
        return self.head(h.sum(1) / lengths.unsqueeze(-1))


class Curve(NamedTuple):
    """One training run: with the filters or without, and the test accuracy after each epoch."""

    filtered: bool
    seed: int
    accuracy: list[float]


def train_digits(*, seeds: Sequence[int] = (0, 1, 2), epochs: int = 15) -> list[Curve]:
    """Train on the digits, with adaptive filters and without, from each seed; test on 450 images.

    The filters of a row of an image are set by the row above. Without filters the mean sees which grey values
    occur, but not in which order.
    """
    from tqdm import tqdm

    series = digits()
    train, test = samples(series.train), samples(series.test)
    curves = []
    with tqdm(total=2 * len(seeds) * epochs, desc="digits", disable=None) as bar:
        for seed, filtered in product(seeds, (True, False)):
            with seeded(seed):
                model = PixelClassifier(filtered=filtered)
                training = Training(model, train, test, series.classes, lr=1e-2, epochs=epochs, batch=64)
                curve = Curve(filtered, seed, [])
                for _ in range(epochs):
                    curve.accuracy.append(training.advance()["accuracy"])
                    bar.update()
            curves.append(curve)
    return curves
