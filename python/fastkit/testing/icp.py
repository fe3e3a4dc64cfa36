"""icp_epoch against float64: inputs, the order of visits, and budgets of pairs, costs and maps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.reference import ICPEpoch
from fastkit.testing import Expected, assert_matches_reference


class ICPSize(NamedTuple):
    """The shape of one call; its str is a test id such as ``n40-m30-D7-B8``."""

    n: int
    m: int
    D: int
    B: int

    def __str__(self) -> str:
        return f"n{self.n}-m{self.m}-D{self.D}-B{self.B}"


# Rows and columns around vectors (4, 8, 16, 32, 64) and tiles of them (6, 8); batches of one, some, all.
SIZES = [
    ICPSize(1, 1, 1, 1),
    ICPSize(2, 1, 3, 1),
    ICPSize(5, 9, 1, 2),
    ICPSize(16, 15, 2, 15),
    ICPSize(33, 70, 3, 16),
    ICPSize(40, 40, 7, 40),
    ICPSize(63, 31, 8, 31),
    ICPSize(129, 65, 25, 60),
    ICPSize(50, 127, 33, 50),
    ICPSize(97, 101, 65, 90),
]


class Inputs(NamedTuple):
    """The tensors of a call."""

    source: Tensor  # (n, D)
    target: Tensor  # (m, D)
    w_xy: Tensor  # (R, D, D)
    w_yx: Tensor  # (R, D, D)
    seeds: Tensor  # (R,)


def make_inputs(
    n: int, m: int, D: int, *, restarts: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """Noise, and maps around the identity; half of the target is near rows of source, so pairs are mutual."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    source, target = randn(n, D), randn(m, D)
    near = torch.arange(m) % 2 == 0
    target[near] = source[torch.arange(m)[near] % n] + 0.1 * target[near]
    maps = [torch.eye(D) + 0.2 / math.sqrt(D) * randn(restarts, D, D) for _ in range(2)]
    seeds = torch.randint(-(2**63), 2**63 - 1, (restarts,), generator=generator)
    return Inputs(source.to(dtype), target.to(dtype), maps[0].to(dtype), maps[1].to(dtype), seeds)


# The order of visits


def visit_words(rows: int, seed: int, epoch: int, side: int) -> np.ndarray:  # (rows,) uint32
    """The first word of Philox4x32-10 for each row, by products of 64 bits."""
    multipliers, steps, mask = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), np.uint64(0xFFFFFFFF)
    counter = np.zeros((4, rows), dtype=np.uint64)
    counter[0], counter[1], counter[2] = np.arange(rows), epoch, side
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        even, odd = counter[0] * np.uint64(multipliers[0]), counter[2] * np.uint64(multipliers[1])
        high_even, high_odd = even >> np.uint64(32), odd >> np.uint64(32)
        counter = np.stack(
            [
                high_odd ^ counter[1] ^ np.uint64(key[0]),
                odd & mask,
                high_even ^ counter[3] ^ np.uint64(key[1]),
                even & mask,
            ]
        )
        key = [(k + step) & 0xFFFFFFFF for k, step in zip(key, steps, strict=True)]
    return counter[0].astype(np.uint32)


def expected_batches(
    found: ICPEpoch, seeds: Tensor, restart: int, *, epoch: int, batch_size: int, mutual_only: bool
) -> list[tuple[Tensor, Tensor]]:
    """Of each step the rows of source and of target, for the pairs that were found."""
    pairs = [found.nearest_target[restart].cpu().numpy(), found.nearest_source[restart].cpu().numpy()]
    orders = []
    for side, (there, back) in enumerate((pairs, pairs[::-1])):
        rows = np.arange(len(there))
        words = visit_words(len(rows), int(seeds[restart]), epoch, side)
        if mutual_only:
            rows = rows[(there >= 0) & (back[there] == rows)]
        orders.append(torch.from_numpy(rows[np.lexsort((rows, words[rows]))]))
    size = min(map(len, orders))
    batch = min(batch_size, size) if mutual_only else batch_size
    steps = size // batch if batch else 0
    return [(orders[0][t * batch :][:batch], orders[1][t * batch :][:batch]) for t in range(steps)]


