"""What holds bit for bit in lora_linear: where a NaN goes, and that runs are equal."""

import math

import pytest
import torch

from fastkit._threads import threads
from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.lora_linear import low_rank
from fastkit.testing import LinearSize, assert_matches_reference
from fastkit.testing.lora_linear import SCALE, check, expected_results, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

NAMES = "x", "weight", "bias", "lora_a", "lora_b", "lora_x"
EVERY = slice(None)


def run(inputs, op=lora_linear_with_stats, **options):
    """Results and gradients by name."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in NAMES
        if (tensor := getattr(inputs, name)) is not None
    }
    x, weight, bias, a, b = (leaves.get(name) for name in NAMES[:5])
    lora_x = leaves.get("lora_x")
    y, square_sum = op(x, weight, bias, a, b, SCALE, mask=inputs.mask, lora_x=lora_x, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.gy, allow_unused=True)
    named = {f"g{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"y": y.detach(), "square_sum": square_sum, **named}


def assert_all_equal(results, expected):
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(
            results[name], want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# NaN and infinity


TOKEN, COLUMN, OUTPUT, RANK = 17, 9, 4, 2

# What is spoiled, where, and where that is to be seen. A pruned entry of A times NaN is NaN, as in any
# product, and the gradient of A is zero there nonetheless.
REACHED = {
    "x": ((TOKEN, COLUMN), {
        "y": TOKEN, "square_sum": COLUMN, "gweight": (EVERY, COLUMN), "glora_a": (EVERY, COLUMN),
        "glora_b": EVERY,
    }),
    "gy": ((TOKEN, OUTPUT), {
        "gx": TOKEN, "gweight": OUTPUT, "gbias": OUTPUT, "glora_a": EVERY, "glora_b": OUTPUT,
    }),
    "weight": ((OUTPUT, COLUMN), {"y": (EVERY, OUTPUT), "gx": (EVERY, COLUMN)}),
    "bias": ((OUTPUT,), {"y": (EVERY, OUTPUT)}),
    "lora_a": ((RANK, COLUMN), {"y": EVERY, "gx": (EVERY, COLUMN), "glora_b": (EVERY, RANK)}),
    "lora_b": ((OUTPUT, RANK), {"y": (EVERY, OUTPUT), "gx": EVERY, "glora_a": RANK}),
}  # fmt: skip
REACHED_BESIDE = {
    **REACHED,
    "x": ((TOKEN, COLUMN), {"y": TOKEN, "square_sum": COLUMN, "gweight": (EVERY, COLUMN)}),
    "lora_x": ((TOKEN, COLUMN), {"y": TOKEN, "glora_a": (EVERY, COLUMN), "glora_b": EVERY}),
    "gy": ((TOKEN, OUTPUT), {**REACHED["gy"][1], "glora_x": TOKEN}),
    "lora_a": ((RANK, COLUMN), {"y": EVERY, "glora_x": (EVERY, COLUMN), "glora_b": (EVERY, RANK)}),
    "lora_b": ((OUTPUT, RANK), {"y": (EVERY, OUTPUT), "glora_x": EVERY, "glora_a": RANK}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spoiled", "lora_x"),
    [*((name, False) for name in REACHED), *((name, True) for name in REACHED_BESIDE)],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(impl, spoiled, lora_x, dtype):
    """All else is as without it, bit for bit."""
    if impl != "reference" and dtype not in KERNELS[impl]:
        pytest.skip(f"{impl} has no {dtype}")
    inputs = make_inputs(LinearSize(29, 13, 11, 5), lora_x=lora_x, dtype=dtype)
    inputs.mask[RANK, COLUMN] = True
    expected = run(inputs, impl=impl)
    at, where = (REACHED_BESIDE if lora_x else REACHED)[spoiled]
    tensor = getattr(inputs, spoiled).clone()
    tensor[at] = math.nan
    for name, index in where.items():
        expected[name][index] = math.nan
    expected["glora_a"].masked_fill_(~inputs.mask, 0.0)
    assert_all_equal(run(inputs._replace(**{spoiled: tensor}), impl=impl), expected)


@pytest.mark.parametrize("tokens", [1, 3, 5, 23, 24, 25])
def test_nan_of_a_token_is_gone_in_the_next_block(native, tokens):
    """Kernels take several tokens at a time, and what lies behind the last one is what was there before."""
    inputs = make_inputs(LinearSize(24 + tokens, 13, 11, 5))
    expected = run(inputs, impl=native)
    x = inputs.x.clone()
    x[:24] = math.nan
    results = run(inputs._replace(x=x), impl=native)
    assert torch.equal(results["y"][24:], expected["y"][24:]) and results["y"][:24].isnan().all()
    assert torch.equal(results["gx"], expected["gx"])


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_stays_in_its_token_and_its_column(impl, value):
    inputs = make_inputs(LinearSize(29, 13, 11, 5))
    expected = run(inputs, impl=impl)
    x = inputs.x.clone()
    x[TOKEN, COLUMN] = value
    results = run(inputs._replace(x=x), impl=impl)
    expected["square_sum"][COLUMN] = math.inf
    assert torch.equal(results["square_sum"], expected["square_sum"])
    assert not results["y"][TOKEN].isfinite().any()
    others = torch.arange(29) != TOKEN
    assert torch.equal(results["y"][others], expected["y"][others])
    assert torch.equal(results["gx"], expected["gx"])


def test_a_mask_does_not_hide_an_infinity_of_x(impl):
    """A pruned entry is zero, and zero times infinity is NaN; A's own infinity it does hide."""
    x, a, b = torch.tensor([[math.inf, 1.0]]), torch.tensor([[math.inf, 1.0]]), torch.ones(1, 1)
    mask = torch.tensor([[False, True]])
    weight = torch.zeros(1, 2)
    assert lora_linear(x, weight, None, a, b, 1.0, mask=mask, impl=impl).isnan().all()
    y = lora_linear(torch.ones(1, 2), weight, None, a, b, 1.0, mask=mask, impl=impl)
    assert torch.equal(y, torch.ones(1, 1))


