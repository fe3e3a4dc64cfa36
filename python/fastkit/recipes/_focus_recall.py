"""The task ``recall`` of ``run focus``: the value that stood beside a key, many tokens ago."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastkit._command import Refusal
from fastkit._sync import replace_file
from fastkit._threads import threads
from fastkit.recipes import _focus_responses, _options
from fastkit.recipes._experiment import Run
from fastkit.recipes._figures import Row, with_spread
from fastkit.recipes._focus_models import (
    POOL,
    ArmName,
    LanguageModel,
    load_language_model,
    matched,
    parameters,
    save_language_model,
)

ARMS: tuple[ArmName, ...] = ("focus", "constant", "transformer", "full")
KEYS = 15  # and as many values: a vocabulary of 30
BINS, CHUNKS = 4, 32  # of a string
TRAIN, TEST = 2000, 1000  # strings
WARM_UP = 10  # epochs


class Strings(NamedTuple):
    """Pairs of a key and its value, at the end a key alone, which stood before: its value is to be told."""

    tokens: Tensor  # (N, L - 1)
    values: Tensor  # (N,): tokens
    distance: Tensor  # (N,): tokens from the end back to where that key stands last


def strings(count: int, length: int, generator: torch.Generator) -> Strings:
    """Each of ``length / 2`` pairs, with a random map of keys to values of its own.

    All keys are uniform and independent, but the last, which is that of a pair drawn from those before.
    """
    keys = torch.randint(KEYS, (count, length // 2), generator=generator)
    drawn = torch.randint(length // 2 - 1, (count, 1), generator=generator)
    keys[:, -1:] = keys.gather(1, drawn)
    return _of_keys(keys, generator)


def probes(count: int, length: int, places: range, generator: torch.Generator) -> Strings:
    """Strings whose last key stands once before: in a pair that begins at one of these tokens."""
    asked = torch.randint(KEYS, (count, 1), generator=generator)
    others = 1 + torch.randint(KEYS - 1, (count, length // 2 - 1), generator=generator)
    keys = torch.cat([(asked + others) % KEYS, asked], 1)
    pairs = torch.tensor([place // 2 for place in places if place % 2 == 0 and place < length - 2])
    where = pairs[torch.randint(len(pairs), (count, 1), generator=generator)]
    return _of_keys(keys.scatter(1, where, asked), generator)


def _of_keys(keys: Tensor, generator: torch.Generator) -> Strings:
    values = KEYS + torch.randint(KEYS, (len(keys), KEYS), generator=generator)
    tokens = torch.stack([keys, values.gather(1, keys)], 2).flatten(1)
    pairs_ago = 1 + (keys[:, :-1] == keys[:, -1:]).flip(1).int().argmax(1)
    return Strings(tokens[:, :-1].contiguous(), tokens[:, -1].contiguous(), 2 * pairs_ago)


# Training


class Data(NamedTuple):
    train: Strings | None  # None: fresh ones for each epoch
    test: Strings
    length: int
    nearby: int  # the largest distance of a key that is, or whose value is, in the last token's chunk


class Training:
    """A model and what trains it: an epoch is a pass over TRAIN strings and figures on those to test with."""

    def __init__(self, model: LanguageModel, data: Data, *, lr: float, batch: int) -> None:
        self.model = model
        self.data = data
        self.batch = batch
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98))
        warm_up = WARM_UP * (TRAIN // batch)
        self.schedule: torch.optim.lr_scheduler.LambdaLR = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warm_up)
        )
        self.parts: dict[str, Any] = {
            "model": model, "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip

    def advance(self) -> dict[str, float]:
        train = self.data.train or strings(TRAIN, self.data.length, torch.default_generator)
        order = torch.randperm(TRAIN)
        batches = order.split(self.batch)[: TRAIN // self.batch]
        total = 0.0
        for chosen in batches:
            logits = self.model(train.tokens[chosen], last=1)[:, 0]
            loss = cross_entropy(logits, train.values[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        return {**self.figures(), "train_loss": total / len(batches)}

    def figures(self) -> dict[str, float]:
        test = self.data.test
        logits = predict(self.model, test.tokens)
        hits = (logits.argmax(-1) == test.values).double()
        return {
            "accuracy": hits.mean().item(),
            "accuracy_beyond": hits[test.distance > self.data.nearby].mean().item(),
            "loss": cross_entropy(logits, test.values).item(),
        }

    def facts(self) -> dict[str, float]:
        return {"parameters": parameters(self.model)}

    def save(self, path: Path) -> None:
        save_language_model(path, self.model)


@torch.no_grad()
def predict(model: nn.Module, tokens: Tensor) -> Tensor:  # (N, L - 1) -> (N, vocabulary)
    return torch.cat([model(piece, last=1)[:, 0] for piece in tokens.split(250)])


# The table


def main(args: argparse.Namespace) -> int:
    """Trains each arm from each seed, tests, draws a Focus model's filters; returns the exit code."""
    length = args.length or (64 if args.quick else 256)
    least = POOL * BINS
    if length % least:
        raise Refusal(
            f"--length must be a multiple of {least}, got {length}; take {length + -length % least}"
        )
    if args.data is not None:
        raise Refusal("--data must be left out with --task recall, which makes strings of its own")
    batch = args.batch or 32
    if batch > TRAIN:
        raise Refusal(f"--batch must be at most {TRAIN}, the strings to train on, got {batch}")
    seeds = _options.seeds_of(args, (0, 1, 2))
    arms = args.arms or ARMS
    epochs = args.epochs or (2 if args.quick else 100)
    sizes = {
        "vocabulary": 2 * KEYS,
        "longest": length,
        "hidden_size": args.hidden_size or 64,
        "layers": args.layers,
        "attn_chunk": args.attn_chunk or length // CHUNKS,
        "bin_length": args.chunk or length // BINS,
        "kernel_length": args.kernel_length or length,
    }
    config = {
        "task": "recall", "epochs": epochs, "batch": batch, "lr": args.lr, "strings": args.strings,
        "train": TRAIN, "test": TEST, "pool": POOL, **sizes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    train, test = (strings(count, length, generator) for count in (TRAIN, TEST))
    nearby = (length - 2) % sizes["attn_chunk"] + 1  # of a key whose value is there, if it is not itself
    models = {arm: matched(LanguageModel, {**sizes, "arm": arm}) for arm in arms}
    data = Data(None if args.strings == "fresh" else train, test, length, nearby)
    facts = {"name": "recall", "nearby": (test.distance <= nearby).double().mean().item()}
    with (
        threads(args.threads),
        Run(
            "focus", args.out, config=config, data=facts, resume=args.resume, packages=["transformers"]
        ) as run,
    ):
        for seed, arm in product(seeds, arms):

            def begin(arm: ArmName = arm) -> Training:
                return Training(LanguageModel(**models[arm]), data, lr=args.lr, batch=batch)

            run.row("recall", arm, seed, begin, stretches=epochs)
        rows = run.finished("recall", seeds)
        gains = _draw(run, rows, config)
        counts = {row.arm: row.facts["parameters"] for row in rows}
        metrics = run.write(rows, seeds, parameters=counts, peak_gains=gains)
    drawn = ("responses.png",) if gains else ()
    print(f"{_table(metrics)}\n\n{run.written(*drawn)}")
    return 0


_PROBES = 64  # for each bin that the key is in


def _draw(run: Run, rows: Sequence[Row], config: Mapping[str, Any]) -> list[list[list[float]]]:
    """responses.png of the first Focus model, if there is one; what it shows on the right, in numbers."""
    length, size = config["longest"], config["bin_length"]
    bins = range(-(-(length - 1) // size) - 1)  # the last sets the filter of no other
    seeds = [row.seed for row in rows if row.arm == "focus"]
    if not seeds or not bins:
        return []
    model = load_language_model(run.model_path("recall", "focus", seeds[0]))
    generator = torch.Generator().manual_seed(1)
    tokens = [
        probes(_PROBES, length, range(size * place, size * (place + 1)), generator).tokens for place in bins
    ]
    gains = [_focus_responses.peak_gains(model.body, piece) for piece in tokens]
    replace_file(
        run.out / "responses.png",
        lambda path: _focus_responses.draw(path, model.body, [piece[:1] for piece in tokens], gains),
    )
    return gains


def _table(metrics: Mapping[str, Any]) -> str:
    figures, data = metrics["figures"], metrics["data"]
    lines = [
        f"recall of strings of {metrics['config']['longest']} tokens; the pair is in the last chunk in"
        f" {data['nearby']:.3f} of them",
        f"  {'':13}{'accuracy':17}{'beyond the chunk':19}parameters",
    ]
    for arm in figures["accuracy"]:
        cells = (with_spread(figures[name][arm], "std") for name in ("accuracy", "accuracy_beyond"))
        lines.append(f"  {arm:13}{'  '.join(cells)}  {metrics['parameters'][arm]:,}")
    return "\n".join(lines)
