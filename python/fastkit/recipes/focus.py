"""Adaptive filters as the memory of a model that has no other: handwritten digits, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit.nn import AdaptiveIIR


class Curve(NamedTuple):
    """One training run: with the filters or without, and the test accuracy after each epoch."""

    filtered: bool
    seed: int
    accuracy: list[float]


class PixelClassifier(nn.Module):
    """Classifies a sequence of pixels: all but the filters looks at one pixel at a time, up to the mean."""

    def __init__(self, channels: int = 32, *, layers: int = 2, filtered: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, channels)
        self.filters = nn.ModuleList(
            AdaptiveIIR(channels, chunk=8, parameterization="triangle") if filtered else nn.Identity()
            for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 2 * channels),
                nn.GELU(),
                nn.Linear(2 * channels, channels),
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, T) -> (B, 10)
        h = self.embedding(pixels.unsqueeze(-1))
        for filter, mlp in zip(self.filters, self.mlps, strict=True):
            h = h + mlp(filter(h))
        return self.head(h.mean(1))


def train_digits(*, seeds: Sequence[int] = (0, 1, 2), epochs: int = 15) -> list[Curve]:
    """Train on scikit-learn's digits, with the filters and without, from each seed; test on 450 images.

    Each 8x8 image is a sequence of 64 pixels and a chunk is a row of it, so that the filters of a row are set
    by the row above. Without filters the mean sees which grey values occur, but not in which order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 8 - 1, labels, test_size=450, stratify=labels, random_state=1)
    data = [torch.as_tensor(part, dtype=dtype) for part, dtype in zip(split, _DTYPES, strict=True)]
    curves = []
    with tqdm(total=2 * len(seeds) * epochs, desc="digits", disable=None) as bar:
        for seed, filtered in product(seeds, (True, False)):
            curve = Curve(filtered, seed, [])
            for accuracy in _train(*data, filtered=filtered, seed=seed, epochs=epochs):
                curve.accuracy.append(accuracy)
                bar.update()
            curves.append(curve)
    return curves


_DTYPES = (torch.float32, torch.float32, torch.int64, torch.int64)  # images, images, labels, labels


def _train(
    images: Tensor,
    test_images: Tensor,
    labels: Tensor,
    test_labels: Tensor,
    *,
    filtered: bool,
    seed: int,
    epochs: int,
    batch: int = 64,
    lr: float = 1e-2,
) -> Iterator[float]:
    """Yields the test accuracy after each epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixelClassifier(filtered=filtered)
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        steps = len(images) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for step in range(steps):
                chosen = order[step * batch : (step + 1) * batch]
                loss = cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                hits = model(test_images).argmax(-1) == test_labels
            yield hits.float().mean().item()
