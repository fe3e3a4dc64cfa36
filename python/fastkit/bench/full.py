"""``python -m fastkit bench``: the full benchmark, against every peer that is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastkit import __version__, info
from fastkit.bench import cases, machine, progress, report
from fastkit.bench.harness import Row, versions
from fastkit.bench.measure import Settings


def main(
    stems: Sequence[str], out: Path, *, rounds: int = 40, quick: bool = False, resume: bool = False
) -> int:
    """Prints a table for each case, writes ``out/<machine>/<version>.csv`` and .png; returns the exit code.

    The CSV is written after each case. What it has of other cases stays: one op can be measured again.
    ``quick``: only shapes that fit the caches, nothing compiled, at most 10 rounds, in files of its own.
    ``resume``: not the cases that the CSV has of the same versions.
    """
    known = cases.stems()
    unknown = [stem for stem in stems if stem not in known]
    if unknown:
        print(f"bench: STEM must be one of {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    folder = out / machine.name()
    path = folder / f"{__version__}{'-quick' if quick else ''}.csv"
    try:
        before = report.read_csv(path) if path.exists() else []
    except ValueError as error:
        print(f"bench: {error}; move it away, or choose another --out", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)

    print(info.describe(info.report()))
    print(report.LEGEND)
    measured = {(row.title, row.versions) for row in before} if resume else set()
    chosen = [
        case
        for stem in stems or known
        for case in cases.of(stem).cases(quick=quick)
        if (case.title, versions(case.peers)) not in measured
    ]
    with progress.ended_in_order():
        rows = progress.measure(
            chosen,
            _quick(rounds) if quick else Settings(rounds=rounds),
            lambda rows: report.write_csv(_merged(before, rows), path),
        )
    print(_ceiling(rows))
    written = [path]
    if find_spec("matplotlib"):
        written.append(path.with_suffix(".png"))
        report.write_png(_merged(before, rows), written[-1])
    else:
        print("no PNG: matplotlib not found; install with pip install 'fastkit[recipes]'")
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _quick(rounds: int) -> Settings:
    return Settings(rounds=min(rounds, 10), short=0.0, seconds=0.5, longest_call=1.0)


def _merged(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """``rows``, in place of what there was of their cases."""
    by_title = {table[0].title: table for table in (*report.by_case(before), *report.by_case(rows))}
    return [row for table in by_title.values() for row in table]


def _ceiling(rows: Sequence[Row]) -> str:
    """The copy rate of all cases; a case's own is beside its ratios."""
    rates = [table[0].copy_q2 for table in report.by_case(rows)]
    measured = [rate for rate in rates if rate is not None]
    if not measured:
        return "copy rate: not measured"
    low, high = min(measured), max(measured)
    return f"copy rate, the ceiling of this run: {low:.3g} to {high:.3g} GB/s (medians of the cases)"
