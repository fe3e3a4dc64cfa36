"""nn.AdaptiveIIR: what it computes, that it is causal and stable, and that it behaves as a module."""

import copy
import pickle
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from fastkit import _native
from fastkit.nn import AdaptiveIIR, GlobalConv
from fastkit.ops import iir_scan

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

needs_kernel = pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))

PARAMETERIZATIONS = ["sigmoid", "triangle", "polar", "l1", "raw"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**options):
    return AdaptiveIIR(3, **{"chunk": 16, "pool": 4, "hidden": 5, **options})


def written_out(module, x):
    """The docstring, chunk by chunk and filter by filter."""
    rows = []
    for r, piece in enumerate(x.split(module.chunk, 1)):
        if r == 0:
            v = torch.full((x.shape[0], module.channels, 2 * module.filters), -torch.inf)
        else:
            cells = x[:, (r - 1) * module.chunk : r * module.chunk].chunk(module.pool, 1)
            maxima = torch.stack([cell.amax(1) for cell in cells], -1)
            v = module.mlp(maxima)
        a = v.sigmoid().unflatten(-1, (module.filters, 2))
        h = piece.transpose(1, 2)
        outputs = [iir_scan(h, a[:, :, None, f].to(x)) for f in range(module.filters)]
        rows.append(sum(outputs).transpose(1, 2))
    return torch.cat(rows, 1)


# What it computes


@pytest.mark.parametrize("filters", [1, 3])
@pytest.mark.parametrize("time", [1, 15, 16, 17, 32, 50])
def test_adaptive_is_the_formula(time, filters):
    module, x = layer(filters=filters), torch.randn(2, time, 3)
    torch.testing.assert_close(module(x), written_out(module, x))


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("time", [1, 16, 50])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_constant_is_iir_scan(parameterization, time, carry):
    module = layer(adaptive=False, filters=2, parameterization=parameterization, carry=carry)
    x = torch.randn(2, time, 3)
    v1, v2 = (0.5 * module.logits.detach()).unbind(-1)
    module.logits.data.mul_(0.5)
    a = {
        "sigmoid": (v1.sigmoid(), v2.sigmoid()),
        "triangle": ((1 + v2.tanh()) * v1.tanh(), v2.tanh()),
        "polar": (-2 * v1.sigmoid() * (torch.pi * v2.sigmoid()).cos(), v1.sigmoid() ** 2),
        "l1": ((v1.tanh() + v2.tanh()) / 2, (v1.tanh() - v2.tanh()) / 2),
        "raw": (v1, v2),
    }[parameterization]
    one, other = torch.stack(a, -1)[None, :, None].unbind(3)
    pieces = [x] if carry else x.split(16, 1)
    expected = [iir_scan(p.mT, one) + iir_scan(p.mT, other) for p in pieces]
    torch.testing.assert_close(module(x), torch.cat(expected, -1).mT)


@needs_kernel
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_result_lies_in_memory_as_the_input(adaptive):
    x = torch.randn(2, 50, 3)
    assert layer(adaptive=adaptive)(x).stride() == x.stride()


def test_the_bank_differs_by_filter():
    coefficients = layer(filters=3).coefficients(torch.randn(2, 50, 3))
    assert coefficients.shape == (2, 3, 4, 3, 2)
    assert torch.equal(coefficients[:, :, 0], torch.zeros(2, 3, 3, 2))
    one, two, three = coefficients[:, :, 1:].unbind(3)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


@pytest.mark.parametrize("options", [{}, {"filters": 2}, {"parameterization": "l1", "carry": True}])
def test_causal(options):
    """A change of x[t] changes y from t on, and before t not a bit."""
    module, x = layer(**options), torch.randn(2, 50, 3)
    y = module(x)
    for t in (0, 7, 15, 16, 31, 49):
        changed = x.clone()
        changed[:, t] += 5
        y_changed = module(changed)
        assert torch.equal(y[:, :t], y_changed[:, :t])
        assert (y[:, t] != y_changed[:, t]).all()


