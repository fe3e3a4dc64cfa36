"""ops.iir_scan of one filter, in every implementation that runs here, against the float64 reference."""

import itertools

import pytest
import torch

from fastkit._dispatch import choose
from fastkit.ops import iir_scan
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing import Size, sizes
from fastkit.testing.iir_scan import check, make_inputs, make_state

pytestmark = pytest.mark.native


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
    if impl == "reference" and size.T > 257:
        pytest.skip("so many samples are for the kernels' tiles")
    x, a, b, gy = make_inputs(size, dtype=dtype)
    b = b if numerator else None
    check(x, a, b, gy, chunk=size.chunk, carry=carry, impl=impl)


POLES = {
    "radius-0.999": (0.0, 0.998001),
    "low-radius-0.999": (-1.99, 0.998001),
    "radius-0.99999": (-1.0, 0.99998),
    "20Hz-at-48kHz": (-1.99979, 0.9998),
    "radius-1.01": (0.0, 1.0201),
    "two-real-poles": (-1.8, 0.81 - 1e-6),
    "near-double-poles": (-1.8, 0.81 + 1e-6),
    "double-pole": (-1.5, 0.5625),
}


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("poles", POLES)
def test_delicate_poles(impl, poles, chunk):
    x, a, b, gy = make_inputs(Size(2, 17, 257, chunk))
    a = torch.tensor(POLES[poles]).expand(1, 1, a.shape[2], 2)
    for numerator in (None, b):
        check(x, a, numerator, gy, chunk=chunk, impl=impl)


@pytest.mark.parametrize(
    ("rows", "chunk"), [(1, None), (1, 300), (17, None)], ids=["1-row", "1-row-in-chunks", "17-rows"]
)
@pytest.mark.parametrize("poles", POLES)
@pytest.mark.slow
def test_delicate_poles_for_long(native, poles, rows, chunk):
    x, a, b, gy = make_inputs(Size(1, rows, 2000, chunk))
    a, b = torch.tensor(POLES[poles]).expand(1, 1, a.shape[2], 2), b[:, :1]
    check(x, a, b, gy, chunk=chunk, impl=native)


