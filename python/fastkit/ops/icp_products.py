"""icp_epoch by products of PyTorch, for tables that are too wide for the kernels of csrc/cuda/icp.cu.

Both maps are one batch of two matrices, so that a step is six products and some passes over (2, D, D).
Restarts run one after another: how many matrices are in a batch may decide how a product is summed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkit.ops.procrustes_iterations import ieee_products
from fastkit.ops.topk_similarity import topk_similarity
from fastkit.reference.icp import ICPEpoch, philox

_WORD = 0xFFFFFFFF


def icp_epoch(
    source: Tensor,  # (n, D)
    target: Tensor,  # (m, D)
    w_xy: Tensor,  # (R, D, D)
    w_yx: Tensor,  # (R, D, D)
    seeds: Tensor,  # (R,)
    *,
    epoch: int,
    batch_size: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    cycle_weight: float,
    pairs: tuple[Tensor, Tensor] | None = None,  # (R, n), (R, m)
    mutual_only: bool = False,
) -> ICPEpoch:
    """As ``ops.icp_epoch``, whose arguments have been checked. Waits for the device if ``mutual_only``."""
    n, m = len(source), len(target)
    tables = torch.cat([source, target])
    maps = torch.stack([w_xy, w_yx], 1)  # (R, 2, D, D)
    with ieee_products(source):
        there, back, means = [], [], []
        for r, (of_x, of_y) in enumerate(maps):
            keys = target @ of_y.T, source @ of_x.T
            there.append(_nearest(source, keys[0]) if pairs is None else pairs[0][r])
            back.append(_nearest(target, keys[1]) if pairs is None else pairs[1][r])
            means += [_mean_distance(source, keys[0], there[r]), _mean_distance(target, keys[1], back[r])]
        there, back = torch.stack(there), torch.stack(back)
        costs = torch.stack(means).view(-1, 2).to(source.dtype)
        finite = costs.isfinite().all(1)
        members = _returns(there, back), _returns(back, there)
        mutual = members[0].sum(1)
        i, j = (
            visit_order(of_side if mutual_only else torch.ones_like(of_side), seeds, epoch, side)
            for side, of_side in enumerate(members)
        )
        i, j = i[:, : min(n, m)], j[:, : min(n, m)]
        visits = torch.stack(
            [i, n + there.gather(1, i).clamp(0, m - 1), n + j, back.gather(1, j).clamp(0, n - 1)], 2
        )  # (R, min(n, m), 4): rows of `tables`, x, what it is paired with, y, and its
        counts = mutual.tolist() if mutual_only else [min(n, m)] * len(seeds)
        stepped = []
        for r, count in enumerate(counts):
            size = min(batch_size, count) if mutual_only else batch_size
            steps = count // size if size else 0
            rows = visits[r, : steps * size].view(steps, size, 4).mT
            after = _steps(tables, maps[r], rows, lr, betas, eps, cycle_weight)
            stepped.append(torch.where(finite[r], after, maps[r]))
    new = torch.stack(stepped)
    return ICPEpoch(
        new[:, 0].contiguous(),
        new[:, 1].contiguous(),
        there,
        back,
        torch.where(finite, costs.amin(1), math.inf),
        mutual,
    )


def _nearest(rows: Tensor, keys: Tensor) -> Tensor:  # (p, D), (q, D) -> (p,)
    """Of each row the nearest key; -1 where none is at a finite distance."""
    found = topk_similarity(rows, keys, 1, metric="l2")
    return found.indices.masked_fill(~found.values.isfinite(), -1).squeeze(1)


def _mean_distance(rows: Tensor, keys: Tensor, nearest: Tensor) -> Tensor:  # () float64
    """The mean of ``|x - k|^2``; inf where a row has no key."""
    at = nearest.clamp(0, len(keys) - 1)
    squares = (rows - keys[at]).double().square().sum(1)
    return squares.masked_fill(nearest != at, math.inf).mean()


def _returns(there: Tensor, back: Tensor) -> Tensor:  # (R, p), (R, q) -> (R, p) bool
    """Whether a row is the nearest of its nearest."""
    at = there.clamp(0, back.shape[1] - 1)
    return (there == at) & (back.gather(1, at) == torch.arange(there.shape[1], device=there.device))


def visit_order(members: Tensor, seeds: Tensor, epoch: int, side: int) -> Tensor:  # (R, p) -> (R, p)
    """All rows: first those that are members, as they are visited, then the others."""
    rows = torch.arange(members.shape[1], device=members.device).expand_as(members)
    counter = (rows, torch.full_like(rows, epoch), torch.full_like(rows, side), torch.zeros_like(rows))
    seeds = seeds.unsqueeze(1)
    words = philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))[0]
    return words.masked_fill(~members, _WORD + 1).argsort(dim=1, stable=True)


def _steps(
    tables: Tensor,  # (n + m, D)
    maps: Tensor,  # (2, D, D), W_xy and W_yx
    rows: Tensor,  # (steps, 4, B)
    lr: float,
    betas: tuple[float, float],
    eps: float,
    cycle_weight: float,
) -> Tensor:
    """A step of Adam on both maps for each batch: the formulas of ``reference.icp.gradients``."""
    beta1, beta2 = betas
    size = rows.shape[2]
    maps = maps.clone()
    mean, square = torch.zeros_like(maps), torch.zeros_like(maps)
    for t, batch in enumerate(rows, 1):
        of_batch = tables[batch]  # (4, B, D)
        visited, paired = of_batch[::2], of_batch[1::2]
        own = visited.mT @ visited / size  # C_xx and C_yy
        across = paired.mT @ visited / size  # C_yx and C_xy
        mapped = maps @ own
        g = mapped - across
        if cycle_weight:
            other = maps.flip(0)
            cycle = torch.baddbmm(own, other, mapped, beta=-1)  # P and Q
            g = torch.baddbmm(g, other.mT, cycle, alpha=cycle_weight)
            g = torch.baddbmm(g, cycle.flip(0), other.mT, alpha=cycle_weight)
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = math.sqrt(1 - beta2**t)
        maps.addcdiv_(mean, square.sqrt().div_(root).add_(eps), value=-lr / (1 - beta1**t))
    return maps
