"""What GPU kernels do that CPU kernels cannot get wrong: small calls that reach each of them, for
compute-sanitizer (benchmarks/gpu.sh); streams, graphs, more than one device.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.reference import IIRState


@pytest.fixture(params=[pytest.param(impl, marks=pytest.mark.gpu) for impl in ("cuda", "triton")])
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return request.param


class Mode(NamedTuple):
    op: str
    x: tuple[int, ...]
    filters: tuple[int, ...]  # the shape of a and b, but for the last axis
    options: dict[str, Any]
    sequences: int = 0  # packed
    state: bool = False


# Rows and times beside the widths of warps and tiles: so few rows that time is cut, and many.
MODES = {
    "fixed": Mode("iir_scan", (2, 3, 1030), (1, 1, 1), {}),
    "fixed, long": Mode("iir_scan", (1, 1, 5000), (1, 1, 1), {}),
    "chunks": Mode("iir_scan", (2, 33, 530), (2, 33, 9), {"chunk": 64}),
    "chunks, many rows": Mode("iir_scan", (70, 67, 70), (70, 67, 5), {"chunk": 16}),
    "chunks, no carry": Mode("iir_scan", (2, 3, 1030), (2, 1, 9), {"chunk": 128, "carry": False}),
    "chunk=1": Mode("iir_scan", (2, 3, 301), (2, 3, 301), {"chunk": 1}),
    "short chunks": Mode("iir_scan", (2, 3, 301), (2, 3, 101), {"chunk": 3}),
    "bank": Mode("iir_scan", (2, 3, 530), (2, 3, 5, 4), {"chunk": 128}),
    "states": Mode("iir_scan_with_state", (2, 3, 530), (2, 3, 5), {"chunk": 128}, state=True),
    "bank, states": Mode("iir_scan_with_state", (2, 3, 130), (1, 3, 1, 2), {}, state=True),
    "packed": Mode("iir_scan_with_state", (1, 3, 530), (1, 3, 7), {"chunk": 128}, sequences=4, state=True),
    "chunks longer than segments": Mode("iir_scan", (1, 2, 2500), (1, 2, 3), {"chunk": 1000, "carry": False}),
    "one sample": Mode("iir_scan", (1, 1, 1), (1, 1, 1), {}),
    "no sample": Mode("iir_scan_with_state", (2, 3, 0), (2, 3, 1), {}, state=True),
    "step": Mode("iir_step", (3, 40), (1, 40), {}, state=True),
    "step, a bank of one": Mode("iir_step", (3, 40), (1, 40, 1), {}, state=True),
    "step, bank": Mode("iir_step", (3, 40), (3, 40, 2), {}, state=True),
    "cascade": Mode("sosfilt", (2, 3, 530), (3,), {}),
}


class Inputs(NamedTuple):
    leaves: dict[str, Tensor]
    cotangents: tuple[Tensor, ...]  # of the outputs

    def to(self, *target: Any) -> "Inputs":
        return Inputs(
            {name: t.detach().to(*target) for name, t in self.leaves.items()},
            tuple(t.to(*target) for t in self.cotangents),
        )


def inputs_of(mode: Mode, dtype: torch.dtype = torch.float32, view: bool = False) -> Inputs:
    """On the CPU; ``view``: channels have stride 1."""
    generator = torch.Generator().manual_seed(0)
    arithmetic = torch.float32 if dtype.itemsize == 2 else dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(arithmetic)

    def signal() -> Tensor:
        x = draw(*mode.x).to(dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if view and x.dim() == 3 else x

    u1, u2 = (2 * torch.rand(2, *mode.filters, generator=generator) - 1).unbind()
    a = torch.stack([0.9 * u1 * (1 + 0.8 * u2), 0.8 * u2], -1)
    leaves = {"x": signal(), "a": a.to(arithmetic), "b": draw(*mode.filters, 3)}
    if not mode.state:
        return Inputs(leaves, (signal(),))
    rows = (mode.sequences or mode.x[0], mode.x[1])
    bank = mode.filters[3 if mode.op != "iir_step" else 2 :]
    states = {"state_y": draw(*rows, *bank, 2), "state_x": draw(*rows, 2)}
    return Inputs(leaves | states, (signal(), *(draw(*t.shape) for t in states.values())))


def outputs_of(module: Any, mode: Mode, inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    x, a, b, *state = inputs.leaves.values()
    op = getattr(module, mode.op)
    if mode.op == "sosfilt":
        return (op(x, torch.cat([b, torch.ones_like(a[..., :1]), a], -1), **options),)
    options = mode.options | options
    if mode.sequences and "cu_seqlens" not in options:
        options["cu_seqlens"] = OFFSETS.to(x.device)
    if not mode.state:
        return (op(x, a, b, **options),)
    y, end = op(x, a, b, IIRState(*state), **options)
    return y, end.y, end.x


OFFSETS = torch.tensor([0, 257, 257, 258, 530])  # one sequence is empty, and one has one sample


def results_of(
    module: Any, mode: Mode, inputs: Inputs, *, wanted: Sequence[str] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Outputs and the gradients of ``wanted``, of all leaves by default."""
    names = list(inputs.leaves) if wanted is None else wanted
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in inputs.leaves.items()}
    outputs = outputs_of(module, mode, Inputs(leaves, ()), **options)
    gradients = torch.autograd.grad(
        outputs, [leaves[name] for name in names], inputs.cotangents, materialize_grads=True
    )
    return *(y.detach() for y in outputs), *gradients


