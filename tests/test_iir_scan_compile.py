"""iir_scan and its relatives under torch.compile, and the raw ops that it traces."""

import itertools
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.ops.iir_scan_autograd import ONE_CHUNK
from fastkit.testing import Size
from fastkit.testing.iir_scan import make_inputs, make_packed_inputs, make_state

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

RAW = torch.ops.fastkit
DTYPES = torch.float32, torch.float64, torch.bfloat16


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# The raw ops: their schemas, fakes and layouts


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.mT.contiguous().mT,
    "every_other_sample": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long


def opcheck_scan(x, a, b, gy, state, offsets, chunk, carry, traced=True):
    """Every call that the op may make of the raw ops; those with the most results are traced too."""
    forward, backward = RAW.iir_scan_fwd.default, RAW.iir_scan_bwd.default
    bank = a.dim() == 5
    call = (*state, offsets, chunk, carry)
    for needs_end in (False, True):
        checks = TRACED if traced and needs_end else CHECKS
        opcheck(forward, (x, a, b, *call, needs_end, False), test_utils=checks)
    if bank:  # a few of the borders belong to no tile and are not written: there is nothing to compare
        opcheck(forward, (x, a, b, *call, False, True), test_utils=("test_schema", "test_faketensor"))
    y, end_y, end_x, borders = forward(x, a, b, *call, True, bank)
    saved = (x, None, borders) if bank else (x, y, None)
    for gend in ((None, None), (end_y, end_x)):
        for needs in itertools.product((False, True), repeat=2):
            # All there is, and the least: neither cotangents of the end nor gradients of coefficients.
            most, least = gend[0] is not None and all(needs), gend[0] is None and needs == (True, False)
            checks = TRACED if traced and (most or least) else CHECKS
            opcheck(backward, (gy, *gend, *saved, a, b, *call, *needs), test_utils=checks)


# Half of all calls, with every pair of parameters.
SCANS = [
    (filters, layout, numerator, with_state)
    for layout in LAYOUTS
    for filters, numerator, with_state in [
        (None, True, True), (None, False, False), (3, True, False), (3, False, True),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("filters", "layout", "numerator", "with_state"), SCANS)
def test_opcheck_of_a_scan(native, filters, layout, numerator, with_state):
    x, a, b, gy = make_inputs(Size(2, 3, 9, 4), filters=filters)
    state = make_state(x, a) if with_state else (None, None)
    b = b if numerator else None
    opcheck_scan(LAYOUTS[layout](x), a, b, gy, state, None, 4, not numerator, traced=layout == "contiguous")


@pytest.mark.parametrize("chunk", [4, ONE_CHUNK])
@pytest.mark.parametrize("filters", [None, 3])
def test_opcheck_of_packed_sequences(native, filters, chunk):
    packed = make_packed_inputs([3, 0, 9], 2, None if chunk == ONE_CHUNK else chunk, filters=filters)
    x, a, b, gy, offsets = packed
    opcheck_scan(x, a, b, gy, make_state(x, a, offsets), offsets, chunk, True)
    if chunk == ONE_CHUNK:
        shared = a[:, :, :1], b[:, :, :1]
        opcheck_scan(x, *shared, gy, (None, None), offsets.int(), chunk, True, traced=filters is None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_of_dtypes(native, dtype):
    x, a, b, gy = make_inputs(Size(2, 3, 9, 4), dtype=dtype)
    opcheck_scan(x, a, b, gy, make_state(x, a), None, 4, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_a_cascade(native, layout, dtype):
    x, a, b, gy = make_inputs(Size(2, 3, 9, None), dtype=dtype)
    x, a, b = LAYOUTS[layout](x), a[0, :, 0], b[0, :, 0]
    forward, backward = RAW.sosfilt_fwd.default, RAW.sosfilt_bwd.default
    opcheck(forward, (x, a, b, False))
    for sections in ((a, b), (a[:1], b[:1])):
        # As of a bank: of the borders some are not written.
        opcheck(forward, (x, *sections, True), test_utils=("test_schema", "test_faketensor"))
        y, borders = forward(x, *sections, True)
        kept = borders if len(sections[0]) > 1 else y
        for needs in itertools.product((False, True), repeat=2):
            checks = TRACED if all(needs) else CHECKS
            opcheck(backward, (gy, x, kept, *sections, *needs), test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [None, 3])
def test_opcheck_of_a_step(native, filters, dtype):
    x, a, b, _ = make_inputs(Size(2, 5, 1, None), filters=filters, dtype=dtype)
    state = make_state(x, a)
    for x_t in (x[..., 0], x[..., 0].mT.contiguous().mT):
        checks = TRACED if dtype == torch.float32 else CHECKS
        opcheck(RAW.iir_step_fwd.default, (x_t, a[:1, :, 0], b[:, :1, 0], *state), test_utils=checks)
        opcheck(RAW.iir_step_fwd.default, (x_t, a[:, :, 0], None, *state), test_utils=checks)


# Graphs


def scan_inputs(filters):
    # No two dimensions of the first call are equal, taps included: dynamo would take them for one.
    sizes = Size(4, 5, 21, 4), Size(5, 17, 33, 4), Size(7, 6, 257, 4)
    return [make_inputs(size, filters=filters)[:3] for size in sizes]


def packed_inputs():
    for lengths in ([2, 5, 0, 8, 9, 13], [33, 1, 4, 4], [100, 0, 157, 3, 3]):
        x, a, b, _, offsets = make_packed_inputs(lengths, 5, 4)
        yield x, a, b, offsets


def with_states(inputs):
    return [(x, a, b, *make_state(x, a)) for x, a, b in inputs]


def step_inputs():
    return [(x[..., 0], a[:, :, 0], b[:, :, 0], *make_state(x, a)) for x, a, b in scan_inputs(7)]


def cascades(*shapes):
    torch.manual_seed(0)
    sections = torch.randn(3, 6) / 4
    sections[:, 3] = 1
    return [(torch.randn(shape), sections) for shape in shapes]


def flat(y, end):
    return y, *end


CASES = {
    "whole": (lambda x, a, b: iir_scan(x, a[:, :, :1], b[:, :, :1]), scan_inputs(None)),
    "chunks": (lambda x, a, b: iir_scan(x, a, b, chunk=4, carry=False), scan_inputs(None)),
    "bank": (lambda x, a, b: iir_scan(x, a, b, chunk=4), scan_inputs(7)),
    "state": (
        lambda x, a, b, *state: flat(*iir_scan_with_state(x, a, b, IIRState(*state), chunk=4)),
        with_states(scan_inputs(None)),
    ),
    "bank-state": (
        lambda x, a, b, *state: flat(*iir_scan_with_state(x, a, b, IIRState(*state), chunk=4)),
        with_states(scan_inputs(7)),
    ),
    "no-state": (lambda x, a, b: flat(*iir_scan_with_state(x, a, b, chunk=4)), scan_inputs(None)),
    "packed": (
        lambda x, a, b, offsets: iir_scan(x, a, b, chunk=4, cu_seqlens=offsets),
        list(packed_inputs()),
    ),
    "step": (lambda x, a, b, *state: flat(*iir_step(x, a, b, IIRState(*state))), step_inputs()),
    "cascade": (sosfilt, cascades((4, 5, 21), (5, 17, 33), (7, 6, 257))),
    "cascade-of-one-row": (sosfilt, cascades((21,), (33,), (257,))),
}


def outputs_and_gradients(call, inputs):
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(y.shape, generator=generator) for y in outputs]
    gradients = torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], cotangents)
    return *(y.detach() for y in outputs), *gradients


