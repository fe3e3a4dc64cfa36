"""Mean and covariance of the rows of a table, beside the ways to write them today."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import (
    SAME_WORK,
    DeviceType,
    Yardstick,
    compiler,
    make_product,
    makers_of_ours,
    our_others,
)
from fastkit.ops.moments import KERNELS


def case(
    N: int,
    D: int,
    *,
    weights: bool = False,
    warm: bool = False,
    compile: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """In float32; the floor is a product of N D^2 multiply-adds, of which symmetry makes half superfluous."""
    return Case(
        op="moments",
        shape=f"{N}x{D}{' weights' if weights else ''}",
        direction="fwd",
        floor_bytes=4 * (N * D + D * D),
        contest=partial(_Covariance, (N, D), weights, compile, device),
        warm=warm,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
        peers=("numpy",),
    )


class _Covariance:
    """Mean, and scatter over count."""

    def __init__(self, size: tuple[int, int], weights: bool, compile: bool, device: DeviceType) -> None:
        self.size = size
        self.weights = weights
        self.compile = compile
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Columns whose means are as large as their deviations, and weights."""
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        N, D = self.size
        x = randn(N, D).add_(randn(D))
        return x, torch.rand(N, generator=generator, device=self.device) if self.weights else None

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        N, D = self.size
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, lambda impl: self.call(partial(_ours, impl=impl))),
            SAME_WORK: partial(make_product, N * D * D, self.device),
            "centred mm": partial(self.call, _centred),
            "mm minus outer": partial(self.call, _minus_outer),
            "torch.cov": partial(self.call, _by_cov),
        }
        if self.device == "cpu":
            makers["numpy.cov"] = self.make_numpy
        if self.compile:
            makers["compiled"] = self.make_compiled
        return makers

    def call(self, form: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]) -> Call:
        return partial(form, *self.inputs)

    def make_compiled(self) -> Call:
        call = self.call(compiler(self.device)(_centred))
        call()
        return call

    def make_numpy(self) -> Call:
        rows, weights = self.inputs
        x, w = rows.numpy(), None if weights is None else weights.numpy()
        options = {"rowvar": False, "ddof": 0, "aweights": w, "dtype": np.float32}
        return lambda: (np.average(x, 0, w), np.cov(x, **options))

    def error(self, result: Any) -> float:
        """The largest in mean and covariance, relative to the largest value of each."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        errors = [
            (torch.as_tensor(actual).double() - want).abs().amax() / want.abs().amax()
            for actual, want in zip(result, self.expected, strict=True)
        ]
        return float(torch.stack(errors).amax())

    @cached_property
    def expected(self) -> Sequence[Tensor]:
        x, w = self.inputs
        return _centred(x.double(), None if w is None else w.double())


def _ours(x: Tensor, w: Tensor | None, *, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    result = ops.moments(x, weights=w, impl=impl)
    return result.mean, result.covariance(0)


def _centred(x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    if w is None:
        mean, count = x.mean(0), len(x)
        c = x - mean
    else:
        count = w.sum()
        mean = (w @ x) / count
        c = (x - mean).mul_(w.sqrt().unsqueeze(1))
    return mean, (c.T @ c).div_(count)


def _minus_outer(x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without a centred copy; of means that are large beside the deviations it loses the digits."""
    weighted, count = (x, len(x)) if w is None else (w.unsqueeze(1) * x, w.sum())
    mean = weighted.sum(0) / count
    return mean, (weighted.T @ x).div_(count).addr_(mean, mean, alpha=-1)


def _by_cov(x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    mean = x.mean(0) if w is None else (w @ x) / w.sum()
    return mean, torch.cov(x.T, correction=0, aweights=w)
