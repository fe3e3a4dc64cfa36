"""The task ``lm`` of ``run tied_embedding``: the paper's language models, word by word."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fastkit._command import Refusal
from fastkit._sync import replace_file
from fastkit._threads import threads
from fastkit.methods.tied_embedding import TiedLanguageModel, bptt_batches
from fastkit.methods.tied_embedding.presets import PRESETS, Preset
from fastkit.recipes import _corpus, _options, _tied_correlations
from fastkit.recipes._corpus import Corpus
from fastkit.recipes._experiment import Run, deterministic
from fastkit.recipes._figures import Row, differences, summary

# In the order that the paper reports of its small model, from the highest test perplexity to the lowest.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "untied": {},
    "wt": {"tie": True},
    "pr": {"projection": True},
    "wt+pr": {"tie": True, "projection": True},
}
QUESTIONS = (*((arm, before) for before, arm in pairwise(ARMS)), ("wt+pr", "untied"), ("wt+pr", "wt"))


class Training:
    """A model and what trains it: an epoch is a pass over the text, with the state carried along."""

    def __init__(self, model: TiedLanguageModel, parts: Sequence[Tensor], preset: Preset) -> None:
        self.model = model
        self.train, self.valid, self.test = parts
        self.preset = preset
        self.optimizer: torch.optim.SGD = torch.optim.SGD(model.parameters(), preset.lr)
        self.schedule: torch.optim.lr_scheduler.LambdaLR = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: preset.lr_of(epoch) / preset.lr
        )
        self.parts: dict[str, Any] = {
            "model": model, "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip

    def advance(self) -> dict[str, float]:
        self.model.train()
        rows = self.preset.batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.train.device)
        words, state = 0, None
        for ids, target in bptt_batches(self.train, rows, self.preset.steps):
            loss, state = self.model.loss(ids, target, state, reduction="sum")
            self.optimizer.zero_grad()
            (loss / rows + self.model.penalty(rows)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.preset.clip)
            self.optimizer.step()
            total += loss.detach()
            words += target.numel()
        self.schedule.step()
        figures = {
            "valid": self.model.perplexity(self.valid, batch_size=rows_of(self.valid, rows)),
            "train": _perplexity(total.item() / words),
        }
        if self.schedule.last_epoch == self.preset.epochs:
            figures["test"] = self.model.perplexity(self.test)  # looked at once
        return figures

    def facts(self) -> dict[str, float]:
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)


def rows_of(tokens: Tensor, most: int) -> int:
    """In how many rows a text can be laid out, two words at least in each."""
    return min(most, len(tokens) // 2)


def _perplexity(mean: float) -> float:
    return math.exp(mean) if mean < 709 or math.isnan(mean) else math.inf


# What lm and speed have in common


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset, and what the options change in it."""
    preset = PRESETS[args.preset]
    return dataclasses.replace(
        preset,
        hidden_size=args.hidden_size or preset.hidden_size,
        epochs=args.epochs or (2 if args.quick else preset.epochs),
        projection_bias=args.projection_bias,
    )


def corpus_of(args: argparse.Namespace, preset: Preset) -> Corpus:
    """The text; a Refusal where it is too short for the rows of a batch."""
    options: dict[str, Any] = {"train_words": args.train_words, "vocabulary": args.vocabulary}
    if args.data is None:
        corpus = _corpus.generated(**options, words=6000 if args.quick else 60_000)
    else:
        corpus = _corpus.load(args.data, **options)
    least = 2 * preset.batch_size
    for name, part, words in (
        ("train", corpus.train, least),
        ("valid", corpus.valid, 2),
        ("test", corpus.test, 2),
    ):
        if len(part) < words:
            raise Refusal(f"--data: {name} must have at least {words} words, got {len(part)}")
    return corpus


def model_of(arm: str, corpus: Corpus, preset: Preset, device: torch.device, seed: int) -> TiedLanguageModel:
    """Drawn on the CPU, the same on every device: of one seed, what arms have in common begins alike.

    The tied matrix is alike in the two arms that have it, and has nothing of an untied model's two, to which
    it is compared.
    """
    model = TiedLanguageModel(
        len(corpus.words),
        preset.hidden_size,
        dropout=preset.dropout,
        init_range=preset.init_range,
        projection_bias=preset.projection_bias,
        **ARMS[arm],
    )
    names = {"embedding.weight": "tied", "embedding.bias": "output.bias"} if model.tie else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("lstm.bias"):
            generator = torch.Generator().manual_seed(crc32(f"{seed} {names.get(name, name)}".encode()))
            torch.nn.init.uniform_(parameter, -preset.init_range, preset.init_range, generator=generator)
    return model.to(device)


# The table


