"""The pruning's inner kernels on NumPy arrays: of every instruction set, and the GPU's by lanes in turn."""

import math

import pytest
import torch

from fastkit import reference

host = pytest.importorskip(
    "fastkit._host", reason="fastkit._host is built in editable installs where Python.h exists"
)

KERNELS = [*host.isas(), "warps"]
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
RATIOS = 0.0, 0.1, 0.5, 0.9, math.nextafter(1.0, 0.0)


def array(t):
    """Its memory as NumPy, half precision as bits."""
    return t.view(torch.uint16).numpy() if t.dtype.itemsize == 2 else t.numpy()


def prune(kernel, matrices, norms, ratio):
    masks = [torch.zeros(a.shape, dtype=torch.bool) for a in matrices]
    run = getattr(host, "prune_rows_" + str(matrices[0].dtype).removeprefix("torch."))
    pruned = [math.floor(ratio * a.shape[1]) for a in matrices]
    run(kernel, [array(a) for a in matrices], [n.numpy() for n in norms], [m.numpy() for m in masks], pruned)
    return masks


def check(kernel, matrices, norms, ratio):
    want = [a.clone() for a in matrices]
    want_masks = reference.prune_rows_grouped_(want, norms, ratio)
    masks = prune(kernel, matrices, norms, ratio)
    for mask, want_mask, a, other in zip(masks, want_masks, matrices, want, strict=True):
        assert torch.equal(mask, want_mask)
        assert torch.equal(a.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def make(R, D, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(R, D).to(dtype), torch.rand(D) * 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_the_reference(kernel, dtype):
    # Columns around lanes (32) and vectors, and more than the warps collect (1024; float64: 512).
    inputs = [make(2, D, dtype) for D in (1, 2, 7, 8, 9, 31, 32, 33, 63, 65, 100, 768)]
    inputs += [make(1, D, dtype) for D in (1025, 1500, 3001)]
    for ratio in RATIOS:
        matrices, norms = zip(*((a.clone(), norm) for a, norm in inputs), strict=True)
        check(kernel, list(matrices), list(norms), ratio)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_scores(kernel):
    for dtype in DTYPES:
        for D in (5, 33, 100, 1500):
            few = make(2, D, dtype)[0].mul(1.5).round()
            for ratio in RATIOS:
                check(kernel, [torch.ones(2, D, dtype=dtype), few.clone()], [torch.ones(D)] * 2, ratio)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_infinity_zero_and_subnormal_numbers(kernel):
    for dtype in DTYPES:
        a, norm = make(4, 70, dtype)
        a[0, ::2], a[1], a[1, 3] = float("nan"), float("inf"), -float("inf")
        a[2, ::3], a[2, 1::3] = 0.0, -0.0
        a[3] = (a[3].double() * 1e-40).to(dtype)
        for ratio in RATIOS:
            check(kernel, [a.clone()], [norm], ratio)
            check(kernel, [a.clone()], [torch.zeros(70)], ratio)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(kernel):
    for dtype in DTYPES:
        a, norm = make(5, 45, dtype)
        around = torch.full((7, 49), 3.0).to(dtype)
        around[1:6, 2:47] = a
        check(
            kernel, [a.T.contiguous().T, around[1:6, 2:47], torch.stack([a, a], -1)[..., 1]], [norm] * 3, 0.5
        )
        around[1:6, 2:47] = 3
        assert (around == 3).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_matrices_than_a_launch_takes(kernel):
    inputs = [make(1 + i % 3, 10 + i % 40, seed=i) for i in range(1030)]
    check(kernel, [a for a, _ in inputs], [norm for _, norm in inputs], 0.4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_norms_that_no_one_has_checked_do_no_harm(kernel):
    for value in (float("nan"), float("inf"), -2.0):
        a, norm = make(3, 1200)
        norm[100:900] = value
        (mask,) = prune(kernel, [a], [norm], 0.5)
        assert ((~mask).sum(1) == 600).all()
        assert not a[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", host.isas())
def test_column_square_sums(isa, dtype):
    run = getattr(host, "column_square_sums_" + str(dtype).removeprefix("torch."))
    for N, D in ((0, 5), (1, 1), (5, 7), (8, 16), (13, 33), (257, 31), (600, 9), (7, 4099)):
        x = torch.randn(N, D + 3, generator=torch.Generator().manual_seed(N)).to(dtype)[:, :D]
        sums = torch.from_numpy(run(isa, array(x)))
        torch.testing.assert_close(sums, x.double().square().sum(0).float(), rtol=2e-5, atol=1e-30)
