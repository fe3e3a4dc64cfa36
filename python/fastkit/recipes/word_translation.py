"""Word translation without a dictionary: two tables of word vectors in, translations and mapped vectors out.

``python -m fastkit run word_translation``; docs/recipes/word_translation.md tells what it does and found.
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkit._command import Refusal, positive, require
from fastkit._sync import replace_file
from fastkit._threads import threads
from fastkit.methods.word_translation import RowPairs, Vectors, WordTranslator, row_pairs, save_vectors
from fastkit.recipes import _options, _words
from fastkit.recipes._experiment import Run
from fastkit.recipes._figures import Row, finite
from fastkit.recipes._word_arms import ARMS
from fastkit.recipes._words import Languages

__all__ = ["add_arguments", "load_model", "main"]

KS = (1, 5, 10)
_QUICK = {"restarts": 8, "epochs": 30, "halvings": (20,)}  # of all arms with restarts
_BLOCK = 4096  # words that are translated at a time

load_model: Callable[..., WordTranslator] = WordTranslator.load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run word_translation``."""
    _options.add_arguments(parser, out="fastkit-word-translation")
    _options.add_device(parser)
    parser.add_argument("--source", type=Path, metavar="FILE", help="word vectors, in the place of --data")
    parser.add_argument("--target", type=Path, metavar="FILE", help="those that they are translated to")
    parser.add_argument("--dictionary", type=Path, metavar="FILE", help="with --source: pairs to measure by")
    parser.add_argument("--from", dest="source_name", metavar="NAME", help="with --data: which is the source")
    parser.add_argument(
        "--max-words", type=positive, default=200000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["robust"], metavar="ARM",
        help=f"of {', '.join(ARMS)}; default: robust",
    )  # fmt: skip
    parser.add_argument("--restarts", type=positive, metavar="N", help="default: the arm's")
    parser.add_argument(
        "--translations", type=positive, default=5, metavar="K", help="of each word, in dictionary.tsv"
    )
    parser.add_argument(
        "--mapped", choices=("npz", "vec", "vec.gz", "safetensors", "none"), default="npz",
        help="the file of mapped vectors; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--query", nargs="+", default=[], metavar="WORD", help="print their translations")
    _options.add_threads(parser)


def main(args: argparse.Namespace) -> int:
    """Aligns the tables by each arm from each seed, and writes what came out; returns the exit code."""
    require(matplotlib="matplotlib", tqdm="tqdm", safetensors="safetensors")
    device = _options.device_of(args)
    languages = _languages(args)
    _check(args, languages)
    seeds = _options.seeds_of(args, (0,))
    config = {"restarts": args.restarts, **(_QUICK if args.quick else {})}
    with (
        threads(args.threads or torch.get_num_threads()),
        Run(
            "word_translation", args.out, config=config, data=languages.facts(), resume=args.resume,
            packages=["safetensors"], device=device, unit="restart", suffix=".safetensors",
        ) as run,
    ):  # fmt: skip
        rows = [_row(run, languages, arm, seed, device) for arm in args.arms for seed in seeds]
        metrics = run.write(
            run.finished("test", seeds),
            seeds,
            picture=partial(_draw, rows=rows),
            **_more(run, languages, args.arms),
        )
        translator = load_model(run.model_path(*rows[0][:3]), device=device)
        written = run.written(*_export(run.out, languages, translator, args))
    print(_table(metrics))
    for word in args.query:
        print(_answer(translator, languages, word, args.translations))
    print(f"\n{written}")
    return 0


def _languages(args: argparse.Namespace) -> Languages:
    if args.source is None and args.target is None:
        if args.dictionary is not None:
            raise Refusal("--dictionary must be with --source and --target; put it into the folder of --data")
        if args.data is None:
            return _words.generated()
        return _words.load(args.data, max_words=args.max_words, source=args.source_name)
    if args.source is None or args.target is None or args.data is not None:
        raise Refusal("--source and --target must be given both, and without --data")
    return _words.load_files(args.source, args.target, args.dictionary, max_words=args.max_words)


