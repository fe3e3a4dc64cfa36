"""ops.moments and ops.merge_moments against the oracle, their derivatives, and awkward inputs."""

import importlib
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from fastkit import reference
from fastkit.ops import Moments, merge_moments, moments
from fastkit.ops.moments import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.moments import SIZES, RowsSize, check, expected_of_stream, expected_results, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # forward mode
]

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
WEIGHTS = None, "positive", "some"


def assert_all_equal(found, want):
    for name, result, expected in zip(Moments._fields, found, want, strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected), name


# Against the oracle, forward and each gradient


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_oracle(size, dtype, weights, impl):
    check(make_inputs(size, weights=weights, dtype=dtype), impl=impl)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_mean_does_no_harm(offset, weights, impl):
    """The budget of the scatter knows the mean in terms of u^2 alone."""
    for size in (SIZES[8], SIZES[12]):
        inputs = make_inputs(size, weights=weights, offset=offset)
        check(inputs, impl=impl)
    scatter = expected_results(inputs)["scatter"]
    if offset == 1e4:
        assert (scatter.budget.diagonal() < 1e-4 * scatter.value.diagonal()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_may_have_weights_of_float32(dtype, impl):
    inputs = make_inputs(SIZES[10], weights="some", dtype=dtype)
    weights = (0.1 + torch.rand(65)).requires_grad_()
    check(inputs._replace(weights=weights.detach()), impl=impl)
    moments(inputs.x, weights=weights, impl=impl).scatter.sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("weights", WEIGHTS)
def test_without_a_kernel_the_reference_has_these_gradients(weights, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastkit.ops.moments"), "KERNELS", {})
    for size in SIZES[8:13]:
        check(make_inputs(size, weights=weights))


# Derivatives


@pytest.mark.parametrize("size", [RowsSize(1, 2), RowsSize(5, 1), RowsSize(4, 3)], ids=str)
def test_gradients_of_two_orders(size, impl):
    x, w, *_ = make_inputs(size, weights="positive", dtype=torch.float64, offset=1.0)
    x.requires_grad_(), w.requires_grad_()
    alone = lambda x: moments(x, impl=impl)[1:]  # noqa: E731
    weighted = lambda x, w: moments(x, weights=w, impl=impl)  # noqa: E731
    for call, given in ((alone, (x,)), (weighted, (x, w))):
        assert gradcheck(call, given) and gradgradcheck(call, given)


def test_gradients_of_the_third_order(impl):
    x, w, *_ = make_inputs(RowsSize(3, 2), weights="positive", dtype=torch.float64)

    def first(x, w):
        found = moments(x, weights=w, impl=impl)
        loss = found.scatter.square().sum() + found.mean.prod() * found.count
        return torch.autograd.grad(loss, (x, w), create_graph=True)

    assert gradgradcheck(first, (x.requires_grad_(), w.requires_grad_()))


def test_gradients_of_covariance_and_second_moment():
    x, w, *_ = make_inputs(RowsSize(5, 3), weights="positive", dtype=torch.float64, offset=1.0)

    def both(x, w):
        found = moments(x, weights=3 * w)
        return found.covariance(), found.covariance(0.5), found.second_moment()

    given = x.requires_grad_(), w.requires_grad_()
    assert gradcheck(both, given) and gradgradcheck(both, given)


def test_only_what_is_asked_for_is_computed(impl):
    x, w, *_ = make_inputs(SIZES[8], weights="some")
    for leaf in ("x", "weights"):
        given = {"x": x.clone(), "weights": w.clone()}
        given[leaf].requires_grad_()
        found = moments(**given, impl=impl)
        found.scatter.sum().backward()
        assert given[leaf].grad is not None
        assert found.count.requires_grad == (leaf == "weights")
    for output in range(3):  # one result alone
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        result = moments(leaves[0], weights=leaves[1], impl=impl)[output].sum()
        want = reference.moments(leaves[0], weights=leaves[1])[output].sum()
        for found, expected in zip(
            torch.autograd.grad(result, leaves, materialize_grads=True),
            torch.autograd.grad(want, leaves, materialize_grads=True),
            strict=True,
        ):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_has_a_gradient(impl):
    """By a difference from the right, since negative weights are refused."""
    x, w, *_ = make_inputs(RowsSize(9, 3), weights="some", dtype=torch.float64)
    i, step = int((w == 0).nonzero()[0]), 1e-7
    after = w.clone()
    after[i] = step
    loss = lambda w: sum(t.sum() for t in moments(x, weights=w, impl=impl))  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(w.requires_grad_()), w)
    assert torch.isclose(gradient[i], (loss(after) - loss(w)) / step, rtol=1e-5)


def test_without_weight_there_is_no_gradient_but_the_count(impl):
    x, w = torch.randn(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    found = moments(x, weights=w, impl=impl)
    loss = found.count * 5 + found.mean.sum() + found.scatter.sum()
    gx, gw = torch.autograd.grad(loss, (x, w), create_graph=True)
    assert torch.equal(gx, torch.zeros(4, 3)) and torch.equal(gw, torch.full((4,), 5.0))


def test_forward_mode_and_transforms():
    x, w, *_ = make_inputs(RowsSize(7, 3), weights="positive", dtype=torch.float64)
    dx, dw = torch.randn_like(x), torch.randn_like(w)
    call = lambda x, w: tuple(moments(x, weights=w))  # noqa: E731
    _, tangents = torch.func.jvp(call, (x, w), (dx, dw))
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    outputs = call(*leaves)
    cotangents = [torch.randn_like(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    forward = sum((t * g).sum() for t, g in zip(tangents, cotangents, strict=True))
    backward = (gradients[0] * dx).sum() + (gradients[1] * dw).sum()
    assert torch.isclose(forward, backward)
    loss = lambda x, w: moments(x, weights=w).covariance(0).square().sum()  # noqa: E731
    assert torch.func.hessian(loss)(x, w).shape == (7, 3, 7, 3)
    batch = torch.randn(4, 7, 3), torch.rand(4, 7)
    for found, want in zip(
        torch.vmap(lambda x, w: moments(x, weights=w).covariance())(*batch),
        [moments(x, weights=w).covariance() for x, w in zip(*batch, strict=True)],
        strict=True,
    ):
        assert torch.allclose(found, want, rtol=1e-4, atol=1e-6)
    merge = lambda x: merge_moments(moments(x[:2]), moments(x[2:])).scatter  # noqa: E731
    for found, x in zip(torch.vmap(merge)(batch[0]), batch[0], strict=True):
        assert torch.allclose(found, moments(x).scatter, rtol=1e-4, atol=1e-5)


def test_compiled_in_one_graph():
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, w):
        found = moments(x, weights=w)
        return found, found.covariance(), merge_moments(found, moments(x[1:]))

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for size in (RowsSize(5, 3), RowsSize(9, 4), RowsSize(17, 33)):
        x, w, *_ = make_inputs(size, weights="positive")
        leaves = x.requires_grad_(), w.requires_grad_()
        results = [compiled(*leaves), call(*leaves)]
        for one, other in zip(*([*r[0], r[1], *r[2]] for r in results), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(r[0].scatter.sum() + r[1].sum(), leaves) for r in results]
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# Awkward inputs


def test_any_strides_will_do(impl):
    x, w, *_ = make_inputs(RowsSize(17, 6), weights="some", dtype=torch.float64)
    want = moments(x, weights=w, impl=impl)
    wide = torch.full((34, 13), torch.nan, dtype=torch.float64)
    wide[::2, 1::2] = x
    spread = torch.full((34,), torch.nan, dtype=torch.float64)
    spread[1::2] = w
    for some in (wide[::2, 1::2], x.T.contiguous().T, x.flip(0).flip(0)):
        for of_weights in (w, spread[1::2]):
            found = moments(some, weights=of_weights, impl=impl)
            for result, expected in zip(found, want, strict=True):
                assert torch.allclose(result, expected, rtol=1e-13)
    row = torch.tensor([[1.0, 2, 4]])
    found = moments(row.expand(5, 3), weights=torch.tensor(0.5).expand(5), impl=impl)
    assert found.count == 2.5 and torch.equal(found.mean, row[0])
    assert torch.equal(found.scatter, torch.zeros(3, 3))


@pytest.mark.parametrize("offset", [0.1, 1e4 + 0.3, -1e30])
def test_a_constant_column_has_no_scatter(offset, impl):
    x = torch.randn(1000, 3)
    x[:, 1] = offset
    for weights in (None, torch.rand(1000)):
        found = moments(x, weights=weights, impl=impl)
        assert torch.allclose(found.mean[1], torch.tensor(offset), rtol=1e-6)
        assert found.scatter[1, 1] <= 1e-7 * 1000 * (1e-7 * offset) ** 2
        assert (found.scatter.diagonal() >= 0).all()


def test_one_row_has_no_scatter(impl):
    x = torch.randn(1, 5, dtype=torch.float64)
    found = moments(x, impl=impl)
    assert_all_equal(found, Moments(torch.ones((), dtype=torch.float64), x[0], 0 * x.T @ x))


@pytest.mark.parametrize("weights", [None, "some"])
def test_nan_reaches_its_column_and_nothing_else(weights, impl):
    """Whatever the weight of its row."""
    x, w, *_ = make_inputs(RowsSize(9, 4), weights=weights)
    want = moments(x, weights=w, impl=impl)
    for i, value in itertools.product(range(9), (torch.nan, torch.inf)):
        spoilt = x.clone()
        spoilt[i, 2] = value
        found = moments(spoilt, weights=w, impl=impl)
        others = torch.arange(4) != 2
        assert torch.equal(found.count, want.count)
        assert found.mean.isfinite().tolist() == others.tolist()
        assert torch.equal(found.scatter.isfinite(), others.unsqueeze(1) & others)
        assert torch.equal(found.mean[others], want.mean[others])
        assert torch.equal(found.scatter[others][:, others], want.scatter[others][:, others])


def test_nan_without_weight_is_not_lost(impl):
    found = moments(torch.full((2, 1), torch.nan), weights=torch.zeros(2), impl=impl)
    assert found.mean.isnan().all() and found.scatter.isnan().all()
    merged = merge_moments(found, moments(torch.ones(2, 1)))
    assert merged.mean.isnan().all() and merged.scatter.isnan().all()


def test_arguments_are_left_alone_and_bits_repeat(impl):
    x, w, *_ = make_inputs(SIZES[12], weights="some")
    before = x.clone(), w.clone()
    first = moments(x, weights=w, impl=impl)
    for _ in range(9):
        assert_all_equal(moments(x, weights=w, impl=impl), first)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16])
def test_autocast_lowers_nothing(lowered, impl):
    x, w, *cotangents = make_inputs(SIZES[10], weights="some")
    leaves, device = [t.requires_grad_() for t in (x, w)], x.device.type
    outputs = moments(x, weights=w, impl=impl)
    want = [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
    with torch.autocast(device, dtype=lowered):
        outputs = moments(x, weights=w, impl=impl)
        found = [*outputs]
        if impl != "reference":
            found += torch.autograd.grad(outputs, leaves, cotangents)
    for one, other in zip(found, want, strict=False):
        assert one.dtype == other.dtype and torch.equal(one, other)
    with torch.autocast(device, dtype=lowered):
        raised = moments(x, weights=w.to(lowered), impl=impl)
    assert_all_equal(raised, moments(x, weights=w.to(lowered).float(), impl=impl))


def test_what_cannot_be_looked_at_is_nan():
    """Under a transform, as on a GPU, nothing is refused for its value."""
    x = torch.randn(2, 1, 3)
    assert torch.vmap(lambda x: moments(x).covariance())(x).isnan().all()
    assert torch.vmap(lambda x: moments(x[:0]).second_moment())(x).isnan().all()
    weights = torch.tensor([[-1.0], [2.0]])
    assert torch.equal(
        torch.vmap(lambda x, w: moments(x, weights=w).count)(x, weights), weights[:, 0].double()
    )


# Merging


def test_merge_with_nothing_is_the_other_side():
    x, w, *_ = make_inputs(SIZES[8], weights="some", offset=100.0)
    for dtype in (torch.float32, torch.float64):
        some = moments(x.to(dtype), weights=w.to(dtype))
        for nothing in (moments(x[:0].to(dtype)), moments(x.to(dtype), weights=0 * w.to(dtype))):
            assert_all_equal(merge_moments(nothing, some), some)
            assert_all_equal(merge_moments(some, nothing), some)
            assert_all_equal(merge_moments(nothing, nothing), nothing)


def test_merge_takes_the_wider_dtype():
    x = torch.randn(8, 3)
    narrow, wide = moments(x), moments(x.double())
    for a, b in ((narrow, wide), (wide, narrow)):
        merged = merge_moments(a, b)
        assert merged.mean.dtype == merged.scatter.dtype == torch.float64
    assert merge_moments(narrow, narrow).scatter.dtype == torch.float32


def test_gradients_through_a_merge():
    x, w, *_ = make_inputs(RowsSize(7, 2), weights="positive", dtype=torch.float64, offset=1.0)

    def merged(x, w):
        return merge_moments(moments(x[:3], weights=w[:3]), moments(x[3:], weights=w[3:]))

    def first(x, w):
        found = merged(x, w)
        loss = found.scatter.square().sum() + found.mean.prod() * found.count
        return torch.autograd.grad(loss, (x, w), create_graph=True)

    given = x.requires_grad_(), w.requires_grad_()
    assert gradcheck(merged, given, check_forward_ad=True) and gradgradcheck(merged, given)
    assert gradgradcheck(first, given)
    for found, want in zip(merged(*given), moments(*given[:1], weights=w), strict=True):
        (one,), (other,) = (torch.autograd.grad(t.sum(), w, retain_graph=True) for t in (found, want))
        assert torch.allclose(one, other)


def test_gradients_of_a_merge_with_nothing_are_those_of_the_other_side():
    x, w = torch.randn(4, 2, requires_grad=True), torch.zeros(4, requires_grad=True)
    nothing, some = moments(x, weights=w), moments(x.detach() + 1)
    for merged in (merge_moments(nothing, some), merge_moments(some, nothing)):
        loss = 3 * merged.count + merged.mean.sum() + merged.scatter.sum()
        gx, gw = torch.autograd.grad(loss, (x, w), create_graph=True)
        assert torch.equal(gx, torch.zeros(4, 2)) and torch.equal(gw, torch.full((4,), 3.0))


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize(
    "rows", [[1025], [256, 256, 256, 257], [1] * 40 + [985], [0, 1000, 0, 24, 1]], ids=len
)
def test_a_stream_is_within_the_bound_of_its_chunks(rows, weights, offset, state):
    inputs = make_inputs(SIZES[13], weights=weights, offset=offset)
    total = moments(inputs.x[:0].to(state))
    pieces = [None] * len(rows) if inputs.weights is None else inputs.weights.split(rows)
    for x, w in zip(inputs.x.split(rows), pieces, strict=True):
        total = merge_moments(total, moments(x, weights=w))
    assert total.mean.dtype == state
    for name, (value, budget) in expected_of_stream(inputs, rows, state).items():
        assert_matches_reference(getattr(total, name), value, budget, name=name)
    scatter = total.scatter.double()
    assert torch.equal(scatter, scatter.T)
    if offset == 0.0:
        whole = expected_results(inputs)["scatter"]
        apart = (scatter - whole.value).abs().max() / whole.value.diagonal().max()
        assert apart < (1e-6 if state == torch.float64 else 5e-6)
