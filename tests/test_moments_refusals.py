"""What moments, merge_moments and Moments refuse, in which words."""

import math

import numpy as np
import pytest
import torch

from fastkit.ops import Moments, merge_moments, moments
from fastkit.ops.moments import KERNELS as KERNELS  # for the fixtures

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


def refusal(error, op, *args, **options):
    with pytest.raises(error) as caught:
        op(*args, **options)
    return str(caught.value)


X, W = zeros(4, 3), torch.ones(4, device="cpu")

REFUSALS = [
    # What is no dense tensor.
    (TypeError, {"x": [[1.0]]}, "x must be a tensor, got list"),
    (TypeError, {"x": None}, "x must be a tensor, got NoneType"),
    (TypeError, {"x": np.zeros((4, 3))}, "x must be a tensor, got ndarray"),
    (TypeError, {"weights": [1.0]}, "weights must be a tensor, got list"),
    (
        TypeError,
        {"x": X.as_subclass(DTensor)},
        "x is a DTensor; pass x.to_local() or x.full_tensor()",
    ),
    (
        TypeError,
        {"weights": W.as_subclass(DTensor)},
        "weights is a DTensor; pass weights.to_local() or weights.full_tensor()",
    ),
    (TypeError, {"x": X.to_sparse()}, "x must be dense, got torch.sparse_coo; pass x.to_dense()"),
    # x
    *(
        (
            TypeError,
            {"x": X.to(dtype)},
            f"x must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        (
            ValueError,
            {"x": x},
            f"x must have shape (N, D), got {tuple(x.shape)}; pass x.reshape(-1, D), or x[None] for one row",
        )
        for x in (X[0], X[0, 0], X[None])
    ),
    (ValueError, {"x": X[:, :0]}, "x must have D >= 1, got (4, 0); skip the call for D = 0"),
    # weights
    *(
        (
            TypeError,
            {"weights": W.to(dtype)},
            f"weights must be torch.float32 for x of torch.float32, got {dtype};"
            " cast it with weights.to(torch.float32)",
        )
        for dtype in (torch.int64, torch.bool, torch.float64, torch.bfloat16)
    ),
    (
        TypeError,
        {"x": X.bfloat16(), "weights": W.half()},
        "weights must be torch.bfloat16 or torch.float32 for x of torch.bfloat16, got torch.float16;"
        " cast it with weights.to(torch.float32)",
    ),
    *(
        (
            ValueError,
            {"weights": weights},
            f"weights must have shape (N,) = (4,), got {tuple(weights.shape)}",
        )
        for weights in (W[:3], W[:, None], W[None], W[0], W[:0])
    ),
    (
        RuntimeError,
        {"weights": W.to("meta")},
        "weights must be on the device of x, cpu, got meta; move it with weights.to(x.device)",
    ),
    # impl
    (ValueError, {"impl": "gpu"}, "impl must be one of reference, cpu, cuda, triton or None, got 'gpu'"),
]


@pytest.mark.parametrize(("error", "changes", "text"), REFUSALS, ids=[text for _, _, text in REFUSALS])
def test_moments_refuses(error, changes, text):
    assert refusal(error, moments, **{"x": X, **changes}) == f"moments: {text}"


