"""MTAdam on losses whose weights are wrong, against Adam with wrong and right ones, and longer steps.

``python -m fastkit run mtadam``; docs/recipes/mtadam.md tells what it does and what it found.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkit._command import Refusal, positive, positive_number, require
from fastkit._threads import threads
from fastkit.recipes import _options
from fastkit.recipes._experiment import Run
from fastkit.recipes._figures import Row, differences, with_spread
from fastkit.recipes._images import Images, Part, digits, load
from fastkit.recipes._mtadam_arms import ARMS, Stepper
from fastkit.recipes._mtadam_models import MODELS, Model, TaskName, load_model, save_model

__all__ = ["add_arguments", "load_model", "main"]

# What is asked: the first arm minus the second.
QUESTIONS = (
    ("mtadam", "adam_unbalanced"),
    ("mtadam", "adam_unbalanced_xL"),
    ("mtadam", "adam_balanced"),
    ("mtadam", "equal_norm"),
    ("mtadam_xL", "adam_balanced_xL"),
    ("mtadam_byL", "adam_balanced"),
)
_EXPONENTS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)  # of the task ratio
_ARMS: Mapping[TaskName, tuple[str, ...]] = {
    "classes": tuple(ARMS),
    "mixed": tuple(ARMS),
    "ratio": ("mtadam", "adam_unbalanced", "adam_unbalanced_xL", "equal_norm"),
}
_EPOCHS: Mapping[TaskName, int] = {"classes": 5, "mixed": 20, "ratio": 20}


# Training


class Training:
    """A model and what trains it: an epoch is a pass over ``train`` and figures on ``test``."""

    def __init__(
        self, task: TaskName, model: Model, stepper: Stepper, train: Tensors, test: Tensors, *, batch: int
    ) -> None:
        self.task: TaskName = task
        self.model: Model = model
        self.stepper: Stepper = stepper
        self.batch: int = batch
        self.train: Tensors = train
        self.test: Tensors = test
        self.parts: dict[str, Any] = {"model": model, "optimizer": stepper.optimizer}

    def advance(self) -> dict[str, float]:
        lengths = []
        for chosen in torch.randperm(len(self.train.y)).split(self.batch):
            before = self._flat()
            self.stepper.step(self.model.losses(self.train.x[chosen], self.train.y[chosen]))
            lengths.append((self._flat() - before).square().mean().sqrt().item())
        with torch.no_grad():
            figures = self.model.judged(self.test.x, self.test.y)
        return {**figures, "step_length": fmean(lengths) / self.stepper.lr}

    def _flat(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.stepper.params])

    def facts(self) -> dict[str, float]:
        weights = {f"weight_{term}": weight for term, weight in self.stepper.weights.items()}
        return {"parameters": sum(param.numel() for param in self.stepper.params), **weights}

    def save(self, path: Path) -> None:
        save_model(path, self.task, self.model)


class Tensors(NamedTuple):
    x: Tensor
    y: Tensor


def _tensors(part: Part) -> Tensors:
    return Tensors(torch.from_numpy(part.x), torch.from_numpy(part.y))


def draw_weights(task: TaskName, terms: Sequence[str], exponent: int = 0) -> dict[str, float]:
    """Of each term, from torch's generator: 1 for the first, and for the others what the task says."""
    if task == "ratio":
        others = [10.0**exponent]
    elif task == "classes":
        others = (1000 * torch.rand(len(terms) - 1)).tolist()
    else:
        others = (10 ** (8 * torch.rand(len(terms) - 1, dtype=torch.float64) - 4)).tolist()
    return dict(zip(terms, [1.0, *others], strict=True))


# The recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run mtadam``."""
    _options.add_arguments(parser, out="fastkit-mtadam")
    parser.add_argument("--task", choices=MODELS, default="classes", help="default: %(default)s")
    parser.add_argument(
        "--arms", choices=ARMS, nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}; default: all of a task"
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="default: 5, of the tasks mixed and ratio 20; with --quick 1",
    )
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--lr",
        type=positive_number,
        default=1e-3,
        metavar="X",
        help="of arms without xL or byL; default: %(default)s",
    )
    parser.add_argument(
        "--ranks",
        type=positive_number,
        nargs="+",
        metavar="X",
        help="weights of MTAdam's terms, one each; default: all 1",
    )
    _options.add_threads(parser, default=1)


