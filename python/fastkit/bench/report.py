"""Shows the rows of a benchmark: as CSV, as a table of 80 columns, as bars."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkit.bench.harness import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

WIDTH = 80
LEGEND = """
error     the largest, from float64, relative to the row's largest value
x floor   the time, over that of copying the bytes that must be read and written,
          or of the contestant that a case calls its floor
faster    than the fastest other form
"""


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row; an empty cell is what was not measured. A file that was there is replaced at once."""
    unfinished = path.with_suffix(".csv.part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    unfinished.replace(path)


def read_csv(path: Path) -> list[Row]:
    """What ``write_csv`` wrote; raises ValueError for another file."""
    kinds = {field.name: field.type for field in fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(kinds):
            raise ValueError(f"{path} has other columns than this version of fastkit writes")
        lines = [{name: _value(str(kinds[name]), cell) for name, cell in line.items()} for line in reader]
    return [Row(**line) for line in lines]


def _value(kind: str, cell: str) -> Any:
    if kind == "str":
        return cell
    if not cell:
        return None
    return int(cell) if kind.startswith("int") else float(cell)


def table(rows: Sequence[Row]) -> str:
    """The rows case by case, at most 80 columns wide."""
    return "\n\n".join("\n".join(_lines(case)) for case in by_case(rows))


def by_case(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(case) for _, case in groupby(rows, lambda row: row.title)]


def _lines(case: Sequence[Row]) -> Iterator[str]:
    ours = case[0]
    yield ours.title
    if ours.copy_q2 is not None:
        quartiles = " ".join(_short(rate) for rate in (ours.copy_q1, ours.copy_q2, ours.copy_q3))
        yield (
            f"  floor {ours.floor or f'{ours.floor_mb:.0f} MB'}; copy {quartiles} GB/s (quartiles);"
            f" threads {ours.threads}, load {ours.load:.1f}"
        )
    yield f"  {'':16}{'error':>8}{'x floor':>9}  {'95 %':<17}{'rounds':>7}{'extra MB':>9}{'faster':>9}"
    for row in case:
        start = f"  {row.contestant:16}{'' if row.error is None else f'{row.error:.0e}':>8}"
        if row.ratio is None:
            yield from textwrap.wrap(row.note, WIDTH, initial_indent=start + "  ", subsequent_indent=" " * 28)
            continue
        spread = "" if row.low is None else f"[{_short(row.low)}, {_short(row.high)}]"
        faster = "" if row.faster is None else f"{_short(row.faster)}x"
        yield f"{start}{_short(row.ratio):>9}  {spread:<17}{row.rounds:>7}{row.extra_mb:>9.0f}{faster:>9}"
    yield from (f"  {note}" for note in _notes(case))


def _notes(case: Sequence[Row]) -> Iterator[str]:
    ours = case[0]
    if ours.slow_ratio is not None:
        yield (
            f"{ours.contestant}: {_short(ours.slow_ratio)} x floor in rounds of {ours.slow_copy:.0f} GB/s,"
            f" {_short(ours.fast_ratio)} in rounds of {ours.fast_copy:.0f} GB/s"
        )
    if ours.clones is not None:
        yield f"{ours.contestant} on fresh pages: {ours.clones:.2f} x clone() of the floor's bytes"
    for row in case:
        if row.build_s is not None and row.build_s > 1:
            yield f"{row.contestant}: {row.build_s:.0f} s to build"


def _short(value: float | None) -> str:
    """Three digits, and no exponent for a large number."""
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def write_png(rows: Sequence[Row], path: Path) -> None:
    """The bars of ``draw`` alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, inches(rows)), layout="constrained")
    draw(figure, rows)
    figure.savefig(path, dpi=150)


def inches(rows: Sequence[Row]) -> float:
    """The height that ``draw`` needs."""
    bars = [len(case) for case in by_case(rows)]
    return 1 + sum(0.6 + 0.2 * max(bars[i : i + 2]) for i in range(0, len(bars), 2))


def draw(figure: Figure | SubFigure, rows: Sequence[Row]) -> None:
    """Ratios to the floor as horizontal bars on one log scale, a panel for each case."""
    cases = by_case(rows)
    columns = min(2, len(cases))
    panels = figure.subplots(-(-len(cases) // columns), columns, sharex=True, squeeze=False).flat
    for panel in panels[len(cases) :]:
        panel.remove()
    ratios = [row.ratio for row in rows if row.ratio is not None]
    for panel, case in zip(panels, cases, strict=False):
        panel.set_title(case[0].title, fontsize=9)
        panel.set_xscale("log")
        panel.set_xlim(0.5 * min([1.0, *ratios]), 5 * max([1.0, *ratios]))
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_yticks(range(len(case)), [row.contestant for row in case], fontsize=8)
        panel.set_ylim(len(case) - 0.5, -0.5)  # those without a bar too
        for i, row in enumerate(case):
            color = "tab:orange" if i < 2 else "tab:gray"  # ours, twice
            if row.ratio is None:
                note = panel.text(
                    1.1, i, textwrap.shorten(row.note, 60), fontsize=7, va="center", color="tab:red"
                )
                note.set_in_layout(
                    False
                )  # one that is longer than the panel is wide makes no room for itself
                continue
            panel.barh(i, row.ratio, color=color)
            panel.text(1.1 * max(row.ratio, 1), i, _short(row.ratio), fontsize=8, va="center")
    figure.supxlabel("time / time of the floor (log scale; the line is the floor)", fontsize=9)
