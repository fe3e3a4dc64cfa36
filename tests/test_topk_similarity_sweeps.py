"""The CPU kernel of topk_similarity: borders of sweeps, equal keys, threads, both lists, raw calls.

A sweep leads up to 2048 queries past the keys, fewer where they have many columns or long lists. Threads
share the queries, or, where these are few, the keys.
"""

import math

import pytest
import torch
from torch.library import opcheck

from fastkit._threads import threads
from fastkit.ops import TopK, csls_topk, topk_similarity
from fastkit.ops.topk_similarity import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.topk_similarity import (
    assert_chosen,
    assert_lower_of_equal_keys,
    expected_scores,
    make_tables,
)

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("native", "one_thread")]

RAW = torch.ops.fastkit
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def both_lists(queries, keys, k):
    values, indices, key_values, key_indices = RAW.topk_similarity_both_fwd(queries, keys, k)
    return TopK(values, indices), TopK(key_values, key_indices)


def each_list(queries, keys, k):
    return (
        topk_similarity(queries, keys, k, impl="cpu"),
        topk_similarity(keys, queries, k, impl="cpu"),
    )


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) or (
            one.is_floating_point() and torch.equal(one.isnan(), other.isnan())
        )
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# Sweeps


@pytest.mark.parametrize(("metric", "repeated"), [("dot", False), ("dot", True), ("l2", False), ("l2", True)])
@pytest.mark.parametrize(
    ("n", "m", "D", "k"), [(2047, 2049, 3, 10), (2048, 2048, 5, 3), (2049, 6200, 2, 33), (4097, 300, 4, 300)]
)
def test_over_the_borders_of_sweeps(n, m, D, k, metric, repeated):
    check_sweeps(n, m, D, k, metric, repeated)


@pytest.mark.parametrize(("metric", "repeated"), [("dot", True), ("l2", False)])
@pytest.mark.parametrize(("n", "m", "D", "k"), [(1100, 2100, 2, 2100), (5, 270_000, 8, 7)])
def test_all_keys_and_many_keys(n, m, D, k, metric, repeated):
    check_sweeps(n, m, D, k, metric, repeated)


