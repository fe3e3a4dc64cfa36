"""What a table of arms and seeds says: mean and spread, differences between arms, curves."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np


class Row(NamedTuple):
    """A finished row: an arm from one seed. A figure that is not finite is None."""

    table: str
    arm: str
    seed: int
    figures: dict[str, float | None]
    curve: list[dict[str, float | None]]  # figures after each stretch of the training
    seconds: float  # of training, in all processes, as far as checkpoints tell
    facts: Mapping[str, float] = {}  # of what was trained: counts of parameters and the like


def summary(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each figure and arm: each seed, the mean, and the standard deviation of a sample of seeds."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        for name, value in row.figures.items():
            arm = figures.setdefault(name, {}).setdefault(row.arm, {"seeds": {}})
            arm["seeds"][str(row.seed)] = value
    for arms in figures.values():
        for arm in arms.values():
            arm["mean"], arm["std"] = _mean_and_std(list(arm["seeds"].values()))
    return figures


def paired(rows: Iterable[Row], arm: str, other: str) -> dict[str, dict[str, Any]]:
    """Of each figure: ``arm`` minus ``other`` from each seed of both, the mean, and its standard error.

    The standard error is the differences' standard deviation by the root of their number; None for one seed.
    """
    found = {(row.arm, row.seed): row.figures for row in rows}
    seeds = sorted(seed for name, seed in found if name == arm and (other, seed) in found)
    differences: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        one, two = found[arm, seed], found[other, seed]
        for name in (name for name in one if name in two):
            a, b = one[name], two[name]
            entry = differences.setdefault(name, {"seeds": {}})
            entry["seeds"][str(seed)] = None if a is None or b is None else a - b
    for entry in differences.values():
        values = list(entry["seeds"].values())
        entry["mean"], std = _mean_and_std(values)
        entry["stderr"] = None if std is None else std / math.sqrt(len(values))
    return differences


def differences(
    rows: Sequence[Row], questions: Iterable[tuple[str, str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """``paired`` for each question whose two arms have rows."""
    arms = {row.arm for row in rows}
    return {
        f"{one} minus {other}": paired(rows, one, other)
        for one, other in questions
        if one in arms and other in arms
    }


def with_spread(figure: Mapping[str, Any] | None, of: Literal["std", "stderr"], sign: str = "") -> str:
    """A cell of a table: the mean, and its deviation or error; a dash for what there is not."""
    if figure is None or figure["mean"] is None:
        return "-"
    return f"{figure['mean']:{sign}.4f} ± {'-' if figure[of] is None else format(figure[of], '.4f')}"


def _mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def finite(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()
    }


def curves(rows: Sequence[Row], unit: str, stretch: int) -> bytes:
    """curves.csv: a line for each point, which stands after a multiple of ``stretch`` units."""
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for point in row.curve for name in point))
    writer = csv.DictWriter(text, ["arm", "seed", unit, *names])
    writer.writeheader()
    for row in rows:
        for number, point in enumerate(row.curve, 1):
            writer.writerow({"arm": row.arm, "seed": row.seed, unit: number * stretch, **point})
    return text.getvalue().encode()


def draw(path: Path, rows: Sequence[Row], unit: str, stretch: int) -> None:
    """curves.png: a panel for each figure that is there from the first point on."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in rows for name in row.curve[0]))
    figure = Figure(figsize=(5 * max(1, len(names)), 3.5), layout="constrained")
    arms = list(dict.fromkeys(row.arm for row in rows))
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for row in rows:
            values = np.array([point.get(name) for point in row.curve], dtype=float)  # None is NaN
            first = row == next(other for other in rows if other.arm == row.arm)
            label = row.arm if first else None
            x = stretch * np.arange(1, len(values) + 1)
            axes.plot(x, values, color=f"C{arms.index(row.arm)}", label=label)
        axes.set(xlabel=unit, ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.savefig(path, format="png", dpi=150)
