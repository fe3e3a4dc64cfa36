"""linear_cross_entropy on a GPU: small calls that reach each kernel, for compute-sanitizer
(benchmarks/gpu.sh); memory, graphs, streams, equal bits, and no wait for the device.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from contexts import waits_are_errors

from fastkit import reference
from fastkit._dispatch import unavailable
from fastkit.ops import linear_cross_entropy, linear_cross_entropy_with_lse
from fastkit.ops.linear_cross_entropy import KERNELS
from fastkit.testing import Expected, assert_matches_reference

pytestmark = [pytest.mark.native, pytest.mark.gpu]

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
U = torch.finfo(FLOAT).eps / 2
TINY = torch.finfo(FLOAT).tiny


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


class Inputs(NamedTuple):
    """What is differentiated, the target, and the other tensors by the names of their arguments."""

    input: torch.Tensor
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor | None
    target: torch.Tensor
    others: dict[str, torch.Tensor]


def make_inputs(tokens, columns, vocabulary, dtype=FLOAT, *, bias=True, weights=False, ignored=True, seed=0):
    """Logits of a deviation of about 3; each fifth token is ignored."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    def rand(size):
        return 2 * torch.rand(size, generator=generator, device="cuda")

    target = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    if ignored:
        target[::5] = -100
    return Inputs(
        randn(tokens, columns).to(dtype),
        (3 * columns**-0.5 * randn(vocabulary, columns)).to(dtype),
        randn(vocabulary).to(dtype) if bias else None,
        target,
        {"weight": rand(vocabulary), "token_weight": rand(tokens)} if weights else {},
    )


