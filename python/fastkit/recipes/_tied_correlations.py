"""Which of its two embeddings an untied model's tied one resembles: the paper's comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastkit.methods.tied_embedding import TiedLanguageModel
from fastkit.recipes._corpus import SPECIAL

WORDS, PAIRS = 2000, 20_000


class Similarities(NamedTuple):
    """Cosines of the same pairs of words, (PAIRS,) each, in three embeddings."""

    input: Tensor  # of the untied model, as the output
    output: Tensor
    tied: Tensor


def pairs(words: int) -> Tensor:  # (PAIRS, 2)
    """Of the most frequent words, <unk> and <eos> aside, the same each time; no word with itself."""
    count = min(WORDS, words - SPECIAL)
    if count < 2:
        return torch.zeros(0, 2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(count, (PAIRS,), generator=generator)
    apart = 1 + torch.randint(count - 1, (PAIRS,), generator=generator)
    return SPECIAL + torch.stack([one, (one + apart) % count], 1)


@torch.no_grad()
def similarities(untied: TiedLanguageModel, tied: TiedLanguageModel) -> Similarities:
    assert untied.output is not None
    chosen = pairs(untied.vocab_size)
    tables = untied.embedding.weight, untied.output.weight, tied.embedding.weight
    rows = (table.double()[chosen] for table in tables)  # (PAIRS, 2, H) each
    return Similarities(*(cosine_similarity(each[:, 0], each[:, 1]) for each in rows))


def correlations(lists: Similarities) -> dict[str, float | None]:
    """Spearman's, of each two lists; None where it is no number, as of a model that has become NaN."""
    from scipy.stats import spearmanr

    if len(lists.tied) == 0:
        return {"in/out": None, "in/tied": None, "out/tied": None}

    def spearman(one: Tensor, other: Tensor) -> float | None:
        found: Any = spearmanr(one.numpy(), other.numpy())
        return float(found.statistic) if math.isfinite(found.statistic) else None

    return {
        "in/out": spearman(lists.input, lists.output),
        "in/tied": spearman(lists.input, lists.tied),
        "out/tied": spearman(lists.output, lists.tied),
    }


def draw(
    path: Path,
    *,
    compared: Mapping[tuple[str, int], Similarities],
    found: Mapping[tuple[str, int], Mapping[str, float | None]],
) -> None:
    """A line of panels for each pair of arms: the pairs of words of its first seed, and each correlation."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for arm, _ in compared))
    figure = Figure(figsize=(12, 3.6 * len(arms)), layout="constrained")
    axes = figure.subplots(len(arms), 3, squeeze=False)
    for line, arm in zip(axes, arms, strict=True):
        seeds = [seed for name, seed in compared if name == arm]
        lists = compared[arm, seeds[0]]
        for panel, name, list_ in ((line[0], "input", lists.input), (line[1], "output", lists.output)):
            panel.hexbin(list_.numpy(), lists.tied.numpy(), gridsize=50, bins="log", mincnt=1, cmap="Blues")
            panel.set(
                title=f"{arm}, seed {seeds[0]}",
                xlabel=f"cosine, {name} embedding",
                ylabel="cosine, tied embedding",
            )
        names = list(found[arm, seeds[0]])
        for seed in seeds:
            values = np.array([found[arm, seed][name] for name in names], dtype=float)  # None is NaN
            line[2].plot(names, values, "o", label=f"seed {seed}")
        line[2].set(title=arm, ylabel="Spearman's correlation")
        line[2].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)
