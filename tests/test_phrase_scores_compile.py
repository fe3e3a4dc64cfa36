"""phrase_scores and select_phrases under torch.compile, and the raw ops that are traced."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.phrase_scores import ImageSet, make_image_set, stacked

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor
]

RAW = torch.ops.fastkit
FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = "penalty", "deflate"
CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
TRACED = (*CHECKS, "test_aot_dispatch_dynamic")  # several times as long

# No two dimensions of a call are equal: dynamo would take them for one.
SIZES = (13, 7, 3), (57, 21, 4), (9, 33, 6)  # candidates, columns, chosen


def inputs_of(size=SIZES[0], *, dtype=FLOAT, sets=0, everything=True):
    m, D, S = size
    each = [
        make_image_set(m, D, S if everything else None, prior=everything, dtype=dtype, seed=seed)
        for seed in range(max(sets, 1))
    ]
    return stacked(each) if sets else each[0]


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


# The raw ops: their schemas and fakes


def raw_inputs(dtype, sets, everything):
    """With image sets in front, of one or of all; ``sets`` says of how many each is."""
    inputs = inputs_of(dtype=dtype, sets=max(sets), everything=everything)
    return [None if t is None else t[:n] for t, n in zip(inputs, sets, strict=True)]


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "sets", [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1)], ids=str
)
def test_opcheck(native, sets, everything, dtype):
    candidates, centroid, scatter, chosen, prior = raw_inputs(dtype, sets, everything)
    checks = TRACED if dtype == FLOAT else CHECKS
    call = [candidates, centroid, scatter, chosen, prior, 10.0, 80.0, 8.0]
    opcheck(RAW.phrase_scores_fwd.default, call, test_utils=checks)
    for deflate in (False, True):
        call = [candidates, centroid, scatter, prior, 4, deflate, 10.0, 80.0, 8.0]
        opcheck(RAW.select_phrases_fwd.default, call, test_utils=checks)


def test_opcheck_of_nothing(native):
    """Of no candidate, no column, no set, no pick."""
    for G, m, D, S in ((1, 0, 3, 2), (1, 3, 0, 2), (0, 3, 2, 1), (1, 3, 2, 0), (1, 0, 0, 0)):
        inputs = [torch.zeros(shape) for shape in ((G, m, D), (1, D), (1, D, D), (1, S, D), (1, m))]
        opcheck(RAW.phrase_scores_fwd.default, [*inputs, 1.0, 1.0, 1.0], test_utils=CHECKS)
        for k in {0, m}:
            call = [*inputs[:3], inputs[4], k, True, 1.0, 1.0, 1.0]
            opcheck(RAW.select_phrases_fwd.default, call, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("sets", [0, 2])
def test_tensors_without_values(dtype, sets):
    """On the meta device: shapes and dtypes, of gradients too."""
    results = []
    for device in ("cpu", "meta"):
        leaves = [t.to(device).requires_grad_() for t in inputs_of(dtype=dtype, sets=sets)]
        found = phrase_scores(*leaves[:4], prior=leaves[4])
        picks = select_phrases(leaves[0], leaves[2], 5, centroid=leaves[1], prior=leaves[4])
        gradients = torch.autograd.grad(found.score.sum(), leaves)
        results.append([(t.shape, t.dtype) for t in (*found, *picks, *gradients)])
    assert results[0] == results[1]


# Graphs


def scores(impl=None):
    def run(candidates, centroid, scatter, chosen, prior):
        return tuple(phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl=impl))

    return run


def selection(k=4, kind="penalty", impl=None):
    def run(candidates, centroid, scatter, _, prior):
        return tuple(
            select_phrases(
                candidates, scatter, k, centroid=centroid, prior=prior, orthogonality=kind, impl=impl
            )
        )

    return run


def outputs_and_gradients(call, inputs):
    """For cotangents that are not 1."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    results = call(*leaves)
    of = [y for y in results if y.requires_grad]
    cotangents = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in of]
    gradients = torch.autograd.grad(of, [t for t in leaves if t is not None], cotangents)
    return *(y.detach() for y in results), *gradients


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("sets", [0, 2])
def test_compile_one_graph_for_several_sizes(native, sets, everything):
    """With gradients; results are those of the eager call bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scores(), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in SIZES:
        inputs = inputs_of(size, sets=sets, everything=everything)
        found, expected = (outputs_and_gradients(call, inputs) for call in (compiled, scores()))
        assert_all_equal(found[:3], expected[:3])
        for one, other in zip(found[3:], expected[3:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert len({*frames}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compile_a_selection_for_several_sizes(native, kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selection(kind=kind), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in SIZES:
        inputs = inputs_of(size)
        assert_all_equal(compiled(*inputs), selection(kind=kind)(*inputs))
        frames.append(counter.frame_count)
    assert len({*frames}) == 1


def test_compile_more_and_more_chosen(native):
    """As a decoder has it: not told that it changes, the second number makes one graph for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scores(), backend=counter, fullgraph=True)
    inputs = inputs_of((13, 7, 9))
    for S in (5, 2, 8, 3):
        of = inputs._replace(chosen=inputs.chosen[:S])
        assert_all_equal(compiled(*of), scores()(*of))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [DOUBLE, BFLOAT, HALF], ids=str)
