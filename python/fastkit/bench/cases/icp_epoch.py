"""An epoch of iterative closest points, beside batched PyTorch with buffers that are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

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
from fastkit.ops.icp import KERNELS
from fastkit.reference.icp import visit_order

BATCH = 128
LR, BETAS, EPS, CYCLE = 1e-2, (0.5, 0.999), 1e-8, 1e-2
Maps = tuple[Tensor, Tensor]


def case(
    R: int, n: int, D: int, *, warm: bool = False, compile: bool = True, device: DeviceType = "cpu"
) -> Case:
    """R restarts between two tables (n, D); the floor is the products that both searches of each take."""
    return Case(
        op="icp_epoch",
        shape=f"{R}x{n}x{D}",
        direction="fwd",
        floor_bytes=4 * (2 * n * D + 4 * R * D * D) + 16 * R * n,
        contest=partial(_Epoch, (R, n, D), compile, device),
        warm=warm,
        yardsticks=our_others(device, KERNELS) | {SAME_WORK},
        floor=SAME_WORK,
        device=device,
    )


class _Epoch:
    """Tables that differ by a rotation and noise, and maps that are random signs and noise."""

    def __init__(self, size: tuple[int, int, int], compile: bool, device: DeviceType) -> None:
        self.size = size
        self.compile = compile
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        R, n, D = self.size
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        spectrum = torch.linspace(1.5, 0.5, D)
        source, turn = randn(n, D) * spectrum, torch.linalg.qr(randn(D, D)).Q
        target = (source @ turn.T + 0.1 * randn(n, D))[torch.randperm(n)]
        maps = torch.diag_embed(randn(R, D).sign()) + 0.05 * randn(R, D, D)
        tensors = source, target, maps, maps.mT.contiguous(), torch.arange(R)
        return tuple(t.to(self.device) for t in tensors)  # pyright: ignore[reportReturnType]

    @cached_property
    def orders(self) -> tuple[Tensor, Tensor]:
        """(R, n) each: in which order the rows of both tables are visited."""
        (*_, seeds), n = self.inputs, self.size[1]
        orders = (
            torch.stack([visit_order(torch.ones(n, dtype=torch.bool), seed, 0, side) for seed in seeds.cpu()])
            for side in (0, 1)
        )
        return tuple(order.to(self.device) for order in orders)  # pyright: ignore[reportReturnType]

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        R, n, D = self.size
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, self.make_ours),
            SAME_WORK: partial(make_product, 2 * R * n * n * D, self.device),
            "bmm, argmax": partial(self.make_batched, _argmax),
            "bmm, max": partial(self.make_batched, best_by_max),
        }
        if self.compile:
            makers["compiled"] = self.make_compiled
        return makers

    def make_ours(self, impl: Impl | None) -> Call:
        source, target, *rest = self.inputs
        return lambda: ops.icp_epoch(source, target, *rest, epoch=0, batch_size=BATCH, impl=impl)[:4]

    def make_batched(self, best: Callable[..., Tensor]) -> Call:
        source, target, w_xy, w_yx, _ = self.inputs
        R, n, _ = self.size
        scores = source.new_empty(R, n, n)
        return lambda: batched(source, target, w_xy, w_yx, self.orders, best=partial(best, out=scores))

    def make_compiled(self) -> Call:
        """The whole epoch, but for the loop over steps, of which one is compiled."""
        source, target, w_xy, w_yx, _ = self.inputs
        compile = compiler(self.device)
        best, step = compile(_scores_max), compile(_step)

        def call() -> tuple[Tensor, ...]:
            return batched(source, target, w_xy, w_yx, self.orders, best=best, step=step)

        call()
        return call

    def error(self, result: Any) -> float:
        """Of chosen rows from the nearest, and of the maps from steps with what was chosen, in float64."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        w_xy, w_yx, nearest_target, nearest_source = (t.cpu() for t in result)
        source, target, xy, yx = (t.cpu().double() for t in self.inputs[:4])
        lacks = [
            _lack(source, target @ yx.mT, nearest_target),
            _lack(target, source @ xy.mT, nearest_source),
        ]
        orders = self.orders[0].cpu(), self.orders[1].cpu()
        maps = _steps(source, target, (xy, yx), orders, (nearest_target, nearest_source))
        errors = [float((w - of).abs().amax()) for w, of in zip((w_xy, w_yx), maps, strict=True)]
        return max(lacks + errors)


