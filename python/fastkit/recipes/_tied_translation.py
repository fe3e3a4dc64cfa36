"""The task ``translation`` of ``run tied_embedding``: an encoder and a decoder with one vocabulary."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastkit._command import Refusal, require
from fastkit._threads import threads
from fastkit.recipes import _options, _parallel, _tokens
from fastkit.recipes._experiment import Run
from fastkit.recipes._figures import differences, with_spread
from fastkit.recipes._glue import Array
from fastkit.recipes._tied_translator import (
    ARMS,
    BEGIN,
    END,
    IGNORED,
    PAD,
    Translator,
    joint_tokenizer,
    padded,
    parameters,
    save_translator,
)

STRETCH = 100  # steps
LONGEST = 64  # pieces of a sentence
TOKENS = 1024  # of a batch, of the longer side, padding included
RATES = (1e-3, 3e-3, 1e-2)  # of which each arm has the best on the valid part
QUESTIONS = (("decoder", "untied"), ("three_way", "untied"), ("three_way", "decoder"))


class Part(NamedTuple):
    """Sentences as pieces, without those that are too long."""

    source: list[list[int]]
    target: list[list[int]]
    texts: list[str]  # of the target
    lengths: Array  # of the longer side

    def batch(self, chosen: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target, and what follows each piece of the target."""
        targets = [self.target[i] for i in chosen]
        return (
            padded((self.source[i] for i in chosen), PAD),
            padded(([BEGIN, *row] for row in targets), PAD),
            padded(([*row, END] for row in targets), IGNORED),
        )


class Data:
    """A corpus as pieces, made once for all rows."""

    def __init__(self, corpus: _parallel.Parallel, pieces: int) -> None:
        self.tokenizer = joint_tokenizer(corpus.train, pieces)
        self.train, self.valid, self.test = (
            self._part(pairs) for pairs in (corpus.train, corpus.valid, corpus.test)
        )
        for name, part in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            if not part.source:
                raise Refusal(
                    f"--data: {name} must have sentences of at most {LONGEST - 1} pieces, got none; give more"
                    " --pieces"
                )

    def _part(self, pairs: _parallel.Pairs) -> Part:
        sides = [
            [row.ids for row in self.tokenizer.encode_batch(list(side))] for side in zip(*pairs, strict=True)
        ]
        kept = [i for i, row in enumerate(zip(*sides, strict=True)) if max(map(len, row)) < LONGEST]
        source, target = ([side[i] for i in kept] for side in sides)
        texts = [self.tokenizer.decode(row) for row in target]
        lengths = np.array([1 + max(len(one), len(other)) for one, other in zip(source, target, strict=True)])
        return Part(source, target, texts, lengths)

    def facts(self) -> dict[str, Any]:
        """How many pieces the two languages have in common, and how many pairs are short enough."""
        source, target = (
            {piece for row in side for piece in row} for side in (self.train.source, self.train.target)
        )
        return {
            "pieces": {
                "all": self.tokenizer.get_vocab_size(), "source alone": len(source - target),
                "target alone": len(target - source), "both": len(source & target),
            },
            "kept": [len(part.source) for part in (self.train, self.valid, self.test)],
        }  # fmt: skip


