"""The GPU kernels of iir_scan on the host: a warp's lanes take turns, all else is what the GPU compiles."""

import pytest
import torch

from fastkit.reference import IIRState
from fastkit.testing import Size, assert_matches_reference
from fastkit.testing.iir_scan import expected_results, make_inputs, make_packed_inputs, make_state

host = pytest.importorskip(
    "fastkit._host", reason="fastkit._host is built in editable installs where Python.h exists"
)

ONE_CHUNK = 2**62
FULL, FEW = 1, 64  # so many warps fill the GPU: rows are one segment each, or are cut
LAYOUTS = {"time": lambda x: x, "channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}


def array(t):
    """Its memory as NumPy, half precision as bits."""
    if t is None:
        return None
    return t.view(torch.uint16).numpy() if t.dtype.itemsize == 2 else t.numpy()


def bank(coefficients, axis=3):
    return (
        coefficients
        if coefficients is None or coefficients.dim() == axis + 2
        else coefficients.unsqueeze(axis)
    )


def run(warps, x, a, b, gy, state, gend, *, chunk, carry=True, cu_seqlens=None, of_x_state=True):
    """Results and gradients by name, as of ``expected_results``; ``of_x_state``: x's state has some too."""
    name = str(x.dtype).removeprefix("torch.")
    batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    filters, rows = bank(a).shape[3], (batch, x.shape[1])
    chunks = len(cu_seqlens) - 1 if cu_seqlens is not None and chunk is None else a.shape[2]
    per_chunk = x.shape[0], x.shape[1], chunks, filters
    nan = float("nan")  # where nothing is written
    y, gx = torch.full_like(x, nan), torch.full_like(x, nan)
    end_y, gstate_y = (a.new_full((*rows, filters, 2), nan) for _ in range(2))
    end_x, gstate_x = (a.new_full((*rows, 2), nan) for _ in range(2))
    ga = a.new_full((*per_chunk, 2), nan)
    gb = None if b is None else a.new_full((*per_chunk, 3), nan)
    coefficients = array(bank(a)), array(bank(b))
    of_y = [array(bank(s.y, 2).contiguous()) for s in (state, gend)]
    rest = array(cu_seqlens), ONE_CHUNK if chunk is None else chunk, carry
    forward = getattr(host, f"iir_scan_warps_forward_{name}")
    forward(
        warps, array(x), *coefficients, of_y[0], array(state.x), *rest, array(y), array(end_y), array(end_x)
    )
    backward = getattr(host, f"iir_scan_warps_backward_{name}")
    backward(
        warps, array(gy), of_y[1], array(gend.x) if of_x_state else None, array(x),
        array(y) if filters == 1 else None, *coefficients, of_y[0], array(state.x), *rest, array(gx),
        array(ga), array(gb), array(gstate_y), array(gstate_x) if of_x_state else None,
    )  # fmt: skip
    results = {"y": y, "end_x": end_x, "gx": gx}
    if of_x_state:
        results["gstate_x"] = gstate_x
    results |= {"end_y": end_y.view(state.y.shape), "gstate_y": gstate_y.view(state.y.shape)}
    results["ga"] = ga.view(*per_chunk[:3], *a.shape[3:-1], 2).sum_to_size(a.shape)
    if b is not None:
        results["gb"] = gb.view(*per_chunk[:3], *a.shape[3:-1], 3).sum_to_size(b.shape)
    return results


def check(warps, x, a, b, gy, layout, **options):
    x, gy = LAYOUTS[layout](x), LAYOUTS[layout](gy)
    cu_seqlens = options.get("cu_seqlens")
    state, gend = make_state(x, a, cu_seqlens), make_state(x, a, cu_seqlens, seed=2)
    results = run(warps, x, a, b, gy, state, gend, **options)
    if not options.pop("of_x_state", True):
        gend = IIRState(gend.y, torch.zeros_like(gend.x))
    expected = expected_results(x, a, b, gy, state, gend, **options)
    for name, result in results.items():
        assert_matches_reference(result, *expected[name], name=name)
    return results


# A tile is 32 lanes of 16 samples (float64: 8) where time has stride 1, 16 samples of a channel else.
SHORT = [Size(2, 3, 1, None), Size(1, 3, 2, None), Size(2, 3, 3, 1), Size(1, 33, 40, 16), Size(2, 2, 17, 5)]
LONG = {
    "time": [Size(1, 2, 530, None), Size(1, 1, 545, 128), Size(1, 1, 515, 7), Size(1, 1, 1100, 600)],
    "channels": [Size(1, 2, 150, None), Size(1, 3, 145, 64), Size(1, 2, 140, 7), Size(1, 2, 145, 100)],
}
ALL = [(layout, size) for layout in LAYOUTS for size in SHORT + LONG[layout]]


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("layout", "size"), ALL, ids=str)
def test_matches_the_reference(size, carry, layout):
    x, a, b, gy = make_inputs(size)
    for warps in (FULL, FEW):
        check(warps, x, a, b, gy, layout, chunk=size.chunk, carry=carry)
    x, a, _, gy = make_inputs(Size(*size[:2], min(size.T, 280), size.chunk), dtype=torch.float64)
    check(FEW, x, a, None, gy, layout, chunk=size.chunk, carry=carry)


