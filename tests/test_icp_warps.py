"""icp_epoch's GPU kernels on NumPy arrays, by the threads of a team in turn."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

host = pytest.importorskip(
    "fastkit._host", reason="fastkit._host is built in editable installs where Python.h exists"
)

U = 2.0**-24  # by which a rounding to float32 errs, at most, relative to the result
OPTIONS = {
    "epoch": 3,
    "batch_size": 16,
    "lr": 2.0**-5,
    "betas": (0.5, 0.875),
    "eps": 0.5,  # so large that the moves are smooth functions of the gradients
    "cycle_weight": 0.125,
    "mutual_only": False,
    "mapped_bytes": 2**26,
}


class Epoch(NamedTuple):
    w_xy: Tensor
    w_yx: Tensor
    nearest_target: Tensor
    nearest_source: Tensor
    cost: Tensor
    mutual: Tensor


class Inputs(NamedTuple):
    source: Tensor
    target: Tensor
    w_xy: Tensor
    w_yx: Tensor
    seeds: Tensor


def make(n, m, D, R=1, seed=0):
    """Maps are near the identity, as those that a run starts from."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    maps = [torch.eye(D) + draw(R, D, D) / (4 * D**0.5) for _ in range(2)]
    seeds = torch.randint(-(2**62), 2**62, (R,), generator=generator) * 2 + 1
    return Inputs(draw(n, D), draw(m, D), *maps, seeds)


def pairs_of(inputs, seed=1):
    """Any."""
    generator = torch.Generator().manual_seed(seed)
    n, m, R = len(inputs.source), len(inputs.target), len(inputs.seeds)
    a = torch.randint(m, (R, n), generator=generator)
    return a, torch.randint(n, (R, m), generator=generator)


def run(inputs, pairs=None, **options):
    o = OPTIONS | options
    n, m, (R, D, _) = len(inputs.source), len(inputs.target), inputs.w_xy.shape
    around = []

    def guarded(shape, dtype, given=None):
        all_ = torch.full((math.prod(shape) + 64,), 7, dtype=dtype)
        inner = all_[32:-32].view(shape)
        if given is not None:
            inner.copy_(given)
        around.append(all_)
        return inner

    a, b = (None, None) if pairs is None else pairs
    maps = [guarded((R, D, D), torch.float32) for _ in range(2)]
    nearest = guarded((R, n), torch.int64, a), guarded((R, m), torch.int64, b)
    result = Epoch(*maps, *nearest, guarded((R,), torch.float32), guarded((R,), torch.int64))
    host.icp_epoch(
        *(t.numpy() for t in (*inputs, *nearest)),
        pairs is None,
        o["epoch"],
        o["batch_size"],
        o["lr"],
        *o["betas"],
        o["eps"],
        o["cycle_weight"],
        o["mutual_only"],
        *(t.numpy() for t in (*maps, *result[4:])),
        o["mapped_bytes"],
    )
    for all_ in around:
        assert (all_[:32] == 7).all() and (all_[-32:] == 7).all()
    return result


def same(first, second):
    """Bit for bit."""
    return all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


# The order of visits


