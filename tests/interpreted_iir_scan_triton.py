"""The Triton kernels of iir_scan in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.library import opcheck
from triton.runtime import interpreter

from fastkit.ops import IIRState, iir_scan, iir_scan_autograd, iir_scan_with_state, iir_step, sosfilt
from fastkit.reference import iir_scan as reference
from fastkit.testing import Size
from fastkit.testing.iir_scan import check, expected_results, make_inputs, make_packed_inputs, make_state
from fastkit.triton import iir_scan as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp
]


def scan_by_doubling(self, arguments):
    """In the interpreter a scan goes sample by sample, and slowly; this is the order of a GPU."""
    data = [argument.handle.data for argument in arguments]
    index = np.arange(data[0].shape[self.axis])[None, :]
    assert self.axis == 1
    stride = 1
    while stride < index.size:
        earlier = [np.roll(d, stride, 1) for d in data]
        operands = [self.to_tensor(d, a.dtype) for d, a in zip(earlier + data, 2 * arguments, strict=True)]
        joined = self.combine_fn.fn(*operands)
        data = [np.where(index < stride, d, j.handle.data) for d, j in zip(data, joined, strict=True)]
        stride *= 2
    return [self.to_tensor(d, argument.dtype) for d, argument in zip(data, arguments, strict=True)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles so small that a few samples fill several, and the native library not there."""
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan_by_doubling)
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(kernels, "FILL", 0)

    def refuse(*args):
        raise AssertionError("a native kernel ran")

    monkeypatch.setattr(iir_scan_autograd, "_fwd", refuse)
    monkeypatch.setattr(iir_scan_autograd, "_bwd", refuse)


LAYOUTS = {
    "time": lambda t: t,
    "channels": lambda t: t.mT.contiguous().mT,
    "every_other_sample": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


SIZES = [
    (Size(2, 3, 17, None), True),
    (Size(2, 3, 17, 16), False),
    (Size(1, 3, 130, None), True),
    (Size(1, 3, 130, 16), True),
    (Size(1, 3, 130, 37), True),
    (Size(1, 3, 130, 37), False),
]


@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize(("size", "carry"), SIZES, ids=str)
def test_forward_and_backward(size, carry, layout):
    x, a, b, gy = make_inputs(size)
    check(LAYOUTS[layout](x), a, b, gy, chunk=size.chunk, carry=carry, impl="triton")


@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize(("chunk", "carry"), [(None, True), (32, False)])
def test_without_b(chunk, carry, layout):
    x, a, _, gy = make_inputs(Size(2, 2, 100, chunk))
    check(LAYOUTS[layout](x), a, None, gy, chunk=chunk, carry=carry, impl="triton")


@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("time", [1, 2])
def test_short_signals(time, layout):
    x, a, b, gy = make_inputs(Size(2, 3, time, 16))
    check(LAYOUTS[layout](x), a, b, gy, chunk=16, impl="triton")
    check(LAYOUTS[layout](x), a, None, gy, chunk=16, carry=False, impl="triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_results(layout):
    x, a, b, gy = make_inputs(Size(2, 3, 20, None))
    results = check(LAYOUTS[layout](x), a, b, gy, impl="triton")
    assert results["y"].stride() == results["gx"].stride() == torch.empty_like(LAYOUTS[layout](x)).stride()


@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize(("programs", "chunk", "numerator"), [(1000, 16, True), (3, 50, False)])
def test_split_time(monkeypatch, programs, chunk, numerator, layout):
    """Into a piece a tile, and into few long ones."""
    monkeypatch.setattr(kernels, "TILE", 32)
    monkeypatch.setattr(kernels, "FILL", programs)
    x, a, b, gy = make_inputs(Size(1, 2, 130, chunk), radius=0.95)
    check(LAYOUTS[layout](x), a, b if numerator else None, gy, chunk=chunk, impl="triton")


def test_more_pieces_than_a_tile_links(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "FILL", 1000)
    x, a, _, gy = make_inputs(Size(1, 1, 260, None), radius=0.95)
    check(x, a, None, gy, impl="triton")


@pytest.mark.parametrize("layout", ["time", "channels"])
def test_tiles_as_on_a_gpu(monkeypatch, layout):
    """With the sizes that a GPU gets."""
    monkeypatch.setattr(kernels, "TILE", 1024)
    for chunk, carry in ((None, True), (128, False)):
        x, a, b, gy = make_inputs(Size(2, 3, 250, chunk), radius=0.99)
        check(LAYOUTS[layout](x), a, b, gy, chunk=chunk, carry=carry, impl="triton")


def test_shared_coefficients_of_any_strides_and_an_expanded_gradient():
    x, a, b, _ = make_inputs(Size(2, 3, 50, 16))
    a, b = a[:1].mT.contiguous().mT, b[:, :1]
    check(x, a, b, torch.ones(()).expand(2, 3, 50), chunk=16, impl="triton")


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("time", torch.float64),
        ("time", torch.float16),
        ("time", torch.bfloat16),
        ("channels", torch.bfloat16),
    ],
)
def test_dtypes(layout, dtype):
    x, a, b, gy = make_inputs(Size(1, 2, 40, 16), dtype=dtype)
    for b_or_none in (b, None):
        leaves = [t.detach().requires_grad_() for t in (LAYOUTS[layout](x), a, b_or_none) if t is not None]
        y = iir_scan(*leaves, chunk=16, impl="triton")
        assert y.dtype == dtype
        results = {"y": y, **dict(zip(("gx", "ga", "gb"), torch.autograd.grad(y, leaves, gy), strict=False))}
        expected = expected_results(x, a, b_or_none, gy, chunk=16)
        for name, result in results.items():  # the interpreter cuts off to bfloat16: errors lean one way
            error = (result.double() - expected[name].value).abs()
            assert (error <= expected[name].budget).all(), name


