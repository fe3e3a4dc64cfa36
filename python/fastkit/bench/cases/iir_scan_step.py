"""iir_step: one sample, which takes about as long as the call of any op does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit.bench.case import Call, Case
from fastkit.bench.cases.iir_scan_contest import draw_filters
from fastkit.bench.contest import Yardstick
from fastkit.reference import IIRState


def case(B: int, C: int) -> Case:
    return Case(
        op="iir_step",
        shape=f"{B}x{C}",
        direction="fwd",
        floor_bytes=40 * B * C,  # x, y, and four numbers of state in and out
        contest=partial(_Step, B, C),
        warm=True,
        yardsticks=frozenset({"with grad", "copies", "op call"}),
    )


class _Sample(NamedTuple):
    x: Tensor  # (B, C)
    a: Tensor  # (1, C, 2)
    b: Tensor  # (1, C, 3)
    state: IIRState


class _Step:
    """A step, beside copies of its arguments and the call of any differentiable op."""

    def __init__(self, B: int, C: int) -> None:
        self.size = B, C

    @cached_property
    def inputs(self) -> _Sample:
        B, C = self.size
        generator = torch.Generator().manual_seed(0)
        a, b = draw_filters((1, C), generator)
        y_state, x_state = torch.randn(2, B, C, 2, generator=generator).unbind()
        return _Sample(torch.randn(B, C, generator=generator), a, b, IIRState(y_state, x_state))

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        return {
            "fastkit": self.make_ours,
            "with grad": self.make_with_grad,
            "copies": self.make_copies,
            "op call": self.make_op_call,
            "eager": self.make_eager,
        }

    def make_ours(self) -> Call:
        return partial(_step, *self.inputs)

    def make_with_grad(self) -> Call:
        x, a, b, state = self.inputs
        x, a, b, *state = (t.clone().requires_grad_() for t in (x, a, b, *state))
        return partial(_step, x, a, b, IIRState(*state))

    def make_copies(self) -> Call:
        """Of x and of the state: all that a step moves."""
        sources = (self.inputs.x, *self.inputs.state)
        targets = [torch.empty_like(t) for t in sources]

        def copies() -> Yardstick:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return Yardstick(targets, partial(_difference, sources))

        return copies

    def make_op_call(self) -> Call:
        """What PyTorch takes for any differentiable op that is written in Python: a copy of one number."""
        number = torch.ones(1, requires_grad=True)
        return lambda: Yardstick([_Clone.apply(number)], partial(_difference, [number]))

    def make_eager(self) -> Call:
        return partial(_eager_step, *self.inputs)

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return _difference(self.expected, result)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        x, a, b, state = self.inputs
        state = IIRState(*(t.double() for t in state))
        return _flat(reference.iir_step(x.double(), a.double(), b.double(), state))


class _Clone(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs


def _step(x: Tensor, a: Tensor, b: Tensor, state: IIRState) -> tuple[Tensor, ...]:
    return _flat(ops.iir_step(x, a, b, state))


def _flat(result: tuple[Tensor, IIRState]) -> tuple[Tensor, ...]:
    y, state = result
    return y, *state


def _eager_step(x: Tensor, a: Tensor, b: Tensor, state: IIRState) -> tuple[Tensor, ...]:
    """The fewest operations."""
    y = (b[..., 1:] * state.x).sum(-1).addcmul_(b[..., 0], x).sub_((a * state.y).sum(-1))
    return y, torch.stack([y, state.y[..., 0]], -1), torch.stack([x, state.x[..., 0]], -1)


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The largest in any tensor, relative to its largest value."""
    errors = [
        (a.detach() - e.detach()).abs().amax() / e.detach().abs().amax()
        for e, a in zip(expected, actual, strict=True)
    ]
    return float(torch.stack(errors).amax())