def test_a_chunk_is_set_by_the_one_before():
    module, x = layer(), torch.randn(1, 64, 3)
    changed = x.clone()
    changed[:, 20] += 5  # in chunk 1
    differs = (module.coefficients(x) != module.coefficients(changed)).any(-1).any(-1).any(1)
    assert differs.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("parameterization", ["sigmoid", "triangle", "polar", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_whatever_the_parameters(parameterization, dtype):
    """In exact arithmetic on the coefficients as stored, up to logits that saturate."""
    v = torch.cartesian_prod(*2 * [torch.cat([torch.linspace(-40, 40, 401), torch.randn(200)])])
    module = AdaptiveIIR(1, adaptive=False, filters=len(v), parameterization=parameterization)
    module.to(dtype).logits.data.copy_(v[None])
    a1, a2 = module.coefficients(torch.zeros(1, 1, 1, dtype=dtype)).double().unbind(-1)
    assert (a2.abs() < 1).all()
    assert (1 + a2 - a1.abs() > 0).all()
    if parameterization == "l1":
        assert (a1.abs() + a2.abs() < 1).all()


# Gradients


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_gradcheck(adaptive, parameterization):
    module = AdaptiveIIR(
        2, chunk=4, pool=2, hidden=3, filters=2, parameterization=parameterization, adaptive=adaptive
    ).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(2, 10, 2, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(call, (x, *parameters))


def test_parameters_of_a_single_chunk_have_gradients_of_zero():
    """Not None, which distributed training would wait for."""
    module = layer()
    module(torch.randn(2, 16, 3)).sum().backward()
    for parameter in module.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "parameterization": "polar"}])
def test_learns(options):
    """To imitate another layer of its kind."""
    x = torch.randn(4, 64, 3)
    teacher, student = layer(**options), layer(**options)
    with torch.no_grad():
        target = teacher(x)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# As a module


def test_repr():
    assert repr(AdaptiveIIR(6, filters=2, adaptive=False)) == (
        "AdaptiveIIR(6, chunk=128, filters=2, pool=8, parameterization='sigmoid', adaptive=False,"
        " carry=False, first='identity')"
    )


def test_initialisation():
    """Hyperfan-in: the variance that keeps that of two generated weights times their inputs."""
    module = AdaptiveIIR(1, filters=500, hidden=64)
    weight = module.mlp[2].weight
    assert weight.var().item() == pytest.approx(2 / 64, rel=0.02)
    assert weight.abs().max().item() <= (6 / 64) ** 0.5
    assert not module.mlp[0].bias.any()
    assert not module.mlp[2].bias.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("adaptive", [True, False])
def test_copies_are_equal(adaptive, duplicate):
    module, x = layer(adaptive=adaptive, parameterization="polar"), torch.randn(2, 50, 3)
    assert torch.equal(duplicate(module)(x), module(x))