def check_sweeps(n, m, D, k, metric, repeated):
    queries, keys, bias = make_tables(n, m, D, repeated=repeated)
    options = {"metric": metric, "key_bias": bias if metric == "dot" else None}
    found = topk_similarity(queries, keys, k, impl="cpu", **options)
    some = torch.cat([torch.arange(0, n, 1 + n // 10), torch.arange(n)[2044:2054], torch.tensor([n - 1])])
    part = TopK(found.values[some], found.indices[some])
    expected = expected_scores(queries[some], keys, **options)
    assert_chosen(part, expected, k, least=metric == "l2")
    assert_lower_of_equal_keys(part, keys, options["key_bias"], least=metric == "l2")
    assert_same(topk_similarity(queries[some], keys, k, impl="cpu", **options), part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "D", "k"),
    [(1, 1, 1, 1), (7, 300, 5, 7), (300, 7, 5, 3), (2050, 2100, 3, 10), (2100, 4200, 2, 40)],
)
def test_both_lists_are_those_of_two_calls(n, m, D, k, dtype):
    """Bit for bit, in whichever table there are more rows."""
    queries, keys, _ = make_tables(n, m, D, dtype=dtype, repeated=True)
    for one, other in zip(both_lists(queries, keys, k), each_list(queries, keys, k), strict=True):
        assert_same(one, other)


def test_both_lists_of_any_strides():
    queries, keys, _ = make_tables(40, 30, 6)
    expected = both_lists(queries, keys, 4)
    for q, x in (
        (queries.T.contiguous().T, torch.cat([keys, keys], 1)[:, :6]),
        (queries.repeat_interleave(2, 1)[:, ::2], keys.repeat_interleave(3, 0)[::3]),
    ):
        for one, other in zip(both_lists(q, x, 4), expected, strict=True):
            assert_same(one, other)
    for one, other in zip(
        both_lists(queries[:1].expand(9, 6), keys, 4),
        each_list(queries[:1].expand(9, 6), keys, 4),
        strict=True,
    ):
        assert_same(one, other)


@pytest.mark.slow
def test_more_pairs_than_32_bits_count():
    """The nearest is planted: row i of the keys is row i of the queries."""
    n, m = 70_000, 40_000  # n m = 2.8e9
    angles = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    queries = torch.stack([angles.cos(), angles.sin()], 1)
    of_rows, of_columns = both_lists(queries, queries[:m].contiguous(), 1)
    assert torch.equal(of_rows.indices[:m, 0], torch.arange(m))
    assert torch.equal(of_columns.indices[:, 0], torch.arange(m))
    nearest_end = torch.where(torch.arange(m, n) < (n + m - 1) / 2, m - 1, 0)
    assert torch.equal(of_rows.indices[m:, 0], nearest_end)


# Threads, modes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    queries, keys, bias = make_tables(2300, 2500, 21, dtype=dtype, repeated=True)

    def everything():
        return [
            *topk_similarity(queries, keys, 12, key_bias=bias, impl="cpu"),
            *topk_similarity(queries, keys, 12, metric="l2", impl="cpu"),
            *csls_topk(queries, keys, 12, impl="cpu"),
            *both_lists(queries, keys, 12)[0],
            *both_lists(queries, keys, 12)[1],
        ]

    alone = everything()
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(one, other) for one, other in zip(everything(), alone, strict=True))


@pytest.mark.parametrize(
    ("n", "m", "D", "k"),
    [
        (1, 513, 600, 9), (5, 1500, 64, 30), (60, 65, 700, 60), (100, 150, 200, 10), (150, 100, 200, 10),
        (400, 330, 40, 4), (20, 9000, 33, 1),
    ],
)  # fmt: skip
def test_threads_that_share_the_keys_or_have_none_change_no_bit(n, m, D, k):
    queries, keys, bias = make_tables(n, m, D, repeated=True)
    keys[m // 2, 0] = math.nan

    def everything():
        return [
            *topk_similarity(queries, keys, k, key_bias=bias, impl="cpu"),
            *topk_similarity(queries, keys, k, metric="l2", impl="cpu"),
            *both_lists(queries, keys, min(n, m, k))[0],
            *both_lists(queries, keys, min(n, m, k))[1],
        ]

    alone = everything()
    for count in (2, 3, 7, 13):
        with threads(count):
            for one, other in zip(everything(), alone, strict=True):
                assert torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))


def test_ten_calls_have_the_same_bits():
    queries, keys, _ = make_tables(300, 2500, 33)
    with threads(2):
        first = topk_similarity(queries, keys, 10, impl="cpu")
        for _ in range(10):
            assert_same(topk_similarity(queries, keys, 10, impl="cpu"), first)


def test_numbers_that_would_be_subnormal_count():
    """Whatever the thread's mode; compared outside of it, where they are not equal to zero."""
    queries, keys, _ = make_tables(300, 2500, 64, repeated=True)
    queries[:150] *= 1e-25
    keys *= 1e-17  # products are subnormal

    def everything():
        distances = topk_similarity(queries, keys, 10, metric="l2", impl="cpu")
        return [*both_lists(queries, keys, 10), topk_similarity(queries, keys, 10, impl="cpu"), distances]

    expected = everything()
    assert expected[0].values[:150].count_nonzero() > 0
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU has no such mode")
        found = everything()
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


