"""moments on a GPU: small calls that reach each kernel, for compute-sanitizer (benchmarks/gpu.sh); streams,
graphs, equal bits, and no wait for the device.
"""

import pytest
import torch
from contexts import waits_are_errors

from fastkit._dispatch import unavailable
from fastkit.ops import moments
from fastkit.ops.moments import KERNELS
from fastkit.testing.moments import SIZES, RowsSize, check, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.gpu]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = RowsSize(20_000, 300)  # in many pieces, and on tensor cores


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def inputs_of(size, **options):
    with torch.device("cuda"):
        return make_inputs(size, **options)


# Each size in one dtype and with one choice of weights under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(size, dtype, weights, marks=[pytest.mark.sanitize] if i % 3 == j and i % 2 == of else [])
    for i, size in enumerate([*SIZES, RowsSize(4100, 65)])
    for j, dtype in enumerate(DTYPES)
    for of, weights in enumerate([None, "some"])
]


@pytest.mark.parametrize(("size", "dtype", "weights"), CALLS, ids=str)
def test_every_kernel(triton, size, dtype, weights):
    check(inputs_of(size, dtype=dtype, weights=weights), impl=triton)


@pytest.mark.parametrize("weights", [None, "some"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_many_rows(triton, offset, weights):
    """Beside the products of float64: a bias of tensor cores would show."""
    check(inputs_of(MANY, weights=weights, offset=offset), impl=triton)


def test_half_precision_may_have_weights_of_float32(triton):
    for dtype in DTYPES[1:]:
        inputs = inputs_of(RowsSize(5000, 40), dtype=dtype)
        check(inputs._replace(weights=0.1 + torch.rand(5000, device="cuda")), impl=triton)


@pytest.mark.sanitize
def test_strides(triton):
    inputs = inputs_of(RowsSize(300, 12), weights="some")
    weights = inputs.weights.repeat_interleave(2)[::2]
    padded = torch.full((300, 33), torch.nan, device="cuda")
    padded[:, 1:25:2] = inputs.x
    for x in (padded[:, 1:25:2], inputs.x.T.contiguous().T, torch.cat([inputs.x] * 2, 1)[:, :12]):
        check(inputs._replace(x=x, weights=weights), impl=triton)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(triton, dtype):
    inputs = inputs_of(MANY, dtype=dtype, weights="some")
    first = moments(inputs.x, weights=inputs.weights, impl=triton)
    for _ in range(5):
        assert all(map(torch.equal, moments(inputs.x, weights=inputs.weights, impl=triton), first))


def test_kernels_run_on_the_current_stream(triton):
    """x is written on it, late; a kernel on another stream would read what was there before."""
    x = inputs_of(RowsSize(3000, 70)).x
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = moments(x, impl=triton)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = moments(late, impl=triton)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


def test_a_graph_replays_a_call(triton):
    x = inputs_of(RowsSize(3000, 70)).x
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        moments(x, impl=triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = moments(x, impl=triton)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, moments(x, impl=triton)))


def test_nothing_waits_for_the_device(triton):
    inputs = inputs_of(RowsSize(3000, 70), weights="some")
    moments(inputs.x, weights=inputs.weights, impl=triton)
    with waits_are_errors():
        moments(inputs.x, weights=inputs.weights, impl=triton)
        moments(inputs.x, weights=-inputs.weights, impl=triton)  # whose values are not looked at


def test_no_copy_of_the_rows_is_made(triton):
    x = inputs_of(RowsSize(200_000, 128)).x
    moments(x, impl=triton)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moments(x, impl=triton)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 2
