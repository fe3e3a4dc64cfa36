"""lora_linear under torch.compile, and the raw ops that it traces."""

import itertools
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastkit.ops import lora_linear, lora_linear_with_stats
from fastkit.ops.lora_linear import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import LinearSize, assert_matches_reference
from fastkit.testing.lora_linear import SCALE, expected_results, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

RAW = torch.ops.fastkit
SIZE = LinearSize(13, 9, 7, 3)
FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# The raw ops: their schemas, fakes and what they write to


CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long


def forward_call(inputs, needs_square_sum=True):
    x, _, _, a, b, mask, lora_x, gy = inputs
    return [gy.clone(), x, lora_x, a, mask, b, SCALE, needs_square_sum]


def backward_call(inputs, *, with_gx=True, adds=True, needs_adapter=True, needs_bias=True):
    x, _, _, a, b, mask, lora_x, gy = inputs
    h, _ = RAW.lora_linear_fwd_(*forward_call(inputs))
    gx = torch.ones_like(x) if with_gx else None
    return [gx, gy, x if lora_x is None else lora_x, h, a, mask, b, SCALE, adds, needs_adapter, needs_bias]


@pytest.mark.parametrize("needs_square_sum", [False, True])
@pytest.mark.parametrize("lora_x", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_opcheck_of_forward(native, mask, lora_x, needs_square_sum):
    call = forward_call(make_inputs(SIZE, mask=mask, lora_x=lora_x), needs_square_sum)
    opcheck(RAW.lora_linear_fwd_.default, call, test_utils=TRACED if mask == lora_x else CHECKS)


# What a gradient is added to or not, or not wanted, and which others are.
MODES = [
    {"with_gx": with_gx, "adds": adds, "needs_adapter": adapter, "needs_bias": bias}
    for (with_gx, adds), adapter, bias in itertools.product(
        [(True, True), (True, False), (False, False)], (False, True), (False, True)
    )
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(k for k, v in mode.items() if v) or "none")
@pytest.mark.parametrize("mask", [False, True])
def test_opcheck_of_backward(native, mask, mode):
    call = backward_call(make_inputs(SIZE, mask=mask), **mode)
    traced = mask and mode["needs_adapter"] == mode["needs_bias"]
    opcheck(RAW.lora_linear_bwd_.default, call, test_utils=TRACED if traced else CHECKS)


@pytest.mark.parametrize(
    "dtypes", [(DOUBLE, DOUBLE), (BFLOAT, BFLOAT), (BFLOAT, FLOAT), (HALF, FLOAT)], ids=str
)
def test_opcheck_of_dtypes(native, dtypes):
    inputs = make_inputs(SIZE, lora_x=True, dtype=dtypes[0], adapter=dtypes[1])
    opcheck(RAW.lora_linear_fwd_.default, forward_call(inputs), test_utils=CHECKS)
    opcheck(RAW.lora_linear_bwd_.default, backward_call(inputs), test_utils=CHECKS)


@pytest.mark.parametrize("size", [LinearSize(0, 3, 2, 1), LinearSize(1, 1, 1, 1)], ids=str)
def test_opcheck_of_nothing_and_of_one(native, size):
    inputs = make_inputs(size)
    opcheck(RAW.lora_linear_fwd_.default, forward_call(inputs), test_utils=CHECKS)
    opcheck(RAW.lora_linear_bwd_.default, backward_call(inputs), test_utils=CHECKS)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(k for k, v in mode.items() if v) or "none")
def test_modes_of_backward_agree(native, mode):
    """What is wanted is the same whatever else is, and what is not is empty."""
    inputs = make_inputs(SIZE)
    every, call = backward_call(inputs, adds=False), backward_call(inputs, **mode)
    expected = RAW.lora_linear_bwd_(*every)
    results = RAW.lora_linear_bwd_(*call)
    wanted = mode["needs_adapter"], mode["needs_adapter"], mode["needs_bias"]
    for result, want, is_wanted in zip(results, expected, wanted, strict=True):
        assert torch.equal(result, want) if is_wanted else result.numel() == 0
    if mode["with_gx"]:
        assert torch.equal(call[0], every[0] + 1 if mode["adds"] else every[0])


# Graphs


# No two dimensions of a call are equal, ranks included: dynamo would take them for one.
SIZES = LinearSize(24, 21, 11, 3), LinearSize(57, 33, 17, 5), LinearSize(1000, 12, 20, 8)


# With scale a constant: what may change is compiled twice, as a symbol first.


def layer(x, weight, bias, a, b, mask, lora_x):
    return (lora_linear(x, weight, bias, a, b, 0.7, mask=mask, lora_x=lora_x),)


def layer_with_stats(x, weight, bias, a, b, mask, lora_x):
    return tuple(lora_linear_with_stats(x, weight, bias, a, b, 0.7, mask=mask, lora_x=lora_x))


