"""Ranks that grow from block to block, and the pruning of A, against LoRA of one rank and full fine-tuning.

``python -m fastkit run prilora``; docs/recipes/prilora.md tells what it does and what it found.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fastkit._command import Refusal, positive, positive_number, require
from fastkit._threads import threads
from fastkit.recipes import _glue, _options, _tokens
from fastkit.recipes._encoder import Encoder, encoder
from fastkit.recipes._encoder import facts as encoder_facts
from fastkit.recipes._experiment import Run, deterministic, seeded
from fastkit.recipes._figures import Row, differences, with_spread
from fastkit.recipes._finetuning import Count, TaskTokens, given_or_random, linear_schedule, loss_of
from fastkit.recipes._glue import METRICS, Array, Task
from fastkit.recipes._prilora_arms import ARMS, Adapted, load_classifier, prilora_config

__all__ = ["add_arguments", "load_classifier", "main"]

# What is asked: the first arm minus the second.
QUESTIONS = (
    ("4-12", "uniform"),
    ("12-4", "uniform"),
    ("4-12", "12-4"),
    ("prilora", "uniform"),
    ("uniform+prune", "uniform"),
    ("prilora", "4-12"),
    ("prilora", "magnitude"),
    ("prilora", "random"),
    ("full", "uniform"),
)


# Training


class Training:
    """An arm's model and what trains it: a stretch is ``every`` steps and figures on the held-out parts.

    Whatever is drawn before, dropout is the same in all arms of a seed, as long as they draw alike.
    """

    def __init__(
        self,
        adapted: Adapted,
        data: TaskTokens,
        *,
        seed: int,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.adapted: Adapted = adapted
        self.data: TaskTokens = data
        self.device: torch.device = device
        self.every: int = config["every"]
        self.steps: int = config["steps"]
        self.model: torch.nn.Module = adapted.model.to(device)
        self.batches: list[Array] = _tokens.plan(data.train.lengths, config["tokens"], self.steps, seed)
        lr = config["full_lr" if ARMS[adapted.name].how == "full" else "lr"]
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(
            adapted.trained, lr, weight_decay=config["weight_decay"]
        )
        schedule = linear_schedule(self.optimizer, self.steps, config["warmup"])
        self.done: Count = Count()
        self.schedule = schedule
        self.parts: dict[str, Any] = {
            "trained": adapted.state, "optimizer": self.optimizer, "schedule": schedule, "done": self.done
        }  # fmt: skip
        torch.manual_seed(seed)

    def advance(self) -> dict[str, float]:
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        begin = self.done.count
        for chosen in self.batches[begin : begin + self.every]:
            y = self.data.train.y[torch.from_numpy(chosen)].to(self.device)
            logits = self.model(**_tokens.batch(self.data.train, chosen, self.device)).logits
            loss = loss_of(logits, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()
        self.done.count += self.every
        figures = {"train_loss": total.item() / self.every}
        last = self.done.count >= self.steps
        for name, part in self.data.held_out.items():
            if last or name.startswith("dev"):  # the test part is looked at once
                figures |= self.data.judged(name, _tokens.predict(self.model, part), part.y)
        return figures

    def facts(self) -> dict[str, float]:
        return self.adapted.facts()

    def save(self, path: Path) -> None:
        self.adapted.save(path, source=self.data.source, classes=self.data.classes)


# The recipe

_DEFAULTS: dict[str, Any] = {
    "steps": 300, "tokens": 1024, "every": 50, "length": 128, "lr": 1e-3, "full_lr": 2e-4, "alpha": 16.0,
    "weight_decay": 0.01, "warmup": 0.1, "ratio": 0.5, "interval": 40, "mode": "soft", "scaling": "lora",
}  # fmt: skip
_QUICK = {"steps": 30, "every": 10, "interval": 5}
# From AdaLoRA's scripts for DeBERTaV3-base (github.com/QingruZhang/AdaLoRA, NLU/scripts).
_ADALORA: dict[str, dict[str, Any]] = {
    task: dict(zip(("lr", "alpha", "length", "weight_decay"), values, strict=True))
    for task, values in {
        "mnli": (5e-4, 16.0, 256, 0.0), "sst2": (8e-4, 16.0, 128, 0.01), "cola": (8e-4, 32.0, 64, 0.01),
        "qqp": (8e-4, 16.0, 320, 0.01), "qnli": (5e-4, 32.0, 512, 0.01), "rte": (1.2e-3, 32.0, 320, 0.01),
        "mrpc": (1e-3, 32.0, 320, 0.01), "stsb": (2.2e-3, 32.0, 128, 0.1),
    }.items()
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run prilora``."""
    _options.add_arguments(parser, out="fastkit-prilora")
    _options.add_device(parser)
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="default: a small BERT with random weights")
    parser.add_argument("--task", choices=METRICS, help="metrics; default: by the folder's name, or columns")
    parser.add_argument("--target", metavar="COLUMN", help="of the labels; default: label, or GLUE's name")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="default: all")
    parser.add_argument(
        "--preset", choices=["adalora"], help="AdaLoRA's lr, alpha, length and decay of a task"
    )

    def add(name: str, type: Any, help: str, **more: Any) -> None:
        default = _DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=type, help=f"{help}; default: {default}", **more)

    add("steps", positive, "of the optimizer", metavar="N")
    add("tokens", positive, "of a step at most, padding included", metavar="N")
    add("every", positive, "steps from one look at the dev part to the next", metavar="N")
    add("length", positive, "tokens of a sentence or pair at most", metavar="N")
    add("lr", positive_number, "of all arms but full", metavar="X")
    add("full-lr", positive_number, "of full fine-tuning", metavar="X")
    add("alpha", positive_number, "of the adapters", metavar="X")
    add("weight-decay", _decay, "of AdamW", metavar="X")
    add("warmup", float, "share of the steps in which the learning rate grows", metavar="X")
    add("ratio", float, "share of A that a pruning zeroes", metavar="X")
    add("interval", positive, "steps from one pruning to the next", metavar="N")
    add("mode", None, "whether what was zeroed may grow again", choices=["soft", "hard"])
    add(
        "scaling",
        None,
        "alpha / r, alpha over the mean rank, or alpha / sqrt(r)",
        choices=["lora", "constant", "rslora"],
    )
    _options.add_threads(parser)


