"""``python -m fastkit.bench.gpu``: every op that has GPU kernels, beside PyTorch forms of the same work."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastkit import info
from fastkit.bench import report
from fastkit.bench.case import Case
from fastkit.bench.cases import iir_scan_gpu
from fastkit.bench.harness import Row, run
from fastkit.bench.measure import Settings

_SETTINGS = Settings(rounds=40, seconds=2.0, longest_call=2.0, longest_build=90.0)


def cases() -> list[Case]:
    return iir_scan_gpu.cases()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tables and writes gpu.csv, as it goes; returns 1 if fastkit differs from the reference."""
    parser = argparse.ArgumentParser(prog="python -m fastkit.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("fastkit-gpu"), help="folder for gpu.csv")
    out: Path = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, which ends the children too
    out.mkdir(parents=True, exist_ok=True)
    print(info.describe(info.report()))
    rows: list[Row] = []
    for case in cases():  # one by one: what is measured is kept if time runs out
        of_case = run([case], _SETTINGS)
        print(f"\n{report.table(of_case)}", flush=True)
        rows += of_case
        report.write_csv(rows, out / "gpu.csv")
    return 1 if any(_is_wrong(row) for row in rows) else 0


def _is_wrong(row: Row) -> bool:
    """Ours, and another result than the reference's or the end of a process."""
    return row.contestant.startswith("fastkit") and ("differs" in row.note or "process ended" in row.note)


if __name__ == "__main__":
    raise SystemExit(main())