# Runs that fit chunks and memory, several tiles of them; the last run may be short.
TILES = [
    ("time", Size(2, 2, 1104, None)), ("time", Size(1, 2, 1096, 48)), ("time", Size(1, 1, 1040, 640)),
    ("time", Size(1, 2, 8, 16)), ("channels", Size(1, 10, 1040, None)), ("channels", Size(2, 18, 70, 16)),
    ("channels", Size(1, 4, 1090, 640)),
]  # fmt: skip


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "size"), TILES, ids=str)
def test_backward_in_one_pass(size, layout, dtype, carry):
    x, a, b, gy = make_inputs(size, dtype=dtype)
    for numerator in (b, None):
        check(FULL, x, a, numerator, gy, layout, chunk=size.chunk, carry=carry, of_x_state=False)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("layout", "time"), [("time", 530), ("channels", 140)])
def test_a_filter_for_every_sample(layout, time, carry):
    x, a, b, gy = make_inputs(
        Size(1, 2, time, 1), radius=0.5
    )  # switching at random, with less it stays bounded
    check(FEW, x, a, b, gy, layout, chunk=1, carry=carry)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("time", Size(2, 3, 1, 4)), ("time", Size(1, 1, 530, None)), ("time", Size(1, 2, 90, 3)),
        ("channels", Size(1, 34, 30, 12)), ("channels", Size(1, 2, 140, 60)),
    ],
    ids=str,
)  # fmt: skip
def test_banks(size, carry, layout):
    x, a, b, gy = make_inputs(size, filters=2)
    for warps in (FULL, FEW):
        check(warps, x, a, b, gy, layout, chunk=size.chunk, carry=carry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "size"), [("time", Size(1, 1, 530, 128)), ("channels", Size(1, 34, 50, None))], ids=str
)
def test_half_precision(size, dtype, layout):
    x, a, b, gy = make_inputs(size, dtype=dtype)
    check(FEW, x, a, b, gy, layout, chunk=size.chunk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_written_as_torch_does(dtype):
    """A filter that changes nothing, of one sample each."""
    x = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype).view(2**16, 1, 1)
    a = torch.zeros(1, 1, 1, 2)
    zero = IIRState(torch.zeros(2**16, 1, 2), torch.zeros(2**16, 1, 2))
    y = run(FULL, x, a, None, x, zero, zero, chunk=None)["y"]
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(0), x.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_half_precision_as_torch_does(dtype):
    torch.manual_seed(0)
    x = (torch.randn(4096, 1, 1) * 2.0 ** torch.randint(-26, 17, (4096, 1, 1))).to(dtype)
    a, b = torch.zeros(1, 1, 1, 2), torch.tensor([0.7, 0.0, 0.0]).view(1, 1, 1, 3)
    zero = IIRState(torch.zeros(4096, 1, 2), torch.zeros(4096, 1, 2))
    y = run(FULL, x, a, b, x, zero, zero, chunk=None)["y"]
    assert torch.equal(y, (x.float() * 0.7).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 64])
