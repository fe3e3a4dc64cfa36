"""ops.topk_similarity and ops.csls_topk: choices against float64, ties, gradients, strides, NaN."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastkit import ops, reference
from fastkit.ops import csls_topk, topk_similarity
from fastkit.ops.topk_similarity import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.topk_similarity import (
    assert_chosen,
    assert_lower_of_equal_keys,
    expected_csls,
    expected_scores,
    make_tables,
)

autograd = importlib.import_module("fastkit.ops.topk_similarity_autograd")

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

METRICS = "dot", "cosine", "l2"
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = math.nan

# n, m, D, k: none, one, around vectors (8, 16) and tiles, k up to m.
SIZES = [
    (0, 3, 2, 2), (1, 1, 1, 1), (1, 2, 3, 2), (2, 5, 1, 3), (3, 7, 2, 7), (1, 33, 4, 10), (5, 8, 7, 8),
    (7, 15, 16, 15), (8, 16, 5, 4), (9, 17, 33, 17), (16, 31, 3, 10), (17, 64, 8, 64), (33, 65, 15, 5),
    (31, 129, 2, 33), (65, 257, 10, 10), (3, 1000, 4, 100), (130, 40, 6, 1),
]  # fmt: skip


def options_of(metric, bias):
    return {"metric": metric, "key_bias": None if metric == "l2" else bias}


@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "D", "k"), SIZES)
def test_chooses_the_nearest(kernel, n, m, D, k, metric, repeated):
    """With and without a bias; of keys that are repeated, the first ones."""
    for dtype in DTYPES[:2]:
        queries, keys, bias = make_tables(n, m, D, dtype=dtype, repeated=repeated)
        for of in (None, bias):
            options = options_of(metric, of)
            found = topk_similarity(queries, keys, k, impl=kernel, **options)
            expected = expected_scores(queries, keys, **options)
            assert found.values.dtype == dtype
            assert_chosen(found, expected, k, least=metric == "l2")
            assert_lower_of_equal_keys(found, keys, options["key_bias"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision(impl, dtype, metric):
    """Scores are those of the numbers as they are, in float32; a bias may be in either dtype."""
    queries, keys, bias = make_tables(33, 65, 15, dtype=dtype)
    for of in (None, bias, bias.to(dtype)):
        options = options_of(metric, of)
        found = topk_similarity(queries, keys, 7, impl=impl, **options)
        assert found.values.dtype == torch.float32
        assert_chosen(found, expected_scores(queries, keys, **options), 7, least=metric == "l2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neighbors", [1, 10, 17])
def test_csls(impl, neighbors, dtype):
    queries, keys, _ = make_tables(33, 17, 12, dtype=dtype, repeated=True)
    sources = make_tables(50, 1, 12, dtype=dtype, seed=1)[0]
    for of in (None, sources):
        found = csls_topk(queries, keys, 6, sources=of, neighbors=neighbors, impl=impl)
        assert_chosen(found, expected_csls(queries, keys, sources=of, neighbors=neighbors), 6)
        assert_lower_of_equal_keys(found, keys)


def test_csls_of_few_rows(impl):
    """One of each; none is chosen for no query, of which sources must be given."""
    one, keys, _ = make_tables(1, 3, 2)
    found = csls_topk(one, keys[:1], 1, neighbors=1, impl=impl)
    assert found.indices.tolist() == [[0]] and found.values.abs().max() < 1e-6  # 2 cos - cos - cos
    found = csls_topk(one[:0], keys, 2, sources=one, neighbors=1, impl=impl)
    assert found.values.shape == found.indices.shape == (0, 2)


def test_the_default_is_ten_neighbors_and_products(impl):
    queries, keys, _ = make_tables(12, 30, 5)
    for found, expected in (
        (csls_topk(queries, keys, 2, impl=impl), csls_topk(queries, keys, 2, neighbors=10, impl=impl)),
        (csls_topk(queries, keys, 2, impl=impl), csls_topk(queries, keys, 2, sources=queries, impl=impl)),
        (
            topk_similarity(queries, keys, 2, impl=impl),
            topk_similarity(queries, keys, 2, metric="dot", impl=impl),
        ),
    ):
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# Ties


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_ties_of_small_integers(impl, metric):
    """Exact in any order of summation: the choice is that of a stable sort."""
    for n, m, D, k in ((5, 40, 1, 7), (9, 300, 2, 20), (70, 90, 3, 90), (3, 2000, 2, 50)):
        generator = torch.Generator(torch.get_default_device()).manual_seed(n)
        queries, keys, bias = (
            torch.randint(-2, 3, s, generator=generator).float() for s in ((n, D), (m, D), (m,))
        )
        if metric == "l2":
            scores = (queries.unsqueeze(1) - keys).square().sum(2)
        else:
            scores = -(queries @ keys.T + bias)
        expected = scores.argsort(dim=1, stable=True)[:, :k]
        values, indices = topk_similarity(queries, keys, k, impl=impl, **options_of(metric, bias))
        assert torch.equal(indices, expected)
        assert torch.equal(values, scores.gather(1, expected) * (1 if metric == "l2" else -1))


@pytest.mark.parametrize("metric", METRICS)
def test_all_keys_are_equal(impl, metric):
    """The first k are chosen, whatever the sum of products rounds to."""
    for n, m, D in ((1, 7, 300), (5, 50, 77), (70, 130, 33)):
        queries, keys, _ = make_tables(n, 1, D)
        found = topk_similarity(queries, keys.expand(m, D), 6, metric=metric, impl=impl)
        assert torch.equal(found.indices, torch.arange(6).expand(n, 6))
        assert torch.equal(found.values, found.values[:, :1].expand(n, 6))


def test_zeros_and_negative_zeros_are_equal(impl):
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]])
    for queries in (torch.tensor([[1.0]]), torch.tensor([[-1.0]]), torch.tensor([[0.0]])):
        for metric in METRICS:
            found = topk_similarity(queries, keys, 4, metric=metric, impl=impl)
            assert found.indices.tolist() == [[0, 1, 2, 3]]


# What is no number


@pytest.mark.parametrize("metric", METRICS)
def test_nan(impl, metric):
    """In the first and last key and query, in many, in all; of these nothing is chosen."""
    clean_queries, clean_keys, bias = make_tables(20, 37, 5)
    for bad_queries, bad_keys in (
        ([0], []), ([], [0]), ([19], [36]), ([3, 4, 5], list(range(1, 36))), ([], list(range(37))),
    ):  # fmt: skip
        queries, keys = clean_queries.clone(), clean_keys.clone()
        queries[bad_queries, -1] = NAN
        keys[bad_keys, 2] = NAN
        options = options_of(metric, bias)
        for k in (1, 5, 37):
            found = topk_similarity(queries, keys, k, impl=impl, **options)
            assert_chosen(found, expected_scores(queries, keys, **options), k, least=metric == "l2")
    if metric != "l2":
        bias[[0, 7]] = NAN
        found = topk_similarity(clean_queries, clean_keys, 37, impl=impl, **options_of(metric, bias))
        assert found.indices[:, -2:].eq(-1).all()
        assert not torch.isin(found.indices, torch.tensor([0, 7])).any()


def test_nan_in_csls(impl):
    """A query's stays with it; that of a key too."""
    queries, keys, _ = make_tables(20, 15, 4)
    sources = queries.clone()
    expected = csls_topk(queries, keys[:14], 14, sources=sources, impl=impl)
    queries[3, 0], keys[14, 1] = NAN, NAN
    found = csls_topk(queries, keys, 15, sources=sources, impl=impl)
    assert found.indices[3].eq(-1).all() and found.values[3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(found.indices[others, :14], expected.indices[others])
    assert torch.equal(found.values[others, :14], expected.values[others])
    assert found.indices[:, 14].eq(-1).all()


def test_csls_of_too_few_keys_that_are_numbers(impl):
    """A query's mean is of `neighbors` keys: where these are not there, nothing is chosen for it."""
    queries, keys, _ = make_tables(6, 5, 4)
    keys[2, 1] = NAN
    found = csls_topk(queries, keys, 3, neighbors=5, impl=impl)
    assert found.indices.eq(-1).all() and found.values.isnan().all()


def test_a_bias_of_minus_infinity_comes_last(impl):
    queries, keys, bias = make_tables(4, 9, 3)
    bias[::2] = -math.inf
    found = topk_similarity(queries, keys, 9, key_bias=bias, impl=impl)
    assert (found.indices[:, :4] % 2 == 1).all()
    assert torch.equal(found.indices[:, 4:], torch.tensor([0, 2, 4, 6, 8]).expand(4, 5))
    assert (found.values[:, 4:] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cosine_of_zeros_and_of_any_scale(impl, dtype):
    queries, keys, _ = make_tables(6, 9, 4, dtype=dtype)
    queries[2] = 0
    keys[5] = 0
    found = topk_similarity(queries, keys, 9, metric="cosine", impl=impl)
    assert not found.values[2].any() and torch.equal(found.indices[2], torch.arange(9))
    assert (found.values[found.indices == 5] == 0).all()
    scale = 2.0 ** {torch.float16: 10, torch.float64: 900}.get(dtype, 100)
    for of in (scale, 1 / scale):
        scaled = topk_similarity(queries * of, keys, 9, metric="cosine", impl=impl)
        assert (
            torch.equal(scaled.indices, found.indices) or dtype == torch.float16
        )  # where some are subnormal
        assert torch.allclose(scaled.values, found.values, rtol=0, atol=1e-2 if dtype == torch.float16 else 0)


# Strides


@pytest.mark.parametrize("metric", METRICS)
def test_any_strides(impl, metric):
    """The bits of dense tables; arguments are left as they are."""
    queries, keys, bias = make_tables(9, 20, 6)
    options = options_of(metric, bias)
    expected = topk_similarity(queries, keys, 5, impl=impl, **options)
    padded = torch.full((20, 17), NAN)
    padded[:, 4:16:2] = keys
    for q, k, b in (
        (queries.T.contiguous().T, keys.T.contiguous().T, bias),
        (queries.repeat_interleave(2, 0)[::2], padded[:, 4:16:2], bias.repeat_interleave(3)[::3]),
        (queries.flip(0).flip(0), keys.unsqueeze(1).expand(20, 3, 6)[:, 1], bias),
    ):
        before = q.clone(), k.clone(), b.clone()
        found = topk_similarity(q, k, 5, impl=impl, **options_of(metric, b))
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
        assert all(torch.equal(t, old) for t, old in zip((q, k, b), before, strict=True))
    found = topk_similarity(queries[:1].expand(4, 6), keys, 5, impl=impl, **options)
    assert torch.equal(found.indices, expected.indices[:1].expand(4, 5))


def test_memory_mapped_keys(tmp_path):
    """On a CPU: they are read as they are, and not written to."""
    queries, keys, _ = make_tables(5, 40, 6)
    np.save(tmp_path / "keys.npy", keys.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "keys.npy", mmap_mode="c"))
    for metric in METRICS:
        found = topk_similarity(queries, mapped, 4, metric=metric)
        expected = topk_similarity(queries, keys, 4, metric=metric)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    found, expected = csls_topk(queries, mapped, 4, neighbors=5), csls_topk(queries, keys, 4, neighbors=5)
    assert torch.equal(found.values, expected.values)
    assert np.array_equal(np.load(tmp_path / "keys.npy"), keys.numpy())


# Gradients


def leaves_of(metric, n=4, m=7, D=3, dtype=torch.float64):
    tables = make_tables(n, m, D, dtype=dtype)
    return [t.requires_grad_() for t in (tables[:2] if metric == "l2" else tables)]


def values_of(op, metric, k, **options):
    def values(queries, keys, bias=None):
        return op(queries, keys, k, metric=metric, key_bias=bias, **options).values

    return values


@pytest.fixture(params=[1, None], ids=["by-query", "at-once"])
def blocks(request, monkeypatch):
    """Of backward."""
    if request.param is not None:
        monkeypatch.setattr(autograd, "_NUMBERS", request.param)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(kernel, blocks, metric):
    values = values_of(topk_similarity, metric, 3, impl=kernel)
    assert gradcheck(values, leaves_of(metric))
    assert gradgradcheck(values, leaves_of(metric), fast_mode=True)


@pytest.mark.parametrize("apart", [False, True], ids=["queries", "sources"])
def test_gradcheck_of_csls(kernel, blocks, apart):
    leaves = leaves_of("l2")
    leaves += [make_tables(6, 1, 3, dtype=torch.float64, seed=1)[0].requires_grad_()] if apart else []

    def values(queries, keys, sources=None):
        return csls_topk(queries, keys, 2, sources=sources, neighbors=3, impl=kernel).values

    assert gradcheck(values, leaves)
    assert gradgradcheck(values, leaves, fast_mode=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_reference_s(impl, blocks, dtype, metric):
    """Which are autograd's, through the sums of the chosen pairs; each leaf has one in its own dtype."""
    leaves = leaves_of(metric, 12, 9, 5, dtype)
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    g = torch.randn(12, 4, generator=generator).to(torch.promote_types(dtype, torch.float32))
    found = torch.autograd.grad(values_of(topk_similarity, metric, 4, impl=impl)(*leaves), leaves, g)
    expected = torch.autograd.grad(values_of(reference.topk_similarity, metric, 4)(*leaves), leaves, g)
    for one, other, leaf in zip(found, expected, leaves, strict=True):
        assert one.dtype == leaf.dtype
        tolerance = 8 * torch.finfo(leaf.dtype).eps * other.abs().max().item()
        assert torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_needs_no_gradient_has_none(impl, needed):
    everything = leaves_of("dot")
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(everything)]
    values = values_of(topk_similarity, "dot", 3, impl=impl)
    values(*leaves).square().sum().backward()
    values(*everything).square().sum().backward()
    for i, (leaf, whole) in enumerate(zip(leaves, everything, strict=True)):
        assert torch.equal(leaf.grad, whole.grad) if i in needed else leaf.grad is None


def test_indices_have_no_gradient(impl):
    queries, keys, bias = leaves_of("dot")
    values, indices = topk_similarity(queries, keys, 2, key_bias=bias, impl=impl)
    assert values.requires_grad and not indices.requires_grad
    values, indices = csls_topk(queries, keys, 2, neighbors=2, impl=impl)
    assert values.requires_grad and not indices.requires_grad
    with torch.no_grad():
        assert not topk_similarity(queries, keys, 2, impl=impl).values.requires_grad


def test_no_query_has_no_gradient(impl):
    queries, keys, bias = leaves_of("dot", n=0)
    topk_similarity(queries, keys, 2, key_bias=bias, impl=impl).values.sum().backward()
    assert queries.grad.shape == (0, 3) and not keys.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_nan_passes_no_gradient_on(impl, blocks, metric):
    """A query of NaN has -1 in place of keys, of which none is the first."""
    queries, keys, bias = make_tables(6, 8, 3)
    queries[2, 1], keys[5] = NAN, NAN
    leaves = [t.requires_grad_() for t in (queries, keys, bias)]
    values, _ = topk_similarity(queries, keys, 8, impl=impl, **options_of(metric, bias))
    values.nan_to_num(nan=0.0).sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in leaves)
    assert not queries.grad[2].any() and not keys.grad[5].any()


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
def test_backward_has_no_tensor_of_all_chosen_keys(impl, monkeypatch, metric):
    monkeypatch.setattr(autograd, "_NUMBERS", 100)
    leaves = leaves_of(metric, 30, 40, 4)
    values = values_of(topk_similarity, metric, 5, impl=impl)(*leaves)
    with Largest() as largest:
        values.sum().backward()
    assert largest.elements <= 160  # the keys; n k D = 600, n m = 1200


