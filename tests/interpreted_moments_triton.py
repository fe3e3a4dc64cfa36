"""The Triton kernels of moments in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.library import opcheck
from triton._C.libtriton import ir
from triton.runtime import interpreter

from fastkit.ops import moments, moments_triton
from fastkit.testing.moments import SIZES, RowsSize, check, expected_results, make_inputs
from fastkit.triton import moments as kernels

pytestmark = pytest.mark.usefixtures("patched_once")

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
WEIGHTS = None, "positive", "some"


def of(inputs):
    return moments(inputs.x, weights=inputs.weights, impl="triton")


def assert_all_equal(found, want):
    for result, expected in zip(found, want, strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected)


# Against the oracle


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("size", [*SIZES[:-1], RowsSize(64, 64), RowsSize(33, 65)], ids=str)
def test_matches_the_oracle(size, weights):
    """But for 5000 rows, which take long."""
    check(make_inputs(size, weights=weights), impl="triton")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_half_precision(dtype, weights):
    """Weights may be float32."""
    inputs = make_inputs(SIZES[10], weights=weights, dtype=dtype)
    if weights == "positive":
        inputs = inputs._replace(weights=0.1 + torch.rand(65))
    check(inputs, impl="triton")


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_mean_does_no_harm(offset, weights):
    for size in (SIZES[8], RowsSize(257, 35)):
        check(make_inputs(size, weights=weights, offset=offset), impl="triton")


@pytest.mark.parametrize("weights", [None, "positive"])
def test_rows_in_order_and_rows_that_jump(weights):
    """The first rows of a piece say nothing of the others; nor do those that have no weight."""
    inputs = make_inputs(RowsSize(257, 5), weights=weights)
    check(inputs._replace(x=1e3 * inputs.x.sort(dim=0).values), impl="triton")
    x = inputs.x.clone()
    x[:25] += 1e5
    check(inputs._replace(x=x), impl="triton")
    if inputs.weights is not None:
        w = inputs.weights.clone()
        w[:120] = 0
        check(inputs._replace(x=x, weights=w), impl="triton")


@pytest.fixture(params=[2, 9])
def pieces(request, monkeypatch):
    """About so many."""

    def cut(programs, rows):
        length = math.ceil(rows / request.param)
        return math.ceil(rows / length), length

    monkeypatch.setattr(kernels, "_pieces", cut)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_any_number_of_pieces(pieces, offset):
    for size, weights in ((RowsSize(41, 5), None), (RowsSize(50, 35), "some")):
        check(make_inputs(size, weights=weights, offset=offset), impl="triton")


def test_pieces_without_weight(pieces):
    inputs = make_inputs(RowsSize(120, 3), weights="positive", offset=100.0)
    for rows in (slice(0, 40), slice(30, None)):
        w = inputs.weights.clone()
        w[rows] = 0
        check(inputs._replace(weights=w), impl="triton")


def cut_in_two(t):
    high = (t.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return high, ((t - high).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def dot_in_parts(self, a, b, d, input_precision, max_num_imprecise_acc):
    """As the compiler has it: what a part lacks is cut off, low parts are not multiplied with each other."""
    if input_precision != ir.INPUT_PRECISION.TF32x3:
        return interpreter.TensorHandle(np.matmul(a.data, b.data) + d.data, d.dtype.scalar)
    (a, a_low), (b, b_low) = (cut_in_two(np.ascontiguousarray(t.data)) for t in (a, b))
    sums = np.matmul(a_low, b) + np.matmul(a, b_low) + np.matmul(a, b)
    return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_many_rows(monkeypatch, dtype, weights):
    """Some hundreds, and still within budget."""
    monkeypatch.setattr(kernels, "MANY", 500)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_parts)
    assert kernels.products_options(kernels.MANY)["PRECISION"] == "tf32x3"
    check(make_inputs(RowsSize(500, 65), weights=weights, dtype=dtype, offset=30.0), impl="triton")


# Awkward inputs


def test_nothing_has_moments_of_zero():
    for found in (
        moments(torch.empty(0, 3), impl="triton"),
        moments(torch.ones(4, 3), weights=torch.zeros(4), impl="triton"),
    ):
        assert found.count == 0 and found.count.dtype == torch.float64
        assert torch.equal(found.mean, torch.zeros(3)) and torch.equal(found.scatter, torch.zeros(3, 3))


def test_any_strides_will_do():
    inputs = make_inputs(RowsSize(70, 12), weights="some")
    x, w = inputs.x, inputs.weights
    want = of(inputs)
    wide, spread = torch.full((140, 26), torch.nan), torch.full((140,), torch.nan)
    wide[::2, 2::2] = x
    spread[1::2] = w
    padded = torch.full((70, 16), torch.nan)
    padded[:, 3:15] = x
    for some in (wide[::2, 2::2], x.T.contiguous().T, padded[:, 3:15]):
        for weights in (w, spread[1::2]):
            assert_all_equal(moments(some, weights=weights, impl="triton"), want)
    row = torch.tensor([[1.0, 2, 4]])
    found = moments(row.expand(5, 3), weights=torch.tensor(0.5).expand(5), impl="triton")
    assert found.count == 2.5 and torch.equal(found.mean, row[0])
    assert torch.equal(found.scatter, torch.zeros(3, 3))


def test_the_width_of_loads():
    for width, columns, unit in ((12, 12, 4), (16, 12, 4), (300, 300, 4), (768, 768, 16), (7, 6, 1)):
        x = torch.empty(3, width)[:, :columns]
        assert kernels._unit(x) == unit
        assert kernels._unit(x.T) == 1


@pytest.mark.parametrize("offset", [0.1, 1e4 + 0.3, -1e30])
def test_a_constant_column_has_no_scatter(offset):
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = offset
    for weights in (None, torch.rand(300)):
        found = moments(x, weights=weights, impl="triton")
        assert torch.allclose(found.mean[1], torch.tensor(offset), rtol=1e-6)
        assert found.scatter[1, 1] <= 1e-7 * 300 * (1e-7 * offset) ** 2
        assert (found.scatter.diagonal() >= 0).all()


def test_one_row_has_no_scatter():
    x = torch.randn(1, 5)
    found = moments(x, impl="triton")
    assert found.count == 1 and torch.equal(found.mean, x[0])
    assert torch.equal(found.scatter, torch.zeros(5, 5))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # of numpy
@pytest.mark.parametrize("weights", [None, "some"])
def test_nan_reaches_its_column_and_nothing_else(pieces, weights):
    """Whatever the weight of its row."""
    inputs = make_inputs(RowsSize(9, 4), weights=weights)
    want = of(inputs)
    for i, value in itertools.product((0, 8), (torch.nan, torch.inf)):
        x = inputs.x.clone()
        x[i, 2] = value
        found = of(inputs._replace(x=x))
        others = torch.arange(4) != 2
        assert torch.equal(found.count, want.count)
        assert found.mean.isfinite().tolist() == others.tolist()
        assert torch.equal(found.scatter.isfinite(), others.unsqueeze(1) & others)
        assert torch.equal(found.mean[others], want.mean[others])
        assert torch.equal(found.scatter[others][:, others], want.scatter[others][:, others])


def test_nan_without_weight_is_not_lost():
    found = moments(torch.full((2, 1), torch.nan), weights=torch.zeros(2), impl="triton")
    assert found.mean.isnan().all() and found.scatter.isnan().all()


def test_a_factor_of_two_in_the_weights_is_exact():
    inputs = make_inputs(RowsSize(200, 7), weights="some", offset=3.0)
    want, found = of(inputs), of(inputs._replace(weights=4 * inputs.weights))
    assert torch.equal(found.count, 4 * want.count)
    assert torch.equal(found.mean, want.mean) and torch.equal(found.scatter, 4 * want.scatter)


def test_negative_weights_are_what_the_formula_makes_of_them():
    """Which a GPU's are not looked at for; on a CPU the public function refuses them."""
    inputs = make_inputs(RowsSize(9, 3), weights="positive")
    w = inputs.weights.clone()
    w[:2] *= -1
    found = moments_triton.forward(inputs.x, w)
    for result, (value, _) in zip(found, expected_results(inputs._replace(weights=w)).values(), strict=False):
        assert torch.allclose(result.double(), value, rtol=1e-5, atol=1e-5)


