"""reference.icp_epoch against its loss, torch's Adam, and Philox's known answers; its budgets."""

import math

import pytest
import torch

from fastkit import ops, reference
from fastkit.ops.icp import KERNELS as KERNELS  # for the fixtures
from fastkit.reference import icp
from fastkit.testing.icp import check, expected_batches, expected_maps, make_inputs, visit_words

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

DOUBLE = torch.float64


# Philox


def philox_word(counter, key):
    """Four words, by Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        even, odd = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(odd >> 32) ^ c[1] ^ k[0], odd % 2**32, (even >> 32) ^ c[3] ^ k[1], even % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def words(counter, key):
    found = icp.philox([torch.tensor(w) for w in counter], [torch.tensor(w) for w in key])
    return [int(w) for w in found]


# Of philox4x32 with 10 rounds, as its authors publish them with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert words(counter, key) == list(answer)
    assert philox_word(counter, key) == list(answer)


def test_philox_is_that_of_python_s_integers():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = torch.randint(2**32, (6,), generator=generator).tolist()
        assert words(drawn[:4], drawn[4:]) == philox_word(drawn[:4], drawn[4:])


SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789123456789]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("epoch", "side"), [(0, 0), (7, 1), (2**32 - 1, 0)])
def test_rows_are_visited_by_the_first_word_of_each(seed, epoch, side):
    """And the oracle of other tests has the same words."""
    key = seed % 2**64 % 2**32, seed % 2**64 >> 32
    first = [philox_word((i, epoch, side, 0), key)[0] for i in range(100)]
    assert visit_words(100, seed, epoch, side).tolist() == first
    order = icp.visit_order(torch.ones(100, dtype=torch.bool), torch.tensor(seed), epoch, side)
    assert order.tolist() == sorted(range(100), key=lambda i: (first[i], i))


def order_of(seed=5, epoch=3, side=0, members=None):
    members = torch.ones(64, dtype=torch.bool) if members is None else members
    return icp.visit_order(members, torch.tensor(seed), epoch, side).tolist()


def test_an_order_is_of_its_seed_epoch_and_side():
    orders = [order_of(), order_of(seed=6), order_of(seed=5 + 2**32), order_of(epoch=4), order_of(side=1)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_members_are_visited_in_the_order_that_they_have_among_all():
    members = torch.arange(64) % 3 == 1
    assert order_of(members=members) == [i for i in order_of() if i % 3 == 1]
    assert order_of(members=torch.zeros(64, dtype=torch.bool)) == []


def test_equal_words_are_visited_by_index(monkeypatch):
    monkeypatch.setattr(icp, "philox", lambda counter, key: (counter[0] % 3, *counter[1:]))
    assert order_of() == sorted(range(64), key=lambda i: (i % 3, i))


def test_every_row_is_as_likely_early_as_late():
    """Of 400 epochs the mean place of a row is within 5 deviations of the middle."""
    places = torch.stack([torch.tensor(order_of(epoch=epoch)).argsort() for epoch in range(400)]).double()
    deviation = math.sqrt((64**2 - 1) / 12 / 400)
    assert ((places.mean(0) - 31.5).abs() <= 5 * deviation).all()


# Gradients and steps


def loss_of(w_xy, w_yx, x, y_of_x, y, x_of_y, weight):
    """As the paper has it, without moments."""

    def halved(a, b):
        return (a - b).square().sum() / (2 * len(a))

    plain = halved(y_of_x, x @ w_xy.T) + halved(x_of_y, y @ w_yx.T)
    return plain + weight * (halved(x @ w_xy.T @ w_yx.T, x) + halved(y @ w_yx.T @ w_xy.T, y))


@pytest.mark.parametrize("weight", [0.0, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("D", "B"), [(1, 1), (2, 5), (3, 1), (7, 40), (25, 128)])
def test_gradients_are_those_of_the_loss(D, B, weight):
    generator = torch.Generator().manual_seed(D)
    batch = [torch.randn(B, D, generator=generator, dtype=DOUBLE) for _ in range(4)]
    maps = [torch.randn(D, D, generator=generator, dtype=DOUBLE).requires_grad_() for _ in range(2)]
    wanted = torch.autograd.grad(loss_of(*maps, *batch, weight), maps)
    for got, want in zip(icp.gradients(*maps, *batch, weight), wanted, strict=True):
        assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


@pytest.mark.parametrize("mutual_only", [False, True])
@pytest.mark.parametrize(
    "adam",
    [{}, {"betas": (0.9, 0.99), "lr": 0.1}, {"eps": 0.1, "cycle_weight": 1.0}, {"betas": (0.0, 0.0)}],
)
def test_steps_are_those_of_torch_s_adam(adam, mutual_only):
    """On the loss, differentiated by autograd, with the batches and pairs of the epoch."""
    inputs = make_inputs(70, 90, 6, dtype=DOUBLE)
    options = {"epoch": 9, "batch_size": 8, "mutual_only": mutual_only}
    found = reference.icp_epoch(*inputs, **options, **adam)
    source, target, *start, seeds = inputs
    weight = adam.get("cycle_weight", 1e-2)
    adam = {"lr": 1e-2, "betas": (0.5, 0.999)} | {k: v for k, v in adam.items() if k != "cycle_weight"}
    for r in range(2):
        there, back = found.nearest_target[r], found.nearest_source[r]
        maps = [torch.nn.Parameter(w[r].clone()) for w in start]
        optimizer = torch.optim.Adam(maps, **adam)
        batches = expected_batches(found, seeds, r, **options)
        assert len(batches) == (int(found.mutual[r]) if mutual_only else 70) // 8 > 1
        for xs, ys in batches:
            optimizer.zero_grad()
            batch = source[xs], target[there[xs]], target[ys], source[back[ys]]
            loss_of(*maps, *batch, weight).backward()
            optimizer.step()
        for got, want in zip((found.w_xy[r], found.w_yx[r]), maps, strict=True):
            assert (got - want).abs().max() <= 1e-9


# Budgets


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_budgets_of_a_step_are_far_below_a_step(dtype):
    """Where a gradient is not below its own error: at least nine elements of ten."""
    for n, m, D, B in ((40, 50, 7, 20), (300, 200, 25, 128), (97, 101, 65, 90)):
        inputs = make_inputs(n, m, D, dtype=dtype)
        found = check(inputs, batch_size=B, impl="reference")
        for expected in expected_maps(inputs, found, 0, epoch=0, batch_size=B):
            small = expected.budget <= (1e-4 if dtype == torch.float32 else 1e-12)  # of 1e-2
            assert small.double().mean() >= 0.9


def second_nearest(inputs, **options):
    """Of one row."""
    found = reference.icp_epoch(*inputs, **options)
    mapped = inputs.target @ inputs.w_yx[0].T
    found.nearest_target[0, 3] = (inputs.source[3] - mapped).square().sum(1).argsort()[1]
    pairs = found.nearest_target, found.nearest_source
    return reference.icp_epoch(*inputs, **options, pairs=pairs)


def with_the_other_maps(inputs, **options):
    """Maps rows of source and looks among those of target."""
    swapped = inputs._replace(w_xy=inputs.w_yx.mT.contiguous(), w_yx=inputs.w_xy.mT.contiguous())
    found = reference.icp_epoch(*swapped, **options)
    pairs = found.nearest_target, found.nearest_source
    return reference.icp_epoch(*inputs, **options, pairs=pairs)


def cost_after_the_steps(inputs, **options):
    found = reference.icp_epoch(*inputs, **options)
    pairs = found.nearest_target, found.nearest_source
    after = reference.icp_epoch(*inputs[:2], *found[:2], inputs.seeds, **options, pairs=pairs)
    return found._replace(cost=after.cost)


def the_greater_cost(inputs, **options):
    found = reference.icp_epoch(*inputs, **options)
    source, target, w_xy, w_yx, _ = inputs
    means = []
    for r in range(len(w_xy)):
        x = source - (target @ w_yx[r].T)[found.nearest_target[r]]
        y = target - (source @ w_xy[r].T)[found.nearest_source[r]]
        means.append(max(float(t.square().sum(1).mean()) for t in (x, y)))
    return found._replace(cost=torch.tensor(means, dtype=source.dtype))


def mutual_of_the_other_side(inputs, **options):
    found = reference.icp_epoch(*inputs, **options)
    return found._replace(mutual=found.mutual + 1)


def one_map_after_the_other(inputs, **options):
    """The second with the first one's new values: two calls, of which each gives one map."""
    found = reference.icp_epoch(*inputs, **options)
    pairs = found.nearest_target, found.nearest_source
    again = inputs._replace(w_xy=found.w_xy)
    return found._replace(w_yx=reference.icp_epoch(*again, **options, pairs=pairs).w_yx)


