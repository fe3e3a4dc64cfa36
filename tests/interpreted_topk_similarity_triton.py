"""The Triton kernels of topk_similarity in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import math

import pytest
import torch
from torch.library import opcheck

from fastkit.ops import csls_topk, topk_similarity, topk_similarity_triton
from fastkit.testing.topk_similarity import (
    assert_chosen,
    assert_lower_of_equal_keys,
    expected_csls,
    expected_scores,
    make_tables,
)
from fastkit.triton import topk_similarity as kernels

pytestmark = pytest.mark.usefixtures("patched_once")

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
METRICS = "dot", "cosine", "l2"
NAN = math.nan


def options_of(metric, bias):
    return {"metric": metric, "key_bias": None if metric == "l2" else bias}


def check(queries, keys, k, metric="dot", bias=None):
    options = options_of(metric, bias)
    found = topk_similarity(queries, keys, k, impl="triton", **options)
    assert_chosen(found, expected_scores(queries, keys, **options), k, least=metric == "l2")
    return found


def assert_equal(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values.nan_to_num(nan=7.0), expected.values.nan_to_num(nan=7.0))


@pytest.fixture
def searches(monkeypatch):
    """Of so many queries, how often all keys were looked at: there is then a second list to put in order."""
    ordered = []
    in_order = kernels._in_order

    def counting(*args, **kwargs):
        ordered.append(None)
        return in_order(*args, **kwargs)

    monkeypatch.setattr(kernels, "_in_order", counting)
    return lambda queries: len(ordered) - queries


# Choices


SIZES = [
    (0, 3, 2, 2), (1, 1, 1, 1), (1, 2, 3, 2), (3, 7, 2, 7), (2, 33, 33, 10), (4, 17, 16, 17), (17, 64, 8, 3),
    (2, 129, 70, 33), (1, 1000, 4, 12), (2, 300, 5, 128),
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "D", "k"), SIZES)
def test_chooses_the_nearest(n, m, D, k, metric):
    """With a bias; of keys that are repeated, the first ones."""
    queries, keys, bias = make_tables(n, m, D, repeated=True)
    found = check(queries, keys, k, metric, bias)
    assert found.values.dtype == FLOAT
    assert_lower_of_equal_keys(found, keys, None if metric == "l2" else bias)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_half_precision(dtype, metric):
    """Tables that are operands as they are, and that are not."""
    for D in (15, 16):
        queries, keys, bias = make_tables(4, 65, D, dtype=dtype)
        for of in (None, bias, bias.to(dtype)) if D == 15 else (bias,):
            assert check(queries, keys, 7, metric, of).values.dtype == FLOAT


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_csls(dtype):
    queries, keys, _ = make_tables(5, 17, 12, dtype=dtype, repeated=True)
    sources = make_tables(9, 1, 12, dtype=dtype, seed=1)[0]
    for of in (None, sources):
        found = csls_topk(queries, keys, 6, sources=of, neighbors=3, impl="triton")
        assert_chosen(found, expected_csls(queries, keys, sources=of, neighbors=3), 6)
        assert_lower_of_equal_keys(found, keys)


@pytest.fixture(params=[2, 9])
def pieces(request, monkeypatch):
    def cut(programs, size, block):
        length = math.ceil(size / request.param / block) * block
        return math.ceil(size / length), length

    monkeypatch.setattr(kernels, "_pieces", cut)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_keys_in_pieces(pieces, metric):
    queries, keys, bias = make_tables(2, 1100, 6, repeated=True)
    found = check(queries, keys, 5, metric, bias)
    assert_lower_of_equal_keys(found, keys, None if metric == "l2" else bias)


# Ties, and what decides


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_ties_of_small_integers(metric):
    """Exact in any order of summation: the choice is that of a stable sort."""
    for n, m, D, k in ((2, 40, 1, 7), (3, 300, 2, 20), (2, 90, 3, 90)):
        generator = torch.Generator().manual_seed(n)
        queries, keys, bias = (
            torch.randint(-2, 3, s, generator=generator).float() for s in ((n, D), (m, D), (m,))
        )
        if metric == "l2":
            scores = (queries.unsqueeze(1) - keys).square().sum(2)
        else:
            scores = -(queries @ keys.T + bias)
        expected = scores.argsort(dim=1, stable=True)[:, :k]
        values, indices = topk_similarity(queries, keys, k, impl="triton", **options_of(metric, bias))
        assert torch.equal(indices, expected)
        assert torch.equal(values, scores.gather(1, expected) * (1 if metric == "l2" else -1))


@pytest.mark.parametrize("metric", METRICS)
def test_all_keys_are_equal(metric, searches):
    """More than are kept: all are looked at, and the first k are chosen."""
    for n, m, D in ((2, 50, 77), (3, 130, 33)):
        queries, keys, _ = make_tables(n, 1, D)
        before = searches(0)
        found = topk_similarity(queries, keys.expand(m, D), 6, metric=metric, impl="triton")
        assert searches(0) - before == 2 * n
        assert torch.equal(found.indices, torch.arange(6).expand(n, 6))
        assert torch.equal(found.values, found.values[:, :1].expand(n, 6))


@pytest.mark.parametrize("metric", METRICS)
def test_of_most_tables_no_query_looks_at_all_keys(metric, searches):
    queries, keys, bias = make_tables(8, 600, 64)
    check(queries, keys, 10, metric, bias)
    assert searches(8) == 0


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_what_rounding_to_operands_hides(metric, searches):
    """Keys that differ beyond the digits of bfloat16, more of them than are kept, the best among the last."""
    queries, keys, _ = make_tables(2, 1, 20)
    steps = torch.linspace(0, 2.0**-10, 90).unsqueeze(1)
    for best_last in (keys + steps * queries[0], keys + steps.flip(0) * queries[0]):
        check(queries, best_last, 5, metric)
    assert searches(4) > 0


def test_distances_far_from_the_origin(searches):
    queries, keys, _ = make_tables(3, 200, 8)
    check(queries + 1e4, keys + 1e4, 5, "l2")
    assert searches(3) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_what_rounding_to_operands_takes(metric):
    queries, keys, _ = make_tables(4, 100, 40)
    if metric == "cosine":
        queries, keys = (torch.nn.functional.normalize(t) for t in (queries, keys))
    l2 = metric == "l2"
    centre = kernels._centre(keys) if l2 else None
    q, x = (kernels._operand(t, centre) for t in (queries, keys))
    conversion = kernels._conversion(queries, q, l2)
    sizes = q.double().norm(dim=1, keepdim=True), x.double().norm(dim=1)
    if l2:
        off = (torch.cdist(q.double(), x.double()) - torch.cdist(queries.double(), keys.double())).abs()
        assert (off <= conversion * (sizes[0] + sizes[1])).all()
    else:
        off = (q.double() @ x.double().T - queries.double() @ keys.double().T).abs()
        assert (off <= conversion * sizes[0] * sizes[1]).all()


def test_zeros_and_negative_zeros_are_equal():
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]])
    queries = torch.tensor([[1.0], [-1.0], [0.0]])
    for metric in METRICS:
        found = topk_similarity(queries, keys, 4, metric=metric, impl="triton")
        assert found.indices.tolist() == [[0, 1, 2, 3]] * 3


# What is no number


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # of numpy
@pytest.mark.parametrize("metric", METRICS)
def test_nan(metric):
    clean_queries, clean_keys, bias = make_tables(3, 37, 5)
    for bad_queries, bad_keys in (([0], []), ([2], [36]), ([], list(range(1, 36))), ([], list(range(37)))):
        queries, keys = clean_queries.clone(), clean_keys.clone()
        queries[bad_queries, -1] = NAN
        keys[bad_keys, 2] = NAN
        for k in (5, 37):
            check(queries, keys, k, metric, bias)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # of numpy
def test_infinity():
    """A bias of -inf comes last, and before nothing; keys with inf, and what overflows, are scores too."""
    queries, keys, bias = make_tables(2, 40, 3)
    bias[::2] = -math.inf
    found = topk_similarity(queries, keys, 40, key_bias=bias, impl="triton")
    assert torch.equal(found.indices[:, 20:], torch.arange(0, 40, 2).expand(2, 20))
    assert (found.values[:, 20:] == -math.inf).all()
    found = topk_similarity(queries, keys, 22, key_bias=bias, impl="triton")
    assert torch.equal(found.indices[:, 20:], torch.tensor([0, 2]).expand(2, 2))
    bias[5], bias[7] = math.inf, NAN
    found = check(queries, keys, 25, bias=bias)
    assert (found.indices[:, 0] == 5).all()
    for value in (math.inf, 1e30):
        large = keys.clone()
        large[3, 0] = value
        for metric in ("dot", "l2"):
            scaled = queries if value == math.inf else 1e20 * queries
            found, expected = (
                topk_similarity(scaled, large, 6, metric=metric, impl=impl)
                for impl in ("triton", "reference")
            )
            assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15])
def test_scale(scale):
    queries, keys, _ = make_tables(3, 50, 6)
    for metric in METRICS:
        check(queries * scale, keys * scale, 4, metric)


# Layouts, and calls


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_any_strides(metric):
    queries, keys, bias = make_tables(2, 20, 6)
    expected = topk_similarity(queries, keys, 5, impl="triton", **options_of(metric, bias))
    padded = torch.full((20, 17), NAN)
    padded[:, 4:16:2] = keys
    wide = torch.full((2, 9), NAN)
    wide[:, 2:8] = queries
    for q, x, b in (
        (queries.T.contiguous().T, keys.T.contiguous().T, bias),
        (wide[:, 2:8], padded[:, 4:16:2], bias.repeat_interleave(3)[::3]),
        (queries, keys.unsqueeze(1).expand(20, 3, 6)[:, 1], bias),
    ):
        assert_equal(topk_similarity(q, x, 5, impl="triton", **options_of(metric, b)), expected)
    found = topk_similarity(queries[:1].expand(3, 6), keys, 5, impl="triton", **options_of(metric, bias))
    assert torch.equal(found.indices, expected.indices[:1].expand(3, 5))


FAR = 2**30 + 8  # a stride: it fits, but twice it does not


def test_beyond_32_bits(tmp_path):
    """In a file of holes; where 32 bits would go instead there are zeros."""
    memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * 2**30, dtype=FLOAT)
    queries, keys, _ = make_tables(3, 3, 4)
    places = enumerate((queries, keys))
    q, x = (memory.as_strided((3, 4), (FAR, 1), 2**31 + 4096 * i).copy_(t) for i, t in places)
    for metric in ("dot", "l2"):
        expected = topk_similarity(queries, keys, 2, metric=metric, impl="triton")
        assert_equal(topk_similarity(q, x, 2, metric=metric, impl="triton"), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_query_and_a_key_have_bits_of_their_own(metric):
    """Whatever is beside them, and however many are asked for."""
    queries, keys, bias = make_tables(4, 60, 35)
    options = options_of(metric, bias)
    found = topk_similarity(queries, keys, 20, impl="triton", **options)
    assert_equal(topk_similarity(queries, keys, 20, impl="triton", **options), found)
    for part in (queries[1:2], queries[2:]):
        again = topk_similarity(part, keys, 3, impl="triton", **options)
        rows = slice(1, 2) if len(part) == 1 else slice(2, None)
        assert torch.equal(again.values, found.values[rows, :3])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = topk_similarity(queries, keys[order], 20, impl="triton", **options_of(metric, bias[order]))
    assert torch.equal(moved.values, found.values)
    assert torch.equal(order[moved.indices], found.indices)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_the_reference_s(metric):
    results = []
    for impl in ("triton", "reference"):
        tables = make_tables(3, 9, 5)
        leaves = [t.requires_grad_() for t in (tables[:2] if metric == "l2" else tables)]
        bias = leaves[2] if len(leaves) == 3 else None
        values = topk_similarity(leaves[0], leaves[1], 4, impl=impl, **options_of(metric, bias)).values
        results.append(torch.autograd.grad(values.square().sum(), leaves))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    queries, keys, bias = make_tables(3, 20, 6)
    for metric in METRICS:
        expected = topk_similarity(queries, keys, 5, impl="triton", **options_of(metric, bias))
        with torch.autocast("cpu", dtype=BFLOAT):
            found = topk_similarity(queries, keys, 5, impl="triton", **options_of(metric, bias))
        assert_equal(found, expected)


def test_longer_lists_are_refused_by_name():
    queries, keys, _ = make_tables(1, 200, 2)
    with pytest.raises(RuntimeError, match="no lists of more than 128"):
        topk_similarity(queries, keys, 129, impl="triton")
    with pytest.raises(RuntimeError, match="no lists of more than 128"):
        csls_topk(keys, keys, 3, neighbors=129, impl="triton")


def test_opcheck():
    queries, keys, bias = make_tables(2, 5, 3)
    opcheck(topk_similarity_triton.forward, (queries, keys, bias, 2, False))
