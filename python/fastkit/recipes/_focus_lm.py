"""The task ``lm`` of ``run focus``: the next character of a text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit._threads import threads
from fastkit.recipes import _options, _text
from fastkit.recipes._experiment import Run
from fastkit.recipes._figures import differences, with_spread
from fastkit.recipes._focus_models import (
    POOL,
    ArmName,
    LanguageModel,
    matched,
    parameters,
    save_language_model,
)

ARMS: tuple[ArmName, ...] = ("focus", "constant", "transformer", "full")
RATES = (3e-3, 1e-3, 1e-2)
STRETCH = 50  # steps


class Training:
    """A model and what trains it: a stretch is STRETCH steps and the figure of ``held_out``."""

    def __init__(
        self, model: LanguageModel, train: Tensor, held_out: Tensor, *, lr: float, steps: int, batch: int
    ) -> None:
        self.model = model
        self.length: int = model.config["longest"]
        self.train = train
        self.held_out = held_out
        self.batch = batch
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(model.parameters(), lr)
        self.schedule: torch.optim.lr_scheduler.OneCycleLR = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps
        )
        self.parts: dict[str, Any] = {
            "model": model, "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip

    def advance(self) -> dict[str, float]:
        total = 0.0
        for _ in range(STRETCH):
            begins = torch.randint(max(1, len(self.train) - self.length), (self.batch, 1))
            rows = self.train[(begins + torch.arange(self.length + 1)).clamp(max=len(self.train) - 1)]
            loss = cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        bits = bits_per_character(self.model, self.held_out, self.length)
        return {"bpc": bits, "train_bpc": total / STRETCH / math.log(2)}

    def facts(self) -> dict[str, float]:
        return {"parameters": parameters(self.model)}

    def save(self, path: Path) -> None:
        save_language_model(path, self.model)


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor, length: int) -> float:
    """Of all characters but the first, each in a window of ``length`` that begins anew after the last one."""
    total = 0.0
    whole = (len(text) - 1) // length * length
    pieces = [(text[:whole].view(-1, length), text[1 : whole + 1].view(-1, length))] if whole else []
    if len(text) - 1 > whole:
        pieces.append((text[None, whole:-1], text[None, whole + 1 :]))
    for tokens, following in pieces:
        for some, after in zip(tokens.split(32), following.split(32), strict=True):
            total += cross_entropy(model(some).flatten(0, 1), after.flatten(), reduction="sum").item()
    return total / (len(text) - 1) / math.log(2)


def main(args: argparse.Namespace) -> int:
    """Chooses a learning rate for each arm, trains it from each seed, tests; returns the exit code."""
    text = _text.descriptions() if args.data is None else _text.load(args.data)
    length = args.length or (64 if args.quick else 512)
    seeds = _options.seeds_of(args, (0, 1, 2))
    arms = args.arms or ARMS
    chunk = args.chunk or 64
    sizes: dict[str, Any] = {
        "vocabulary": text.vocabulary,
        "longest": length,
        "hidden_size": args.hidden_size or 64,
        "layers": args.layers,
        "attn_chunk": args.attn_chunk or chunk,
        "bin_length": chunk,
        "kernel_length": args.kernel_length or length,
    }
    steps = -(-(args.steps or (STRETCH if args.quick else 1000)) // STRETCH) * STRETCH
    rates = RATES[:1] if args.quick else RATES
    config = {
        "task": "lm", "steps": steps, "batch": args.batch or 8, "rates": rates, "pool": POOL, **sizes,
    }  # fmt: skip
    models = {arm: matched(LanguageModel, {**sizes, "arm": arm}) for arm in arms}
    with (
        threads(args.threads),
        Run(
            "focus",
            args.out,
            config=config,
            data=text.facts(),
            resume=args.resume,
            packages=["scikit-learn", "transformers"],
            unit="step",
            stretch=STRETCH,
        ) as run,
    ):

        def bits(table: str, arm: ArmName, lr: float, seed: int) -> float:
            def begin() -> Training:
                model = LanguageModel(**models[arm])
                held_out = text.valid if table == "valid" else text.test
                return Training(model, text.train, held_out, lr=lr, steps=steps, batch=config["batch"])

            name = f"{arm},lr={lr:g}" if table == "valid" else arm
            row = run.row(table, name, seed, begin, stretches=steps // STRETCH, keeps_model=table == "test")
            found = row.figures["bpc"]
            return math.inf if found is None else found

        chosen: dict[str, float] = {}
        for arm in arms:
            chosen[arm] = min(rates, key=lambda lr, arm=arm: bits("valid", arm, lr, 0))
        for seed, arm in product(seeds, arms):
            bits("test", arm, chosen[arm], seed)
        rows = run.finished("test", seeds)
        questions = [("focus", other) for other in ARMS[1:]]
        metrics = run.write(
            rows,
            seeds,
            parameters={row.arm: row.facts["parameters"] for row in rows},
            chosen=chosen,
            differences=differences(rows, questions),
        )
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _table(metrics: Mapping[str, Any]) -> str:
    lines = [f"{metrics['data']['name']}: bits per character of the test part, after the last step"]
    for arm, figure in metrics["figures"]["bpc"].items():
        each = " ".join(f"{bpc:.3f}" for bpc in figure["seeds"].values())
        chosen = metrics["chosen"].get(arm)
        rate = "" if chosen is None else f"lr={chosen:g}; "
        lines.append(
            f"  {arm:13}{with_spread(figure, 'std')}  ({each})  {rate}{metrics['parameters'][arm]:,}"
        )
    for question, figures in metrics["differences"].items():
        lines.append(f"  {question}: {with_spread(figures['bpc'], 'stderr', '+')}")
    return "\n".join(lines)
