"""Which restart is taken, and whether it is right: both by what a few rounds of refinement make of it.

The cost of a restart ranks restarts, but its size says nothing: a wrong basin of one pair of tables may cost
less than the right one of another. The score after refinement, the mean cosine of words and their
translations, says something beside that of maps that are wrong: controls, which begin with their axes paired
in reverse, and other restarts that translate hardly any word alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fastkit.methods.word_translation.checkpoint import Stages
from fastkit.methods.word_translation.refinement import Maps, Refined, align, procrustes_csls
from fastkit.methods.word_translation.restarts import Restarts
from fastkit.methods.word_translation.settings import OP, Settings

MARGIN = 1.05  # of a score over that of what is wrong; measured: 1.13 to 1.19 where it is right, else 1.01
ALIKE = 0.05  # what translates less than this part of the words alike is in another basin
KEPT = 0.25  # what was refined is still the map that was tried if it translates this part alike


class Candidate(NamedTuple):
    """A restart, or a control, after its trial."""

    restart: int  # its number; controls follow the restarts
    control: bool
    cost: float
    mutual: int
    score: float
    agreement: float  # the part of the words that it translates as the best restart does


class Trials(NamedTuple):
    candidates: list[Candidate]
    best: int  # the restart
    score: float
    maps: Maps  # of the best one, after its trial
    nearest: Tensor  # (trial_words,) int64, its translations
    control_score: float  # nan if nothing is wrong
    converged: bool


def run_trials(x: Tensor, y: Tensor, restarts: Restarts, settings: Settings, stages: Stages) -> Trials:
    """A few rounds of each of the best restarts, one from a basin, and of the controls.

    The best restart is that of the greatest score. It has converged if that is at least 1.05 times the score
    of every control and every other candidate that translates other words, less than one in twenty alike.
    """
    count = len(restarts.cost)
    chosen = restarts.distinct(settings.candidates)
    trials: dict[int, Refined] = {}
    for i in [*chosen, *range(count - settings.controls, count)]:
        sources, targets = restarts.pairs(i)
        trials[i] = procrustes_csls(
            x, y, align(x[sources], y[targets]), words=settings.trial_words, rounds=settings.trial_rounds,
            settings=settings, stages=stages, name=f"trial-{i}", timed_as="trials",
        )  # fmt: skip
    best = max(chosen, key=lambda i: trials[i].score)  # the first of equal ones, which costs least
    candidates = [
        Candidate(
            restart=i,
            control=i not in chosen,
            cost=restarts.cost[i].item(),
            mutual=int(restarts.mutual[i]),
            score=trial.score,
            agreement=(trial.nearest == trials[best].nearest).double().mean().item(),
        )
        for i, trial in trials.items()
    ]
    wrong = [c.score for c in candidates if c.agreement < ALIKE]
    return Trials(
        candidates=candidates,
        best=best,
        score=trials[best].score,
        maps=trials[best].maps,
        nearest=trials[best].nearest,
        control_score=max(wrong, default=math.nan),
        converged=all(trials[best].score >= MARGIN * score for score in wrong),
    )


def advice(trials: Trials, agreement: float, count: int) -> str:
    """What to try where nothing has converged."""
    if trials.converged:
        return (
            f"{OP}: not converged: the best of {count} restarts scores {trials.score:.4f}, and what is wrong"
            f" {trials.control_score:.4f}, but ICP in all columns has left its map, and translates"
            f" {agreement:.1%} of the words alike; try more epochs, a smaller batch_size, or"
            ' transfer="procrustes" and refine="procrustes_csls"'
        )
    return (
        f"{OP}: not converged: the best of {count} restarts scores {trials.score:.4f}, and what is wrong"
        f" {trials.control_score:.4f}, more than 1 / 1.05 of it; try more restarts, another seed,"
        ' preprocess=("unit", "center", "unit"), or tables made of more similar texts'
    )
