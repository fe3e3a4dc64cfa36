"""moments within budget in every size, weights, order of rows, stride, and on any number of threads."""

import pytest
import torch

from fastkit._threads import threads
from fastkit.ops import moments
from fastkit.ops.moments import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.moments import RowsSize, check, expected_results, make_inputs

pytestmark = pytest.mark.native

# Blocks of 96 rows, spans of 1920; vectors of 4, 8 and 16 columns, panels of 12, 24 and 48.
SIZES = [
    *(RowsSize(N, D) for N in (0, 1, 2, 1919, 1920, 2047, 2048, 2049, 4097) for D in (1, 7, 25)),
    *(RowsSize(N, D) for N in (2, 193) for D in (23, 24, 49, 95, 300)),
    RowsSize(4097, 300),
    RowsSize(100, 1030),
]


def forward(inputs, impl, **options):
    """Checked against the oracle, without gradients."""
    with torch.no_grad():
        found = moments(inputs.x, weights=inputs.weights, impl=impl, **options)
    expected = expected_results(inputs)
    for name, result in found._asdict().items():
        assert_matches_reference(result, *expected[name], name=name)
    assert torch.equal(found.scatter, found.scatter.T)
    assert (found.scatter.diagonal() >= 0).all()
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_on_any_number_of_threads(native, size, count):
    with threads(count):
        for weights in (None, "some"):
            forward(make_inputs(size, weights=weights), native)


@pytest.mark.parametrize("count", [5, 6, 7, 10, 12, 16, 32])
def test_few_rows_on_many_threads(native, count):
    """Which share them by columns: some then have none."""
    with threads(count):
        for size in (RowsSize(500, 168), RowsSize(1000, 300), RowsSize(400, 768), RowsSize(3000, 120)):
            forward(make_inputs(size, weights="some"), native)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(native, dtype, count):
    with threads(count):
        for size in (RowsSize(2049, 25), RowsSize(500, 97), RowsSize(100, 300)):
            forward(make_inputs(size, weights="some", dtype=dtype), native)


def test_gradients_of_many_rows(native):
    with threads(2):
        check(make_inputs(RowsSize(4097, 50), weights="some", offset=3.0), impl=native)


@pytest.mark.parametrize("count", [1, 2])
def test_runs_are_equal(native, count):
    """Of a number of threads; those of rows that are cut by columns too."""
    with threads(count):
        for size in (RowsSize(4097, 40), RowsSize(200, 300)):
            inputs = make_inputs(size, weights="some")
            first = forward(inputs, native)
            for _ in range(9):
                again = moments(inputs.x, weights=inputs.weights, impl=native)
                assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


# Weights


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "left", [slice(0, 1), slice(4000, None), slice(2000, 2001), slice(None, None, 97), slice(0, 0)], ids=str
)
def test_weights_that_are_mostly_zero(native, left, count):
    """Rows that do not count may be far away: the shift of a span is not of them."""
    inputs = make_inputs(RowsSize(4097, 30))
    weights = torch.zeros(4097)
    weights[left] = 0.5 + torch.rand(weights[left].shape, generator=torch.Generator().manual_seed(1))
    inputs = inputs._replace(x=inputs.x + 1e6 * (weights == 0).unsqueeze(1), weights=weights)
    with threads(count):
        forward(inputs, native)


@pytest.mark.parametrize("count", [1, 2])
def test_weights_of_any_size(native, count):
    """A row may count as much as all others, and be far away; others as good as nothing."""
    inputs = make_inputs(RowsSize(4097, 30), weights="positive")
    scale = 10 ** (4 * torch.randn(4097, generator=torch.Generator().manual_seed(1)).clamp(-2, 2))
    one = torch.ones(4097)
    one[1000] = 1e8
    with threads(count):
        forward(inputs._replace(weights=scale), native)
        forward(inputs._replace(weights=one, x=inputs.x + 1000 * (one > 1).unsqueeze(1)), native)
        forward(inputs._replace(weights=inputs.weights.masked_fill(inputs.weights < 0.5, 1e-40)), native)


