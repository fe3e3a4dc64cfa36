"""Adaptive filters as the memory of a classifier of sequences, against constant filters and none.

``python -m fastkit run focus``; docs/recipes/focus.md tells what it does and what it found.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fastkit._command import Refusal, positive, require
from fastkit._threads import threads
from fastkit.nn import AdaptiveIIR
from fastkit.nn.adaptive_iir import Parameterization
from fastkit.recipes import _options
from fastkit.recipes._experiment import Run, read_model, seeded, write_checkpoint
from fastkit.recipes._figures import Row
from fastkit.recipes._series import Part, Series, load, standardised

Filter = Literal["adaptive", "constant", "none"]
ARMS: tuple[Filter, ...] = ("adaptive", "constant", "none")


class SequenceClassifier(nn.Module):
    """Classifies series; beyond ``kernel`` samples, all but the filters looks at one time at a time.

    ::

        h = Linear(the last kernel samples);  layers times: h = h + MLP(filter(h));  Linear(mean of h)

    The mean is over each series' own length. Everything before it is causal, so that what stands behind the
    end of a series, NaN included, changes nothing.

    Args:
        inputs: channels of a series.
        classes: how many.
        filter: ``"adaptive"`` or ``"constant"``, an AdaptiveIIR, or ``"none"``, the same model without.
        kernel: samples that the first layer sees at once.
        channels: width of h.
        layers: filters and MLPs.
        chunk: of AdaptiveIIR, a multiple of 8.
        parameterization: of AdaptiveIIR.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        filter: Filter = "adaptive",
        kernel: int = 1,
        channels: int = 32,
        layers: int = 2,
        chunk: int = 8,
        parameterization: Parameterization = "triangle",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "inputs": inputs, "classes": classes, "filter": filter, "kernel": kernel, "channels": channels,
            "layers": layers, "chunk": chunk, "parameterization": parameterization,
        }  # fmt: skip
        self.kernel = kernel
        self.embedding: nn.Linear = nn.Linear(inputs * kernel, channels)
        self.filters: nn.ModuleList = nn.ModuleList(
            nn.Identity()
            if filter == "none"
            else AdaptiveIIR(
                channels, chunk=chunk, parameterization=parameterization, adaptive=filter == "adaptive"
            )
            for _ in range(layers)
        )
        self.mlps: nn.ModuleList = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 2 * channels),
                nn.GELU(),
                nn.Linear(2 * channels, channels),
            )
            for _ in range(layers)
        )
        self.head: nn.Linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, T, C), (B,) -> (B, classes)
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = x.masked_fill(~inside.unsqueeze(-1), 0)
        windows = pad(x, (0, 0, self.kernel - 1, 0)).unfold(1, self.kernel, 1)  # (B, T, C, kernel)
        h = self.embedding(windows.flatten(2))
        for filter, mlp in zip(self.filters, self.mlps, strict=True):
            h = h + mlp(filter(h))
        mean = (h * inside.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
        return self.head(mean)


def save_classifier(path: Path, model: SequenceClassifier, classes: Sequence[str]) -> None:
    """What ``load_classifier`` reads back."""
    state = {"config": model.config, "class_names": list(classes), "state_dict": model.state_dict()}
    write_checkpoint(path, state)


def load_classifier(path: Path) -> tuple[SequenceClassifier, list[str]]:
    """A model from the folder ``models`` of a run, and the names of its classes."""

    def build(state: dict[str, Any]) -> tuple[SequenceClassifier, list[str]]:
        model = SequenceClassifier(**state["config"])
        model.load_state_dict(state["state_dict"])
        return model.eval(), state["class_names"]

    return read_model(path, "focus", build)


# Data


@dataclass(frozen=True)
class Samples:
    x: Tensor  # (N, T, C)
    lengths: Tensor  # (N,)
    y: Tensor  # (N,)

    def take(self, chosen: Tensor) -> Samples:
        return Samples(self.x[chosen], self.lengths[chosen], self.y[chosen])


def digits() -> Series:
    """scikit-learn's digits, each a series of 64 pixels, row by row of 8; 450 are to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = (images / 8 - 1).astype(np.float32)[:, None]
    lengths = np.full(len(labels), x.shape[2])
    train, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=1)
    train, test = (Part(x[chosen], lengths[chosen], labels[chosen]) for chosen in (train, test))
    return Series("digits", train, test, [str(digit) for digit in range(10)])


def _samples(part: Part) -> Samples:
    x, lengths, y = (torch.from_numpy(array) for array in part)
    return Samples(x.mT.contiguous(), lengths, y)


class Parts(NamedTuple):
    """What a table's rows are trained on, and what gives their figures."""

    train: Samples
    held_out: Samples


def _validation(train: Samples) -> Parts:
    """The training part again: three quarters of it, and the quarter by which choices are made."""
    from sklearn.model_selection import train_test_split

    count, classes = len(train.y), len(train.y.unique())
    if train.y.bincount().eq(1).any() or count < 2 * classes:
        raise Refusal("--data must have at least 2 training series of each class, got a class with 1")
    fit, held_out = train_test_split(
        torch.arange(count).numpy(), test_size=max(count // 4, classes), stratify=train.y, random_state=0
    )
    return Parts(train.take(torch.from_numpy(fit)), train.take(torch.from_numpy(held_out)))


# Training


class Training:
    """A model and what trains it: an epoch is a pass over ``train`` and figures on ``held_out``."""

    def __init__(
        self,
        model: SequenceClassifier,
        train: Samples,
        held_out: Samples,
        classes: Sequence[str],
        *,
        lr: float,
        epochs: int,
        batch: int,
    ) -> None:
        self.model: SequenceClassifier = model
        self.train: Samples = train
        self.held_out: Samples = held_out
        self.batch: int = batch
        self.classes = classes
        self.steps: int = max(1, len(train.y) // batch)
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(model.parameters(), lr)
        self.schedule: torch.optim.lr_scheduler.OneCycleLR = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=epochs * self.steps
        )
        self.parts: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "schedule": self.schedule}

    def advance(self) -> dict[str, float]:
        order = torch.randperm(len(self.train.y))
        total = 0.0
        for step in range(self.steps):
            batch = self.train.take(order[step * self.batch : (step + 1) * self.batch])
            loss = cross_entropy(self.model(batch.x, batch.lengths), batch.y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        logits, y = predict(self.model, self.held_out), self.held_out.y
        return {
            "accuracy": (logits.argmax(-1) == y).double().mean().item(),
            "loss": cross_entropy(logits, y).item(),
            "train_loss": total / self.steps,
        }

    def facts(self) -> dict[str, float]:
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def save(self, path: Path) -> None:
        save_classifier(path, self.model, self.classes)


@torch.no_grad()
def predict(model: SequenceClassifier, samples: Samples) -> Tensor:  # (N, classes)
    pieces = zip(samples.x.split(256), samples.lengths.split(256), strict=True)
    return torch.cat([model(x, lengths) for x, lengths in pieces])


# The recipe


class Choice(NamedTuple):
    """What is chosen for each arm on the validation part."""

    lr: float
    layers: int
    parameterization: Parameterization

    def __str__(self) -> str:
        return f"lr={self.lr:g},layers={self.layers},{self.parameterization}"


# As many for each arm: what has no coefficients to parameterize is given more learning rates.
_FILTER_CHOICES = [Choice(*c) for c in product((3e-3, 1e-2), (2, 4), ("sigmoid", "triangle"))]
_CHOICES: dict[Filter, list[Choice]] = {
    "adaptive": _FILTER_CHOICES,
    "constant": _FILTER_CHOICES,
    "none": [Choice(*c) for c in product((1e-3, 3e-3, 1e-2, 3e-2), (2, 4), ("triangle",))],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run focus``."""
    _options.add_arguments(parser, out="fastkit-focus")
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="default: as many as make 600 steps on the training part; with --quick 2",
    )
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--channels", type=positive, default=32, metavar="N", help="width of the model; default: %(default)s"
    )
    parser.add_argument(
        "--kernel",
        type=positive,
        metavar="N",
        help="samples that the first layer sees at once; default: 8, on the digits 1",
    )
    _options.add_threads(parser, default=1)
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="samples of a set of coefficients, a multiple of 8; default: about a quarter of the longest"
        " training series, on the digits 8",
    )


def main(args: argparse.Namespace) -> int:
    """Chooses for each arm on a validation part, trains it from each seed, tests; returns the exit code."""
    require(sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm")
    if args.chunk is not None and args.chunk % 8 != 0:
        raise Refusal(
            f"--chunk must be a multiple of 8, got {args.chunk}; take {args.chunk + -args.chunk % 8}"
        )
    if args.data is None:
        series, kernel, chunk = digits(), 1, 8
    else:
        series = load(args.data)
        series = series._replace(train=standardised(series.train), test=standardised(series.test))
        kernel, chunk = 8, max(8, series.train.x.shape[2] // 4 // 8 * 8)
    seeds = _options.seeds_of(args, (0, 1, 2))
    config = {
        "epochs": args.epochs or (2 if args.quick else -(-600 * args.batch // len(series.train.y))),
        "batch": args.batch,
        "channels": args.channels,
        "kernel": args.kernel or kernel,
        "chunk": args.chunk or chunk,
        "choices": {arm: [str(c) for c in choices] for arm, choices in _choices(args.quick).items()},
        "chosen_by": "accuracy, then loss, on a stratified quarter of the training part",
    }
    options: dict[str, Any] = {"config": config, "data": series.facts(), "packages": ["scikit-learn"]}
    test = Parts(_samples(series.train), _samples(series.test))
    tables = {"validation": _validation(test.train), "test": test}
    with threads(args.threads), Run("focus", args.out, resume=args.resume, **options) as run:
        chosen, selection = _choose(run, tables, series.classes, _choices(args.quick))
        for seed, arm in product(seeds, ARMS):
            _row(run, tables, "test", arm, chosen[arm], seed, series.classes)
        metrics = run.write(
            run.finished("test", seeds),
            seeds,
            plain_baselines=_plain_baselines(series),
            selection=selection,
        )
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _choose(
    run: Run, tables: Mapping[str, Parts], classes: Sequence[str], choices: Mapping[Filter, Sequence[Choice]]
) -> tuple[dict[Filter, Choice], dict[str, Any]]:
    """For each arm its best on the validation part; and what was tried, for metrics.json."""
    chosen: dict[Filter, Choice] = {}
    selection = {}
    for arm in ARMS:
        trials = {
            choice: _row(run, tables, "validation", arm, choice, 0, classes).figures
            for choice in choices[arm]
        }
        chosen[arm] = max(trials, key=lambda choice: _rank(trials[choice]))
        tried = {str(choice): figures for choice, figures in trials.items()}
        selection[arm] = {"chosen": str(chosen[arm]), "trials": tried}
    return chosen, selection


def _choices(quick: bool) -> dict[Filter, list[Choice]]:
    return {arm: choices[:2] if quick else choices for arm, choices in _CHOICES.items()}


def _rank(figures: Mapping[str, float | None]) -> tuple[float, float]:
    accuracy, loss = figures["accuracy"], figures["loss"]
    return accuracy or 0.0, -math.inf if loss is None else -loss


def _row(
    run: Run,
    tables: Mapping[str, Parts],
    table: str,
    arm: Filter,
    choice: Choice,
    seed: int,
    classes: Sequence[str],
) -> Row:
    config, (train, held_out) = run.config, tables[table]
    epochs = config["epochs"]

    def begin() -> Training:
        model = SequenceClassifier(
            train.x.shape[2],
            len(classes),
            filter=arm,
            layers=choice.layers,
            parameterization=choice.parameterization,
            **{key: config[key] for key in ("kernel", "channels", "chunk")},
        )
        return Training(model, train, held_out, classes, lr=choice.lr, epochs=epochs, batch=config["batch"])

    test = table == "test"
    name = arm if test else f"{arm},{choice}"
    return run.row(table, name, seed, begin, stretches=epochs, keeps_model=test)


def _plain_baselines(series: Series) -> dict[str, dict[str, float]]:
    """Without a network: the largest class, and the nearest neighbour of the series as it is given here."""
    from sklearn.dummy import DummyClassifier
    from sklearn.neighbors import KNeighborsClassifier

    time = max(part.x.shape[2] for part in (series.train, series.test))
    x, x_test = (
        np.pad(part.x, ((0, 0), (0, 0), (0, time - part.x.shape[2]))).reshape(len(part.x), -1)
        for part in (series.train, series.test)
    )
    models = {"majority": DummyClassifier(), "1-NN": KNeighborsClassifier(1)}
    accuracy = {
        name: float(model.fit(x, series.train.y).score(x_test, series.test.y))
        for name, model in models.items()
    }
    return {"accuracy": accuracy}


def _table(metrics: Mapping[str, Any]) -> str:
    lines = [f"{metrics['data']['name']}: test accuracy after the last epoch; mean, deviation and each seed"]
    for arm, figure in metrics["figures"]["accuracy"].items():
        each = " ".join(f"{accuracy:.3f}" for accuracy in figure["seeds"].values())
        std = "     " if figure["std"] is None else f"{figure['std']:.3f}"
        chosen = metrics["selection"][arm]["chosen"]
        lines.append(f"  {arm:10}{figure['mean']:.3f}  {std}  ({each})  {chosen}")
    for name, accuracy in metrics["plain_baselines"]["accuracy"].items():
        lines.append(f"  {name:10}{accuracy:.3f}")
    return "\n".join(lines)


# The demo's


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
    train, test = _samples(series.train), _samples(series.test)
    curves = []
    with tqdm(total=2 * len(seeds) * epochs, desc="digits", disable=None) as bar:
        for seed, filtered in product(seeds, (True, False)):
            with seeded(seed):
                model = SequenceClassifier(1, 10, filter="adaptive" if filtered else "none")
                training = Training(model, train, test, series.classes, lr=1e-2, epochs=epochs, batch=64)
                curve = Curve(filtered, seed, [])
                for _ in range(epochs):
                    curve.accuracy.append(training.advance()["accuracy"])
                    bar.update()
            curves.append(curve)
    return curves