def _decay(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text}")
    return value


def main(args: argparse.Namespace) -> int:
    """Trains each arm from each seed and prints the table and the differences; returns the exit code."""
    require(
        transformers="transformers", peft="peft", sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm"
    )
    device = _options.device_of(args)
    task = (
        _glue.generated() if args.data is None else _glue.load(args.data, kind=args.task, target=args.target)
    )
    config = _config(args, task)
    if args.model is not None:
        _check_model(encoder(args.model), args.arms, task.classes, config)
    seeds = _options.seeds_of(args, (0, 1, 2))
    options: dict[str, Any] = {
        "config": {**config, "model": "random" if args.model is None else encoder_facts(args.model)},
        "data": task.facts(), "packages": ["transformers", "peft", "tokenizers", "scikit-learn", "scipy"],
        "device": device, "unit": "step", "stretch": config["every"], "suffix": "",
    }  # fmt: skip
    with (
        threads(args.threads or torch.get_num_threads()),
        Run("prilora", args.out, resume=args.resume, **options) as run,
        deterministic(device),
    ):
        base = given_or_random(args.model, run, task)
        data = TaskTokens(task, base, args.model, config, device)
        for seed in seeds:
            for arm in args.arms:
                _row(run, arm, seed, base, data, config, device)
        rows = run.finished("test", seeds)
        more = {
            "model": options["config"]["model"],
            "arms": _facts(rows),
            "differences": differences(rows, QUESTIONS),
            "plain_baselines": {"majority": _majority(task)},
        }
        metrics = run.write(rows, seeds, **more)
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _config(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    preset: dict[str, Any] = {}
    if args.preset is not None:
        if task.kind not in _ADALORA:
            raise Refusal(
                f"--preset adalora must be with one of its tasks, {', '.join(_ADALORA)}, got {task.kind};"
                " name it by --task, or leave the preset out"
            )
        preset = _ADALORA[task.kind]
    config = {**_DEFAULTS, **preset, **(_QUICK if args.quick else {})}
    given = {name: getattr(args, name) for name in _DEFAULTS}
    config |= {name: value for name, value in given.items() if value is not None}
    for name in ("ratio", "warmup"):
        if not 0 <= config[name] < 1:
            raise Refusal(f"--{name} must be at least 0 and below 1, got {config[name]}")
    for name in ("tokens", "length"):  # of which a pair needs three to mark its ends
        if config[name] < 8:
            raise Refusal(f"--{name} must be at least 8, got {config[name]}")
    if config["steps"] % config["every"] != 0:
        more = config["steps"] + -config["steps"] % config["every"]
        raise Refusal(
            f"--steps must be a multiple of --every, got {config['steps']} and {config['every']}; take {more}"
        )
    return config


def _check_model(
    base: Encoder, arms: Sequence[str], classes: Sequence[str], config: Mapping[str, Any]
) -> None:
    """Refuses before --out is made; all arms with adapters have them in the same layers."""
    with seeded(0):
        model = base.classifier(classes)
        for arm in [arm for arm in arms if ARMS[arm].how != "full"][:1]:
            try:
                Adapted(arm, model, prilora_config(ARMS[arm], 0, config)).close()
            except ValueError as error:
                raise Refusal(
                    f"--model must have numbered blocks with linear layers, got {base.source} ({error})"
                ) from error


def _row(
    run: Run,
    arm: str,
    seed: int,
    base: Encoder,
    data: TaskTokens,
    config: Mapping[str, Any],
    device: torch.device,
) -> Row:
    begun: list[Adapted] = []

    def begin() -> Training:
        model = base.classifier(data.classes)  # first of all that is drawn: the same head in all arms
        begun.append(Adapted(arm, model, prilora_config(ARMS[arm], seed, config)))
        return Training(begun[0], data, seed=seed, config=config, device=device)

    try:
        return run.row("test", arm, seed, begin, stretches=config["steps"] // config["every"])
    finally:
        for adapted in begun:
            adapted.close()


def _facts(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each arm, the mean over its seeds: counts are the same for all, zeros about so."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    return {
        arm: {name: fmean(row.facts[name] for row in rows) for name in rows[0].facts}
        for arm, rows in arms.items()
    }


def _majority(task: Task) -> dict[str, float]:
    """The figures of the largest class of the training part."""
    if not task.classes:
        return {}
    counts = np.bincount(task.train.y, minlength=len(task.classes)).astype(np.float32)
    return {
        f"{name}_{figure}": value
        for name, part in task.held_out.items()
        for figure, value in METRICS[task.kind](part.y, np.tile(counts, (len(part.y), 1))).items()
    }


def _table(metrics: Mapping[str, Any]) -> str:
    figures = {n: arms for n, arms in metrics["figures"].items() if not n.endswith("loss")}
    facts, config, model = metrics["arms"], metrics["config"], metrics["model"]
    seeds = " ".join(map(str, metrics["seeds"]))
    lines = [
        f"{metrics['data']['name']}, model {model if isinstance(model, str) else model['name']},"
        f" {config['steps']} steps of at most {config['tokens']} tokens, seeds {seeds}",
        "After the last step: mean and deviation over seeds; parameters of the adapters and of all that is"
        " trained; prunings, zeros in A",
    ]
    head = "".join(f"{name:>26}" for name in figures)
    lines.append(f"  {'':28}{head}{'adapters':>12}{'trained':>12}{'pruned':>8}{'zeros':>8}")
    for arm, fact in facts.items():
        cells = "".join(f"{with_spread(arms.get(arm), 'std'):>26}" for arms in figures.values())
        lines.append(
            f"  {arm:28}{cells}{fact['adapter_parameters']:12,.0f}{fact['trained_parameters']:12,.0f}"
            f"{fact['prunings']:8.0f}{fact['sparsity']:8.3f}"
        )
    majority = metrics["plain_baselines"]["majority"]
    if majority:
        lines.append(
            f"  {'majority':28}" + "".join(f"{majority[name]:17.4f}{'':9}" for name in figures).rstrip()
        )
    lines.append("Differences from the same seed: mean and standard error")
    for question, found in metrics["differences"].items():
        cells = "".join(f"{with_spread(found.get(name), 'stderr', sign='+'):>26}" for name in figures)
        lines.append(f"  {question:28}{cells}")
    return "\n".join(lines)