# Equal and nearly equal keys


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_equal_keys_than_a_list_has_room_for(dtype, metric):
    """200 of each of 10 keys, which all tie: the first k are right."""
    queries, keys, bias = make_tables(30, 10, 77, dtype=dtype)
    options = {} if metric == "l2" else {"key_bias": bias.repeat(200)}
    found = topk_similarity(queries, keys.repeat(200, 1), 10, metric=metric, impl="cpu", **options)
    assert_lower_of_equal_keys(found, keys.repeat(200, 1), options.get("key_bias"))
    assert torch.equal(found.values, found.values[:, :1].expand(30, 10))
    for k in (10, 11, 250):
        one, other = (
            both_lists(queries.repeat(9, 1), keys.repeat(200, 1), k),
            each_list(queries.repeat(9, 1), keys.repeat(200, 1), k),
        )
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_keys_that_rounding_cannot_tell_apart(metric):
    """3000 copies of a key, each off by an ulp here and there."""
    queries, keys, _ = make_tables(20, 1, 300)
    generator = torch.Generator().manual_seed(1)
    near = keys * (1 + torch.randint(-1, 2, (3000, 300), generator=generator) * 2.0**-23)
    found = topk_similarity(queries, near, 10, metric=metric, impl="cpu")
    assert_chosen(found, expected_scores(queries, near, metric=metric), 10, least=metric == "l2")
    at = torch.randperm(3000, generator=generator)
    moved = topk_similarity(queries, near[at], 10, metric=metric, impl="cpu")
    assert torch.equal(moved.values, found.values)


