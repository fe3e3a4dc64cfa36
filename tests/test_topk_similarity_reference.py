"""reference.topk_similarity and csls_topk against plain sorting, SciPy and scikit-learn; what tests ask."""

import importlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastkit.reference import TopK, csls_topk, topk_similarity
from fastkit.testing.topk_similarity import (
    assert_chosen,
    assert_lower_of_equal_keys,
    expected_csls,
    expected_scores,
    make_tables,
)

module = importlib.import_module("fastkit.reference.topk_similarity")  # the package has the function

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = "dot", "cosine", "l2"
NAN, INF = math.nan, math.inf


def by_hand(queries, keys, k, metric, bias):
    """Pair by pair in fractions, then a sort of (score, index); of a NaN there is no pair."""
    values, indices = [], []
    for q in queries.tolist():
        scores = []
        for j, key in enumerate(keys.tolist()):
            b = 0.0 if bias is None else bias[j].item()
            if any(map(math.isnan, [*q, *key, b])):
                continue
            pairs = [(Fraction(x), Fraction(y)) for x, y in zip(q, key, strict=True)]
            if metric == "l2":
                scores.append((sum((x - y) ** 2 for x, y in pairs), j))
            else:
                scores.append((-sum(x * y for x, y in pairs) - Fraction(b), j))
        best = sorted(scores)[:k]
        sign = 1 if metric == "l2" else -1
        values.append([float(sign * score) for score, _ in best] + [NAN] * (k - len(best)))
        indices.append([j for _, j in best] + [-1] * (k - len(best)))
    return torch.tensor(values).view(-1, k), torch.tensor(indices).view(-1, k)


def assert_same(found, values, indices):
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.values.double().nan_to_num(nan=1e30), values.double().nan_to_num(nan=1e30))


@pytest.fixture(params=[1, 40, None], ids=lambda n: f"scores{n}")
def blocking(request, monkeypatch):
    """Blocks of a query, of a few, and of all."""
    if request.param is not None:
        monkeypatch.setattr(module, "SCORES", request.param)


