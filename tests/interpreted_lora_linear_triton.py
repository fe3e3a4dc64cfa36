"""The Triton kernels of lora_linear in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.library import opcheck
from triton.runtime import interpreter

from fastkit.ops import lora_linear_triton as ops
from fastkit.testing import assert_matches_reference
from fastkit.triton import lora_linear as kernels

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


class Size(NamedTuple):
    tokens: int
    columns: int
    outputs: int
    rank: int


class Inputs(NamedTuple):
    y: torch.Tensor
    x: torch.Tensor
    lora_x: Any  # or None
    a: torch.Tensor
    mask: Any  # or None
    b: torch.Tensor
    gx: torch.Tensor
    gy: torch.Tensor
    h: torch.Tensor


SCALE = -1.7


def make_inputs(size, signal=FLOAT, adapter=None, *, masked=True, dropped=False):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=signal):
        return torch.randn(shape, generator=generator).to(dtype)

    n, d, o, r = size
    return Inputs(
        y=randn(n, o),
        x=randn(n, d),
        lora_x=randn(n, d) if dropped else None,
        a=randn(r, d, dtype=adapter or signal),
        mask=torch.rand(r, d, generator=generator) < 0.6 if masked else None,
        b=randn(o, r, dtype=adapter or signal),
        gx=randn(n, d),
        gy=randn(n, o),
        h=randn(n, r, dtype=FLOAT),
    )


# Rounding


U = torch.finfo(FLOAT).eps / 2


def rounding(n, terms):
    """Of a sum of n products, whose absolute values sum to ``terms``.

    Some roundings are added for scale, for what is added to, and for factors that are cut in parts.
    """
    return (n + 8) * (U * terms + torch.finfo(FLOAT).tiny)


def storing(value, dtype):
    """In half precision; the interpreter cuts off to bfloat16."""
    if dtype == FLOAT:
        return torch.zeros_like(value)
    info = torch.finfo(dtype)
    return info.eps * (1.0 if dtype == BFLOAT else 0.5) * value.abs() + info.smallest_normal * info.eps


def in_float64(inputs):
    tensors: list[Any] = [t if t is None else t.double() for t in inputs]
    return Inputs(*tensors)


def of_forward(inputs):
    """For each result its value in float64, and how far from it rounding may take each element."""
    y, x, lora_x, a, _, b = in_float64(inputs)[:6]
    (tokens, columns), rank = x.shape, a.shape[0]
    xl = x if lora_x is None else lora_x
    a = a if inputs.mask is None else a.masked_fill(~inputs.mask, 0.0)
    h, of_h = xl @ a.T, xl.abs() @ a.abs().T
    y, of_y = y + SCALE * h @ b.T, y.abs() + abs(SCALE) * of_h @ b.abs().T
    off_h = rounding(columns, of_h)
    off_y = abs(SCALE) * off_h @ b.abs().T + rounding(rank, of_y)
    squares = x.square().sum(0)
    return {
        "h": (h, off_h),
        "y": (y, off_y + storing(y.abs() + off_y, inputs.y.dtype)),
        "square_sum": (squares, rounding(tokens, squares)),
    }


def of_backward(inputs, adds):
    _, x, lora_x, a, _, b, gx, gy, h = in_float64(inputs)
    (tokens, outputs), rank = gy.shape, a.shape[0]
    xl = x if lora_x is None else lora_x
    kept = torch.ones_like(a) if inputs.mask is None else inputs.mask.double()
    a = a if inputs.mask is None else a.masked_fill(~inputs.mask, 0.0)
    gx = gx if adds else torch.zeros_like(gx)
    gh, of_gh = SCALE * gy @ b, abs(SCALE) * gy.abs() @ b.abs()
    off_gh = rounding(outputs, of_gh)
    gx, of_gx = gx + gh @ a, gx.abs() + of_gh @ a.abs()
    off_gx = off_gh @ a.abs() + rounding(rank, of_gx)
    off_ga = off_gh.T @ xl.abs() + rounding(tokens, of_gh.T @ xl.abs())
    return {
        "gx": (gx, off_gx + storing(gx.abs() + off_gx, inputs.gx.dtype)),
        "ga": (kept * (gh.T @ xl), kept * off_ga),
        "gb": (SCALE * gy.T @ h, rounding(tokens, abs(SCALE) * gy.abs().T @ h.abs())),
        "gbias": (gy.sum(0), rounding(tokens, gy.abs().sum(0))),
    }


def run_forward(inputs, stats=True):
    y = inputs.y.clone()
    h, square_sum = ops.forward_(y, *inputs[1:6], SCALE, stats)
    return {"h": h, "y": y, "square_sum": square_sum}


def run_backward(inputs, *, adds=True, with_gx=True, adapter=True, bias=True):
    gx = inputs.gx.clone() if with_gx else None
    x = inputs.x if inputs.lora_x is None else inputs.lora_x
    call = (inputs.h, inputs.a, inputs.mask, inputs.b, SCALE, adds, adapter, bias)
    ga, gb, gbias = ops.backward_(gx, inputs.gy, x, *call)
    return {"gx": gx, "ga": ga, "gb": gb, "gbias": gbias}


def compare(results, expected):
    for name, result in results.items():
        value, budget = expected[name]
        if result.dtype == BFLOAT:  # cut off, errors lean one way
            error = (result.double() - value).abs()
            assert (error <= budget).all(), name
        else:
            assert_matches_reference(result, value, budget, name=name)


def check(inputs, adds=True):
    results = run_forward(inputs)
    assert results["h"].dtype == results["square_sum"].dtype == FLOAT
    compare(results, of_forward(inputs))
    results = run_backward(inputs, adds=adds)
    assert {results[name].dtype for name in ("ga", "gb", "gbias")} == {FLOAT}
    compare(results, of_backward(inputs, adds))


SIZES = [
    Size(0, 16, 3, 4),
    Size(1, 1, 1, 1),
    Size(1, 130, 16, 17),
    Size(15, 3, 130, 8),
    Size(15, 130, 33, 12),
    Size(16, 16, 16, 12),
    Size(16, 3, 33, 33),
    Size(17, 33, 3, 17),
    Size(17, 130, 1, 1),
    Size(100, 1, 130, 4),
    Size(100, 33, 16, 64),
    Size(17, 130, 130, 8),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32(size):
    check(make_inputs(size))


@pytest.mark.parametrize(
    ("masked", "dropped", "adds"), list(itertools.product((False, True), repeat=3)), ids=str
)
def test_options(masked, dropped, adds):
    check(make_inputs(Size(17, 33, 20, 4), masked=masked, dropped=dropped), adds)


DTYPES = [(BFLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, FLOAT), (HALF, HALF)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(1, 1, 3, 1), Size(17, 130, 16, 8), Size(33, 33, 130, 17)], ids=str)
def test_half_precision(size, dtypes):
    """Of bfloat16 at low ranks, gh comes with the gradient of B."""
    check(make_inputs(size, *dtypes, dropped=True))


def raising_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter would multiply the bits of bfloat16 numbers."""
    a, b = (
        interpreter._convert_float(t.data, tl.bfloat16, tl.float32, None).view(np.float32)
        if t.dtype.scalar == tl.bfloat16
        else t.data
        for t in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(a, b, dtype=np.float32) + d.data, d.dtype.scalar)