def _check(args: argparse.Namespace, languages: Languages) -> None:
    """Refuses before --out is made."""
    lacking = [arm for arm in args.arms if ARMS[arm].supervised and languages.train is None]
    if lacking:
        raise Refusal(
            f"--arms {', '.join(lacking)} must have a training dictionary, got none; leave them out"
        )
    if args.translations > len(languages.target):
        raise Refusal(
            f"--translations must be at most {len(languages.target)}, the words of"
            f" {languages.names[1]}, got {args.translations}"
        )
    for entries in (languages.test, languages.train):
        if entries is not None:
            _pairs(languages, entries)
    unknown = [word for word in args.query if word not in languages.source]
    if unknown:
        raise Refusal(f"--query must be words of {languages.names[0]}, got {', '.join(unknown)}")


def _pairs(languages: Languages, entries: _words.Entries) -> RowPairs:
    try:
        return row_pairs(entries, languages.source.words or (), languages.target.words or ())
    except ValueError as error:
        raise Refusal(str(error)) from error


# A row


def _row(run: Run, languages: Languages, arm: str, seed: int, device: torch.device) -> Row:
    """The finished row, fitted now if it was not before; a fit that was killed goes on."""
    key = "test", arm, seed
    if key in run.rows:
        return run.rows[key]
    checkpoint = run.out / "training" / f"{arm}-{seed}"
    options = {"seed": seed, **ARMS[arm].options}
    if not ARMS[arm].supervised:
        given = {name: value for name, value in run.config.items() if value is not None}
        options = given | options
    translator = WordTranslator(**options)
    start = time.perf_counter()
    known = None
    if ARMS[arm].supervised:
        known = _pairs(languages, languages.train or []).pairs.to(device)
    tables = languages.source.vectors.to(device), languages.target.vectors.to(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it has not converged is in the table
            translator.fit(*tables, pairs=known, checkpoint=checkpoint)
    except ValueError as error:
        raise Refusal(str(error)) from error
    seconds = max(sum(translator.timings_.values()), time.perf_counter() - start)
    figures, facts = _measured(translator, languages, device)
    facts |= {f"seconds_{stage}": taken for stage, taken in translator.timings_.items()}
    translator.save(run.model_path(*key))
    row = run.append(Row(*key, figures, _curve(translator, languages), seconds, facts))
    shutil.rmtree(checkpoint, ignore_errors=True)
    return row


def _measured(
    translator: WordTranslator, languages: Languages, device: torch.device
) -> tuple[dict[str, float | None], dict[str, float]]:
    figures: dict[str, float | None] = {}
    facts: dict[str, float] = {}
    if languages.test is not None:
        found = _pairs(languages, languages.test)
        pairs = found.pairs.to(device)
        score = translator.score(pairs, KS)
        figures |= {f"p_at_{k}": score.precision[k] for k in KS}
        for retrieval in ("isf", "nn"):
            figures[f"{retrieval}_p_at_1"] = translator.score(pairs, (1,), retrieval=retrieval).precision[1]
        facts |= {"queries": score.queries, "coverage": found.coverage}
    figures |= {
        "criterion": translator.criterion_,
        "control": translator.control_score_,
        "converged": float(translator.converged_),
    }
    return figures, facts


def _curve(translator: WordTranslator, languages: Languages) -> list[dict[str, float | None]]:
    """Of each restart its last cost, and what part of its words that a dictionary has it pairs rightly."""
    costs = translator.restart_costs_.tolist()
    if not costs:
        return [{}]
    right = [None] * len(costs)
    entries = [*(languages.test or ()), *(languages.train or ())]
    if entries:
        right = _accuracies(translator.restart_nearest_.cpu(), _pairs(languages, entries).pairs).tolist()
    others = translator.restart_mutual_.tolist(), translator.restart_epochs_.tolist()
    names = "cost", "mutual", "epochs", "accuracy"
    return [finite(dict(zip(names, point, strict=True))) for point in zip(costs, *others, right, strict=True)]


def _accuracies(nearest: Tensor, pairs: Tensor) -> Tensor:  # (R, n), (P, 2) -> (R,)
    pairs = pairs[pairs[:, 0] < nearest.shape[1]]
    sources, query = pairs[:, 0].unique(return_inverse=True)
    hits = (nearest[:, pairs[:, 0]] == pairs[:, 1]).int()
    right = torch.zeros(len(nearest), len(sources), dtype=torch.int32)
    right.scatter_reduce_(1, query.expand(len(nearest), -1), hits, "amax")
    return right.double().mean(1)


# What comes out


def _export(
    out: Path, languages: Languages, translator: WordTranslator, args: argparse.Namespace
) -> list[str]:
    """dictionary.tsv, and both tables in the space of the target, by the first arm and seed."""
    device = translator.w_xy_.device
    lines = ["\t".join(("source", "rank", "target", "score"))]
    targets: Sequence[str] = languages.target.words or ()
    words = iter(languages.source.words or ())
    for block in languages.source.vectors.split(_BLOCK):
        scores, indices = translator.translate(block.to(device), args.translations)
        for of_scores, of_indices in zip(scores.tolist(), indices.tolist(), strict=True):
            word = next(words)
            for rank, (score, index) in enumerate(zip(of_scores, of_indices, strict=True), 1):
                lines.append(f"{word}\t{rank}\t{targets[index]}\t{score:.5f}")
    replace_file(out / "dictionary.tsv", lambda path: path.write_bytes(("\n".join(lines) + "\n").encode()))
    written = ["dictionary.tsv"]
    if args.mapped != "none":
        own = (languages.source, translator.transform), (languages.target, translator.transform_target)
        for name, (vectors, moved) in zip(languages.names, own, strict=True):
            written.append(f"mapped.{name}.{args.mapped}")
            _save(out / written[-1], vectors, moved(vectors.vectors.to(device)))
    return written


def _save(path: Path, vectors: Vectors, table: Tensor) -> None:
    try:
        save_vectors(path, vectors.words, table)
    except ValueError as error:
        raise Refusal(str(error)) from error


def _answer(translator: WordTranslator, languages: Languages, word: str, count: int) -> str:
    row = languages.source[word].unsqueeze(0).to(translator.w_xy_.device)
    scores, indices = translator.translate(row, count)
    targets = languages.target.words or ()
    found = zip(indices[0].tolist(), scores[0].tolist(), strict=True)
    return f"{word}: " + ", ".join(f"{targets[index]} {score:.3f}" for index, score in found)


def _more(run: Run, languages: Languages, arms: Sequence[str]) -> dict[str, Any]:
    """Of metrics.json, what this recipe adds."""
    facts = {
        f"{row.arm}, seed {row.seed}": {"seconds": row.seconds, **row.facts} for row in run.rows.values()
    }
    return {"arms": {arm: ARMS[arm].summary for arm in arms}, "fits": facts, "languages": languages.names}


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Of each restart the part of its words that it pairs rightly, over its cost; a colour for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        points = [point for point in row.curve if point.get("accuracy") is not None]
        if points:
            of = {name: np.array([point[name] for point in points], dtype=float) for name in points[0]}
            label = f"{row.arm}, seed {row.seed}"
            axes.plot(of["cost"], of["accuracy"], ".", markersize=4, label=label)  # None is NaN
    axes.set(xlabel="cost of a restart in its last epoch", ylabel="words that it pairs rightly")
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def _table(metrics: Mapping[str, Any]) -> str:
    data, figures = metrics["data"], metrics["figures"]
    words = " and ".join(map(str, data["words"]))
    lines = [f"{data['name']}, {words} words, seeds {' '.join(map(str, metrics['seeds']))}: mean over seeds"]
    lines.append(f"  {'':20}" + "".join(f"{name:>12}" for name in figures) + f"{'seconds':>10}")
    for arm in metrics["arms"]:
        cells = "".join(f"{_shown(of.get(arm)):>12}" for of in figures.values())
        times = [fit["seconds"] for name, fit in metrics["fits"].items() if name.startswith(f"{arm}, ")]
        lines.append(f"  {arm:20}{cells}{sum(times) / len(times):10.1f}")
    fits = metrics["fits"].values()
    covered = {fit["coverage"] for fit in fits if "coverage" in fit}
    if covered:
        queries = {int(fit["queries"]) for fit in fits if "queries" in fit}
        lines.append(f"  test dictionary: {max(queries)} words, {max(covered):.1%} of it in both tables")
    return "\n".join(lines)


def _shown(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None or figure["mean"] is None else f"{figure['mean']:.4f}"
