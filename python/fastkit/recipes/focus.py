"""Focus models, against the same with constant filters and a transformer that sees the same chunks.

``python -m fastkit run focus``; docs/recipes/focus.md tells what it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from fastkit._command import Refusal, positive, require
from fastkit.recipes import _focus_classify, _options
from fastkit.recipes._focus_classify import load_classifier
from fastkit.recipes._focus_models import POOL

__all__ = ["add_arguments", "load_classifier", "main"]

TASKS: Mapping[str, Callable[[argparse.Namespace], int]] = {"classify": _focus_classify.main}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run focus``."""
    _options.add_arguments(parser, out="fastkit-focus")
    parser.add_argument("--task", choices=TASKS, default="classify", help="default: %(default)s")
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="default: as many as make 600 steps on the training part; with --quick 2",
    )
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--hidden-size",
        type=positive,
        default=32,
        metavar="N",
        help="width of the models; default: %(default)s",
    )
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kernel",
        type=positive,
        metavar="N",
        help="samples that the first layer sees at once; default: 8, of images 1",
    )
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="samples of a bin, which has a set of coefficients; a multiple of 8; default: about a quarter of"
        " the longest training series, of images whole rows",
    )
    parser.add_argument(
        "--attn-chunk",
        type=positive,
        metavar="N",
        help="samples that attend to each other, in all arms; default: that of --chunk",
    )
    parser.add_argument(
        "--kernel-length",
        type=positive,
        metavar="N",
        help="taps of the global convolution; default: the longest training series, 2048 at most",
    )
    _options.add_threads(parser, default=1)


def main(args: argparse.Namespace) -> int:
    """Runs a task; returns the exit code."""
    require(sklearn="scikit-learn", matplotlib="matplotlib", tqdm="tqdm", transformers="transformers")
    if args.chunk is not None and args.chunk % POOL != 0:
        raise Refusal(
            f"--chunk must be a multiple of {POOL}, got {args.chunk}; take {args.chunk + -args.chunk % POOL}"
        )
    return TASKS[args.task](args)
