"""``python -m fastkit demo``: every op against the fastest other form, then a model that learns with them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastkit import info
from fastkit._command import require
from fastkit._threads import threads
from fastkit.bench import cases, progress, report
from fastkit.bench.harness import Row
from fastkit.bench.measure import Settings
from fastkit.recipes._focus_demo import Curve, train_digits

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

# An op has 8 seconds, without what compiles.
_SETTINGS = Settings(rounds=15, short=0.0, seconds=0.25, longest_call=2.0)
_QUICK = Settings(rounds=10, short=0.0, seconds=0.3, longest_call=1.0)


def main(out: Path, *, quick: bool = False) -> int:
    """Prints tables, writes demo.csv and demo.png into ``out``; returns the exit code. Raises Refusal.

    ``quick``: only shapes that fit the caches, nothing compiled, one seed.
    """
    require(matplotlib="matplotlib", sklearn="scikit-learn", tqdm="tqdm")
    out.mkdir(parents=True, exist_ok=True)
    print(info.describe(info.report()))
    print(report.LEGEND)
    chosen = [case for stem in cases.stems() for case in cases.of(stem).demo_cases(quick=quick)]
    with progress.ended_in_order():
        rows = progress.measure(
            chosen,
            _QUICK if quick else _SETTINGS,
            lambda rows: report.write_csv(rows, out / "demo.csv"),
        )

    with threads(1):  # the model is so small that two wait for one another longer than they save
        curves = train_digits(seeds=(0,), epochs=5) if quick else train_digits()
    print(_accuracies(curves))
    _write_png(rows, curves, out / "demo.png")
    print(f"\nwritten: {out / 'demo.csv'}, {out / 'demo.png'}")
    return 0


def _accuracies(curves: Sequence[Curve]) -> str:
    lines = ["digits, pixel by pixel: test accuracy, the mean and each seed"]
    for filtered, name in ((True, "with AdaptiveIIR"), (False, "without it")):
        last = [curve.accuracy[-1] for curve in curves if curve.filtered == filtered]
        each = " ".join(f"{accuracy:.3f}" for accuracy in last)
        lines.append(f"  {name:16}{statistics.mean(last):>8.3f}  ({each})")
    return "\n".join(lines)


def _write_png(rows: Sequence[Row], curves: Sequence[Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    heights = report.inches(rows), 3
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    bars, training = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
    report.draw(bars, rows)
    _draw_curves(training, curves)
    figure.savefig(path, dpi=150)


def _draw_curves(figure: SubFigure, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    for curve in curves:
        color, name = ("tab:orange", "with") if curve.filtered else ("tab:gray", "without")
        label = f"{name} AdaptiveIIR" if curve.seed == curves[0].seed else None
        axes.plot(range(1, len(curve.accuracy) + 1), curve.accuracy, color=color, label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), title="digits, pixel by pixel")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