# Pairs and costs


def _roundoff(dtype: torch.dtype) -> float:
    """Of the arithmetic; twice that of float64, for the oracle errs as well."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.float64 else 2)


def _mapped(table: Tensor, w: Tensor) -> Expected:  # (m, D)
    u = _roundoff(table.dtype)
    y, w = table.detach().cpu().double(), w.detach().cpu().double()
    return Expected(y @ w.T, u * (y.shape[1] + 1) * (y.abs() @ w.abs().T))


def assert_nearest(nearest: Tensor, rows: Tensor, others: Tensor, w: Tensor) -> None:
    """Raise unless each row is given a nearest of the others, mapped by w, up to rounding.

    With k the mapped row, which errs by e, ``x . k - |k|^2 / 2`` changes with k by (x - k) e, and errs itself
    by D + 2 roundings of its terms, of which a norm has as many again. A distance errs by twice as much.
    """
    D, u = rows.shape[1], _roundoff(rows.dtype)
    x, (k, e) = rows.detach().cpu().double().unsqueeze(1), _mapped(others, w)
    distance = (x - k).square().sum(2)
    error = u * (D + 3) * ((x * k).abs().sum(2) + k.square().sum(1)) + (((x - k).abs() + e) * e).sum(2)
    index = nearest.detach().cpu()
    if index.dtype != torch.int64 or index.shape != rows.shape[:1]:
        raise AssertionError(f"nearest: {index.dtype}, {tuple(index.shape)}")
    if (index < 0).any() or (index >= len(others)).any():
        raise AssertionError("nearest: not a row of the other table")
    least = (distance + 2 * error).amin(1)
    at = index.unsqueeze(1)
    over = (distance - 2 * error).gather(1, at).squeeze(1) > least
    if over.any():
        i = int(over.nonzero()[0])
        raise AssertionError(
            f"nearest: row {i} is given {int(index[i])}, at {distance[i, index[i]]:.9g}; the nearest is"
            f" {int(distance[i].argmin())}, at {distance[i].amin():.9g}"
        )


def expected_mean(nearest: Tensor, rows: Tensor, others: Tensor, w: Tensor) -> Expected:  # ()
    """The mean of ``|x - k|^2``, of these pairs: rows that err, D + 2 roundings of a sum, and a mean."""
    D, u = rows.shape[1], _roundoff(rows.dtype)
    k, e = (t[nearest.cpu()] for t in _mapped(others, w))
    difference = rows.detach().cpu().double() - k
    off = e + u * difference.abs()
    square = difference.square().sum(1)
    error = ((2 * difference.abs() + off) * off).sum(1) + u * (D + 3) * square
    mean = square.mean()
    return Expected(mean, error.mean() + (u + 2.0**-53 * len(square)) * mean)


# Maps


class _Bounded:
    """A matrix in float64, and how far from it each element may be in arithmetic of a roundoff u."""

    def __init__(self, value: Tensor, error: Tensor, u: float) -> None:
        self.value, self.error, self.u = value, error, u

    @classmethod
    def exact(cls, value: Tensor, u: float) -> _Bounded:
        return cls(value, torch.zeros_like(value), u)

    @property
    def T(self) -> _Bounded:
        return _Bounded(self.value.T, self.error.T, self.u)

    @property
    def most(self) -> Tensor:
        return self.value.abs() + self.error

    def __matmul__(self, other: _Bounded) -> _Bounded:
        roundings = self.value.shape[1] + 2
        error = self.error @ other.most + self.value.abs() @ other.error
        error = error + self.u * roundings * (self.most @ other.most)
        return _Bounded(self.value @ other.value, error, self.u)

    def __add__(self, other: _Bounded) -> _Bounded:
        error = self.error + other.error
        value = self.value + other.value
        return _Bounded(value, error + self.u * (value.abs() + error), self.u)

    def __sub__(self, other: _Bounded) -> _Bounded:
        return self + _Bounded(-other.value, other.error, self.u)

    def times(self, factor: float) -> _Bounded:
        """A number that is rounded itself."""
        return _Bounded(factor * self.value, abs(factor) * (self.error + 3 * self.u * self.most), self.u)


def _gradients(
    w_xy: _Bounded, w_yx: _Bounded, x: Tensor, y_of_x: Tensor, y: Tensor, x_of_y: Tensor, weight: float
) -> tuple[_Bounded, _Bounded]:
    def moment(a: Tensor, b: Tensor) -> _Bounded:
        exact = [_Bounded.exact(t, w_xy.u) for t in (a.T, b)]
        return (exact[0] @ exact[1]).times(1 / len(a))

    c_xx, c_yx, c_yy, c_xy = moment(x, x), moment(y_of_x, x), moment(y, y), moment(x_of_y, y)
    ac, bc = w_xy @ c_xx, w_yx @ c_yy
    p, q = w_yx @ ac - c_xx, w_xy @ bc - c_yy
    return (
        ac - c_yx + (w_yx.T @ p + q @ w_yx.T).times(weight),
        bc - c_xy + (p @ w_xy.T + w_xy.T @ q).times(weight),
    )


def _largest_ratio(t: int, beta1: float, beta2: float) -> float:
    """The most that m is, of the root of v, after t gradients g_s of ages s = 0, 1, ..., t - 1.

    ``m = (1 - beta1) sum(beta1^s g_s)`` and ``v = (1 - beta2) sum(beta2^s g_s^2)``, of which Cauchy and
    Schwarz leave ``(1 - beta1) sqrt(sum((beta1^2 / beta2)^s) / (1 - beta2))``. With ``beta2 = 0`` v knows the
    last gradient alone: what m remembers of older ones may be any multiple of its root.
    """
    if beta2 == 0:
        return math.inf if beta1 > 0 and t > 1 else 1 - beta1
    geometric = sum((beta1**2 / beta2) ** s for s in range(t))
    return (1 - beta1) * math.sqrt(geometric / (1 - beta2))


def expected_maps(
    inputs: Inputs,
    found: ICPEpoch,
    restart: int,
    *,
    epoch: int,
    batch_size: int = 128,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    cycle_weight: float = 1e-2,
    mutual_only: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Expected, Expected]:
    """W_xy and W_yx after the steps, for the pairs that were found; ``dtype`` is that of the arithmetic.

    A gradient's budget follows from its products. Adam divides a moment m by the root of another, v, and an
    element of a gradient that is smaller than its error may change sign: its step is off by all of a step
    then, of which the largest follows from Cauchy and Schwarz. So budgets grow quickly with the number of
    steps, unless ``eps`` is large beside the gradients.
    """
    u = _roundoff(dtype or inputs.source.dtype)
    tiny = torch.finfo(dtype or inputs.source.dtype).tiny
    source, target = (t.detach().cpu().double() for t in inputs[:2])
    there, back = (t[restart].cpu() for t in (found.nearest_target, found.nearest_source))
    batches = expected_batches(
        found, inputs.seeds, restart, epoch=epoch, batch_size=batch_size, mutual_only=mutual_only
    )
    beta1, beta2 = betas
    w = [_Bounded.exact(t[restart].detach().cpu().double(), u) for t in (inputs.w_xy, inputs.w_yx)]
    zero = torch.zeros_like(w[0].value)
    first, second = [_Bounded.exact(zero, u)] * 2, [_Bounded.exact(zero, u)] * 2
    for t, (xs, ys) in enumerate(batches, 1):
        batch = source[xs], target[there[xs]], target[ys], source[back[ys]]
        both = _gradients(w[0], w[1], *batch, cycle_weight)
        rate, root = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
        largest = root * _largest_ratio(t, beta1, beta2)
        for i, g in enumerate(both):
            first[i] = first[i].times(beta1) + g.times(1 - beta1)
            square = _Bounded(
                g.value.square(), (2 * g.value.abs() + g.error) * g.error + u * g.most.square(), u
            )
            second[i] = second[i].times(beta2) + square.times(1 - beta2)
            m, v = first[i], second[i]
            s = v.value.sqrt() / root
            low = (v.value - v.error - tiny).clamp_min(0).sqrt() / root
            ratio = m.value / (s + eps)
            error = (m.error + tiny) / (low + eps) + ratio.abs() * (s - low) / (low + eps)
            error = error.clamp_max(2 * largest) + 8 * u * ratio.abs()
            w[i] = w[i] - _Bounded(rate * ratio, rate * error, u)
    results = [Expected(m.value, m.error + u * m.value.abs()) for m in w]
    return results[0], results[1]


def check(
    inputs: Inputs,
    *,
    epoch: int = 0,
    batch_size: int = 128,
    pairs: tuple[Tensor, Tensor] | None = None,
    mutual_only: bool = False,
    impl: Impl | None = None,
    **adam: Any,
) -> ICPEpoch:
    """Runs ``ops.icp_epoch``, of finite inputs, and returns its result.

    Raises AssertionError unless pairs are nearest, and cost, mutual and maps are what they are in float64 for
    these pairs, within their budgets.
    """
    options = {"epoch": epoch, "batch_size": batch_size, "mutual_only": mutual_only, **adam}
    found = ops.icp_epoch(*inputs, **options, pairs=pairs, impl=impl)
    source, target, w_xy, w_yx, seeds = inputs
    (n, D), m, R = source.shape, len(target), len(seeds)
    want = {
        "w_xy": ((R, D, D), source.dtype),
        "w_yx": ((R, D, D), source.dtype),
        "nearest_target": ((R, n), torch.int64),
        "nearest_source": ((R, m), torch.int64),
        "cost": ((R,), source.dtype),
        "mutual": ((R,), torch.int64),
    }
    got = {name: (tuple(t.shape), t.dtype) for name, t in found._asdict().items()}
    if got != want or any(t.requires_grad or t.device != source.device for t in found):
        raise AssertionError(f"got {got}, not {want}; or they require grad, or are elsewhere")
    for r, (there, back) in enumerate(zip(found.nearest_target, found.nearest_source, strict=True)):
        if pairs is None:
            assert_nearest(there, source, target, w_yx[r])
            assert_nearest(back, target, source, w_xy[r])
        elif not torch.equal(there, pairs[0][r]) or not torch.equal(back, pairs[1][r]):
            raise AssertionError("nearest: not the pairs that were given")
        means = expected_mean(there, source, target, w_yx[r]), expected_mean(back, target, source, w_xy[r])
        cost = Expected(*(torch.stack(part) for part in zip(*means, strict=True)))
        at = found.cost[r].cpu().double()
        if not cost.value.amin() - cost.budget.amax() <= at <= cost.value.amin() + cost.budget.amax():
            raise AssertionError(f"cost: got {at:.9g}, expected the less of {cost.value.tolist()}")
        mutual = int((back[there] == torch.arange(n, device=back.device)).sum())
        if int(found.mutual[r]) != mutual:
            raise AssertionError(f"mutual: got {int(found.mutual[r])}, expected {mutual}")
        maps = expected_maps(inputs, found, r, **options)
        for name, tensor, expected in zip(("w_xy", "w_yx"), found[:2], maps, strict=True):
            assert_matches_reference(tensor[r], *expected, name=name)
    return found


def alone(inputs: Inputs, restart: int) -> Inputs:
    """The inputs of one restart."""
    at = slice(restart, restart + 1)
    return Inputs(*inputs[:2], *(t[at].clone() for t in inputs[2:]))


def assert_equal(found: ICPEpoch, other: ICPEpoch) -> None:
    """Raise unless all bits are the same; zeros may differ in sign."""
    for name, one, two in zip(ICPEpoch._fields, found, other, strict=True):
        if not torch.equal(one.nan_to_num(nan=-1.0), two.nan_to_num(nan=-1.0)):
            raise AssertionError(f"{name}: other bits")
