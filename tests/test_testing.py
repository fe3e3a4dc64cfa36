"""The budget of fastkit.testing accepts every honest float32 filter and rejects planted bugs."""

import math

import pytest
import torch

from fastkit import reference
from fastkit.testing import Size, assert_matches_reference, devices, sizes
from fastkit.testing.iir_scan import check, expected_results, make_inputs


def run(x, a, b, gy, **options):
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = reference.iir_scan(*leaves, **options)
    return dict(zip(("y", "gx", "ga", "gb"), (y, *torch.autograd.grad(y, leaves, gy)), strict=True))


def assert_all_match(results, expected):
    for name, result in results.items():
        assert_matches_reference(result, *expected[name], name=name)


def rejects(results, expected):
    with pytest.raises(AssertionError):
        assert_all_match(results, expected)


@pytest.mark.parametrize(("radius", "carry"), [(0.5, False), (0.9, True), (0.999, False), (1.01, True)])
@pytest.mark.parametrize("size", sizes("iir_scan"), ids=str)
def test_accepts_the_float32_reference(size, radius, carry):
    inputs = make_inputs(size, radius=radius)
    options = {"chunk": size.chunk, "carry": carry}
    assert_all_match(run(*inputs, **options), expected_results(*inputs, **options))


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.999])
def test_accepts_another_order_of_summation(radius):
    """Filtering as a matrix product: the sums of the recursion, unrolled, in float32."""
    x, a, b, gy = make_inputs(Size(4, 3, 257, None), radius=radius)
    a, b = a[:1, :1], b[:1, :1]
    response = reference.iir_scan(torch.eye(257)[None], a, b)
    expected = expected_results(x, a, b, gy)
    assert_matches_reference(x @ response, *expected["y"])
    assert_matches_reference(gy @ response.mT, *expected["gx"])


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.999, 1.01])
def test_accepts_a_recursion_in_tiles(radius):
    """As GPUs run it: tiles from a state of zero, the states combined by powers, the tiles again."""
    x, a, _, gy = make_inputs(Size(2, 8, 256, None), radius=radius)
    tiles = x.unflatten(-1, (16, 16)).flatten(1, 2)
    per_tile = a.repeat_interleave(16, 1)
    ends = reference.iir_scan(tiles, per_tile)[..., -2:].flip(-1).unflatten(1, (8, 16))
    step = torch.stack([-a[:, :, 0], torch.tensor([1.0, 0.0]).expand(2, 8, 2)], 2)
    power = step
    for _ in range(4):
        power = power @ power
    state, states = torch.zeros(2, 8, 2), []
    for end in ends.unbind(2):
        states.append(state)
        state = (power @ state.unsqueeze(-1)).squeeze(-1) + end
    y1, y2 = torch.stack(states, 2).flatten(1, 2).unbind(-1)
    a1, a2 = per_tile[:, :, 0].unbind(-1)
    ys = []
    for x0 in tiles.unbind(-1):
        y1, y2 = x0 - a1 * y1 - a2 * y2, y1
        ys.append(y1)
    y = torch.stack(ys, -1).view(x.shape)
    assert_matches_reference(y, *expected_results(x, a, None, gy)["y"])


def test_accepts_float64_and_half_precision():
    x, a, b, gy = make_inputs(Size(2, 3, 33, 16))
    for cast in (torch.float64, torch.bfloat16, torch.float16):
        coefficients = a.dtype if cast.itemsize == 2 else cast
        inputs = x.to(cast), a.to(coefficients), b.to(coefficients), gy.to(cast)
        assert_all_match(run(*inputs, chunk=16), expected_results(*inputs, chunk=16))


# Each bug is planted through coefficients per sample, which chunk=1 takes.
SIZE = Size(2, 3, 257, 16)


def per_sample(coefficients):
    return coefficients.repeat_interleave(SIZE.chunk, 2)[:, :, : SIZE.T].clone()


def coefficient_index_late_by_one(a, b):
    a[:, :, SIZE.chunk] = a[:, :, SIZE.chunk - 1]
    return a, b


def swapped_a1_a2(a, b):
    return a.flip(-1), b


def forgotten_x_history(a, b):
    b[:, :, SIZE.chunk, 1:] = 0
    b[:, :, SIZE.chunk + 1, 2] = 0
    return a, b


def forgotten_y_history(a, b):
    a[:, :, SIZE.chunk] = 0
    a[:, :, SIZE.chunk + 1, 1] = 0
    return a, b


def half_precision_coefficients(a, b):
    return a.half().float(), b.half().float()


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "bug",
    [
        coefficient_index_late_by_one,
        swapped_a1_a2,
        forgotten_x_history,
        forgotten_y_history,
        half_precision_coefficients,
    ],
)
def test_rejects_wrong_coefficients(bug, radius):
    x, a, b, gy = make_inputs(SIZE, radius=radius)
    expected = expected_results(x, a, b, gy, chunk=SIZE.chunk)
    honest = run(x, per_sample(a), per_sample(b), gy, chunk=1)
    buggy = run(x, *bug(per_sample(a), per_sample(b)), gy, chunk=1)
    for name in ("y", "gx"):
        assert_matches_reference(honest[name], *expected[name], name=name)
        rejects({name: buggy[name]}, expected)