@pytest.mark.parametrize("chunk", [None, 128, 200])
@pytest.mark.parametrize("time", [127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows(native, rows, time, chunk):
    """Fewer rows than a vector has lanes: it is their time that is cut."""
    for dtype, numerator in (
        (torch.float32, True), (torch.float32, False), (torch.float64, False), (torch.float16, True),
    ):  # fmt: skip
        x, a, b, gy = make_inputs(Size(rows % 2 + 1, rows // (rows % 2 + 1), time, chunk), dtype=dtype)
        options = {"state": make_state(x, a), "chunk": chunk, "impl": native}
        check(x, a, b if numerator else None, gy, **options)
        if chunk is not None:
            check(x, a, b if numerator else None, gy, carry=False, **options)


@pytest.mark.parametrize(
    ("rows", "time", "chunk"),
    [
        *itertools.product((1, 2, 3, 4), (1000,), (None, 128, 200)),
        *itertools.product((1, 3), (2051,), (None, 128, 200)),
        *((1, 5000, None), (2, 5000, 200)),
    ],
)
def test_few_long_rows(native, rows, time, chunk):
    x, a, b, gy = make_inputs(Size(1, rows, time, chunk))
    state, a, b = make_state(x, a), a[:, :1], b[:, :1]  # the oracle has a matrix of time by time for each
    check(x, a, b, gy, state=state, chunk=chunk, impl=native)


@pytest.mark.parametrize("chunk", [None, 200])
def test_rows_of_a_batch_are_filtered_as_alone(native, chunk):
    """Where the dispatch is the same, bit for bit."""
    *inputs, gy = make_inputs(Size(2, 2, 1000, chunk))
    together = output_and_gradients(*inputs, gy, chunk=chunk, impl=native)
    for row in itertools.product(range(2), repeat=2):
        one = (row[0], slice(row[1], row[1] + 1))
        alone = output_and_gradients(*(t[one][None] for t in (*inputs, gy)), chunk=chunk, impl=native)
        assert_all_equal(alone, {name: t[one][None] for name, t in together.items()})


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


PER_SAMPLE = {
    "one_tensor": lambda B, C, T, taps: torch.randn(B, T, C, 5)[..., :taps].transpose(1, 2),
    "taps_outermost": lambda B, C, T, taps: torch.randn(taps, B, C, T).movedim(0, -1),
    "time_outermost": lambda B, C, T, taps: torch.randn(T, taps, C, B).permute(3, 2, 0, 1),
    "every_third_sample": lambda B, C, T, taps: torch.randn(B, C, 3 * T, taps)[:, :, ::3],
    "shared_by_channels": lambda B, C, T, taps: torch.randn(B, T, 7)[:, None, :, :taps],
    "shared_by_the_batch": lambda B, C, T, taps: torch.randn(T, C, taps).transpose(0, 1)[None],
    "constant": lambda B, C, T, taps: torch.randn(taps).expand(B, C, T, taps),
}


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", PER_SAMPLE)
def test_coefficients_of_every_sample(kernel, layout, layout_of_x, carry):
    torch.manual_seed(0)
    for B, C, T in ((1, 1, 5), (2, 3, 40), (2, 17, 19)):
        x = LAYOUTS[layout_of_x](B, C, T)
        a, b = 0.3 * PER_SAMPLE[layout](B, C, T, 2), PER_SAMPLE[layout](B, C, T, 3)
        check(x, a, b, chunk=1, carry=carry, impl=kernel)
        check(x, a, chunk=1, carry=carry, impl=kernel)


@pytest.mark.parametrize("time", [256, 511, 514, 1025])
def test_coefficients_of_every_sample_of_longer_signals(native, time):
    """The CPU kernel hands over from tile to tile, of 512 samples in float32."""
    torch.manual_seed(0)
    for C in (1, 3):
        x, a, b = torch.randn(2, C, time), 0.3 * torch.randn(2, C, time, 2), torch.randn(2, C, time, 3)
        check(x, a, b, chunk=1, impl=native)
        check(x.double(), a.double(), chunk=1, impl=native)


def test_a_large_call_with_coefficients_of_every_sample_is_its_rows(native):
    """More than 8 MiB of results, which the kernel writes past the caches; a row alone is less."""
    torch.manual_seed(0)
    C, T = 3, 2**20 + 5
    x, gy = torch.randn(1, C, T), torch.randn(1, C, T)
    a, b = 0.3 * torch.randn(1, C, T, 2), torch.randn(1, C, T, 3)
    large = output_and_gradients(x, a, b, gy, chunk=1, impl=native)
    for c in range(C):
        row = slice(c, c + 1)
        alone = output_and_gradients(*(t[:, row] for t in (x, a, b, gy)), chunk=1, impl=native)
        assert_all_equal({name: t[:, row] for name, t in large.items()}, alone)


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
    dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32
    chosen = [choose("iir_scan", None, torch.zeros(1, dtype=d), KERNELS) for d in dtypes]
    assert chosen == ["cpu", "cpu", "cpu", "cpu", "reference"]


HALF_SIZES = [Size(2, 17, 33, 16), Size(1, 2, 300, None), Size(3, 11, 150, 128), Size(2, 3, 9, 1)]


@pytest.mark.parametrize("numerator", [True, False])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", HALF_SIZES, ids=str)
def test_half_precision_x(kernel, size, dtype, carry, numerator):
    """Its coefficients and their gradients are float32, and so is the arithmetic."""
    x, a, b, gy = make_inputs(size, dtype=dtype)
    b = b if numerator else None
    for layout in ("contiguous", "channels_last"):
        if layout == "channels_last":
            x, gy = (t.mT.contiguous().mT for t in (x, gy))
        results = check(x, a, b, gy, chunk=size.chunk, carry=carry, impl=kernel)
        assert [results[name].dtype for name in ("y", "gx", "ga")] == [dtype, dtype, torch.float32]


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


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        from fastkit import ops, reference
        from fastkit.testing import sizes
        from fastkit.testing.iir_scan import check, make_inputs, make_packed_inputs, make_state
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for i, size in enumerate(sizes("iir_scan")[:: 1 if dtype == torch.float32 else 3]):
                for filters in (None, 3) if size.T < 1000 and i % 2 == 0 else (None,):
                    radius = 0.5 if dtype == torch.float16 else 0.9  # or it overflows
                    x, a, b, gy = make_inputs(size, filters=filters, dtype=dtype, radius=radius)
                    options = {{"state": make_state(x, a), "chunk": size.chunk, "impl": "cpu"}}
                    check(x, a, b, gy, **options)
                    x = x.transpose(1, 2).contiguous().transpose(1, 2)
                    check(x, a, None, gy, carry=False, **options)
            for C in (1, 17):
                x, a, b, gy, offsets = make_packed_inputs([0, 140, 3], C, 128, dtype=dtype)
                check(x, a, b, gy, cu_seqlens=offsets, chunk=128, impl="cpu")
            # As precise as the reference, which rounds as often.
            x, a, b, _ = make_inputs(sizes("iir_scan")[11], dtype=dtype)
            state = make_state(x, a)
            step = (x[..., 0], a[:, :, 0], b[:, :, 0], state)
            torch.testing.assert_close(ops.iir_step(*step, impl="cpu"), reference.iir_step(*step))
            sos = torch.tensor([[0.5, 0.2, 0.1, 1, -0.3, 0.2], [0.3, 0.1, 0, 1, 0.4, 0.1]]).to(a.dtype)
            torch.testing.assert_close(ops.sosfilt(x, sos, impl="cpu"), reference.sosfilt(x, sos))
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
