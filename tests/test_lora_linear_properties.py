"""What ops.lora_linear must be whatever its sizes: linear, of tokens apart, of ranks in any order."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS, low_rank
from fastkit.testing import LinearSize, assert_matches_reference
from fastkit.testing.lora_linear import SCALE, expected_results, make_inputs

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def given_calls(test):
    """Runs ``test`` on many sizes, with and without a bias, a mask and lora_x; always the same ones."""
    inputs = strategies.builds(
        make_inputs,
        strategies.builds(
            LinearSize,
            N=strategies.integers(1, 60),
            D=strategies.integers(1, 60),
            O=strategies.integers(1, 60),
            R=strategies.integers(1, 20),
        ),
        bias=strategies.booleans(),
        mask=strategies.booleans(),
        lora_x=strategies.booleans(),
        seed=strategies.integers(0, 1000),
    )
    settings = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(inputs=inputs)(test))


def layer(impl, inputs, op=lora_linear, **changes):
    x, weight, bias, a, b, mask, lora_x, _ = inputs._replace(**changes)
    return op(x, weight, bias, a, b, SCALE, mask=mask, lora_x=lora_x, impl=impl)


@given_calls
def test_linear_in_lora_b_and_in_x(impl, inputs):
    """Of small integers, whose sums are exact."""
    x, weight, bias, a, b, mask, lora_x, gy = (
        t if t is None or t.dtype == torch.bool else t.round() for t in inputs
    )
    call = {"mask": mask, "lora_x": lora_x, "impl": impl}
    other = (2 * b + 1).flip(0)
    y, of_other, of_both, frozen = (
        lora_linear(x, weight, bias, a, some, 0.5, **call) for some in (b, other, 3 * b - other, 0 * b)
    )
    assert torch.equal(of_both, 3 * y - of_other - frozen)
    assert torch.equal(frozen, torch.nn.functional.linear(x, weight, bias))
    call["lora_x"] = None
    other = (2 * x + 1).flip(0)
    y, of_other, of_both, of_zero = (
        lora_linear(some, weight, bias, a, b, 0.5, **call) for some in (x, other, 3 * x - other, 0 * x)
    )
    assert torch.equal(of_both, 3 * y - of_other - of_zero)
    assert torch.equal(of_zero, torch.zeros_like(gy) if bias is None else bias.expand_as(gy))


@given_calls
def test_a_token_depends_on_no_other(impl, inputs):
    """A change of all tokens but one leaves its y and its gradients alone, bit for bit."""
    N = len(inputs.x)
    token = N // 2
    others = torch.arange(N) != token
    changed = {}
    for name in ("x", "lora_x", "gy"):
        if (t := getattr(inputs, name)) is not None:
            changed[name] = torch.where(others.unsqueeze(1), -3 * t, t).requires_grad_(name != "gy")
    results = []
    for some in (inputs, inputs._replace(**changed)):
        leaves = [t.detach().requires_grad_() for t in (some.x, some.lora_x) if t is not None]
        y = layer(impl, some, x=leaves[0], lora_x=leaves[1] if len(leaves) > 1 else None)
        gradients = torch.autograd.grad(y, leaves, some.gy.detach())
        results.append([y.detach(), *gradients])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[token], after[token])
    assert (results[0][0][others] != results[1][0][others]).any(1).all()


@given_calls
def test_tokens_in_another_order_are_the_same_tokens(impl, inputs):
    """In the addition alone bit for bit, wherever a token lies."""
    if impl == "reference":
        pytest.skip("the vendor's products take many tokens at a time, and the last ones in another way")
    x, _, _, a, b, mask, lora_x, _ = inputs
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    y = low_rank(x, a, b, SCALE, mask=mask, lora_x=lora_x).y
    permuted = low_rank(x[order], a, b, SCALE, mask=mask, lora_x=None if lora_x is None else lora_x[order]).y
    assert torch.equal(permuted, y[order])
    one = low_rank(x[-1:], a, b, SCALE, mask=mask, lora_x=None if lora_x is None else lora_x[-1:]).y
    assert torch.equal(one, y[-1:])


@given_calls
def test_the_order_of_ranks_is_no_matter(impl, inputs):
    order = torch.randperm(inputs.lora_a.shape[0], generator=torch.Generator().manual_seed(0))
    mask = None if inputs.mask is None else inputs.mask[order]
    y = layer(impl, inputs, lora_a=inputs.lora_a[order], lora_b=inputs.lora_b[:, order], mask=mask)
    assert_matches_reference(y, *expected_results(inputs)["y"])


@given_calls
def test_ranks_of_zero_may_be_added(impl, inputs):
    """As many as fill a vector, or not; each rank's own sums are as before."""
    more = torch.zeros(5, inputs.x.shape[1])
    a = torch.cat([inputs.lora_a, more])
    b = torch.cat([inputs.lora_b, torch.zeros(inputs.lora_b.shape[0], 5)], 1)
    mask = None if inputs.mask is None else torch.cat([inputs.mask, more == 0])
    y = layer(impl, inputs, lora_a=a, lora_b=b, mask=mask)
    assert_matches_reference(y, *expected_results(inputs)["y"])


@given_calls
def test_scale_moves_into_b(impl, inputs):
    """And back out, as powers of two bit for bit."""
    x, weight, bias, a, b, mask, lora_x, _ = inputs
    options = {"mask": mask, "lora_x": lora_x, "impl": impl}
    y = lora_linear(x, weight, bias, a, b, 0.25, **options)
    assert torch.equal(y, lora_linear(x, weight, bias, a, b / 4, 1, **options))
    in_b = lora_linear(x, weight, bias, a, (SCALE * b.double()).float(), 1.0, **options)
    assert_matches_reference(in_b, *expected_results(inputs)["y"])


@given_calls
def test_a_mask_is_a_with_zeros(impl, inputs):
    """Bit for bit, the gradients too, but for that of A where it is pruned."""
    mask = torch.rand(inputs.lora_a.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    results = []
    for some in (inputs._replace(mask=mask), inputs._replace(mask=None, lora_a=inputs.lora_a * mask)):
        leaves = {n: getattr(some, n).detach().requires_grad_() for n in ("x", "lora_a", "lora_b")}
        y = layer(impl, some, **leaves)
        results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), inputs.gy)])
    results[1][2] *= mask
    for masked, zeroed in zip(*results, strict=True):
        assert torch.equal(masked, zeroed)


@given_calls
def test_lora_x_equal_to_x_is_none(impl, inputs):
    y = layer(impl, inputs, lora_x=None)
    assert torch.equal(layer(impl, inputs, lora_x=inputs.x.clone()), y)


@given_calls
def test_square_sums_of_parts_add_up(impl, inputs):
    """Of the statistic, whatever the low-rank part sees."""
    value, budget = expected_results(inputs)["square_sum"]
    cut = len(inputs.x) // 3
    parts = []
    for some in (slice(None, cut), slice(cut, None)):
        lora_x = None if inputs.lora_x is None else inputs.lora_x[some]
        parts.append(layer(impl, inputs, lora_linear_with_stats, x=inputs.x[some], lora_x=lora_x).square_sum)
    assert_matches_reference(parts[0].double() + parts[1].double(), value, budget)
    whole = layer(impl, inputs, lora_linear_with_stats).square_sum
    assert_matches_reference(whole, value, budget)
