"""Focus models, against the same with constant filters and transformers.

``python -m fastkit run focus``; docs/recipes/focus.md tells what it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from fastkit._command import Refusal, positive, positive_number, require
from fastkit.recipes import _focus_classify, _focus_lm, _focus_recall, _options
from fastkit.recipes._focus_classify import load_classifier
from fastkit.recipes._focus_models import POOL, load_language_model

__all__ = ["add_arguments", "load_classifier", "load_language_model", "main"]

TASKS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "classify": _focus_classify.main,
    "recall": _focus_recall.main,
    "lm": _focus_lm.main,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run focus``."""
    _options.add_arguments(parser, out="fastkit-focus")
    parser.add_argument("--task", choices=TASKS, default="classify", help="default: %(default)s")
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="default: as many as make 600 steps on the training part; of recall 100; with --quick 2",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="default: 16; of recall 32; of lm 8")
    parser.add_argument(
        "--hidden-size",
        type=positive,
        metavar="N",
        help="width of the models; default: 32; of recall and lm 64",
    )
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="samples, or tokens, of a bin, which has a set of coefficients; a multiple of 8; default: about"
        " a quarter of the longest training series, of images whole rows; of recall a quarter of a string; of"
        " lm 64",
    )
    parser.add_argument(
        "--attn-chunk",
        type=positive,
        metavar="N",
        help="those that attend to each other, in all arms; default: that of --chunk, 2048 at most; of recall"
        " a 32nd of a string",
    )
    parser.add_argument(
        "--kernel-length",
        type=positive,
        metavar="N",
        help="taps of the global convolution; default: the longest training series, 2048 at most; of recall a"
        " string, of lm a window",
    )
    classify = parser.add_argument_group("task classify")
    classify.add_argument(
        "--kernel",
        type=positive,
        metavar="N",
        help="samples that the first layer sees at once; default: 8, of images 1",
    )
    both = parser.add_argument_group("tasks recall and lm")
    arms = _focus_recall.ARMS
    both.add_argument(
        "--arms", choices=arms, nargs="+", metavar="ARM", help=f"of {', '.join(arms)}; default: all"
    )
    both.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="tokens of a string, a multiple of 32; default: 256; of lm characters of a window; default: 512;"
        " with --quick 64",
    )
    recall = parser.add_argument_group("task recall")
    recall.add_argument(
        "--strings",
        choices=("fixed", "fresh"),
        default="fixed",
        help="whether the 2000 to train on are the same in each epoch; default: %(default)s",
    )
    recall.add_argument("--lr", type=positive_number, default=1e-4, metavar="X", help="default: %(default)s")
    lm = parser.add_argument_group("task lm")
    lm.add_argument(
        "--steps", type=positive, metavar="N", help="default: 1000; with --quick 50; in whole fifties"
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
