"""ops.iir_scan, in every implementation that runs here, against the float64 reference."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from fastkit import reference
from fastkit._dispatch import choose, unavailable
from fastkit.ops import iir_scan
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import Size, devices, sizes
from fastkit.testing.iir_scan import check, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

BACKENDS = [(name, device) for device in devices() for name in ("reference", device.type)]


@pytest.fixture(params=BACKENDS, ids=lambda backend: f"{backend[0]}-on-{backend[1].type}")
def impl(request):
    """An implementation; the tensors that the test makes are born on its device."""
    name, device = request.param
    reason = unavailable(name, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with device:
        yield name


@pytest.fixture
def native():
    """The CPU kernel, for what the reference is too slow for or has no part in."""
    reason = unavailable("cpu", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "cpu"


def output_and_gradients(x, a, b, gy, **options):
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = iir_scan(*leaves, **options)
    gradients = torch.autograd.grad(y, leaves, gy)
    return dict(zip(("y", "gx", "ga", "gb"), (y.detach(), *gradients), strict=True))


def assert_all_equal(results, expected):
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


# Matches the reference


@pytest.mark.parametrize(
    ("dtype", "carry", "numerator"),
    [
        (torch.float32, True, True),
        (torch.float32, False, False),
        (torch.float64, True, False),
        (torch.float64, False, True),
    ],
    ids=["float32-carry-numerator", "float32-reset", "float64-carry", "float64-reset-numerator"],
)
@pytest.mark.parametrize("size", sizes("iir_scan"), ids=str)
def test_matches_reference(impl, size, dtype, carry, numerator):
    x, a, b, gy = make_inputs(size, dtype=dtype)
    b = b if numerator else None
    check(x, a, b, gy, chunk=size.chunk, carry=carry, impl=impl)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(
    "poles",
    [(0.0, 0.998001), (-1.99, 0.998001), (0.0, 1.0201), (-1.8, 0.81 - 1e-6), (-1.8, 0.81 + 1e-6)],
    ids=["radius-0.999", "low-radius-0.999", "radius-1.01", "two-real-poles", "near-double-poles"],
)
def test_delicate_poles(impl, poles, chunk):
    x, a, b, gy = make_inputs(Size(2, 17, 257, chunk))
    a = torch.tensor(poles).expand(1, 1, a.shape[2], 2)
    for numerator in (None, b):
        check(x, a, numerator, gy, chunk=chunk, impl=impl)


SHARED = {
    "alone": lambda c: c,
    "batch": lambda c: c[:1],
    "channels": lambda c: c[:, :1],
    "both": lambda c: c[:1, :1],
    "expanded": lambda c: c[:1, :1, :1].expand(c.shape),
}


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("shared_b", SHARED)
@pytest.mark.parametrize("shared_a", SHARED)
def test_shared_coefficients(impl, shared_a, shared_b, carry):
    x, a, b, gy = make_inputs(Size(3, 11, 33, 16))
    a, b = SHARED[shared_a](a), SHARED[shared_b](b)
    check(x, a, b, gy, chunk=16, carry=carry, impl=impl)


LAYOUTS = {
    "contiguous": lambda B, C, T: torch.randn(B, C, T),
    "channels_last": lambda B, C, T: torch.randn(B, T, C).transpose(1, 2),
    "channels_first": lambda B, C, T: torch.randn(C, B, T).transpose(0, 1),
    "channels_outermost": lambda B, C, T: torch.randn(C, T, B).permute(2, 0, 1),
    "time_outermost": lambda B, C, T: torch.randn(T, B, C).permute(1, 2, 0),
    "reversed_dims": lambda B, C, T: torch.randn(T, C, B).permute(2, 1, 0),
    "every_other_sample": lambda B, C, T: torch.randn(B, C, 2 * T)[..., ::2],
    "every_other_channel": lambda B, C, T: torch.randn(B, T, 2 * C).transpose(1, 2)[:, ::2],
    "slice_of_time": lambda B, C, T: torch.randn(B, C, T + 5)[..., 2 : T + 2],
    "slice_of_channels": lambda B, C, T: torch.randn(B, T, C + 3).transpose(1, 2)[:, 1 : C + 1],
    "storage_offset": lambda B, C, T: torch.randn(B * C * T + 3)[3:].view(B, C, T),
    "expanded_batch": lambda B, C, T: torch.randn(1, C, T).expand(B, C, T),
    "expanded_channels": lambda B, C, T: torch.randn(B, 1, T).expand(B, C, T),
    "expanded_time": lambda B, C, T: torch.randn(B, C, 1).expand(B, C, T),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_x(impl, layout):
    _, a, b, gy = make_inputs(Size(2, 17, 33, 16))
    torch.manual_seed(0)
    x = LAYOUTS[layout](2, 17, 33)
    results = check(x, a, b, gy, chunk=16, impl=impl)
    if impl != "reference":
        for name in ("y", "gx"):
            assert results[name].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_cotangent(impl, layout, layout_of_x):
    _, a, b, _ = make_inputs(Size(2, 17, 33, 16))
    torch.manual_seed(0)
    x, gy = LAYOUTS[layout_of_x](2, 17, 33), LAYOUTS[layout](2, 17, 33)
    check(x, a, b, gy, chunk=16, impl=impl)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)], ids=str)
def test_layout_of_coefficients(impl, order):
    x, a, b, gy = make_inputs(Size(2, 17, 33, 16))
    back = [order.index(dim) for dim in range(4)]
    a, b = (c.permute(order).contiguous().permute(back) for c in (a, b))
    check(x, a, b, gy, chunk=16, impl=impl)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("time", [2**17, 2**17 + 5])
def test_a_large_call_is_its_chunks(native, layout, time):
    """More than 16 MiB of results, which the kernel writes past the caches."""
    _, a, b, _ = make_inputs(Size(1, 33, time, 128))
    torch.manual_seed(0)
    x, gy = LAYOUTS[layout](1, 33, time), LAYOUTS[layout](1, 33, time)
    large = output_and_gradients(x, a, b, gy, chunk=128, carry=False, impl=native)
    for first in (0, 512, time // 128 - 2):
        t, k = slice(128 * first, 128 * (first + 3)), slice(first, first + 3)
        small = x[..., t], a[:, :, k], b[:, :, k], gy[..., t]
        expected = output_and_gradients(*small, chunk=128, carry=False, impl=native)
        results = {"y": large["y"][..., t], "gx": large["gx"][..., t]}
        assert_all_equal({**results, "ga": large["ga"][:, :, k], "gb": large["gb"][:, :, k]}, expected)


# Gradients of first and second order by differences, in float64


@pytest.mark.parametrize(("chunk", "carry"), [(None, True), (1, True), (3, True), (3, False)])
@pytest.mark.parametrize("time", [1, 2, 3, 5, 8, 31, 33])
def test_gradcheck(impl, time, chunk, carry):
    fast = impl == "reference" and time > 8
    x, a, b, _ = make_inputs(Size(1, 2, time, chunk), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, a[:, :1], b)]

    def scan(x, a, b=None):
        return iir_scan(x, a, b, chunk=chunk, carry=carry, impl=impl)

    for inputs in (leaves[:2], leaves):
        assert gradcheck(scan, inputs, fast_mode=fast)
        assert gradgradcheck(scan, inputs, fast_mode=fast)


@pytest.mark.parametrize("carry", [True, False])
def test_gradcheck_long(impl, carry):
    inputs = make_inputs(Size(1, 2, 257, 128), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs[:3]]

    def scan(x, a, b):
        return iir_scan(x, a, b, chunk=128, carry=carry, impl=impl)

    assert gradcheck(scan, leaves, fast_mode=True)
    assert gradgradcheck(scan, leaves, fast_mode=True)


# torch.func


def test_func_grad_up_to_the_third_order(impl):
    """Of each argument, against autograd through the reference."""
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), dtype=torch.float64)
    inputs = x, a[:, :1], b[:1]

    def three_orders(scan):
        def loss(*inputs):
            return scan(*inputs, chunk=4).square().sum()

        def squared_gradient(loss):
            gradient = torch.func.grad(loss, argnums=(0, 1, 2))
            return lambda *inputs: sum(g.square().sum() for g in gradient(*inputs)).sqrt()

        second, third = squared_gradient(loss), squared_gradient(squared_gradient(loss))
        return [torch.func.grad(f, argnums=(0, 1, 2))(*inputs) for f in (loss, second, third)]

    found = three_orders(lambda *inputs, **options: iir_scan(*inputs, impl=impl, **options))
    torch.testing.assert_close(found, three_orders(reference.iir_scan))


def test_forward_mode_and_vmap_are_refused(native):
    """Where they could be silently wrong: zero tangents, rows of one batch."""
    x, a, _, _ = make_inputs(Size(2, 3, 9, None))
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda x: iir_scan(x, a, impl=native), (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: iir_scan(x, a, impl=native))(x[None])


# The raw ops


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other_sample"])
@pytest.mark.parametrize("numerator", [True, False])
def test_opcheck(native, layout, numerator):
    _, a, b, gy = make_inputs(Size(2, 3, 9, 4))
    x, b = LAYOUTS[layout](2, 3, 9), b if numerator else None
    forward = torch.ops.fastkit.iir_scan_fwd.default
    backward = torch.ops.fastkit.iir_scan_bwd.default
    opcheck(forward, (x, a, b, 4, True))
    y = forward(x, a, b, 4, False)
    for needs_x, needs_coefficients in itertools.product((False, True), repeat=2):
        opcheck(backward, (gy, x, y, a, b, 4, False, needs_x, needs_coefficients))


def test_raw_ops_refuse_tensors_of_two_devices(native):
    """One on the meta device takes the call to the fake implementation, which computes nothing."""
    x, a, b, gy = make_inputs(Size(2, 3, 9, 4))
    with pytest.raises(RuntimeError, match="iir_scan: tensors must be on one device, got cpu, meta"):
        torch.ops.fastkit.iir_scan_fwd(x, a.to("meta"), b, 4, True)
    with pytest.raises(RuntimeError, match="iir_scan: tensors must be on one device, got cpu, meta"):
        torch.ops.fastkit.iir_scan_bwd(gy.to("meta"), x, x, a, b, 4, True, True, True)


# Compilation


@pytest.mark.parametrize("chunk", [None, 4])
def test_compile_one_graph_for_several_sizes(native, chunk):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def scan(x, a, b, gy):
        y = iir_scan(x, a, b, chunk=chunk, carry=False)
        return y, (y * gy).sum()

    compiled = torch.compile(scan, backend=counter, fullgraph=True, dynamic=True)
    # No two dimensions of the first call are equal, taps included: dynamo would take them for one.
    for size in (Size(4, 5, 21, chunk), Size(5, 17, 33, chunk), Size(7, 6, 257, chunk)):
        x, a, b, gy = make_inputs(size)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y, loss = compiled(*leaves, gy)
        gradients = torch.autograd.grad(loss, leaves)
        results = dict(zip(("y", "gx", "ga", "gb"), (y, *gradients), strict=True))
        assert_all_equal(results, output_and_gradients(x, a, b, gy, chunk=chunk, carry=False))
    assert counter.frame_count == 1


def test_compile_the_reference():
    torch._dynamo.reset()
    x, a, b, _ = make_inputs(Size(2, 3, 5, None))

    def scan(x, a, b):
        return iir_scan(x, a, b, impl="reference")

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, a, b), scan(x, a, b))


def test_compile_with_inductor(native):
    """Between fused neighbours, whose layouts inductor is free to choose."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("inductor needs Python.h")
    torch._dynamo.reset()
    x, a, b, gy = make_inputs(Size(2, 3, 33, 16))
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def loss(x, a, b):
        h = (2 * x).transpose(1, 2).contiguous()
        return (iir_scan(h.transpose(1, 2), a, b, chunk=16) * gy).sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(compiled, torch.autograd.grad(loss(*leaves), leaves))


