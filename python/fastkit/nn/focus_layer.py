"""Attention within chunks, whose keys and values have passed filters that know more than the chunk."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from fastkit import ops
from fastkit._autograd import without_autocast
from fastkit.nn.adaptive_iir import AdaptiveIIR, Parameterization
from fastkit.nn.focus_state import FocusState, put_, ring, unrolled
from fastkit.nn.global_conv import GlobalConv
from fastkit.nn.row_alignment import RowAlignment
from fastkit.ops.focus_gates import focus_gates
from fastkit.reference import IIRState
from fastkit.reference import focus_gates as reference

Position = Literal["relative_bias", "rotary", "none"]


class FocusLayer(nn.Module):
    """Chunked attention with queries from x, keys and values from the filtered x, and gates.

    ::

        f = AdaptiveIIR(x)                                       filters set by the bin before
        y = attention(x Wq, f Wk, f Wv)                          within chunks of attn_chunk tokens
        r = silu(f Wr + br),  u = sigmoid(f Wu + bu)             reset and update gates
        z = silu(f Wh + (r y) Uh + bh)
        o = u z + (1 - u) residual,  by default of x

    With ``causal=True`` the result at t depends on x up to t only, to the last bit: the filters carry what
    lies before a chunk into it, and their coefficients what lies before a bin.

    Args:
        channels: C, the width of x.
        qk_size: width of all heads' queries, and of their keys. Default: C / 2, as the paper's counts of
            parameters say.
        num_heads: of the attention. Default: 1, as MEGA has.
        attn_chunk: tokens that attend to each other.
        bin_length: samples that are filtered with the same coefficients, a multiple of ``pool``. Fixed: it
            does not depend on the length of a call.
        pool, hidden, num_filters, parameterization, first: of ``AdaptiveIIR``.
        coefficients: ``"adaptive"``, or ``"constant"``: learned, without the global convolution.
        kernel_length: taps of the layer's own ``GlobalConv``, which x passes before it is pooled. None: it
            has none; x is pooled, or ``maxima`` given.
        conv_glu: of that ``GlobalConv``.
        causal: whether tokens attend to none after them. Filters never do.
        position: what attention knows of places within a chunk. ``"relative_bias"``: a learned number for
            each distance and head, added to its logits; ``"rotary"``: queries and keys turned by their place;
            ``"none"``.
        filtering: ``"recurrence"``, or ``"paper"``: the published product with the conjugate of the response,
            sampled at as many frequencies as a bin has samples. That is a circular filter that runs backwards
            in time: a sample sees later ones of its bin. For comparison only.

    Shape:
        x and the result: ``(B, T, C)``. Parameters: ``query.weight`` (qk_size, C), ``key_value.weight``
        (qk_size + C, C), ``gates.weight`` (3 C, C) and ``gates.bias`` (of r, u and h, in turn),
        ``reset.weight`` (C, C), which is Uh, those of ``filter``, an ``AdaptiveIIR``; and with
        ``"relative_bias"`` ``bias`` (num_heads, 2 attn_chunk - 1), or (num_heads, attn_chunk) if causal: at
        index i of a key that lies i places before the query.

    Raises:
        ValueError: an option, or the shape of an argument, is not as above; a row of ``padding_mask`` has a
            hole.

    Initialisation: matrices uniform with variance 1 / C, which is Xavier's for the square ones; biases 0; the
    filter's as of ``AdaptiveIIR``.

    Numerics: products and attention in the dtype of x, or of autocast; filter coefficients in float32 or
    float64.

    Complexity: O(T (C^2 + attn_chunk C)), and that of ``GlobalConv``.

    Source: Lutati, Zimerman, Wolf, "Focus Your Attention (with Adaptive IIR Filters)", EMNLP 2023, eq. 9-14.
    Our choice is where the paper is silent: ``qk_size``, ``position``, ``first``, and the filter's form,
    which is eq. 5 in the time domain, and causal.

    Example:
        >>> import torch, fastkit.nn
        >>> layer = fastkit.nn.FocusLayer(64, attn_chunk=32, bin_length=32, kernel_length=128)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    bias: nn.Parameter  # with position="relative_bias"
    turns: Tensor  # with position="rotary"

    def __init__(
        self,
        channels: int,
        *,
        qk_size: int | None = None,
        num_heads: int = 1,
        attn_chunk: int = 128,
        bin_length: int = 128,
        pool: int = 8,
        hidden: int = 32,
        num_filters: int = 1,
        parameterization: Parameterization = "sigmoid",
        first: Literal["identity", "learned"] = "identity",
        coefficients: Literal["adaptive", "constant"] = "adaptive",
        kernel_length: int | None = 2048,
        conv_glu: bool = False,
        causal: bool = True,
        position: Position = "relative_bias",
        filtering: Literal["recurrence", "paper"] = "recurrence",
    ) -> None:
        super().__init__()
        qk_size = channels // 2 if qk_size is None else qk_size
        for name, count in {"qk_size": qk_size, "num_heads": num_heads, "attn_chunk": attn_chunk}.items():
            if count < 1:
                raise ValueError(f"FocusLayer: {name} must be at least 1, got {count}")
        for name, width in {"channels": channels, "qk_size": qk_size}.items():
            if width % num_heads:
                raise ValueError(
                    f"FocusLayer: {name} must be a multiple of num_heads, got {width} and {num_heads}"
                )
        for name, value, choices in (
            ("coefficients", coefficients, ("adaptive", "constant")),
            ("position", position, ("relative_bias", "rotary", "none")),
            ("filtering", filtering, ("recurrence", "paper")),
        ):
            if value not in choices:
                raise ValueError(f"FocusLayer: {name} must be one of {', '.join(choices)}, got {value!r}")
        if position == "rotary" and qk_size // num_heads % 2:
            raise ValueError(
                f'FocusLayer: qk_size must be even for each head with position="rotary", got {qk_size} for'
                f" {num_heads}"
            )
        adaptive = coefficients == "adaptive"
        self.channels = channels
        self.qk_size = qk_size
        self.num_heads = num_heads
        self.attn_chunk = attn_chunk
        self.causal = causal
        self.position: Position = position
        self.filtering = filtering
        self.filter: AdaptiveIIR = AdaptiveIIR(
            channels,
            chunk=bin_length,
            filters=num_filters,
            pool=pool,
            hidden=hidden,
            parameterization=parameterization,
            adaptive=adaptive,
            first=first,
            global_conv=GlobalConv(channels, kernel_length, block=bin_length, glu=conv_glu)
            if adaptive and kernel_length is not None
            else None,
        )
        self.query: nn.Linear = nn.Linear(channels, qk_size, bias=False)
        self.key_value: nn.Linear = nn.Linear(channels, qk_size + channels, bias=False)
        self.gates: nn.Linear = nn.Linear(channels, 3 * channels)
        self.reset: nn.Linear = nn.Linear(channels, channels, bias=False)
        if position == "relative_bias":
            self.bias = nn.Parameter(torch.empty(num_heads, attn_chunk if causal else 2 * attn_chunk - 1))
        if position == "rotary":
            size = attn_chunk, qk_size // num_heads // 2, 2
            self.register_buffer("turns", torch.empty(size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Also fills the table of rotary places, which is in no checkpoint."""
        self.filter.reset_parameters()
        if isinstance(self.filter.global_conv, GlobalConv):
            self.filter.global_conv.reset_parameters()
        bound = math.sqrt(3 / self.channels)  # of a uniform with variance bound^2 / 3
        for layer in (self.query, self.key_value, self.gates, self.reset):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(self.gates.bias)
        if self.position == "relative_bias":
            nn.init.zeros_(self.bias)
        if self.position == "rotary":
            self.turns.copy_(_turns(self.attn_chunk, self.qk_size // self.num_heads))

    def forward(
        self,
        x: Tensor,
        *,
        maxima: Tensor | None = None,
        residual: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:  # (B, T, C)
        """The result o of x.

        ``maxima`` (B, K - 1, C, pool): what the coefficients are made of, as ``GlobalConv.maxima`` of a
        convolution that layers share; of rows that neither padding nor ``cu_seqlens`` moves. ``residual``:
        what the update gate mixes z with. ``padding_mask`` (B, T): not 0 for tokens, which are one run in
        each row; bins and chunks begin with a row's first token, and what comes out at padding is of no
        meaning. ``cu_seqlens`` (S + 1): x is (1, T, C) and holds S sequences one after another, each with
        bins and chunks of its own, as ``fastkit.ops.iir_scan`` takes them.
        """
        self._check(x, residual)
        rows = RowAlignment.of("FocusLayer", x, padding_mask, cu_seqlens)
        x = rows.align(x)
        residual = x if residual is None else rows.align(residual)
        return rows.restore(self._mix(x, maxima, residual))

    def forward_with_state(
        self,
        x: Tensor,  # (B, T, C)
        lengths: Tensor,  # (B,)
        *,
        maxima: Tensor | None = None,  # (B, K - 1, C, pool)
        last_maxima: Tensor | None = None,  # (B, C, pool)
        residual: Tensor | None = None,
    ) -> tuple[Tensor, FocusState]:
        """The result of rows that begin at their first token, and the state to go on from by ``step``.

        That is the state after the first ``lengths[b]`` tokens of each row; what a row has beyond them is of
        no meaning. With ``maxima``, ``last_maxima`` are those of the last bin, for rows that end with one.
        The state has no gradient. ValueError, where tokens see later ones.
        """
        self._check(x, residual)
        _check_places("lengths", lengths, len(x))
        if bool(((lengths < 0) | (lengths > x.shape[1])).any()):
            raise ValueError(
                f"FocusLayer: lengths must be between 0 and {x.shape[1]}, the tokens of x, got"
                f" {lengths.min().item()} to {lengths.max().item()}"
            )
        if not self.causal or self.filtering == "paper":
            raise ValueError(
                f'FocusLayer: forward_with_state must have causal=True and filtering="recurrence", got'
                f" {self.causal} and {self.filtering!r}; a token that sees later ones cannot be gone on from"
            )
        residual = x if residual is None else residual
        a = self.filter.coefficients(x, maxima)
        f = self.filter.filtered(x, a)
        k, v = self.key_value(f).split([self.qk_size, self.channels], -1)
        o = self._gated(f, self._attend(self.query(x), k, v), residual)
        with torch.no_grad():
            history = self.history_size
            state = FocusState(
                *self._last_filter(x, a, lengths),
                ring(k, lengths, self.attn_chunk),
                ring(v, lengths, self.attn_chunk),
                ring(x, lengths, history) if history and maxima is None else None,
            )
            self._begin_bins(state, lengths, last_maxima)
        return o, state

    @torch.no_grad()
    def step(
        self,
        x: Tensor,  # (B, C)
        state: FocusState,
        places: Tensor,  # (B,)
        *,
        maxima: Tensor | None = None,  # (B, C, pool)
        residual: Tensor | None = None,  # (B, C)
    ) -> Tensor:  # (B, C)
        """The result of one more token of each row, which has ``places`` before it; state goes on in place.

        ``maxima``, where ``forward_with_state`` was given some: of the bin that this token ends, for rows in
        which it ends one. Each step costs the same. The result has no gradient.
        """
        rows = (len(state.ends), self.channels)
        for name, value in {"x": x, "residual": residual}.items():
            if value is not None and value.shape != rows:
                raise ValueError(
                    f"FocusLayer: {name} must have shape {rows}, a token of each row of the state, got"
                    f" {tuple(value.shape)}"
                )
        _check_places("places", places, len(x))
        before = IIRState(state.ends, state.ends.new_zeros(*x.shape, 2))  # no filter here looks back at x
        f, end = ops.iir_step(x, state.coefficients, None, before)
        k, v = self.key_value(f).split([self.qk_size, self.channels], -1)
        put_(state.keys, k, places)
        put_(state.values, v, places)
        o = self._gated(
            f, self._attend_last(self.query(x), state, places), x if residual is None else residual
        )
        state.ends = end.y
        if state.history is not None:
            put_(state.history, x, places)
        self._begin_bins(state, places + 1, maxima)
        return o

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.channels:
            raise ValueError(
                f"FocusLayer: x must have shape (B, T, {self.channels}) with T >= 1, got {tuple(x.shape)}"
            )
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"FocusLayer: residual must have the shape of x, {tuple(x.shape)},"
                f" got {tuple(residual.shape)}"
            )

    @property
    def history_size(self) -> int:
        """Tokens that set the filter of the bin after them; 0: there are none."""
        if not self.filter.adaptive:
            return 0
        conv = self.filter.global_conv
        return self.filter.chunk + (conv.length - 1 if isinstance(conv, GlobalConv) else 0)

    def _last_filter(self, x: Tensor, a: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row's last bin with tokens: its coefficients, and where its filters are."""
        size = self.filter.chunk
        last = lengths - 1
        bins = last.div(size, rounding_mode="floor").clamp(min=0)
        rows = torch.arange(len(x), device=x.device)
        a = a.expand(len(x), -1, -1, -1, -1)
        a = a[rows, :, bins.clamp(max=a.shape[2] - 1)].contiguous()
        # A bin of zeros, and in its end the tokens: filters at rest stay there.
        places = last[:, None] - torch.arange(size - 1, -1, -1, device=x.device)
        tail = x[rows[:, None], places.clamp(min=0)].where((places >= bins[:, None] * size).unsqueeze(-1), 0)
        return a, ops.iir_scan_with_state(tail.mT, a.unsqueeze(2), chunk=None)[1].y

    def _begin_bins(self, state: FocusState, lengths: Tensor, maxima: Tensor | None) -> None:
        """The next bin's filter, of rows whose first ``lengths[b]`` tokens end with a bin."""
        rows = ((lengths > 0) & (lengths % self.filter.chunk == 0)).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        state.ends[rows] = 0
        if not self.filter.adaptive:
            return
        if state.history is not None:
            before = unrolled(state.history[rows], lengths[rows])
            maxima = self.filter.last_maxima(before)
        elif maxima is not None:
            maxima = maxima[rows]
        else:
            raise ValueError(
                "FocusLayer: a state without a history must be given maxima; give those of the bin"
            )
        state.coefficients[rows] = self.filter.set_by(maxima)

    def _mix(self, x: Tensor, maxima: Tensor | None, residual: Tensor) -> Tensor:
        f = self.filter(x, maxima) if self.filtering == "recurrence" else self._paper_filter(x, maxima)
        k, v = self.key_value(f).split([self.qk_size, self.channels], -1)
        return self._gated(f, self._attend(self.query(x), k, v), residual)

    def _gated(self, f: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        if not (_is_plain(self.gates) and _is_plain(self.reset)):  # they are called, with what is on them
            return reference.mix(self.gates(f), y, self.reset, residual)
        return focus_gates(f, y, self.gates.weight, self.gates.bias, self.reset.weight, residual)

    def _paper_filter(self, x: Tensor, maxima: Tensor | None) -> Tensor:
        a = self.filter.coefficients(x, maxima)  # (B|1, C, K, F, 2)
        bins = [
            published_filter(piece.mT, a[:, :, min(i, a.shape[2] - 1)])
            for i, piece in enumerate(x.split(self.filter.chunk, 1))
        ]
        return torch.cat(bins, 2).mT.to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, T, *), each
        B, T, _ = q.shape
        whole = T // self.attn_chunk * self.attn_chunk
        parts = []
        for begin, end in ((0, whole), (whole, T)):  # a short last chunk is one of its own length
            if begin == end:
                continue
            M = min(self.attn_chunk, end - begin)
            pieces = (t[:, begin:end].unflatten(1, (-1, M)).flatten(0, 1) for t in (q, k, v))
            heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in pieces]
            y = self._attend_chunks(*heads)  # (B chunks, H, M, C / H)
            parts.append(y.transpose(1, 2).flatten(2).unflatten(0, (B, -1)).flatten(1, 2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        M = q.shape[2]
        if self.position == "rotary":
            q, k = (_turned(t, self.turns[:M]) for t in (q, k))
        bias = self._biases(M).to(q.dtype) if self.position == "relative_bias" else None
        if q.device.type != "cpu":
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=self.causal and bias is None
            )
        # In chunks this short SDPA does the same there, copies q and k twice, and takes half as long again.
        logits = (q * q.shape[3] ** -0.5) @ k.mT
        if bias is not None:
            logits = logits.add_(bias)
        elif self.causal:
            hidden = torch.ones(M, M, dtype=torch.bool).triu(1)
            logits = logits.masked_fill_(hidden, -math.inf)
        return logits.softmax(-1) @ v

    def _attend_last(self, q: Tensor, state: FocusState, places: Tensor) -> Tensor:  # (B, qk_size) -> (B, C)
        """Of one token, whose key and value are in the state."""
        M = self.attn_chunk
        place = places % M
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (state.keys, state.values))
        k, v = heads  # (B, H, M, *)
        q = q.unflatten(-1, (self.num_heads, 1, -1))  # (B, H, 1, *)
        if self.position == "rotary":
            q, k = _turned(q, self.turns[place, None, None]), _turned(k, self.turns)
        logits = (q * q.shape[3] ** -0.5) @ k.mT
        distance = place[:, None] - torch.arange(M, device=q.device)  # (B, M)
        if self.position == "relative_bias":
            logits = logits + self.bias[:, distance.clamp(min=0)].transpose(0, 1).unsqueeze(2).to(q.dtype)
        logits = logits.masked_fill((distance < 0)[:, None, None], -math.inf)
        return (logits.softmax(-1) @ v).flatten(1)

    def _biases(self, M: int) -> Tensor:  # (num_heads, M, M)
        """Of the pairs of a chunk: what is added to their logits."""
        if self.causal:  # read backwards from distance M - 1 on, then what is hidden
            row = pad(self.bias[:, :M].flip(1), (0, M - 1), value=-math.inf)
        else:
            middle = self.attn_chunk - 1  # of distance 0
            row = self.bias[:, middle - M + 1 : middle + M].flip(1)
        return row.unfold(1, M, 1).flip(1)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, qk_size={self.qk_size}, num_heads={self.num_heads},"
            f" attn_chunk={self.attn_chunk}, causal={self.causal},"
            f" position={self.position!r}, filtering={self.filtering!r}"
        )