def outputs_and_gradients(call, inputs, frozen=False):
    names = ("x", "lora_a", "lora_b", "lora_x") if frozen else (*inputs._fields[:5], "lora_x")
    leaves = {n: t.detach().requires_grad_() for n in names if (t := getattr(inputs, n)) is not None}
    y, *stats = call(*inputs._replace(**leaves)[:-1])
    return y.detach(), *stats, *torch.autograd.grad(y, list(leaves.values()), inputs.gy)


CASES = {
    "layer": (layer, {}),
    "plain": (layer, {"mask": False, "bias": False}),
    "dropout": (layer, {"lora_x": True}),
    "stats": (layer_with_stats, {}),
    "stats-dropout": (layer_with_stats, {"lora_x": True}),
}


@pytest.mark.parametrize(
    ("case", "frozen"), [*((case, False) for case in CASES), ("layer", True), ("stats-dropout", True)]
)
def test_compile_one_graph_for_several_sizes(native, case, frozen):
    """With gradients, and equal to the eager call bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call, options = CASES[case]
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        inputs = make_inputs(size, **options)
        results = outputs_and_gradients(compiled, inputs, frozen)
        assert_all_equal(results, outputs_and_gradients(call, inputs, frozen))
    assert counter.frame_count == 1


def test_compile_any_number_of_tokens(native):
    """Not told that it changes: the second number makes one graph for all others, in as many axes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_with_stats, backend=counter, fullgraph=True)
    for batch, time in ((2, 12), (2, 30), (2, 7), (2, 500)):
        inputs = make_inputs(LinearSize(batch * time, 21, 11, 3))
        inputs = inputs._replace(
            x=inputs.x.unflatten(0, (batch, time)), gy=inputs.gy.unflatten(0, (batch, time))
        )
        results = outputs_and_gradients(compiled, inputs, True)
        assert_all_equal(results, outputs_and_gradients(layer_with_stats, inputs, True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT], ids=str)
def test_compile_other_dtypes(native, dtype):
    torch._dynamo.reset()
    inputs = make_inputs(SIZE, dtype=dtype, adapter=FLOAT if dtype == BFLOAT else dtype)
    compiled = torch.compile(layer_with_stats, backend="aot_eager", fullgraph=True)
    assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(layer_with_stats, inputs))


def test_compile_without_gradients(native):
    torch._dynamo.reset()
    inputs = make_inputs(SIZE)[:-1]
    compiled = torch.compile(layer_with_stats, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_all_equal(compiled(*inputs), layer_with_stats(*inputs))


def test_compile_under_autocast(native):
    torch._dynamo.reset()
    inputs = make_inputs(SIZE)._replace(gy=make_inputs(SIZE, dtype=BFLOAT).gy)

    def call(*tensors):
        with torch.autocast("cpu", dtype=BFLOAT):
            return layer_with_stats(*tensors)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = outputs_and_gradients(compiled, inputs)
    assert results[0].dtype == BFLOAT
    assert_all_equal(results, outputs_and_gradients(call, inputs))


def test_compile_the_reference():
    torch._dynamo.reset()
    x, weight, bias, a, b, mask, *_ = make_inputs(SIZE)

    def call(x):
        return lora_linear(x, weight, bias, a, b, SCALE, mask=mask, impl="reference")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))


# Inductor

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)


@needs_compiler
def test_compile_with_inductor(native):
    """Between fused neighbours, and beside another use of what the layer writes to."""
    torch._dynamo.reset()
    inputs = make_inputs(LinearSize(24, 33, 17, 4))

    def call(x, weight, bias, a, b, mask, lora_x):
        inner = torch.where(x > 0, x, 0.5 * x)
        y, square_sum = lora_linear_with_stats(inner, weight, bias, a, b, SCALE, mask=mask)
        return 2 * y, square_sum

    compiled = outputs_and_gradients(torch.compile(call, fullgraph=True), inputs)
    expected = outputs_and_gradients(call, inputs)
    torch.testing.assert_close(compiled, expected)
    inner = torch.where(inputs.x > 0, inputs.x, 0.5 * inputs.x)
    value, budget = expected_results(inputs._replace(x=inner, gy=2 * inputs.gy))["y"]
    assert_matches_reference(compiled[0] / 2, value, budget)


@pytest.mark.parametrize("lora_x", [False, True])
def test_tokens_that_are_picked_by_their_values(native, lora_x):
    """Of a number that the compiler does not know."""
    x, weight, bias, a, b, mask, other, _ = make_inputs(LinearSize(13, 9, 7, 3), lora_x=lora_x)
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    pick = torch.arange(13) % 3 == 0

    def picked(x, a, b):
        rows = pick.nonzero().squeeze(1)
        low = None if other is None else other[rows]
        return lora_linear(x[rows], weight, bias, a, b, SCALE, mask=mask, lora_x=low).square().sum()

    compiled = torch.compile(picked, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        results = torch.autograd.grad(compiled(*leaves), leaves)
    assert_all_equal(results, torch.autograd.grad(picked(*leaves), leaves))