# Against sorting by hand


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize(("n", "m", "D", "k"), [(4, 9, 2, 4), (7, 5, 1, 5), (1, 1, 1, 1), (3, 12, 3, 1)])
def test_is_a_sort_of_small_integers(blocking, n, m, D, k, metric, with_bias):
    """Which are exact, and have ties in every row; a NaN here and there."""
    if metric == "l2" and with_bias:
        return
    generator = torch.Generator().manual_seed(m)
    queries, keys, bias = (
        torch.randint(-1, 2, shape, generator=generator).float() for shape in ((n, D), (m, D), (m,))
    )
    bias = bias if with_bias else None
    found = topk_similarity(queries, keys, k, metric=metric, key_bias=bias)
    assert_same(found, *by_hand(queries, keys, k, metric, bias))
    queries[n // 2, -1] = NAN
    keys[m // 3, 0] = NAN
    if bias is not None:
        bias[-1] = NAN
    found = topk_similarity(queries, keys, k, metric=metric, key_bias=bias)
    assert_same(found, *by_hand(queries, keys, k, metric, bias))


def test_cosine_of_pythagorean_triples(blocking):
    """Whose norms are whole numbers."""
    queries, keys = torch.tensor([[3.0, 4]]), torch.tensor([[0.0, 9], [-3, -4], [0, 2], [5, 0], [6, 8]])
    values, indices = topk_similarity(queries, keys, 5, metric="cosine")
    assert indices.tolist() == [[4, 0, 2, 3, 1]]
    assert torch.allclose(values, torch.tensor([[1.0, 0.8, 0.8, 0.6, -1.0]]))


# Against other libraries


@pytest.mark.parametrize("metric", METRICS)
def test_is_scipy_and_sorting(metric):
    distance = pytest.importorskip("scipy.spatial.distance")
    queries, keys, _ = make_tables(30, 90, 6, dtype=torch.float64, repeated=True)
    if metric == "dot":
        scores = -np.einsum("id,jd->ij", queries.numpy(), keys.numpy())
    else:
        name = {"l2": "sqeuclidean"}.get(metric, metric)
        scores = distance.cdist(queries.numpy(), keys.numpy(), name) - (metric == "cosine")
    expected = np.argsort(scores.round(12), axis=1, kind="stable")[:, :7]
    values, indices = topk_similarity(queries, keys, 7, metric=metric)
    assert np.array_equal(indices.numpy(), expected)
    sign = 1 if metric == "l2" else -1
    np.testing.assert_allclose(values, sign * np.take_along_axis(scores, expected, 1), rtol=1e-12, atol=1e-12)


def test_is_the_neighbors_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    queries, keys, _ = make_tables(30, 90, 6, dtype=torch.float64)
    for metric in ("l2", "cosine"):
        brute = neighbors.NearestNeighbors(n_neighbors=7, algorithm="brute", metric=metric)
        distances, expected = brute.fit(keys.numpy()).kneighbors(queries.numpy())
        values, indices = topk_similarity(queries, keys, 7, metric=metric)
        assert np.array_equal(indices.numpy(), expected)
        measured = values.sqrt() if metric == "l2" else 1 - values
        np.testing.assert_allclose(measured, distances, rtol=1e-9, atol=1e-12)


# CSLS


def csls_in_numpy(queries, keys, sources, neighbors):
    unit = [t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True) for t in (queries, keys, sources)]
    of_queries = np.sort(unit[0] @ unit[1].T, axis=1)[:, -neighbors:].mean(1)
    of_keys = np.sort(unit[2] @ unit[1].T, axis=0)[-neighbors:].mean(0)
    return 2 * unit[0] @ unit[1].T - of_queries[:, None] - of_keys


@pytest.mark.parametrize("apart", [False, True], ids=["queries", "sources"])
@pytest.mark.parametrize("neighbors", [1, 3, 10])
def test_csls_is_the_dense_formula(blocking, neighbors, apart):
    queries, keys, _ = make_tables(12, 25, 5, dtype=torch.float64)
    sources = make_tables(31, 1, 5, dtype=torch.float64, seed=1)[0] if apart else None
    dense = csls_in_numpy(queries, keys, queries if sources is None else sources, neighbors)
    values, indices = csls_topk(queries, keys, 4, sources=sources, neighbors=neighbors)
    expected = np.argsort(-dense, axis=1)[:, :4]
    assert np.array_equal(indices.numpy(), expected)
    np.testing.assert_allclose(values, np.take_along_axis(dense, expected, 1), rtol=0, atol=1e-13)


def test_csls_is_a_penalty_at_hand():
    queries, keys, _ = make_tables(12, 25, 5, dtype=torch.float64)
    penalty = topk_similarity(keys, queries, 4, metric="cosine").values.mean(1)
    by_hand = topk_similarity(queries, keys, 3, metric="cosine", key_bias=-penalty / 2)
    found = csls_topk(queries, keys, 3, neighbors=4)
    assert torch.equal(found.indices, by_hand.indices)
    of_queries = topk_similarity(queries, keys, 4, metric="cosine").values.mean(1, keepdim=True)
    assert torch.equal(found.values, 2 * by_hand.values - of_queries)


def test_csls_is_undefined_where_too_few_sources_are_numbers():
    queries, keys, _ = make_tables(5, 6, 3)
    keys[4] = NAN
    sources = queries.clone()
    sources[0] = NAN
    found = csls_topk(queries, keys, 6, sources=sources, neighbors=4)
    assert found.indices[:, -1].eq(-1).all() and found.indices[:, :-1].ge(0).all()
    assert not (found.indices == 4).any()
    assert csls_topk(queries, keys, 6, sources=sources, neighbors=5).indices.eq(-1).all()


# Numbers that are none, or large, or small


def test_a_nan_is_never_chosen(blocking):
    """By any metric, of a key, a query or a bias; other rows have the bits that they had."""
    for metric in METRICS:
        queries, keys, bias = make_tables(6, 8, 3)
        bias = None if metric == "l2" else bias
        before = topk_similarity(queries, torch.cat([keys[:2], keys[3:]]), 7, metric=metric)
        keys[2, 1] = NAN
        queries[4, 0] = NAN
        values, indices = topk_similarity(queries, keys, 8, metric=metric)
        assert values[4].isnan().all() and (indices[4] == -1).all()
        others = torch.arange(6) != 4
        assert values[others, 7].isnan().all() and (indices[others, 7] == -1).all()
        assert torch.equal(values[others, :7], before.values[others])
        assert torch.equal(indices[others, :7], before.indices[others] + (before.indices[others] >= 2))
        if bias is not None:
            bias[5] = NAN
            assert not (topk_similarity(queries, keys, 8, metric=metric, key_bias=bias).indices == 5).any()


def test_inf_is_a_score():
    """Of which products have no number with 0; a bias of -inf comes last, and NaN after it."""
    keys, bias = torch.tensor([[INF], [1.0], [-INF], [2.0]]), torch.tensor([0.0, -INF, 0, 0])
    assert_same(
        topk_similarity(torch.tensor([[1.0], [-1.0], [0.0]]), keys, 4, key_bias=bias),
        torch.tensor([[INF, 2, -INF, -INF], [INF, -2, -INF, -INF], [0, -INF, NAN, NAN]]),
        torch.tensor([[0, 3, 1, 2], [2, 3, 0, 1], [3, 1, -1, -1]]),
    )
    found = topk_similarity(torch.tensor([[3.0]]), keys, 4, metric="l2")
    assert_same(found, torch.tensor([[1, 4, INF, INF]]), torch.tensor([[3, 1, 0, 2]]))
    found = topk_similarity(torch.tensor([[3.0]]), keys, 4, metric="cosine")
    assert_same(found, torch.tensor([[1, 1, NAN, NAN]]), torch.tensor([[1, 3, -1, -1]]))


def test_the_cosine_of_zeros_is_zero():
    queries, keys = torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([[-1.0, 0], [0, 0], [1, 0], [0, -0.0]])
    values, indices = topk_similarity(queries, keys, 4, metric="cosine")
    assert values.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]
    assert indices.tolist() == [[0, 1, 2, 3], [2, 1, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_knows_no_scale(dtype):
    """Where squares under- and overflow too; powers of two change no bit."""
    queries, keys, _ = make_tables(5, 9, 4, dtype=dtype)
    expected = topk_similarity(queries, keys, 9, metric="cosine")
    limits = torch.finfo(dtype)
    for scale in (limits.tiny * 2.0**20, 2.0**-70, 2.0**70, limits.max / 2.0**20):
        scale = 2.0 ** round(math.log2(scale))
        scales = torch.tensor([scale, 1.0, scale] * 3, dtype=dtype).unsqueeze(1)
        found = topk_similarity(scale * queries, scales * keys, 9, metric="cosine")
        assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)


def test_close_pairs_lose_no_digits():
    """Far from the origin, where |q|^2 + |k|^2 - 2 q . k has none left."""
    queries, keys, _ = make_tables(4, 6, 3)
    at = 2.0**12
    offsets = (keys * 2.0**6).round() / 2.0**6  # exact at that distance
    near = (queries * 2.0**6).round() / 2.0**6
    found = topk_similarity(near + at, offsets + at, 6, metric="l2")
    expected = topk_similarity(near.double(), offsets.double(), 6, metric="l2")
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(dtype):
    queries, keys, bias = make_tables(6, 20, 5, dtype=dtype)
    for metric, of in itertools.product(METRICS, (None, bias)):
        options = {"metric": metric, "key_bias": None if metric == "l2" else of}
        found = topk_similarity(queries, keys, 5, **options)
        expected = topk_similarity(queries.float(), keys.float(), 5, **options)
        assert found.values.dtype == torch.float32 and found.indices.dtype == torch.int64
        assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "D"), [(1, 7, 300), (3, 50, 300), (7, 101, 17), (20, 257, 65)])
