"""Many orthogonal heads on one encoder, the weak ones eliminated, against one head and an ensemble.

``python -m fastkit run multiverse``; docs/recipes/multiverse.md tells what it does and what it found.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit._command import Refusal, positive, positive_number, require
from fastkit._threads import threads
from fastkit.methods import multiverse  # whose model, imported when asked for, needs transformers
from fastkit.recipes import _glue, _multiverse_transfer, _options, _tokens
from fastkit.recipes._encoder import Encoder, encoder, quiet
from fastkit.recipes._encoder import facts as encoder_facts
from fastkit.recipes._experiment import Run, deterministic, replace_folder, seeded
from fastkit.recipes._figures import differences, summary, with_spread
from fastkit.recipes._finetuning import Count, TaskTokens, given_or_random, linear_schedule
from fastkit.recipes._glue import Array, Task
from fastkit.recipes._multiverse_transfer import Transfer
from fastkit.recipes._tokens import HeldOut

__all__ = ["add_arguments", "load_classifier", "main"]


class Arm(NamedTuple):
    heads: bool  # many, or one
    ortho: bool
    eliminates: bool


ARMS: Mapping[str, Arm] = {
    "one": Arm(heads=False, ortho=False, eliminates=False),
    "heads": Arm(heads=True, ortho=False, eliminates=False),
    "orthogonal": Arm(heads=True, ortho=True, eliminates=False),
    "multiverse": Arm(heads=True, ortho=True, eliminates=True),
}
ENSEMBLE = "one, ensemble"  # of the seeds' models; its figures have no spread
QUESTIONS = (
    ("heads", "one"),
    ("orthogonal", "heads"),
    ("multiverse", "orthogonal"),
    ("multiverse", "one"),
)
_WATCHED = 256  # rows of which agreement is watched


def load_classifier(path: Path) -> multiverse.MultiverseForSequenceClassification:
    """The model of a folder ``models/test-ARM-SEED``, in eval."""
    with quiet():
        return multiverse.MultiverseForSequenceClassification.from_pretrained(path).eval()


class Data(NamedTuple):
    """The task and the other sets, as tokens."""

    task: TaskTokens
    transfer: list[tuple[Transfer, HeldOut]]


class Training:
    """An arm's model and what trains it: a stretch is ``every`` steps, and what the heads are like after it.

    All else is judged after the last step alone; nothing is chosen by it.
    """

    def __init__(
        self,
        arm: Arm,
        heads: int,
        base: Encoder,
        data: Data,
        *,
        seed: int,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.data = data
        self.device = device
        self.every: int = config["every"]
        self.steps: int = config["steps"]
        count = heads if arm.heads else 1
        with quiet():
            model = multiverse.MultiverseForSequenceClassification.from_base(
                base.classifier(data.task.classes),  # pyright: ignore[reportArgumentType]
                num_heads=count,
                ortho=config["ortho"] if arm.ortho else None,
                ortho_weight=config["ortho_weight"],
            )
        self.model: multiverse.MultiverseForSequenceClassification = model
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        self.eliminator: multiverse.HeadEliminator = multiverse.HeadEliminator(
            count,
            total_steps=self.steps,
            policy=config["policy"] if arm.eliminates else "none",
            margin=config["margin"],
        )
        self.batches: list[Array] = _tokens.plan(data.task.train.lengths, config["tokens"], self.steps, seed)
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(
            self.model.parameters(), config["lr"], weight_decay=config["weight_decay"]
        )
        self.schedule: torch.optim.lr_scheduler.LambdaLR = linear_schedule(
            self.optimizer, self.steps, config["warmup"]
        )
        self.done: Count = Count()
        self.parts: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule,
            "eliminator": self.eliminator, "done": self.done,
        }  # fmt: skip
        torch.manual_seed(seed)  # the same dropout in all arms

    def advance(self) -> dict[str, float]:
        self.model.train()
        head, total = self.model.head, torch.zeros((), dtype=torch.float64, device=self.device)
        begin = self.done.count
        for chosen in self.batches[begin : begin + self.every]:
            y = self.data.task.train.y[torch.from_numpy(chosen)].to(self.device)
            inputs = _tokens.batch(self.data.task.train, chosen, self.device)
            loss = self.model(**inputs, labels=y).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            found = self.model.take_sums()
            assert found is not None
            total += found[0].sum() / head.active.sum()
            self.eliminator.add(*found)
            head.eliminate(self.eliminator.step(), self.optimizer)
        self.done.count += self.every
        figures = {
            "train_loss": total.item() / self.every,
            "heads": float(head.num_active),
            "cosine": head.mean_abs_cosine().item(),
            "agreement": self.agreement(),
        }
        if self.done.count >= self.steps:
            figures |= self.judged()
        return figures

    @torch.no_grad()
    def agreement(self) -> float:
        """Of some rows of the first held-out part, in eval."""
        part = next(iter(self.data.task.held_out.values()))
        self.model.eval()
        same, rows = 0.0, 0
        for chosen, inputs in part.batches:
            same += self.model.head.agreement(self.model.model(**inputs).logits).item() * len(chosen)
            rows += len(chosen)
            if rows >= _WATCHED:
                break
        return same / rows

    def judged(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, part in self.data.task.held_out.items():
            figures |= self.data.task.judged(name, _tokens.predict(self.model, part), part.y)
        for other, part in self.data.transfer:
            figures[f"{other.name}_accuracy"] = other.accuracy(_tokens.predict(self.model, part))
        return figures

    def facts(self) -> dict[str, float]:
        return {"heads": self.model.head.num_active}

    def save(self, path: Path) -> None:
        with quiet():
            replace_folder(path, self.model.save_pretrained)


# The recipe

_DEFAULTS: dict[str, Any] = {
    "steps": 300, "tokens": 1024, "every": 30, "length": 96, "weight_decay": 0.01, "warmup": 0.1,
    "heads": 128, "ortho_weight": 0.005, "margin": 0.1,
}  # fmt: skip
_LR, _LR_RANDOM = 5e-5, 1e-3  # of an encoder that knows something, and of one that does not
_QUICK = {"steps": 60, "every": 10, "heads": 16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run multiverse``."""
    _options.add_arguments(parser, out="fastkit-multiverse")
    _options.add_device(parser)
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="default: a small BERT with random weights")
    parser.add_argument(
        "--transfer", type=Path, nargs="+", default=[], metavar="PATH",
        help="folders of other sets of the same task, to be tested on",
    )  # fmt: skip
    parser.add_argument(
        "--transfer-rows", type=positive, default=2000, metavar="N",
        help="the first of each; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="default: all")
    parser.add_argument(
        "--sweep", type=positive, nargs="+", default=[], metavar="H",
        help="also train the arm multiverse with so many heads, from the first seed",
    )  # fmt: skip
    parser.add_argument(
        "--ortho", choices=("abs", "squared", "cos_abs", "cos_squared", "huber"), default="abs",
        help="the penalty; default: %(default)s",
    )  # fmt: skip

    parser.add_argument(
        "--policy", choices=("margin", "fraction"), default="margin",
        help="which heads go at a check: those beyond a margin, or a tenth; default: %(default)s",
    )  # fmt: skip

    def add(name: str, type: Any, help: str, metavar: str) -> None:
        default = _DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=type, help=f"{help}; default: {default}", metavar=metavar)

    add("heads", positive, "of the arms with many", "H")
    add("steps", positive, "of the optimizer", "N")
    add("tokens", positive, "of a step at most, padding included", "N")
    add("every", positive, "steps from one look at the heads to the next", "N")
    add("length", positive, "tokens of a sentence or pair at most", "N")
    parser.add_argument(
        "--lr", type=positive_number, metavar="X",
        help=f"of all arms; default: {_LR}, of an encoder with random weights {_LR_RANDOM}",
    )  # fmt: skip
    add("ortho-weight", positive_number, "of the penalty", "X")
    add("margin", positive_number, "by which a head's loss may be beyond the best one's", "X")
    _options.add_threads(parser)


