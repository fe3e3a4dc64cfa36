"""The best keys of each query by CSLS, beside the same in three searches, or of all scores at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.cases.topk_similarity_search import (
    ROWS,
    TOLERANCE,
    Block,
    K,
    Result,
    Tables,
    best,
    by_blocks,
)
from fastkit.bench.contest import SAME_WORK, DeviceType, makers_of_ours, our_others
from fastkit.ops.topk_similarity import KERNELS


def case(
    n: int, m: int, D: int, *, warm: bool = False, compile: bool = True, device: DeviceType = "cpu"
) -> Case:
    """n queries in m keys, means over as many neighbors as keys are chosen; the floor is two products.

    One is of the means, of which both can be taken from it, and one of the choice; on a GPU in bfloat16.
    """
    return Case(
        op="csls_topk",
        shape=f"{n}x{m}x{D}",
        direction="fwd",
        floor_bytes=4 * (n + m) * D + 12 * n * K,
        contest=partial(_Csls, (n, m, D), compile, torch.float32, device),
        warm=warm,
        tolerance=TOLERANCE,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
    )


class _Csls(Tables):
    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, lambda impl: self.call(_ours, impl=impl)),
            SAME_WORK: partial(self.make_product, 2),
            "three searches": partial(self.call, _by_searches),
        }
        if self.has_whole:
            makers["one mm, whole"] = partial(self.call, _whole)
        if self.compile:
            makers["compiled"] = partial(self.make_compiled, _by_searches)
        return makers

    @cached_property
    def scores(self) -> Tensor:
        queries, keys = (normalize(t.double()) for t in self.inputs)
        cosines = queries[self.rows] @ keys.T
        of_keys = torch.cat([_mean(block @ queries.T) for block in keys.split(ROWS)])
        return 2 * cosines - _mean(cosines).unsqueeze(1) - of_keys


def _mean(scores: Tensor) -> Tensor:
    """Of the best of each row."""
    return scores.topk(K).values.mean(1)


def _ours(queries: Tensor, keys: Tensor, *, impl: Impl | None = None) -> Result:
    return ops.csls_topk(queries, keys, K, neighbors=K, impl=impl)


def _by_searches(queries: Tensor, keys: Tensor, *, block: Block = best) -> Result:
    queries, keys = normalize(queries), normalize(keys)
    of_queries = by_blocks(queries, keys, None, block)[0].mean(1, keepdim=True)
    of_keys = by_blocks(keys, queries, None, block)[0].mean(1)
    values, indices = by_blocks(queries, keys, -of_keys / 2, block)
    return 2 * values - of_queries, indices


def _whole(queries: Tensor, keys: Tensor) -> Result:
    """One product, and all scores in memory; columns are searched as rows of copies."""
    scores = normalize(queries) @ normalize(keys).T
    of_queries = _mean(scores).unsqueeze(1)
    of_keys = torch.cat([_mean(columns.T.contiguous()) for columns in scores.split(ROWS, 1)])
    values, indices = scores.sub_(of_keys / 2).topk(K)
    return 2 * values - of_queries, indices