@pytest.mark.parametrize("adaptive", [True, False])
def test_autocast_leaves_the_coefficients_alone(adaptive):
    module, x = layer(adaptive=adaptive), torch.randn(2, 50, 3)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), expected)
        assert module(x.bfloat16()).dtype == torch.bfloat16
        assert module.coefficients(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("adaptive", [True, False])
def test_bfloat16_module(adaptive):
    module, x = layer(adaptive=adaptive).bfloat16(), torch.randn(2, 50, 3).bfloat16()
    assert module(x).dtype == torch.bfloat16
    assert module.coefficients(x).dtype == torch.float32


@pytest.mark.parametrize("adaptive", [True, False])
def test_meta_device_gives_the_shape(adaptive):
    with torch.device("meta"):
        x = torch.empty(2, 40, 3)
        assert layer(adaptive=adaptive)(x).shape == x.shape


@pytest.mark.parametrize("adaptive", [True, False])
def test_empty_batch(adaptive):
    x = torch.randn(0, 50, 3, requires_grad=True)
    y = layer(adaptive=adaptive)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 50, 3)


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"adaptive": False}, {"adaptive": False, "carry": True}])
def test_compile_one_graph_for_several_lengths(options):
    torch._dynamo.reset()
    module = layer(filters=2, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for batch, time in ((7, 50), (5, 64), (9, 133)):
        x = torch.randn(batch, time, 3)
        assert torch.equal(compiled(x), module(x))
        found, expected = (
            torch.autograd.grad(m(x).square().sum(), list(module.parameters())) for m in (compiled, module)
        )
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


# Refusals and warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"hidden": -1}, "hidden must be at least 1, got -1"),
        (
            {"chunk": 100},
            "chunk must be a multiple of pool, got chunk=100 and pool=8; take chunk=104",
        ),
        (
            {"parameterization": "softmax"},
            "parameterization must be one of sigmoid, triangle, polar, l1, raw, got 'softmax'",
        ),
        ({"first": "zero"}, "first must be identity or learned, got 'zero'"),
        (
            {"adaptive": False, "first": "learned"},
            "first and global_conv are for adaptive coefficients, got adaptive=False; leave them out",
        ),
        (
            {"global_conv": GlobalConv(3, 5, block=64)},
            "the block of global_conv must be chunk, got 64 and 128",
        ),
    ],
)
def test_options_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=f"^AdaptiveIIR: {re.escape(message)}$"):
        AdaptiveIIR(**{"channels": 3, **options})


@pytest.mark.parametrize("shape", [(2, 50), (2, 50, 4), (2, 0, 3)], ids=str)
def test_shapes_are_refused_in_words(shape):
    message = f"AdaptiveIIR: x must have shape (B, T, 3) with T >= 1, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer()(torch.zeros(shape))


@pytest.mark.parametrize("parameterization", ["sigmoid", "triangle", "polar"])
def test_carry_between_filters_that_switch_warns(parameterization):
    with pytest.warns(UserWarning, match="switching between stable filters can grow") as caught:
        layer(parameterization=parameterization, carry=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_what_the_warning_is_about():
    """Two stable filters by turns, each inside the sigmoid's box, that grow without bound."""
    a = torch.tensor([(0.99, 0.99), (0.0, 0.99), (0.99, 0.99), (0.99, 0.99), (0.0, 0.99)]).double()
    x = torch.zeros(1, 1, 200, dtype=torch.float64)
    x[..., 0] = 1
    assert iir_scan(x, a.repeat(40, 1)[None, None], chunk=1)[..., -5:].abs().max() > 1e10


@pytest.mark.parametrize(
    "options",
    [{"parameterization": "l1"}, {"parameterization": "raw"}, {"adaptive": False}],
    ids=str,
)
def test_carry_of_what_cannot_switch_or_stays_bounded_does_not_warn(options, recwarn):
    layer(carry=True, **options)
    assert not recwarn


@pytest.mark.parametrize("time", [1, 16, 17, 50])
def test_a_global_convolution_of_ones_own(time):
    """Any module of (B, T, C): its result is pooled in place of x."""
    layer = AdaptiveIIR(3, chunk=16, global_conv=torch.nn.Linear(3, 3))
    plain = AdaptiveIIR(3, chunk=16)
    plain.load_state_dict({key: t for key, t in layer.state_dict().items() if "conv" not in key})
    x = torch.randn(2, time, 3)
    assert torch.equal(layer(x), plain(x, maxima=plain.maxima(layer.global_conv(x))))


def test_a_learned_first_filter():
    layer = AdaptiveIIR(3, chunk=16, first="learned", filters=2)
    x = torch.randn(2, 50, 3)
    a = layer.coefficients(x)
    assert torch.equal(a[:, :, 0], layer.first_logits.sigmoid().expand(2, -1, -1, -1))
    assert (torch.autograd.grad(layer(x).sum(), layer.first_logits)[0] != 0).all()