@pytest.mark.parametrize("case", CASES)
def test_compile_one_graph_for_several_sizes(native, case):
    """With gradients, and equal to the eager call bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call, several = CASES[case]
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for inputs in several:
        assert_all_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", ["bank", "packed", "step", "cascade"])
def test_compile_without_gradients(native, case):
    torch._dynamo.reset()
    call, several = CASES[case]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        results, expected = compiled(*several[0]), call(*several[0])
    if not isinstance(results, tuple):
        results, expected = (results,), (expected,)
    assert_all_equal(results, expected)


def test_compile_the_reference():
    torch._dynamo.reset()
    x, a, b, _ = make_inputs(Size(2, 3, 5, None))

    def scan(x, a, b):
        return iir_scan(x, a, b, impl="reference")

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, a, b), scan(x, a, b))


# Inductor

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)


@needs_compiler
def test_compile_a_model_with_inductor(native):
    """A cascade; a filter between fused neighbours, whose layouts inductor is free to choose; and a bank that
    starts from a state, with its final state in the loss.
    """
    torch._dynamo.reset()
    x, a, b, gy = make_inputs(Size(2, 5, 33, 16), filters=3, dtype=torch.float64)
    sections = torch.tensor([[0.5, 0.2, 0.1, 1, -0.3, 0.2], [0.3, 0.1, 0, 1, 0.4, 0.1]]).double()
    leaves = [t.requires_grad_() for t in (x, a, b, *make_state(x, a), sections)]

    def loss(x, a, b, state_y, state_x, sections):
        h = torch.tanh(sosfilt(x.mT.contiguous().mT, sections))
        h = (2 * h).transpose(1, 2).contiguous()
        h = iir_scan(h.transpose(1, 2), a[:, :, :, 0], b[:, :, :, 0], chunk=16)
        y, end = iir_scan_with_state(h, a, b, IIRState(state_y, state_x), chunk=16)
        return (torch.sigmoid(y) * gy).sum() + end.y.square().sum() + end.x.sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(compiled, torch.autograd.grad(loss(*leaves), leaves))