def philox(counter, key):
    """Its four words; of 32 bits each, in 64."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = b & mask, a & mask
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def order_of(members, seed, epoch, side):
    """Rows that are members, as they are visited."""
    rows = members.nonzero().flatten().numpy()
    key = seed % 2**32, (seed >> 32) % 2**32
    words = philox((rows, epoch, side, 0), key)[0]
    return torch.from_numpy(rows[np.lexsort((rows, words))])


def returns(there, back):
    """Whether a row is the nearest of its nearest."""
    at = there.clamp(0, len(back) - 1)
    return (there == at) & (back[at] == torch.arange(len(there)))


def test_philox_word():
    # Known answers, of Random123's file kat_vectors.
    pi = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
    assert [int(w) for w in philox(pi, (0xA4093822, 0x299F31D0))] == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]
    assert host.philox_word(0, 0, 0, 0) == 0x6627E8D5
    for seed in (0, 1, 2**64 - 1, 0xA4093822299F31D0):
        for c in ((0, 0, 1), (1, 2, 0), (2**32 - 1, 2**32 - 1, 2**32 - 1)):
            words = philox((*c, 0), (seed % 2**32, seed >> 32))
            assert host.philox_word(seed, *c) == int(words[0])


@pytest.mark.parametrize("mutual_only", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 100, 513, 4095, 4096, 4097, 9000, 17000])
def test_visits(n, mutual_only):
    """In shared memory, in two halves of it, and merged in global memory."""
    seeds = torch.tensor([0, -1, 123456789 * 2**32 + 5])
    nearest = torch.arange(n).roll(1).repeat(3, 1)
    nearest[:, ::3] = torch.arange(n)[::3]  # these alone return, at the least
    nearest[2, ::2] = -1
    visits = torch.from_numpy(host.icp_visits(seeds.numpy(), nearest.numpy(), 77, mutual_only))
    for r, seed in enumerate(seeds.tolist()):
        members = returns(nearest[r], nearest[r]) if mutual_only else torch.ones(n, dtype=torch.bool)
        for side in range(2):
            want = order_of(members, seed, 77, side)
            got = visits[r, side]
            assert torch.equal(got[: len(want)] & 0xFFFFFFFF, want)
            assert torch.equal(got[: len(want)] >> 32, nearest[r][want])
            assert (got[len(want) :] == -1).all()


# The search. A sum of k products in float32, in whatever order, errs by k U of the products' magnitudes.


def mapped(rows, w):
    """And by how much float32 may err."""
    k = rows @ w.T
    return k, (rows.shape[1] + 1) * U * (rows.abs() @ w.T.abs())


def check_nearest(x, k, k_error, nearest):
    """That no other key's score is greater by more than both may err."""
    D = x.shape[1]
    half = k.square().sum(1) / 2
    scores = x @ k.T - half
    error = x.abs() @ k_error.T + (k.abs() * k_error + k_error.square()).sum(1)
    error += (D + 2) * U * (x.abs() @ k.abs().T + half) + 2 * U * scores.abs()
    at = nearest.unsqueeze(1)
    assert (nearest >= 0).all() and (nearest < len(k)).all()
    lacking = (scores - error).amax(1) - (scores + error).gather(1, at).squeeze(1)
    assert (lacking <= 0).all()


def mean_distance(x, k, k_error, nearest):
    d, error = x - k[nearest], k_error[nearest]
    error = error + U * (d.abs() + error)
    mean = d.square().sum(1).mean()
    return mean, (2 * d.abs() * error + error.square()).sum(1).mean() + 2 * U * mean


def check_search(inputs, result, r=0):
    x, y, w_xy, w_yx, _ = (t.double() for t in inputs)
    a, b = result.nearest_target[r], result.nearest_source[r]
    sides = (x, *mapped(y, w_yx[r]), a), (y, *mapped(x, w_xy[r]), b)
    for side in sides:
        check_nearest(*side)
    means, errors = zip(*(mean_distance(*side) for side in sides), strict=True)
    cost = float(result.cost[r])
    assert min(m - e for m, e in zip(means, errors, strict=True)) <= cost
    assert cost <= min(m + e for m, e in zip(means, errors, strict=True))
    assert result.mutual[r] == returns(a, b).sum()


@pytest.mark.parametrize("D", [1, 2, 3, 25, 31, 32, 33, 50, 63, 64])
def test_nearest_costs_and_mutual_pairs(D):
    # Around the tiles of queries (64) and keys (128).
    for n, m in ((1, 1), (2, 65), (63, 129), (64, 128), (130, 127), (257, 70)):
        inputs = make(n, m, D, R=2, seed=n)
        result = run(inputs, batch_size=1000)
        for r in range(2):
            check_search(inputs, result, r)