def test_distances_far_from_the_origin():
    """Where |q|^2 - 2 q . x + |x|^2 has no digit right."""
    queries, keys, _ = make_tables(50, 2500, 20)
    queries, keys = 5000 + queries, 5000 + keys
    found = topk_similarity(queries, keys, 10, metric="l2", impl="cpu")
    assert_chosen(found, expected_scores(queries, keys, metric="l2"), 10, least=True)


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_huge_and_tiny_rows(dtype, metric):
    """Products that overflow, or vanish, are those of their pair."""
    huge = 1e19 if dtype == torch.float32 else 1e154
    queries, keys, _ = make_tables(20, 2500, 9, dtype=dtype)
    for of_queries, of_keys in (
        (huge, 1),
        (1, huge),
        (huge / 40, huge / 40),
        (1 / huge, 1 / huge),
        (1 / huge, 1),
    ):
        q, x = queries * of_queries, keys * of_keys
        found = topk_similarity(q, x, 10, metric=metric, impl="cpu")
        if metric == "dot" and of_queries * of_keys > 1e-30:
            scaled = TopK(found.values / of_queries / of_keys, found.indices)
            oracle = expected_scores(q / of_queries, x / of_keys)
            assert_chosen(scaled, oracle._replace(budget=2 * oracle.budget), 10)
        alone = topk_similarity(q[3:4], x, 10, metric=metric, impl="cpu")
        assert_same(alone, TopK(found.values[3:4], found.indices[3:4]))
        at = torch.arange(2499, -1, -1)
        moved = topk_similarity(q, x[at], 10, metric=metric, impl="cpu")
        assert torch.equal(moved.values, found.values)
    x = keys.clone()
    x[1000] *= 4 * huge * huge  # inf here and there
    assert x[1000].isinf().any()
    expected = expected_scores(queries, x, metric=metric)
    assert_chosen(
        topk_similarity(queries, x, 10, metric=metric, impl="cpu"), expected, 10, least=metric == "l2"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_elements(dtype):
    """They make a score inf, -inf or NaN, as its sum has it; in both lists, and by distance."""
    queries, keys, bias = make_tables(30, 2200, 6, dtype=dtype)
    queries[3, 2], queries[4, :2], queries[5, 0] = math.inf, torch.tensor([math.inf, -math.inf]), -math.inf
    keys[::3, 1], keys[::5, 4], keys[7, 0] = math.inf, -math.inf, math.nan
    keys[9, 2], keys[12, 2] = 0, 0  # inf * 0
    bias[::11], bias[100] = -math.inf, math.inf
    for metric, options in (("dot", {}), ("dot", {"key_bias": bias}), ("l2", {})):
        expected = expected_scores(queries, keys, metric=metric, **options)
        for k in (1, 10, 1500, 2200):
            found = topk_similarity(queries, keys, k, metric=metric, impl="cpu", **options)
            assert_chosen(found, expected, k, least=metric == "l2")
    for k in (3, 30):
        for one, other in zip(both_lists(queries, keys, k), each_list(queries, keys, k), strict=True):
            assert_same(one, other)


def test_a_table_of_zeros():
    """Everything ties at 0."""
    for n, m in ((3, 5000), (2100, 2100)):
        zeros = torch.zeros(n, 4), torch.zeros(m, 4)
        for metric in ("dot", "cosine", "l2"):
            values, indices = topk_similarity(*zeros, 9, metric=metric, impl="cpu")
            assert not values.any() and torch.equal(indices, torch.arange(9).expand(n, 9))
    for found in both_lists(torch.zeros(2100, 4), torch.zeros(2200, 4), 9):
        assert not found.values.any()
        assert torch.equal(found.indices, torch.arange(9).expand(len(found.indices), 9))


def test_most_keys_are_no_numbers():
    """Distances of inf are chosen last, NaN never, and the few others are found."""
    queries, keys, _ = make_tables(9, 4500, 5)
    bad = torch.arange(4500) % 900 != 7
    keys[bad] = math.nan
    keys[bad.nonzero().flatten()[::2], 3] = math.inf
    keys[100] = math.inf
    for metric in ("dot", "l2"):
        for k in (3, 10, 4500):
            found = topk_similarity(queries, keys, k, metric=metric, impl="cpu")
            assert_chosen(found, expected_scores(queries, keys, metric=metric), k, least=metric == "l2")


@pytest.mark.slow
def test_memory_of_both_lists(run_script):
    """No (n, m) matrix, which would be 40 GB."""
    done = run_script("""if True:
        import resource, torch
        from fastkit import ops
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch.set_num_threads(4)
        queries, keys = torch.randn(200_000, 16), torch.randn(50_000, 16)
        torch.ops.fastkit.topk_similarity_both_fwd(queries[:99], keys[:99], 10)
        before = peak()
        torch.ops.fastkit.topk_similarity_both_fwd(queries, keys, 10)
        print(peak() - before)
    """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**29


# Instruction sets


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        from fastkit.ops import topk_similarity
        from fastkit.testing.topk_similarity import assert_chosen, expected_scores, make_tables
        both = torch.ops.fastkit.topk_similarity_both_fwd
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for n, m, D in ((1, 1, 1), (7, 17, 3), (13, 33, 16), (20, 70, 33), (33, 65, 9)):
                queries, keys, bias = make_tables(n, m, D, dtype=dtype)
                k = min(n, m, 5)
                found = topk_similarity(queries, keys, k, key_bias=bias, impl="cpu")
                assert_chosen(found, expected_scores(queries, keys, key_bias=bias), k)
                lists = (
                    *topk_similarity(queries, keys, k, impl="cpu"),
                    *topk_similarity(keys, queries, k, impl="cpu"),
                )
                assert all(torch.equal(a, b) for a, b in zip(both(queries, keys, k), lists))
                for metric in ("dot", "cosine", "l2"):
                    found = topk_similarity(queries, keys, min(m, 5), metric=metric, impl="cpu")
                    expected = expected_scores(queries, keys, metric=metric)
                    assert_chosen(found, expected, min(m, 5), least=metric == "l2")
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


# Raw ops


def test_opcheck():
    queries, keys, bias = make_tables(5, 9, 3)
    for dtype in DTYPES:
        q, x = queries.to(dtype), keys.to(dtype)
        opcheck(RAW.topk_similarity_fwd.default, (q, x, None, 4, True))
        opcheck(
            RAW.topk_similarity_fwd.default,
            (q, x, bias.to(torch.promote_types(dtype, torch.float32)), 4, False),
        )
        opcheck(RAW.topk_similarity_both_fwd.default, (q, x, 4))
        opcheck(RAW.unit_rows.default, (q,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 7, 8, 31, 64, 100])
def test_unit_rows(D, dtype):
    """Of any scale; and those that have none."""
    generator = torch.Generator().manual_seed(D)
    x = torch.randn(7, D, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    x[1] *= math.sqrt(info.tiny)
    x[2] *= math.sqrt(info.max)
    x = x.to(dtype)
    x[3], x[4], x[5], x[6, -1] = 0.0, info.max, -info.tiny, math.nan
    found, wide = RAW.unit_rows(x), RAW.unit_rows(torch.cat([x, x], 1)[:, :D])
    assert torch.equal(found[:6], wide[:6]) and found[6].isnan().all() and (found[3] == 0).all()
    exact = x.double()[[0, 1, 2, 4, 5]]
    exact = exact / exact.abs().amax(1, keepdim=True)
    exact = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    roundings = (D + 8) * torch.finfo(found.dtype).eps / 2
    assert (found.double()[[0, 1, 2, 4, 5]] - exact).abs().max() <= roundings
    x[6, -1] = math.inf
    assert RAW.unit_rows(x)[6].isnan().all()


def test_unit_rows_with_gradients_have_the_same_bits():
    queries, keys, _ = make_tables(5, 9, 33)
    plain = topk_similarity(queries, keys, 9, metric="cosine", impl="cpu")
    values, indices = topk_similarity(queries.requires_grad_(), keys, 9, metric="cosine", impl="cpu")
    assert torch.equal(values, plain.values) and torch.equal(indices, plain.indices)
    with pytest.raises(RuntimeError, match="topk_similarity: a table must be on the CPU and have shape"):
        RAW.unit_rows(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"topk_similarity: .*float32, float64"):
        RAW.unit_rows(torch.zeros(3, 2, dtype=torch.int64))


def test_tables_that_require_gradients():
    """The raw ops differentiate nothing, and do not mind."""
    queries, keys, bias = (t.requires_grad_() for t in make_tables(5, 9, 3))
    values, _ = RAW.topk_similarity_fwd(queries, keys, bias, 4, False)
    assert torch.equal(values, topk_similarity(queries, keys, 4, key_bias=bias, impl="cpu").values)
    RAW.topk_similarity_both_fwd(queries, keys, 4)


Q, X, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
MISUSES = [
    ((Q[0], X, None, 1, False), "queries must be on the CPU and have shape"),
    ((Q[:, :0], X[:, :0], None, 1, False), "queries must be on the CPU and have shape"),
    ((Q, X[0], None, 1, False), "keys must be on the CPU and have shape"),
    ((Q, X[:, :3], None, 1, False), "keys must be on the CPU and have shape"),
    ((Q, X.double(), None, 1, False), "keys must be on the CPU and have shape"),
    ((Q.long(), X.long(), None, 1, False), "x must be float32, float64, bfloat16 or float16"),
    ((Q, X, None, 0, False), "k must be between 1 and 5, got 0"),
    ((Q, X, None, 6, False), "k must be between 1 and 5, got 6"),
    ((Q, X[:0], None, 1, False), "k must be between 1 and 0, got 1"),
    ((Q, X, B[:4], 1, False), "key_bias must be on the CPU and have shape"),
    ((Q, X, B[None], 1, False), "key_bias must be on the CPU and have shape"),
    ((Q, X, B.double(), 1, False), "key_bias must be on the CPU and have shape"),
    ((Q, X, B, 1, True), "with l2 it must be None"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISUSES)
def test_the_raw_op_is_memory_safe(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        RAW.topk_similarity_fwd(*arguments)
    queries, keys, bias, k, l2 = arguments
    if bias is None and not l2:
        with pytest.raises(RuntimeError, match=message.replace("and 5", "and 3")):
            RAW.topk_similarity_both_fwd(queries, keys, k)


def test_no_rows():
    values, indices = RAW.topk_similarity_fwd(Q[:0], X, None, 2, False)
    assert values.shape == indices.shape == (0, 2)
    with pytest.raises(RuntimeError, match="k must be between 1 and 0"):
        RAW.topk_similarity_both_fwd(Q[:0], X, 1)
