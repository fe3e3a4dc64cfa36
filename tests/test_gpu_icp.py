"""icp_epoch on a GPU: small calls that reach each kernel, for compute-sanitizer (benchmarks/gpu.sh); streams,
graphs, equal bits, and no wait for the device.
"""

import math

import pytest
import torch
from contexts import waits_are_errors

from fastkit import ops
from fastkit._dispatch import unavailable
from fastkit.ops.icp import KERNELS
from fastkit.testing.icp import ICPSize, Inputs, alone, assert_equal, check, make_inputs

pytestmark = [pytest.mark.native]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return request.param


# Around tiles of queries (64) and keys (128), pieces of batches (16), what a thread owns (2 x 2 up to 32
# columns, 4 x 4 up to 64), and a sort in shared memory (4096 rows); wider tables are PyTorch's products.
SIZES = [
    ICPSize(1, 1, 1, 1), ICPSize(63, 130, 3, 15), ICPSize(128, 65, 25, 16), ICPSize(200, 257, 32, 100),
    ICPSize(129, 128, 33, 33), ICPSize(300, 140, 50, 64), ICPSize(100, 100, 64, 100),
    ICPSize(9001, 40, 2, 20), ICPSize(90, 80, 65, 40),
]  # fmt: skip
OPTIONS = {
    "adam": {
        "batch_size": 10_000,
        "mutual_only": True,
    },  # of one step: more of them err more than budgets say
    "damped": {"eps": 1.0, "lr": 0.5, "epoch": 2**32 - 1},
    "mutual": {"eps": 1.0, "lr": 0.5, "mutual_only": True, "cycle_weight": 1.0},
}


def options_of(size: ICPSize, name: str) -> dict:
    return {"batch_size": size.B} | OPTIONS[name]


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in inputs))


# Each size with one choice of options under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(size, name, marks=[pytest.mark.sanitize] if i % 3 == j else [])
    for i, size in enumerate(SIZES)
    for j, name in enumerate(OPTIONS)
]


@pytest.mark.parametrize(("size", "name"), CALLS, ids=str)
def test_every_kernel(impl, size, name):
    check(on_gpu(make_inputs(size.n, size.m, size.D)), impl=impl, **options_of(size, name))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [SIZES[1], SIZES[4]], ids=str)
def test_what_is_compared_is_comparable(size, name):
    """On a CPU, so that a mistake in this file is found without a GPU."""
    check(make_inputs(size.n, size.m, size.D), impl="reference", **options_of(size, name))


@pytest.mark.parametrize("D", [25, 50, 65])
def test_many_steps(impl, D):
    check(on_gpu(make_inputs(400, 390, D)), batch_size=32, eps=10.0, impl=impl)


@pytest.mark.parametrize("D", [25, 64, 65])
@pytest.mark.parametrize("mutual_only", [False, True])
def test_a_restart_does_not_see_others(impl, D, mutual_only):
    inputs = on_gpu(make_inputs(300, 310, D, restarts=6))
    options = {"epoch": 1, "batch_size": 50, "mutual_only": mutual_only, "impl": impl}
    together = ops.icp_epoch(*inputs, **options)
    for r in range(6):
        found = ops.icp_epoch(*alone(inputs, r), **options)
        assert_equal(found, type(together)(*(t[r : r + 1] for t in together)))
    for _ in range(5):
        assert_equal(ops.icp_epoch(*inputs, **options), together)
    pairs = together.nearest_target, together.nearest_source
    assert_equal(ops.icp_epoch(*inputs, pairs=pairs, **options), together)


def test_more_restarts_than_are_mapped_at_once(impl):
    inputs = on_gpu(make_inputs(2000, 1900, 25, restarts=200))
    together = ops.icp_epoch(*inputs, epoch=0, impl=impl)
    for r in (0, 77, 148, 199):
        found = ops.icp_epoch(*alone(inputs, r), epoch=0, impl=impl)
        assert_equal(found, type(together)(*(t[r : r + 1] for t in together)))