def test_compile_other_dtypes(native, dtype):
    torch._dynamo.reset()
    inputs = inputs_of(dtype=dtype)

    def both(*tensors):
        return *scores()(*tensors), *selection()(*tensors)

    assert_all_equal(torch.compile(both, backend="aot_eager", fullgraph=True)(*inputs), both(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_the_reference(kind):
    """What runs where there is no kernel: in one graph."""
    torch._dynamo.reset()
    inputs = inputs_of(dtype=DOUBLE)
    compiled = torch.compile(scores("reference"), backend="aot_eager", fullgraph=True)
    found = outputs_and_gradients(compiled, inputs)
    torch.testing.assert_close(found, outputs_and_gradients(scores("reference"), inputs))
    select = selection(kind=kind, impl="reference")
    compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), select(*inputs))


def test_autocast_in_a_graph(native):
    torch._dynamo.reset()
    inputs = inputs_of()

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype=BFLOAT):
            return *scores()(*tensors), *selection()(*tensors)

    compiled = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)
    assert_all_equal(compiled(*inputs), (*scores()(*inputs), *selection()(*inputs)))


@pytest.mark.parametrize("strict", [True, False])
def test_export(native, strict):
    class Describe(torch.nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.centroid = torch.nn.Buffer(inputs.centroid)
            self.scatter = torch.nn.Buffer(inputs.scatter)

        def forward(self, candidates):
            found = phrase_scores(candidates, self.centroid, self.scatter, candidates[:2], impl=native)
            picks = select_phrases(candidates, self.scatter, 3, centroid=self.centroid, impl=native)
            return found.score, picks.indices

    inputs = inputs_of()
    module = Describe(inputs)
    exported = torch.export.export(module, (inputs.candidates,), strict=strict).module()
    assert_all_equal(exported(inputs.candidates), module(inputs.candidates))


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)
def test_compile_with_inductor(native):
    """Between fused neighbours: what is chosen is scored again, with gradients."""
    torch._dynamo.reset()
    inputs = inputs_of(dtype=DOUBLE)

    def call(candidates, centroid, scatter, _, prior):
        candidates, centroid = candidates + 0.1 * candidates.tanh(), 2 * centroid
        picks = select_phrases(candidates, scatter, 3, centroid=centroid, prior=prior).indices
        found = phrase_scores(candidates, centroid, scatter, candidates[picks], prior=prior)
        return (0.01 * found.score).exp(), found.variance.sqrt(), found.increment.square()

    leaves = ImageSet(*(t.detach().requires_grad_() for t in inputs))
    of = [t for name, t in leaves._asdict().items() if name != "chosen"]
    found, expected = torch.compile(call, fullgraph=True)(*leaves), call(*leaves)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad([y.sum() for y in results], of) for results in (found, expected))
    torch.testing.assert_close(*gradients)
