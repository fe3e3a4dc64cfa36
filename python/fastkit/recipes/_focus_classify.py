"""The task ``classify`` of ``run focus``: series, from their first sample to their last."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit._threads import threads
from fastkit.nn.adaptive_iir import Parameterization
from fastkit.recipes import _options
from fastkit.recipes._experiment import Run, read_model, write_checkpoint
from fastkit.recipes._figures import Row
from fastkit.recipes._focus_models import ARMS, POOL, ArmName, SeriesClassifier, matched, parameters
from fastkit.recipes._focus_series import Parts, Samples, read, samples, validation
from fastkit.recipes._series import Series


def save_classifier(path: Path, model: nn.Module, classes: Sequence[str]) -> None:
    """What ``load_classifier`` reads back, of a SeriesClassifier."""
    state = {"config": model.config, "class_names": list(classes), "state_dict": model.state_dict()}
    write_checkpoint(path, state)


def load_classifier(path: Path) -> tuple[SeriesClassifier, list[str]]:
    """A model from the folder ``models`` of a run, and the names of its classes."""

    def build(state: dict[str, Any]) -> tuple[SeriesClassifier, list[str]]:
        model = SeriesClassifier(**state["config"])
        model.load_state_dict(state["state_dict"])
        return model.eval(), state["class_names"]

    return read_model(path, "focus", build)


# Training


class Training:
    """A model and what trains it: an epoch is a pass over ``train`` and figures on ``held_out``."""

    def __init__(
        self,
        model: nn.Module,
        train: Samples,
        held_out: Samples,
        classes: Sequence[str],
        *,
        lr: float,
        epochs: int,
        batch: int,
    ) -> None:
        self.model: nn.Module = model
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
        return {"parameters": parameters(self.model)}

    def save(self, path: Path) -> None:
        save_classifier(path, self.model, self.classes)


@torch.no_grad()
def predict(model: nn.Module, samples: Samples) -> Tensor:  # (N, classes)
    pieces = zip(samples.x.split(256), samples.lengths.split(256), strict=True)
    return torch.cat([model(x, lengths) for x, lengths in pieces])


# The table


class Choice(NamedTuple):
    """What is chosen for each arm on the validation part."""

    lr: float
    parameterization: Parameterization | None = None  # None: there are no filters

    def __str__(self) -> str:
        filters = "" if self.parameterization is None else f",{self.parameterization}"
        return f"lr={self.lr:g}{filters}"


# As many for each arm: what has no coefficients to parameterize is given more learning rates in between.
_FILTER_CHOICES = [Choice(*c) for c in product((3e-3, 1e-2, 1e-3, 3e-2), ("sigmoid", "triangle"))]
_CHOICES: dict[ArmName, list[Choice]] = {
    "focus": _FILTER_CHOICES,
    "constant": _FILTER_CHOICES,
    "transformer": [Choice(lr) for lr in (3e-3, 1e-2, 1e-3, 3e-2, 3e-4, 2e-3, 5e-3, 2e-2)],
}


_SIZES = "kernel", "hidden_size", "layers", "attn_chunk", "bin_length", "kernel_length"


def main(args: argparse.Namespace) -> int:
    """Chooses for each arm on a validation part, trains it from each seed, tests; returns the exit code."""
    series, kernel, chunk = read(args.data)
    chunk = args.chunk or chunk
    seeds = _options.seeds_of(args, (0, 1, 2))
    config = {
        "task": "classify",
        "epochs": args.epochs or (2 if args.quick else -(-600 * (args.batch or 16) // len(series.train.y))),
        "batch": args.batch or 16,
        "kernel": args.kernel or kernel,
        "hidden_size": args.hidden_size or 32,
        "layers": args.layers,
        "attn_chunk": args.attn_chunk or min(chunk, 2048),
        "bin_length": chunk,
        "pool": POOL,
        "kernel_length": args.kernel_length or min(2048, series.train.x.shape[2]),
        "choices": {arm: [str(c) for c in choices] for arm, choices in _choices(args.quick).items()},
        "chosen_by": "accuracy, then loss, on a stratified quarter of the training part",
    }
    options: dict[str, Any] = {
        "config": config, "data": series.facts(), "packages": ["scikit-learn", "transformers"],
    }  # fmt: skip
    test = Parts(samples(series.train), samples(series.test))
    for arm in ARMS:  # before anything is trained
        _model(config, arm, test, series.classes)
    tables = {"validation": validation(test.train), "test": test}
    with threads(args.threads), Run("focus", args.out, resume=args.resume, **options) as run:
        chosen, selection = _choose(run, tables, series.classes, _choices(args.quick))
        for seed, arm in product(seeds, ARMS):
            _row(run, tables, "test", arm, chosen[arm], seed, series.classes)
        rows = run.finished("test", seeds)
        metrics = run.write(
            rows,
            seeds,
            parameters={row.arm: row.facts["parameters"] for row in rows},
            plain_baselines=_plain_baselines(series),
            selection=selection,
        )
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _choose(
    run: Run,
    tables: Mapping[str, Parts],
    classes: Sequence[str],
    choices: Mapping[ArmName, Sequence[Choice]],
) -> tuple[dict[ArmName, Choice], dict[str, Any]]:
    """For each arm its best on the validation part; and what was tried, for metrics.json."""
    chosen: dict[ArmName, Choice] = {}
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


def _choices(quick: bool) -> dict[ArmName, list[Choice]]:
    return {arm: choices[:2] if quick else choices for arm, choices in _CHOICES.items()}


def _rank(figures: Mapping[str, float | None]) -> tuple[float, float]:
    accuracy, loss = figures["accuracy"], figures["loss"]
    return accuracy or 0.0, -math.inf if loss is None else -loss


def _row(
    run: Run,
    tables: Mapping[str, Parts],
    table: str,
    arm: ArmName,
    choice: Choice,
    seed: int,
    classes: Sequence[str],
) -> Row:
    config, (train, held_out) = run.config, tables[table]
    epochs = config["epochs"]

    def begin() -> Training:
        model = SeriesClassifier(**_model(config, arm, tables[table], classes, choice.parameterization))
        return Training(model, train, held_out, classes, lr=choice.lr, epochs=epochs, batch=config["batch"])

    test = table == "test"
    name = arm if test else f"{arm},{choice}"
    return run.row(table, name, seed, begin, stretches=epochs, keeps_model=test)


def _model(
    config: Mapping[str, Any],
    arm: ArmName,
    parts: Parts,
    classes: Sequence[str],
    parameterization: Parameterization | None = None,
) -> dict[str, Any]:
    """The config of an arm's SeriesClassifier."""
    sizes = {
        "inputs": parts.train.x.shape[2],
        "classes": len(classes),
        "arm": arm,
        "parameterization": parameterization or "sigmoid",
        **{key: config[key] for key in _SIZES},
    }
    return matched(SeriesClassifier, sizes)


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
    lines = [
        f"{metrics['data']['name']}: test accuracy after the last epoch; mean, deviation and each seed; what"
        " was chosen; parameters"
    ]
    for arm, figure in metrics["figures"]["accuracy"].items():
        each = " ".join(f"{accuracy:.3f}" for accuracy in figure["seeds"].values())
        std = "     " if figure["std"] is None else f"{figure['std']:.3f}"
        chosen = metrics["selection"][arm]["chosen"]
        lines.append(
            f"  {arm:13}{figure['mean']:.3f}  {std}  ({each})  {chosen}; {metrics['parameters'][arm]:,}"
        )
    for name, accuracy in metrics["plain_baselines"]["accuracy"].items():
        lines.append(f"  {name:13}{accuracy:.3f}")
    return "\n".join(lines)
