"""What topk_similarity and csls_topk refuse, and in which words."""

import numpy as np
import pytest
import torch

from fastkit.ops import csls_topk, topk_similarity

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


def refusal(error, op, *args, **options):
    with pytest.raises(error) as caught:
        op(*args, **options)
    return str(caught.value)


QUERIES, KEYS, BIAS, SOURCES = zeros(3, 4), zeros(5, 4), zeros(5), zeros(6, 4)
TABLES = {"queries": QUERIES, "keys": KEYS}

# Of both ops.
COMMON = [
    # What is no dense tensor.
    *((TypeError, {name: [1.0]}, f"{name} must be a tensor, got list") for name in TABLES),
    *((TypeError, {name: None}, f"{name} must be a tensor, got NoneType") for name in TABLES),
    (TypeError, {"keys": KEYS.numpy()}, "keys must be a tensor, got ndarray"),
    *(
        (
            TypeError,
            {name: TABLES[name].as_subclass(DTensor)},
            f"{name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()",
        )
        for name in TABLES
    ),
    (
        TypeError,
        {"keys": KEYS.to_sparse()},
        "keys must be dense, got torch.sparse_coo; pass keys.to_dense()",
    ),
    # queries
    *(
        (
            TypeError,
            {"queries": QUERIES.to(dtype)},
            f"queries must be floating point and real, got {dtype}; cast it to torch.float32",
        )
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool)
    ),
    *(
        (
            ValueError,
            {"queries": queries},
            f"queries must have shape (n, D), got {tuple(queries.shape)};"
            " one query is passed as query[None], a batch of tables through torch.vmap",
        )
        for queries in (QUERIES[0], QUERIES[0, 0], QUERIES[None])
    ),
    (
        ValueError,
        {"queries": QUERIES[:, :0], "keys": KEYS[:, :0]},
        "queries must have D >= 1, got (3, 0); skip the call for D = 0",
    ),
    # keys
    *(
        (
            ValueError,
            {"keys": keys},
            f"keys must have shape (m, D) with D = 4, as queries have, got {tuple(keys.shape)}",
        )
        for keys in (KEYS.T, KEYS[:, :3], KEYS[0], KEYS[None], KEYS[0, 0])
    ),
    *(
        (
            TypeError,
            {"queries": QUERIES.to(of_queries), "keys": KEYS.to(of_keys)},
            f"keys must have the dtype of queries, {of_queries}, got {of_keys};"
            " cast it with keys.to(queries.dtype)",
        )
        for of_queries, of_keys in [
            (torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
            (torch.float32, torch.int64),
        ]
    ),
    (
        RuntimeError,
        {"keys": KEYS.to("meta")},
        "keys must be on the device of queries, cpu, got meta; move it with keys.to(queries.device)",
    ),
    # k
    *(
        (TypeError, {"k": k}, f"k must be an int, got {name}; pass int(k)")
        for k, name in [
            (2.0, "float"), (None, "NoneType"), (True, "bool"), ("2", "str"), (np.int64(2), "int64"),
            (torch.tensor(2), "Tensor"),
        ]
    ),
    *((ValueError, {"k": k}, f"k must be at least 1, got {k}") for k in (0, -1)),
    (ValueError, {"k": 6}, "k must be at most the number of keys, 5, got 6; pass min(k, len(keys))"),
    (
        ValueError,
        {"keys": KEYS[:0]},
        "k must be at most the number of keys, 0, got 2; pass min(k, len(keys))",
    ),
    # impl
    (
        ValueError,
        {"impl": "gpu"},
        "impl must be one of reference, cpu, cuda, triton or None, got 'gpu'",
    ),
]  # fmt: skip

