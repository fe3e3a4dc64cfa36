"""Recursive filters that are set by what they heard in the chunk before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastkit import ops
from fastkit._autograd import without_autocast
from fastkit.nn.global_conv import GlobalConv
from fastkit.reference.pooled_conv import cell_maxima

Parameterization = Literal["sigmoid", "triangle", "polar", "l1", "raw"]


class AdaptiveIIR(nn.Module):
    """Filters each channel by second-order recursions whose coefficients come from the chunk before.

    ::

        y[t] = x[t] - a1 y[t-1] - a2 y[t-2],    (a1, a2) = those of chunk t // chunk

    and the result is the sum of the ``filters`` such y of a channel. ``adaptive=True``: a chunk is cut into
    ``pool`` cells; the maxima of x, or of its global convolution, over the cells go through an MLP
    ``pool -> hidden -> 2 * filters``, shared by channels and chunks, with a sigmoid between its layers; what
    it returns, v, gives the coefficients of the next chunk. ``adaptive=False``: v is a parameter, one for all
    of T. Either way the result at t depends on x up to t only, to the last bit.

    Args:
        channels: C, the width of x.
        chunk: samples per set of coefficients, a multiple of ``pool``; the last chunk of a call may be short.
        filters: F, the filters of a channel.
        pool: cells of a chunk, the inputs of the MLP (8: our choice).
        hidden: width of the MLP (32: our choice).
        parameterization: how v = (v1, v2) gives the coefficients. With s the sigmoid, and s and tanh kept
            2^-20 away from 1, which float32 reaches at v = 17 and 9:

            - ``"sigmoid"``: a1 = s(v1), a2 = s(v2); the paper's. Its poles have a negative real part.
            - ``"triangle"``: a2 = tanh v2, a1 = (1 + a2) tanh v1; every stable filter.
            - ``"polar"``: a1 = -2 r cos w, a2 = r^2 with r = s(v1), w = pi s(v2): the poles are r exp(+-i w).
            - ``"l1"``: a1, a2 = (tanh v1 +- tanh v2) / 2; all with |a1| + |a2| < 1 (formula: our choice).
            - ``"raw"``: a1 = v1, a2 = v2; not always stable.
        adaptive: False learns the coefficients themselves; the paper's ablation Focus-H.
        carry: whether the history of y crosses into the next chunk. The paper's does not.
        first: what chunk 0 is filtered with, before which there is none. ``"identity"``: a1 = a2 = 0, it
            passes as it is (times F); ``"learned"``: a parameter gives its v. The paper does not say.
        global_conv: a module ``(B, T, C) -> (B, T, C)``, which x passes before the pooling; causal, if the
            result is to be: a ``GlobalConv``, whose ``block`` is then ``chunk``, is. Default: none.

    Shape:
        x and the result: ``(B, T, C)``. Parameters: ``mlp.0.weight`` (hidden, pool), ``mlp.0.bias``,
        ``mlp.2.weight`` (2 F, hidden), ``mlp.2.bias``, those of ``global_conv``, and ``first_logits``
        (C, F, 2) if that is learned; or, with ``adaptive=False``, ``logits`` (C, F, 2).

    Raises:
        ValueError: an option or the shape of x is not as above.
        TypeError: the dtype of x does not go with that of the parameters; see ``fastkit.ops.iir_scan``.

    Initialisation: ``mlp.2.weight`` by hyperfan-in, made for layers that generate weights (Chang, Flokas,
    Lipson, ICLR 2020): uniform with variance ``1 / (2 hidden / 4)``, for two weights that enter one sum and
    hidden units with a mean square of 1/4. ``mlp.0.weight``: Xavier. Biases: 0, ``logits`` and
    ``first_logits``: N(0, 1) (our choice).

    Numerics: autocast is off for the coefficients; the MLP runs in the dtype of its parameters, what follows
    it in float32 or float64. The result has the dtype of x. All but ``raw`` are stable inside a chunk, so
    with ``carry=False`` the result is bounded. With ``carry=True`` each switch between stable filters can
    add energy: only ``l1`` stays bounded then, and ``sigmoid``, ``triangle`` and ``polar`` warn.

    Source: Lutati, Zimerman, Wolf, "Focus Your Attention (with Adaptive IIR Filters)", EMNLP 2023, eq. 1-8,
    with H itself where eq. 6 has its conjugate, which lets y see the future of its chunk.

    Example:
        >>> import torch, fastkit.nn
        >>> layer = fastkit.nn.AdaptiveIIR(64, chunk=16)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    mlp: nn.Sequential  # if adaptive
    first_logits: nn.Parameter  # if that is learned
    logits: nn.Parameter  # if not adaptive

    def __init__(
        self,
        channels: int,
        *,
        chunk: int = 128,
        filters: int = 1,
        pool: int = 8,
        hidden: int = 32,
        parameterization: Parameterization = "sigmoid",
        adaptive: bool = True,
        carry: bool = False,
        first: Literal["identity", "learned"] = "identity",
        global_conv: nn.Module | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "channels": channels, "chunk": chunk, "filters": filters, "pool": pool, "hidden": hidden,
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"AdaptiveIIR: {name} must be at least 1, got {count}")
        if adaptive and chunk % pool != 0:
            raise ValueError(
                f"AdaptiveIIR: chunk must be a multiple of pool, got chunk={chunk} and pool={pool};"
                f" take chunk={chunk + -chunk % pool}"
            )
        if parameterization not in _COEFFICIENTS:
            raise ValueError(
                f"AdaptiveIIR: parameterization must be one of {', '.join(_COEFFICIENTS)},"
                f" got {parameterization!r}"
            )
        if first not in ("identity", "learned"):
            raise ValueError(f"AdaptiveIIR: first must be identity or learned, got {first!r}")
        if isinstance(global_conv, GlobalConv) and global_conv.block != chunk:
            raise ValueError(
                f"AdaptiveIIR: the block of global_conv must be chunk, got {global_conv.block} and {chunk}"
            )
        if not adaptive and (first != "identity" or global_conv is not None):
            raise ValueError(
                "AdaptiveIIR: first and global_conv are for adaptive coefficients, got adaptive=False; leave"
                " them out"
            )
        if adaptive and carry and parameterization not in ("l1", "raw"):
            warnings.warn(
                f'AdaptiveIIR: parameterization="{parameterization}" keeps each filter stable, but with'
                " carry=True switching between stable filters can grow without bound; take"
                ' parameterization="l1", or carry=False',
                stacklevel=2,
            )
        self.channels = channels
        self.chunk = chunk
        self.filters = filters
        self.pool = pool
        self.parameterization: Parameterization = parameterization
        self.adaptive = adaptive
        self.carry = carry
        self.first = first
        self.global_conv = global_conv
        if first == "learned":
            self.first_logits = nn.Parameter(torch.empty(channels, filters, 2))
        if adaptive:
            self.mlp = nn.Sequential(nn.Linear(pool, hidden), nn.Sigmoid(), nn.Linear(hidden, 2 * filters))
        else:
            self.logits = nn.Parameter(torch.empty(channels, filters, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.adaptive:
            nn.init.normal_(self.logits)
            return
        first, last = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        nn.init.xavier_uniform_(first.weight)
        bound = math.sqrt(3 / (2 * last.in_features / 4))  # of a uniform with variance bound^2 / 3
        nn.init.uniform_(last.weight, -bound, bound)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(last.bias)
        if self.first == "learned":
            nn.init.normal_(self.first_logits)

    def forward(self, x: Tensor, maxima: Tensor | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        """The filtered x. ``maxima``, as ``maxima`` returns them: of something else than x."""
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.channels:
            raise ValueError(
                f"AdaptiveIIR: x must have shape (B, T, {self.channels}) with T >= 1, got {tuple(x.shape)}"
            )
        return self.filtered(x, self.coefficients(x, maxima))

    def filtered(self, x: Tensor, a: Tensor) -> Tensor:
        """x, by coefficients as ``coefficients`` returns them."""
        chunk = None if a.shape[2] == 1 else self.chunk
        return ops.iir_scan(x.transpose(1, 2), a, chunk=chunk, carry=self.carry).transpose(1, 2)

    def coefficients(self, x: Tensor, maxima: Tensor | None = None) -> Tensor:  # (B|1, C, K, F, 2)
        """The (a1, a2) that ``forward`` filters x with; K is 1 where one filter runs through all of T."""
        chunks = -(-x.shape[1] // self.chunk)
        if not self.adaptive:
            with without_autocast(x):
                a = self._activate(self.logits)[None, :, None]
                return a if self.carry else a.expand(-1, -1, chunks, -1, -1)
        size = len(x), chunks - 1, self.channels, self.pool
        if maxima is None:
            maxima = self.maxima(x)
        elif maxima.shape != size:
            raise ValueError(f"AdaptiveIIR: maxima must have shape {size}, got {tuple(maxima.shape)}")
        with without_autocast(x):
            a = self.set_by(maxima)
            a = pad(a, (0, 0, 0, 0, 0, 0, 1, 0)).transpose(1, 2)  # one chunk later, after a = 0
            if self.first == "learned":
                one = self._activate(self.first_logits).unsqueeze(1).expand(len(x), -1, 1, -1, -1)
                a = torch.cat([one.to(a.dtype), a[:, :, 1:]], 2)
            return a

    def set_by(self, maxima: Tensor) -> Tensor:  # (..., pool) -> (..., F, 2)
        """The coefficients of the chunk after that of these maxima; autocast is off."""
        with without_autocast(maxima):
            v = self.mlp(maxima.to(next(self.mlp.parameters()).dtype))
            return self._activate(v.unflatten(-1, (self.filters, 2)))

    def maxima(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, K - 1, C, pool)
        """What the MLP reads: of each chunk but the last, which sets no other."""
        if isinstance(self.global_conv, GlobalConv):
            return self.global_conv.maxima(x, self.pool)
        return cell_maxima(x if self.global_conv is None else self.global_conv(x), self.chunk, self.pool)

    def last_maxima(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, C, pool)
        """``maxima`` of a whole chunk, of x up to its end: of all that a ``GlobalConv`` reaches."""
        if isinstance(self.global_conv, GlobalConv):
            return self.global_conv.last_maxima(x, self.pool)
        return x.unflatten(1, (self.pool, -1)).amax(2).mT

    def _activate(self, v: Tensor) -> Tensor:
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return _COEFFICIENTS[self.parameterization](v)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, chunk={self.chunk}, filters={self.filters}, pool={self.pool},"
            f" parameterization={self.parameterization!r}, adaptive={self.adaptive}, carry={self.carry},"
            f" first={self.first!r}"
        )


_BELOW_ONE = 1 - 2.0**-20


def _sigmoid(v: Tensor) -> Tensor:
    return v.sigmoid().clamp(max=_BELOW_ONE)


def _tanh(v: Tensor) -> Tensor:
    return v.tanh().clamp(-_BELOW_ONE, _BELOW_ONE)


def _triangle(v: Tensor) -> Tensor:
    t1, a2 = _tanh(v).unbind(-1)
    return torch.stack([(1 + a2) * t1, a2], -1)


def _polar(v: Tensor) -> Tensor:
    v1, v2 = v.unbind(-1)
    r, w = _sigmoid(v1), math.pi * v2.sigmoid()
    a2 = r * r
    widest = _BELOW_ONE * (1 + a2)  # 1 + a2 - 2 r is (1 - r)^2, which rounding can take to 0
    return torch.stack([(-2 * r * w.cos()).clamp(-widest, widest), a2], -1)


def _l1(v: Tensor) -> Tensor:
    t1, t2 = _tanh(v).unbind(-1)
    return torch.stack([t1 + t2, t1 - t2], -1) / 2


def _raw(v: Tensor) -> Tensor:
    return v


_COEFFICIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": _sigmoid,
    "triangle": _triangle,
    "polar": _polar,
    "l1": _l1,
    "raw": _raw,
}
