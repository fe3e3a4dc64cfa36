"""docs/performance.md shows what benchmarks/results holds of this version.

``python tests/test_results.py`` writes its tables anew.
"""

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
    return "\n\n".join("\n".join(_table(path.parent.name, read_csv(path))) for path in RESULTS + OF_GPUS)


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
