"""Tied embeddings: the paper's language models tied and not, translators, and the speed of the loss.

``python -m fastkit run tied_embedding``; docs/recipes/tied_embedding.md tells what it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping

from fastkit._command import Refusal, positive, require
from fastkit.methods.tied_embedding import TiedLanguageModel
from fastkit.methods.tied_embedding.presets import PRESETS
from fastkit.recipes import _options, _tied_lm, _tied_speed, _tied_translation, _tied_translator
from fastkit.recipes._tied_translator import load_translator

__all__ = ["add_arguments", "load_language_model", "load_translator", "main"]

load_language_model: Callable[..., TiedLanguageModel] = TiedLanguageModel.from_pretrained

TASKS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "lm": _tied_lm.main,
    "translation": _tied_translation.main,
    "speed": _tied_speed.main,
}
_ARMS: Mapping[str, Iterable[str]] = {
    "lm": _tied_lm.ARMS,
    "translation": _tied_translator.ARMS,
    "speed": _tied_speed.ARMS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run tied_embedding``."""
    _options.add_arguments(parser, out="fastkit-tied-embedding")
    _options.add_device(parser)
    parser.add_argument("--task", choices=TASKS, default="lm", help="default: %(default)s")
    of_tasks = "; ".join(f"of {task}: {', '.join(arms)}" for task, arms in _ARMS.items())
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"default: all; {of_tasks}")
    parser.add_argument(
        "--hidden-size", type=positive, metavar="N", help="default: that of the preset; of translation 128"
    )
    both = parser.add_argument_group("tasks lm and speed")
    both.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    both.add_argument(
        "--train-words", type=positive, metavar="N", help="the first of the training part; default: all of it"
    )
    both.add_argument(
        "--vocabulary",
        type=positive,
        metavar="N",
        help="the most frequent words, which the model knows; default: all where the text has <unk>, else"
        " 10,000",
    )
    both.add_argument(
        "--projection-bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether a projection has a bias, as in the paper's code; its formula has none; default: it has",
    )
    lm = parser.add_argument_group("task lm")
    lm.add_argument("--epochs", type=positive, metavar="N", help="default: the preset's; with --quick 2")
    translation = parser.add_argument_group("task translation")
    translation.add_argument(
        "--pieces", type=positive, default=1500, metavar="N", help="default: %(default)s"
    )
    translation.add_argument("--layers", type=positive, default=2, metavar="N", help="default: %(default)s")
    translation.add_argument(
        "--steps", type=positive, metavar="N", help="default: 2000; with --quick 100; in whole hundreds"
    )
    speed = parser.add_argument_group("task speed")
    speed.add_argument("--rounds", type=positive, metavar="N", help="default: 20; with --quick 3")
    _options.add_threads(parser, default=1)


def main(args: argparse.Namespace) -> int:
    """Runs a task; returns the exit code."""
    require(
        sklearn="scikit-learn", scipy="scipy", matplotlib="matplotlib", tqdm="tqdm", safetensors="safetensors"
    )
    known = list(_ARMS[args.task])
    wrong = [arm for arm in args.arms or () if arm not in known]
    if wrong:
        raise Refusal(
            f"--arms must be of {', '.join(known)} with --task {args.task}, got {', '.join(wrong)}; leave"
            " them out"
        )
    args.arms = list(dict.fromkeys(args.arms or known))
    return TASKS[args.task](args)