def main(args: argparse.Namespace) -> int:
    """Trains each arm from each seed and prints the table and the differences; returns the exit code."""
    require(sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm")
    task: TaskName = args.task
    arms = _arms(task, args.arms)
    images = digits() if args.data is None else load(args.data)
    terms = _model(task, images).terms
    if args.ranks is not None and len(args.ranks) != len(terms):
        raise Refusal(
            f"--ranks must be {len(terms)} numbers, for {', '.join(terms)}, got {len(args.ranks)}; give each"
            " term one"
        )
    config = {
        "task": task,
        "epochs": args.epochs or (1 if args.quick else _EPOCHS[task]),
        "batch": args.batch,
        "lr": args.lr,
        "ranks": args.ranks or [1.0] * len(terms),
    }
    exponents = (-4, 0, 4) if args.quick else _EXPONENTS
    seeds = _options.seeds_of(args, (0, 1, 2, 3, 4))
    options: dict[str, Any] = {"config": config, "data": images.facts(), "packages": ["scikit-learn"]}
    with threads(args.threads), Run("mtadam", args.out, resume=args.resume, **options) as run:
        parts = _tensors(images.train), _tensors(images.test)
        if task == "ratio":
            rows = [
                _row(run, images, parts, arm, seed, exponent)
                for seed, arm, exponent in product(seeds, arms, exponents)
            ]
            text = _ratio_table(_write_ratio(run, rows, seeds))
        else:
            for seed, arm in product(seeds, arms):
                _row(run, images, parts, arm, seed)
            rows = run.finished("test", seeds)
            text = _table(run.write(rows, seeds, **_more(run, rows, images)))
    print(f"{text}\n\n{run.written()}")
    return 0


def _arms(task: TaskName, asked: Sequence[str] | None) -> Sequence[str]:
    wrong = [arm for arm in asked or () if arm not in _ARMS[task]]
    if wrong:
        raise Refusal(
            f"--arms must be of {', '.join(_ARMS[task])} with --task {task}, got {', '.join(wrong)}; leave"
            " them out"
        )
    return list(dict.fromkeys(asked or _ARMS[task]))


def _model(task: TaskName, images: Images) -> Model:
    height, width = images.train.x.shape[1:]
    return MODELS[task](height, width, images.classes)


def _row(
    run: Run, images: Images, parts: tuple[Tensors, Tensors], arm: str, seed: int, exponent: int = 0
) -> Row:
    config = run.config
    task: TaskName = config["task"]

    def begin() -> Training:  # all that is drawn is drawn alike in all arms of a seed
        model = _model(task, images)
        weights = draw_weights(task, model.terms, exponent)
        stepper = Stepper(ARMS[arm], model, weights, lr=config["lr"], ranks=config["ranks"])
        return Training(task, model, stepper, *parts, batch=config["batch"])

    table = f"k={exponent}" if task == "ratio" else "test"
    return run.row(table, arm, seed, begin, stretches=config["epochs"])


# What came out


def _more(run: Run, rows: Sequence[Row], images: Images) -> dict[str, Any]:
    """Of metrics.json, what this recipe adds."""
    arms = {row.arm: ARMS[row.arm] for row in rows}
    lr, terms = run.config["lr"], len(run.config["ranks"])
    majority = np.bincount(images.train.y).argmax()
    return {
        "weights": {str(row.seed): _weights(row) for row in rows if arms[row.arm].weighted},
        "learning_rates": {name: lr * terms**arm.power for name, arm in arms.items()},
        "differences": differences(rows, QUESTIONS),
        "plain_baselines": {"majority": {"accuracy": float((images.test.y == majority).mean())}},
    }


def _weights(row: Row) -> dict[str, float]:
    return {
        name.removeprefix("weight_"): weight
        for name, weight in row.facts.items()
        if name.startswith("weight_")
    }


def _write_ratio(run: Run, rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Any]:
    """The files of all tables together; curves.png has the last points over the exponents."""
    together = [row._replace(arm=f"{row.arm},{row.table}") for row in rows]
    ratio = _ratio(rows, MODELS["ratio"].terms)
    return run.write(together, seeds, picture=partial(_draw_ratio, ratio=ratio), ratio=ratio)


def _ratio(rows: Sequence[Row], terms: Sequence[str]) -> dict[str, Any]:
    """Of each arm and term the losses at the end, over the exponents: of each seed, and their mean.

    ``spread`` is the largest mean by the smallest: 1 where the weight does not matter.
    """
    arms: dict[str, dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        arms.setdefault(row.arm, {}).setdefault(int(row.table.removeprefix("k=")), []).append(row)
    found: dict[str, Any] = {}
    for name, of_exponent in arms.items():
        found[name] = {"exponents": sorted(of_exponent)}
        for term in terms:
            losses = [[row.figures[term] for row in of_exponent[k]] for k in sorted(of_exponent)]
            known = [[loss for loss in of_seeds if loss is not None] for of_seeds in losses]
            means = [fmean(k) if len(k) == len(all_) else None for k, all_ in zip(known, losses, strict=True)]
            finite = [mean for mean in means if mean is not None]
            spread = max(finite) / min(finite) if len(finite) == len(means) and min(finite) > 0 else None
            found[name][term] = {"seeds": losses, "means": means, "spread": spread}
    return found


def _draw_ratio(path: Path, ratio: Mapping[str, Any]) -> None:
    """The losses at the end over the exponents, a panel for each term: the mean, and each seed as a dot."""
    from matplotlib.figure import Figure

    terms = MODELS["ratio"].terms
    figure = Figure(figsize=(5 * len(terms), 3.5), layout="constrained")
    for place, term in enumerate(terms, 1):
        axes = figure.add_subplot(1, len(terms), place)
        for colour, (name, arm) in enumerate(ratio.items()):
            means = np.array(arm[term]["means"], dtype=float)  # None is NaN
            axes.plot(arm["exponents"], means, color=f"C{colour}", label=name)
            for losses in np.array(arm[term]["seeds"], dtype=float).T:
                axes.plot(arm["exponents"], losses, ".", color=f"C{colour}", markersize=3)
        axes.set(xlabel="k: the weight of the lower half is 10^k", ylabel=f"{term}, test loss")
        axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _head(metrics: Mapping[str, Any]) -> str:
    config = metrics["config"]
    seeds = " ".join(map(str, metrics["seeds"]))
    return (
        f"{metrics['data']['name']}, task {config['task']}, batches of {config['batch']}, epochs"
        f" {config['epochs']}, seeds {seeds}"
    )


def _table(metrics: Mapping[str, Any]) -> str:
    figures = metrics["figures"]
    lines = [
        _head(metrics),
        "Of the test part, without weights, after the last epoch: mean and deviation over seeds; step_length"
        " is of the training",
        f"  {'':32}{'lr':>8}" + "".join(f"{name:>20}" for name in figures),
    ]
    for arm, lr in metrics["learning_rates"].items():
        cells = "".join(f"{with_spread(arms[arm], 'std'):>20}" for arms in figures.values())
        lines.append(f"  {arm:32}{lr:8.3g}{cells}")
    lines.append(f"  {'majority':40}{metrics['plain_baselines']['majority']['accuracy']:11.4f}")
    if metrics["differences"]:
        lines.append("Differences from the same seed: mean and standard error")
    for question, found in metrics["differences"].items():
        cells = "".join(f"{with_spread(found.get(name), 'stderr', sign='+'):>20}" for name in figures)
        lines.append(f"  {question:40}{cells}")
    return "\n".join(lines)


def _ratio_table(metrics: Mapping[str, Any]) -> str:
    lines = [
        _head(metrics),
        "Test loss after the last epoch, without weights, where the lower half's is 10^k: mean over seeds; at"
        " the end the largest by the smallest",
    ]
    exponents = next(iter(metrics["ratio"].values()))["exponents"]
    lines.append(f"  {'':28}" + "".join(f"{f'k={k}':>9}" for k in exponents))
    for name, arm in metrics["ratio"].items():
        for term in MODELS["ratio"].terms:
            cells = "".join(f"{'-' if m is None else format(m, '.4f'):>9}" for m in arm[term]["means"])
            spread = arm[term]["spread"]
            lines.append(f"  {name:20}{term:8}{cells}{'-' if spread is None else format(spread, '.3f'):>9}")
    return "\n".join(lines)
