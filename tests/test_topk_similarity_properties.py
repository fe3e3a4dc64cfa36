"""What a choice of the nearest must be, whatever the tables: of keys in any order, of parts, of any scale."""

import math

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import csls_topk, topk_similarity
from fastkit.ops.topk_similarity import KERNELS
from fastkit.testing.topk_similarity import assert_chosen, expected_scores

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

METRICS = "dot", "cosine", "l2"


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def tables(n, m, D, k, whole, seed):
    """Queries, keys, a bias and k; of whole numbers where whole, which are exact and have ties."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in ((n, D), (m, D), (m,))]
    queries, keys, bias = ((t * 1.5).round() if whole else t for t in drawn)
    return queries, keys, bias, min(k, m)


def given_tables(test, whole=None):
    """Runs ``test`` on many sizes, always the same ones."""
    case = strategies.builds(
        tables,
        n=strategies.integers(1, 20),
        m=strategies.integers(1, 60),
        D=strategies.integers(1, 20),
        k=strategies.integers(1, 20),
        whole=strategies.booleans() if whole is None else strategies.just(whole),
        seed=strategies.integers(0, 1000),
    )
    settings = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(case=case)(test))


def given_whole_numbers(test):
    return given_tables(test, whole=True)


def options_of(metric, bias):
    return {"metric": metric, "key_bias": None if metric == "l2" else bias}


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@given_tables
def test_the_order_of_keys_is_no_matter(impl, case):
    """But of equal ones, where the lower index wins in either order: values are the same, bit for bit."""
    queries, keys, bias, k = case
    at = order(len(keys))
    for metric in METRICS:
        found = topk_similarity(queries, keys, k, impl=impl, **options_of(metric, bias))
        moved = topk_similarity(queries, keys[at], k, impl=impl, **options_of(metric, bias[at]))
        assert torch.equal(moved.values, found.values)
        distinct = torch.ones_like(found.values, dtype=torch.bool)
        distinct[:, 1:] &= found.values[:, 1:] != found.values[:, :-1]
        distinct[:, :-1] &= found.values[:, 1:] != found.values[:, :-1]
        distinct[:, -1] = False  # it may have equals that are left out
        assert torch.equal(at[moved.indices][distinct], found.indices[distinct])


@given_tables
def test_queries_are_apart(impl, case):
    """In another order, and one by one."""
    queries, keys, bias, k = case
    at = order(len(queries))
    for metric in METRICS:
        options = options_of(metric, bias)
        found = topk_similarity(queries, keys, k, impl=impl, **options)
        moved = topk_similarity(queries[at], keys, k, impl=impl, **options)
        alone = topk_similarity(queries[-1:], keys, k, impl=impl, **options)
        for all_, in_order, one in zip(found, moved, alone, strict=True):
            assert torch.equal(in_order, all_[at]) and torch.equal(one, all_[-1:])


@given_tables
def test_fewer_are_the_first_of_more(impl, case):
    queries, keys, bias, k = case
    for metric in METRICS:
        options = options_of(metric, bias)
        every = topk_similarity(queries, keys, len(keys), impl=impl, **options)
        some = topk_similarity(queries, keys, k, impl=impl, **options)
        assert torch.equal(some.indices, every.indices[:, :k])
        assert torch.equal(some.values, every.values[:, :k])
        assert torch.equal(every.indices.sort(dim=1).values, torch.arange(len(keys)).expand(len(queries), -1))


@given_tables
def test_parts_of_the_keys_merge(impl, case):
    """As shards of a table do: the k best of each, sorted stably."""
    queries, keys, bias, k = case
    cut = len(keys) // 2
    parts = [part for part in (slice(0, cut), slice(cut, None)) if len(keys[part])]
    for metric in METRICS:
        values, indices = [], []
        for part in parts:
            of = min(k, len(keys[part]))
            found = topk_similarity(queries, keys[part], of, impl=impl, **options_of(metric, bias[part]))
            values.append(found.values)
            indices.append(found.indices + (part.start or 0))
        values, indices = torch.cat(values, 1), torch.cat(indices, 1)
        first = values.argsort(dim=1, stable=True, descending=metric != "l2")[:, :k]
        whole = topk_similarity(queries, keys, k, impl=impl, **options_of(metric, bias))
        assert torch.equal(values.gather(1, first), whole.values)
        assert torch.equal(indices.gather(1, first), whole.indices)


@given_whole_numbers
def test_a_shift_of_all_biases_shifts_the_values(impl, case):
    queries, keys, bias, k = case
    found = topk_similarity(queries, keys, k, key_bias=bias, impl=impl)
    shifted = topk_similarity(queries, keys, k, key_bias=bias + 3, impl=impl)
    assert torch.equal(shifted.indices, found.indices) and torch.equal(shifted.values, found.values + 3)
    without, zero = (topk_similarity(queries, keys, k, key_bias=b, impl=impl) for b in (None, 0 * bias))
    assert torch.equal(without.indices, zero.indices) and torch.equal(without.values, zero.values)


@given_whole_numbers
def test_a_bias_is_a_column_more(impl, case):
    """Of ones in the queries."""
    queries, keys, bias, k = case
    found = topk_similarity(queries, keys, k, key_bias=bias, impl=impl)
    longer = torch.cat([queries, torch.ones(len(queries), 1)], 1)
    column = topk_similarity(longer, torch.cat([keys, bias[:, None]], 1), k, impl=impl)
    assert torch.equal(column.indices, found.indices) and torch.equal(column.values, found.values)


@given_whole_numbers
def test_a_distance_is_a_product_with_a_bias(impl, case):
    """|q - k|^2 = |q|^2 - 2 (q . k - |k|^2 / 2): the least is the greatest, ties too."""
    queries, keys, _, k = case
    distances = topk_similarity(queries, keys, k, metric="l2", impl=impl)
    products = topk_similarity(queries, keys, k, key_bias=-keys.square().sum(1) / 2, impl=impl)
    assert torch.equal(distances.indices, products.indices)
    assert torch.equal(distances.values, queries.square().sum(1, keepdim=True) - 2 * products.values)


@given_whole_numbers
def test_distances_know_no_origin(impl, case):
    queries, keys, _, k = case
    shift = torch.arange(keys.shape[1]) - 5.0
    found = topk_similarity(queries, keys, k, metric="l2", impl=impl)
    moved = topk_similarity(queries + shift, keys + shift, k, metric="l2", impl=impl)
    assert torch.equal(moved.indices, found.indices) and torch.equal(moved.values, found.values)


@given_tables
def test_cosines_know_no_scale(impl, case):
    """Of any row; powers of two change no bit, and others no more than rounding."""
    queries, keys, bias, k = case
    of = 2.0 ** torch.randint(-60, 60, (len(keys), 1), generator=torch.Generator().manual_seed(1))
    found = topk_similarity(queries, keys, k, metric="cosine", key_bias=bias, impl=impl)
    scaled = topk_similarity(queries / 1024, keys * of, k, metric="cosine", key_bias=bias, impl=impl)
    assert torch.equal(scaled.indices, found.indices) and torch.equal(scaled.values, found.values)
    threes = topk_similarity(queries * 3, keys * 7, k, metric="cosine", key_bias=bias, impl=impl)
    assert torch.allclose(threes.values, found.values, rtol=0, atol=1e-5)
    assert_chosen(threes, expected_scores(queries * 3, keys * 7, metric="cosine", key_bias=bias), k)


@given_tables
def test_a_nan_leaves_the_others_alone(impl, case):
    """A key of NaN is as no key at all, bit for bit."""
    queries, keys, bias, _ = case
    at = len(keys) // 3
    bad = keys.clone()
    bad[at, -1] = math.nan
    others = torch.arange(len(keys)) != at
    for metric in METRICS:
        found = topk_similarity(queries, bad, len(keys), impl=impl, **options_of(metric, bias))
        assert found.indices[:, -1].eq(-1).all() and found.values[:, -1].isnan().all()
        if len(keys) > 1:
            without = topk_similarity(
                queries, keys[others], len(keys) - 1, impl=impl, **options_of(metric, bias[others])
            )
            assert torch.equal(found.values[:, :-1], without.values)
            indices = without.indices + (without.indices >= at)
            assert torch.equal(found.indices[:, :-1], indices)


@given_tables
def test_csls_of_equal_penalties_is_the_cosine(impl, case):
    """Of one source, a row of zeros, they are 0; twice the cosine, and the query's mean is subtracted."""
    queries, keys, _, k = case
    cosine = topk_similarity(queries, keys, k, metric="cosine", impl=impl)
    found = csls_topk(queries, keys, k, sources=torch.zeros(1, keys.shape[1]), neighbors=1, impl=impl)
    assert torch.equal(found.indices, cosine.indices)
    assert torch.equal(found.values, 2 * cosine.values - cosine.values[:, :1])