# Awkward inputs


@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 0, 9), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_empty(impl, shape, shared):
    x, a, b, _ = make_inputs(Size(*shape, 4))
    if shared:
        a, b = torch.randn(1, 1, a.shape[2], 2), torch.randn(1, 1, b.shape[2], 3)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = iir_scan(*leaves, chunk=4, impl=impl)
    zeros = dict(enumerate(map(torch.zeros_like, leaves)))
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert y.shape == shape
    assert_all_equal(first, zeros)
    assert_all_equal(torch.autograd.grad(sum(g.sum() for g in first), leaves), zeros)


def test_the_default_is_the_kernel_where_one_covers_the_dtype(native):
    dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16
    chosen = [choose("iir_scan", None, torch.zeros(1, dtype=d), KERNELS) for d in dtypes]
    assert chosen == ["cpu", "cpu", "reference", "reference"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_x(dtype):
    x, a, b, gy = make_inputs(Size(2, 3, 33, 16))
    results = check(x.to(dtype), a, b, gy.to(dtype), chunk=16)
    assert [t.dtype for t in results.values()] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_raises_the_coefficients_and_leaves_x(dtype):
    x, a, b, gy = make_inputs(Size(2, 3, 9, 4))
    x, gy, a, b = x.to(dtype), gy.to(dtype), a.bfloat16(), b.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = output_and_gradients(x, a, b, gy, chunk=4)
    assert [t.dtype for t in results.values()] == [dtype, dtype, torch.bfloat16, torch.bfloat16]
    expected = output_and_gradients(x, a.float(), b.float(), gy, chunk=4)
    assert_all_equal(results, {name: t.to(results[name].dtype) for name, t in expected.items()})


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_only_some_gradients(impl, wanted):
    *inputs, gy = make_inputs(Size(2, 3, 9, 4))
    _, *full = output_and_gradients(*inputs, gy, chunk=4, impl=impl).values()
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    iir_scan(*leaves, chunk=4, impl=impl).backward(gy)
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, full[i]) if i in wanted else leaf.grad is None


