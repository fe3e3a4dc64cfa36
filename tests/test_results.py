"""docs/performance.md shows what benchmarks/results holds of this version.

``python tests/test_results.py`` writes its tables anew.
"""

import csv
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fastkit import __version__
from fastkit.bench import cases
from fastkit.bench.harness import Row
from fastkit.bench.report import by_case, read_csv

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob(f"*/{__version__}.csv"))
OF_GPUS = sorted((ROOT / "benchmarks" / "results").glob("*/gpu.csv"))  # of benchmarks/gpu.sh, in its time
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the tests are here without the documentation")


def tables() -> str:
    rows = {path: read_csv(path) for path in RESULTS + OF_GPUS}
    parts = [_table(path.parent.name, of_path) for path, of_path in rows.items()]
    parts += [_targets(path.parent.name, rows[path]) for path in RESULTS]
    return "\n\n".join("\n".join(part) for part in parts)


def _targets(machine: str, rows: Sequence[Row]) -> Iterator[str]:
    of_case = {case[0].title: case for case in by_case(rows)}
    yield f"What was aimed at, on `{machine}`:"
    yield ""
    yield "| | target | measured | |"
    yield "|---|---|---|---|"
    for target in targets():
        if target["case"] in of_case:
            ours, again, *_ = of_case[target["case"]]
            met = _is_met(ours, again, float(target["target"]))
            note = "met" if met else f"missed: {target['limit']}"
            yield f"| {ours.title} | {target['target']} | {_ratio(ours)} | {note} |"


def _is_met(ours: Row, again: Row, target: float) -> bool:
    """Or above it by no more than the same code is from itself, with an interval that reaches it."""
    if ours.ratio is None or again.ratio is None or ours.low is None:
        return False
    return ours.ratio <= target or ours.low <= target >= ours.ratio - abs(ours.ratio - again.ratio)


def targets() -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "targets.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _table(machine: str, rows: Sequence[Row]) -> Iterator[str]:
    of_case = by_case(rows)
    rates = [case[0].copy_q2 for case in of_case if case[0].copy_q2 is not None]
    loads = [case[0].load for case in of_case if case[0].load is not None]
    versions = dict.fromkeys(part for case in of_case for part in case[0].versions.split(", "))
    yield from textwrap.wrap(
        f"`{machine}`, {rows[0].threads} threads, copy {min(rates):.1f} to {max(rates):.1f} GB/s, load"
        f" {min(loads):.1f} to {max(loads):.1f}; {', '.join(versions)}:",
        120,
    )
    yield ""
    yield "| | fastkit | again | extra MB | others, the fastest first |"
    yield "|---|---|---|---|---|"
    for ours, again, *others in of_case:
        timed = sorted((row for row in others if row.ratio is not None), key=lambda row: row.ratio or 0)
        cells = [f"{row.contestant} {_ratio(row)}" for row in timed]
        cells += [f"{row.contestant}: {row.note}" for row in others if row.ratio is None]
        memory = "" if ours.extra_mb is None else f"{ours.extra_mb:.0f}"
        yield f"| {ours.title} | {_ratio(ours)} | {_ratio(again)} | {memory} | {'; '.join(cells)} |"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return row.note
    text = f"{row.ratio:.3g}" if row.ratio < 1000 else f"{row.ratio:.0f}"
    if not row.contestant.startswith("fastkit") or row.low is None:
        return text
    return f"{text} [{row.low:.3g}, {row.high:.3g}]"


def with_tables(text: str) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def test_the_page_shows_the_results():
    text = PAGE.read_text()
    assert text == with_tables(text), f"run: python tests/{Path(__file__).name}"


def test_a_target_is_of_a_case_and_says_what_limits_one_that_is_missed():
    rows = {case[0].title: case for path in RESULTS for case in by_case(read_csv(path))}
    for target in targets():
        ours, again, *_ = rows[target["case"]]
        assert _is_met(ours, again, float(target["target"])) or target["limit"], target


def test_results_are_of_this_version_and_of_the_cases_that_there_are():
    known = {case.title for stem in cases.stems() for case in cases.of(stem).cases()}
    known_on_gpu = {case.title for stem in cases.stems() for case in cases.of(stem).gpu_cases()}
    measured = set()
    for path in RESULTS + OF_GPUS:
        rows = read_csv(path)
        titles = {row.title for row in rows}
        assert titles <= (known_on_gpu if path in OF_GPUS else known)
        measured |= titles
        assert all(re.search(rf"fastkit {re.escape(__version__)}\b", row.versions) for row in rows)
    assert known <= measured  # each on some machine


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
