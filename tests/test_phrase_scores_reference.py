"""reference.phrase_scores and select_phrases against the procedure as it was published, image by image."""

import math

import numpy as np
import pytest
import torch

from fastkit.reference import moments
from fastkit.reference.phrase_scores import LEAST, phrase_scores, select_phrases

pytestmark = [pytest.mark.usefixtures("one_thread")]

DOUBLE = torch.float64


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def image_set(images=60, candidates=40, columns=12, seed=0, chosen=0):
    """Unit rows about a large mean, as encoders give them: images, candidates, a centroid, chosen ones."""
    draw = np.random.default_rng(seed)
    mean = draw.standard_normal(columns)

    def rows(count):
        return unit(2 * mean + draw.standard_normal((count, columns)))

    return rows(images), rows(candidates), rows(1)[0], rows(chosen)


def literal_variance(images, candidate, centroid):
    """The spread of the products with the direction, one image after the other."""
    direction = candidate - centroid
    direction = direction / np.linalg.norm(direction)
    products = [float(image @ direction) for image in images]
    middle = sum(products) / len(products)
    return sum((p - middle) ** 2 for p in products)


def literal_distance(phrases):
    """|F F^T - I|, of all its elements."""
    gram = np.array([[float(p @ q) for q in phrases] for p in phrases])
    return np.linalg.norm(gram - np.eye(len(phrases))) if len(phrases) else 0.0


def literal_increment(chosen, candidate):
    if len(chosen) == 0:
        return 0.0
    return literal_distance([*chosen, candidate]) - literal_distance(list(chosen))


def scatter_of(images):
    return moments(torch.from_numpy(images)).scatter


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chosen", [0, 1, 2, 5])
def test_the_scores_are_those_of_the_procedure(chosen, seed):
    images, candidates, centroid, before = image_set(seed=seed, chosen=chosen)
    prior = np.random.default_rng(seed).standard_normal(len(candidates))
    found = phrase_scores(
        torch.from_numpy(candidates), torch.from_numpy(centroid), scatter_of(images),
        torch.from_numpy(before) if chosen else None, prior=torch.from_numpy(prior),
    )  # fmt: skip
    for i, candidate in enumerate(candidates):
        variance = literal_variance(images, candidate, centroid)
        increment = literal_increment(before, candidate)
        assert math.isclose(found.variance[i], variance, rel_tol=1e-10)
        assert math.isclose(found.increment[i], increment, rel_tol=1e-9, abs_tol=1e-12)
        score = 8 * prior[i] + 10 * variance - 80 * increment
        assert math.isclose(found.score[i], score, rel_tol=1e-9, abs_tol=1e-9)


def literal_selection(images, candidates, centroid, prior, k, weights):
    """The best of all that are left, each scored from scratch."""
    of_variance, of_distance, of_prior = weights
    picked = []
    for _ in range(k):
        scores = {
            i: of_prior * prior[i]
            + of_variance * literal_variance(images, candidate, centroid)
            - of_distance * literal_increment(candidates[picked], candidate)
            for i, candidate in enumerate(candidates)
            if i not in picked
        }
        picked.append(max(scores, key=scores.get))
    return picked


@pytest.mark.parametrize("seed", range(20))
def test_the_picks_are_those_of_the_procedure(seed):
    images, candidates, centroid, _ = image_set(images=50, candidates=30, seed=seed)
    prior = np.random.default_rng(seed).standard_normal(len(candidates))
    for weights in ((10.0, 80.0, 8.0), (10.0, 1.0, 0.0), (1.0, 3.0, 0.1)):
        options = dict(zip(("variance_weight", "orthogonality_weight", "prior_weight"), weights, strict=True))
        found = select_phrases(
            torch.from_numpy(candidates), scatter_of(images), 7, centroid=torch.from_numpy(centroid),
            prior=torch.from_numpy(prior), **options,
        )  # fmt: skip
        expected = literal_selection(images, candidates, centroid, prior, 7, weights)
        assert found.indices.tolist() == expected
        variances = [literal_variance(images, candidates[i], centroid) for i in expected]
        torch.testing.assert_close(found.variances, torch.tensor(variances, dtype=DOUBLE), rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(10))
def test_the_scores_of_a_selection_are_those_beside_what_was_chosen(seed):
    images, candidates, centroid, _ = (torch.from_numpy(t) for t in image_set(seed=seed))
    scatter = moments(images).scatter
    found = select_phrases(candidates, scatter, 9, centroid=centroid)
    for j, index in enumerate(found.indices):
        beside = phrase_scores(candidates, centroid, scatter, candidates[found.indices[:j]])
        torch.testing.assert_close(found.scores[j], beside.score[index], rtol=1e-10, atol=1e-10)
        left = beside.score.index_fill(0, found.indices[:j], -torch.inf)
        assert int(left.argmax()) == int(index)


