"""The first stage: many restarts of cycle ICP between principal scores, most of them given up on the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkit import ops
from fastkit._threads import threads
from fastkit.methods.word_translation.checkpoint import Stages, State
from fastkit.methods.word_translation.settings import OP, Settings

SAME = 0.5  # two restarts that pair so large a part of the words alike are in one basin
_CONSTANT = 1e-6  # a row whose deviation is less than this part of its largest entry


class Restarts(NamedTuple):
    """What the first stage leaves, of R restarts and then of the controls."""

    cost: Tensor  # (R + C,) of the last epoch of each
    mutual: Tensor  # (R + C,) int64
    epochs: Tensor  # (R + C,) int64: after so many it was dropped, or the stage ended
    seeds: Tensor  # (R + C,) int64
    nearest_target: Tensor  # (R + C, n) int64, of the last epoch of each
    nearest_source: Tensor  # (R + C, m) int64
    ranking: list[int]  # the restarts that were not dropped, least cost first

    def distinct(self, count: int) -> list[int]:
        """The first of the ranking that are in basins of their own."""
        chosen: list[int] = []
        for i in self.ranking:
            if len(chosen) < count and all(self.agreement(i, j) < SAME for j in chosen):
                chosen.append(i)
        return chosen

    def agreement(self, i: int, j: int) -> float:
        """The part of the source words that two restarts pair alike."""
        return (self.nearest_target[i] == self.nearest_target[j]).double().mean().item()

    def pairs(self, i: int) -> tuple[Tensor, Tensor]:  # (P,), (P,) rows of source and target
        """Those that are each other's nearest; of a restart without any, each with its nearest."""
        there, back = self.nearest_target[i], self.nearest_source[i]
        rows = torch.arange(len(there), device=there.device)
        mutual = rows[(there >= 0) & (back[there.clamp_min(0)] == rows)]
        if len(mutual):
            return mutual, there[mutual]
        rows = rows[there >= 0]
        return rows, there[rows]


def run_restarts(source: Tensor, target: Tensor, settings: Settings, stages: Stages) -> Restarts:
    """``settings.restarts`` restarts between the most frequent words of two tables, as they were given.

    Restart 0 takes the axes as their skewness orients them; each other one begins with random signs. Controls
    pair the first principal axis with the last, the second with the last but one, and so on, so that they end
    in wrong basins; they are never dropped, and never chosen.
    """
    restarts, controls, k = settings.restarts, settings.controls, settings.components
    count = restarts + controls
    x = principal_scores("X", source[: settings.words], k)
    y = principal_scores("Y", target[: settings.words], k)
    keys = [(r,) for r in range(restarts)] + [(c, 1) for c in range(controls)]
    drawn = [draw(settings.seed, key, k) for key in keys]
    seeds = torch.tensor([seed for seed, _ in drawn], device=x.device)

    def begin() -> State:
        signs = torch.tensor([signs for _, signs in drawn], dtype=x.dtype)
        signs[0] = 1.0
        maps = signs.diag_embed()
        maps[restarts:] = maps[restarts:].flip(2)
        maps = maps.to(x.device)
        return {
            "w_xy": maps, "w_yx": maps.mT.contiguous(), "alive": torch.arange(count, device=x.device),
            "cost": x.new_zeros(count), "mutual": seeds.new_zeros(count), "epochs": seeds.new_zeros(count),
            # Rows of tables are below 2^31, and these are most of what is written.
            "nearest_target": torch.zeros(count, len(x), dtype=torch.int32, device=x.device),
            "nearest_source": torch.zeros(count, len(y), dtype=torch.int32, device=x.device),
        }  # fmt: skip

    def advance(state: State) -> bool:
        alive, epoch = state["alive"], state["step"]
        result = ops.icp_epoch(
            x,
            y,
            state["w_xy"],
            state["w_yx"],
            seeds[alive],
            epoch=epoch,
            batch_size=settings.batch_size,
            lr=settings.lr,
            betas=settings.betas,  # pyright: ignore[reportArgumentType]
            eps=settings.eps,
            cycle_weight=settings.cycle_weight,
        )
        state["w_xy"], state["w_yx"] = result.w_xy, result.w_yx
        state["epochs"][alive] = epoch + 1
        for name in ("cost", "mutual", "nearest_target", "nearest_source"):
            state[name][alive] = getattr(result, name).to(state[name].dtype)
        if epoch in settings.halvings and epoch + 1 < settings.epochs:
            is_restart = alive < restarts
            ranked = result.cost[is_restart].argsort(stable=True)
            keep = max(-(-len(ranked) // 2), min(settings.candidates, len(ranked)))
            kept = torch.cat([ranked[:keep].sort().values, (~is_restart).nonzero().flatten()])
            state["alive"] = alive[kept]
            state["w_xy"], state["w_yx"] = result.w_xy[kept], result.w_yx[kept]
        return True

    state = stages.run("restarts", begin, advance, settings.epochs)
    alive, cost = state["alive"], state["cost"]
    alive = alive[(alive < restarts) & cost[alive].isfinite()]
    if not len(alive):
        raise ValueError(
            f"{OP}: no restart has a finite cost after {settings.epochs} epochs; lower lr, got {settings.lr}"
        )
    return Restarts(
        cost=cost,
        mutual=state["mutual"],
        epochs=state["epochs"],
        seeds=seeds,
        nearest_target=state["nearest_target"].long(),
        nearest_source=state["nearest_source"].long(),
        ranking=alive[cost[alive].argsort(stable=True)].tolist(),
    )


def principal_scores(name: str, table: Tensor, k: int) -> Tensor:  # (n, D) -> (n, k)
    """Scores on the k leading axes of standardised rows, over the deviation of them all; in float64::

    x~_i = (x_i - mean(x_i)) / std(x_i)       over the columns of a row
    V = the k leading eigenvectors of sum x~_i x~_i^T
    scores = x~ V / s,                        s the deviation of all n k numbers; sum scores^3 >= 0 by axis
    """
    with threads(1):  # sums of several threads are cut by their number
        return _principal_scores(name, table.double(), k)


def _principal_scores(name: str, rows: Tensor, k: int) -> Tensor:
    deviation = rows.std(1, keepdim=True, unbiased=False)
    constant = (deviation <= _CONSTANT * rows.abs().amax(1, keepdim=True)).flatten()
    if constant.any():
        first = constant.nonzero().flatten()[:5].tolist()
        raise ValueError(
            f"{OP}: {name} must have rows that are not constant, got one number in all columns of rows"
            f" {', '.join(map(str, first))}; drop them"
        )
    rows = (rows - rows.mean(1, keepdim=True)) / deviation
    _, axes = torch.linalg.eigh(rows.mT @ rows)
    scores = rows @ axes[:, -k:].flip(1)
    scores = scores * torch.where(scores.pow(3).sum(0) < 0, -1.0, 1.0)
    return (scores / scores.std(unbiased=False)).float().contiguous()


def draw(seed: int, key: tuple[int, ...], signs: int = 0) -> tuple[int, list[int]]:
    """A seed below 2^63 and signs, of the fit's seed and a key: what there is besides has no part in it."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    words = [int(word) for word in sequence.generate_state(1 + -(-signs // 64), np.uint64)]
    bits = [words[1 + i // 64] >> (i % 64) & 1 for i in range(signs)]
    return words[0] >> 1, [1 - 2 * bit for bit in bits]
