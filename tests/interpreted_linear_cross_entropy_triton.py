"""The Triton kernels of linear_cross_entropy in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from fastkit.ops import linear_cross_entropy_products as products
from fastkit.testing import Expected, assert_matches_reference
from fastkit.testing import linear_cross_entropy as op
from fastkit.triton import linear_cross_entropy as kernels

pytestmark = pytest.mark.usefixtures("patched_once")

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
U = torch.finfo(FLOAT).eps / 2
TINY = torch.finfo(FLOAT).tiny
NAN, INF = math.nan, math.inf
TILE = kernels.sums_options()["BC"]

# Where infinities are, and where e^2|x| is one.
numpy_may_warn = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


class Inputs(NamedTuple):
    logits: torch.Tensor  # (N, V)
    target: torch.Tensor  # (N,)
    class_weight: torch.Tensor  # (V,)
    coefficients: torch.Tensor  # (N, 3)


def make_inputs(tokens, vocabulary, *, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        spread * torch.randn(tokens, vocabulary, generator=generator),
        torch.randint(vocabulary, (tokens,), generator=generator),
        2 * torch.rand(vocabulary, generator=generator),
        torch.randn(tokens, 3, generator=generator) * torch.tensor([1.0, 1.0, vocabulary**-0.5]),
    )


def begun(tokens):
    return torch.tensor([-INF, 0, NAN, 0]).repeat(tokens, 1)


def sums(inputs, *, block=None, softcap=0.0, weighted=False, smooths=True):
    """The state after all blocks, which lie in one buffer as the driver's do."""
    tokens, vocabulary = inputs.logits.shape
    block = block or vocabulary
    state, buffer = begun(tokens), torch.full((tokens, block), NAN)
    for first in range(0, vocabulary, block):
        logits = inputs.logits[:, first : first + block]
        part = buffer[:, : logits.shape[1]].copy_(logits)
        class_weight = inputs.class_weight if weighted else None
        kernels.sums_(state, part, inputs.target, first, softcap, class_weight, smooths)
    return state


def gradient(inputs, lse, *, block=None, softcap=0.0, weighted=False, dtype=FLOAT):
    tokens, vocabulary = inputs.logits.shape
    block = block or vocabulary
    dz, buffer = torch.full((2, tokens, vocabulary), NAN, dtype=dtype)
    for first in range(0, vocabulary, block):
        logits = inputs.logits[:, first : first + block].contiguous()
        part = buffer.flatten()[: logits.numel()].view(logits.shape)
        class_weight = inputs.class_weight if weighted else None
        kernels.gradient_(part, logits, inputs.target, lse, inputs.coefficients, first, softcap, class_weight)
        dz[:, first : first + block] = part
    return dz


# In float64


def capped(logits, softcap):
    """z, its error, the derivative, and the error of that in roundings."""
    logits = logits.double()
    if not softcap:
        zeros = torch.zeros_like(logits)
        return logits, zeros, zeros + 1.0, zeros
    x = logits / softcap
    z = softcap * x.tanh()
    return z, 11 * U * z.abs() + TINY, 1.0 / x.cosh().square(), 12 + 7 * x.abs().clamp_max(100)


def expected_sums(inputs, *, block=None, softcap=0.0, weighted=False):
    """lse, the target's logit, and the weighted sum."""
    vocabulary = inputs.logits.shape[1]
    z, off, _, _ = capped(inputs.logits, softcap)
    class_weight = inputs.class_weight.double() if weighted else torch.ones(vocabulary).double()
    steps = sum(
        1 + math.ceil(min(block or vocabulary, vocabulary - first) / TILE)
        for first in range(0, vocabulary, block or vocabulary)
    )
    # Terms that matter are e^-x, with a relative error of (4 + 2.5 x) U: 5 U beside their sum.
    of_sum = U * (7 * steps + 20 + 5)
    target = inputs.target[:, None]
    return {
        "lse": Expected(z.logsumexp(1), off.amax(1) + of_sum),
        "target": Expected(z.gather(1, target)[:, 0], off.gather(1, target)[:, 0]),
        "weighted": Expected(
            (class_weight * z).sum(1),
            (class_weight * (off + U * (steps + 14) * z.abs())).sum(1) + TINY,
        ),
    }


