"""An epoch of iterative closest points with two maps and a cycle between them; written for reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 2**18
"""About so many scores exist at a time: no (n, m) matrix."""

WORD = 0xFFFFFFFF  # the bits of a word of 32, which int64 holds


class ICPEpoch(NamedTuple):
    """What ``icp_epoch`` returns, of each of R restarts."""

    w_xy: Tensor  # (R, D, D), after the steps
    w_yx: Tensor  # (R, D, D)
    nearest_target: Tensor  # (R, n) int64: of each row of source a row of target, -1 where there is none
    nearest_source: Tensor  # (R, m) int64
    cost: Tensor  # (R,), before the steps
    mutual: Tensor  # (R,) int64: how many rows of source are the nearest of their nearest


@torch.no_grad()
def icp_epoch(
    source: Tensor,  # (n, D)
    target: Tensor,  # (m, D)
    w_xy: Tensor,  # (R, D, D)
    w_yx: Tensor,  # (R, D, D)
    seeds: Tensor,  # (R,) int64
    *,
    epoch: int,
    batch_size: int = 128,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    cycle_weight: float = 1e-2,
    pairs: tuple[Tensor, Tensor] | None = None,  # (R, n), (R, m) int64
    mutual_only: bool = False,
) -> ICPEpoch:
    """Pairs each row with the nearest mapped row of the other table; then takes steps of Adam on both maps.

    In the dtype of the tables; costs are means in float64. Restarts are run one after another, and nothing of
    one depends on what others there are.
    """
    restarts = []
    for r, seed in enumerate(seeds):
        maps = [w[r].clone(memory_format=torch.contiguous_format) for w in (w_xy, w_yx)]
        mapped_source, mapped_target = _products(source, maps[0]), _products(target, maps[1])
        if pairs is None:
            there, back = _nearest(source, mapped_target), _nearest(target, mapped_source)
        else:
            there, back = pairs[0][r], pairs[1][r]
        costs = torch.stack(
            [_mean_distance(source, mapped_target, there), _mean_distance(target, mapped_source, back)]
        ).to(source.dtype)
        finite = bool(costs.isfinite().all())
        cost = costs.amin() if finite else costs.new_tensor(math.inf)
        returns = _returns(there, back), _returns(back, there)
        if finite:
            everything = torch.ones_like(returns[0]), torch.ones_like(returns[1])
            members = returns if mutual_only else everything
            visited = [visit_order(some, seed, epoch, side) for side, some in enumerate(members)]
            size = min(map(len, visited))
            batch = min(batch_size, size) if mutual_only else batch_size
            if batch > 0:
                used = size // batch * batch
                batches = zip(*(order[:used].split(batch) for order in visited), strict=True)
                maps = _steps(source, target, maps, (there, back), batches, lr, betas, eps, cycle_weight)
        restarts.append((*maps, there, back, cost, returns[0].sum()))
    return ICPEpoch(*(torch.stack(field) for field in zip(*restarts, strict=True)))


# The search


def _products(a: Tensor, b: Tensor) -> Tensor:  # (p, D), (q, D) -> (p, q)
    """``a b^T``, each summed alike, column by column in order: equal rows have equal products.

    No matrix product promises that.
    """
    total = a.new_zeros(())
    for x, y in zip(a.T.contiguous(), b.T.contiguous(), strict=True):
        total = total + x.unsqueeze(1) * y
    return total


def _nearest(rows: Tensor, keys: Tensor) -> Tensor:  # (p, D), (q, D) -> (p,)
    """Of each row the key at the least distance, the lower index first: the greatest ``x k - |k|^2 / 2``.

    A score that is NaN or -inf is never chosen.
    """
    half = sum(column * column for column in keys.T.contiguous()) / 2
    found = []
    for block in rows.split(max(1, SCORES // len(keys))):
        scores = _products(block, keys) - half
        scores = scores.masked_fill(scores.isnan(), -math.inf)
        found.append(scores.argmax(dim=1).masked_fill(scores.amax(dim=1) == -math.inf, -1))
    return torch.cat(found)


def _mean_distance(rows: Tensor, keys: Tensor, nearest: Tensor) -> Tensor:  # () float64
    """The mean of ``|x - k|^2``; inf where a row has no key."""
    at = nearest.clamp(0, len(keys) - 1)
    squares = (rows - keys[at]).double().square().sum(1)
    return squares.masked_fill(nearest != at, math.inf).mean()


def _returns(there: Tensor, back: Tensor) -> Tensor:  # (p,), (q,) -> (p,) bool
    """Whether a row is the nearest of its nearest."""
    at = there.clamp(0, len(back) - 1)
    return (there == at) & (back[at] == torch.arange(len(there), device=there.device))


# The order of visits


def visit_order(members: Tensor, seed: Tensor, epoch: int, side: int) -> Tensor:  # (n,) bool, () int64
    """Rows that are members, ascending by the first word of Philox for each, then by index.

    The key is the seed, the counter (row, epoch, side, 0); side is 0 for source, 1 for target.
    """
    rows = members.nonzero().flatten()
    counter = (rows, torch.full_like(rows, epoch), torch.full_like(rows, side), torch.zeros_like(rows))
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    return rows[words[0].argsort(stable=True)]


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words, of a counter of four and a key of two, all of 32 bits, held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high2, low2 = _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _multiplied(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words, by halves of the factor: no int64 overflows."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    sum_ = upper + (lower >> 16)  # the product without its last 16 bits
    return sum_ >> 16, (sum_ & 0xFFFF) << 16 | lower & 0xFFFF


# The steps


def gradients(
    w_xy: Tensor, w_yx: Tensor, x: Tensor, y_of_x: Tensor, y: Tensor, x_of_y: Tensor, cycle_weight: float
) -> tuple[Tensor, Tensor]:
    """Those to both maps of the loss of a batch, of B rows x and y and the rows that they are paired with::

        (|y_of_x - x W_xy^T|^2 + |x_of_y - y W_yx^T|^2) / 2B
        + cycle_weight (|x W_xy^T W_yx^T - x|^2 + |y W_yx^T W_xy^T - y|^2) / 2B

    All that they need of the batch are four moments.
    """
    c_xx, c_yx = x.T @ x / len(x), y_of_x.T @ x / len(x)
    c_yy, c_xy = y.T @ y / len(y), x_of_y.T @ y / len(y)
    ac, bc = w_xy @ c_xx, w_yx @ c_yy
    p, q = w_yx @ ac - c_xx, w_xy @ bc - c_yy  # (W_yx W_xy - 1) C_xx, (W_xy W_yx - 1) C_yy
    g_xy = ac - c_yx + cycle_weight * (w_yx.T @ p + q @ w_yx.T)
    g_yx = bc - c_xy + cycle_weight * (p @ w_xy.T + w_xy.T @ q)
    return g_xy, g_yx


def _steps(
    source: Tensor,
    target: Tensor,
    maps: Sequence[Tensor],
    nearest: tuple[Tensor, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],  # rows of source, of target
    lr: float,
    betas: tuple[float, float],
    eps: float,
    cycle_weight: float,
) -> Tensor:  # (2, D, D)
    """A step of Adam for each batch, from a state of zeros, both maps at once."""
    beta1, beta2 = betas
    there, back = nearest
    w = torch.stack(list(maps))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (xs, ys) in enumerate(batches, 1):
        batch = source[xs], target[there[xs]], target[ys], source[back[ys]]
        g = torch.stack(gradients(w[0], w[1], *batch, cycle_weight))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        rate, root = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
        w = w - rate * m / (v.sqrt() / root + eps)
    return w
