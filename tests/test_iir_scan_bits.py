"""What holds bit for bit in every mode of iir_scan: where a NaN goes, and that runs are equal."""

import math

import pytest
import torch

from fastkit import reference
from fastkit._threads import threads
from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.testing import Size
from fastkit.testing.iir_scan import check, make_inputs, make_packed_inputs, make_state

pytestmark = pytest.mark.native


def channels_last(t):
    return t.mT.contiguous().mT


LAYOUTS = {"contiguous": torch.clone, "channels_last": channels_last}


def run_scan(x, a, b, gy, state, **options):
    """Results and gradients by name."""
    leaves = [t.detach().requires_grad_() for t in (x, a, b, *state)]
    y, end = iir_scan_with_state(*leaves[:3], IIRState(*leaves[3:]), **options)
    gend = make_state(x, a, options.get("cu_seqlens"), seed=1)
    gradients = torch.autograd.grad((y, *end), leaves, (gy, *gend))
    names = "y", "end_y", "end_x", "gx", "ga", "gb", "gstate_y", "gstate_x"
    return dict(zip(names, (y.detach(), *(t.detach() for t in end), *gradients), strict=True))


def assert_all_equal(results, expected):
    for name, want in expected.items():
        torch.testing.assert_close(
            results[name], want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# NaN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(
    ("size", "filters", "sample"),
    [
        (Size(2, 17, 33, 16), None, 20),
        (Size(2, 17, 33, 16), None, 3),
        (Size(2, 17, 33, 16), 3, 20),
        (Size(2, 17, 33, 4), None, 18),
        (Size(1, 3, 700, 140), None, 400),
        (Size(1, 1, 500, 1000), None, 333),
        (Size(2, 3, 300, 140), 3, 270),
    ],
    ids=["rows", "first-chunk", "bank", "short-chunks", "few-long-rows", "one-long-row", "long-bank"],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(impl, size, filters, sample, carry, layout):
    """At one sample of x, then of gy; all else is as without it, bit for bit."""
    if impl == "reference" and size.T > 257:
        pytest.skip("so many samples are for the kernels' tiles")
    x, a, b, gy = make_inputs(size, filters=filters)
    state = make_state(x, a)
    signals = {"x": LAYOUTS[layout](x), "gy": LAYOUTS[layout](gy)}
    row = (size.B - 1, size.C // 2)
    chunk, chunks = sample // size.chunk, a.shape[2]
    time, k = torch.arange(size.T), torch.arange(chunks).unsqueeze(-1)
    later, earlier = time >= sample, time <= sample
    if not carry:
        later, earlier = (side & (time // size.chunk == chunk) for side in (later, earlier))
    # Coefficient i of a chunk's gradient meets y[t-i], or x[t-i], where t is in the chunk.
    past_y, past_x = ((sample + torch.arange(*taps)) // size.chunk for taps in ((1, 3), (0, 3)))
    reached = {
        "x": {
            "y": later,
            "ga": (k >= past_y) & (carry | (k == chunk)),
            "gb": (k == past_x) & (carry | (k == chunk)),
            "end_y": torch.tensor(carry or chunk == chunks - 1),
        },
        "gy": {
            "gx": earlier,
            "ga": (k <= chunk) & (carry | (k == chunk)),
            "gb": (k <= chunk) & (carry | (k == chunk)),
            "gstate_y": torch.tensor(carry or chunk == 0),
            "gstate_x": torch.tensor(carry or chunk == 0),
        },
    }

    def run(x, gy):
        return run_scan(x, a, b, gy, state, chunk=size.chunk, carry=carry, impl=impl)

    clean = run(**signals)
    for spoiled, effects in reached.items():
        signal = signals[spoiled].clone()
        signal[(*row, sample)] = math.nan
        expected = {name: result.clone() for name, result in clean.items()}
        for name, where in effects.items():
            if name in ("ga", "gb") and filters is not None:
                where = where.unsqueeze(1)
            expected[name][row].masked_fill_(where, math.nan)
        assert_all_equal(run(**{**signals, spoiled: signal}), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("C", [1, 17])
def test_nan_stays_in_its_sequence(impl, C, filters, layout):
    lengths = [20, 0, 150, 3]
    x, a, b, gy, offsets = make_packed_inputs(lengths, C, 16, filters=filters)
    x, gy = LAYOUTS[layout](x), LAYOUTS[layout](gy)
    state = make_state(x, a, offsets)
    clean = run_scan(x, a, b, gy, state, cu_seqlens=offsets, chunk=16, impl=impl)
    begin, end, first_chunk, last_chunk = 20, 170, 2, 12
    at = begin + 70
    for spoiled in ("x", "gy"):
        signals = {"x": x.clone(), "gy": gy.clone()}
        signals[spoiled][0, 0, at] = math.nan
        results = run_scan(a=a, b=b, state=state, cu_seqlens=offsets, chunk=16, impl=impl, **signals)
        y_is_nan = torch.zeros(x.shape, dtype=torch.bool)
        gx_is_nan = y_is_nan.clone()
        if spoiled == "x":
            y_is_nan[0, 0, at:end] = True
        else:
            gx_is_nan[0, 0, begin : at + 1] = True
        for name, is_nan in (("y", y_is_nan), ("gx", gx_is_nan)):
            assert_all_equal({name: results[name]}, {name: clean[name].masked_fill(is_nan, math.nan)})
        for name in ("ga", "gb"):
            kept = torch.ones(results[name].shape, dtype=torch.bool)
            kept[0, 0, first_chunk:last_chunk] = False
            assert torch.equal(results[name][kept], clean[name][kept])
            assert results[name][0, 0, first_chunk:last_chunk].isnan().any()
        for name in ("end_y", "end_x", "gstate_y", "gstate_x"):
            kept = torch.ones(results[name].shape, dtype=torch.bool)
            kept[2, 0] = False
            assert torch.equal(results[name][kept], clean[name][kept])


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("part", ["y", "x"])
@pytest.mark.parametrize("size", [Size(2, 17, 33, 16), Size(1, 2, 300, 150)], ids=str)
def test_nan_in_a_state_enters_the_first_chunk(impl, size, part, filters, carry):
    x, a, b, gy = make_inputs(size, filters=filters)
    state = make_state(x, a)
    options = {"chunk": size.chunk, "carry": carry, "impl": impl}
    clean = run_scan(x, a, b, gy, state, **options)["y"]
    spoiled = IIRState(*(t.clone() for t in state))
    getattr(spoiled, part)[0, 1] = math.nan
    expected = clean.clone()
    expected[0, 1, : None if carry else size.chunk] = math.nan
    assert_all_equal(run_scan(x, a, b, gy, spoiled, **options), {"y": expected})


def test_nan_in_a_step_and_in_a_cascade_stays_in_its_row(impl):
    x, a, b, _ = make_inputs(Size(3, 17, 33, None), filters=2)
    state = make_state(x, a)
    sos = torch.tensor([[0.5, 0.2, 0.1, 1, -0.3, 0.2], [0.3, 0.1, 0, 1, 0.4, 0.1]])

    def step(x):
        y, end = iir_step(x[..., 5], a[:, :, 0], b[:, :, 0], state, impl=impl)
        return {"y": y, "end_y": end.y, "end_x": end.x, "cascade": sosfilt(x, sos, impl=impl)}

    clean = step(x)
    spoiled = x.clone()
    spoiled[1, 2, 5] = math.nan
    for name in ("y", "end_y", "end_x"):
        newest = (1, 2) if name == "y" else (1, 2, ..., 0)
        clean[name][newest] = math.nan
    clean["cascade"][1, 2, 5:] = math.nan
    assert_all_equal(step(spoiled), clean)


# Overflow


@pytest.mark.parametrize(
    "size", [Size(1, 17, 400, None), Size(1, 1, 400, None), Size(1, 2, 1000, 130)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", [None, 2])
def test_overflow_is_inf(impl, filters, layout, size):
    x = torch.zeros(size[:3])
    x[..., 0] = 1
    chunks = 1 if size.chunk is None else -(-size.T // size.chunk)
    a = torch.tensor([-1.0, -0.5]).expand(1, 1, chunks, *([] if filters is None else [filters]), 2)
    y = iir_scan(LAYOUTS[layout](x), a, chunk=size.chunk, impl=impl)  # a pole at 1.37
    exact = reference.iir_scan(x.double(), a.double(), chunk=size.chunk)
    limit = torch.finfo(torch.float32).max
    assert (exact > 1.01 * limit).any()
    assert (y[exact > 1.01 * limit] == math.inf).all()
    assert y[exact < 0.99 * limit].isfinite().all()


@pytest.mark.parametrize("rows", [1, 17])
def test_what_comes_before_an_overflow_is_finite(native, rows):
    """Powers of an unstable filter overflow where its output need not: what enters late cannot grow."""
    x = torch.zeros(1, rows, 3000)
    x[..., 2900] = 1
    a = torch.tensor([-1.0, -0.5]).expand(1, 1, 1, 2)
    y = iir_scan(x, a, impl=native)
    assert torch.equal(y[..., :2900], x[..., :2900])
    torch.testing.assert_close(
        y[..., 2900:].double(), reference.iir_scan(x[..., 2900:].double(), a.double()), rtol=1e-4, atol=0
    )


# Subnormal numbers


def assert_subnormal_numbers_are_kept_outside():
    small = torch.full((100_000,), 1e-40)
    assert (small * 1 == small).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("C", "chunk", "filters"),
    [(17, None, None), (1, None, None), (17, 1, None), (17, None, 3)],
    ids=["rows", "one-row", "per-sample", "bank"],
)
def test_subnormal_numbers(impl, C, chunk, filters, layout):
    """A decay below the smallest normal number may be flushed to zero, in the kernel and nowhere else."""
    x = torch.zeros(1, C, 257)
    x[..., 0] = 1e-20
    chunks = 1 if chunk is None else 257
    a = torch.tensor([-0.5, 0.0]).expand(1, 1, chunks, *([] if filters is None else [filters]), 2)
    check(LAYOUTS[layout](x), a, chunk=chunk, impl=impl)
    assert_subnormal_numbers_are_kept_outside()


def test_subnormal_numbers_of_a_step_and_of_a_cascade(impl):
    tiny = torch.finfo(torch.float32).tiny
    a = torch.tensor([-0.5, 0.0]).expand(1, 1, 2)
    state = IIRState(torch.full((1, 17, 2), 1.5 * tiny), torch.zeros(1, 17, 2))
    y, end = iir_step(torch.zeros(1, 17), a, None, state, impl=impl)
    assert ((y - 0.75 * tiny).abs() <= tiny).all()
    assert torch.equal(end.y, torch.stack([y, state.y[..., 0]], -1))
    x = torch.zeros(1, 17, 300)
    x[..., 0] = 1e-20
    sos = torch.tensor([[1, 0, 0, 1, -0.5, 0], [1, 0, 0, 1, -0.5, 0]])
    exact = reference.sosfilt(x.double(), sos.double())
    assert ((sosfilt(x, sos, impl=impl) - exact).abs() <= 1e-6 * exact + 100 * tiny).all()
    assert_subnormal_numbers_are_kept_outside()


def test_subnormal_float16_is_kept(native):
    """It is a normal float32."""
    x = torch.full((1, 17, 9), torch.finfo(torch.float16).smallest_normal / 4, dtype=torch.float16)
    assert torch.equal(iir_scan(x, torch.zeros(1, 1, 1, 2), impl=native), x)


# Equal runs


def of_threads(count, call):
    with threads(count):
        return call()


CALLS = {
    "rows": (Size(2, 17, 4000, 128), None),
    "one-row": (Size(1, 1, 100_000, 128), None),
    "one-filter": (Size(1, 2, 100_000, None), None),
    "wide": (Size(1, 64, 5000, 128), None),
    "short-chunks": (Size(2, 17, 4000, 4), None),
    "per-sample": (Size(1, 17, 4000, 1), None),
    "bank": (Size(2, 17, 4000, 128), 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_ten_runs_are_equal_with_1_thread_and_with_2(native, call, layout):
    size, filters = CALLS[call]
    x, a, b, gy = make_inputs(size, filters=filters)
    x, gy, state = LAYOUTS[layout](x), LAYOUTS[layout](gy), make_state(x, a)

    def run():
        return run_scan(x, a, b, gy, state, chunk=size.chunk, impl=native)

    runs = [of_threads(1 + i % 2, run) for i in range(10)]
    for other in runs[1:]:
        assert_all_equal(other, runs[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("C", [1, 17])
def test_ten_runs_of_packed_sequences_are_equal(native, C, filters, layout):
    lengths = [20_000, 0, 7, 30_000, 129] if C == 1 else [3000, 0, 7, 2000, 129]
    x, a, b, gy, offsets = make_packed_inputs(lengths, C, 128, filters=filters)
    x, gy, state = LAYOUTS[layout](x), LAYOUTS[layout](gy), make_state(x, a, offsets)

    def run():
        return run_scan(x, a, b, gy, state, cu_seqlens=offsets, chunk=128, impl=native)

    runs = [of_threads(1 + i % 2, run) for i in range(10)]
    for other in runs[1:]:
        assert_all_equal(other, runs[0])


@pytest.mark.parametrize("shape", [(1, 50_000), (2, 17, 4000)], ids=str)
def test_ten_runs_of_a_cascade_and_of_a_step_are_equal(native, shape):
    torch.manual_seed(0)
    sos = torch.tensor([[0.5, 0.2, 0.1, 1, -0.3, 0.2], [0.3, 0.1, 0, 1, 0.4, 0.1], [1, 0, 0, 1, 0.1, 0]])
    x, sos = torch.randn(shape).requires_grad_(), sos.requires_grad_()
    rows, taps = torch.randn(300, 500), torch.randn(300, 500, 2)
    state = IIRState(torch.randn(300, 500, 2), torch.randn(300, 500, 2))

    def run():
        y = sosfilt(x, sos, impl=native)
        gx, gsos = torch.autograd.grad(y.square().sum(), (x, sos))
        y_t, end = iir_step(rows, taps, None, state, impl=native)
        return {"y": y.detach(), "gx": gx, "gsos": gsos, "y_t": y_t, "end_y": end.y, "end_x": end.x}

    runs = [of_threads(1 + i % 2, run) for i in range(10)]
    for other in runs[1:]:
        assert_all_equal(other, runs[0])


@pytest.mark.parametrize("rows", [3, 8, 17])
def test_many_threads_cut_more_rows_along_time(native, rows):
    """Which kernel runs may depend on their number; what it gives, but for rounding, may not."""
    x, a, b, gy = make_inputs(Size(1, rows, 600_000 // rows, None), dtype=torch.float64)
    state = make_state(x, a)

    def run():
        return run_scan(x, a, b, gy, state, impl=native)

    with_one, with_many = of_threads(1, run), of_threads(16, run)
    for name, result in with_one.items():
        torch.testing.assert_close(
            with_many[name], result, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_all_equal(of_threads(16, run), with_many)
