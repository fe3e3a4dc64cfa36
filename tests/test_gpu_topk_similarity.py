"""topk_similarity on a GPU: small calls that reach each kernel, for compute-sanitizer (benchmarks/gpu.sh);
streams, graphs, equal bits, and no wait for the device.
"""

import pytest
import torch
from contexts import waits_are_errors

from fastkit._dispatch import unavailable
from fastkit.ops import csls_topk, topk_similarity
from fastkit.ops.topk_similarity import KERNELS
from fastkit.testing.topk_similarity import (
    assert_chosen,
    assert_lower_of_equal_keys,
    expected_csls,
    expected_scores,
    make_tables,
)

pytestmark = [pytest.mark.native, pytest.mark.gpu]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = "dot", "cosine", "l2"


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def tables_of(*sizes, **options):
    with torch.device("cuda"):
        return make_tables(*sizes, **options)


def options_of(metric, bias):
    return {"metric": metric, "key_bias": None if metric == "l2" else bias}


# n, m, D, k: none, one, around blocks of queries (32, 64, 128) and of keys (64), in pieces of keys or
# not, and each length of lists.
SIZES = [
    (0, 3, 2, 2), (1, 1, 1, 1), (1, 33, 4, 10), (3, 1000, 40, 17), (17, 64, 8, 64), (33, 129, 16, 5),
    (65, 2000, 300, 10), (130, 140, 64, 128), (129, 300, 33, 33), (1, 20_000, 16, 10), (300, 3000, 65, 10),
]  # fmt: skip

# Each size in one dtype and one metric under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(
        size, dtype, metric, marks=[pytest.mark.sanitize] if i % 3 == j and (i + j) % 3 == of else []
    )
    for i, size in enumerate(SIZES)
    for j, dtype in enumerate(DTYPES)
    for of, metric in enumerate(METRICS)
]


@pytest.mark.parametrize(("size", "dtype", "metric"), CALLS, ids=str)
def test_every_kernel(triton, size, dtype, metric):
    n, m, D, k = size
    queries, keys, bias = tables_of(n, m, D, dtype=dtype, repeated=m < 1000)
    for of in (None, bias):
        options = options_of(metric, of)
        found = topk_similarity(queries, keys, k, impl=triton, **options)
        assert_chosen(found, expected_scores(queries, keys, **options), k, least=metric == "l2")
        if m < 1000:
            assert_lower_of_equal_keys(found, keys, options["key_bias"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_csls(triton, dtype):
    queries, keys, _ = tables_of(70, 150, 40, dtype=dtype)
    found = csls_topk(queries, keys, 6, impl=triton)
    assert_chosen(found, expected_csls(queries, keys), 6)


@pytest.mark.sanitize
@pytest.mark.parametrize("metric", METRICS)
def test_more_equal_keys_than_are_kept(triton, metric):
    """All keys are looked at, in the same order of summation."""
    queries, keys, _ = tables_of(20, 1, 77)
    found = topk_similarity(queries, keys.expand(500, 77), 6, metric=metric, impl=triton)
    assert torch.equal(found.indices.cpu(), torch.arange(6).expand(20, 6))
    assert torch.equal(found.values, found.values[:, :1].expand(20, 6))


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_has_the_same_bits_wherever_it_is_computed(triton, metric):
    """Of the keys that are kept, and, for a copy that no list can hold, of all."""
    queries, keys, bias = tables_of(50, 300, 300)
    options = options_of(metric, bias)
    few = topk_similarity(queries, keys, 5, impl=triton, **options)
    many = topk_similarity(
        queries, keys.repeat(100, 1), 5, impl=triton, **options_of(metric, bias.repeat(100))
    )
    assert torch.equal(many.values, few.values[:, :1].expand(50, 5))
    first = few.indices[:, :1]
    assert torch.equal(many.indices, first + 300 * torch.arange(5, device="cuda"))


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity(triton, metric):
    queries, keys, bias = tables_of(40, 200, 24)
    queries[3, -1], keys[5, 2], keys[199] = torch.nan, torch.nan, torch.nan
    bias[::2], bias[1] = -torch.inf, torch.nan
    options = options_of(metric, bias)
    for k in (10, 99, 128):
        found = topk_similarity(queries, keys, k, impl=triton, **options)
        assert_chosen(found, expected_scores(queries, keys, **options), k, least=metric == "l2")


def test_distances_far_from_the_origin(triton):
    queries, keys, _ = tables_of(50, 3000, 64)
    queries, keys = queries + 1e4, keys + 1e4
    found = topk_similarity(queries, keys, 10, metric="l2", impl=triton)
    assert_chosen(found, expected_scores(queries, keys, metric="l2"), 10, least=True)


@pytest.mark.sanitize
def test_strides(triton):
    queries, keys, bias = tables_of(9, 40, 6)
    expected = topk_similarity(queries, keys, 5, key_bias=bias, impl=triton)
    padded = torch.full((40, 17), torch.nan, device="cuda")
    padded[:, 4:16:2] = keys
    wide = torch.full((9, 9), torch.nan, device="cuda")
    wide[:, 2:8] = queries
    for q, x, b in (
        (queries.T.contiguous().T, keys.T.contiguous().T, bias),
        (wide[:, 2:8], padded[:, 4:16:2], bias.repeat_interleave(3)[::3]),
    ):
        assert all(map(torch.equal, topk_similarity(q, x, 5, key_bias=b, impl=triton), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(triton, dtype):
    queries, keys, _ = tables_of(500, 5000, 96, dtype=dtype)
    first = topk_similarity(queries, keys, 10, impl=triton)
    for _ in range(5):
        assert all(map(torch.equal, topk_similarity(queries, keys, 10, impl=triton), first))


def test_longer_lists_run_the_reference(triton):
    queries, keys, _ = tables_of(3, 200, 5)
    with pytest.raises(RuntimeError, match='no lists of more than 128; use impl="reference"'):
        topk_similarity(queries, keys, 129, impl=triton)
    with pytest.warns(RuntimeWarning, match="no lists of more than 128"):
        found = topk_similarity(queries, keys, 129)
    expected = topk_similarity(queries, keys, 129, impl="reference")
    assert all(map(torch.equal, found, expected))


def test_kernels_run_on_the_current_stream(triton):
    """Keys are written on it, late; a kernel on another stream would read what was there before."""
    queries, keys, _ = tables_of(70, 3000, 40)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = topk_similarity(queries, keys, 10, impl=triton)
    late = torch.zeros_like(keys)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(keys)
        found = topk_similarity(queries, late, 10, impl=triton)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_a_graph_replays_a_call(triton, metric):
    queries, keys, _ = tables_of(70, 3000, 40)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        topk_similarity(queries, keys, 10, metric=metric, impl=triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = topk_similarity(queries, keys, 10, metric=metric, impl=triton)
    keys.mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, topk_similarity(queries, keys, 10, metric=metric, impl=triton)))


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_waits_for_the_device(triton, metric):
    queries, keys, bias = tables_of(70, 3000, 40)
    options = options_of(metric, bias)
    topk_similarity(queries, keys, 10, impl=triton, **options)
    with waits_are_errors():
        topk_similarity(queries, keys, 10, impl=triton, **options)
        csls_topk(queries, keys, 10, impl=triton)


def test_scores_are_never_all_there(triton):
    queries, keys, _ = tables_of(20_000, 20_000, 32)
    topk_similarity(queries[:100], keys, 10, impl=triton)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    topk_similarity(queries, keys, 10, impl=triton)
    assert torch.cuda.max_memory_allocated() - before < 2**26  # all would be 1.6 GB
