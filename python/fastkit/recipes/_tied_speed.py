"""The task ``speed`` of ``run tied_embedding``: training by the loss without logits, and by a plain one."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastkit._threads import threads
from fastkit.methods.tied_embedding import LSTMState, TiedLanguageModel, bptt_batches
from fastkit.methods.tied_embedding.presets import Preset
from fastkit.nn import TiedEmbedding
from fastkit.recipes import _options, _tied_lm
from fastkit.recipes._corpus import Corpus
from fastkit.recipes._experiment import Run, deterministic
from fastkit.recipes._figures import Row

ARMS = tuple(_tied_lm.ARMS)
STEPS = 10  # of a round, for each of the two


class Loss(Protocol):
    def __call__(
        self, model: TiedLanguageModel, ids: Tensor, target: Tensor, state: LSTMState | None, /
    ) -> tuple[Tensor, LSTMState]: ...


def fastkit_loss(
    model: TiedLanguageModel, ids: Tensor, target: Tensor, state: LSTMState | None
) -> tuple[Tensor, LSTMState]:
    return model.loss(ids, target, state, reduction="sum")


def plain_loss(
    model: TiedLanguageModel, ids: Tensor, target: Tensor, state: LSTMState | None
) -> tuple[Tensor, LSTMState]:
    """By ``linear`` and ``cross_entropy`` of torch, with the logits in memory."""
    h, last = model(ids, state)
    z = model.logits(h)
    return cross_entropy(z.flatten(0, -2), target.flatten(), reduction="sum"), last.detach()


LOSSES: Mapping[str, Loss] = {"fastkit": fastkit_loss, "plain": plain_loss}


class Contestant:
    """A model that is trained by one of the losses, as in the task lm."""

    def __init__(self, model: TiedLanguageModel, loss: Loss, train: Tensor, preset: Preset) -> None:
        self.model = model.train()
        self.loss = loss
        self.train = train
        self.preset = preset
        self.optimizer: torch.optim.SGD = torch.optim.SGD(model.parameters(), preset.lr)
        self.pieces = cycle(list(bptt_batches(train, preset.batch_size, preset.steps)))
        self.state: LSTMState | None = None

    @torch.no_grad()
    def first_loss(self) -> float:
        """Of the text's first piece, before any training."""
        ids, target = next(bptt_batches(self.train, self.preset.batch_size, self.preset.steps))
        return self.loss(self.model, ids, target, None)[0].item()

    def round(self) -> float:
        """Words a second, of STEPS steps."""
        rows = self.preset.batch_size
        pieces = list(islice(self.pieces, STEPS))
        _wait(self.train.device)
        start = time.perf_counter()
        for ids, target in pieces:
            loss, self.state = self.loss(self.model, ids, target, self.state)
            self.optimizer.zero_grad()
            (loss / rows + self.model.penalty(rows)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.preset.clip)
            self.optimizer.step()
        _wait(self.train.device)
        return sum(target.numel() for _, target in pieces) / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contestants(
    arm: str, corpus: Corpus, preset: Preset, device: torch.device, seed: int
) -> dict[str, Contestant]:
    """Two models of the same values, one for each loss; in the plain one autograd adds a tied gradient up."""
    found: dict[str, Contestant] = {}
    for name, loss in LOSSES.items():
        model = _tied_lm.model_of(arm, corpus, preset, device, seed)
        if name == "plain" and isinstance(model.embedding, TiedEmbedding):
            model.embedding.fused_accumulate = False
        found[name] = Contestant(model, loss, corpus.train.to(device), preset)
    return found


def main(args: argparse.Namespace) -> int:
    """Trains each arm by both losses in turns, and prints words a second; returns the exit code."""
    device = _options.device_of(args)
    preset = _tied_lm.preset_of(args)
    corpus = _tied_lm.corpus_of(args, preset)
    seeds = _options.seeds_of(args, (0,))
    rounds = args.rounds or (3 if args.quick else 20)
    config = {"task": "speed", "rounds": rounds, "preset": args.preset, **dataclasses.asdict(preset)}
    with (
        threads(args.threads),
        deterministic(device),
        Run(
            "tied_embedding", args.out, config=config, data=corpus.facts(), resume=args.resume, device=device,
            unit="round",
        ) as run,
    ):  # fmt: skip
        for seed in seeds:
            for arm in args.arms:
                if ("speed", arm, seed) not in run.rows:
                    run.append(_row(arm, seed, contestants(arm, corpus, preset, device, seed), rounds))
        rows = run.finished("speed", seeds)
        metrics = run.write(rows, seeds)
    print(f"{_table(metrics)}\n\n{run.written()}")
    return 0


def _row(arm: str, seed: int, both: Mapping[str, Contestant], rounds: int) -> Row:
    from tqdm import tqdm

    start = time.perf_counter()
    first = {name: of.first_loss() for name, of in both.items()}
    curve: list[dict[str, float]] = []
    for number in tqdm(range(rounds + 1), desc=f"speed: {arm}, seed {seed}", disable=None, leave=False):
        turns = list(both) if number % 2 else list(both)[::-1]
        speeds = {name: both[name].round() for name in turns}
        if number:  # the first is not counted
            curve.append({name: speeds[name] for name in both})
    figures = {name: statistics.median(point[name] for point in curve) for name in both}
    low, middle, high = _quartiles([point["fastkit"] / point["plain"] for point in curve])
    figures |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    figures["apart"] = abs(first["fastkit"] / first["plain"] - 1)
    return Row("speed", arm, seed, {**figures}, [{**point} for point in curve], time.perf_counter() - start)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _table(metrics: Mapping[str, Any]) -> str:
    figures, data = metrics["figures"], metrics["data"]
    lines = [
        f"{data['name']}, {data['words']:,} different words: words a second of training, median of"
        f" {metrics['config']['rounds']} rounds in turns",
        f"  {'':8}{'fastkit':>10}{'plain':>10}   ratio (quartiles)",
    ]
    for arm in figures["ratio"]:
        mean = {name: of[arm]["mean"] for name, of in figures.items()}
        lines.append(
            f"  {arm:8}{mean['fastkit']:10,.0f}{mean['plain']:10,.0f}   {mean['ratio']:.2f}"
            f" ({mean['ratio_low']:.2f} to {mean['ratio_high']:.2f}); first losses apart by"
            f" {mean['apart']:.0e}"
        )
    return "\n".join(lines)
