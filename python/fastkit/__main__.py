"""The command line: ``python -m fastkit``, also installed as ``fastkit``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="what would run here, and why not the rest; exit code 1 if the library is not used"
    )
    info.add_argument("--json", action="store_true", help="the same for programs")
    demo = commands.add_parser("demo", help="every op beside the best PyTorch forms, then a short training")

    # What a command needs is imported when it runs: `info` must answer where the rest cannot.
    from fastkit.bench.demo import add_arguments

    add_arguments(demo)
    args = parser.parse_args(argv)
    if args.command == "demo":
        from fastkit.bench.demo import main as run_demo

        return run_demo(args)
    return _info(args.json)


def _info(as_json: bool) -> int:
    from fastkit import _native, info

    facts = info.report()
    print(json.dumps(facts, indent=2) if as_json else info.describe(facts))
    return 0 if _native.REASON is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