REFUSALS = [
    *((topk_similarity, *case) for case in COMMON),
    *((csls_topk, *case) for case in COMMON),
    # metric
    *(
        (
            topk_similarity,
            ValueError,
            {"metric": metric},
            f"metric must be one of dot, cosine, l2, got {metric!r}",
        )
        for metric in ("ip", "L2", None, 2)
    ),
    # key_bias
    (topk_similarity, TypeError, {"key_bias": [0.0]}, "key_bias must be a tensor, got list"),
    (topk_similarity, TypeError, {"key_bias": 1.0}, "key_bias must be a tensor, got float"),
    (
        topk_similarity,
        ValueError,
        {"key_bias": BIAS, "metric": "l2"},
        'key_bias must be None for metric="l2", got a tensor; for distances with a bias b pass'
        ' metric="dot" and key_bias=-(keys.square().sum(1) + b) / 2',
    ),
    *(
        (
            topk_similarity,
            ValueError,
            {"key_bias": bias},
            f"key_bias must have shape (m,) = (5,), got {tuple(bias.shape)}",
        )
        for bias in (BIAS[:4], BIAS[None], BIAS[:, None], BIAS[0], QUERIES[0])
    ),
    (
        topk_similarity,
        TypeError,
        {"key_bias": BIAS.double()},
        "key_bias must be torch.float32 for queries of torch.float32, got torch.float64; cast it",
    ),
    (
        topk_similarity,
        TypeError,
        {"queries": QUERIES.half(), "keys": KEYS.half(), "key_bias": BIAS.bfloat16()},
        "key_bias must be torch.float16 or torch.float32 for queries of torch.float16, got torch.bfloat16;"
        " cast it",
    ),
    (
        topk_similarity,
        RuntimeError,
        {"key_bias": BIAS.to("meta")},
        "key_bias must be on the device of queries, cpu, got meta; move it with key_bias.to(queries.device)",
    ),
    # sources
    (csls_topk, TypeError, {"sources": [0.0]}, "sources must be a tensor, got list"),
    *(
        (
            csls_topk,
            ValueError,
            {"sources": sources},
            f"sources must have shape (s, D) with D = 4, as queries have, got {tuple(sources.shape)}",
        )
        for sources in (SOURCES[:, :3], SOURCES[0], SOURCES[None])
    ),
    (
        csls_topk,
        TypeError,
        {"sources": SOURCES.double()},
        "sources must have the dtype of queries, torch.float32, got torch.float64;"
        " cast it with sources.to(queries.dtype)",
    ),
    (
        csls_topk,
        RuntimeError,
        {"sources": SOURCES.to("meta")},
        "sources must be on the device of queries, cpu, got meta; move it with sources.to(queries.device)",
    ),
    # neighbors
    *(
        (csls_topk, TypeError, {"neighbors": n}, f"neighbors must be an int, got {name}; pass int(neighbors)")
        for n, name in [(2.0, "float"), (None, "NoneType"), (True, "bool")]
    ),
    (csls_topk, ValueError, {"neighbors": 0}, "neighbors must be at least 1, got 0"),
    (
        csls_topk,
        ValueError,
        {"neighbors": 6, "sources": SOURCES},
        "neighbors must be at most the number of keys, 5, got 6; pass min(neighbors, len(keys))",
    ),
    (
        csls_topk,
        ValueError,
        {"neighbors": 4},
        "neighbors must be at most the number of queries, 3, got 4; pass min(neighbors, len(queries))",
    ),
    (
        csls_topk,
        ValueError,
        {"neighbors": 3, "sources": SOURCES[:2]},
        "neighbors must be at most the number of sources, 2, got 3; pass min(neighbors, len(sources))",
    ),
    (
        csls_topk,
        ValueError,
        {"neighbors": 1, "queries": QUERIES[:0]},
        "neighbors must be at most the number of queries, 0, got 1; pass min(neighbors, len(queries))",
    ),
]


@pytest.mark.parametrize(("op", "error", "arguments", "message"), REFUSALS)
def test_refuses(op, error, arguments, message):
    options = {"queries": QUERIES, "keys": KEYS, "k": 2, **arguments}
    if op is csls_topk:
        options.setdefault("neighbors", 2)
    positional = [options.pop(name) for name in ("queries", "keys", "k")]
    assert refusal(error, op, *positional, **options) == f"{op.__name__}: {message}"


@pytest.mark.parametrize("op", [topk_similarity, csls_topk])
def test_refuses_the_kernel_of_another_device(op):
    options = {"neighbors": 1} if op is csls_topk else {}
    message = refusal(RuntimeError, op, QUERIES, KEYS, 1, impl="cuda", **options)
    assert message.startswith(f'{op.__name__}: impl="cuda" cannot run')


def test_the_default_of_ten_neighbors_is_refused_for_small_tables():
    assert refusal(ValueError, csls_topk, QUERIES, KEYS, 1) == (
        "csls_topk: neighbors must be at most the number of keys, 5, got 10; pass min(neighbors, len(keys))"
    )


def test_what_the_messages_advise_works():
    queries, keys = torch.rand(3, 4), torch.rand(5, 4)
    assert topk_similarity(queries[0][None], keys, min(9, len(keys))).values.shape == (1, 5)
    assert topk_similarity(queries, keys.double().to(queries.dtype), int(2.0)).indices.shape == (3, 2)
    b = torch.rand(5)
    biased = topk_similarity(queries, keys, 5, metric="dot", key_bias=-(keys.square().sum(1) + b) / 2)
    distances = (queries.unsqueeze(1) - keys).square().sum(2) + b
    assert torch.equal(biased.indices, distances.argsort(dim=1))
    tables = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    batched = torch.vmap(lambda q, k: tuple(topk_similarity(q, k, 2)))(*tables)
    for i in range(2):
        alone = topk_similarity(tables[0][i], tables[1][i], 2, impl="reference")  # which is what vmap runs
        for one, other in zip(batched, alone, strict=True):
            assert torch.equal(one[i], other)