def test_equal_keys_have_equal_scores(n, m, D, dtype):
    """Wherever they lie; those of a matrix product differ in their last bits."""
    queries, keys, _ = make_tables(n, m, D, dtype=dtype)
    for metric in METRICS:
        values, indices = topk_similarity(queries, keys[:1].repeat(m, 1), m, metric=metric)
        assert torch.equal(indices, torch.arange(m).expand(n, m))
        assert torch.equal(values, values[:, :1].expand(n, m))
    found = csls_topk(queries, keys[:1].repeat(m, 1), m, neighbors=n)
    assert torch.equal(found.indices, torch.arange(m).expand(n, m))


# Gradients, and memory


def dense(queries, keys, k, metric, bias):
    """Autograd through all scores."""
    if metric == "cosine":
        queries, keys = (t / t.norm(dim=1, keepdim=True) for t in (queries, keys))
    if metric == "l2":
        return (queries.unsqueeze(1) - keys).square().sum(2).topk(k, largest=False).values
    return (queries @ keys.T + (0 if bias is None else bias)).topk(k).values


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_those_of_all_scores(blocking, metric):
    leaves = [t.requires_grad_() for t in make_tables(7, 11, 4, dtype=torch.float64)]
    leaves = leaves[:2] if metric == "l2" else leaves
    bias = None if metric == "l2" else leaves[2]
    g = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, indices = topk_similarity(*leaves[:2], 3, metric=metric, key_bias=bias)
    assert not indices.requires_grad
    found = torch.autograd.grad(values, leaves, g)
    expected = torch.autograd.grad(dense(*leaves[:2], 3, metric, bias), leaves, g)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric):
    leaves = [t.requires_grad_() for t in make_tables(3, 5, 3, dtype=torch.float64)]
    leaves = leaves[:2] if metric == "l2" else leaves

    def values(queries, keys, bias=None):
        return topk_similarity(queries, keys, 2, metric=metric, key_bias=bias).values

    assert gradcheck(values, leaves) and gradgradcheck(values, leaves, fast_mode=True)