def expected_gradient(inputs, lse, *, softcap=0.0, weighted=False, dtype=FLOAT):
    z, off, derivative, roundings = capped(inputs.logits, softcap)
    a, b, c = inputs.coefficients.double().T[:, :, None]
    class_weight = inputs.class_weight.double() if weighted else torch.ones(z.shape[1]).double()
    onehot = torch.nn.functional.one_hot(inputs.target, z.shape[1])
    exponent = z - lse.double()[:, None]
    of_p = a * exponent.exp()
    value = (of_p - b * onehot - c * class_weight) * derivative
    error = of_p.abs() * (off + U * (4 + 4 * exponent.abs()))
    error = error + 3 * U * (of_p.abs() + b.abs() * onehot + (c * class_weight).abs())
    budget = error * derivative + U * (roundings + 1) * value.abs() + TINY
    return Expected(value, budget + storing(value.abs() + budget, dtype))


def storing(size, dtype):
    """In half precision; the interpreter cuts off to bfloat16."""
    if dtype == FLOAT:
        return 0.0
    info = torch.finfo(dtype)
    return info.eps * (1.0 if dtype == BFLOAT else 0.5) * size + info.smallest_normal * info.eps


def check(inputs, *, block=None, softcap=0.0, weighted=False, dtype=FLOAT):
    state = sums(inputs, block=block, softcap=softcap, weighted=weighted)
    assert_state(state, inputs, block=block, softcap=softcap, weighted=weighted)
    lse = state[:, 0] + state[:, 1].log()
    options: dict[str, Any] = {"softcap": softcap, "weighted": weighted, "dtype": dtype}
    dz = gradient(inputs, lse, block=block, **options)
    value, budget = expected_gradient(inputs, lse, **options)
    if dtype == FLOAT:
        assert_matches_reference(dz, value, budget, name="dz")
    else:  # the many that are about -c are rounded one way
        assert ((dz.double() - value).abs() <= budget).all()


def assert_state(state, inputs, **options):
    expected = expected_sums(inputs, **options)
    m, s, target, weighted = state.double().T
    if options.get("softcap"):
        z, off, _, _ = capped(inputs.logits, options["softcap"])
        assert_matches_reference(m, z.amax(1), off.amax(1), name="m")
    else:
        assert torch.equal(state[:, 0], inputs.logits.amax(1))
        assert torch.equal(state[:, 2], inputs.logits.gather(1, inputs.target[:, None])[:, 0])
    assert (s >= 1).all()  # the largest term is 1
    for name, found in {"lse": m + s.log(), "target": target, "weighted": weighted}.items():
        value, budget = expected[name]
        assert ((found - value).abs() <= budget).all(), name


# Against the oracle


SIZES = [(1, 1), (1, 2), (7, 3), (3, 31), (2, TILE - 1), (1, TILE), (2, TILE + 1), (2, 2 * TILE + 904)]


@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
@pytest.mark.parametrize(("softcap", "weighted"), [(0.0, False), (0.0, True), (5.0, False), (5.0, True)])
def test_one_block(tokens, vocabulary, softcap, weighted):
    check(make_inputs(tokens, vocabulary), softcap=softcap, weighted=weighted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "block"), [(3, 1), (70, 16), (70, 33), (2 * TILE + 100, TILE + 40)])
@pytest.mark.parametrize(("softcap", "weighted"), [(0.0, False), (4.0, True)])
def test_blocks(vocabulary, block, dtype, softcap, weighted):
    """Of which the last is another size."""
    inputs = make_inputs(3, vocabulary)
    check(inputs, block=block, softcap=softcap, weighted=weighted, dtype=dtype)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1e4])
def test_spread(spread):
    """Equal logits; logits of which few matter, ever larger and ever smaller ones."""
    inputs = make_inputs(2, TILE + 50, spread=spread)
    for logits in (
        inputs.logits,
        inputs.logits.sort(1).values,
        inputs.logits.sort(1, descending=True).values,
    ):
        check(inputs._replace(logits=logits), block=600)


def test_a_common_shift_is_no_matter():
    inputs = make_inputs(3, 200)
    large = inputs._replace(logits=inputs.logits.round() + 2.0**20)
    small = inputs._replace(logits=inputs.logits.round())
    state, shifted = sums(small, smooths=False), sums(large, smooths=False)
    assert torch.equal(state[:, 1], shifted[:, 1])
    assert torch.equal(state[:, 0] + 2.0**20, shifted[:, 0])


