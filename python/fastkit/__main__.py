"""The command line: ``python -m fastkit``, also installed as ``fastkit``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastkit", description="Fast kernels for PyTorch.")
    commands = parser.add_subparsers(required=True)

    info = commands.add_parser(
        "info", help="what would run here, and why not the rest; exit code 1 if the library is not used"
    )
    info.add_argument("--json", action="store_true", help="the same for programs")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="every op beside the best PyTorch forms, then a short training")
    demo.add_argument("--out", type=Path, default=Path("fastkit-demo"), help="folder for demo.csv, demo.png")
    demo.add_argument(
        "--quick", action="store_true", help="only shapes that fit the caches, no torch.compile, one seed"
    )
    demo.set_defaults(run=_demo)

    args = parser.parse_args(argv)
    return args.run(args)


# What a command needs is imported when it runs: `info` must answer where the rest cannot.


def _info(args: argparse.Namespace) -> int:
    from fastkit import _native, info

    facts = info.report()
    print(json.dumps(facts, indent=2) if args.json else info.describe(facts))
    return 0 if _native.REASON is None else 1


def _demo(args: argparse.Namespace) -> int:
    from fastkit.bench import demo

    return demo.main(args.out, quick=args.quick)


if __name__ == "__main__":
    raise SystemExit(main())