@pytest.fixture
def as_compiled(monkeypatch):
    """Products as on a GPU."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", raising_dot)
    monkeypatch.setattr(kernels, "_precision", lambda x: "ieee" if x.dtype == FLOAT else "tf32x3")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(17, 130, 16, 8), Size(20, 33, 60, 70), Size(5, 4, 3, 2)], ids=str)
def test_half_precision_as_compiled(as_compiled, size, dtypes):
    """Factors of bfloat16 are products of parts of float32 numbers."""
    check(make_inputs(size, *dtypes))


def test_the_last_bits_of_h_reach_y(as_compiled):
    """Where the first cancel."""
    x, b = torch.ones(1, 1, dtype=BFLOAT), torch.tensor([[1, -1]], dtype=BFLOAT)
    y, a = torch.zeros_like(x), torch.tensor([[1 + 2.0**-20], [1]])
    ops.forward_(y, x, None, a, None, b, 1.0, False)
    assert y.item() == 2.0**-20


@triton.jit
def cut_in_parts(v, parts):
    i = tl.arange(0, 16)
    high, rest = kernels._bfloat16_and_rest(tl.load(v + i))  # pyright: ignore[reportGeneralTypeIssues]
    middle, rest = kernels._bfloat16_and_rest(rest)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(parts + i, high)
    tl.store(parts + 16 + i, middle)
    tl.store(parts + 32 + i, rest.to(tl.bfloat16))


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy
def test_three_parts_are_all_of_a_float32_number():
    v = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 8)
    v[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    v[4:6] = torch.tensor([1 - U, 2 - 2 * U])
    parts = torch.empty(3, 16, dtype=BFLOAT)
    cut_in_parts[(1,)](v, parts)
    assert torch.equal(parts.double().sum(0).nan_to_num(nan=7), v.double().nan_to_num(nan=7))
    assert not parts[1:, :4].any()


@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BFLOAT, FLOAT)], ids=str)
def test_many_steps_in_one_piece(monkeypatch, dtypes):
    """As where there is so much to do that sums need not be cut."""
    monkeypatch.setattr(kernels, "FILL", 1)
    check(make_inputs(Size(130, 140, 280, 8), *dtypes))


def test_many_parts(monkeypatch):
    monkeypatch.setattr(kernels, "_gather_tile", lambda v, rank: kernels._Tile(16, 16, 16, 4))
    check(make_inputs(Size(16 * 33, 5, 3, 4)))


@pytest.mark.parametrize("limit", ["FUSED_RANK", "FUSED_PARTS"])
def test_two_passes_over_gy(monkeypatch, limit):
    """Where bfloat16 would take one."""
    inputs = make_inputs(Size(17, 20, 33, 4), BFLOAT, FLOAT)
    one_pass = run_backward(inputs)
    monkeypatch.setattr(kernels, limit, 0)
    two_passes = run_backward(inputs)
    compare(two_passes, of_backward(inputs, adds=True))
    assert torch.equal(one_pass["gbias"], two_passes["gbias"])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 33), (100, 130), (16, 1)], ids=str)
def test_column_square_sums(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().square().sum(0)
    assert_matches_reference(ops.column_square_sums(x), expected, rounding(shape[0], expected))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_only_what_is_needed(dtype):
    inputs = make_inputs(Size(17, 20, 33, 4), dtype, FLOAT)
    everything = run_backward(inputs)
    names = {"with_gx": ("gx",), "adapter": ("ga", "gb"), "bias": ("gbias",)}
    two_passes = of_backward(inputs, adds=True)
    for wanted in itertools.product((False, True), repeat=3):
        some = run_backward(inputs, **dict(zip(names, wanted, strict=True)))
        for (option, results), need in zip(names.items(), wanted, strict=True):
            for name in results:
                if not need:
                    assert some[name] is None or some[name].numel() == 0
                elif option == "bias":  # by lanes, where there are no products
                    compare({name: some[name]}, two_passes)
                elif option == "adapter" or wanted[1]:
                    assert torch.equal(some[name], everything[name])
                else:
                    compare({name: some[name]}, two_passes)
    without = run_forward(inputs, stats=False)
    assert without.pop("square_sum").numel() == 0
    assert all(torch.equal(result, run_forward(inputs)[name]) for name, result in without.items())


# Layouts


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every_other_column": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[:, ::2],
    "wide_rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_strides(layout, dtype):
    inputs = make_inputs(Size(17, 20, 33, 4), dtype, FLOAT, dropped=True)
    names = ("x", "lora_x", "a", "mask", "b", "gy")
    strided = inputs._replace(**{name: layout(getattr(inputs, name)) for name in names if name != "mask"})
    strided = strided._replace(mask=torch.cat([inputs.mask, inputs.mask]).T.contiguous().T[:4])
    check(strided)


def test_expanded_arguments():
    inputs = make_inputs(Size(17, 20, 33, 4))
    ones = torch.ones((), dtype=FLOAT)
    for gy in (ones.expand(17, 33), inputs.gy[:1].expand(17, 33), inputs.gy[:, :1].expand(17, 33)):
        given = inputs._replace(gy=gy, mask=inputs.mask[0].expand(4, 20))
        results, expected = run_backward(given), of_backward(given, adds=True)
        for name, result in results.items():  # of equal terms, errors lean one way
            assert ((result.double() - expected[name][0]).abs() <= expected[name][1]).all(), name
    check(inputs._replace(x=inputs.x[:1].expand(17, 20)))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_rows_that_are_written_lie_in_wider_ones(dtype):
    inputs = make_inputs(Size(17, 20, 33, 4), dtype, FLOAT)
    expected = run_forward(inputs)["y"], run_backward(inputs)["gx"]
    wide_y, wide_gx = torch.full((17, 40), 3.0, dtype=dtype), torch.full((17, 40), 3.0, dtype=dtype)
    y, gx = wide_y[:, 2:35].copy_(inputs.y), wide_gx[:, 1:21].copy_(inputs.gx)
    ops.forward_(y, *inputs[1:6], SCALE, False)
    ops.backward_(gx, inputs.gy, inputs.x, inputs.h, inputs.a, inputs.mask, inputs.b, SCALE, True, True, True)
    assert torch.equal(y, expected[0]) and torch.equal(gx, expected[1])
    y.fill_(3)
    gx.fill_(3)
    assert (wide_y == 3).all() and (wide_gx == 3).all()


FAR = 2**30 + 8  # a stride: it fits, but twice it does not


@pytest.mark.parametrize("axis", [0, 1])
def test_beyond_32_bits(tmp_path, axis):
    """In a file of holes; where 32 bits would go instead there are zeros."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * 2**30, dtype=FLOAT)
    begins = itertools.count(2**31, 4096)

    def far(t, axis):
        strides = (FAR, 1) if axis == 0 else (3, FAR)
        return memory.as_strided(t.shape, strides, next(begins)).copy_(t)

    inputs = make_inputs(Size(3, 3, 3, 2))
    placed = inputs._replace(**{name: far(getattr(inputs, name), axis) for name in ("x", "gy")})
    placed = placed._replace(b=far(inputs.b, 0), a=far(inputs.a, axis))
    expected, expected_gx = run_forward(inputs), run_backward(inputs)
    y, gx = far(inputs.y, 0), far(inputs.gx, 0)
    h, square_sum = ops.forward_(y, *placed[1:6], SCALE, True)
    assert all(map(torch.equal, (h, y, square_sum), expected.values()))
    call = (inputs.h, placed.a, inputs.mask, placed.b, SCALE, True, True, True)
    gradients = ops.backward_(gx, placed.gy, placed.x, *call)
    assert all(map(torch.equal, (gx, *gradients), expected_gx.values()))