@pytest.mark.parametrize("value", [-1.0, -1e-20, -1e-40, math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_that_is_negative_or_not_finite_is_refused(impl, dtype, value):
    """By the kernel as it reads, which says where it was found; of several the first is named."""
    if impl == "triton":
        pytest.skip("to look at the values of weights would wait for the GPU")
    weights = torch.tensor([1, 0, value, 1.0, -2.0], dtype=dtype)
    value = float(weights[2])
    with pytest.raises(RuntimeError) as caught:
        moments(torch.zeros(5, 3, dtype=dtype), weights=weights, impl=impl)
    assert str(caught.value).endswith(
        f"moments: weights must be finite and not negative, got {value:g} at index 2;"
        " leave that row out, or give it the weight 0"
    )


def test_options_are_keywords():
    with pytest.raises(TypeError):
        moments(X, W)


GOOD = Moments(zeros(dtype=torch.float64), zeros(3), zeros(3, 3))

MERGES = [
    (TypeError, tuple(GOOD), "must be a Moments, got tuple; pass what moments returns,"
     " or Moments(count, mean, scatter)"),
    (TypeError, None, "must be a Moments, got NoneType; pass what moments returns,"
     " or Moments(count, mean, scatter)"),
    (TypeError, GOOD._replace(count=4.0), "{}.count must be a tensor, got float"),
    (TypeError, GOOD._replace(scatter=GOOD.scatter.as_subclass(DTensor)),
     "{}.scatter is a DTensor; pass {}.scatter.to_local() or {}.scatter.full_tensor()"),
    (TypeError, GOOD._replace(count=GOOD.count.float()),
     "{}.count must be a torch.float64 of shape (), got torch.float32 of shape ();"
     " cast it with {}.count.double()"),
    (TypeError, GOOD._replace(count=zeros(1, dtype=torch.float64)),
     "{}.count must be a torch.float64 of shape (), got torch.float64 of shape (1,);"
     " cast it with {}.count.double()"),
    (TypeError, GOOD._replace(mean=zeros(3).half()),
     "{}.mean must be torch.float32 or torch.float64, got torch.float16; cast it with {}.mean.float()"),
    (ValueError, GOOD._replace(mean=zeros(1, 3)), "{}.mean must have shape (D,), got (1, 3)"),
    (TypeError, GOOD._replace(mean=zeros(3).double()),
     "{}.scatter must have the dtype of {}.mean, torch.float64, got torch.float32;"
     " cast it with {}.scatter.to({}.mean.dtype)"),
    (ValueError, GOOD._replace(scatter=zeros(3, 4)),
     "{}.scatter must have shape (D, D) = (3, 3), got (3, 4)"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(("error", "bad", "text"), MERGES, ids=[text for _, _, text in MERGES])
def test_merge_refuses(error, bad, text, name):
    text = text.replace("{}", name) if text.startswith("{}") else f"{name} {text}"
    args = {"a": GOOD, "b": GOOD, name: bad}
    assert refusal(error, merge_moments, **args) == f"merge_moments: {text}"


def test_merge_refuses_other_widths_devices_and_implementations():
    wide = Moments(GOOD.count, zeros(4), zeros(4, 4))
    assert refusal(ValueError, merge_moments, GOOD, wide) == (
        "merge_moments: b must have the D of a, 3, got 4; only rows of one width can be merged"
    )
    elsewhere = Moments(*(t.to("meta") for t in GOOD))
    assert refusal(RuntimeError, merge_moments, GOOD, elsewhere) == (
        "merge_moments: b.count must be on the device of a.mean, cpu, got meta;"
        " move it with b.count.to(a.mean.device)"
    )
    assert refusal(RuntimeError, merge_moments, GOOD, GOOD, impl="cpu") == (
        'merge_moments: impl="cpu" cannot run: this op has no such implementation; use impl="reference"'
    )


ONE = moments(torch.ones(1, 2, device="cpu"))


@pytest.mark.parametrize(
    ("found", "correction", "values"),
    [
        (ONE, 1, "1, got 1"),
        (moments(zeros(0, 2)), 0, "0, got 0"),
        (moments(zeros(0, 2)), 1, "1, got 0"),
        (moments(torch.ones(4, 2), weights=torch.full((4,), 0.25)), 1, "1, got 1"),
        (moments(X), 4.5, "4.5, got 4"),
        (moments(X), float("nan"), "nan, got 4"),
    ],
)
def test_covariance_refuses_a_count_that_is_too_small(found, correction, values):
    assert refusal(ValueError, found.covariance, correction) == (
        f"Moments.covariance: count must be greater than correction, {values}; add rows, or pass"
        " correction=0 where they, or their normalized weights, are all there is"
    )


@pytest.mark.parametrize("correction", [True, None, "1", torch.tensor(1.0)])
def test_covariance_refuses_what_is_no_number(correction):
    assert refusal(TypeError, ONE.covariance, correction) == (
        f"Moments.covariance: correction must be a number, got {type(correction).__name__};"
        " pass float(correction)"
    )


def test_second_moment_refuses_nothing():
    assert refusal(ValueError, moments(zeros(0, 2)).second_moment) == (
        "Moments.second_moment: count must be greater than 0, got 0; add rows"
    )
    assert torch.equal(ONE.second_moment(), torch.ones(2, 2))
