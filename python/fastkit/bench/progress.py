"""A benchmark that somebody watches, and may end before it is through."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager

from fastkit.bench import report
from fastkit.bench.case import Case
from fastkit.bench.harness import Row, run
from fastkit.bench.measure import Settings


def measure(cases: Sequence[Case], settings: Settings, keep: Callable[[list[Row]], None]) -> list[Row]:
    """Prints the table of each case as it is measured, and gives ``keep`` the rows of all so far.

    On a terminal where tqdm is installed there is a progress bar.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        bar, write = cases, print
    else:
        bar, write = tqdm(cases, disable=None), tqdm.write
    rows: list[Row] = []
    with closing(run(cases, settings)) as results:
        for _ in bar:
            tables = next(results)
            write(report.table(tables[-1]) + "\n")
            sys.stdout.flush()
            rows = [row for table in tables for row in table]
            keep(rows)
    return rows


@contextmanager
def ended_in_order() -> Generator[None]:
    """SIGTERM as an exception, which ends the children too."""
    before = signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
