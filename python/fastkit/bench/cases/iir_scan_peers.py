"""Packages that filter with coefficients which differ along time, or that can be made to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from fastkit.bench.case import Call, Skip
from fastkit.bench.cases.iir_scan_forms import Form, numerator
from fastkit.bench.contest import load

PACKAGES = ("scipy", "torchlpc", "philtorch", "torchaudio")


def scipy_by_chunks(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Call:
    """``lfilter``, a row and a chunk at a time."""
    lfilter = load("scipy.signal").lfilter
    return partial(_by_chunks, lfilter, x.numpy(), np.insert(a.numpy(), 0, 1, axis=-1), b.numpy(), chunk)


def all_pole() -> Callable[[Tensor, Tensor], Tensor]:
    """torchlpc's recursion, (rows, T) and (rows, T, 2) -> (rows, T)."""
    torchlpc = load("torchlpc")
    if not torchlpc.EXTENSION_LOADED:  # what it has instead is slow
        raise Skip("torchlpc's extension is not built")
    return torchlpc.sample_wise_lpc


def torchlpc_form() -> Form:
    """The numerator in PyTorch, then the recursion with a denominator for each sample."""
    recursion = all_pole()

    def form(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
        u = numerator(x.contiguous(), b, chunk)
        return recursion(u.reshape(-1, x.shape[-1]), each_sample(a, chunk)).view(x.shape)

    return form


def philtorch_form(backend: str) -> Form:
    """Direct form I, as the op is: the other forms differ from it where coefficients change."""
    lfilter = load("philtorch.lpv").lfilter

    def form(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        filtered = lfilter(each_sample(b, chunk), each_sample(a, chunk), rows, form="df1", backend=backend)
        return filtered.view(x.shape)

    return form


def each_sample(c: Tensor, chunk: int) -> Tensor:
    """(B, C, K, n) -> (B C, T, n)."""
    c = c.flatten(0, 1)
    return c if chunk == 1 else c.repeat_interleave(chunk, 1)


def _by_chunks(
    lfilter: Callable[..., tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    a: np.ndarray,  # (B, C, K, 3), with the leading 1
    b: np.ndarray,
    chunk: int,
) -> tuple[np.ndarray]:
    y = np.empty_like(x)
    x1 = x2 = y1 = y2 = np.zeros_like(x[..., 0])
    for k in range(x.shape[-1] // chunk):
        end = (k + 1) * chunk
        span = slice(end - chunk, end)
        b1, b2 = b[..., k, 1], b[..., k, 2]
        a1, a2 = a[..., k, 1], a[..., k, 2]
        # lfilter's state: what the samples before this chunk add to its first two
        state = np.stack([b1 * x1 + b2 * x2 - a1 * y1 - a2 * y2, b2 * x1 - a2 * y1], -1)
        for row in np.ndindex(x.shape[:2]):
            y[row][span], _ = lfilter(b[row][k], a[row][k], x[row][span], zi=state[row])
        x1, x2, y1, y2 = (t[..., end - lag] for t in (x, y) for lag in (1, 2))
    return (y,)