class Training:
    """A model and what trains it: a stretch is STRETCH steps and figures on the valid part.

    ``tests``: whether the last one has those of the test part too.
    """

    def __init__(
        self, model: Translator, data: Data, *, lr: float, steps: int, seed: int, tests: bool = True
    ) -> None:
        self.model = model
        self.data = data
        self.steps = steps
        self.tests = tests
        self.batches: list[Array] = _tokens.plan(data.train.lengths, TOKENS, steps, seed)
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98))
        self.schedule: torch.optim.lr_scheduler.OneCycleLR = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        self.parts: dict[str, Any] = {
            "model": model, "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip
        torch.manual_seed(seed)  # the same dropout in all arms of a seed

    def advance(self) -> dict[str, float]:
        self.model.train()
        total, begin = 0.0, self.schedule.last_epoch
        for chosen in self.batches[begin : begin + STRETCH]:
            loss = self.model.loss(*self.data.train.batch(chosen))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        figures = {"train_loss": total / STRETCH}
        figures |= {f"valid_{name}": value for name, value in judged(self.model, self.data.valid).items()}
        if self.tests and self.schedule.last_epoch == self.steps:
            test = self.data.test
            figures |= {f"test_{name}": value for name, value in judged(self.model, test).items()}
            figures["test_exact"] = exact(self.model, test, self.data.tokenizer)
        return figures

    def facts(self) -> dict[str, float]:
        return {"parameters": parameters(self.model)}

    def save(self, path: Path) -> None:
        save_translator(path, self.model, self.data.tokenizer)


def _batches(part: Part) -> list[Array]:
    return _tokens.cut(np.arange(len(part.lengths)), part.lengths, 2 * TOKENS)


@torch.no_grad()
def judged(model: Translator, part: Part) -> dict[str, float]:
    """The loss of a piece, and the share of pieces that are the likeliest, after the right ones before."""
    model.eval()
    total = right = count = 0.0
    for chosen in _batches(part):
        source, target, following = part.batch(chosen)
        z = model.scores(model(source, target)).double()
        total += nn.functional.cross_entropy(
            z.flatten(0, 1), following.flatten(), reduction="sum", ignore_index=IGNORED
        ).item()
        right += int((z.argmax(-1) == following).sum())
        count += int((following != IGNORED).sum())
    return {"loss": total / count, "accuracy": right / count}


def exact(model: Translator, part: Part, tokenizer: Any) -> float:
    """The share of sentences that are translated to the very text."""
    model.eval()
    right = 0
    for chosen in _batches(part):
        found = model.translate(part.batch(chosen)[0]).tolist()
        texts = tokenizer.decode_batch(found)  # which leaves special pieces out
        right += sum(text == part.texts[i] for text, i in zip(texts, chosen, strict=True))
    return right / len(part.texts)


# The table


def main(args: argparse.Namespace) -> int:
    """Chooses a learning rate for each arm, trains it from each seed, tests; returns the exit code."""
    require(tokenizers="tokenizers")
    if args.device != "cpu":
        raise Refusal(f"--device must be cpu with --task translation, got {args.device}; leave it out")
    corpus = (
        _parallel.generated(**({"sentences": 1000} if args.quick else {}))
        if args.data is None
        else _parallel.load(args.data)
    )
    data = Data(corpus, args.pieces)
    seeds = _options.seeds_of(args, (0, 1, 2))
    arms: list[str] = args.arms
    steps = -(-(args.steps or (STRETCH if args.quick else 2000)) // STRETCH) * STRETCH
    sizes = {
        "vocabulary": data.tokenizer.get_vocab_size(), "hidden_size": args.hidden_size or 128,
        "layers": args.layers, "longest": LONGEST,
    }  # fmt: skip
    if sizes["hidden_size"] % 4:
        raise Refusal(
            f"--hidden-size must be a multiple of 4 with --task translation, got {sizes['hidden_size']}"
        )
    rates = RATES[:1] if args.quick else RATES
    config = {"task": "translation", "steps": steps, "rates": rates, "tokens": TOKENS, **sizes}
    with (
        threads(args.threads),
        Run(
            "tied_embedding", args.out, config=config, data={**corpus.facts(), **data.facts()},
            resume=args.resume, packages=["tokenizers"], unit="step", stretch=STRETCH, suffix="",
        ) as run,
    ):  # fmt: skip

        def valid_loss(table: str, arm: str, lr: float, seed: int) -> float:
            tests = table == "test"

            def begin() -> Training:
                model = Translator(arm=arm, **sizes)
                return Training(model, data, lr=lr, steps=steps, seed=seed, tests=tests)

            name = arm if tests else f"{arm},lr={lr:g}"
            row = run.row(table, name, seed, begin, stretches=steps // STRETCH, keeps_model=tests)
            found = row.figures["valid_loss"]
            return math.inf if found is None else found

        chosen: dict[str, float] = {}
        for arm in arms:
            chosen[arm] = min(rates, key=lambda lr, arm=arm: valid_loss("valid", arm, lr, 0))
        for seed, arm in product(seeds, arms):
            valid_loss("test", arm, chosen[arm], seed)
        rows = run.finished("test", seeds)
        metrics = run.write(
            rows,
            seeds,
            parameters={row.arm: row.facts["parameters"] for row in rows},
            chosen=chosen,
            differences=differences(rows, QUESTIONS),
        )
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _table(metrics: Mapping[str, Any]) -> str:
    figures, pieces = metrics["figures"], metrics["data"]["pieces"]
    lines = [
        f"{metrics['data']['name']}: {pieces['all']} pieces, {pieces['both']} of which are in both languages;"
        " test part",
        f"  {'':11}{'loss of a piece':19}{'right pieces':19}{'right sentences':19}parameters, rate",
    ]
    for arm in (arm for arm in ARMS if arm in figures["test_loss"]):
        cells = "".join(
            f"{with_spread(figures[name][arm], 'std'):19}"
            for name in ("test_loss", "test_accuracy", "test_exact")
        )
        rate = metrics["chosen"].get(arm)
        lines.append(
            f"  {arm:11}{cells}{metrics['parameters'][arm]:,}{'' if rate is None else f', {rate:g}'}"
        )
    for question, of in metrics["differences"].items():
        lines.append(f"  {question}: loss {with_spread(of['test_loss'], 'stderr', '+')}")
    return "\n".join(lines)
