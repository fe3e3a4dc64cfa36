"""mtadam on a GPU: small calls that reach each kernel, for compute-sanitizer (benchmarks/gpu.sh); streams,
graphs, equal bits, and no wait for the device.
"""

from typing import Any, NamedTuple

import pytest
import torch
from contexts import waits_are_errors
from torch import Tensor

from fastkit import ops
from fastkit._dispatch import unavailable
from fastkit.ops.mtadam import KERNELS
from fastkit.optim import MTAdam
from fastkit.reference.mtadam import mtadam_square_sums, mtadam_update_

pytestmark = [pytest.mark.native]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = 5, 0, 33, 1000, 8191, 8192, 30001  # around packs, warps and chunks


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return request.param


class State(NamedTuple):
    """The arguments of mtadam_update_."""

    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grad_norms: Tensor
    steps: Tensor
    max_exp_avg_sqs: list[Tensor]

    def map(self, function: Any) -> "State":
        def mapped(x: Any) -> Any:
            return [mapped(y) for y in x] if isinstance(x, list) else x if x is None else function(x)

        return State(*map(mapped, self))

    def clone(self) -> "State":
        return self.map(torch.clone)

    def written(self) -> list[Tensor]:
        lists = self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs
        return [*(t for of in lists for t in of), self.grad_norms, self.steps]

    def update(self, function: Any, **options: Any) -> None:
        *arguments, max_exp_avg_sqs = self
        function(*arguments, max_exp_avg_sqs=max_exp_avg_sqs or None, **options)


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def make(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES, amsgrad: bool = True) -> State:
    """Of three terms, on the CPU. Second moments are far from 0: what is divided by their roots errs no more
    than they do. The last tensor misses the second term, and no term reaches the first.
    """
    generator = torch.Generator().manual_seed(0)
    arithmetic, n = arithmetic_of(dtype), len(sizes)

    def draw(kind: torch.dtype, square: bool = False) -> list[Tensor]:
        values = [torch.randn(size, generator=generator).to(kind) for size in sizes]
        return [0.5 + x.abs() for x in values] if square else values

    grads: list[Tensor | None] = [g for _ in range(3) for g in draw(dtype)]
    grads[0] = grads[n] = grads[2 * n] = grads[2 * n - 1] = None
    return State(
        draw(dtype),
        grads,
        draw(arithmetic),
        [v for _ in range(3) for v in draw(arithmetic, square=True)],
        torch.rand(n, 3, generator=generator).to(arithmetic),
        torch.arange(n).to(arithmetic),
        draw(arithmetic, square=True) if amsgrad else [],
    )


def off_by_one(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def on_gpu(state: State, aligned: bool = True) -> State:
    moved = state.map(Tensor.cuda)
    return moved if aligned else moved.map(off_by_one)


def assert_near(state: State, expected: State, dtype: torch.dtype) -> None:
    """Up to some roundings of the largest value."""
    eps = 256 * torch.finfo(arithmetic_of(dtype)).eps
    stored = max(eps, 2 * torch.finfo(dtype).eps)
    for k, (result, value) in enumerate(zip(state.written(), expected.written(), strict=True)):
        error = (result.to("cpu", torch.float64) - value).abs()
        limit = (stored if k < len(state.params) else eps) * value.abs().amax() if value.numel() else 0.0
        assert (error <= limit).all()  # nor is NaN


OPTIONS: dict[str, dict[str, Any]] = {
    "coupled": {"weight_decay": 0.1, "ranks": (1.0, 0.5, 2.0), "max_scale": 1.01},
    "decoupled": {"weight_decay": 0.1, "decoupled": True, "anchor": 1, "nonfinite": "skip_term"},
    "scaled": {"grad_scales": torch.tensor([1.0, 2.0, 1024.0]), "found_inf": torch.zeros(())},
    "lr of a tensor": {"lr": torch.tensor(0.02, dtype=torch.float64), "eps": 1e-3},
}


def options_of(name: str, device: str = "cpu") -> dict[str, Any]:
    options = {"lr": 0.01} | OPTIONS[name]
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}