def run(mode: Mode, inputs: Inputs, impl: str, **options: Any) -> tuple[Tensor, ...]:
    """Results on the GPU; skips what the implementation says that it does not have."""
    try:
        return results_of(ops, mode, inputs.to("cuda"), impl=impl, **options)
    except RuntimeError as error:
        if f'impl="{impl}" has no' in str(error):
            pytest.skip(str(error))
        raise


def assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Up to some roundings of the largest value."""
    eps = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 256 * torch.finfo(dtype).eps
    for result, value in zip(results, expected, strict=True):
        assert result.shape == value.shape
        error = (result.to("cpu", torch.float64) - value).abs()
        assert (error <= eps * value.abs().max() if value.numel() else error).all()  # nor is NaN


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# Each mode and layout in one dtype under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(mode, view, dtype, marks=[pytest.mark.sanitize] if (i + 2 * view) % 4 == j else [])
    for i, mode in enumerate(MODES)
    for view in (False, True)
    for j, dtype in enumerate(DTYPES)
]


# Of what the sanitizer sees, each mode in one of its layouts.
COMPARED = [call for i, call in enumerate(call for call in CALLS if call.marks) if i % 4 in (0, 3)]


@pytest.mark.parametrize(("mode", "view", "dtype"), CALLS, ids=str)
def test_every_kernel(mode, view, dtype, impl):
    results = run(MODES[mode], inputs_of(MODES[mode], dtype, view), impl)
    assert_near(results, expected_of(mode, dtype, view), dtype)


@pytest.mark.parametrize(("mode", "view", "dtype"), COMPARED, ids=str)
def test_what_is_compared_is_comparable(mode, view, dtype):
    """On a CPU, so that a mistake in this file is found without a GPU."""
    results = results_of(ops, MODES[mode], inputs_of(MODES[mode], dtype, view), impl="cpu")
    assert_near(results, expected_of(mode, dtype, view), dtype)


@cache
def expected_of(mode: str, dtype: torch.dtype, view: bool) -> tuple[Tensor, ...]:
    return results_of(reference, MODES[mode], inputs_of(MODES[mode], dtype, view).to(torch.float64))


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        *product(["chunks", "bank", "states", "packed"], [["x"], ["a", "b"], ["b"]]),
        *product(["states", "packed"], [["state_y"], ["state_x"]]),
    ],
    ids=str,
)
def test_gradients_of_some(mode, wanted, impl):
    """What nobody asks for is not computed, and changes nothing else."""
    inputs = inputs_of(MODES[mode])
    everything = run(MODES[mode], inputs, impl)
    outputs = len(inputs.cotangents)
    places = [outputs + list(inputs.leaves).index(name) for name in wanted]
    some = run(MODES[mode], inputs, impl, wanted=wanted)
    for result, place in zip(some[outputs:], places, strict=True):
        assert torch.equal(result, everything[place])


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "offsets", [[0, 900, 4, 7, 530], [300, 5, 900, 7, 10], [-2, 300, 300, 5, 2]], ids=str
)
def test_offsets_that_do_not_fit_stay_within_bounds(offsets, impl):
    """Their values are not looked at on the host: what is read and written is made to fit."""
    mode = MODES["packed"]
    fill = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN: what is not written is seen
    try:
        results = run(mode, inputs_of(mode), impl, cu_seqlens=torch.tensor(offsets, device="cuda"))
    finally:
        torch.use_deterministic_algorithms(fill)
    assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("mode", ["chunks", "fixed, long"])
def test_the_same_call_gives_the_same_bits(mode, impl):
    inputs = inputs_of(MODES[mode])
    first = run(MODES[mode], inputs, impl)
    for _ in range(5):
        for again, result in zip(run(MODES[mode], inputs, impl), first, strict=True):
            assert torch.equal(again, result)


ON_A_STREAM = ["chunks", "fixed, long", "bank", "packed"]  # all that launch more than one kernel


@pytest.mark.parametrize("mode", ON_A_STREAM)
def test_kernels_run_on_the_current_stream(mode, impl):
    """x is written on it, late; a kernel on another stream would read what was there before."""
    mode = MODES[mode]
    inputs = inputs_of(mode).to("cuda")
    options = offsets_of(mode)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # also asks for the memory that it will have again
        expected = run(mode, inputs, impl, **options)
    late = inputs._replace(leaves={**inputs.leaves, "x": torch.zeros_like(inputs.leaves["x"])})
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.leaves["x"].copy_(inputs.leaves["x"])
        results = run(mode, late, impl, **options)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


def offsets_of(mode: Mode) -> dict[str, Tensor]:
    """On the GPU before the call: a copy from the host would wait for all that is on the stream."""
    return {"cu_seqlens": OFFSETS.cuda()} if mode.sequences else {}


@pytest.mark.parametrize("mode", ON_A_STREAM)
def test_a_graph_replays_a_call(mode, impl):
    """Forward and backward."""
    mode = MODES[mode]
    inputs = inputs_of(mode).to("cuda")
    options = offsets_of(mode)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        run(mode, inputs, impl, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run(mode, inputs, impl, **options)
    inputs.leaves["x"].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, run(mode, inputs, impl, **options)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors(impl):
    mode = MODES["chunks"]
    inputs = inputs_of(mode)
    (expected,) = outputs_of(ops, mode, inputs.to("cuda:0"), impl=impl)
    (y,) = outputs_of(ops, mode, inputs.to("cuda:1"), impl=impl)
    assert y.device.index == 1 and torch.equal(y.cpu(), expected.cpu())
