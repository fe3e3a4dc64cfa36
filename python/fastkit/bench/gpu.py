"""``python -m fastkit.bench.gpu [STEM ...]``: ops that have GPU kernels, beside PyTorch forms of the work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastkit import info
from fastkit.bench import cases, report
from fastkit.bench.harness import Row, run
from fastkit.bench.measure import Settings
from fastkit.bench.progress import ended_in_order

_SETTINGS = Settings(rounds=40, short=0.0, seconds=2.0, longest_call=2.0, longest_build=90.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tables and writes gpu.csv, as it goes; returns 1 if one of our own kernels is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fastkit.bench.gpu", description=__doc__)
    parser.add_argument(
        "stems", nargs="*", metavar="STEM", help=f"of {', '.join(cases.stems())}; default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("fastkit-gpu"), help="folder for gpu.csv")
    options = parser.parse_args(argv)
    if unknown := set(options.stems) - set(cases.stems()):
        parser.error(f"STEM must be one of {', '.join(cases.stems())}, got {', '.join(sorted(unknown))}")
    out: Path = options.out
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    print(info.describe(info.report()))
    rows: list[Row] = []
    with ended_in_order():
        for case in (case for stem in options.stems or cases.stems() for case in cases.of(stem).gpu_cases()):
            for (of_case,) in run([case], _SETTINGS):  # alone: copies of other sizes have other rates
                print(f"\n{report.table(of_case)}", flush=True)
                rows += of_case
                report.write_csv(rows, out / "gpu.csv")  # what is measured is kept if time runs out
                for row in filter(_is_wrong, of_case):
                    print(f"wrong: {row.title}, {row.contestant}: {row.note}", flush=True)
    return 1 if any(_is_wrong(row) for row in rows) else 0


def _is_wrong(row: Row) -> bool:
    """Ours, and another result than the reference's, or a fault."""
    return row.contestant.startswith("fastkit") and row.note.startswith(("differs: ", "failed: "))


if __name__ == "__main__":
    raise SystemExit(main())