# Values


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_nan_stays_where_it_may(dtype):
    inputs = make_inputs(Size(33, 20, 40, 4), dtype, FLOAT, masked=False)
    clean, clean_backward = run_forward(inputs), run_backward(inputs)
    x, gy = inputs.x.clone(), inputs.gy.clone()
    x[20, 7] = gy[18, 5] = torch.nan
    spoilt = run_forward(inputs._replace(x=x))
    spoilt |= run_backward(inputs._replace(x=x, gy=gy))
    where = {
        "h": np.s_[20], "y": np.s_[20], "square_sum": np.s_[7], "gx": np.s_[18], "gb": np.s_[5],
        "gbias": np.s_[5], "ga": np.s_[:],
    }  # fmt: skip
    for name, result in spoilt.items():
        expected = (clean | clean_backward)[name].clone()
        expected[where[name]] = torch.nan
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    of_x = run_backward(inputs._replace(x=x))["ga"]
    assert of_x[:, 7].isnan().all() and of_x.isnan().sum() == 4


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy
def test_what_is_pruned_is_not_read():
    inputs = make_inputs(Size(17, 20, 33, 4))
    a = torch.where(inputs.mask, inputs.a, torch.nan)
    check(inputs._replace(a=a))
    x = inputs.x.clone()
    x[3] = torch.inf
    ga = run_backward(inputs._replace(x=x))["ga"]
    assert not ga[~inputs.mask].any()


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy
def test_infinity_stays_infinity(as_compiled):
    """A number that is cut in parts has no parts of infinity."""
    inputs = make_inputs(Size(3, 5, 4, 2), BFLOAT, FLOAT, masked=False)
    a = inputs.a.clone()
    a[1, 2] = torch.inf
    h = run_forward(inputs._replace(a=a))["h"]
    assert torch.equal(h[:, 1], inputs.x[:, 2].float() * torch.inf)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_equal_bits(dtype):
    inputs = make_inputs(Size(70, 17, 20, 8), dtype, FLOAT)
    for run in (run_forward, run_backward):
        first, second = run(inputs), run(inputs)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck():
    y, x, lora_x, a, mask, b, gx, gy, h = make_inputs(Size(5, 3, 4, 2), dropped=True)
    opcheck(ops.forward_, (y, x, lora_x, a, mask, b, SCALE, True))
    opcheck(ops.backward_, (gx, gy, x, h, a, mask, b, SCALE, True, True, True))
    opcheck(ops.backward_, (None, gy, x, h, a, None, b, SCALE, False, False, True))
    opcheck(ops.column_square_sums, (x,))