@given_tables
def test_csls_is_symmetric(impl, case):
    """As a function of all pairs, each table is the other's sources."""
    queries, keys, _, _ = case
    neighbors = min(3, len(queries), len(keys))
    dense = torch.full((len(queries), len(keys)), math.nan)
    found = csls_topk(queries, keys, len(keys), neighbors=neighbors, impl=impl)
    dense.scatter_(1, found.indices, found.values)
    other = csls_topk(keys, queries, len(queries), neighbors=neighbors, impl=impl)
    transposed = torch.full((len(keys), len(queries)), math.nan).scatter_(1, other.indices, other.values)
    assert torch.allclose(dense, transposed.T, rtol=0, atol=1e-5)


def test_csls_passes_a_hub_by(impl):
    """By hand, with one neighbor. The hub, at 20 degrees, is the nearest key of both queries.

    Those are at 0 and 25 degrees, the other keys at -25 and 60. The hub's penalty is cos 5, by the second
    query; that of the key at -25 is cos 25 only, so that the first query has that one.
    """

    def at(*degrees):
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    def cos(degrees):
        return math.cos(math.radians(degrees))

    queries, keys = at(0, 25), at(-25, 20, 60)
    assert topk_similarity(queries, keys, 1, metric="cosine", impl=impl).indices.tolist() == [[1], [1]]
    values, indices = csls_topk(queries, keys, 3, neighbors=1, impl=impl)
    assert indices.tolist() == [[0, 1, 2], [1, 2, 0]]
    first = [cos(25) - cos(20), cos(20) - cos(5), 2 * cos(60) - cos(20) - cos(35)]
    second = [0.0, cos(35) - cos(5), 2 * cos(50) - cos(5) - cos(25)]
    assert values.tolist() == [pytest.approx(row, abs=1e-12) for row in (first, second)]


def test_csls_finds_pairs_beside_a_hub(impl):
    """A key that is what all queries have in common is nearer to most of them than their own."""
    generator = torch.Generator().manual_seed(3)
    own, noise = (torch.randn(100, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    queries = 1 + own
    keys = torch.cat([torch.ones(1, 40, dtype=torch.float64), 0.2 + own + noise])
    pairs = torch.arange(1, 101)
    by_cosine = topk_similarity(queries, keys, 1, metric="cosine", impl=impl).indices.flatten()
    by_csls = csls_topk(queries, keys, 1, impl=impl).indices.flatten()
    assert (by_cosine == 0).sum() > 75 and (by_csls == 0).sum() < 25
    assert (by_csls == pairs).sum() > 75 and (by_cosine == pairs).sum() < 25