def expected_of(state: State, options: dict[str, Any]) -> State:
    expected = state.map(lambda t: t.to(torch.float64, copy=True))
    expected.update(mtadam_update_, **options)
    return expected


# Each choice of options in one dtype under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(dtype, name, aligned, marks=[pytest.mark.sanitize] if (i + aligned) % 4 == j else [])
    for i, dtype in enumerate(DTYPES)
    for j, name in enumerate(OPTIONS)
    for aligned in (True, False)
]


@pytest.mark.parametrize(("dtype", "name", "aligned"), CALLS, ids=str)
def test_every_kernel(impl, dtype, name, aligned):
    state = make(dtype, amsgrad=aligned)
    result = on_gpu(state, aligned)
    result.update(ops.mtadam_update_, impl=impl, **options_of(name, "cuda"))
    assert_near(result, expected_of(state, options_of(name)), dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_compared_is_comparable(dtype, name):
    """On a CPU, so that a mistake in this file is found without a GPU."""
    result = make(dtype)
    expected = expected_of(result, options_of(name))
    result.update(ops.mtadam_update_, impl="reference", **options_of(name))
    assert_near(result, expected, dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sums(impl, dtype):
    for aligned in (True, False):
        state = make(dtype)
        sums = ops.mtadam_square_sums(on_gpu(state, aligned).grads, len(SIZES), impl=impl)
        eps = torch.finfo(arithmetic_of(dtype)).eps
        expected = mtadam_square_sums(state.grads, len(SIZES))
        torch.testing.assert_close(sums.cpu(), expected, rtol=66 * eps, atol=0.0)  # a thread sums up to 64
        result, given = on_gpu(state), on_gpu(state)
        sums = ops.mtadam_square_sums(result.grads, len(SIZES), impl=impl)
        result.update(ops.mtadam_update_, lr=0.01, impl=impl)
        given.update(ops.mtadam_update_, lr=0.01, square_sums=sums, impl=impl)
        assert all(map(torch.equal, result.written(), given.written()))


def test_more_tensors_than_a_launch_takes(impl):
    state = make(torch.float32, sizes=tuple(i % 40 for i in range(1100)), amsgrad=False)
    result = on_gpu(state)
    result.update(ops.mtadam_update_, lr=0.01, impl=impl)
    assert_near(result, expected_of(state, {"lr": 0.01}), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_written_where_it_must_not_be(impl, value):
    before = on_gpu(make(torch.float32))
    result = before.clone()
    result.update(ops.mtadam_update_, lr=0.01, found_inf=torch.ones((), device="cuda"), impl=impl)
    assert all(map(torch.equal, result.written(), before.written()))
    for grad in result.grads[: len(SIZES)]:
        if grad is not None:
            grad[-1:] = value
    result.update(ops.mtadam_update_, lr=0.01, nonfinite="skip", impl=impl)
    assert all(map(torch.equal, result.params, before.params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits(impl, dtype):
    state = on_gpu(make(dtype, sizes=(7, 300_001)))
    first = state.clone()
    first.update(ops.mtadam_update_, lr=0.01, impl=impl)
    for _ in range(5):
        again = state.clone()
        again.update(ops.mtadam_update_, lr=0.01, impl=impl)
        assert all(map(torch.equal, again.written(), first.written()))


def test_kernels_run_on_the_current_stream(impl):
    """Gradients are written on it, late; a kernel on another stream would read what was there before."""
    state = on_gpu(make(torch.float32))
    expected, result = state.clone(), state.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected.update(ops.mtadam_update_, lr=0.01, impl=impl)
    late = result._replace(grads=[None if g is None else torch.zeros_like(g) for g in state.grads])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for grad, value in zip(late.grads, state.grads, strict=True):
            if grad is not None and value is not None:
                grad.copy_(value)
        late.update(ops.mtadam_update_, lr=0.01, impl=impl)
    stream.synchronize()
    assert all(map(torch.equal, late.written(), expected.written()))


def test_a_graph_replays_a_call(impl):
    """With the gradients and the learning rate of the moment."""
    state = on_gpu(make(torch.float32))
    expected = state.clone()
    rates = [torch.tensor(rate, dtype=torch.float64, device="cuda") for rate in (0.01, 0.01)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # what is loaded at a first call is there before the capture
        state.clone().update(ops.mtadam_update_, lr=rates[0], impl=impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        state.update(ops.mtadam_update_, lr=rates[0], impl=impl)
    assert all(map(torch.equal, state.written(), expected.written()))  # nothing has run
    for rate in (0.01, 0.05, 0.002):
        for each, lr in zip((state, expected), rates, strict=True):
            torch._foreach_mul_([g for g in each.grads if g is not None], 1.5)
            lr.fill_(rate)
        graph.replay()
        expected.update(ops.mtadam_update_, lr=rates[1], impl=impl)
        torch.cuda.synchronize()
        assert all(map(torch.equal, state.written(), expected.written()))


def test_nothing_waits_for_the_device(impl):
    state = on_gpu(make(torch.float32))
    options = options_of("scaled", "cuda") | {"lr": torch.tensor(0.01, dtype=torch.float64, device="cuda")}
    state.clone().update(ops.mtadam_update_, impl=impl, **options)  # asks for memory, and loads kernels
    with waits_are_errors():
        sums = ops.mtadam_square_sums(state.grads, len(SIZES), impl=impl)
        state.update(ops.mtadam_update_, impl=impl, **options)
        state.update(ops.mtadam_update_, impl=impl, square_sums=sums, **options)


# The optimizer

MODES = [
    pytest.param({}, id="batched"),
    pytest.param({"mode": "streaming", "on_nonfinite": "skip_term"}, id="streaming"),
]


def heads(options: dict[str, Any]) -> tuple[list[torch.nn.Parameter], MTAdam]:
    """A trunk and two heads, the second of which the first term does not reach."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(300, 40, device="cuda")) for _ in range(3)]
    return params, MTAdam(params, lr=torch.tensor(1e-2, device="cuda"), terms=2, **options)


def losses(params: list[torch.nn.Parameter]) -> list[Tensor]:
    trunk, first, second = params
    return [(trunk * first).square().sum(), (trunk * second).abs().sum()]


@pytest.mark.parametrize("options", MODES)
def test_a_step_of_the_optimizer_waits_for_nothing(impl, options):
    params, optimizer = heads(options)
    for _ in range(2):  # makes state, and what is copied to the device once
        optimizer.step(losses(params))
    with waits_are_errors():
        for _ in range(2):
            optimizer.step(losses(params))
    assert optimizer.state[params[0]]["step"] == 4


@pytest.mark.parametrize("options", MODES)
def test_a_graph_replays_a_step_of_the_optimizer(impl, options):
    (params, optimizer), (others, expected) = heads(options), heads(options)
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [[torch.randn(300, 40, device="cuda", generator=generator) for _ in range(3)] for _ in range(2)]
    given = [[grads[0][0], grads[0][1], None], [grads[1][0], None, grads[1][2]]]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(2):  # makes state, and what is copied to the device once
        with torch.cuda.stream(stream):
            optimizer.step_from_grads(given)
        torch.cuda.synchronize()
        expected.step_from_grads(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step_from_grads(given)
    for _ in range(3):
        torch._foreach_mul_([g for of_term in grads for g in of_term], 1.5)
        graph.replay()
        expected.step_from_grads(given)
        torch.cuda.synchronize()
        assert all(map(torch.equal, params, others))


def test_a_scaler_on_the_gpu(impl):
    """Of powers of two: the bits of training without it; inf skips a step."""
    (params, optimizer), (others, expected) = heads({}), heads({})
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(4):
        for term, loss in enumerate(losses(params)):
            optimizer.backward_term(term, loss * torch.inf if step == 2 and term else loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            expected.step(losses(others))
    assert all(map(torch.equal, params, others))
    assert scaler.get_scale() == 512