def results_of(inputs, impl, **options):
    """loss, lse, and the gradients for a cotangent of the loss that differs from token to token."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in ("input", "linear_weight", "linear_bias")
        if (tensor := getattr(inputs, name)) is not None
    }
    op = reference.linear_cross_entropy_with_lse
    if impl is not None:
        op, options = linear_cross_entropy_with_lse, options | {"impl": impl}
    loss, lse = op(**leaves, target=inputs.target, **inputs.others, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), cotangent_of(loss))
    results = {"loss": loss.detach(), "lse": lse.detach()}
    return results | {f"g{name}": g for name, g in zip(leaves, gradients, strict=True)}


def cotangent_of(loss):
    return torch.linspace(0.5, 2, loss.numel(), device=loss.device).to(loss.dtype).view(loss.shape)


def in_float64(inputs):
    tensors = (None if t is None else t.double() for t in inputs[:3])
    return Inputs(*tensors, inputs.target, {name: t.double() for name, t in inputs.others.items()})


def expected_results(inputs, *, reduction="mean", label_smoothing=0.0, softcap=None, z_loss=0.0):
    """Each result in float64, and how far from it rounding may take it."""
    options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
    values = results_of(in_float64(inputs), None, reduction=reduction, **options)
    stored = inputs.input.dtype
    h, weight, bias, target, others = in_float64(inputs)
    (tokens, columns), vocabulary = h.shape, len(weight)
    bias = h.new_zeros(vocabulary) if bias is None else bias
    cw = others.get("weight", h.new_ones(vocabulary))
    valid = target != -100
    t = target.clamp(0, vocabulary - 1)[:, None]
    steps = 2 * math.ceil(vocabulary / 1024) + 2  # tiles of a row, and blocks

    # Logits: tensor cores may cut off where others round.
    z = h @ weight.T + bias
    off = 2 * U * (columns + 2) * (h.abs() @ weight.abs().T + bias.abs()) + TINY
    slope, off_slope = torch.ones_like(z), torch.zeros_like(z)
    if softcap is not None:
        x = z / softcap
        slope = x.cosh().square().reciprocal()
        off_slope = slope * (U * (12 + 7 * x.abs()) + 2 * off / softcap)
        z, off = softcap * x.tanh(), off + 11 * U * softcap * x.tanh().abs()
    lse = z.logsumexp(1, keepdim=True)
    off_lse = off.amax(1, keepdim=True) + U * (7 * steps + 25 + 2 * lse.abs())

    # Losses.
    smooth, hard = label_smoothing / vocabulary, (1 - label_smoothing) * cw[t]
    each = hard * (lse.abs() + z.gather(1, t).abs()) + z_loss * lse.square()
    each = each + smooth * (cw * (lse.abs() + z.abs())).sum(1, keepdim=True)
    off_each = hard * (off_lse + off.gather(1, t)) + 3 * z_loss * lse.abs() * off_lse
    off_each = off_each + smooth * (cw * (off_lse + off)).sum(1, keepdim=True) + U * (steps + 20) * each
    w = others.get("token_weight", h.new_ones(tokens))[:, None] * valid[:, None]
    off_loss = (w * (off_each + 4 * U * each))[:, 0]
    divisor = (cw[t][:, 0] * valid).sum() if reduction == "mean" else 1.0
    if reduction != "none":
        off_loss = (off_loss.sum() + 2 * U * (tokens + 4) * (w * each).sum()) / divisor

    # Their gradients, rounded to the dtype of the input before the products.
    upstream = cotangent_of(values["loss"]).expand(tokens)[:, None] * w / divisor
    p = (z - lse).exp()
    of_p = upstream * p * (hard + smooth * cw.sum() + 2 * z_loss * lse.abs())
    size = of_p + upstream * smooth * cw
    size = size.scatter_add(1, t, upstream * hard)
    off_dz = of_p * (off + off_lse + U * (8 + 4 * (z - lse).abs())) + upstream * p * 2 * z_loss * off_lse
    off_dz = (off_dz + U * (tokens + vocabulary + 16) * size) * slope + size * off_slope
    size = size * slope
    off_dz = off_dz + rounding(size, stored)

    def product(left, right, off_left, terms, like):
        error = off_left @ right.abs() + 2 * U * (terms + 2) * (left @ right.abs())
        return error + rounding(values[like].abs() + error, stored)

    ones = h.new_ones(tokens, 1)
    budgets = {
        "loss": off_loss + TINY,
        "lse": (off_lse[:, 0] * valid) + TINY,
        "ginput": product(size, weight, off_dz, vocabulary, "ginput"),
        "glinear_weight": product(size.T, h, off_dz.T, tokens, "glinear_weight"),
    }
    if inputs.linear_bias is not None:
        error = off_dz.T @ ones + 2 * U * (tokens + 2) * (size.T @ ones)
        budgets["glinear_bias"] = error[:, 0] + rounding(values["glinear_bias"].abs() + error[:, 0], stored)
    return {name: Expected(values[name], budget) for name, budget in budgets.items()}


def rounding(size, dtype):
    info = torch.finfo(dtype)
    return info.eps / 2 * size + info.smallest_normal * info.eps


def check(inputs, impl, **options):
    results = results_of(inputs, impl, **options)
    assert results["loss"].dtype == results["lse"].dtype == FLOAT
    for name, (value, budget) in expected_results(inputs, **options).items():
        if name.startswith("g"):
            assert results[name].dtype == inputs.input.dtype
        assert_matches_reference(results[name], value, budget, name=name)


OPTIONS: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"reduction": "sum", "softcap": 5.0}),
    (True, {"reduction": "none", "label_smoothing": 0.1}),
    (True, {"softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-2}),
]

# Tokens, columns, classes: one of each, around tiles (2048), several blocks, and of GPT-2.
SIZES = [(1, 1, 1), (7, 8, 11), (33, 65, 2049), (129, 24, 5000), (2, 200, 50257), (300, 64, 20000)]

# Each size in one dtype and with one choice of options under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(
        size, dtype, weights, options, marks=[pytest.mark.sanitize] if i % 3 == j and i % 4 == of else []
    )
    for i, size in enumerate(SIZES)
    for j, dtype in enumerate(DTYPES)
    for of, (weights, options) in enumerate(OPTIONS)
]


@pytest.mark.parametrize(("size", "dtype", "weights", "options"), CALLS, ids=str)
def test_matches_the_reference(triton, size, dtype, weights, options):
    inputs = make_inputs(*size, dtype, bias=weights, weights=weights, ignored=size[0] > 1)
    check(inputs, triton, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_tokens(triton, reduction, dtype):
    """Of a mean the loss is NaN, as the reference has it; gradients are zero."""
    inputs = make_inputs(0, 16, 50, dtype)
    results = results_of(inputs, triton, reduction=reduction)
    assert results["lse"].shape == (0,)
    loss = results["loss"]
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert reduction == "none" or (loss.isnan() if reduction == "mean" else loss == 0)
    assert results["ginput"].shape == (0, 16)
    if reduction != "mean":
        assert not results["glinear_weight"].any() and not results["glinear_bias"].any()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_targets_that_are_no_classes(triton, dtype):
    """Their losses are NaN, and nothing is read outside of the logits: compute-sanitizer would say so."""
    inputs = make_inputs(9, 16, 3000, ignored=False)
    most = torch.iinfo(dtype)
    target = inputs.target.to(dtype)
    target[:5] = torch.tensor([-1, 3000, -(2**20), most.min, most.max])
    arguments = (inputs.input, inputs.linear_weight, target)
    loss = linear_cross_entropy(*arguments, reduction="none", impl=triton)
    assert loss.isnan().tolist() == 5 * [True] + 4 * [False]
    expected = linear_cross_entropy(
        inputs.input, inputs.linear_weight, inputs.target, reduction="none", impl=triton
    )
    assert torch.equal(loss[5:], expected[5:])
    assert linear_cross_entropy(*arguments, impl=triton).isnan()
    with pytest.raises(RuntimeError, match="target must be in"):
        linear_cross_entropy(*arguments, check=True, impl=triton)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_take_no_part(triton, dtype):
    """Not even where they hold NaN."""
    inputs = make_inputs(20, 16, 100, dtype)
    expected = results_of(inputs, triton)
    ignored = inputs.target == -100
    spoilt = inputs._replace(input=inputs.input.masked_fill(ignored[:, None], torch.nan))
    results = results_of(spoilt, triton)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert not results["ginput"][ignored].any() and not results["lse"][ignored].any()
    all_ignored = inputs._replace(target=torch.full_like(inputs.target, -100))
    results = results_of(all_ignored, triton, reduction="sum")
    assert results["loss"] == 0
    assert not any(result.any() for name, result in results.items() if name.startswith("g"))


def test_ignore_index_may_be_a_class(triton):
    inputs = make_inputs(50, 16, 7, ignored=False)
    arguments = (inputs.input, inputs.linear_weight, inputs.target)
    loss = linear_cross_entropy(*arguments, ignore_index=3, reduction="none", impl=triton)
    assert torch.equal(loss == 0, inputs.target == 3)


def test_excluded_classes(triton):
    """By a bias of -inf."""
    inputs = make_inputs(30, 16, 3000, ignored=False)
    excluded = torch.arange(3000, device="cuda") % 3 == 1
    excluded[2048:] = True
    bias = inputs.linear_bias.masked_fill(excluded, -torch.inf)
    inputs = inputs._replace(linear_bias=bias, target=inputs.target % 2048 // 3 * 3)
    results, expected = results_of(inputs, triton), results_of(in_float64(inputs), None)
    for name, value in expected.items():
        assert torch.allclose(results[name].double(), value, rtol=1e-4, atol=1e-6), name
    assert not results["glinear_weight"][excluded].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(triton, dtype):
    inputs = make_inputs(500, 96, 20000, dtype, weights=True)
    first = results_of(inputs, triton, label_smoothing=0.1)
    for _ in range(3):
        again = results_of(inputs, triton, label_smoothing=0.1)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_nothing_waits_for_the_device(triton):
    inputs = make_inputs(70, 64, 20000, BFLOAT, weights=True)
    options = {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4}
    results_of(inputs, triton, **options)
    with waits_are_errors():
        results_of(inputs, triton, **options)


def test_kernels_run_on_the_current_stream(triton):
    """The input is written on it, late; a kernel on another stream would read what was there before."""
    inputs = make_inputs(70, 64, 20000)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = results_of(inputs, triton)
    late = inputs._replace(input=torch.zeros_like(inputs.input))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.input.copy_(inputs.input)
        results = results_of(late, triton)
    stream.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_a_graph_replays_a_call(triton, dtype):
    inputs = make_inputs(70, 64, 20000, dtype)

    def run():
        with torch.no_grad():
            return linear_cross_entropy(
                inputs.input, inputs.linear_weight, inputs.target, linear_bias=inputs.linear_bias, impl=triton
            )

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = run()
    inputs.input.mul_(-2)
    inputs.target.copy_(inputs.target.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, run())


def test_autocast(triton):
    """As of tensors that were cast; gradients have the dtypes of the arguments."""
    inputs = make_inputs(70, 64, 5000)
    with torch.autocast("cuda", dtype=BFLOAT):
        results = results_of(inputs, triton)
    lowered = [None if t is None else t.to(BFLOAT) for t in inputs[:3]]
    expected = results_of(Inputs(*lowered, inputs.target, inputs.others), triton)
    for name, value in expected.items():
        assert results[name].dtype == FLOAT
        assert torch.equal(results[name], value.float()), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "softcap": 5.0, "label_smoothing": 0.1}], ids=str
)
def test_compiled(triton, options):
    """In one graph forward and one backward, with the same bits."""
    inputs = make_inputs(70, 64, 5000)

    def call(*leaves):
        h, weight, bias = leaves
        return linear_cross_entropy(h, weight, inputs.target, linear_bias=bias, impl=triton, **options)

    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, cotangent_of(loss))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "softcap": 30.0}], ids=str)
def test_logits_are_never_all_there(triton, options):
    """Above the gradients, 256 MB; all logits in float32 would be 2.1 GB."""
    inputs = make_inputs(8192, 576, 64000, BFLOAT, bias=False)
    small = inputs._replace(input=inputs.input[:64], target=inputs.target[:64])
    results_of(small, triton, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = results_of(inputs, triton, **options)
    torch.cuda.synchronize()
    outputs = sum(result.numel() * result.element_size() for result in results.values())
    assert torch.cuda.max_memory_allocated() - before <= outputs + 256 * 10**6


def test_forward_alone_forms_no_gradients(triton):
    inputs = make_inputs(1024, 576, 64000, BFLOAT, bias=False)
    with torch.no_grad():
        linear_cross_entropy(inputs.input, inputs.linear_weight, inputs.target, impl=triton)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(inputs.input, inputs.linear_weight, inputs.target, impl=triton)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 160 * 10**6  # all logits would be 262 MB


def test_leading_dimensions(triton):
    inputs = make_inputs(24, 16, 300)
    shaped = inputs.input.view(2, 3, 4, 16), inputs.target.view(2, 3, 4)
    loss, lse = linear_cross_entropy_with_lse(
        shaped[0], inputs.linear_weight, shaped[1], reduction="none", impl=triton
    )
    flat, of_flat = linear_cross_entropy_with_lse(
        inputs.input, inputs.linear_weight, inputs.target, reduction="none", impl=triton
    )
    assert torch.equal(loss, flat.view(2, 3, 4)) and torch.equal(lse, of_flat.view(2, 3, 4))
