"""The maps of two tables, from the first stage to the last: what a fit is, but for retrieval."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkit.methods.word_translation.checkpoint import Stages
from fastkit.methods.word_translation.refinement import Maps, align, icp, induced, procrustes_csls
from fastkit.methods.word_translation.restarts import Restarts, run_restarts
from fastkit.methods.word_translation.settings import Settings, Step
from fastkit.methods.word_translation.tables import preprocessed
from fastkit.methods.word_translation.trials import Trials, run_trials

_TRIED: tuple[Step, ...] = ("unit", "center", "unit")


class Alignment(NamedTuple):
    maps: Maps
    score: float  # the mean cosine of the most frequent sources and their translations
    restarts: Restarts | None  # None: supervised
    trials: Trials | None
    agreement: float  # the part of the trial's words that the maps translate as the best trial did


def align_tables(
    x: Tensor,  # (n, D) as it was given
    y: Tensor,  # (m, E)
    own_x: Tensor,  # (n, D) preprocessed
    own_y: Tensor,  # (m, E)
    known: Tensor | None,  # (P, 2)
    settings: Settings,
    stages: Stages,
) -> Alignment:
    """Restarts on the tables as they are, all else on the preprocessed ones; or the pairs that are known."""
    if known is not None:
        with stages.timed("pairs"):
            maps = align(own_x[known[:, 0]], own_y[known[:, 1]])
        return Alignment(*_refined(own_x, own_y, maps, settings, stages), None, None, 1.0)
    restarts = run_restarts(x, y, settings, stages)
    tried = own_x, own_y
    if settings.transfer == "icp":  # which takes pairs alone from the trials: scores of other tables say less
        with stages.timed("trials"):
            tried = preprocessed("X", x, _TRIED)[0], preprocessed("Y", y, _TRIED)[0]
    trials = run_trials(*tried, restarts, settings, stages)
    maps = trials.maps
    if settings.transfer == "icp":
        one = torch.eye(x.shape[1], device=x.device)
        maps = icp(
            own_x, own_y, Maps(one, one), words=settings.transfer_words, epochs=settings.transfer_epochs,
            pairs=(restarts.nearest_target[trials.best], restarts.nearest_source[trials.best]),
            settings=settings, stages=stages, name="transfer",
        )  # fmt: skip
    maps, score = _refined(own_x, own_y, maps, settings, stages)
    with stages.timed("trials"):
        nearest = induced(own_x, own_y, maps.w_xy, settings.trial_words, settings, "s2t").nearest
        agreement = (nearest == trials.nearest).double().mean().item()
    return Alignment(maps, score, restarts, trials, agreement)


def _refined(x: Tensor, y: Tensor, maps: Maps, settings: Settings, stages: Stages) -> tuple[Maps, float]:
    words = settings.refine_words
    if settings.refine == "procrustes_csls":
        refined = procrustes_csls(
            x,
            y,
            maps,
            words=words,
            rounds=settings.refine_rounds,
            settings=settings,
            stages=stages,
            name="refine",
        )
        return refined.maps, refined.score
    if settings.refine == "reciprocal_icp":
        maps = icp(
            x, y, maps, words=words, epochs=settings.refine_epochs, mutual_only=True, settings=settings,
            stages=stages, name="refine",
        )  # fmt: skip
    with stages.timed("refine"):
        if settings.refine == "procrustes":
            found = induced(x, y, maps.w_xy, words, settings, "mutual")
            maps = align(x[found.sources], y[found.targets])
        return maps, induced(x, y, maps.w_xy, words, settings, "s2t").score
