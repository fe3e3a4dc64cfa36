"""lora_linear and the pruning of its A on a GPU: small calls that reach each kernel, for compute-sanitizer
(benchmarks/gpu.sh); streams, graphs, equal bits.
"""

import pytest
import torch

from fastkit import ops, reference
from fastkit._dispatch import unavailable
from fastkit.ops.lora_linear import KERNELS
from fastkit.testing import LinearSize, assert_matches_reference, sizes
from fastkit.testing.lora_linear import SCALE, Inputs, check, make_inputs

pytestmark = [pytest.mark.native, pytest.mark.gpu]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = LinearSize(300, 260, 390, 12)


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def inputs_of(size, **options):
    with torch.device("cuda"):
        return make_inputs(size, **options)


# Each size in one dtype and with one choice of options under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(size, dtype, lora_x, marks=[pytest.mark.sanitize] if i % 3 == j and i % 2 == lora_x else [])
    for i, size in enumerate([*sizes("lora_linear"), LARGE])
    for j, dtype in enumerate(DTYPES)
    for lora_x in (False, True)
]


@pytest.mark.parametrize(("size", "dtype", "lora_x"), CALLS, ids=str)
def test_every_kernel(triton, size, dtype, lora_x):
    adapter = torch.float32 if lora_x else None
    inputs = inputs_of(
        size, dtype=dtype, adapter=adapter, lora_x=lora_x, mask=not lora_x, bias=size.N % 2 == 0
    )
    check(inputs, impl=triton)


def results_of(inputs: Inputs, impl):
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b)]
    x, a, b = leaves
    y, square_sum = ops.lora_linear_with_stats(
        x, inputs.weight, inputs.bias, a, b, SCALE, mask=inputs.mask, impl=impl
    )
    return y.detach(), square_sum, *torch.autograd.grad(y, leaves, inputs.gy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(triton, dtype):
    inputs = inputs_of(LinearSize(5000, 260, 390, 12), dtype=dtype)
    first = results_of(inputs, triton)
    for _ in range(5):
        assert all(map(torch.equal, results_of(inputs, triton), first))


def test_kernels_run_on_the_current_stream(triton):
    """x is written on it, late; a kernel on another stream would read what was there before."""
    inputs = inputs_of(LARGE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = results_of(inputs, triton)
    late = inputs._replace(x=torch.zeros_like(inputs.x))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.x.copy_(inputs.x)
        results = results_of(late, triton)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


def test_a_graph_replays_a_call(triton):
    inputs = inputs_of(LARGE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        results_of(inputs, triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = results_of(inputs, triton)
    inputs.x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, results_of(inputs, triton)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 129), (20, 4100)])
def test_column_norms(triton, shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    squares = x.double().square().sum(0)
    # A sum of n squares is off by a share of n eps / 2 and its root by half of that; both are rounded.
    budget = ((shape[0] + 1) / 4 + 2) * torch.finfo(torch.float32).eps * squares.sqrt()
    assert_matches_reference(ops.column_norms(x, impl=triton), squares.sqrt(), budget)


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", None])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_pruning_is_that_of_the_reference_bit_for_bit(impl, dtype):
    shapes = (1, 1), (3, 31), (8, 768), (5, 4097), (2, 33)
    matrices = [torch.randn(shape).to(dtype) for shape in shapes]
    matrices[1][:] = 1  # ties
    norms = [torch.rand(shape[1]) for shape in shapes]
    norms[1][:] = 2
    for ratio in (0.0, 0.3, 0.5, 0.99):
        expected = [m.clone() for m in matrices]
        masks = reference.prune_rows_grouped_(expected, norms, ratio)
        pruned = [m.cuda() for m in matrices]
        try:
            results = ops.prune_rows_grouped_(pruned, [n.cuda() for n in norms], ratio, impl=impl)
        except RuntimeError as error:
            if 'impl="cuda" cannot run' in str(error):
                pytest.skip(str(error))
            raise
        for result, mask, matrix, want in zip(results, masks, pruned, expected, strict=True):
            assert torch.equal(result.cpu(), mask) and torch.equal(matrix.cpu(), want)
