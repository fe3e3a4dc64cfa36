"""mtadam_square_sums: within budget, of any strides, and of what is not finite."""

import math

import pytest
import torch
from mtadam_steps import DTYPES, LAYOUTS, SHAPES

from fastkit import ops
from fastkit.ops.mtadam import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.mtadam import make_inputs, square_sum_budget

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sums(impl, dtype):
    shapes = [*SHAPES, (0,), (3, 4099)]
    for L in (1, 3):
        inputs = make_inputs(shapes, L, dtype=dtype, missing=[(1, 2), (0, 5), (1, 5), (2, 5)])
        sums = ops.mtadam_square_sums(inputs.grads, len(shapes), impl=impl)
        assert sums.shape == (len(shapes), L) and sums.dtype == torch.float64 and sums.is_contiguous()
        for j, grad in enumerate(inputs.grads):
            found = sums[j % len(shapes), j // len(shapes)]
            if grad is None:
                assert found == 0
                continue
            want = grad.double().square().sum()
            budget = square_sum_budget(want, grad.numel(), dtype)
            assert_matches_reference(found, want, budget * (1 + (dtype == torch.float64)), name=str(j))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_square_sums_that_lose_all_that_they_can(native, dtype):
    """Ones, and behind them squares below the last digit of one: none of them is added to a running sum."""
    info = torch.finfo(dtype)
    for ones in (4, 8, 16, 32, 64):
        grad = torch.full((4096,), math.sqrt(info.eps / 2) * 0.9999, dtype=dtype)
        grad[:ones] = 1
        want = ones + (4096 - ones) * float(grad[-1].double().square())
        found = float(ops.mtadam_square_sums([grad], 1, impl=native))
        assert abs(found - want) <= 66 * info.eps * want, ones


def test_square_sums_of_any_strides(impl):
    dense = torch.randn(4, 6, 5, 7, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    want = dense.double().square().sum()
    for name, layout in LAYOUTS.items():
        grad = layout(dense)
        want = grad.double().square().sum()
        sums = ops.mtadam_square_sums([dense[0], grad, None, grad], 2, impl=impl)
        budget = square_sum_budget(want, 840, torch.float32)
        assert_matches_reference(sums[1], want.expand(2), budget.expand(2), name=name)
        assert sums[0, 1] == 0 and sums[1, 0] == sums[1, 1]


def test_square_sums_that_are_not_finite(impl):
    for dtype in DTYPES:
        grads = [torch.ones(4100, dtype=dtype) for _ in range(6)]
        grads[1][4099], grads[3][0], grads[5][7] = NAN, INF, -INF
        sums = ops.mtadam_square_sums(grads, 2, impl=impl)
        assert sums[0].tolist() == [4100.0] * 3
        assert sums[1].isnan().tolist() == [True, False, False]
        assert sums[1].isinf().tolist() == [False, True, True]
    large = torch.full((4,), 300.0, dtype=torch.float16)  # whose squares float16 has not
    assert ops.mtadam_square_sums([large], 1, impl=impl).tolist() == [[360000.0]]
