"""The best keys of each query by product or cosine, beside PyTorch's mm and topk, and packages for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import (
    SAME_WORK,
    DeviceType,
    Yardstick,
    compiler,
    load,
    make_product,
    makers_of_ours,
    our_others,
)
from fastkit.ops.topk_similarity import KERNELS

K = 10
ROWS = 2000  # of queries, whose scores exist at a time; it divides large tables: one shape is compiled
PACKAGES = ("scikit-learn", "faiss-cpu")
TOLERANCE = 1e-5  # of scores; a worse key than there is shows as the score that it lacks
Metric = Literal["dot", "cosine"]
Result = tuple[Tensor, Tensor]
Block = Callable[[Tensor, Tensor, Tensor | None], Result]


def case(
    n: int,
    m: int,
    D: int,
    *,
    metric: Metric = "dot",
    warm: bool = False,
    compile: bool = True,
    packages: bool = True,
    dtype: torch.dtype = torch.float32,
    device: DeviceType = "cpu",
) -> Case:
    """n queries in m keys; the floor is a product of n m D multiply-adds, on a GPU in bfloat16.

    That of one query is a copy of as many bytes as the tables have, for the product waits for memory.
    """
    floor = SAME_WORK if n > 1 else ""
    names = "" if metric == "dot" else f" {metric}", " bf16" if dtype == torch.bfloat16 else ""
    return Case(
        op="topk_similarity",
        shape=f"{n}x{m}x{D}{''.join(names)}",
        direction="fwd",
        floor_bytes=dtype.itemsize * (n + m) * D + 12 * n * K,
        contest=partial(_Search, (n, m, D), metric, compile, packages, dtype, device),
        warm=warm,
        tolerance=TOLERANCE,
        yardsticks=our_others(device, KERNELS) | ({floor} if floor else set()),
        floor=floor,
        device=device,
        peers=PACKAGES,
    )


class Tables:
    """Queries and keys, calls on them, and the error of a result: what it says of some queries."""

    def __init__(
        self, size: tuple[int, int, int], compile: bool, dtype: torch.dtype, device: DeviceType
    ) -> None:
        self.size = size
        self.compile = compile
        self.dtype = dtype
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> Result:
        n, m, D = self.size
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        return randn(n, D).to(self.dtype), randn(m, D).to(self.dtype)

    def call(self, form: Callable[..., Result], **options: Any) -> Call:
        return partial(form, *self.inputs, **options)

    def make_product(self, sweeps: int) -> Call:
        n, m, D = self.size
        dtype = torch.bfloat16 if self.device == "cuda" else self.dtype
        return make_product(sweeps * n * m * D, self.device, dtype)

    def make_compiled(self, form: Callable[..., Result], **options: Any) -> Call:
        """A form whose blocks are compiled."""
        call = self.call(form, block=compiler(self.device)(best), **options)
        call()
        return call

    @property
    def has_whole(self) -> bool:
        """Whether all scores are more than a block, and there is room for them."""
        n, m, _ = self.size
        return n > ROWS and n * m <= 2 ** (32 if self.device == "cuda" else 29)

    def error(self, result: Any) -> float:
        """Of values from their keys' scores, and of these from the best; relative to the largest score."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        values, indices = (torch.as_tensor(t)[self.rows].to(self.scores.device) for t in result)
        if indices.min() < 0 or indices.max() >= self.size[1] or not indices.sort(1).values.diff().all():
            return math.inf
        chosen = self.scores.gather(1, indices)
        errors = torch.stack([values.double() - chosen, chosen - self.scores.topk(K).values])
        return float(errors.abs().amax() / self.scores.abs().amax())

    @property
    def rows(self) -> Tensor:
        n = self.size[0]
        return torch.linspace(0, n - 1, min(n, 64)).long()

    @cached_property
    def scores(self) -> Tensor:
        """Of those queries with all keys, in float64."""
        raise NotImplementedError


class _Search(Tables):
    def __init__(
        self,
        size: tuple[int, int, int],
        metric: Metric,
        compile: bool,
        packages: bool,
        dtype: torch.dtype,
        device: DeviceType,
    ) -> None:
        super().__init__(size, compile, dtype, device)
        self.metric: Metric = metric
        self.packages = packages

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers = makers_of_ours(
            self.device, KERNELS, lambda impl: self.call(_ours, metric=self.metric, impl=impl)
        )
        if self.size[0] > 1:
            makers[SAME_WORK] = partial(self.make_product, 1)
        makers["mm + topk"] = partial(self.call, _by_blocks, metric=self.metric)
        if self.has_whole:
            makers["mm + topk, whole"] = partial(self.call, _whole, metric=self.metric)
        if self.compile:
            makers["compiled"] = partial(self.make_compiled, _by_blocks, metric=self.metric)
        if self.packages and self.device == "cpu":
            makers |= {"sklearn": self.make_sklearn, "faiss": self.make_faiss}
        return makers

    @property
    def prepared(self) -> Result:
        """What packages are given: of cosines the normalised tables."""
        return _prepared(*self.inputs, self.metric)

    def make_sklearn(self) -> Call:
        """By distance; a column more makes all keys equally long, so that it orders as the product does."""
        neighbors = load("sklearn.neighbors")
        queries, keys = self.prepared
        squares = keys.square().sum(1)
        most = squares.amax()
        augmented = torch.cat([keys, (most - squares).sqrt().unsqueeze(1)], 1).numpy()
        points = torch.cat([queries, queries.new_zeros(len(queries), 1)], 1).numpy()
        search = neighbors.NearestNeighbors(n_neighbors=K, algorithm="brute").fit(augmented)
        offset = (queries.square().sum(1, keepdim=True) + most).double()

        def call() -> Result:
            distances, indices = map(torch.from_numpy, search.kneighbors(points))
            return (offset - distances.double().square()) / 2, indices

        return call

    def make_faiss(self) -> Call:
        faiss = load("faiss")
        queries, keys = (t.numpy() for t in self.prepared)
        index = faiss.IndexFlatIP(keys.shape[1])
        index.add(keys)
        return lambda: index.search(queries, K)

    @cached_property
    def scores(self) -> Tensor:
        queries, keys = (t.double() for t in self.inputs)
        queries, keys = _prepared(queries[self.rows], keys, self.metric)
        return queries @ keys.T


def _ours(queries: Tensor, keys: Tensor, *, metric: Metric, impl: Impl | None = None) -> Result:
    return ops.topk_similarity(queries, keys, K, metric=metric, impl=impl)


def _prepared(queries: Tensor, keys: Tensor, metric: Metric) -> Result:
    return (queries, keys) if metric == "dot" else (normalize(queries), normalize(keys))


def best(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Result:
    """The values and indices of the best keys, from the matrix of scores."""
    if queries.dtype != torch.float32:
        scores = torch.mm(queries, keys.T, out_dtype=torch.float32)
    elif bias is None:
        scores = queries @ keys.T
    else:
        scores = torch.addmm(bias, queries, keys.T)
    values, indices = scores.topk(K)
    return values, indices


def by_blocks(queries: Tensor, keys: Tensor, bias: Tensor | None, block: Block) -> Result:
    """The same, of some queries at a time."""
    parts = [block(rows, keys, bias) for rows in queries.split(ROWS)]
    values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, indices


def _by_blocks(queries: Tensor, keys: Tensor, *, metric: Metric, block: Block = best) -> Result:
    return by_blocks(*_prepared(queries, keys, metric), None, block)


def _whole(queries: Tensor, keys: Tensor, *, metric: Metric) -> Result:
    return best(*_prepared(queries, keys, metric), None)
