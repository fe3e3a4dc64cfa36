"""The Triton kernels of phrase_scores in Triton's interpreter, on the CPU.

``test_triton.py`` runs this file in a process of its own: Triton reads TRITON_INTERPRET as it is imported.
"""

import itertools

import pytest
import torch
from torch.library import opcheck

from fastkit.ops import phrase_scores, phrase_scores_kernels, select_phrases
from fastkit.testing.phrase_scores import ImageSet, check, check_selection, make_image_set, stacked
from fastkit.triton import phrase_scores as kernels

pytestmark = pytest.mark.usefixtures("patched_once")

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
KINDS = "penalty", "deflate"
WEIGHTS = {"variance_weight": 3.0, "orthogonality_weight": 1.5, "prior_weight": -0.5}


# m, D, S: one, around the tiles of candidates (32), of the scatter (64 by 32) and of chosen rows (16).
SIZES = [(1, 1, 0), (2, 3, 1), (31, 33, 2), (32, 64, 16), (33, 65, 17), (5, 130, 40)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores(size):
    for prior, weights in ((False, {}), (True, WEIGHTS)):
        check(make_image_set(*size, prior=prior), weights, impl="triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_selections(size, kind):
    m, D, _ = size
    for k, prior in ((1, True), (min(m, 4), False)):
        inputs = make_image_set(m, D, prior=prior)
        check_selection(inputs, k, WEIGHTS if prior else {}, orthogonality=kind, impl="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_chosen_in_the_end(kind):
    """Repeated ones too, of which nothing is left with deflation."""
    inputs = make_image_set(9, 4, repeated=True)
    check_selection(inputs, 9, orthogonality=kind, impl="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_and_columns_in_blocks(monkeypatch, kind):
    """Of a few, of which there are many; equal candidates in different blocks: the first is chosen."""
    monkeypatch.setattr(kernels, "rows_options", lambda _: {"BD": 8, "num_warps": 4})
    monkeypatch.setattr(kernels, "pick_options", lambda: {"BM": 8, "num_warps": 4})
    inputs = make_image_set(30, 19, 3, prior=True)
    check(inputs, impl="triton")
    check_selection(inputs, 5, orthogonality=kind, impl="triton")
    twice = inputs._replace(candidates=inputs.candidates.repeat(2, 1), prior=inputs.prior.repeat(2))
    found = check_selection(twice, 1, orthogonality=kind, impl="triton")
    assert int(found.indices) < 30


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_half_precision(dtype):
    inputs = make_image_set(17, 33, 3, prior=True, dtype=dtype)
    check(inputs, impl="triton")
    for kind in KINDS:
        check_selection(inputs, 3, orthogonality=kind, impl="triton")


def test_image_sets():
    """Of each argument one for all sets, or one for each."""
    sets = stacked([make_image_set(9, 6, 3, prior=True, seed=seed) for seed in range(3)])
    one = make_image_set(9, 6, 3, prior=True)
    for i, name in enumerate(ImageSet._fields):
        for mixed in (one._replace(**{name: sets[i]}), sets._replace(**{name: one[i]})):
            check(mixed, impl="triton")
            for kind in KINDS if name != "chosen" else ():
                check_selection(mixed, 3, orthogonality=kind, impl="triton")


def test_lengths_and_strides():
    inputs = make_image_set(12, 10, 3)
    for length in (1e-30, 1e30):
        other = inputs._replace(candidates=length * inputs.candidates, centroid=inputs.centroid / length)
        check(other, impl="triton")
        check_selection(other, 4, orthogonality="deflate", impl="triton")
    padded = torch.full((24, 20), torch.nan)
    padded[::2, ::2] = inputs.candidates
    views = inputs._replace(candidates=padded[::2, ::2], scatter=inputs.scatter.T)
    check(views, impl="triton")
    check_selection(views, 4, impl="triton")


def test_what_is_next_to_the_centroid_has_no_variance():
    inputs = make_image_set(5, 6)
    candidates = torch.cat([inputs.candidates, inputs.centroid[None]])
    assert check(inputs._replace(candidates=candidates), impl="triton").variance[5] == 0


def test_scores_that_are_no_numbers_do_no_harm():
    """Which on a GPU are not looked at: all picks are candidates, none twice."""
    for value, place in itertools.product((torch.nan, torch.inf), (2, slice(None))):
        prior = torch.zeros(6)
        prior[place] = value
        inputs = make_image_set(6, 5)
        with torch.no_grad():
            found = kernels.select(
                inputs.candidates[None], inputs.centroid[None], inputs.scatter[None], prior[None], 6, False,
                10.0, 80.0, 8.0,
            )  # fmt: skip
        assert sorted(found[0][0].tolist()) == list(range(6))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
def test_the_ops_are_traceable():
    inputs = make_image_set(9, 6, 3, prior=True)
    candidates, centroid, scatter, chosen, prior = (t[None] for t in inputs)
    weights = (10.0, 80.0, 8.0)
    opcheck(phrase_scores_kernels.score["triton"], (candidates, centroid, scatter, chosen, prior, *weights))
    opcheck(phrase_scores_kernels.select["triton"], (candidates, centroid, scatter, prior, 3, True, *weights))

    def both(inputs):
        candidates, centroid, scatter, chosen, prior = inputs
        scores = phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl="triton")
        return scores, select_phrases(candidates, scatter, 3, centroid=centroid, impl="triton")

    traced = torch.compile(both, fullgraph=True, backend="aot_eager")(inputs)
    for found, expected in zip(traced, both(inputs), strict=True):
        assert all(map(torch.equal, found, expected))


def test_gradients_are_those_of_the_reference():
    inputs = make_image_set(5, 4, 2, prior=True)
    found = []
    for impl in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        score = phrase_scores(*leaves[:4], prior=leaves[4], impl=impl).score
        found.append(torch.autograd.grad(score.sum(), leaves))
    assert all(map(torch.equal, *found))