def main(args: argparse.Namespace) -> int:
    """Trains each arm from each seed, tests, compares the embeddings; returns the exit code."""
    device = _options.device_of(args)
    preset = preset_of(args)
    corpus = corpus_of(args, preset)
    seeds = _options.seeds_of(args, (0, 1, 2))
    arms: list[str] = args.arms
    config = {"task": "lm", "preset": args.preset, **dataclasses.asdict(preset)}
    with (
        threads(args.threads),
        deterministic(device),
        Run(
            "tied_embedding", args.out, config=config, data=corpus.facts(), resume=args.resume,
            packages=["scikit-learn", "scipy", "safetensors"], device=device, suffix="",
        ) as run,
    ):  # fmt: skip
        parts = [part.to(device) for part in (corpus.train, corpus.valid, corpus.test)]
        for seed, arm in product(seeds, arms):

            def begin(arm: str = arm, seed: int = seed) -> Training:
                model = model_of(arm, corpus, preset, device, seed)
                torch.manual_seed(seed)  # the same dropout in all arms of a seed
                return Training(model, parts, preset)

            run.row("test", arm, seed, begin, stretches=preset.epochs)
        rows = run.finished("test", seeds)
        found = _compared(run, rows)
        metrics = run.write(
            rows,
            seeds,
            parameters={row.arm: row.facts["parameters"] for row in rows},
            differences=differences(rows, QUESTIONS),
            order=_order(rows),
            correlations=found,
        )
    print(f"{_table(metrics)}\n\n{run.written(*(['correlations.png'] if found else []))}")
    return 0


def _compared(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """Of each pair of an untied arm and its tied one: how alike their embeddings are; correlations.png."""
    trained = {(row.arm, row.seed) for row in rows}
    compared: dict[tuple[str, int], _tied_correlations.Similarities] = {}
    for (untied, tied), seed in product(
        (("untied", "wt"), ("pr", "wt+pr")), sorted({row.seed for row in rows})
    ):
        if {(untied, seed), (tied, seed)} <= trained:
            models = (
                TiedLanguageModel.from_pretrained(run.model_path("test", arm, seed)) for arm in (untied, tied)
            )
            compared[f"{untied} and {tied}", seed] = _tied_correlations.similarities(*models)
    if not compared:
        return {}
    found = {key: _tied_correlations.correlations(lists) for key, lists in compared.items()}
    replace_file(
        run.out / "correlations.png", partial(_tied_correlations.draw, compared=compared, found=found)
    )
    return summary(Row("correlations", pair, seed, figures, [], 0) for (pair, seed), figures in found.items())


def _order(rows: Sequence[Row]) -> dict[str, Any]:
    """The arms of each seed that has all of them, from the highest test perplexity to the lowest."""
    found: dict[str, list[str]] = {}
    for seed in sorted({row.seed for row in rows}):
        of_seed = {row.arm: row.figures["test"] for row in rows if row.seed == seed}
        if of_seed.keys() == ARMS.keys():
            values = {arm: math.inf if value is None else value for arm, value in of_seed.items()}
            found[str(seed)] = sorted(ARMS, key=lambda arm, values=values: -values[arm])
    return {
        "asked": list(ARMS),
        "seeds": found,
        "as_asked": sum(order == list(ARMS) for order in found.values()),
    }


def _table(metrics: Mapping[str, Any]) -> str:
    figures, data = metrics["figures"], metrics["data"]
    lines = [
        f"{data['name']}: {data['train']:,} words to train on, {data['words']:,} different ones; perplexity",
        f"  {'':8}{'test':18}{'valid':18}{'train':18}parameters",
    ]
    for arm in (arm for arm in ARMS if arm in figures["test"]):
        cells = "".join(f"{_shown(figures[part][arm]):18}" for part in ("test", "valid", "train"))
        each = " ".join(
            "-" if value is None else f"{value:.2f}" for value in figures["test"][arm]["seeds"].values()
        )
        lines.append(f"  {arm:8}{cells}{metrics['parameters'][arm]:,}  (test: {each})")
    for question, of in metrics["differences"].items():
        lines.append(f"  {question}: {_shown(of['test'], '+', 'stderr')}")
    order = metrics["order"]
    if order["seeds"]:
        asked = " > ".join(order["asked"])
        lines.append(f"  the paper's order, {asked}: from {order['as_asked']} of {len(order['seeds'])} seeds")
    for pair in next(iter(metrics["correlations"].values()), {}):
        means = {name: of[pair]["mean"] for name, of in metrics["correlations"].items()}
        cells = ", ".join(f"{name} {'-' if mean is None else f'{mean:.3f}'}" for name, mean in means.items())
        lines.append(f"  {pair}, correlation of similarities: {cells}")
    return "\n".join(lines)


def _shown(figure: Mapping[str, Any], sign: str = "", of: str = "std") -> str:
    if figure["mean"] is None:
        return "-"
    return f"{figure['mean']:{sign}.2f} ± {'-' if figure[of] is None else format(figure[of], '.2f')}"
