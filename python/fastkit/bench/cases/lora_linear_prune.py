"""Pruning A by what the layer sees: the norms of the columns of x, then the least entries of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import DeviceType

_RATIO = 0.5


def case(N: int, D: int, R: int, *, warm: bool = False, device: DeviceType = "cpu") -> Case:
    """Half of A (R, D), by x (N, D); the floor is one read of x."""
    element = 2 if device == "cuda" else 4
    return Case(
        op="prune_rows_",
        shape=f"{N}x{D} r{R}{' bf16' if device == 'cuda' else ''}",
        direction="fwd",
        floor_bytes=element * N * D,
        contest=partial(_Pruning, (N, D, R), device),
        warm=warm,
        device=device,
    )


class _Pruning:
    """What is kept, and the norms."""

    def __init__(self, size: tuple[int, int, int], device: DeviceType) -> None:
        self.size = size
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        N, D, R = self.size
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        x = torch.randn(N, D, generator=generator, device=self.device).to(dtype)
        return x, torch.randn(R, D, generator=generator, device=self.device)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        return {
            "fastkit": partial(self.call, _ours),
            "sort": partial(self.call, _by_sort),
            "topk": partial(self.call, _by_topk),
            "kthvalue": partial(self.call, _by_kthvalue),
        }

    def call(self, form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Call:
        """On a fresh copy of A: in one that is pruned already the threshold is found at once."""
        x, a = self.inputs
        return lambda: form(x, a.clone())

    def error(self, result: Any) -> float:
        """Of the norms; infinite if other entries are kept than by these norms."""
        mask, norm = result
        _, a = self.inputs
        if not torch.equal(mask, reference.prune_rows_(a.clone(), norm, _RATIO)):
            return math.inf
        return float(((norm.double() - self.norm) / self.norm).abs().amax())

    @cached_property
    def norm(self) -> Tensor:
        return self.inputs[0].double().square().sum(0).sqrt()


def _ours(x: Tensor, a: Tensor, *, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    norm = ops.column_norms(x, impl=impl)
    return ops.prune_rows_(a, norm, _RATIO, impl=impl), norm


def _by_sort(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    norm = _norm(x)
    pruned = (a.abs() * norm).argsort(dim=1, stable=True)[:, : _count(a)]
    return _keep(a, torch.ones_like(a, dtype=torch.bool).scatter_(1, pruned, False)), norm


def _by_topk(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    norm = _norm(x)
    pruned = (a.abs() * norm).topk(_count(a), 1, largest=False, sorted=False).indices
    return _keep(a, torch.ones_like(a, dtype=torch.bool).scatter_(1, pruned, False)), norm


def _by_kthvalue(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Right where no two scores are equal."""
    norm = _norm(x)
    score = a.abs() * norm
    return _keep(a, score > score.kthvalue(_count(a), 1, keepdim=True).values), norm


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)


def _count(a: Tensor) -> int:
    return math.floor(_RATIO * a.shape[1])


def _keep(a: Tensor, mask: Tensor) -> Tensor:
    a.mul_(mask)
    return mask