# Autocast, compilation, devices


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_ranks_in_float32(impl, metric):
    """What is lowered elsewhere is raised, and may meet what was not."""
    queries, keys, bias = make_tables(9, 20, 6)
    options = options_of(metric, bias)
    device = queries.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        found = topk_similarity(queries, keys, 5, impl=impl, **options)
        of_half = topk_similarity(queries.bfloat16(), keys, 5, impl=impl, **options)
        csls = csls_topk(queries.bfloat16(), keys, 5, sources=queries.bfloat16(), neighbors=4, impl=impl)
        doubled = topk_similarity(queries.double(), keys.double(), 5, metric=metric, impl=impl)
    expected = topk_similarity(queries, keys, 5, impl=impl, **options)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    rounded = queries.bfloat16().float()
    assert torch.equal(of_half.values, topk_similarity(rounded, keys, 5, impl=impl, **options).values)
    assert torch.equal(csls.values, csls_topk(rounded, keys, 5, neighbors=4, impl=impl).values)
    assert doubled.values.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(impl):
    """Indices too; gradients are in the contract's table."""
    queries, keys, bias = make_tables(5, 9, 3, repeated=True)

    def both(queries, keys, bias):
        found = topk_similarity(queries, keys, 4, key_bias=bias, impl=impl)
        return *found, *csls_topk(queries, keys, 4, neighbors=3, impl=impl)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(queries, keys, bias), both(queries, keys, bias), strict=True):
        assert torch.equal(one, other)


def test_the_meta_device_has_shapes():
    queries, keys, bias = (t.to("meta") for t in make_tables(5, 9, 3))
    for metric in METRICS:
        found = topk_similarity(queries.requires_grad_(), keys, 4, **options_of(metric, bias))
        assert found.values.shape == found.indices.shape == (5, 4)
        assert found.values.device.type == "meta" and found.indices.dtype == torch.int64
        (gradient,) = torch.autograd.grad(found.values.sum(), queries)
        assert gradient.shape == (5, 3)
    assert csls_topk(queries, keys, 4, neighbors=2).values.shape == (5, 4)


def test_the_result_is_named(impl):
    found = topk_similarity(*make_tables(2, 3, 1)[:2], 1, impl=impl)
    assert type(found) is ops.TopK and found._fields == ("values", "indices")
    assert type(csls_topk(*make_tables(2, 3, 1)[:2], 1, neighbors=1, impl=impl)) is ops.TopK