# Overflow


def test_between_a_and_b_half_precision_does_not_overflow(impl):
    """h is float32; y beyond 65504 is inf, and its neighbours are as they were."""
    x = torch.full((3, 16), 250.0, dtype=torch.float16)
    a = torch.full((2, 16), 250.0, dtype=torch.float16)
    b = torch.tensor([[2.0**-10, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float16)
    y = lora_linear(x, torch.zeros(4, 16, dtype=torch.float16), None, a, b, 1.0, impl=impl)
    h = 250.0 * 250.0 * 16
    assert torch.equal(y, torch.tensor([h / 1024, math.inf, -math.inf, 0.0]).half().expand(3, 4))


def test_squares_of_half_precision_do_not_overflow(impl):
    """Their sums are float32, of float32 squares; float32's own overflow is inf."""
    weight, a, b = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1)
    x = torch.tensor([[60000.0, 3.0], [60000.0, 4.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        of = [t.to(dtype) for t in (x, weight, a, b)]
        square_sum = lora_linear_with_stats(*of[:2], None, *of[2:], 1.0, impl=impl).square_sum
        assert torch.equal(square_sum, of[0].float().square().sum(0))
    square_sum = lora_linear_with_stats(1e20 * x, weight, None, a, b, 1.0, impl=impl).square_sum
    assert torch.equal(square_sum, torch.tensor([math.inf, math.inf]))


# Subnormal numbers


def assert_subnormal_numbers_are_kept_outside():
    small = torch.full((100_000,), 1e-40)
    assert (small * 1 == small).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormal_numbers(native, dtype):
    """x, A, h and gradients of A may be flushed to zero, in the kernel and nowhere else."""
    inputs = make_inputs(LinearSize(29, 13, 11, 5), bias=False, dtype=dtype)
    tiny = torch.finfo(torch.float32).tiny
    for small in (
        {"x": 1e-3 * tiny * inputs.x.double()},
        {"lora_a": 1e-3 * tiny * inputs.lora_a.double()},
        {"x": 1e-20 * inputs.x.double(), "lora_a": 1e-20 * inputs.lora_a.double()},
        {"gy": 1e-3 * tiny * inputs.gy.double()},
    ):
        some = inputs._replace(**{name: t.to(dtype) for name, t in small.items()})
        results = run(some, impl=native)
        for name, (value, budget) in expected_results(some).items():
            assert ((results[name] - value).abs() <= budget).all(), name
    assert_subnormal_numbers_are_kept_outside()


def test_subnormal_float16_is_kept(native):
    """It is a normal float32."""
    x = torch.full((7, 5), torch.finfo(torch.float16).smallest_normal / 4, dtype=torch.float16)
    one = torch.eye(5, dtype=torch.float16)
    y = low_rank(x, one, one, 1.0).y
    assert torch.equal(y, x)


# Equal runs


CALLS = {
    "many-tokens": (LinearSize(5000, 64, 48, 8), torch.float32, False),
    "dropout": (LinearSize(3000, 100, 97, 9), torch.float32, True),
    "half": (LinearSize(3000, 65, 40, 16), torch.bfloat16, False),
    "wide": (LinearSize(100, 1000, 700, 12), torch.float64, True),
}


def of_threads(count, call):
    with threads(count):
        return call()


@pytest.mark.parametrize("call", CALLS)
def test_ten_runs_are_equal_with_1_thread_and_with_2(native, call):
    """By turns, each number of threads with itself."""
    size, dtype, lora_x = CALLS[call]
    inputs = make_inputs(size, lora_x=lora_x, dtype=dtype)
    first = [of_threads(count, lambda: run(inputs, impl=native)) for count in (1, 2)]
    for i in range(8):
        assert_all_equal(of_threads(1 + i % 2, lambda: run(inputs, impl=native)), first[i % 2])


@pytest.mark.parametrize("call", CALLS)
def test_the_number_of_threads_is_no_matter_to_what_is_not_summed_over_tokens(native, call):
    """To the addition and the gradient of what it sees; sums over tokens are within their budgets."""
    size, dtype, lora_x = CALLS[call]
    inputs = make_inputs(size, lora_x=lora_x, bias=False, dtype=dtype)
    inputs = inputs._replace(weight=torch.zeros_like(inputs.weight))

    def alone(x, weight, bias, a, b, scale, *, mask, lora_x):
        return low_rank(x, a, b, scale, mask=mask, lora_x=lora_x, stats=True)

    first, *others = (of_threads(count, lambda: run(inputs, alone)) for count in (1, 2, 3))
    expected = expected_results(inputs)
    for other in others:
        for name in ("y", "gx", *(["glora_x"] if lora_x else [])):
            assert torch.equal(other[name], first[name]), name
        for name in ("glora_a", "glora_b", "square_sum"):
            assert_matches_reference(other[name], *expected[name], name=name)


def test_where_a_call_lies_in_memory_is_no_matter(native):
    """Loads may be unaligned; the bits are those of the aligned ones."""
    inputs = make_inputs(LinearSize(50, 33, 20, 5))
    x, _, _, a, b, mask, *_ = inputs
    expected = low_rank(x, a, b, SCALE, mask=mask, stats=True)
    for offset in (1, 3, 7):
        moved = torch.empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        y, square_sum = low_rank(moved, a, b, SCALE, mask=mask, stats=True)
        assert torch.equal(y, expected.y) and torch.equal(square_sum, expected.square_sum)
    check(inputs, impl=native)
