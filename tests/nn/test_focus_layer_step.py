"""nn.FocusLayer token by token: what it is in parallel, from a state that does not grow."""

from dataclasses import fields

import pytest
import torch

from fastkit.nn import FocusLayer
from fastkit.nn.focus_state import ring, unrolled

OPTIONS = [
    {},
    {"num_heads": 2, "position": "rotary"},
    {"position": "none", "attn_chunk": 20, "bin_length": 8},
    {"kernel_length": None},
    {"kernel_length": 3},
    {"coefficients": "constant"},
    {"num_filters": 3, "first": "learned"},
    {"conv_glu": True},
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**options):
    sizes = {"qk_size": 4, "attn_chunk": 8, "bin_length": 12, "pool": 4, "hidden": 5, "kernel_length": 20}
    module = FocusLayer(6, **{**sizes, **options})
    if module.position == "relative_bias":
        torch.nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("lengths", [[1, 5, 12], [24, 23, 31], [0, 48, 8]])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_step_gives_what_the_whole_gives_at_its_place(options, lengths):
    module, x, residual = layer(**options), torch.randn(3, 70, 6), torch.randn(3, 70, 6)
    expected = module(x, residual=residual)
    rows, places = torch.arange(3), torch.tensor(lengths)
    y, state = module.forward_with_state(x, places, residual=residual)
    assert torch.equal(y, expected)
    with torch.no_grad():
        for _ in range(22):  # over the ends of chunks and bins
            y = module.step(x[rows, places], state, places, residual=residual[rows, places])
            torch.testing.assert_close(y, expected[rows, places], rtol=1e-5, atol=1e-5)
            places = places + 1


def test_in_double_it_is_the_same_to_many_digits():
    module, x = layer(num_filters=2).double(), torch.randn(1, 60, 6, dtype=torch.float64)
    _, state = module.forward_with_state(x, torch.tensor([17]))
    with torch.no_grad():
        y = [module.step(x[:, t], state, torch.tensor([t])) for t in range(17, 60)]
    torch.testing.assert_close(torch.stack(y, 1), module(x)[:, 17:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_state_does_not_grow(options):
    module, x = layer(**options), torch.randn(2, 300, 6)

    def elements(state):
        values = [getattr(state, field.name) for field in fields(state)]
        return [v.numel() for v in values if v is not None]

    _, state = module.forward_with_state(x[:, :1], torch.tensor([1, 1]))
    before = elements(state)
    with torch.no_grad():
        for t in range(1, 300):
            module.step(x[:, t], state, torch.tensor([t, t]))
    assert elements(state) == before
    assert all(not v.requires_grad for v in vars(state).values() if v is not None)


def test_maxima_from_elsewhere():
    """Of a convolution that layers share: those of the bin that has just ended, of rows in which one has."""
    module, conv, x = layer(kernel_length=None), layer().filter.global_conv, torch.randn(2, 40, 6)
    maxima = conv.maxima(x, 4)
    expected = module(x, maxima=maxima)
    places = torch.tensor([12, 7])
    _, state = module.forward_with_state(x, places, maxima=maxima, last_maxima=maxima[:, 0])
    assert state.history is None
    with torch.no_grad():
        for _ in range(20):
            rows = torch.arange(2)
            ended = maxima[rows, (places // 12).clamp(max=maxima.shape[1] - 1)]
            y = module.step(x[rows, places], state, places, maxima=ended)
            torch.testing.assert_close(y, expected[rows, places], rtol=1e-5, atol=1e-5)
            places = places + 1
        with pytest.raises(ValueError, match="FocusLayer: a state without a history must be given maxima"):
            module.step(x[:, 0], state, torch.tensor([11, 0]))


@pytest.mark.parametrize("options", [{"causal": False}, {"filtering": "paper"}])
def test_what_sees_later_tokens_has_no_state(options):
    with pytest.raises(ValueError, match=r"^FocusLayer: forward_with_state must have causal=True and filter"):
        layer(**options).forward_with_state(torch.randn(1, 20, 6), torch.tensor([20]))


def test_steps_have_no_gradient():
    module, x = layer(), torch.randn(2, 30, 6)
    _, state = module.forward_with_state(x, torch.tensor([20, 20]))
    y = module.step(x[:, 20], state, torch.tensor([20, 20]))
    assert not any(t.requires_grad for t in (y, *vars(state).values()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (2, 20, 5)}, r"x must have shape \(B, T, 6\) with T >= 1, got \(2, 20, 5\)"),
        ({"residual": (1, 20, 6)}, r"residual must have the shape of x, \(2, 20, 6\), got \(1, 20, 6\)"),
        ({"lengths": [20]}, r"lengths must be int64 of shape \(2,\), .*, got torch.int64 of shape \(1,\)"),
        ({"lengths": [2.0, 3.0]}, r"lengths must be int64 .*, got torch.float32"),
        ({"lengths": [2, 21]}, r"lengths must be between 0 and 20, the tokens of x, got 2 to 21"),
        ({"lengths": [-1, 5]}, r"lengths must be between 0 and 20, the tokens of x, got -1 to 5"),
    ],
)
def test_forward_with_state_refuses(changed, message):
    given = {"x": (2, 20, 6), "residual": (2, 20, 6), "lengths": [4, 5], **changed}
    x, residual = torch.randn(given["x"]), torch.randn(given["residual"])
    with pytest.raises(ValueError, match=f"^FocusLayer: {message}"):
        layer().forward_with_state(x, torch.tensor(given["lengths"]), residual=residual)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (1, 6)}, r"x must have shape \(2, 6\), a token of each row of the state, got \(1, 6\)"),
        ({"x": (2, 1, 6)}, r"x must have shape \(2, 6\), .*, got \(2, 1, 6\)"),
        ({"residual": (6,)}, r"residual must have shape \(2, 6\), .*, got \(6,\)"),
        ({"places": 4}, r"places must be int64 of shape \(2,\), .*, got torch.int64 of shape \(\)"),
        ({"places": [4.0, 5.0]}, r"places must be int64 .*, got torch.float32"),
    ],
)
def test_step_refuses(changed, message):
    given = {"x": (2, 6), "residual": (2, 6), "places": [4, 5], **changed}
    module = layer()
    _, state = module.forward_with_state(torch.randn(2, 20, 6), torch.tensor([4, 5]))
    x, residual = torch.randn(given["x"]), torch.randn(given["residual"])
    with pytest.raises(ValueError, match=f"^FocusLayer: {message}"):
        module.step(x, state, torch.tensor(given["places"]), residual=residual)


def test_a_ring_holds_the_last_tokens():
    x = torch.arange(1.0, 21).view(1, 10, 2).repeat(3, 1, 1)
    lengths = torch.tensor([0, 3, 10])
    for size in (1, 4, 16):
        held = unrolled(ring(x, lengths, size), lengths)
        for row, length in enumerate(lengths.tolist()):
            expected = torch.cat([torch.zeros(size, 2), x[row, :length]])[-size:]
            assert torch.equal(held[row], expected)
