"""From pairs of words to maps between whole tables: Procrustes, rounds of CSLS, ICP in all columns."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastkit import ops
from fastkit._threads import threads
from fastkit.methods.word_translation.checkpoint import Stages, State
from fastkit.methods.word_translation.restarts import draw
from fastkit.methods.word_translation.settings import OP, Settings
from fastkit.methods.word_translation.tables import row_sums, unit


class Maps(NamedTuple):
    w_xy: Tensor  # (E, D)
    w_yx: Tensor  # (D, E)


def align(source: Tensor, target: Tensor) -> Maps:  # (P, D), (P, E)
    """The orthogonal map of paired rows, and its transpose."""
    with threads(1), warnings.catch_warnings():
        # Of few pairs, or of wrong ones, the map is not unique: any of them will do to go on from.
        warnings.filterwarnings("ignore", "procrustes:", RuntimeWarning)
        w = ops.procrustes(source, target)
    return Maps(w, w.mT.contiguous())


class Found(NamedTuple):
    """A dictionary that a map induces."""

    sources: Tensor  # (P,) int64
    targets: Tensor  # (P,) int64
    score: float  # the mean cosine of the most frequent sources and their translations
    nearest: Tensor  # (n,) int64: of each source its translation


def induced(x: Tensor, y: Tensor, w_xy: Tensor, words: int, settings: Settings, dictionary: str) -> Found:
    """By CSLS among the most frequent words of both tables; with "mutual", pairs that are so both ways."""
    with threads(1):
        x = x[:words] @ w_xy.mT
    y = y[:words]
    neighbors = min(settings.neighbors, len(x), len(y))
    nearest = ops.csls_topk(x, y, 1, neighbors=neighbors).indices[:, 0]
    first = min(settings.criterion_words, len(x))
    cosines = row_sums(unit(x[:first]) * unit(y[nearest[:first]]))
    sources = torch.arange(len(x), device=x.device)
    targets = nearest
    if dictionary == "mutual":
        back = ops.csls_topk(y, x, 1, neighbors=neighbors).indices[:, 0]
        is_mutual = back[nearest] == sources
        sources, targets = sources[is_mutual], targets[is_mutual]
    return Found(sources, targets, math.fsum(cosines.tolist()) / first, nearest)


class Refined(NamedTuple):
    maps: Maps
    score: float
    scores: list[float]  # before the first round, and after each
    nearest: Tensor  # (words,) int64, of the best map


def procrustes_csls(
    x: Tensor,
    y: Tensor,
    maps: Maps,
    *,
    words: int,
    rounds: int,
    settings: Settings,
    stages: Stages,
    name: str,
    timed_as: str | None = None,
) -> Refined:
    """Rounds of a dictionary by CSLS and the orthogonal map of it; the best of the maps by their score.

    They end before ``rounds`` when a dictionary repeats that of the round before. Maps of ICP begin them, but
    are none of them: a map that shrinks what it is unsure of has greater cosines, and is not better.
    """
    is_orthogonal = torch.equal(maps.w_yx, maps.w_xy.mT)

    def begin() -> State:
        none = torch.full((min(words, len(x)),), -1, device=x.device)
        return {
            "w_xy": maps.w_xy, "w_yx": maps.w_yx, "best_xy": maps.w_xy, "best_yx": maps.w_yx,
            "best": -math.inf, "best_nearest": none, "nearest": none, "scores": [],
        }  # fmt: skip

    def advance(state: State) -> bool:
        found = induced(x, y, state["w_xy"], words, settings, settings.dictionary)
        state["scores"].append(found.score)
        if found.score > state["best"] and (is_orthogonal or state["step"]):
            state["best"], state["best_nearest"] = found.score, found.nearest
            state["best_xy"], state["best_yx"] = state["w_xy"], state["w_yx"]
        if torch.equal(found.nearest, state["nearest"]):
            return False
        state["nearest"] = found.nearest
        state["w_xy"], state["w_yx"] = align(x[found.sources], y[found.targets])
        return True

    state = stages.run(name, begin, advance, rounds + 1, timed_as=timed_as)
    best = Maps(state["best_xy"], state["best_yx"])
    return Refined(best, state["best"], state["scores"], state["best_nearest"])


def icp(
    x: Tensor,
    y: Tensor,
    maps: Maps,
    *,
    words: int,
    epochs: int,
    pairs: tuple[Tensor, Tensor] | None = None,  # (n',), (m',): of the first epoch, between so many words
    mutual_only: bool = False,
    settings: Settings,
    stages: Stages,
    name: str,
) -> Maps:
    """Epochs of cycle ICP in all columns, between the most frequent words.

    With ``mutual_only`` it is refused without a mutual pair, and ends with a warning before the first epoch
    that has fewer of them than there are columns.
    """
    x, y = x[:words], y[:words]
    if len(x) < 5 * x.shape[1] and not mutual_only:
        warnings.warn(
            f'{OP}: transfer="icp" should have 5 words for each of {x.shape[1]} columns, got {len(x)} words;'
            ' transfer="procrustes" needs fewer',
            stacklevel=6,
        )
    seed = torch.tensor([draw(settings.seed, (int(mutual_only), 2))[0]], device=x.device)

    def begin() -> State:
        return {"w_xy": maps.w_xy, "w_yx": maps.w_yx, "mutual": -1}

    def advance(state: State) -> bool:
        given = pairs if state["step"] == 0 else None
        of_x, of_y = (x, y) if given is None else (x[: len(given[0])], y[: len(given[1])])
        result = ops.icp_epoch(
            of_x,
            of_y,
            state["w_xy"][None],
            state["w_yx"][None],
            seed,
            epoch=state["step"],
            batch_size=min(settings.batch_size, len(of_x), len(of_y)),
            lr=settings.lr,
            betas=settings.betas,  # pyright: ignore[reportArgumentType]
            eps=settings.eps,
            cycle_weight=settings.cycle_weight,
            pairs=None if given is None else (given[0][None], given[1][None]),
            mutual_only=mutual_only,
        )
        if not result.cost.isfinite().all():
            raise ValueError(f"{OP}: the cost of {name} is not finite; lower lr, got {settings.lr}")
        state["mutual"] = int(result.mutual)
        if mutual_only and state["mutual"] < x.shape[1]:
            return False
        state["w_xy"], state["w_yx"] = result.w_xy[0], result.w_yx[0]
        return True

    state = stages.run(name, begin, advance, epochs)
    if mutual_only and state["mutual"] < x.shape[1]:
        among = f"{state['mutual']} among {len(x)} and {len(y)} words"
        if state["mutual"] == 0:
            raise ValueError(
                f'{OP}: refine="reciprocal_icp" must have mutual pairs, got {among}; refine="procrustes_csls"'
                " needs none"
            )
        warnings.warn(
            f'{OP}: refine="reciprocal_icp" should have {x.shape[1]} mutual pairs, got {among}; it ended'
            f" after {state['step'] - 1} of {epochs} epochs",
            stacklevel=6,
        )
    return Maps(state["w_xy"], state["w_yx"])