def test_weights_are_looked_at_on_every_thread(native):
    for size in (RowsSize(4097, 40), RowsSize(200, 300)):
        x, weights, *_ = make_inputs(size, weights="positive")
        for row in (0, size.N // 2, size.N - 1):
            bad = weights.clone()
            bad[row], bad[-1] = -3.0, -4.0
            with threads(2), pytest.raises(RuntimeError, match=rf"got -[34] at index {row};"):
                moments(x, weights=bad, impl=native)


# Orders and values of rows


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize(
    "order",
    {
        "sorted": lambda x: x.sort(0).values,
        "drift": lambda x: x + torch.arange(len(x)).unsqueeze(1),
        "a jump after the first block": lambda x: x + 1e5 * (torch.arange(len(x)) >= 96).unsqueeze(1),
        "a far first row": lambda x: x + 1e6 * (torch.arange(len(x)) == 0).unsqueeze(1),
        "a large mean": lambda x: x + 1e6,
    }.items(),
    ids=lambda item: item[0],
)
def test_any_order(native, order, weights, count):
    inputs = make_inputs(RowsSize(4097, 30), weights=weights)
    with threads(count):
        found = forward(inputs._replace(x=order[1](inputs.x)), native)
    if order[0] == "a large mean":
        variance = found.covariance().diagonal()
        assert (variance > 1.5).all() and (variance < 2.5).all()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("offset", [0.1, 1e4 + 0.3, -1e30])
def test_constant_columns_are_exact(native, offset, count):
    x, weights, *_ = make_inputs(RowsSize(4097, 30), weights="some")
    x[:, 7], x[:, 29] = offset, 0
    with threads(count):
        for w in (None, weights):
            found = moments(x, weights=w, impl=native)
            assert torch.equal(found.mean[7], x[0, 7]) and found.mean[29] == 0
            assert not found.scatter[[7, 29]].any()


def test_numbers_near_the_ends_of_the_range(native):
    """The shift does not overflow; what is subnormal is zero on x86, and in half precision it is not."""
    x = torch.randn(2000, 20).clamp(-2, 2)
    for dtype, largest in ((torch.float32, 1e38), (torch.float64, 1e308)):
        found = moments(x.to(dtype) * 1e-6 * largest + largest, impl=native)
        assert found.mean.isfinite().all() and not found.scatter.isfinite().all()
    tiny = moments(x * 1e-40, impl=native)
    assert (tiny.mean.abs() < 1e-38).all() and (tiny.scatter == 0).all()
    half = (x * 1e-6).half()
    assert half.abs().max() < torch.finfo(torch.float16).tiny
    forward(make_inputs(RowsSize(2000, 20))._replace(x=half), native)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_reaches_its_column_from_any_row(native, value, count):
    x, weights, *_ = make_inputs(RowsSize(4097, 50), weights="some")
    weights[96:300] = 0
    with threads(count):
        want = moments(x, weights=weights, impl=native)
        for row in (0, 95, 96, 200, 1919, 1920, 2048, 4096):
            spoilt = x.clone()
            spoilt[row, 30] = value
            found = moments(spoilt, weights=weights, impl=native)
            others = torch.arange(50) != 30
            assert found.mean.isfinite().tolist() == others.tolist()
            assert torch.equal(found.scatter.isfinite(), others.unsqueeze(1) & others)
            assert torch.equal(found.mean[others], want.mean[others])
            assert torch.equal(found.scatter[others][:, others], want.scatter[others][:, others])


# Strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strides_change_no_bit(native, dtype):
    """Rows of any stride are read as they are, what is between them is not; other columns are copied."""
    x, weights, *_ = make_inputs(RowsSize(500, 29), weights="some", dtype=dtype)
    wide = torch.full((1000, 61), torch.nan, dtype=dtype)
    wide[::2, 1:30] = x
    spread = torch.full((1000,), torch.nan, dtype=dtype)
    spread[::2] = weights
    want = moments(x, weights=weights, impl=native)
    for rows in (wide[::2, 1:30], x.T.contiguous().T, wide[::2].clone()[:, 1:30]):
        found = moments(rows, weights=spread[::2], impl=native)
        assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
    one = x[:1].expand(500, 29)
    for rows in (one, one.contiguous()):
        found = moments(rows, weights=weights, impl=native)
        assert torch.equal(found.mean, x[0].to(found.mean.dtype)) and not found.scatter.any()
    overlapping = torch.as_strided(x.reshape(-1), (500, 29), (3, 1))
    found, want = moments(overlapping, impl=native), moments(overlapping.clone(), impl=native)
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


# Instruction sets


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        from fastkit.testing.moments import SIZES, RowsSize, check, make_inputs
        import fastkit.ops
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        torch.set_num_threads(2)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for size in (*SIZES[::3], RowsSize(2049, 100), RowsSize(60, 300)):
                check(make_inputs(size, weights="some", dtype=dtype), impl="cpu")
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