def test_expanded_cotangent(impl):
    """What y.sum().backward() sends: one element with strides of 0."""
    x, a, b, gy = make_inputs(Size(2, 17, 33, 16))
    one = torch.ones(()).expand(gy.shape)
    results = output_and_gradients(x, a, b, one, chunk=16, impl=impl)
    assert_all_equal(results, output_and_gradients(x, a, b, one.contiguous(), chunk=16, impl=impl))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("carry", [True, False])
def test_nan_reaches_what_depends_on_it_and_nothing_else(impl, carry, layout):
    """At one sample of x, then of gy; all else is as without it, bit for bit."""
    _, a, b, _ = make_inputs(Size(2, 17, 33, 16))
    torch.manual_seed(0)
    signals = {"x": LAYOUTS[layout](2, 17, 33), "gy": LAYOUTS[layout](2, 17, 33)}
    row, sample, chunk = (1, 3), 20, 1
    time, chunks = torch.arange(33), torch.arange(3)[:, None]
    later, earlier, nowhere = time >= sample, time <= sample, time < 0
    later_chunks, earlier_chunks = (chunks >= chunk), (chunks <= chunk)
    if not carry:
        later, earlier = (side & (time // 16 == chunk) for side in (later, earlier))
        later_chunks = earlier_chunks = chunks == chunk
    reached = {
        "x": {"y": later, "gx": nowhere, "ga": later_chunks, "gb": chunks == chunk},
        "gy": {"y": nowhere, "gx": earlier, "ga": earlier_chunks, "gb": earlier_chunks},
    }

    def run(x, gy):
        return output_and_gradients(x, a, b, gy, chunk=16, carry=carry, impl=impl)

    clean = run(**signals)
    for spoiled, effects in reached.items():
        signal = signals[spoiled].clone()
        signal[(*row, sample)] = math.nan
        results = run(**{**signals, spoiled: signal})
        for name, where in effects.items():
            want = clean[name].clone()
            want[row].masked_fill_(where, math.nan)
            torch.testing.assert_close(results[name], want, rtol=0, atol=0, equal_nan=True)


def test_overflow_is_inf(impl):
    x = torch.zeros(1, 17, 400)
    x[..., 0] = 1
    a = torch.tensor([-1.0, -0.5]).expand(1, 1, 1, 2)  # a pole at 1.37
    y = iir_scan(x, a, impl=impl)
    exact = reference.iir_scan(x.double(), a.double())
    limit = torch.finfo(torch.float32).max
    assert (exact > 1.01 * limit).any()
    assert (y[exact > 1.01 * limit] == math.inf).all()
    assert y[exact < 0.99 * limit].isfinite().all()


def test_subnormal_numbers(impl):
    """A decay below the smallest normal number may be flushed to zero, in the kernel and nowhere else."""
    x = torch.zeros(1, 17, 257)
    x[..., 0] = 1e-20
    check(x, torch.tensor([-0.5, 0.0]).expand(1, 1, 1, 2), impl=impl)
    small = torch.full((100_000,), 1e-40)
    assert (small * 1 == small).all()


class TestOffsetsBeyond32Bits:
    """Views whose elements lie more than 2**31 apart, in a file that is one hole."""

    @pytest.fixture
    def elements(self, tmp_path):
        hole = tmp_path / "hole"
        try:
            elements = torch.from_file(str(hole), shared=True, size=2**31 + 2**29)
        except RuntimeError as error:
            pytest.skip(f"no sparse file of 10 GiB: {error}")
        yield elements
        hole.unlink()

    @pytest.mark.parametrize(
        ("shape", "strides"),
        [
            ((2, 3, 9), (2**31 + 64, 16, 1)),
            ((1, 2, 9), (0, 2**31 + 64, 1)),
            ((1, 17, 9), (0, 1, 2**28 + 2**25)),
            ((2, 17, 5), (2**31 + 64, 1, 32)),
        ],
        ids=["batch", "channels", "time", "batch-channels_last"],
    )
    def test_x_and_cotangent(self, native, elements, shape, strides):
        x, a, b, gy = make_inputs(Size(*shape, None))
        x = elements.as_strided(shape, strides).copy_(x)
        gy = elements.as_strided(shape, strides, 2**20).copy_(gy)
        check(x, a, b, gy, impl=native)

    def test_coefficients(self, native, elements):
        x, a, b, gy = make_inputs(Size(2, 3, 9, 3))
        a = elements.as_strided(a.shape, (2**31 + 64, 2, 8, 1)).copy_(a)
        b = elements.as_strided(b.shape, (1, 4, 2**30 + 64, 32), 2**20).copy_(b)
        check(x, a, b, gy, chunk=3, impl=native)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(native, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    usable = json.loads(torch.ops.fastkit.build_info())["cpu_isas"]
    if isa not in usable:
        pytest.skip(f"this CPU and build have {', '.join(usable)}")
    script = f"""if True:
        import json, torch
        from fastkit.testing import sizes
        from fastkit.testing.iir_scan import check, make_inputs
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for size in sizes("iir_scan"):
            for dtype in (torch.float32, torch.float64):
                x, a, b, gy = make_inputs(size, dtype=dtype)
                if size.T < 1000:
                    check(x, a, b, gy, chunk=size.chunk, impl="cpu")
                    x = x.transpose(1, 2).contiguous().transpose(1, 2)
                    check(x, a, None, gy, chunk=size.chunk, carry=False, impl="cpu")
        """
    environment = {**os.environ, "FASTKIT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Refusals


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


X, A, B = torch.zeros(2, 3, 9), torch.zeros(1, 3, 1, 2), torch.zeros(2, 1, 1, 3)
UNSTABLE = torch.tensor([(0.0, 0.0), (0.5, 1.25), (0.0, 0.0)])[None, :, None]
REFUSALS = [
    (TypeError, {"b": B.as_subclass(DTensor)}, "b is a DTensor; pass b.to_local() or b.full_tensor()"),
    (TypeError, {"x": [1.0]}, "x must be a tensor, got list"),
    (TypeError, {"a": None}, "a must be a tensor, got NoneType"),
    (
        TypeError,
        {"a": A.to_sparse()},
        "a must be dense, got torch.sparse_coo; pass a.to_dense()",
    ),
    (TypeError, {"carry": "no"}, "carry must be True or False, got 'no'"),
    (
        TypeError,
        {"x": X.to(torch.complex64)},
        "x must be real, got torch.complex64; filter x.real and x.imag apart",
    ),
    (
        TypeError,
        {"x": X.int()},
        "x must be floating point, got torch.int32; cast it to torch.float32",
    ),
    (
        ValueError,
        {"x": X[0]},
        "x must have shape (B, C, T), got (3, 9); add axes, as in x[None, None]",
    ),
    (
        ValueError,
        {"x": X[..., :0]},
        "x must have T >= 1, got (2, 3, 0); skip the call for T = 0",
    ),
    (TypeError, {"chunk": 3.0}, "chunk must be an int or None, got 3.0"),
    (TypeError, {"chunk": True}, "chunk must be an int or None, got True"),
    (
        ValueError,
        {"chunk": 0},
        "chunk must be in [1, 2**31), got 0; None is one filter for all T",
    ),
    (
        ValueError,
        {"chunk": 2**31},
        "chunk must be in [1, 2**31), got 2147483648; None is one filter for all T",
    ),
    (
        RuntimeError,
        {"a": A.to("meta")},
        "a must be on the device of x, cpu, got meta; move it with a.to(x.device)",
    ),
    (
        TypeError,
        {"x": X.bfloat16(), "a": A.bfloat16()},
        "a must be torch.float32 for x of torch.bfloat16, got torch.bfloat16;"
        " cast it with a.to(torch.float32)",
    ),
    (
        TypeError,
        {"b": B.double()},
        "b must be torch.float32 for x of torch.float32, got torch.float64; cast it with b.to(torch.float32)",
    ),
    (
        ValueError,
        {"a": torch.zeros(1, 3, 1, 3)},
        "a must hold (a1, a2) of a denominator 1 + a1/z + a2/z^2, got (1, 3, 1, 3);"
        " for (a0, a1, a2) pass a[..., 1:] / a[..., :1] and b / a[..., :1]",
    ),
    (
        ValueError,
        {"a": A[:, :2]},
        "a must have shape (B|1, C|1, K, 2) = (2|1, 3|1, 1, 2) for x of shape (2, 3, 9)"
        " and chunk=None, got (1, 2, 1, 2); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": A.expand(1, 3, 3, 2), "chunk": 4},
        "b must have shape (B|1, C|1, K, 3) = (2|1, 3|1, 3, 3) for x of shape (2, 3, 9)"
        " and chunk=4, got (2, 1, 1, 3); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": UNSTABLE, "check_stable": True},
        "a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
        " (a1, a2) = (0.5, 1.25) at a[0, 1, 0]; scale the poles inwards, or leave check_stable=False",
    ),
    (
        ValueError,
        {"a": A + math.nan, "check_stable": True},
        "a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
        " (a1, a2) = (nan, nan) at a[0, 0, 0]; scale the poles inwards, or leave check_stable=False",
    ),
    (
        ValueError,
        {"impl": "numpy"},
        "impl must be one of reference, cpu, cuda, triton or None, got 'numpy'",
    ),
]


@pytest.mark.parametrize(("error", "arguments", "message"), REFUSALS)
def test_refused_in_words(error, arguments, message):
    options = {"x": X, "a": A, "b": B, **arguments}
    tensors = [options.pop(name) for name in ("x", "a", "b")]
    with pytest.raises(error) as caught:
        iir_scan(*tensors, **options)
    assert str(caught.value) == f"iir_scan: {message}"


def test_impl_of_another_device_is_refused():
    with pytest.raises(RuntimeError, match='iir_scan: impl="cuda" cannot run'):
        iir_scan(X, A, impl="cuda")


def test_kernel_refuses_a_dtype_that_it_does_not_cover(native):
    message = 'impl="cpu" covers torch.float32, torch.float64, got torch.float16; use impl="refer'
    with pytest.raises(RuntimeError, match=message):
        iir_scan(X.half(), A, impl=native)


def test_check_stable_is_refused_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, a: iir_scan(x, a, check_stable=True), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="check_stable=True reads values and cannot be compiled"):
        compiled(X, A)


def test_check_stable_lets_stable_poles_pass(impl):
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), radius=0.999)
    options = {"chunk": 4, "impl": impl}
    assert torch.equal(iir_scan(x, a, b, check_stable=True, **options), iir_scan(x, a, b, **options))


# Determinism


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 17, 4000), (1, 1, 100_000), (1, 64, 5000)], ids=str)
def test_ten_runs_are_equal_whatever_the_threads(native, layout, shape):
    _, a, b, _ = make_inputs(Size(*shape, 128))
    torch.manual_seed(0)
    x, gy = LAYOUTS[layout](*shape), LAYOUTS[layout](*shape)
    before = torch.get_num_threads()
    try:
        runs = []
        for run in range(10):
            torch.set_num_threads(1 + run % 2)
            runs.append(output_and_gradients(x, a, b, gy, chunk=128, impl=native))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_all_equal(run, runs[0])