def test_gradcheck_of_csls():
    leaves = [t.requires_grad_() for t in make_tables(4, 5, 3, dtype=torch.float64)[:2]]
    sources = make_tables(6, 1, 3, dtype=torch.float64, seed=1)[0].requires_grad_()
    assert gradcheck(lambda q, k: csls_topk(q, k, 2, neighbors=3).values, leaves)
    assert gradcheck(
        lambda q, k, s: csls_topk(q, k, 2, sources=s, neighbors=3).values, [*leaves, sources], fast_mode=True
    )


def test_a_nan_passes_no_gradient_on(blocking):
    """To another query or key than its own; zeros have none from their cosine."""
    for metric in METRICS:
        queries, keys, bias = make_tables(5, 6, 3)
        queries[1], keys[0, 2], keys[4] = NAN, NAN, INF
        queries[2] = 0
        leaves = [t.requires_grad_() for t in (queries, keys, bias)]
        options = {} if metric == "l2" else {"key_bias": bias}
        values, indices = topk_similarity(queries, keys, 4, metric=metric, **options)
        assert (indices[1] == -1).all()
        finite = values.isfinite().any(1)
        values[finite][:, :2].clamp(-1e9, 1e9).sum().backward()
        assert queries.grad[[0, 3]].isfinite().all() and keys.grad[[1, 2, 3, 5]].isfinite().all()
        assert not queries.grad[1].any() and not keys.grad[0].any()
        if metric == "cosine":
            assert not queries.grad[2].any()
        assert metric == "l2" or leaves[2].grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.itemsize)
        return results


@pytest.mark.parametrize("metric", METRICS)
def test_there_is_no_matrix_of_all_scores(monkeypatch, metric):
    monkeypatch.setattr(module, "SCORES", 1000)
    queries, keys, _ = make_tables(150, 500, 2)
    with Largest() as largest:
        topk_similarity(queries, keys, 3, metric=metric)
    assert largest.elements <= 1000


# What tests ask: honest ways pass, planted faults do not


def honest(queries, keys, k, metric, bias):
    return topk_similarity(queries, keys, k, metric=metric, key_bias=bias)


def by_products(queries, keys, k, metric, bias):
    """A matrix product, and its own values."""
    if metric == "cosine":
        queries, keys = (torch.nn.functional.normalize(t) for t in (queries, keys))
    if metric == "l2":
        scores = -torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        scores = queries @ keys.T + bias
    indices = scores.argsort(dim=1, stable=True, descending=True)[:, :k]
    values = scores.gather(1, indices)
    return TopK(-values if metric == "l2" else values, indices)


def off(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k, metric, bias)
    return TopK(values * (1 + 1e-4), indices)


def one_value_off(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k, metric, bias)
    values[-1, -1] *= 1 - 1e-4 if metric != "l2" and values[-1, -1] > 0 else 1 + 1e-4
    return TopK(values, indices)


def one_index_off(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k, metric, bias)
    indices[0, 0] = (indices[0, 0] + 1) % len(keys)
    return TopK(values, indices)


def best_left_out(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k + 1, metric, bias)
    return TopK(values[:, 1:], indices[:, 1:])


def last_left_out(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k + 1, metric, bias)
    keep = torch.arange(k + 1) != k - 1
    return TopK(values[:, keep], indices[:, keep])


