"""What topk_similarity and csls_topk refuse, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit.ops._checks import FLOATING, arithmetic, shape

METRICS = ("dot", "cosine", "l2")


def check_topk(op: str, queries: Tensor, keys: Tensor, k: int, metric: str, key_bias: Tensor | None) -> None:
    check_rows(op, queries, keys)
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
    _check_device(op, "key_bias", key_bias, queries)
    if key_bias.dtype not in (queries.dtype, arithmetic(queries)):
        also = f" or {arithmetic(queries)}" if arithmetic(queries) != queries.dtype else ""
        raise TypeError(
            f"{op}: key_bias must be {queries.dtype}{also} for queries of {queries.dtype},"
            f" got {key_bias.dtype}; cast it"
        )
    if tuple(key_bias.shape) != (len(keys),):
        raise ValueError(f"{op}: key_bias must have shape (m,) = ({len(keys)},), got {shape(key_bias)}")


def check_csls(
    op: str, queries: Tensor, keys: Tensor, k: int, sources: Tensor | None, neighbors: int
) -> None:
    check_rows(op, queries, keys)
    _check_count(op, "k", k, len(keys), "keys")
    if sources is not None:
        _check_like(op, "sources", "s", sources, queries)
    _check_count(op, "neighbors", neighbors, len(keys), "keys")
    count, what = (len(queries), "queries") if sources is None else (len(sources), "sources")
    _check_count(op, "neighbors", neighbors, count, what)


def check_rows(op: str, queries: Tensor, keys: Tensor) -> None:
    if queries.dtype not in FLOATING:
        raise TypeError(
            f"{op}: queries must be floating point and real, got {queries.dtype}; cast it to torch.float32"
        )
    if queries.dim() != 2:
        raise ValueError(
            f"{op}: queries must have shape (n, D), got {shape(queries)};"
            " one query is passed as query[None], a batch of tables through torch.vmap"
        )
    if queries.shape[1] == 0:
        raise ValueError(f"{op}: queries must have D >= 1, got {shape(queries)}; skip the call for D = 0")
    _check_like(op, "keys", "m", keys, queries)


def _check_like(op: str, name: str, size: str, tensor: Tensor, queries: Tensor) -> None:
    _check_device(op, name, tensor, queries)
    if tensor.dtype != queries.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of queries, {queries.dtype}, got {tensor.dtype};"
            f" cast it with {name}.to(queries.dtype)"
        )
    if tensor.dim() != 2 or tensor.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{op}: {name} must have shape ({size}, D) with D = {queries.shape[1]}, as queries have,"
            f" got {shape(tensor)}"
        )


def _check_device(op: str, name: str, tensor: Tensor, queries: Tensor) -> None:
    if tensor.device != queries.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of queries, {queries.device}, got {tensor.device};"
            f" move it with {name}.to(queries.device)"
        )


def _check_count(op: str, name: str, count: int, most: int, what: str) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(count).__name__}; pass int({name})")
    if count < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {count}")
    if count > most:
        raise ValueError(
            f"{op}: {name} must be at most the number of {what}, {most}, got {count};"
            f" pass min({name}, len({what}))"
        )
