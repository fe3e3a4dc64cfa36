"""What topk_similarity and csls_topk refuse, in words."""

from __future__ import annotations

from torch import Tensor

from fastkit.ops._checks import check_floating, check_int, check_like, check_like_or_widened, shape

METRICS = ("dot", "cosine", "l2")


def check_topk(op: str, queries: Tensor, keys: Tensor, k: int, metric: str, key_bias: Tensor | None) -> None:
    _check_rows(op, queries, keys)
    _check_count(op, "k", k, len(keys), "keys")
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if key_bias is None:
        return
    if metric == "l2":
        raise ValueError(
            f'{op}: key_bias must be None for metric="l2", got a tensor; for distances with a bias b pass'
            ' metric="dot" and key_bias=-(keys.square().sum(1) + b) / 2'
        )
    check_like_or_widened(op, "key_bias", key_bias, queries, "queries", cure="cast it")
    if tuple(key_bias.shape) != (len(keys),):
        raise ValueError(f"{op}: key_bias must have shape (m,) = ({len(keys)},), got {shape(key_bias)}")


def check_csls(
    op: str, queries: Tensor, keys: Tensor, k: int, sources: Tensor | None, neighbors: int
) -> None:
    _check_rows(op, queries, keys)
    _check_count(op, "k", k, len(keys), "keys")
    if sources is not None:
        _check_table(op, "sources", "s", sources, queries)
    _check_count(op, "neighbors", neighbors, len(keys), "keys")
    count, what = (len(queries), "queries") if sources is None else (len(sources), "sources")
    _check_count(op, "neighbors", neighbors, count, what)


def _check_rows(op: str, queries: Tensor, keys: Tensor) -> None:
    check_floating(op, "queries", queries)
    if queries.dim() != 2:
        raise ValueError(
            f"{op}: queries must have shape (n, D), got {shape(queries)};"
            " one query is passed as query[None], a batch of tables through torch.vmap"
        )
    if queries.shape[1] == 0:
        raise ValueError(f"{op}: queries must have D >= 1, got {shape(queries)}; skip the call for D = 0")
    _check_table(op, "keys", "m", keys, queries)


def _check_table(op: str, name: str, size: str, table: Tensor, queries: Tensor) -> None:
    check_like(op, name, table, queries, "queries")
    if table.dim() != 2 or table.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{op}: {name} must have shape ({size}, D) with D = {queries.shape[1]}, as queries have,"
            f" got {shape(table)}"
        )


def _check_count(op: str, name: str, count: int, most: int, what: str) -> None:
    check_int(op, name, count)
    if count < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {count}")
    if count > most:
        raise ValueError(
            f"{op}: {name} must be at most the number of {what}, {most}, got {count};"
            f" pass min({name}, len({what}))"
        )