@pytest.mark.parametrize("seed", range(5))
def test_deflation_adds_up_to_what_the_directions_span(seed):
    """Each variance is what the pick explains beyond those before; by the projector, with numpy's QR."""
    images, candidates, centroid, _ = image_set(seed=seed)
    scatter = scatter_of(images)
    found = select_phrases(
        torch.from_numpy(candidates), scatter, 8, centroid=torch.from_numpy(centroid),
        orthogonality="deflate",
    )  # fmt: skip
    directions = unit(candidates - centroid)

    def explained(places):
        basis, _ = np.linalg.qr(directions[places].T)
        return float(np.trace(basis.T @ scatter.numpy() @ basis))

    picks = found.indices.tolist()
    for j in range(8):
        total = explained(picks[: j + 1])
        assert math.isclose(float(found.variances[: j + 1].sum()), total, rel_tol=1e-9)
        others = [explained([*picks[:j], i]) for i in range(len(candidates)) if i not in picks[:j]]
        assert total >= max(others) * (1 - 1e-9)  # no other explains more
    torch.testing.assert_close(found.scores, 10 * found.variances)


def test_what_is_not_of_unit_length_counts_as_if_it_were():
    images, candidates, centroid, before = (torch.from_numpy(t) for t in image_set(chosen=2))
    scatter = moments(images).scatter
    lengths = torch.linspace(0.1, 30, len(candidates), dtype=DOUBLE).unsqueeze(1)
    one = phrase_scores(candidates, centroid, scatter, before)
    other = phrase_scores(lengths * candidates, 3 * centroid, scatter, 5 * before)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for kind in ("penalty", "deflate"):
        one, other = (
            select_phrases(c, scatter, 5, centroid=centroid, orthogonality=kind)
            for c in (candidates, lengths * candidates)
        )
        assert torch.equal(one.indices, other.indices)


def test_a_candidate_next_to_the_centroid_has_no_direction():
    images, candidates, centroid, _ = (torch.from_numpy(t) for t in image_set())
    other = torch.linalg.qr(torch.stack([centroid, candidates[0]]).T).Q[:, 1]
    for length, none in ((0.0, True), (0.9 * LEAST, True), (1.1 * LEAST, False)):
        candidates[3] = centroid + length * other
        found = phrase_scores(candidates, centroid, moments(images).scatter)
        assert (found.variance[3] == 0) == none
        assert (found.variance[:3] > 0).all()


def test_sets_have_a_dimension_in_front():
    """Arguments without it are all sets'."""
    sets = [image_set(seed=seed, chosen=2) for seed in range(4)]
    images, candidates, centroid, before = (torch.from_numpy(np.stack(t)) for t in zip(*sets, strict=True))
    scatter = torch.stack([moments(x).scatter for x in images])
    prior = torch.randn(4, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    found = phrase_scores(candidates, centroid, scatter, before, prior=prior)
    shared = phrase_scores(candidates[0], centroid[0], scatter, before[0], prior=prior[0])
    for g in range(4):
        alone = phrase_scores(candidates[g], centroid[g], scatter[g], before[g], prior=prior[g])
        other = phrase_scores(candidates[0], centroid[0], scatter[g], before[0], prior=prior[0])
        for results, expected in ((found, alone), (shared, other)):
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a[g], b, rtol=1e-12, atol=1e-12)
    for kind in ("penalty", "deflate"):
        found = select_phrases(candidates, scatter, 6, centroid=centroid, prior=prior, orthogonality=kind)
        shared = select_phrases(candidates[0], scatter, 6, centroid=centroid[0], orthogonality=kind)
        assert found.indices.shape == shared.scores.shape == (4, 6)
        for g in range(4):
            alone = select_phrases(
                candidates[g], scatter[g], 6, centroid=centroid[g], prior=prior[g], orthogonality=kind
            )
            other = select_phrases(candidates[0], scatter[g], 6, centroid=centroid[0], orthogonality=kind)
            assert torch.equal(found.indices[g], alone.indices)
            assert torch.equal(shared.indices[g], other.indices)


def test_all_are_chosen_in_the_end_and_none_twice():
    images, candidates, centroid, _ = (torch.from_numpy(t) for t in image_set(candidates=12))
    candidates[5] = candidates[2]
    for kind in ("penalty", "deflate"):
        found = select_phrases(candidates, moments(images).scatter, 12, centroid=centroid, orthogonality=kind)
        assert sorted(found.indices.tolist()) == list(range(12))
        assert found.scores.isfinite().all()


def test_of_equal_candidates_the_first_is_chosen():
    images, candidates, centroid, _ = (torch.from_numpy(t) for t in image_set(candidates=6))
    best = int(select_phrases(candidates, moments(images).scatter, 1, centroid=centroid).indices)
    twice = torch.cat([candidates, candidates])
    assert int(select_phrases(twice, moments(images).scatter, 1, centroid=centroid).indices) == best
