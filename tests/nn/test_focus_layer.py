"""nn.FocusLayer: the formula, causality to the last bit, masks, packed sequences, refusals."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import softmax

from fastkit.nn import FocusLayer, PRILoRALinear
from fastkit.nn.focus_layer import published_filter
from fastkit.ops import iir_scan

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**options):
    sizes = {"qk_size": 4, "attn_chunk": 8, "bin_length": 12, "pool": 4, "hidden": 5, "kernel_length": 20}
    return FocusLayer(6, **{**sizes, **options})


def written_out(module, x):
    """The docstring, a row and a token at a time."""
    f = module.filter(x)
    key, value = module.key_value.weight.split([module.qk_size, module.channels])
    q, k, v = x @ module.query.weight.mT, f @ key.mT, f @ value.mT
    y = torch.zeros_like(v)
    T = x.shape[1]
    H, M = module.num_heads, module.attn_chunk
    for t in range(T):
        begin = t // M * M
        end = t + 1 if module.causal else min(begin + M, T)
        for head in range(H):
            qk, c = slice(head * q.shape[2] // H, (head + 1) * q.shape[2] // H), v.shape[2] // H
            at, seen = q[:, t, qk], k[:, begin:end, qk]
            if module.position == "rotary":
                at, seen = turned(at[:, None], t - begin)[:, 0], turned(seen, 0)
            logits = (seen @ at[..., None])[..., 0] / math.sqrt(at.shape[1])
            if module.position == "relative_bias":
                distance = t - torch.arange(begin, end)
                logits = logits + module.bias[head, distance if module.causal else distance + M - 1]
            weights = softmax(logits, -1)
            y[:, t, head * c : (head + 1) * c] = (
                weights[:, None] @ v[:, begin:end, head * c : (head + 1) * c]
            )[:, 0]
    r, u, h = module.gates(f).chunk(3, -1)
    z = torch.nn.functional.silu(h + module.reset(torch.nn.functional.silu(r) * y))
    return u.sigmoid() * z + (1 - u.sigmoid()) * x


def turned(x, begin):
    width = x.shape[2]
    place = begin + torch.arange(x.shape[1])
    angle = place[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@pytest.mark.parametrize("position", ["relative_bias", "rotary", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("time", [1, 7, 8, 24, 30])
def test_is_the_formula(time, num_heads, causal, position):
    module = layer(num_heads=num_heads, causal=causal, position=position)
    if position == "relative_bias":
        module.bias.data.normal_()
    x = torch.randn(2, time, 6)
    torch.testing.assert_close(module(x), written_out(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "key_value", "gates", "reset"])
def test_what_takes_the_place_of_a_matrix_is_called(name):
    """An adapter, or a matrix with hooks on it: for the kernel of the gates it is its elements alone."""
    module, x = layer(), torch.randn(2, 20, 6)
    expected = module(x)
    calls = []
    handle = getattr(module, name).register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(module(x), expected)
    assert calls == [name]
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    module(x)
    handle.remove()
    assert getattr(module, name) in calls
    linear = getattr(module, name)
    linear.forward = lambda t: (
        calls.append("wrapped") or type(linear).forward(linear, t)
    )  # as accelerate does
    torch.testing.assert_close(module(x), expected)
    assert calls[-1] == "wrapped"
    del linear.forward

    adapted = PRILoRALinear(linear, rank=2)
    torch.nn.init.normal_(adapted.lora_b)
    setattr(module, name, adapted)
    result = module(x)
    assert (result - expected).abs().max() > 0.01
    with torch.no_grad():
        linear.weight += (adapted(torch.eye(6)) - linear(torch.eye(6))).T
    setattr(module, name, linear)
    torch.testing.assert_close(module(x), result, rtol=1e-4, atol=1e-5)


def test_the_filter_is_set_by_the_global_convolution():
    module = layer()
    x = torch.randn(2, 30, 6)
    conv = module.filter.global_conv
    cells = conv(x)[:, :24].unflatten(1, (2, 4, 3)).amax(3)  # (B, 2 bins, 4 cells, C)
    a = module.filter.mlp(cells.mT).sigmoid().unflatten(-1, (1, 2))
    a = torch.cat([torch.zeros_like(a[:, :1]), a], 1).transpose(1, 2)
    expected = iir_scan(x.mT, a, chunk=12, carry=False).mT
    torch.testing.assert_close(module.filter(x), expected)


def test_a_learned_first_bin():
    module = layer(first="learned")
    x = torch.randn(2, 30, 6)
    a = module.filter.coefficients(x)
    torch.testing.assert_close(a[:, :, 0], module.filter.first_logits.sigmoid().expand(2, -1, -1, -1))
    assert torch.equal(a[:, :, 1:], layer_without_first(module, x))


def layer_without_first(module, x):
    other = layer()
    other.load_state_dict({k: v for k, v in module.state_dict().items() if "first" not in k})
    return other.filter.coefficients(x)[:, :, 1:]


def is_causal(function, x):
    y = function(x)
    for t in (0, 1, 7, 8, 11, 12, 23, 24, 35):
        changed = x.clone()
        changed[:, t] += 1000.0
        if not torch.equal(function(changed)[:, :t], y[:, :t]):
            return False
    return True


OPTIONS = [
    {},
    {"coefficients": "constant"},
    {"kernel_length": None},
    {"conv_glu": True},
    {"position": "rotary", "num_heads": 2},
    {"position": "none", "num_filters": 3},
    {"first": "learned", "parameterization": "triangle"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_causal_to_the_last_bit(options):
    assert is_causal(layer(**options), torch.randn(2, 36, 6))


def test_the_published_filter_is_not_causal():
    assert not is_causal(layer(filtering="paper"), torch.randn(2, 36, 6))


def test_the_published_filter():
    """A product with the conjugate: a circular correlation with the response, aliased to the bin."""
    x, a = torch.randn(2, 3, 16).double(), torch.rand(2, 3, 1, 2).double()
    impulse = torch.zeros(2, 3, 16 * 40).double()
    impulse[..., 0] = 1
    h = iir_scan(impulse, a.unsqueeze(2)).unflatten(-1, (40, 16)).sum(2)
    expected = torch.stack([(h * x.roll(-t, -1)).sum(-1) for t in range(16)], -1)
    torch.testing.assert_close(published_filter(x, a), expected, rtol=1e-6, atol=1e-6)


def test_without_causal_attention_a_token_sees_its_chunk_and_no_more():
    module, x = layer(causal=False, coefficients="constant"), torch.randn(2, 36, 6)
    y = module(x)
    changed = x.clone()
    changed[:, 15] += 1.0
    same = (module(changed) == y).all(-1).all(0)
    assert same[:8].all() and not same[8:15].any()


@pytest.mark.parametrize("left", [True, False])
def test_padding(left):
    """A row gives what it gives alone, from the left or the right."""
    module = layer()
    lengths, T = (30, 17, 1, 25), 30
    x, mask = torch.randn(4, T, 6), torch.zeros(4, T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, T - length if left else 0 : T if left else length] = 1
    x = torch.where(mask.bool().unsqueeze(-1), x, 100.0)
    y = module(x, padding_mask=mask)
    for row in range(4):
        tokens = mask[row].bool()
        torch.testing.assert_close(y[row, tokens], module(x[row : row + 1, tokens])[0], rtol=1e-4, atol=1e-5)


def test_packed_sequences():
    module, lengths = layer(), [5, 0, 30, 1, 13]
    pieces = [torch.randn(1, n, 6) for n in lengths]
    x = torch.cat(pieces, 1).requires_grad_()
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    y = module(x, cu_seqlens=offsets)
    expected = torch.cat([module(piece) for piece in pieces if piece.shape[1]], 1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y[0, 5].sum(), x)
    assert gradient[0, :5].eq(0).all() and gradient[0, 6:].eq(0).all()


def test_maxima_and_residual():
    module, x = layer(), torch.randn(2, 30, 6)
    other, residual = torch.randn(2, 30, 6), torch.randn(2, 30, 6)
    maxima = module.filter.maxima(other)
    y = module(x, maxima=maxima, residual=residual)
    assert not torch.allclose(y, module(x, residual=residual))
    u = module.gates(module.filter(x, maxima)).chunk(3, -1)[1].sigmoid()
    torch.testing.assert_close(y - module(x, maxima=maxima), (1 - u) * (residual - x))
    mask = torch.ones(2, 30)
    mask[0, :7] = 0
    shifted = module(x, residual=residual, padding_mask=mask)
    alone = module(x[:1, 7:], residual=residual[:1, 7:])
    torch.testing.assert_close(shifted[:1, 7:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    module = layer(**options).double()
    x = torch.randn(1, 26, 6).double().requires_grad_()
    parameters = dict(module.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert gradcheck(function, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict(options):
    module, other = layer(**options), layer(**options)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 30, 6)
    assert torch.equal(module(x), other(x))


def test_keys():
    filter = [
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
        "global_conv.kernel",
        "global_conv.skip",
    ]
    own = ["query.weight", "key_value.weight", "gates.weight", "gates.bias", "reset.weight", "bias"]
    assert set(layer().state_dict()) == {*own, *(f"filter.{key}" for key in filter)}


@pytest.mark.parametrize("options", [{}, {"coefficients": "constant"}, {"position": "rotary"}])
def test_autocast(options):
    module, x = layer(**options), torch.randn(2, 30, 6)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        a = module.filter.coefficients(x)
    assert a.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{}, {"position": "rotary", "first": "learned"}])
def test_compile(options):
    module = layer(**options)
    x = torch.randn(2, 30, 6, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for one, other in zip(both(module, x), both(compiled, x), strict=True):
        torch.testing.assert_close(one, other)


def both(function, x):
    y = function(x)
    return y, *torch.autograd.grad(y.square().sum(), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_size": 0}, "qk_size must be at least 1, got 0"),
        ({"num_heads": 4}, "channels must be a multiple of num_heads, got 6 and 4"),
        ({"position": "alibi"}, "position must be one of relative_bias, rotary, none, got 'alibi'"),
        ({"coefficients": "none"}, "coefficients must be one of adaptive, constant, got 'none'"),
        ({"filtering": "fft"}, "filtering must be one of recurrence, paper, got 'fft'"),
        ({"qk_size": 3, "position": "rotary"}, "qk_size must be even for each head"),
    ],
)
def test_options_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=f"^FocusLayer: {re.escape(message)}"):
        layer(**options)


def test_maxima_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"^AdaptiveIIR: maxima must have shape \(2, 2, 6, 4\), got \(2, 3, 6, 4\)"
    ):
        layer()(torch.randn(2, 30, 6), maxima=torch.zeros(2, 3, 6, 4))


def test_an_unknown_parameterization_is_refused():
    with pytest.raises(ValueError, match=r"^AdaptiveIIR: parameterization must be one of sigmoid"):
        layer(parameterization="tanh")


MASK = torch.tensor([[1, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5), {}, "x must have shape (B, T, 6) with T >= 1, got (2, 5)"),
        ((2, 0, 6), {}, "x must have shape (B, T, 6) with T >= 1"),
        ((2, 5, 6), {"residual": torch.zeros(2, 4, 6)}, "residual must have the shape of x, (2, 5, 6)"),
        ((2, 5, 6), {"padding_mask": torch.ones(2, 4)}, "the padding mask must have shape (B, T) = (2, 5)"),
        (
            (1, 5, 6),
            {"padding_mask": MASK},
            "the padding mask must have one run of tokens in each row, got 2 in row 0",
        ),
        (
            (1, 5, 6),
            {"padding_mask": MASK, "cu_seqlens": torch.tensor([0, 5])},
            "padding_mask and cu_seqlens exclude",
        ),
        (
            (2, 5, 6),
            {"cu_seqlens": torch.tensor([0, 5])},
            "cu_seqlens must be (S + 1) offsets into x of shape (1, T",
        ),
        (
            (1, 5, 6),
            {"cu_seqlens": torch.tensor([0, 6])},
            "cu_seqlens must go from 0 to T = 5 and never fall",
        ),
        (
            (1, 5, 6),
            {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
            "cu_seqlens must go from 0 to T = 5 and never fall",
        ),
    ],
)
def test_inputs_are_refused_in_words(shape, options, message):
    with pytest.raises(ValueError, match=f"^FocusLayer: {re.escape(message)}"):
        layer()(torch.randn(shape), **options)