def _lack(rows: Tensor, mapped: Tensor, nearest: Tensor) -> float:
    """By how much a row's nearest is farther than another, relative to the mean; of every restart."""
    if nearest.min() < 0 or nearest.max() >= mapped.shape[1]:
        return math.inf
    worst = 0.0
    for keys, chosen in zip(mapped, nearest, strict=True):
        distances = torch.cdist(rows, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
        lack = distances.gather(1, chosen.unsqueeze(1)).squeeze(1) - distances.amin(1)
        worst = max(worst, float(lack.amax() / distances.mean()))
    return worst


def _argmax(rows: Tensor, keys: Tensor, biases: Tensor, *, out: Tensor) -> Tensor:
    torch.bmm(rows.expand(len(keys), *rows.shape), keys.mT, out=out)
    return out.add_(biases.unsqueeze(1)).argmax(2)


def best_by_max(rows: Tensor, keys: Tensor, biases: Tensor, *, out: Tensor) -> Tensor:
    torch.bmm(rows.expand(len(keys), *rows.shape), keys.mT, out=out)
    return out.add_(biases.unsqueeze(1)).max(2).indices


def _scores_max(rows: Tensor, keys: Tensor, biases: Tensor) -> Tensor:
    return (rows @ keys.mT + biases.unsqueeze(1)).max(2).indices


def batched(
    source: Tensor,
    target: Tensor,
    w_xy: Tensor,
    w_yx: Tensor,
    orders: Maps,
    *,
    best: Callable[..., Tensor],
    step: Any = None,
) -> tuple[Tensor, ...]:
    """All restarts at once; the orders of visit are given."""
    keys = target @ w_yx.mT
    nearest_target = best(source, keys, keys.square().sum(2) / -2)
    keys = source @ w_xy.mT
    nearest_source = best(target, keys, keys.square().sum(2) / -2)
    nearest = nearest_target, nearest_source
    maps = _steps(source, target, (w_xy, w_yx), orders, nearest, step=step or _step)
    return *maps, nearest_target, nearest_source


def _steps(
    source: Tensor, target: Tensor, maps: Maps, orders: Maps, nearest: Maps, *, step: Any = None
) -> Maps:
    """Those of an epoch, with batches as the orders have them, of rows and what they are paired with."""
    step = step or _step
    batch = min(BATCH, len(source), len(target))
    state = [torch.zeros_like(w) for w in (*maps, *maps)]
    for t in range(min(len(source), len(target)) // batch):
        i, j = (order[:, t * batch : (t + 1) * batch] for order in orders)
        rows = source[i], target[j], target[nearest[0].gather(1, i)], source[nearest[1].gather(1, j)]
        left = [source.new_tensor(1 - beta ** (t + 1)) for beta in BETAS]  # as numbers each would be compiled
        w_xy, w_yx, *state = step(*rows, *maps, *state, *left)
        maps = w_xy, w_yx
    return maps


def _step(
    x: Tensor,
    y: Tensor,
    y_of_x: Tensor,
    x_of_y: Tensor,
    w_xy: Tensor,
    w_yx: Tensor,
    m_xy: Tensor,
    m_yx: Tensor,
    v_xy: Tensor,
    v_yx: Tensor,
    left1: Tensor,
    left2: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients from four moments of the batch, and Adam."""
    count = x.shape[1]
    xx, yx, yy, xy = (a.mT @ b / count for a, b in ((x, x), (y_of_x, x), (y, y), (x_of_y, y)))
    mapped_x, mapped_y = w_xy @ xx, w_yx @ yy
    p, q = w_yx @ mapped_x - xx, w_xy @ mapped_y - yy
    g_xy = mapped_x - yx + CYCLE * (w_yx.mT @ p + q @ w_yx.mT)
    g_yx = mapped_y - xy + CYCLE * (p @ w_xy.mT + w_xy.mT @ q)
    beta1, beta2 = BETAS
    m_xy, m_yx = beta1 * m_xy + (1 - beta1) * g_xy, beta1 * m_yx + (1 - beta1) * g_yx
    v_xy, v_yx = beta2 * v_xy + (1 - beta2) * g_xy**2, beta2 * v_yx + (1 - beta2) * g_yx**2
    w_xy = w_xy - LR / left1 * m_xy / ((v_xy / left2).sqrt() + EPS)
    w_yx = w_yx - LR / left1 * m_yx / ((v_yx / left2).sqrt() + EPS)
    return w_xy, w_yx, m_xy, m_yx, v_xy, v_yx
