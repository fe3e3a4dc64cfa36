"""The whole of word translation beside PyTorch, and the reader of word vectors beside Python.

    python benchmarks/word_translation.py fit --data FOLDER     a default fit, by our ops and by PyTorch's
    python benchmarks/word_translation.py read                  text of vectors, by load_vectors and by loops

A fit takes longer than a contestant of ``python -m fastkit bench`` may. Both run the same code of
``fastkit.methods.word_translation``; in the second its ops are batched PyTorch forms with buffers that are
used again. They take turns, and what is printed are medians, and the accuracy of both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastkit import ops
from fastkit.bench.cases.icp_epoch import Maps, batched, best_by_max
from fastkit.methods.word_translation import WordTranslator, load_vectors, row_pairs, save_vectors
from fastkit.ops import ICPEpoch
from fastkit.recipes import _words
from fastkit.reference import TopK

SCORES = 2**26  # of a product at a time
ROWS = 2000  # of queries, likewise


# The ops by PyTorch


class Epoch:
    """ops.icp_epoch: bmm and max over as many restarts as there is a buffer for; other orders of visit."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(
        self, source: Tensor, target: Tensor, w_xy: Tensor, w_yx: Tensor, seeds: Tensor, **_: object
    ) -> ICPEpoch:
        n, m = len(source), len(target)
        together = max(1, SCORES // (n * m))
        results = [
            self.some(source, target, xy, yx)
            for xy, yx in zip(w_xy.split(together), w_yx.split(together), strict=True)
        ]
        return ICPEpoch(*(torch.cat(parts) for parts in zip(*results, strict=True)))

    def some(self, source: Tensor, target: Tensor, w_xy: Tensor, w_yx: Tensor) -> tuple[Tensor, ...]:
        R, n, m = len(w_xy), len(source), len(target)
        if self.buffer.numel() < R * n * m:
            self.buffer = torch.empty(R * n * m)
        scores = self.buffer[: R * n * m]

        def best(rows: Tensor, keys: Tensor, biases: Tensor) -> Tensor:
            return best_by_max(rows, keys, biases, out=scores.view(R, len(rows), keys.shape[1]))

        orders: Maps = (self.orders(R, n), self.orders(R, m))
        *maps, there, back = batched(source, target, w_xy, w_yx, orders, best=best)
        costs = [
            (rows - keys.gather(1, chosen.unsqueeze(2).expand(-1, -1, rows.shape[1]))).square().sum(2).mean(1)
            for rows, keys, chosen in (
                (source, target @ w_yx.mT, there),
                (target, source @ w_xy.mT, back),
            )
        ]
        mutual = (back.gather(1, there) == torch.arange(n)).sum(1)
        return *maps, there, back, torch.minimum(*costs), mutual

    def orders(self, R: int, n: int) -> Tensor:
        return torch.rand(R, n, generator=self.generator).argsort(1)


def topk(queries: Tensor, keys: Tensor, k: int, *, key_bias: Tensor | None = None, **_: object) -> TopK:
    """A product of some queries with all keys, and torch.topk."""
    found = []
    for block in queries.split(ROWS):
        scores = block @ keys.T
        if key_bias is not None:
            scores += key_bias
        found.append(scores.topk(k) if k > 1 else scores.max(1, keepdim=True))
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def csls(queries: Tensor, keys: Tensor, k: int, *, neighbors: int = 10, **_: object) -> TopK:
    queries, keys = normalize(queries), normalize(keys)
    of_queries = topk(queries, keys, neighbors).values.mean(1, keepdim=True)
    of_keys = topk(keys, queries, neighbors).values.mean(1)
    values, indices = topk(queries, keys, k, key_bias=-of_keys / 2)
    return TopK(2 * values - of_queries, indices)


def procrustes(source: Tensor, target: Tensor, **_: object) -> Tensor:
    u, _s, vh = torch.linalg.svd(target.T @ source, full_matrices=False)
    return u @ vh


@contextmanager
def by_pytorch() -> Iterator[None]:
    forms = {"icp_epoch": Epoch(), "topk_similarity": topk, "csls_topk": csls, "procrustes": procrustes}
    with patch.multiple(ops, **forms):
        yield


# The commands


def fit(args: argparse.Namespace) -> None:
    languages = _words.load(args.data)
    pairs = None
    if languages.test is not None:
        pairs = row_pairs(languages.test, languages.source.words or (), languages.target.words or ()).pairs
    seconds: dict[str, list[dict[str, float]]] = {"fastkit": [], "PyTorch": []}
    for seed in range(args.rounds):
        for name, context in (("fastkit", nullcontext()), ("PyTorch", by_pytorch())):
            with context:
                start = time.perf_counter()
                translator = WordTranslator(seed=seed, progress=False)
                translator.fit(languages.source.vectors, languages.target.vectors)
                whole = time.perf_counter() - start
            seconds[name].append({**translator.timings_, "whole": whole})
            right = "" if pairs is None else f", P@1 {translator.score(pairs, (1,)).precision[1]:.3f}"
            print(f"{name}, seed {seed}: {whole:.1f} s, converged {translator.converged_}{right}", flush=True)
    print(f"\n{'stage':12}{'fastkit s':>10}{'PyTorch s':>11}{'ratio':>8}")
    for stage in seconds["fastkit"][0]:
        ours, theirs = (statistics.median(times[stage] for times in seconds[name]) for name in seconds)
        print(f"{stage:12}{ours:10.2f}{theirs:11.2f}{theirs / max(ours, 1e-9):8.2f}")


def by_floats(path: Path) -> tuple[list[str], Tensor]:
    words, rows = [], []
    with path.open(encoding="utf8") as file:
        next(file)
        for line in file:
            word, *numbers = line.rstrip("\n").split(" ")
            words.append(word)
            rows.append([float(number) for number in numbers])
    return words, torch.tensor(rows)


def by_numpy(path: Path) -> tuple[list[str], Tensor]:
    """A line at a time, its numbers by numpy."""
    words, rows = [], []
    with path.open(encoding="utf8") as file:
        next(file)
        for line in file:
            word, numbers = line.rstrip("\n").split(" ", 1)
            words.append(word)
            rows.append(np.fromstring(numbers, sep=" ", dtype=np.float32))
    return words, torch.from_numpy(np.stack(rows))


def by_load_vectors(path: Path) -> tuple[list[str], Tensor]:
    found = load_vectors(path)
    return found.words or [], found.vectors


def read(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for words in (args.words // 10, args.words):
            path = Path(folder, f"{words}.vec")
            table = torch.randn(words, args.columns, generator=torch.Generator().manual_seed(0)).mul_(0.1)
            table = (table * 1e5).round() / 1e5  # five digits, as files of fastText have
            save_vectors(path, [f"word{i}" for i in range(words)], table)
            readers: Iterable[Callable[[Path], tuple[list[str], Tensor]]] = [
                by_load_vectors,
                by_floats,
                by_numpy,
            ]
            readers = list(readers) if words < args.words else [by_load_vectors]
            print(f"{words} x {args.columns}, {path.stat().st_size / 1e6:.0f} MB")
            times: dict[str, list[float]] = {reader.__name__: [] for reader in readers}
            for _ in range(args.rounds):
                for reader in readers:
                    start = time.perf_counter()
                    found, vectors = reader(path)
                    times[reader.__name__].append(time.perf_counter() - start)
                    assert len(found) == words and torch.allclose(vectors, table, atol=1e-7), reader
            ours = statistics.median(times["by_load_vectors"])
            for name, of in times.items():
                print(f"  {name:16}{statistics.median(of):8.3f} s{statistics.median(of) / ours:8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("fit")
    command.add_argument("--data", type=Path, required=True)
    command.set_defaults(run=fit)
    command = commands.add_parser("read")
    command.add_argument("--words", type=int, default=200000)
    command.add_argument("--columns", type=int, default=300)
    command.set_defaults(run=read)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
