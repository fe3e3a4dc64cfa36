"""A step of MTAdam on given gradients, beside the same in PyTorch's foreach ops and beside steps of Adam."""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# torch._foreach_*: what torch.optim itself is made of

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastkit import reference
from fastkit.bench.case import Call, Case
from fastkit.bench.contest import DeviceType, Yardstick, compiler, makers_of_ours
from fastkit.ops.mtadam import KERNELS
from fastkit.optim import MTAdam

FUSED, FOREACH = "Adam, fused, each term", "Adam, foreach, each term"
_TERMS, _LR, _BETAS, _EPS = 3, 1e-3, (0.9, 0.999, 0.9), 1e-8


def case(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    *,
    warm: bool = False,
    compile: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """Of three terms in float32; the floor reads gradients, reads and writes moments and parameters."""
    passes = _TERMS + 2 * (_TERMS + 1) + 2
    return Case(
        op="mtadam",
        shape=f"{name}, L={_TERMS}",
        direction="fwd",
        floor_bytes=4 * passes * sum(map(numel, shapes)),
        contest=partial(_Step, shapes, compile, device),
        warm=warm,
        yardsticks=frozenset({FUSED, FOREACH}),
        device=device,
    )


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


class _Step:
    """Parameters after some steps: a call goes on from the one before, a new contestant from the start."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], compile: bool, device: DeviceType) -> None:
        self.shapes = shapes
        self.compile = compile
        self.device: DeviceType = device

    @cached_property
    def start(self) -> list[Tensor]:
        return [0.02 * p for p in self.randn(0)]

    @cached_property
    def grads(self) -> list[list[Tensor]]:
        """Of each term, the later ones larger."""
        return [[10.0**term * g for g in self.randn(1 + term)] for term in range(_TERMS)]

    def randn(self, seed: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.randn(shape, generator=generator, device=self.device) for shape in self.shapes]

    @cached_property
    def params(self) -> list[torch.nn.Parameter]:
        """All contestants step the same, in turn: of a billion there is no room for more."""
        return [torch.nn.Parameter(p.clone()) for p in self.start]

    def begin(self, *state: Tensor) -> None:
        torch._foreach_copy_([p.data for p in self.params], self.start)
        torch._foreach_zero_(list(state))

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        compiled = {"compiled": self.make_compiled} if self.compile else {}
        return {
            **makers_of_ours(self.device, KERNELS, lambda impl: self.make_ours()),
            "foreach": self.make_foreach,
            **compiled,
            FUSED: partial(self.make_adam, fused=True),
            FOREACH: partial(self.make_adam, fused=False),
        }

    @cached_property
    def optimizer(self) -> MTAdam:
        return MTAdam(self.params, lr=_LR, betas=_BETAS, eps=_EPS, terms=_TERMS)

    def make_ours(self) -> Call:
        """By the kernel of the device."""
        self.optimizer.step_from_grads(self.grads)
        self.begin(*(entry for state in self.optimizer.state.values() for entry in state.values()))

        def call() -> tuple[list[torch.nn.Parameter], Tensor]:
            self.optimizer.step_from_grads(self.grads)
            return self.params, self.optimizer.state[self.params[0]]["step"]

        return call

    @cached_property
    def merged(self) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        """First moment, second moments by term, norms: what foreach ops step."""
        zeros = [torch.zeros_like(p) for p in self.start]
        squares = [[torch.zeros_like(p) for p in self.start] for _ in range(_TERMS)]
        return zeros, squares, torch.zeros(_TERMS, len(zeros), device=self.device)

    def make_foreach(self) -> Call:
        exp_avgs, exp_avg_sqs, norms = self.merged
        self.begin(*exp_avgs, *(v for of_term in exp_avg_sqs for v in of_term), norms)
        steps = torch.zeros(())

        def call() -> tuple[list[Tensor], Tensor]:
            steps.add_(1)
            params = [p.data for p in self.params]
            _by_foreach(params, self.grads, exp_avgs, exp_avg_sqs, norms, int(steps))
            return params, steps

        return call

    def make_compiled(self) -> Call:
        """What a compiler makes of the step of one tensor, for any number of elements."""
        form = compiler(self.device)(_of_one, dynamic=True)
        exp_avgs, exp_avg_sqs, norms = self.merged
        steps = torch.zeros((), device=self.device)
        rows = [
            (norms[:, i], *(t.flatten() for t in (p.data, m, *gradients, *squares)))
            for i, (p, m, gradients, squares) in enumerate(
                zip(
                    self.params,
                    exp_avgs,
                    zip(*self.grads, strict=True),
                    zip(*exp_avg_sqs, strict=True),
                    strict=True,
                )
            )
        ]

        def call() -> tuple[list[torch.nn.Parameter], Tensor]:
            steps.add_(1)
            for row in rows:
                form(steps, *row)
            return self.params, steps

        call()  # which compiles
        self.begin(*exp_avgs, *(v for of_term in exp_avg_sqs for v in of_term), norms, steps)
        return call

    @cached_property
    def of_adam(self) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Of each term: both moments, and steps."""

        def zeros() -> list[Tensor]:
            return [torch.zeros_like(p) for p in self.start]

        return [(zeros(), zeros(), [p.new_zeros(()) for p in self.start]) for _ in range(_TERMS)]

    def make_adam(self, *, fused: bool) -> Call:
        """A step of Adam for each term, which balances nothing."""
        self.begin(*(entry for of_term in self.of_adam for entries in of_term for entry in entries))
        beta1, beta2, _ = _BETAS
        # foreach reads its steps on the host
        of_adam = [(m, v, steps if fused else [s.cpu() for s in steps]) for m, v, steps in self.of_adam]

        def call() -> Yardstick:
            params = [p.data for p in self.params]
            for grads, (exp_avgs, exp_avg_sqs, steps) in zip(self.grads, of_adam, strict=True):
                adam(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    steps,
                    foreach=not fused,
                    fused=fused,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=_LR,
                    weight_decay=0.0,
                    eps=_EPS,
                    maximize=False,
                )
            return Yardstick((params, of_adam[0][2][0]), self.error_of_adam)

        return call

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return self.error_from(_expected, result)

    def error_of_adam(self, result: Any) -> float:
        return self.error_from(_expected_of_adam, result)

    def error_from(self, expected: Callable[..., Tensor], result: Any) -> float:
        """Of the way that parameters have gone, in three tensors: the smallest, a middle and a large one."""
        params, steps = result
        order = sorted(range(len(self.shapes)), key=lambda i: numel(self.shapes[i]))
        errors = []
        for i in {order[0], order[len(order) // 2], order[max(len(order) - 2, 0)]}:
            start = self.start[i].cpu().double()
            way = expected(start, [g[i].cpu().double() for g in self.grads], int(steps)) - start
            errors.append((params[i].detach().cpu().double() - start - way).abs().amax() / way.abs().amax())
        return float(torch.stack(errors).amax())


def _expected(start: Tensor, grads: list[Tensor], steps: int) -> Tensor:
    param, exp_avg = start.clone(), torch.zeros_like(start)
    exp_avg_sqs = [torch.zeros_like(start) for _ in grads]
    norms, count = start.new_zeros(1, len(grads)), start.new_zeros(1)
    for _ in range(steps):
        reference.mtadam_update_(
            [param], grads, [exp_avg], exp_avg_sqs, norms, count, lr=_LR, betas=_BETAS, eps=_EPS
        )
    return param


def _expected_of_adam(start: Tensor, grads: list[Tensor], steps: int) -> Tensor:
    """Of constant gradients both moments are the same multiples of them at every step."""
    return start - steps * sum(_LR * g / (g.abs() + _EPS) for g in grads)


def _by_foreach(
    params: list[Tensor],
    grads: list[list[Tensor]],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[list[Tensor]],
    norms: Tensor,
    step: int,
) -> None:
    """With a merged first moment, in as few passes as these ops allow; all terms are alive."""
    beta1, beta2, beta3 = _BETAS
    raw = torch.stack([torch.stack(torch._foreach_norm(of_term)) for of_term in grads])
    norms.copy_(raw if step == 1 else norms.lerp(raw, 1 - beta3))
    factors = norms[0] / norms
    total: list[Tensor] = []
    most: list[Tensor] = []
    for of_term, squares, factor in zip(grads, exp_avg_sqs, factors, strict=True):
        h = torch._foreach_mul(of_term, list(factor.unbind()))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, h, h, 1 - beta2)
        if total:
            torch._foreach_add_(total, h)
            torch._foreach_maximum_(most, squares)
        else:
            total, most = list(h), [v.clone() for v in squares]
    torch._foreach_lerp_(exp_avgs, total, 1 - beta1)
    torch._foreach_sqrt_(most)
    torch._foreach_div_(most, math.sqrt(1 - beta2**step))
    torch._foreach_add_(most, _EPS)
    torch._foreach_addcdiv_(params, exp_avgs, most, -_LR / (1 - beta1**step))


def _of_one(step: Tensor, norms: Tensor, param: Tensor, exp_avg: Tensor, *rest: Tensor) -> None:
    """The same for one tensor, flat: its gradients and second moments of each term are the rest."""
    grads, exp_avg_sqs = rest[:_TERMS], rest[_TERMS:]
    beta1, beta2, beta3 = _BETAS
    raw = torch.stack([g.square().sum() for g in grads]).sqrt()
    norms.copy_(torch.where(step == 1, raw, norms.lerp(raw, 1 - beta3)))
    scaled = [norms[0] / norms[term] * g for term, g in enumerate(grads)]
    for v, h in zip(exp_avg_sqs, scaled, strict=True):
        v.mul_(beta2).addcmul_(h, h, value=1 - beta2)
    exp_avg.lerp_(sum(scaled[1:], scaled[0]), 1 - beta1)
    most = reduce(torch.maximum, exp_avg_sqs)
    denominator = (most / (1 - beta2**step)).sqrt() + _EPS
    param.sub_(_LR / (1 - beta1**step) * exp_avg / denominator)
