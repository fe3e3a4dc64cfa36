"""What GPU kernels do that CPU kernels cannot get wrong: small calls that reach each of them, for
compute-sanitizer (benchmarks/gpu.sh); streams, graphs, more than one device.
"""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.reference import IIRState

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
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
    "one sample": Mode("iir_scan", (1, 1, 1), (1, 1, 1), {}),
    "step": Mode("iir_step", (3, 40), (1, 40), {}, state=True),
    "cascade": Mode("sosfilt", (2, 3, 530), (3,), {}),
}


def inputs_of(mode: Mode, dtype: torch.dtype, view: bool) -> dict[str, Tensor]:
    """On the CPU; ``view``: channels have stride 1."""
    generator = torch.Generator().manual_seed(0)
    arithmetic = torch.float32 if dtype.itemsize == 2 else dtype
    u1, u2 = (2 * torch.rand(2, *mode.filters, generator=generator) - 1).unbind()
    a = torch.stack([0.9 * u1 * (1 + 0.8 * u2), 0.8 * u2], -1)
    x = torch.randn(mode.x, generator=generator).to(dtype)
    if view and x.dim() == 3:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = {"x": x, "a": a.to(arithmetic)}
    inputs["b"] = torch.randn(*mode.filters, 3, generator=generator).to(arithmetic)
    if mode.state:
        rows = (mode.sequences or mode.x[0], mode.x[1])
        bank = mode.filters[3 if mode.op != "iir_step" else 2 :]
        inputs["state_y"] = torch.randn(*rows, *bank, 2, generator=generator).to(arithmetic)
        inputs["state_x"] = torch.randn(*rows, 2, generator=generator).to(arithmetic)
    return inputs


def outputs_of(module: Any, mode: Mode, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    x, a, b, *state = inputs.values()
    op = getattr(module, mode.op)
    if mode.op == "sosfilt":
        return (op(x, torch.cat([b, torch.ones_like(a[..., :1]), a], -1), **options),)
    options |= mode.options
    if mode.sequences:  # one of them empty, and one of one sample
        options["cu_seqlens"] = torch.tensor([0, 257, 257, 258, 530], device=x.device)
    if not mode.state:
        return (op(x, a, b, **options),)
    y, end = op(x, a, b, IIRState(*state), **options)
    return y, end.y, end.x


def results_of(module: Any, mode: Mode, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = outputs_of(module, mode, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, [*leaves.values()], cotangents)


def run(mode: Mode, inputs: dict[str, Tensor], impl: str) -> tuple[Tensor, ...]:
    """Results on the GPU; skips what the implementation says that it does not have."""
    try:
        return results_of(ops, mode, {name: t.cuda() for name, t in inputs.items()}, impl=impl)
    except RuntimeError as error:
        if f'impl="{impl}" has no' in str(error):
            pytest.skip(str(error))
        raise


def assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Up to some roundings of the largest value."""
    eps = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 256 * torch.finfo(dtype).eps
    for result, value in zip(results, expected, strict=True):
        error = (result.to("cpu", torch.float64) - value).abs().max()
        assert error <= eps * value.abs().max()  # nor is NaN


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["time", "channels"])
@pytest.mark.parametrize("mode", MODES)
def test_every_kernel(mode, view, dtype, impl):
    results = run(MODES[mode], inputs_of(MODES[mode], dtype, view), impl)
    assert_near(results, expected_of(mode, dtype, view), dtype)


@cache
def expected_of(mode: str, dtype: torch.dtype, view: bool) -> tuple[Tensor, ...]:
    inputs = inputs_of(MODES[mode], dtype, view)
    return results_of(reference, MODES[mode], {name: t.double() for name, t in inputs.items()})


@pytest.mark.parametrize("mode", ["chunks", "fixed, long"])
def test_the_same_call_gives_the_same_bits(mode, impl):
    inputs = inputs_of(MODES[mode], torch.float32, view=False)
    first = run(MODES[mode], inputs, impl)
    for _ in range(5):
        for again, result in zip(run(MODES[mode], inputs, impl), first, strict=True):
            assert torch.equal(again, result)


def test_kernels_run_on_the_current_stream(impl):
    """x is written on it, late; a kernel on another stream would read what was there before."""
    mode = MODES["chunks"]
    inputs = {name: t.cuda() for name, t in inputs_of(mode, torch.float32, view=False).items()}
    (expected,) = outputs_of(ops, mode, inputs, impl=impl)
    late = {**inputs, "x": torch.zeros_like(inputs["x"])}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late["x"].copy_(inputs["x"])
        (y,) = outputs_of(ops, mode, late, impl=impl)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_a_graph_replays_a_call(impl):
    mode = MODES["fixed, long"]
    inputs = {name: t.cuda() for name, t in inputs_of(mode, torch.float32, view=False).items()}
    outputs_of(ops, mode, inputs, impl=impl)  # Triton compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = outputs_of(ops, mode, inputs, impl=impl)
    inputs["x"].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    (expected,) = outputs_of(ops, mode, inputs, impl=impl)
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors(impl):
    mode = MODES["chunks"]
    inputs = inputs_of(mode, torch.float32, view=False)
    (expected,) = outputs_of(ops, mode, {name: t.cuda(0) for name, t in inputs.items()}, impl=impl)
    (y,) = outputs_of(ops, mode, {name: t.cuda(1) for name, t in inputs.items()}, impl=impl)
    assert y.device.index == 1 and torch.equal(y.cpu(), expected.cpu())