@triton.jit
def cap(logits, results, softcap, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    inverse = tl.div_rn(1.0, softcap)
    z, derivative = kernels._capped(tl.load(logits + i), softcap, inverse)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(results + i, z)
    tl.store(results + SIZE + i, derivative)


@numpy_may_warn
@pytest.mark.parametrize("softcap", [1.0, 0.3, 50.0])
def test_softcap_of_any_logit(softcap):
    """To the last digits of the smallest, and where tanh is 1."""
    size = 2**14
    some = torch.linspace(-12, 12, size)
    small = torch.logspace(-30, 0, size // 2)
    largest = torch.tensor([3e38, -3e38, INF, -INF, 0.0]).repeat(size)[:size]
    for x in (some, some / 16, torch.cat([small, -small]), largest):
        logits = x if x is largest else softcap * x
        results = torch.empty(2, size)
        cap[(1,)](logits, results, softcap, SIZE=size)
        z, off, derivative, roundings = capped(logits, torch.tensor(softcap).double())
        assert ((results[0].double() - z).abs() <= off).all()
        off = U * roundings * derivative + TINY
        assert ((results[1].double() - derivative).abs() <= off).all()


def test_softcap_far_beyond_the_logits_is_none():
    inputs = make_inputs(2, 40)
    assert_state(sums(inputs), inputs)
    assert_state(sums(inputs, softcap=1e30), inputs, softcap=1e30)


def test_a_probability_of_one_keeps_what_is_left_of_it():
    """p - 1 is formed before it is rounded to half precision."""
    logits = torch.tensor([[0.0, -9.0]])
    lse = logits.logsumexp(1)
    coefficients = torch.tensor([[1.0, 1, 0]])
    for dtype in DTYPES:
        dz = torch.empty(1, 2, dtype=dtype)
        kernels.gradient_(dz, logits, torch.tensor([0]), lse, coefficients, 0, 0.0, None)
        want = math.exp(-9) / (1 + math.exp(-9))
        rounding = max(torch.finfo(dtype).eps * want, 2.0**-24) + 2 * U
        assert abs(dz[0, 1].item() - want) <= rounding and abs(dz[0, 0].item() + want) <= rounding


# Targets


@pytest.mark.parametrize("first", [0, 5, 2**31 - 9])
def test_only_a_target_of_the_block_is_read(first):
    """Whatever the others are; what lies around the block is nobody's."""
    classes = [0, 1, 4, 5, 6, 9, 10, 100, -1, -100, -(2**63), 2**63 - 1, 2**32 + 5, 2**31 - 5, 2**31]
    target = torch.tensor(classes)
    buffer = torch.arange(3.0 * 5 * len(classes)).view(len(classes), 15) / 100
    logits = buffer[:, 5:10]
    state, dz = begun(len(classes)), torch.full((len(classes), 5), NAN)
    kernels.sums_(state, logits, target, first, 0.0, None, True)
    coefficients = torch.tensor([0.0, 1, 0]).repeat(len(classes), 1)
    kernels.gradient_(dz, logits, target, state[:, 0], coefficients, first, 0.0, None)
    for row, t in enumerate(classes):
        want = torch.zeros(5)
        if first <= t < first + 5:
            assert state[row, 2] == logits[row, t - first]
            want[t - first] = 1
        else:
            assert state[row, 2].isnan()
        assert torch.equal(dz[row], -want)


def test_what_is_not_asked_for_stays():
    inputs = make_inputs(3, 20)
    state = sums(inputs, smooths=False)
    assert torch.equal(state[:, 3], torch.zeros(3))
    assert torch.equal(state[:, :3], sums(inputs)[:, :3])
    before = state.clone()
    kernels.sums_(state, inputs.logits, inputs.target, 20, 0.0, inputs.class_weight, False)
    assert torch.equal(state[:, 2:], before[:, 2:]) and torch.equal(state[:, 0], before[:, 0])


# What is no number


@numpy_may_warn
@pytest.mark.parametrize("block", [None, 7, TILE])
def test_excluded_classes(block):
    """Of a block, of the first ones, of the last ones, of a row, and all but one."""
    vocabulary = TILE + 30
    inputs = make_inputs(5, vocabulary)
    logits = inputs.logits.clone()
    logits[0, 7:21] = logits[1, : vocabulary - 3] = logits[2, 3:] = logits[3, :] = -INF
    logits[4, torch.arange(vocabulary) != 11] = -INF
    inputs = inputs._replace(logits=logits, target=torch.tensor([0, vocabulary - 1, 2, 1, 11]))
    if block == 7:  # the ends alone, each lane of the first tile in blocks that are small
        keep = torch.cat([torch.arange(25), torch.arange(vocabulary - 10, vocabulary)])
        inputs = inputs._replace(logits=logits[:, keep], target=torch.tensor([0, 34, 2, 1, 11]))
    state = sums(inputs, block=block, smooths=False)
    lse = state[:, 0] + state[:, 1].log()
    want = inputs.logits.double().logsumexp(1)
    rows = torch.tensor([True, True, True, False, True])
    assert torch.equal(state[3, :3], torch.tensor([-INF, 0, -INF])) and lse[3] == -INF
    assert ((lse.double() - want)[rows].abs() <= 200 * U).all()
    assert torch.equal(
        state[4, :3], torch.stack([inputs.logits[4, 11], torch.ones(()), inputs.logits[4, 11]])
    )

    dz = gradient(inputs, lse, block=block)
    p = (inputs.logits.double() - lse.double()[:, None]).exp()
    a, b, c = inputs.coefficients.double().T[:, :, None]
    value = a * p - b * torch.nn.functional.one_hot(inputs.target, p.shape[1]) - c
    assert ((dz.double() - value)[rows].abs() <= 1e-5 * (a.abs() + b.abs() + c.abs())[rows]).all()
    assert torch.equal(dz[rows][p[rows] == 0], (-c.float()).expand(p.shape)[rows][p[rows] == 0])
    assert dz[3].isnan().all()  # as of the softmax of such a row


@numpy_may_warn
def test_excluded_classes_weigh_nothing_in_no_smoothing():
    """With smoothing their loss is infinite, as the formula has it."""
    inputs = make_inputs(2, 10)
    inputs.logits[0, 3] = -INF
    assert torch.equal(sums(inputs, weighted=True, smooths=False)[:, 3], torch.zeros(2))
    weighted = sums(inputs, weighted=True)[:, 3]
    assert weighted[0] == -INF and weighted[1].isfinite()


@numpy_may_warn
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("block", [None, 4])
def test_nan_stays_in_its_row(block, softcap):
    inputs = make_inputs(4, 11)
    want = sums(inputs, block=block, softcap=softcap)
    for column in (0, 5, 10):
        logits = inputs.logits.clone()
        logits[1, column] = NAN
        spoilt = inputs._replace(logits=logits)
        state = sums(spoilt, block=block, softcap=softcap)
        assert (state[1, 0] + state[1, 1].log()).isnan() and state[1, 3].isnan()
        others = torch.tensor([0, 2, 3])
        assert torch.equal(state[others], want[others])
        lse = state[:, 0] + state[:, 1].log()
        dz = gradient(spoilt, lse, block=block, softcap=softcap)
        assert dz[1].isnan().all() and dz[others].isfinite().all()


@numpy_may_warn
@pytest.mark.parametrize("block", [None, 1, 4])
def test_infinity_is_that_of_logsumexp(block):
    """In any place, and in two that are of one lane."""
    vocabulary, last = (11, 10) if block else (TILE + 3, TILE)
    logits = make_inputs(6, vocabulary).logits
    logits[0, 3] = logits[1, 0] = logits[1, last] = logits[2, 5] = INF
    logits[2, 6] = NAN
    logits[3, 9] = logits[3, 1] = INF
    logits[3, 0] = logits[4, :] = -INF
    state = sums(make_inputs(6, vocabulary)._replace(logits=logits), block=block, smooths=False)
    lse, want = state[:, 0] + state[:, 1].log(), logits.logsumexp(1)
    assert torch.equal(lse[:5].nan_to_num(7, 8, 9), want[:5].nan_to_num(7, 8, 9))
    assert state[[0, 1, 3], 1].tolist() == [1, 2, 2]
    assert (lse[5] - want[5]).abs() <= 100 * U


@numpy_may_warn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "weighted"), [(0.0, False), (3.0, True)])
def test_a_row_without_coefficients_is_zero(dtype, softcap, weighted):
    """Whatever it holds, as the token that is ignored; any one coefficient makes another of it, NaN too."""
    inputs = make_inputs(8, 40)
    logits = inputs.logits.clone()
    logits[0], logits[1, 3], logits[2] = NAN, INF, -INF
    coefficients = inputs.coefficients.clone()
    coefficients[:4] = torch.tensor([0.0, -0.0, 0.0])
    coefficients[4:7] = torch.diag(torch.tensor([2.0, NAN, 2.0]))
    lse = torch.tensor([NAN, INF, -INF, 3, 4, 4, 4, 4])
    target = torch.tensor([0, 3, -100, 2, 7, 7, 7, 7])
    inputs = Inputs(logits, target, inputs.class_weight, coefficients)
    dz = gradient(inputs, lse, block=33, softcap=softcap, weighted=weighted, dtype=dtype)
    assert torch.equal(dz[:4], torch.zeros(4, 40, dtype=dtype))
    assert dz[5, 7].isnan() and dz[[4, 6, 7]].isfinite().all()
    assert dz[4:].bool().sum(1).tolist() == [40, 1, 40, 40]