def main(args: argparse.Namespace) -> int:
    """Trains each arm from each seed, tests inside and across data sets; returns the exit code."""
    require(transformers="transformers", sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm")
    device = _options.device_of(args)
    task = _glue.generated() if args.data is None else _glue.load(args.data, kind=None, target=None)
    if not task.classes:
        raise Refusal(f"--data must have classes, got the scores of {task.name}")
    others = (
        [_multiverse_transfer.generated(task)]
        if args.data is None and not args.transfer
        else _multiverse_transfer.load(args.transfer, task, args.transfer_rows)
    )
    config = _config(args)
    most = max([config["heads"], *args.sweep] if {*args.arms} - {"one"} else [1, *args.sweep])
    if args.model is not None:
        _check_heads(encoder(args.model), task, most)
    seeds = _options.seeds_of(args, (0, 1, 2))
    with (
        threads(args.threads or torch.get_num_threads()),
        Run(
            "multiverse",
            args.out,
            config={**config, "model": "random" if args.model is None else encoder_facts(args.model)},
            data={**task.facts(), "transfer": [other.facts for other in others]},
            resume=args.resume,
            packages=["transformers", "tokenizers", "scikit-learn", "scipy"],
            device=device,
            unit="step",
            stretch=config["every"],
            suffix="",
        ) as run,
        deterministic(device),
    ):
        base = given_or_random(args.model, run, task)
        if args.model is None:
            _check_heads(base, task, most)
        tokens = TaskTokens(task, base, args.model, config, device)
        data = Data(tokens, [(other, tokens.part(other.part)) for other in others])

        def row(table: str, arm: str, name: str, heads: int, seed: int) -> None:
            def begin() -> Training:
                return Training(ARMS[arm], heads, base, data, seed=seed, config=config, device=device)

            stretches = config["steps"] // config["every"]
            run.row(table, name, seed, begin, stretches=stretches, keeps_model=table == "test")

        arms: list[str] = args.arms
        for seed, arm in product(seeds, arms):
            row("test", arm, arm, config["heads"], seed)
        for heads in args.sweep:
            row("sweep", "multiverse", f"H={heads}", heads, seeds[0])
        rows = run.finished("test", seeds)
        swept = [each for each in run.finished("sweep", seeds[:1]) if int(each.arm[2:]) in args.sweep]
        ensemble = _ensemble(run, data, seeds, device)
        metrics = run.write(
            rows,
            seeds,
            model="random" if args.model is None else encoder_facts(args.model),
            differences=differences(rows, QUESTIONS),
            ensemble=ensemble,
            sweep=summary(swept),
            plain_baselines={"majority": _majority(task, others)},
        )
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _config(args: argparse.Namespace) -> dict[str, Any]:
    config = {**_DEFAULTS, **(_QUICK if args.quick else {}), "ortho": args.ortho, "policy": args.policy}
    config["lr"] = args.lr or (_LR_RANDOM if args.model is None else _LR)
    config |= {name: value for name in _DEFAULTS if (value := getattr(args, name, None)) is not None}
    for name in ("tokens", "length"):  # of which a pair needs three to mark its ends
        if config[name] < 8:
            raise Refusal(f"--{name} must be at least 8, got {config[name]}")
    if config["steps"] % config["every"] != 0:
        more = config["steps"] + -config["steps"] % config["every"]
        raise Refusal(
            f"--steps must be a multiple of --every, got {config['steps']} and {config['every']}; take {more}"
        )
    return config


def _check_heads(base: Encoder, task: Task, heads: int) -> None:
    """That the model can have so many."""
    with seeded(0):
        classifier: Any = base.classifier(task.classes)
        try:
            multiverse.MultiverseForSequenceClassification.from_base(classifier, num_heads=heads)
        except ValueError as error:
            raise Refusal(
                f"--heads must be as many as fit --model, a classifier that ends in a linear layer ({error})"
            ) from error


def _ensemble(run: Run, data: Data, seeds: Sequence[int], device: torch.device) -> dict[str, float]:
    """Of the seeds' models with one head: the mean of their probabilities; of all of them or of none."""
    paths = [run.model_path("test", "one", seed) for seed in seeds if ("test", "one", seed) in run.rows]
    if len(paths) < len(seeds) or len(paths) < 2:
        return {}
    models: list[Any] = [load_classifier(path).to(device) for path in paths]  # pyright: ignore[reportArgumentType]

    def logits(part: HeldOut) -> Tensor:
        each = [_tokens.predict(model, part).double().softmax(1) for model in models]
        return torch.stack(each).mean(0).log()

    figures: dict[str, float] = {}
    for name, part in data.task.held_out.items():
        figures |= data.task.judged(name, logits(part), part.y)
    for other, part in data.transfer:
        figures[f"{other.name}_accuracy"] = other.accuracy(logits(part))
    return figures


def _majority(task: Task, others: Sequence[Transfer]) -> dict[str, float]:
    """The figures of the largest class of the training part."""
    counts = torch.from_numpy(task.train.y).bincount(minlength=len(task.classes)).double().log()

    def logits(rows: int) -> Tensor:
        return counts.expand(rows, -1)

    figures = {
        f"{name}_{figure}": value
        for name, part in task.held_out.items()
        for figure, value in _glue.METRICS[task.kind](part.y, logits(len(part.y)).numpy()).items()
    }
    return figures | {f"{o.name}_accuracy": o.accuracy(logits(len(o.part.y))) for o in others}


def _table(metrics: Mapping[str, Any]) -> str:
    shown = [name for name in metrics["plain_baselines"]["majority"] if name in metrics["figures"]]
    config, model = metrics["config"], metrics["model"]
    lines = [
        f"{metrics['data']['name']}, model {model if isinstance(model, str) else model['name']},"
        f" {config['steps']} steps of at most {config['tokens']} tokens, {config['heads']} heads",
        "After the last step: mean and deviation over seeds",
        f"  {'':22}" + "".join(f"{name:>28}" for name in (*shown, "heads")),
    ]
    for arm in ARMS:
        if arm in metrics["figures"]["heads"]:
            lines.append(_line(arm, {name: metrics["figures"][name][arm] for name in (*shown, "heads")}))
    for name, figures in (
        (ENSEMBLE, metrics["ensemble"]),
        ("majority", metrics["plain_baselines"]["majority"]),
    ):
        if figures:
            lines.append(f"  {name:22}" + "".join(f"{figures[each]:28.4f}" for each in shown))
    for arm in metrics["sweep"].get("heads", {}):
        lines.append(_line(arm, {name: metrics["sweep"][name][arm] for name in (*shown, "heads")}))
    lines.append("Differences from the same seed: mean and standard error")
    for question, found in metrics["differences"].items():
        cells = "".join(f"{with_spread(found.get(name), 'stderr', '+'):>28}" for name in shown)
        lines.append(f"  {question:22}{cells}")
    return "\n".join(lines)


def _line(arm: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    return f"  {arm:22}" + "".join(f"{with_spread(figure, 'std'):>28}" for figure in figures.values())
