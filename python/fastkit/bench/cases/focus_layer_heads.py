"""FocusLayer in training, beside the causal attention that it is to replace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastkit.bench.case import Call, Case
from fastkit.bench.cases.focus_layer_filter import eager, error, train
from fastkit.bench.contest import DeviceType, Yardstick
from fastkit.nn import FocusLayer
from fastkit.reference import focus_gates

SDPA, SOFTMAX = "attention, SDPA", "attention, softmax"


def case(
    B: int,
    T: int,
    C: int,
    *,
    attn_chunk: int = 128,
    bin_length: int = 128,
    num_heads: int = 1,
    softmax: bool = True,
    warm: bool = False,
    device: DeviceType = "cpu",
) -> Case:
    """Its floor is no floor: attention over all tokens, with as many heads, and the time that this takes."""
    heads = f" {num_heads} heads" if num_heads > 1 else ""
    return Case(
        op="FocusLayer",
        shape=f"{B}x{T}x{C} chunk {attn_chunk} bin {bin_length}{heads}",
        direction="fwd+bwd",
        floor_bytes=4 * 4 * B * T * C,  # x, o, and their gradients
        contest=partial(_Layer, (B, T, C), attn_chunk, bin_length, num_heads, softmax, device),
        warm=warm,
        tolerance=1e-3,
        yardsticks=frozenset({SDPA, SOFTMAX} if softmax else {SDPA}),
        floor=SDPA,
        device=device,
    )


class _Layer:
    """o, and the gradients to x and to all parameters."""

    def __init__(
        self,
        size: tuple[int, int, int],
        attn_chunk: int,
        bin_length: int,
        num_heads: int,
        softmax: bool,
        device: DeviceType,
    ) -> None:
        self.size = size
        self.attn_chunk = attn_chunk
        self.bin_length = bin_length
        self.num_heads = num_heads
        self.softmax = softmax
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        x, go = torch.randn(2, *self.size, generator=generator, device=self.device).unbind()
        return x.clone().requires_grad_(), go.clone()

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            "fastkit": lambda: self.call(self.layer(FocusLayer)),
            SDPA: lambda: self.make_head(_sdpa),
            "eager": lambda: self.call(self.layer(_EagerLayer)),
        }
        if self.softmax:
            makers[SOFTMAX] = lambda: self.make_head(_softmax)
        return makers

    def layer(self, kind: type[FocusLayer]) -> FocusLayer:
        torch.manual_seed(0)
        return kind(
            self.size[2],
            attn_chunk=self.attn_chunk,
            bin_length=self.bin_length,
            num_heads=self.num_heads,
        ).to(self.device)

    def call(self, module: nn.Module) -> Call:
        x, go = self.inputs
        return partial(train, module, x, go)

    def make_head(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        torch.manual_seed(0)
        head = _Head(self.size[2], self.num_heads, attend).to(self.device)
        x, go = self.inputs

        def call() -> Yardstick:
            return Yardstick(train(head, x, go)[:2], partial(self.error_of_head, head))

        return call

    def error_of_head(self, head: _Head, result: Sequence[Tensor]) -> float:
        """Of the first row."""
        exact = copy.deepcopy(head).cpu().double()
        x, go = (t.detach()[:1].cpu().double() for t in self.inputs)
        return error(train(exact, x.requires_grad_(), go)[:2], [t[:1] for t in result])

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return error(self.expected, result)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        x, go = (t.detach().cpu().double() for t in self.inputs)
        return train(self.layer(_EagerLayer).cpu().double(), x.requires_grad_(), go)


class _EagerLayer(FocusLayer):
    """The same in PyTorch's operations."""

    def _mix(self, x: Tensor, maxima: Tensor | None, residual: Tensor) -> Tensor:
        f = eager(self.filter, x)
        k, v = self.key_value(f).split([self.qk_size, self.channels], -1)
        y = self._attend(self.query(x), k, v)
        return focus_gates.mix(self.gates(f), y, self.reset, residual)


class _Head(nn.Module):
    """Causal attention with the projections that it needs."""

    def __init__(
        self, channels: int, num_heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.num_heads = num_heads
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.mT) * q.shape[3] ** -0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