FAR = 2**30 + 8  # a stride: it fits, but twice it does not


@pytest.mark.parametrize("axis", [0, 1])
def test_beyond_32_bits(tmp_path, axis):
    """In a file of holes; where 32 bits would go instead there are zeros."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * 2**30, dtype=FLOAT)
    inputs = make_inputs(RowsSize(3, 3), weights="positive")
    x = memory.as_strided((3, 3), (FAR, 1) if axis == 0 else (3, FAR), 2**31).copy_(inputs.x)
    w = memory.as_strided((3,), (FAR,), 2**31 + 4096).copy_(inputs.weights)
    assert_all_equal(moments(x, weights=w, impl="triton"), of(inputs))


def test_bits_repeat_and_arguments_are_left_alone():
    inputs = make_inputs(RowsSize(65, 35), weights="some")
    before = inputs.x.clone(), inputs.weights.clone()
    first = of(inputs)
    for _ in range(3):
        assert_all_equal(of(inputs), first)
    assert torch.equal(inputs.x, before[0]) and torch.equal(inputs.weights, before[1])


def test_autocast_lowers_nothing():
    inputs = make_inputs(SIZES[10], weights="some")
    with torch.autocast("cpu", dtype=BFLOAT):
        found = of(inputs)
    assert_all_equal(found, of(inputs))


def test_opcheck():
    x, w, *_ = make_inputs(RowsSize(5, 3), weights="some")
    opcheck(moments_triton.forward, (x, w))


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match='impl="triton" covers torch'):
        moments(torch.ones(2, 2).double(), impl="triton")