def test_of_equal_keys_the_first_is_chosen():
    for n, D in ((300, 25), (140, 64), (700, 3)):
        x = make(n, 1, D).source[: n // 7].repeat(7, 1)  # each seven times, in all places of a tile
        inputs = Inputs(x, x.flip(0), *make(1, 1, D)[2:])
        result = run(inputs, batch_size=1000)
        for nearest, keys in ((result.nearest_target[0], inputs.target), (result.nearest_source[0], x)):
            _, which = torch.unique(keys, dim=0, return_inverse=True)
            first = torch.stack([(which == w).int().argmax() for w in which])
            assert torch.equal(nearest, first[nearest])
        check_search(inputs, result)


# The steps: their float64 results, and by how much float32 may err, which is followed step by step.


class Bounded(NamedTuple):
    value: Tensor
    error: Tensor

    def __matmul__(self, other):
        magnitude, others = self.value.abs() + self.error, other.value.abs() + other.error
        error = magnitude @ others - self.value.abs() @ other.value.abs()
        return Bounded(
            self.value @ other.value, error + (self.value.shape[-1] + 2) * U * (magnitude @ others)
        )

    def plus(self, other, weight=1.0):
        value, error = self.value + weight * other.value, self.error + abs(weight) * other.error
        added = abs(weight) * (other.value.abs() + other.error)
        return Bounded(value, error + 3 * U * (self.value.abs() + self.error + added))

    @property
    def mT(self):
        return Bounded(self.value.mT, self.error.mT)


def beside(a, b):
    """The matrix [a b]."""
    return Bounded(*(torch.cat(parts, -1) for parts in zip(a, b, strict=True)))


def moment(a, b):
    error = (len(a) + 3) * U * (a.abs().T @ b.abs()) / len(a)
    return Bounded(a.T @ b / len(a), error)


def gradients(w_xy, w_yx, x, y_of_x, y, x_of_y, cycle_weight):
    c_xx, c_yx, c_yy, c_xy = moment(x, x), moment(y_of_x, x), moment(y, y), moment(x_of_y, y)
    ac, bc = w_xy @ c_xx, w_yx @ c_yy
    p, q = (w_yx @ ac).plus(c_xx, -1.0), (w_xy @ bc).plus(c_yy, -1.0)
    of_cycle = (
        beside(w_yx.mT, q) @ beside(p.mT, w_yx).mT,
        beside(w_xy.mT, p) @ beside(q.mT, w_xy).mT,
    )
    return (
        ac.plus(c_yx, -1.0).plus(of_cycle[0], cycle_weight),
        bc.plus(c_xy, -1.0).plus(of_cycle[1], cycle_weight),
    )


def adam(w, mean, square, g, t, lr, betas, eps):
    mean = Bounded(betas[0] * mean.value, betas[0] * mean.error).plus(g, 1 - betas[0])
    of_square = g.value.square(), 2 * g.value.abs() * g.error + g.error.square()
    square = Bounded(betas[1] * square.value, betas[1] * square.error).plus(
        Bounded(of_square[0], of_square[1] + 2 * U * sum(of_square)), 1 - betas[1]
    )
    rate, correction = lr / (1 - betas[0] ** t), 1 / math.sqrt(1 - betas[1] ** t)
    root = square.value.sqrt() * correction + eps
    low = ((square.value - square.error).clamp(min=0).sqrt() * correction + eps) * (1 - 4 * U)
    high = ((square.value + square.error).sqrt() * correction + eps) * (1 + 4 * U)
    move = mean.value / root
    off = (mean.error + move.abs() * torch.maximum(root - low, high - root)) / low
    off += 4 * U * (move.abs() + off)
    return w.plus(Bounded(move, off), -rate), mean, square


def stepped(inputs, nearest, r, **options):
    """Both maps after the epoch, and how many steps it has."""
    o = OPTIONS | options
    x, y = inputs.source.double(), inputs.target.double()
    a, b = (of_side[r] for of_side in nearest)
    members = returns(a, b), returns(b, a)
    if not o["mutual_only"]:
        members = torch.ones_like(members[0]), torch.ones_like(members[1])
    orders = [order_of(m, int(inputs.seeds[r]), o["epoch"], side) for side, m in enumerate(members)]
    rows, B = min(map(len, orders)), o["batch_size"]
    if o["mutual_only"]:
        B = min(B, rows)
    steps = rows // B if B else 0
    maps = [Bounded(w[r].double(), torch.zeros_like(w[r]).double()) for w in (inputs.w_xy, inputs.w_yx)]
    states = [(Bounded(0 * w.value, w.error), Bounded(0 * w.value, w.error)) for w in maps]
    for t in range(1, steps + 1):
        i, j = (order[(t - 1) * B : t * B] for order in orders)
        both = gradients(*maps, x[i], y[a[i]], y[j], x[b[j]], o["cycle_weight"])
        for k, g in enumerate(both):
            maps[k], *states[k] = adam(maps[k], *states[k], g, t, o["lr"], o["betas"], o["eps"])
    return maps, steps


def check_steps(inputs, result, steps=None, median=2e-3, **options):
    """``median``: of what errors may be, relative to the greatest move, so that the budget says something."""
    for r in range(len(inputs.seeds)):
        maps, count = stepped(inputs, result[2:4], r, **options)
        assert steps is None or count == steps
        for got, want, before in zip(result[:2], maps, inputs[2:4], strict=True):
            assert ((got[r] - want.value).abs() <= want.error).all()
            if count:
                moves = (want.value - before[r]).abs()
                assert want.error.median() <= median * moves.max()


@pytest.mark.parametrize("D", [1, 2, 3, 16, 25, 31, 32, 33, 34, 50, 64])
def test_steps(D):
    inputs = make(60, 52, D, R=2)
    for B, steps in ((16, 3), (17, 3), (52, 1), (53, 0)):  # around pieces of 16 rows; the rest is left out
        result = run(inputs, pairs_of(inputs), batch_size=B)
        assert result.cost.isfinite().all()
        check_steps(inputs, result, steps, batch_size=B)


def test_many_short_and_some_long_batches():
    inputs = make(400, 300, 5)
    for options in ({"batch_size": 1, "lr": 2.0**-12}, {"batch_size": 100}, {"batch_size": 300}):
        result = run(inputs, pairs_of(inputs), **options)
        check_steps(inputs, result, 300 // options["batch_size"], median=0.05, **options)


@pytest.mark.parametrize("D", [25, 50])
def test_options(D):
    inputs = make(40, 50, D)
    for options in (
        {"epoch": 2**32 - 1},
        {"cycle_weight": 0.0},
        {"betas": (0.0, 0.0)},
        {"betas": (0.75, 0.5), "eps": 2.0},
        {"lr": 1e-2, "betas": (0.5, 0.999), "eps": 1e-8, "cycle_weight": 1e-2, "batch_size": 40},  # one step
    ):
        result = run(inputs, pairs_of(inputs), **options)
        check_steps(inputs, result, 40 // options.get("batch_size", 16), median=0.01, **options)


def test_search_and_steps():
    inputs = make(130, 150, 25, R=3)
    result = run(inputs, batch_size=64)
    for r in range(3):
        check_search(inputs, result, r)
    check_steps(inputs, result, 2, batch_size=64)


# Pairs, restarts, and what is not finite


def test_mutual_pairs_only():
    n, D = 90, 7
    source = make(n, 1, D).source
    near = source + torch.randn(n, D, generator=torch.Generator().manual_seed(2)) / 2
    inputs = Inputs(
        source, near[torch.randperm(n, generator=torch.Generator().manual_seed(3))], *make(1, 1, D)[2:]
    )
    count = int(run(inputs, batch_size=n).mutual)
    assert 32 < count < n
    for B, steps in ((16, count // 16), (count, 1), (count + 1, 1), (500, 1)):
        result = run(inputs, batch_size=B, mutual_only=True)
        check_search(inputs, result)
        check_steps(inputs, result, steps, batch_size=B, mutual_only=True)
    none = torch.arange(n).roll(1)[None], torch.arange(n).roll(1)[None]
    result = run(inputs, none, mutual_only=True)
    assert result.mutual == 0 and same(result[:2], inputs[2:4]) and result.cost.isfinite()


@pytest.mark.parametrize("mutual_only", [False, True])
def test_a_restart_does_not_see_others(mutual_only):
    inputs = make(150, 140, 9, R=5)
    together = run(inputs, mutual_only=mutual_only)
    assert same(together, run(inputs, mutual_only=mutual_only, mapped_bytes=1))  # one at a time
    for r in range(5):
        alone = run(Inputs(*inputs[:2], *(t[r : r + 1] for t in inputs[2:])), mutual_only=mutual_only)
        assert same(alone, (t[r : r + 1] for t in together))
    given = run(inputs, together[2:4], mutual_only=mutual_only)
    assert same(given, together)


def test_signs_are_exact():
    """A map that is a diagonal of signs is the identity and a target with these signs, bit for bit."""
    inputs = make(140, 130, 6)
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1])
    start = torch.eye(6)[None].contiguous()
    turned = Inputs(inputs.source, inputs.target * signs, start, start, inputs.seeds)
    flipped = Inputs(*inputs[:2], start * signs, start * signs, inputs.seeds)
    one, other = run(turned), run(flipped)
    assert same(one[2:], other[2:])
    assert torch.equal(one.w_xy * signs[:, None], other.w_xy)
    assert torch.equal(one.w_yx * signs, other.w_yx)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_maps_that_are_not_finite(value):
    inputs = make(70, 80, 5, R=4)
    inputs.w_yx[1] *= value
    inputs.w_xy[2, 3] = value
    result = run(inputs)
    assert result.cost.isinf().tolist() == [False, True, True, False]
    for r in (1, 2):
        assert same((t[r] for t in result[:2]), (t[r] for t in inputs[2:4]))
        assert result.mutual[r] == returns(result.nearest_target[r], result.nearest_source[r]).sum()
    if value != 1e30:  # whose squares alone overflow
        assert (result.nearest_target[1] == -1).all() and (result.nearest_source[2] == -1).all()
    for r in (0, 3):
        alone = run(Inputs(*inputs[:2], *(t[r : r + 1] for t in inputs[2:])))
        assert same(alone, (t[r : r + 1] for t in result))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(value):
    inputs = make(70, 80, 5)
    inputs.target[33, 2] = value
    result = run(inputs)
    assert not (result.nearest_target == 33).any() and (result.nearest_target >= 0).all()
    assert result.nearest_source[0, 33] == -1 or value == math.inf
    assert result.cost.isinf() and same(result[:2], inputs[2:4])


@pytest.mark.parametrize("mutual_only", [False, True])
@pytest.mark.parametrize("wrong", [-1, -(2**40), 80, 2**31, 2**40])
def test_pairs_that_no_one_has_checked_do_no_harm(wrong, mutual_only):
    inputs = make(70, 80, 5, R=2)
    a, b = pairs_of(inputs)
    a[0, 5], b[0, 79] = wrong, wrong
    result = run(inputs, (a, b), mutual_only=mutual_only)
    assert result.cost.isinf().tolist() == [True, False]
    assert same((t[0] for t in result[:2]), (t[0] for t in inputs[2:4]))
    assert result.mutual[0] == returns(a[0], b[0]).sum()
    assert same(result[2:4], (a, b))


def test_the_same_call_gives_the_same_bits():
    inputs = make(100, 90, 40, R=2)
    assert same(run(inputs), run(inputs))