@pytest.mark.parametrize("carry", [True, False])
def test_rejects_the_other_carry(carry):
    inputs = make_inputs(SIZE)
    rejects(run(*inputs, chunk=16, carry=not carry), expected_results(*inputs, chunk=16, carry=carry))


@pytest.mark.parametrize("name", ["y", "gx", "ga", "gb"])
def test_rejects_one_wrong_element(name):
    inputs = make_inputs(SIZE)
    results = run(*inputs, chunk=16)
    wrong = results[name].detach().clone()
    largest = wrong.abs().argmax()
    wrong.view(-1)[largest] *= 1 + 1e-3
    rejects({name: wrong}, expected_results(*inputs, chunk=16))


def test_rejects_a_gradient_that_misses_one_sample():
    """The last sample of each chunk, forgotten in the sums of the coefficient gradients."""
    x, a, b, gy = make_inputs(SIZE)
    expected = expected_results(x, a, b, gy, chunk=16, carry=False)
    honest = run(x, a, b, gy, chunk=16, carry=False)
    last = torch.arange(SIZE.T) % 16 == 15
    shortened = run(x, a, b, gy.masked_fill(last, 0), chunk=16, carry=False)
    for name in ("ga", "gb"):
        assert_matches_reference(honest[name], *expected[name], name=name)
        rejects({name: shortened[name]}, expected)


@pytest.mark.parametrize("name", ["gx", "ga", "gb"])
def test_rejects_a_bias_below_the_budget_of_each_element(name):
    value, budget = expected_results(*make_inputs(Size(3, 11, 257, 2)), chunk=2)[name]
    with pytest.raises(AssertionError, match="lean one way"):
        assert_matches_reference(value + 0.5 * budget * value.sign(), value, budget)


def test_message_names_the_worst_element():
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    actual = expected + torch.tensor([[0.0, 0.25], [0.5, 0.0]])
    budget = torch.full_like(expected, 0.125)
    message = (
        r"y: 2 of 4 elements are over budget; worst at \(1, 0\): got 3.5, expected 3, error 0.5, budget 0.125"
    )
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference(actual, expected, budget, name="y")


def test_nan_and_inf_must_be_where_they_are_expected():
    expected = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    budget = torch.full_like(expected, 1e-6)
    assert_matches_reference(expected.float(), expected, budget)
    for wrong in ([math.nan, math.nan, math.inf], [1.0, 2.0, math.inf], [1.0, math.nan, -math.inf]):
        with pytest.raises(AssertionError, match="1 of 3 elements"):
            assert_matches_reference(torch.tensor(wrong), expected, budget)


def test_a_shape_that_would_broadcast_is_refused():
    with pytest.raises(AssertionError, match=r"shape \(1,\), expected \(3,\)"):
        assert_matches_reference(torch.ones(1), torch.ones(3).double(), torch.ones(3).double())


def test_check_iir_scan_checks_the_output_and_each_gradient(monkeypatch):
    x, a, b, gy = make_inputs(SIZE)
    results = check(x, a, b, gy, chunk=16, carry=False, impl="reference")
    assert list(results) == ["y", "gx", "ga", "gb"]
    assert list(check(x, a, chunk=16, impl="reference")) == ["y", "gx", "ga"]
    for wrong in range(3):

        def slightly_wrong(*inputs, impl, wrong=wrong, **options):
            inputs = list(inputs)
            inputs[wrong] = inputs[wrong] * 1.001 - inputs[wrong].detach() * 0.001
            return reference.iir_scan(*inputs, **options)

        monkeypatch.setattr("fastkit.ops.iir_scan", slightly_wrong)
        with pytest.raises(AssertionError, match=("gx", "ga", "gb")[wrong]):
            check(x, a, b, gy, chunk=16)


def test_sizes_are_awkward():
    shapes = sizes("iir_scan")
    assert {size.B * size.C for size in shapes} >= {1, 15, 16, 17, 33}
    assert {size.T for size in shapes} >= {*range(1, 10), 31, 33, 257, 1000}
    assert {size.chunk for size in shapes} >= {None, 1, 2, 3, 16, 128}
    assert any(size.chunk and size.chunk > size.T for size in shapes)
    assert any(size.chunk and size.T % size.chunk for size in shapes)
    assert str(Size(3, 5, 257, 16)) == "B3-C5-T257-chunk16"


def test_devices_start_with_the_cpu():
    found = devices()
    assert found[0] == torch.device("cpu")
    assert ("cuda" in [device.type for device in found]) == torch.cuda.is_available()