def test_all_rows_are_ignored():
    inputs = make_inputs(5, 12)
    inputs = inputs._replace(coefficients=torch.zeros(5, 3), target=torch.full((5,), -100))
    state = sums(inputs)
    assert state[:, 2].isnan().all()
    assert torch.equal(gradient(inputs, state[:, 0], block=5), torch.zeros(5, 12))


# Layouts, and calls


def test_no_rows():
    inputs = make_inputs(0, 5)
    state, dz = begun(0), torch.empty(0, 5, dtype=BFLOAT)
    kernels.sums_(state, inputs.logits, inputs.target, 0, 0.0, None, True)
    kernels.gradient_(dz, inputs.logits, inputs.target, torch.empty(0), inputs.coefficients, 0, 0.0, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_in_wider_ones(dtype):
    """Nothing is read or written beside them."""
    inputs = make_inputs(3, 50)
    expected = sums(inputs, softcap=3.0, weighted=True)
    lse = expected[:, 0] + expected[:, 1].log()
    want = gradient(inputs, lse, softcap=3.0, weighted=True, dtype=dtype)
    wide, wide_dz, wide_state = torch.full((3, 70), NAN), torch.full((3, 64), 3.0, dtype=dtype), begun(3)
    wide_state = torch.cat([torch.full((3, 2), 5.0), wide_state, torch.full((3, 2), 5.0)], 1)
    logits, dz, state = wide[:, 3:53].copy_(inputs.logits), wide_dz[:, 7:57], wide_state[:, 2:6]
    arguments = (
        inputs.target.repeat_interleave(2)[::2],
        0,
        3.0,
        inputs.class_weight.repeat_interleave(3)[::3],
    )
    kernels.sums_(state, logits, *arguments, True)
    assert torch.equal(state, expected) and (wide_state[:, [0, 1, 6, 7]] == 5).all()
    target, first, softcap, class_weight = arguments
    coefficients = inputs.coefficients.T.contiguous().T
    of_lse = torch.stack([lse, lse + 1], 1)[:, 0]
    kernels.gradient_(dz, logits, target, of_lse, coefficients, first, softcap, class_weight)
    assert torch.equal(dz, want)
    dz.fill_(3)
    assert (wide_dz == 3).all()


FAR = 2**30 + 8  # a stride: it fits, but twice it does not


def test_beyond_32_bits(tmp_path):
    """In a file of holes; where 32 bits would go instead there are zeros."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * 2**30, dtype=FLOAT)
    inputs = make_inputs(3, 9)
    begins = itertools.count(2**31, 4096)

    def far(t):
        return memory.as_strided(t.shape, (FAR, 1), next(begins)).copy_(t)

    expected = sums(inputs)
    lse = expected[:, 0] + expected[:, 1].log()
    logits, state, dz = far(inputs.logits), far(begun(3)), far(torch.full((3, 9), NAN))
    kernels.sums_(state, logits, inputs.target, 0, 0.0, None, True)
    assert torch.equal(state, expected)
    kernels.gradient_(dz, logits, inputs.target, lse, inputs.coefficients, 0, 0.0, None)
    assert torch.equal(dz, gradient(inputs, lse))


def test_bits_repeat_and_a_row_has_its_own():
    """Whatever is beside it; arguments are left alone."""
    inputs = make_inputs(4, TILE + 70)
    before = [t.clone() for t in inputs]
    state = sums(inputs, block=TILE, softcap=2.0, weighted=True)
    lse = state[:, 0] + state[:, 1].log()
    dz = gradient(inputs, lse, block=TILE, softcap=2.0, weighted=True)
    one = Inputs(inputs.logits[2:3], inputs.target[2:3], inputs.class_weight, inputs.coefficients[2:3])
    for some, rows in ((inputs, slice(None)), (one, slice(2, 3))):
        again = sums(some, block=TILE, softcap=2.0, weighted=True)
        assert torch.equal(again, state[rows])
        assert torch.equal(gradient(some, lse[rows], block=TILE, softcap=2.0, weighted=True), dz[rows])
    assert all(map(torch.equal, inputs, before))


# The op


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_the_op(monkeypatch, everything, dtype, reduction, with_lse):
    """In several blocks of classes and of tokens."""
    monkeypatch.setattr(products, "_BLOCK_TOKENS", 10)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 10 * 4 * 30)
    options: dict[str, Any] = {"reduction": reduction}
    if everything:
        options |= {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}
    tensors = dict.fromkeys(("linear_bias", "weight", "token_weight", "ignored"), everything)
    inputs = op.make_inputs(23, 70, 8, dtype=dtype, reduction=reduction, **tensors)
    op.check(inputs, options, with_lse=with_lse, impl="triton")
