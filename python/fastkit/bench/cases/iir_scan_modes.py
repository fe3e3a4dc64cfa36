"""The other modes of iir_scan: a fixed filter, one for every sample, banks, sections in series, a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial, reduce
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case, Skip
from fastkit.bench.cases.iir_scan import (
    DeviceType,
    Form,
    ScanContest,
    chunk_parallel,
    draw_filters,
    loop,
    our_others,
    ours,
)
from fastkit.reference import IIRState


def cases(*, quick: bool = False) -> list[Case]:
    """Each mode forward and with backward, and a step forward. ``quick``: shapes that fit the caches."""
    many = (1, 64, 1024) if quick else (8, 256, 16384)
    time = 16384 if quick else 480000
    scans: list[tuple[type[_Mode], tuple[int, int, int], bool]] = [
        (Fixed, (16, 1, time), False),
        (Fixed, (1, 1, time), False),
        (TimeVarying, many, False),
        (Bank, many, False),
        (Bank, many, True),
        (Sections, (16, 1, time), False),
    ]
    return [
        *(
            case(mode, size, view=view, backward=backward, warm=quick)
            for mode, size, view in scans
            for backward in (False, True)
        ),
        step_case(64, 512),
    ]


def case(
    mode: type[_Mode],
    size: tuple[int, int, int],
    *,
    view: bool = False,
    backward: bool = False,
    warm: bool = False,
    device: DeviceType = "cpu",
) -> Case:
    """``view`` as in ``iir_scan.case``."""
    B, C, T = size
    shape = f"{B}x{T}x{C} view" if view else f"{B}x{C}x{T}"
    return Case(
        op=mode.op,
        shape=f"{shape} {mode.filters}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=mode.bytes[backward] * B * C * T,
        contest=partial(mode, size, view, backward, device),
        warm=warm,
        yardsticks=mode.yardsticks | our_others(device),
        device=device,
    )


class Yardstick(NamedTuple):
    """What a call gives that does something else than the op, for comparison; and its own error."""

    result: Any
    measure: Callable[[Any], float]


class _Mode(ScanContest):
    op: ClassVar[str] = "iir_scan"
    filters: ClassVar[str]
    longest_chunk: ClassVar[int]  # a chunk is a power of two that divides T
    bytes: ClassVar[tuple[int, int]]  # the floor of a sample: forward, with backward
    yardsticks: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, size: tuple[int, int, int], view: bool, backward: bool, device: DeviceType = "cpu"
    ) -> None:
        time = size[2]
        super().__init__(size, min(self.longest_chunk, time & -time), view, backward, device)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        raise NotImplementedError

    def error(self, result: Any) -> float:
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return super().error(result)


def _peer(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise Skip(f"{module.partition('.')[0]} is not installed") from None


# --- one filter for all ----------------------------------------------------------------------------------


class _Shared(_Mode):
    """Filters for all rows: there are few rows, and the coefficient gradients are sums over all of them."""

    longest_chunk = 256  # of the chunk-parallel forms
    count: ClassVar[int]

    def coefficients(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        a, b = draw_filters((1, 1, self.count), generator)
        grow = 0.999 / a[..., 1].amax().sqrt()  # so few that else none may be near the unit circle
        return a * torch.stack([grow, grow**2]), b

    def sample(self, t: Tensor) -> Tensor:
        return t

    def scipy_call(self, name: str, *filters: Tensor) -> Call:
        """A function of scipy.signal, on all rows at once."""
        function = getattr(_peer("scipy.signal"), name)
        coefficients = [t.numpy() for t in filters]
        x = self.inputs.x.numpy()
        return lambda: (function(*coefficients, x),)


class Fixed(_Shared):
    filters = "fixed"
    count = 1
    bytes = 8, 24

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers = {
            **self.makers_of_ours(_fixed),
            "chunk-parallel": partial(self.call, _fixed_chunk_parallel),
            "FFT": partial(self.call, _fft),
            "torchaudio": self.make_torchaudio,
            "philtorch": self.make_philtorch,
        }
        if self.device == "cuda":
            makers["compiled"] = partial(self.make_compiled, _fixed_chunk_parallel)
        elif not self.backward:
            makers["scipy"] = self.make_scipy
        return makers

    def make_scipy(self) -> Call:
        _, a, b, _ = self.inputs
        return self.scipy_call("lfilter", b.flatten(), _with_a0(a))

    def make_torchaudio(self) -> Call:
        lfilter = _peer("torchaudio.functional").lfilter
        return self.call(lambda x, a, b, _: lfilter(x, _with_a0(a), b.flatten(), clamp=False))

    def make_philtorch(self) -> Call:
        lfilter = _peer("philtorch.lti").lfilter
        return self.call(lambda x, a, b, _: lfilter(b.flatten(), a.flatten(), x.flatten(0, 1)).view_as(x))

    def exact(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _fixed_chunk_parallel(x, a, b, self.chunk)  # the reference would take minutes


def _fixed(x: Tensor, a: Tensor, b: Tensor, chunk: int, *, impl: Impl | None = None) -> Tensor:
    return ops.iir_scan(x, a, b, impl=impl)


def _fixed_chunk_parallel(
    x: Tensor, a: Tensor, b: Tensor, chunk: int, **steps: Callable[..., list[Tensor]]
) -> Tensor:
    chunks = (*x.shape[:2], x.shape[2] // chunk, -1)
    return chunk_parallel(x, a.expand(chunks), b.expand(chunks), chunk, **steps)


def _fft(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """Circular, with zeros after x for the impulse response to decay.

    The response in float64: in float32 its gradients are wrong by 6e-4 where poles have a radius of 0.999.
    """
    n = 1 << (x.shape[-1] + _TAIL - 1).bit_length()
    spectrum = rfft(x, n)
    response = rfft(b.flatten().double(), n) / rfft(_with_a0(a).double(), n)
    return irfft(spectrum * response.to(spectrum.dtype), n)[..., : x.shape[-1]]


_TAIL = 16384  # 0.999 to that power is less than a rounding error


def _with_a0(a: Tensor) -> Tensor:
    return pad(a.flatten(), (1, 0), value=1.0)


# --- sections in series ----------------------------------------------------------------------------------


class Sections(_Shared):
    op = "sosfilt"
    filters = "S=4"
    count = 4
    bytes = 8, 20  # what is between the sections is computed again, and so is y

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            "fastkit": partial(self.call, _sections),
            "chunk-parallel": partial(self.call, _sections_chunk_parallel),
        }
        if not self.backward:
            makers["scipy"] = self.make_scipy
        return makers

    def make_scipy(self) -> Call:
        _, a, b, _ = self.inputs
        return self.scipy_call("sosfilt", _sos(a, b))

    def exact(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _sections_chunk_parallel(x, a, b, self.chunk)


def _sections(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    return ops.sosfilt(x, _sos(a, b))


def _sections_chunk_parallel(x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    for a_s, b_s in zip(a.split(1, 2), b.split(1, 2), strict=True):
        x = _fixed_chunk_parallel(x, a_s, b_s, chunk)
    return x


def _sos(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([b[0, 0], pad(a[0, 0], (1, 0), value=1.0)], -1)


# --- one filter for every sample -------------------------------------------------------------------------


class TimeVarying(_Mode):
    filters = "chunk 1"
    longest_chunk = 1
    bytes = 28, 80

    def coefficients(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of runs of samples with one angle of the poles and radii a little apart: they stay stable."""
        B, C, T = self.size
        run = min(128, T & -T)
        a, _ = draw_filters((B, C, T // run), generator)
        shrink = 1 - 0.01 * torch.rand(B, C, T, 1, generator=generator)
        a = a.repeat_interleave(run, 2) * torch.cat([shrink, shrink**2], -1)
        return a, torch.randn(B, C, T, 3, generator=generator)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        return {"fastkit": partial(self.call, ours), "loop": partial(self.call, loop)}


# --- banks -----------------------------------------------------------------------------------------------


class Bank(_Mode):
    filters = "F=4"
    longest_chunk = 128
    bytes = 8, 20  # y of each filter is computed again
    yardsticks = frozenset({"1 filter"})

    def coefficients(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, C, T = self.size
        return draw_filters((B, C, T // self.chunk, 4), generator)

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        return {
            "fastkit": partial(self.call, ours),
            "4 calls": partial(self.call, partial(_each, ours)),
            "1 filter": self.make_one,
            "chunk-parallel": partial(self.call, partial(_each, chunk_parallel)),
        }

    def make_one(self) -> Call:
        """A quarter of the arithmetic, on as much memory: a bank is to take at most 1.3 times four of it."""
        one = ScanContest(self.size, self.chunk, self.view, self.backward)
        call = one.call(ours)
        return lambda: Yardstick(call(), one.error)


def _each(form: Form, x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """One filter of the bank at a time."""
    return reduce(
        torch.add, (form(x, a_f, b_f, chunk) for a_f, b_f in zip(a.unbind(3), b.unbind(3), strict=True))
    )


# --- one step --------------------------------------------------------------------------------------------


def step_case(B: int, C: int) -> Case:
    return Case(
        op="iir_step",
        shape=f"{B}x{C}",
        direction="fwd",
        floor_bytes=40 * B * C,  # x, y, and four numbers of state in and out
        contest=partial(Step, B, C),
        warm=True,
        yardsticks=frozenset({"with grad", "copies", "op call"}),
    )


class _Sample(NamedTuple):
    x: Tensor  # (B, C)
    a: Tensor  # (1, C, 2)
    b: Tensor  # (1, C, 3)
    state: IIRState


class Step:
    """A differentiable step is to take at most 1.5 times what the copies and the call of an op do."""

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
