"""The other modes of iir_scan: a fixed filter, one for every sample, banks, sections in series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case
from fastkit.bench.cases import iir_scan_peers as peers
from fastkit.bench.cases.iir_scan_chunks import ours
from fastkit.bench.cases.iir_scan_contest import ScanContest, draw_filters
from fastkit.bench.cases.iir_scan_forms import Form, chunk_parallel, loop
from fastkit.bench.contest import DeviceType, Yardstick, load, our_others
from fastkit.ops.iir_scan import KERNELS


def case(
    mode: type[_Mode],
    size: tuple[int, int, int],
    *,
    view: bool = False,
    backward: bool = False,
    warm: bool = False,
    device: DeviceType = "cpu",
) -> Case:
    """``view`` as in ``iir_scan_chunks.case``."""
    B, C, T = size
    shape = f"{B}x{T}x{C} view" if view else f"{B}x{C}x{T}"
    return Case(
        op=mode.op,
        shape=f"{shape} {mode.filters}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=mode.bytes[backward] * B * C * T,
        contest=partial(mode, size, view, backward, device),
        warm=warm,
        yardsticks=mode.yardsticks | our_others(device, KERNELS),
        device=device,
        peers=peers.PACKAGES,
    )


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
        function = getattr(load("scipy.signal"), name)
        coefficients = [t.numpy() for t in filters]
        x = self.inputs.x.numpy()
        return lambda: (function(*coefficients, x),)


class Fixed(_Shared):
    filters = "fixed"
    count = 1
    bytes: ClassVar[tuple[int, int]] = 8, 24

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
        lfilter = load("torchaudio.functional").lfilter
        return self.call(lambda x, a, b, _: lfilter(x, _with_a0(a), b.flatten(), clamp=False))

    def make_philtorch(self) -> Call:
        lfilter = load("philtorch.lti").lfilter
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
    bytes: ClassVar[tuple[int, int]] = 8, 20  # what is between the sections is computed again, and so is y

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
    bytes: ClassVar[tuple[int, int]] = 28, 80

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
        return {
            "fastkit": partial(self.call, ours),
            "loop": partial(self.call, loop),
            **self.makers_of_packages(),
        }


# --- banks -----------------------------------------------------------------------------------------------


class Bank(_Mode):
    filters = "F=4"
    longest_chunk = 128
    bytes: ClassVar[tuple[int, int]] = 8, 20  # y of each filter is computed again
    yardsticks: ClassVar[frozenset[str]] = frozenset({"1 filter"})

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
        """A quarter of the arithmetic, on as much memory."""
        one = ScanContest(self.size, self.chunk, self.view, self.backward)
        call = one.call(ours)
        return lambda: Yardstick(call(), one.error)


def _each(form: Form, x: Tensor, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """One filter of the bank at a time."""
    return reduce(
        torch.add, (form(x, a_f, b_f, chunk) for a_f, b_f in zip(a.unbind(3), b.unbind(3), strict=True))
    )
