"""The command line: ``python -m fastkit``, also installed as ``fastkit``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from fastkit import __version__
from fastkit._command import Refusal, positive

# A recipe is a module of fastkit.recipes with add_arguments(parser) and main(args) -> exit code.
RECIPES = {
    "focus": "Focus models on series and at recall, against constant filters and attention in chunks alone",
    "multiverse": "many orthogonal heads on one encoder, the weak ones eliminated, against one head",
    "prilora": "ranks that grow from block to block and pruned adapters, against LoRA and full fine-tuning",
    "word_translation": "two tables of word vectors aligned without a dictionary, and translations by them",
    "mtadam": "MTAdam on losses with wrong weights, against Adam with wrong and right ones and longer steps",
    "tied_embedding": "language models and translators with tied embeddings, against the same untied",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, for at exit a reader that has gone would be a traceback
    except Refusal as refusal:
        print(f"{args.command}: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{args.command}: stopped{args.stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ends
    return code


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Of all commands; of recipes, only the one that ``argv`` names is imported."""
    parser = argparse.ArgumentParser(prog="fastkit", description="Fast kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastkit {__version__}")
    parser.set_defaults(run=partial(_help, parser), command="fastkit", stopped="")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="what would run here, and why not the rest; exit code 1 if more could, with what to do",
    )
    info.add_argument("--json", action="store_true", help="the same for programs")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="every op beside the best PyTorch forms, then a short training")
    demo.add_argument("--out", type=Path, default=Path("fastkit-demo"), help="folder for demo.csv, demo.png")
    demo.add_argument(
        "--quick", action="store_true", help="only shapes that fit the caches, no torch.compile, one seed"
    )
    demo.set_defaults(run=_demo, command="demo", stopped="; demo.csv has what was measured")

    bench = commands.add_parser("bench", help="every op beside all peers that are installed; takes minutes")
    bench.add_argument("stems", nargs="*", metavar="STEM", help="ops to measure; default: all")
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("fastkit-bench"),
        help="folder for <machine>/<version>.csv and .png, which keep what they have of other ops",
    )
    bench.add_argument("--rounds", type=positive, default=40, metavar="N", help="default: %(default)s")
    bench.add_argument(
        "--quick", action="store_true", help="only shapes that fit the caches, no torch.compile, 10 rounds"
    )
    bench.add_argument(
        "--resume", action="store_true", help="leave out what the CSV has, measured with the same versions"
    )
    bench.set_defaults(run=_bench, command="bench", stopped="; the CSV has what was measured")

    run = commands.add_parser("run", help="a method on trial, on data of its own or yours")
    run.set_defaults(run=partial(_help, run))
    recipes = run.add_subparsers(title="recipes", metavar="RECIPE")
    for name, summary in RECIPES.items():
        recipe = recipes.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        recipe.set_defaults(
            run=partial(_run, name),
            command=f"run {name}",
            stopped="; the same command with --resume goes on",
        )
        if list(argv[:2]) == ["run", name]:
            _recipe(name).add_arguments(recipe)
    return parser


def _help(parser: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    """Of a command that names none of its own."""
    parser.print_help()
    return 2


# What a command needs is imported when it runs: `info` must answer where the rest cannot.


def _info(args: argparse.Namespace) -> int:
    from fastkit import info

    facts = info.report()
    print(json.dumps(facts, indent=2) if args.json else info.describe(facts))
    return 0 if facts["ok"] else 1


def _demo(args: argparse.Namespace) -> int:
    from fastkit.bench import demo

    return demo.main(args.out, quick=args.quick)


def _bench(args: argparse.Namespace) -> int:
    from fastkit.bench import full

    return full.main(args.stems, args.out, rounds=args.rounds, quick=args.quick, resume=args.resume)


def _run(name: str, args: argparse.Namespace) -> int:
    return _recipe(name).main(args)


def _recipe(name: str) -> ModuleType:
    return importlib.import_module(f"fastkit.recipes.{name}")


if __name__ == "__main__":
    raise SystemExit(main())