def option(**changed):
    def run(inputs, **options):
        return reference.icp_epoch(*inputs, **(options | changed))

    return run


FAULTS = {
    "second_nearest": second_nearest,
    "with_the_other_maps": with_the_other_maps,
    "cost_after_the_steps": cost_after_the_steps,
    "the_greater_cost": the_greater_cost,
    "mutual": mutual_of_the_other_side,
    "one_map_after_the_other": one_map_after_the_other,
    "another_epoch": option(epoch=1),
    "another_weight": option(cycle_weight=1.01e-2),
    "another_rate": option(lr=1.0001e-2),
    "other_betas": option(betas=(0.5, 0.998)),
    "a_larger_eps": option(eps=1e-5),
    "another_batch": option(batch_size=23),
    "mutual_only": option(mutual_only=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_budgets_reject_a_planted_fault(fault, monkeypatch):
    inputs = make_inputs(60, 50, 6)

    def faulty(*inputs_, pairs, impl, **options):
        return FAULTS[fault](inputs, **options)

    check(inputs, batch_size=24, impl="reference")
    monkeypatch.setattr(ops, "icp_epoch", faulty)
    with pytest.raises(AssertionError):
        check(inputs, batch_size=24, impl="reference")


def test_no_matrix_of_scores_is_whole(monkeypatch):
    """In blocks of rows; the result is the same whatever the blocks."""
    inputs = make_inputs(40, 30, 5)
    whole = reference.icp_epoch(*inputs, epoch=0, batch_size=8)
    monkeypatch.setattr(icp, "SCORES", 70)
    blocks = reference.icp_epoch(*inputs, epoch=0, batch_size=8)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))