def twice(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, k, metric, bias)
    return TopK(values[:, [0, *range(k - 1)]], indices[:, [0, *range(k - 1)]])


def backwards(queries, keys, k, metric, bias):
    return TopK(*(t.flip(1) for t in honest(queries, keys, k, metric, bias)))


def other_end(queries, keys, k, metric, bias):
    values, indices = honest(queries, keys, len(keys), metric, bias)
    return TopK(values[:, -k:], indices[:, -k:])


def bias_forgotten(queries, keys, k, metric, bias):
    return honest(queries, keys, k, metric, None)


def last_key_forgotten(queries, keys, k, metric, bias):
    bias = None if bias is None else bias[:-1]
    return honest(queries, keys[:-1], k, metric, bias)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("way", [honest, by_products])
def test_the_check_accepts(way, metric):
    for dtype in (torch.float32, torch.float64):
        queries, keys, bias = make_tables(40, 60, 30, dtype=dtype)
        bias = None if metric == "l2" else bias
        expected = expected_scores(queries, keys, metric=metric, key_bias=bias)
        assert_chosen(way(queries, keys, 6, metric, bias), expected, 6, least=metric == "l2")
        if dtype == torch.float32:  # tables in single precision, ranked in double
            found = way(queries.double(), keys.double(), 6, metric, None if bias is None else bias.double())
            assert_chosen(TopK(found.values.float(), found.indices), expected, 6, least=metric == "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off, "values: "),
        (one_value_off, "values: "),
        (one_index_off, "values: "),
        (best_left_out, "indices: key "),
        (last_left_out, "indices: key "),
        (twice, "indices: "),
        (backwards, "values: not in order"),
        (other_end, "indices: key "),
        (bias_forgotten, "values: "),
        (last_key_forgotten, "indices: key "),
    ],
)
def test_the_check_rejects(fault, message, metric):
    if metric == "l2" and fault is bias_forgotten:
        return
    queries, keys, bias = make_tables(40, 60, 30)
    keys[-1], bias[-1] = queries[0], 2.0
    bias = None if metric == "l2" else bias
    expected = expected_scores(queries, keys, metric=metric, key_bias=bias)
    with pytest.raises(AssertionError, match=f"^{message}"):
        assert_chosen(fault(queries, keys, 6, metric, bias), expected, 6, least=metric == "l2")


def test_the_check_rejects_ties_in_another_order():
    queries, keys, _ = make_tables(3, 9, 2, repeated=True)
    keys[5] = keys[2]
    values, indices = topk_similarity(queries, keys, 9)
    assert_lower_of_equal_keys(TopK(values, indices), keys)
    swapped = torch.where(indices == 2, 5, torch.where(indices == 5, 2, indices))
    with pytest.raises(AssertionError, match="are equal"):
        assert_lower_of_equal_keys(TopK(values, swapped), keys)
    with pytest.raises(AssertionError, match="of equal values the lower index must be first"):
        assert_chosen(TopK(values, swapped), expected_scores(queries, keys), 9)


def test_the_check_rejects_a_nan_that_is_chosen():
    queries, keys, _ = make_tables(3, 9, 2)
    keys[4] = NAN
    found = topk_similarity(queries, keys, 9)
    expected = expected_scores(queries, keys)
    assert_chosen(found, expected, 9)
    for wrong in (
        TopK(found.values, found.indices.masked_fill(found.indices == -1, 4)),
        TopK(found.values.nan_to_num(nan=-9.0), found.indices),
        TopK(found.values.flip(1), found.indices.flip(1)),
    ):
        with pytest.raises(AssertionError, match="NaN and -1 must stand"):
            assert_chosen(wrong, expected, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_check_of_csls(dtype):
    queries, keys, _ = make_tables(40, 60, 30, dtype=dtype)
    expected = expected_csls(queries, keys, neighbors=5)
    assert_chosen(csls_topk(queries, keys, 6, neighbors=5), expected, 6)
    for wrong in (
        csls_topk(queries, keys, 6, neighbors=4),
        csls_topk(queries, keys, 6, sources=queries[:-1], neighbors=5),
        topk_similarity(queries, keys, 6, metric="cosine"),
    ):
        with pytest.raises(AssertionError, match=r"^(values|indices): "):
            assert_chosen(wrong, expected, 6)