def _check_places(name: str, places: Tensor, rows: int) -> None:
    if places.shape != (rows,) or places.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"FocusLayer: {name} must be int64 of shape ({rows},), a number for each row, got {places.dtype}"
            f" of shape {tuple(places.shape)}"
        )


def _is_plain(layer: nn.Linear) -> bool:
    """Whether it is its weight and bias, and nothing that was put in its place or around it."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in vars(layer)  # as accelerate wraps it
        and not any(getattr(layer, name) for name in hooks)
        and not nn.modules.module._has_any_global_hook()  # pyright: ignore[reportPrivateUsage]
    )


def published_filter(x: Tensor, a: Tensor) -> Tensor:  # (B, C, R), (B|1, C, F, 2) -> (B, C, R)
    """Eq. 4-8 of the paper for one bin: ``irfft(rfft(x) conj(H))``, H at R frequencies, summed over F."""
    R = x.shape[2]
    with without_autocast(x):
        w = torch.arange(R // 2 + 1, device=x.device) * (2 * math.pi / R)
        z = torch.polar(torch.ones_like(w), -w).to(torch.promote_types(a.dtype, torch.complex64))
        response = (1 / (1 + a[..., :1] * z + a[..., 1:] * z.square())).sum(2)
        return torch.fft.irfft(torch.fft.rfft(x.to(a.dtype)) * response.conj(), R)


def _turns(places: int, width: int) -> Tensor:  # (places, width / 2, 2): cosines and sines
    rate = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(places, dtype=torch.float64)[:, None] * rate
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def _turned(x: Tensor, turns: Tensor) -> Tensor:  # (..., M, width), (M, width / 2, 2)
    """Pairs of channels (2i, 2i + 1), turned."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.to(x.dtype).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
