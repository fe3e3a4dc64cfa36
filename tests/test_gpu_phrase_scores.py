"""phrase_scores and select_phrases on a GPU: small calls that reach each kernel, for compute-sanitizer
(benchmarks/gpu.sh); streams, graphs, equal bits, and no wait for the device.
"""

import pytest
import torch
from contexts import waits_are_errors

from fastkit._dispatch import unavailable
from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS
from fastkit.testing.phrase_scores import ImageSet, check, check_selection, make_image_set, stacked

pytestmark = [pytest.mark.native, pytest.mark.gpu]

KINDS = "penalty", "deflate"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 0), (2, 3, 1), (31, 33, 2), (32, 64, 16), (33, 65, 17), (129, 130, 40)]
PHRASES = (1000, 256, 6)  # a step of a decoder


@pytest.fixture
def triton():
    reason = unavailable("triton", KERNELS)
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def inputs_of(*size, **options):
    with torch.device("cuda"):
        return make_image_set(*size, **options)


def score(inputs, **options):
    candidates, centroid, scatter, chosen, prior = inputs
    return phrase_scores(candidates, centroid, scatter, chosen, prior=prior, **options)


def select(inputs, k, **options):
    candidates, centroid, scatter, _, prior = inputs
    return select_phrases(candidates, scatter, k, centroid=centroid, prior=prior, **options)


# Each size in one dtype under compute-sanitizer, which takes a second a test.
CALLS = [
    pytest.param(size, dtype, marks=[pytest.mark.sanitize] if i % 3 == j else [])
    for i, size in enumerate(SIZES)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("size", "dtype"), CALLS, ids=str)
def test_every_kernel(triton, size, dtype):
    inputs = inputs_of(*size, prior=True, dtype=dtype)
    check(inputs, impl=triton)
    for kind in KINDS:
        check_selection(inputs, min(size[0], 4), orthogonality=kind, impl=triton)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_decoder(triton, kind):
    inputs = inputs_of(*PHRASES, images=500)
    check(inputs, impl=triton)
    check_selection(inputs, 7, orthogonality=kind, impl=triton)


@pytest.mark.sanitize
def test_image_sets(triton):
    sets = stacked([inputs_of(40, 20, 3, prior=True, seed=seed) for seed in range(5)])
    one = inputs_of(40, 20, 3, prior=True)
    for i, name in enumerate(ImageSet._fields):
        for mixed in (one._replace(**{name: sets[i]}), sets._replace(**{name: one[i]})):
            check(mixed, impl=triton)
            for kind in KINDS if name != "chosen" else ():
                check_selection(mixed, 3, orthogonality=kind, impl=triton)


@pytest.mark.sanitize
def test_numbers_that_are_none_do_no_harm(triton):
    """Their values are not looked at: all picks are candidates, none twice."""
    for name in ImageSet._fields:
        inputs = inputs_of(9, 5, 2, prior=True)
        getattr(inputs, name).fill_(torch.nan)
        assert score(inputs, impl=triton).score.shape == (9,)
        for kind in KINDS:
            found = select(inputs, 9, orthogonality=kind, impl=triton)
            assert found.indices.sort().values.tolist() == list(range(9))


def test_the_default_is_the_kernel(triton):
    inputs = inputs_of(*PHRASES)
    for found, expected in (
        (score(inputs), score(inputs, impl=triton)),
        (select(inputs, 7), select(inputs, 7)),
    ):
        assert all(map(torch.equal, found, expected))


def test_the_same_call_gives_the_same_bits(triton):
    inputs = inputs_of(*PHRASES, prior=True)
    first = (*score(inputs, impl=triton), *select(inputs, 7, impl=triton))
    for _ in range(5):
        assert all(map(torch.equal, (*score(inputs, impl=triton), *select(inputs, 7, impl=triton)), first))


def test_kernels_run_on_the_current_stream(triton):
    """Candidates are written on it, late; a kernel on another stream would read what was there before."""
    inputs = inputs_of(*PHRASES)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = select(inputs, 7, impl=triton)
    late = inputs._replace(candidates=torch.ones_like(inputs.candidates))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.candidates.copy_(inputs.candidates)
        found = select(late, 7, impl=triton)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_a_selection(triton, kind):
    inputs = inputs_of(*PHRASES)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # Triton compiles outside of the capture
        select(inputs, 7, orthogonality=kind, impl=triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = select(inputs, 7, orthogonality=kind, impl=triton)
    inputs.candidates.copy_(inputs.candidates.roll(3, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, select(inputs, 7, orthogonality=kind, impl=triton)))


def test_nothing_waits_for_the_device(triton):
    inputs = inputs_of(*PHRASES, prior=True)
    score(inputs, impl=triton), select(inputs, 7, impl=triton)
    with waits_are_errors():
        score(inputs, impl=triton)
        for kind in KINDS:
            select(inputs, 7, orthogonality=kind, impl=triton)


def test_gradients(triton):
    inputs = inputs_of(20, 9, 2, prior=True)
    leaves = [t.clone().requires_grad_() for t in inputs]
    found = torch.autograd.grad(score(ImageSet(*leaves), impl=triton).score.sum(), leaves)
    others = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(score(ImageSet(*others), impl="reference").score.sum(), others)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
def test_compiled(triton):
    inputs = inputs_of(*PHRASES)
    compiled = torch.compile(lambda: select(inputs, 7, impl=triton), fullgraph=True)
    assert all(map(torch.equal, compiled(), select(inputs, 7, impl=triton)))