@pytest.mark.sanitize
@pytest.mark.parametrize("D", [7, 40, 65])
def test_what_is_not_finite_stays_in_its_restart(impl, D):
    inputs = on_gpu(make_inputs(140, 150, D, restarts=4))
    inputs.w_yx[1, 0, 0], inputs.w_xy[2] = math.nan, math.inf
    found = ops.icp_epoch(*inputs, epoch=0, batch_size=32, impl=impl)
    assert found.cost.isinf().tolist() == [False, True, True, False]
    for r in (1, 2):
        for new, old in zip(found[:2], inputs[2:4], strict=True):
            assert torch.equal(new[r].nan_to_num(nan=-1.0), old[r].nan_to_num(nan=-1.0))
    for r in (0, 3):
        one = ops.icp_epoch(*alone(inputs, r), epoch=0, batch_size=32, impl=impl)
        assert_equal(one, type(found)(*(t[r : r + 1] for t in found)))


@pytest.mark.sanitize
@pytest.mark.parametrize("mutual_only", [False, True])
@pytest.mark.parametrize("wrong", [-1, -(2**40), 150, 2**31, 2**40])
def test_pairs_that_no_one_has_checked_do_no_harm(impl, wrong, mutual_only):
    inputs = on_gpu(make_inputs(140, 150, 7))
    there = torch.zeros(2, 140, dtype=torch.int64, device="cuda")
    back = torch.zeros(2, 150, dtype=torch.int64, device="cuda")
    there[0, 5], back[0, 149] = wrong, wrong
    found = ops.icp_epoch(
        *inputs, epoch=0, batch_size=32, pairs=(there, back), mutual_only=mutual_only, impl=impl
    )
    assert found.cost.isinf().tolist() == [True, False]
    assert torch.equal(found.w_xy[0], inputs.w_xy[0])
    assert torch.equal(found.nearest_target, there) and torch.equal(found.nearest_source, back)
    assert found.mutual.tolist() == [1, 1]


def test_any_strides(impl):
    inputs = on_gpu(make_inputs(70, 80, 9, restarts=3))
    strided = Inputs(
        inputs.source.T.contiguous().T,
        torch.stack([inputs.target, inputs.target], -1)[..., 1],
        inputs.w_xy.mT.contiguous().mT,
        inputs.w_yx.transpose(0, 2).contiguous().transpose(0, 2),
        inputs.seeds.repeat_interleave(2)[::2],
    )
    options = {"epoch": 0, "batch_size": 16, "impl": impl}
    assert_equal(ops.icp_epoch(*strided, **options), ops.icp_epoch(*inputs, **options))


def test_kernels_run_on_the_current_stream(impl):
    """Tables are written on it, late; a kernel on another stream would read what was there before."""
    inputs = on_gpu(make_inputs(140, 150, 25))
    options = {"epoch": 0, "batch_size": 32, "impl": impl}
    expected = ops.icp_epoch(*inputs, **options)
    late = Inputs(torch.zeros_like(inputs.source), *inputs[1:])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.source.copy_(inputs.source)
        found = ops.icp_epoch(*late, **options)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("mutual_only", [False, True])
def test_a_graph_replays_a_call(impl, mutual_only):
    """With the maps and seeds of the moment: epochs after another."""
    inputs = on_gpu(make_inputs(300, 310, 25))
    options = {"epoch": 0, "batch_size": 32, "mutual_only": mutual_only, "impl": impl}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # what is loaded at a first call is there before the capture
        ops.icp_epoch(*inputs, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = ops.icp_epoch(*inputs, **options)
    for _ in range(3):
        expected = ops.icp_epoch(*inputs, **options)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, expected)
        inputs.w_xy.copy_(found.w_xy)
        inputs.w_yx.copy_(found.w_yx)
        inputs.seeds.add_(1)


@pytest.mark.parametrize(("D", "mutual_only"), [(25, False), (25, True), (50, True), (65, False)])
def test_nothing_waits_for_the_device(impl, D, mutual_only):
    inputs = on_gpu(make_inputs(140, 150, D))
    options = {"epoch": 0, "batch_size": 32, "mutual_only": mutual_only, "impl": impl}
    ops.icp_epoch(*inputs, **options)  # asks for memory, and loads kernels
    with waits_are_errors():
        found = ops.icp_epoch(*inputs, **options)
        ops.icp_epoch(*inputs, pairs=(found.nearest_target, found.nearest_source), **options)