def test_packed_sequences(chunk, carry, layout):
    many = [2, 1, 0] * 24  # more than the lanes of a warp
    for lengths, filters in ((list(range(10)), None), (many, None), ([0, 0, 5], 2), ([80, 0, 1, 40], None)):
        x, a, b, gy, cu_seqlens = make_packed_inputs(lengths, 2, chunk, filters=filters, radius=0.5)
        check(FEW, x, a, b, gy, layout, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)
    check(FULL, x, a, b, gy, layout, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens)
    if chunk is None:  # a filter that all share
        check(FEW, x, a[:, :, :1], b[:, :, :1], gy, layout, chunk=None, carry=carry, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(("layout", "time"), [("time", 700), ("channels", 300)])
@pytest.mark.parametrize("radius", [0.999, 0.99999, 1.001])
def test_poles_near_the_unit_circle(radius, layout, time):
    x, a, b, gy = make_inputs(Size(1, 2, time, None), radius=radius)
    check(FEW, x, a, b, gy, layout, chunk=None)


@pytest.mark.parametrize("offsets", [[0, 9, 4, 7], [3, 5, 90, 7], [-2, 3, 3, 5], [0, 1, 2, 3]])
@pytest.mark.parametrize("chunk", [None, 2])
def test_offsets_that_do_not_fit_stay_within_bounds(offsets, chunk):
    """On a GPU their values are not looked at: what is read and written is made to fit."""
    x, a, b, gy, _ = make_packed_inputs([2, 3, 2], 3, chunk)
    cu_seqlens = torch.tensor(offsets)
    state = make_state(x, a, cu_seqlens)
    guard = torch.zeros(3, 3, x.shape[-1])  # rows before and after what is passed
    guard[1] = x[0]
    for layout in LAYOUTS.values():
        run(FEW, layout(guard[1:2]), a, b, layout(gy), state, state, chunk=chunk, cu_seqlens=cu_seqlens)
    assert torch.equal(guard[0], guard[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_stays_in_its_chunk(layout):
    """With carry=False, whether it comes in x or in a state."""
    x, a, b, gy = make_inputs(Size(1, 3, 600, 40))
    clean, state = x.clone(), make_state(x, a)
    x[..., 45] = float("nan")
    state.y[0, 0] = float("nan")
    gend = make_state(x, a, seed=2)
    for warps in (FULL, FEW):
        options = {"chunk": 40, "carry": False}
        got = run(warps, LAYOUTS[layout](x), a, b, gy, state, gend, **options)["y"]
        want = run(warps, LAYOUTS[layout](clean), a, b, gy, make_state(x, a), gend, **options)["y"]
        hit = torch.zeros_like(x, dtype=torch.bool)
        hit[..., 45:80] = True
        hit[0, 0, :40] = True
        assert torch.equal(got.isnan(), hit)
        assert torch.equal(got[~hit], want[~hit])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", [None, 3])
def test_a_nan_in_a_cotangent_stays_in_its_chunk(filters, layout):
    """With carry=False, of the gradient of x too, whose last samples in a chunk owe the next one nothing."""
    x, a, b, gy = make_inputs(Size(1, 3, 600, 40), filters=filters)
    state, gend = make_state(x, a), make_state(x, a, seed=2)
    spoiled = gy.clone()
    spoiled[..., 45] = float("nan")
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[..., 40:46] = True
    for warps in (FULL, FEW):
        options = {"chunk": 40, "carry": False}
        got = run(warps, LAYOUTS[layout](x), a, b, LAYOUTS[layout](spoiled), state, gend, **options)["gx"]
        want = run(warps, LAYOUTS[layout](x), a, b, LAYOUTS[layout](gy), state, gend, **options)["gx"]
        assert torch.equal(got.isnan(), hit)
        assert torch.equal(got[~hit], want[~hit])


@pytest.mark.parametrize(("rows", "whole"), [(2000, True), (500, False)])
def test_two_thousand_rows_are_walked_in_one_pass(rows, whole):
    """On a GPU of 132 multiprocessors, which 32 warps each fill. What is cut rounds otherwise."""
    x, a, b, gy = make_inputs(Size(1, rows, 1030, None))
    state, gend = make_state(x, a), make_state(x, a, seed=2)
    one_pass, other = (run(warps, x, a, b, gy, state, gend, chunk=None) for warps in (FULL, 132 * 32))
    assert all(torch.equal(one_pass[name], other[name]) for name in one_pass) == whole


def test_the_cut_changes_rounding_alone_and_every_run_gives_the_same_bits():
    x, a, b, gy = make_inputs(Size(1, 2, 5000, 128))
    state, gend = make_state(x, a), make_state(x, a, seed=2)
    whole, cut, again = (run(w, x, a, b, gy, state, gend, chunk=128) for w in (FULL, FEW, FEW))
    assert any(not torch.equal(whole[name], cut[name]) for name in whole)  # else nothing was cut
    assert all(torch.equal(cut[name], again[name]) for name in cut)