# Beyond 32 bits


FAR = 2**30 + 8  # a stride: it fits, but twice it does not


@pytest.fixture
def far(tmp_path):
    """Copies in a file of holes, the last axis FAR apart; where 32 bits would go instead there are zeros."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * 2**30, dtype=torch.float32)
    begins = itertools.count(2**31, 4096)

    def copy(t):
        return memory.as_strided(t.shape, (*t.stride()[:-1], FAR), next(begins)).copy_(t)

    return copy


@pytest.mark.parametrize("layout", ["time", "channels"])
def test_times_far_apart(far, layout, monkeypatch):
    x, a, b, gy = make_inputs(Size(2, 3, 3, None))
    expected = expected_results(x, a, b, gy)
    x, gy = far(LAYOUTS[layout](x)), far(gy)
    y = torch.ops.fastkit_triton.iir_scan_fwd(x, a, b, 16, True)
    monkeypatch.setattr(torch, "empty_like", lambda t, dtype=None: far(LAYOUTS[layout](torch.zeros(t.shape))))
    gradients = torch.ops.fastkit_triton.iir_scan_bwd(gy, x, far(y), a, b, 16, True, True, True)
    for name, result in zip(("y", "gx", "ga", "gb"), (y, *gradients), strict=True):
        error = (result.double() - expected[name].value).abs()
        assert (error <= expected[name].budget).all(), name


@pytest.mark.parametrize("layout", ["time", "channels"])
def test_coefficients_far_apart(far, layout):
    x, a, b, gy = make_inputs(Size(2, 3, 40, 16))
    check(LAYOUTS[layout](x), far(a), far(b), gy, chunk=16, impl="triton")


@triton.jit
def places_of_walks(out, batch, channels, segments, CHANNEL_LANES: tl.constexpr, LANES: tl.constexpr):
    entry, channel, segment, valid = kernels._walks(batch, channels, segments, CHANNEL_LANES, LANES)
    out += tl.arange(0, LANES)[:, None]
    tl.store(out, entry)
    tl.store(out + LANES, channel)
    tl.store(out + 2 * LANES, segment)
    tl.store(out + 3 * LANES, valid)


@pytest.mark.parametrize(
    ("sizes", "program", "channel_lanes", "first", "valid"),
    [
        ((2**31 + 5, 1, 1), 2**25, False, (2**31, 0, 0), 5),
        ((2**29, 3, 2), 3 * 2**24 - 1, False, (2**29 - 11, 1, 0), 64),
        ((2, 2**31 - 3, 2), 2**25, True, (0, 0, 1), 64),
        ((2, 2**31 - 3, 2), 2**27 - 1, True, (1, 2**31 - 64, 1), 61),
    ],
)
def test_more_walks_than_32_bits_count(monkeypatch, sizes, program, channel_lanes, first, valid):
    """Where a program deep in the grid works, whose walks no memory here would hold."""
    handle = interpreter.TensorHandle(np.array([program], np.int32), tl.int32)
    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda axis: handle)
    out = torch.empty(4, 64, dtype=torch.int64)
    places_of_walks[(1,)](out, *sizes, CHANNEL_LANES=channel_lanes, LANES=64)
    assert tuple(out[:3, 0].tolist()) == first
    assert out[3].tolist() == [1] * valid + [0] * (64 - valid)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("numerator", [True, False])
def test_only_what_is_needed(numerator, needs):
    x, a, b, gy = make_inputs(Size(2, 3, 50, 16), dtype=torch.float16)
    y = torch.ops.fastkit_triton.iir_scan_fwd(x, a, b if numerator else None, 16, True)
    call = (gy, x, y, a, b if numerator else None, 16, True)
    everything = torch.ops.fastkit_triton.iir_scan_bwd(*call, True, True)
    some = torch.ops.fastkit_triton.iir_scan_bwd(*call, *needs)
    for result, full, wanted in zip(some, everything, (needs[0], needs[1], needs[1]), strict=True):
        assert torch.equal(result, full) if wanted else result.numel() == 0


@pytest.mark.parametrize(
    ("chunk", "carry", "numerator"), [(None, True, True), (16, True, True), (16, False, False)]
)
def test_double_backward_is_that_of_the_reference(chunk, carry, numerator):
    x, a, b, gy = make_inputs(Size(1, 2, 40, chunk), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in ((x, a, b) if numerator else (x, a))]

    def penalties(y):
        gradients = torch.autograd.grad(y, leaves, gy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    results = penalties(iir_scan(*leaves, chunk=chunk, carry=carry, impl="triton"))
    torch.testing.assert_close(results, penalties(reference(*leaves, chunk=chunk, carry=carry)))


def test_forward_mode_and_vmap():
    x, a, b, gy = make_inputs(Size(2, 3, 20, 16), dtype=torch.float64)

    def scan(x):
        return iir_scan(x, a, b, chunk=16, impl="triton")

    _, tangent = torch.func.jvp(scan, (x,), (gy,))
    torch.testing.assert_close(tangent, scan(gy))
    batched = torch.vmap(scan)(torch.stack([x, gy]))
    torch.testing.assert_close(batched, torch.stack([scan(x), scan(gy)]))


@pytest.mark.parametrize(("chunk", "carry", "touched"), [(16, False, 16), (16, True, 50), (None, True, 50)])
def test_nan_stays_where_it_may(chunk, carry, touched):
    """In its row, from its sample on; and with carry=False in its chunk."""
    x, a, b, _ = make_inputs(Size(2, 3, 50, chunk))
    clean = iir_scan(x, a, b, chunk=chunk, carry=carry, impl="triton")
    x[1, 1, 5] = torch.nan
    y = iir_scan(x, a, b, chunk=chunk, carry=carry, impl="triton")
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[1, 1, 5:touched] = True
    assert torch.equal(y.isnan(), spoilt)
    assert torch.equal(y[~spoilt], clean[~spoilt])


def test_empty_batch():
    leaves = [torch.zeros(shape, requires_grad=True) for shape in ((0, 3, 9), (1, 3, 1, 2), (1, 3, 1, 3))]
    gradients = torch.autograd.grad(iir_scan(*leaves, impl="triton").sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(("layout", "numerator"), [("time", True), ("channels", False)])
def test_opcheck(layout, numerator):
    x, a, b, gy = make_inputs(Size(1, 3, 18, 16))
    x, b = LAYOUTS[layout](x), b if numerator else None
    raw = torch.ops.fastkit_triton
    opcheck(raw.iir_scan_fwd.default, (x, a, b, 16, True))
    y = raw.iir_scan_fwd(x, a, b, 16, True)
    for needs in ((True, True), (not numerator, numerator)):
        opcheck(raw.iir_scan_bwd.default, (gy, x, y, a, b, 16, True, *needs))


def test_compile():
    x, a, b, gy = make_inputs(Size(2, 3, 40, 16))
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def scan(x, a, b):
        return iir_scan(x, a, b, chunk=16, impl="triton")

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    y = compiled(*leaves)
    assert torch.equal(y, scan(*leaves))
    results = torch.autograd.grad(y, leaves, gy)
    expected = torch.autograd.grad(scan(*leaves), leaves, gy)
    assert all(map(torch.equal, results, expected))


def test_refusals():
    def refused(op, what):
        text = f'{op}: impl="triton" has no {what}; use impl="cpu"'
        return pytest.raises(RuntimeError, match=f"^{text}$")

    x, a, b, _ = make_inputs(Size(2, 3, 40, None), filters=2)
    with refused("iir_scan", "banks"):
        iir_scan(x, a, b, impl="triton")
    a, b = a[..., 0, :], b[..., 0, :]
    with refused("iir_scan", "chunks of less than 16 samples"):
        iir_scan(x, a.expand(-1, -1, 3, -1), chunk=15, impl="triton")
    with refused("iir_scan_with_state", "states"):
        iir_scan_with_state(x, a, b, impl="triton")
    with refused("iir_scan_with_state", "states"):
        iir_scan_with_state(x, a, b, make_state(x, a), impl="triton")
    with refused("iir_step", "single steps"):
        iir_step(x[..., 0], a[:, :, 0], None, IIRState(*make_state(x, a)), impl="triton")
    with refused("sosfilt", "cascades"):
        sosfilt(x, torch.tensor([[1.0, 0, 0, 1, -0.5, 0]]), impl="triton")
    x, a, b, _, offsets = make_packed_inputs([3, 20], 2, 16)
    with refused("iir_scan", "packed sequences"):
        iir_scan(x, a, b, chunk=16, cu_seqlens=offsets, impl="triton")


def test_a_bank_of_one_filter_runs_as_that_filter():
    x, a, b, _ = make_inputs(Size(2, 3, 40, 16), filters=1)
    y = iir_scan(x, a, b, chunk=16, impl="triton")
    assert torch.equal(y, iir_scan(x, a.squeeze(3), b.squeeze(3), chunk=16, impl="triton"))
