"""moments under torch.compile, and the raw op that it traces: what it refuses, as its callers are unknown."""

import pytest
import torch
from torch.library import opcheck

from fastkit.ops import moments
from fastkit.ops.moments import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.moments import RowsSize, expected_results, make_inputs

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

RAW = torch.ops.fastkit


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(native, dtype, weights):
    for size in (RowsSize(9, 4), RowsSize(0, 3)):
        x, w, *_ = make_inputs(size, weights=weights, dtype=dtype)
        opcheck(RAW.moments_fwd.default, (x, w))
        if w is not None:
            opcheck(RAW.moments_fwd.default, (x.T.contiguous().T, w.float() if dtype.itemsize == 2 else w))


def test_compiled_code_is_the_kernel(native):
    inputs = make_inputs(RowsSize(65, 25), weights="some")
    compiled = torch.compile(moments, backend="aot_eager", fullgraph=True)
    found = compiled(inputs.x, weights=inputs.weights)
    expected = expected_results(inputs)
    want = moments(inputs.x, weights=inputs.weights, impl=native)
    for name, result in found._asdict().items():
        assert_matches_reference(result, *expected[name], name=name)
        assert torch.equal(result, getattr(want, name))


def test_compiled_code_looks_at_weights(native):
    """The kernel does, where values cannot be looked at while tracing."""
    x, weights = torch.randn(4, 3), torch.tensor([1.0, 2.0, -1.0, 1.0])
    compiled = torch.compile(moments, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="weights must be finite and not negative, got -1 at index 2"):
        compiled(x, weights=weights)


X, W = torch.zeros(4, 3, device="cpu"), torch.ones(4, device="cpu")


@pytest.mark.parametrize(
    ("x", "weights", "text"),
    [
        (X[0], None, r"x must be on the CPU and have shape \(N, D\) with D >= 1"),
        (X[None], None, r"x must be on the CPU and have shape \(N, D\) with D >= 1"),
        (X[:, :0], None, r"x must be on the CPU and have shape \(N, D\) with D >= 1"),
        (X.int(), None, "x must be float32, float64, bfloat16 or float16"),
        (X.to(torch.complex64), None, "x must be float32, float64, bfloat16 or float16"),
        (X, W[:3], r"weights must be on the CPU and have shape \(4,\)"),
        (X, W[:, None], r"weights must be on the CPU and have shape \(4,\)"),
        (X, W.double(), "the dtype of x, or float32 for half precision"),
        (X, W.int(), "the dtype of x, or float32 for half precision"),
        (X.bfloat16(), W.half(), "the dtype of x, or float32 for half precision"),
        (X, -W, "weights must be finite and not negative, got -1 at index 0"),
        (X, W.to("meta"), "tensors must be on one device, got cpu, meta"),
        (X.to("meta"), W, "tensors must be on one device, got meta, cpu"),
    ],
)
def test_misuse_of_the_raw_op_is_refused(native, x, weights, text):
    with pytest.raises(RuntimeError, match=text):
        RAW.moments_fwd(x, weights)
