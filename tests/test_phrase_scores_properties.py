"""What scores of phrases and a selection must be, whatever the vectors: of any scale, any order, bounded."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS
from fastkit.testing.phrase_scores import check_selection, make_image_set

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

KINDS = "penalty", "deflate"
NEAR = {"rtol": 1e-9, "atol": 1e-9}  # of float64, in which all is here


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


def given_sets(test):
    """Runs ``test`` on image sets of many sizes and means, always the same ones."""
    case = strategies.builds(
        make_image_set,
        m=strategies.integers(1, 40),
        D=strategies.integers(1, 20),
        S=strategies.integers(0, 6),
        images=strategies.integers(1, 60),
        mean=strategies.sampled_from([0.0, 1.0, 5.0]),
        prior=strategies.just(True),
        repeated=strategies.booleans(),
        dtype=strategies.just(torch.float64),
        seed=strategies.integers(0, 1000),
    )
    settings = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
    return settings(hypothesis.given(case=case)(test))


def score(inputs, impl, **options):
    candidates, centroid, scatter, chosen, prior = inputs
    return phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl=impl, **options)


def select(inputs, k, impl, **options):
    candidates, centroid, scatter, _, prior = inputs
    return select_phrases(candidates, scatter, k, centroid=centroid, prior=prior, impl=impl, **options)


def order(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


@given_sets
def test_lengths_are_no_matter(impl, case):
    lengths = torch.logspace(-6, 6, len(case.candidates), dtype=torch.float64).unsqueeze(1)
    scaled = case._replace(
        candidates=lengths * case.candidates, centroid=100 * case.centroid, chosen=1e-3 * case.chosen
    )
    torch.testing.assert_close(score(scaled, impl), score(case, impl), **NEAR)


@given_sets
def test_the_order_of_candidates_is_no_matter(impl, case):
    at = order(len(case.candidates))
    moved = case._replace(candidates=case.candidates[at], prior=case.prior[at])
    found, other = score(case, impl), score(moved, impl)
    torch.testing.assert_close([*other], [t[at] for t in found], **NEAR)
    k = min(5, len(at))
    for kind in KINDS:
        picks, others = (select(x, k, impl, orthogonality=kind) for x in (case, moved))
        best = picks.scores[0] - others.scores[0]
        assert best.abs() <= 1e-9 * (1 + picks.scores[0].abs())
        if len(case.candidates.unique(dim=0)) == len(at):  # else others of the same bits may come first
            assert torch.equal(at[others.indices], picks.indices)


@given_sets
def test_the_order_of_what_was_chosen_is_no_matter(impl, case):
    moved = case._replace(chosen=case.chosen[order(len(case.chosen))])
    torch.testing.assert_close(score(moved, impl), score(case, impl), **NEAR)


@given_sets
def test_a_rotation_of_the_space_changes_nothing(impl, case):
    D = case.candidates.shape[1]
    noise = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    q = torch.linalg.qr(noise).Q
    turned = case._replace(
        candidates=case.candidates @ q, centroid=case.centroid @ q, scatter=q.T @ case.scatter @ q,
        chosen=case.chosen @ q,
    )  # fmt: skip
    torch.testing.assert_close(score(turned, impl), score(case, impl), rtol=1e-7, atol=1e-7)


@given_sets
def test_the_score_is_linear_in_the_weights(impl, case):
    found = score(case, impl)
    terms = found.variance, -found.increment, case.prior
    for weights in ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (3.0, 0.5, -2.0)):
        names = "variance_weight", "orthogonality_weight", "prior_weight"
        result = score(case, impl, **dict(zip(names, weights, strict=True)))
        assert torch.equal(result.variance, found.variance)
        assert torch.equal(result.increment, found.increment)
        expected = sum(w * t for w, t in zip(weights, terms, strict=True))
        torch.testing.assert_close(result.score, expected, **NEAR)


@given_sets
def test_the_variance_is_linear_in_the_scatter(impl, case):
    D = case.scatter.shape[0]
    one = score(case, impl).variance
    flat = score(case._replace(scatter=torch.eye(D, dtype=torch.float64)), impl).variance
    assert ((flat - 1).abs() <= 1e-12).logical_or(flat == 0).all()  # of a unit direction, or none
    both = case._replace(scatter=2 * case.scatter + 3 * torch.eye(D, dtype=torch.float64))
    torch.testing.assert_close(score(both, impl).variance, 2 * one + 3 * flat, **NEAR)


@given_sets
def test_the_variance_is_between_the_eigenvalues(impl, case):
    eigenvalues = torch.linalg.eigvalsh(case.scatter)
    variance = score(case, impl).variance
    slack = 1e-12 * (1 + eigenvalues[-1])
    assert (variance >= 0).all() and (variance <= eigenvalues[-1] + slack).all()
    assert ((variance >= eigenvalues[0] - slack) | (variance == 0)).all()


@given_sets
def test_increments_are_not_negative_and_grow_with_the_overlap(impl, case):
    """By their closed form they are what the distance from orthogonality grows by."""
    t, f = (torch.nn.functional.normalize(rows, dim=1) for rows in (case.candidates, case.chosen))
    overlap, increment = (t @ f.T).square().sum(1), score(case, impl).increment
    assert (increment >= 0).all()
    at = overlap.argsort()
    assert (increment[at].diff() >= -1e-12).all()
    for i, row in enumerate(t):
        more = torch.cat([f, row.unsqueeze(0)])
        after, before = (
            torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=torch.float64))
            if len(rows) else 0.0
            for rows in (more, f)
        )  # fmt: skip
        assert abs(float(increment[i]) - float(after - before)) <= 1e-7


@given_sets
def test_more_of_what_is_orthogonal_changes_no_overlap(impl, case):
    """A chosen phrase in a direction that nothing else has, adds no increment to what is there."""

    def beside(t, value):
        return torch.cat([t, torch.full((*t.shape[:-1], 1), value, dtype=t.dtype)], dim=-1)

    D = case.candidates.shape[1]
    other = torch.zeros(1, D + 1, dtype=torch.float64)
    other[0, -1] = 1
    wider = case._replace(
        candidates=beside(case.candidates, 0.0), centroid=beside(case.centroid, 0.0),
        scatter=torch.nn.functional.pad(case.scatter, (0, 1, 0, 1)),
        chosen=torch.cat([other, beside(case.chosen, 0.0)]),
    )  # fmt: skip
    torch.testing.assert_close(score(wider, impl), score(case, impl), **NEAR)


@given_sets
def test_deflated_variances_are_what_the_directions_span(impl, case):
    """The trace of the scatter in their space, which is never more than the whole."""
    m, D = case.candidates.shape
    found = select(case, min(m, 8), impl, orthogonality="deflate", prior_weight=0.0)
    t, a = (torch.nn.functional.normalize(x, dim=-1) for x in (case.candidates, case.centroid))
    far = t - a
    length = torch.linalg.vector_norm(far, dim=1, keepdim=True)
    directions = torch.where(length > 1e-3, far / length, 0.0)
    total = case.scatter.trace()
    for j in range(1, 1 + len(found.indices)):
        u, s, _ = torch.linalg.svd(directions[found.indices[:j]].T, full_matrices=False)
        if ((s < 0.02) & (s > 1e-6)).any():
            break  # where what is left is near the length at which it is taken for none
        basis = u[:, s > 1e-6]
        spanned = (basis.T @ case.scatter @ basis).trace()
        assert (found.variances[:j].sum() - spanned).abs() <= 1e-8 * (1 + total)
    assert found.variances.sum() <= total * (1 + 1e-9) + 1e-12
    assert found.variances.count_nonzero() <= D


@given_sets
def test_picks_are_the_best(impl, case):
    for kind in KINDS:
        check_selection(case, min(6, len(case.candidates)), orthogonality=kind, impl=impl)


@given_sets
def test_an_outweighing_prior_decides(impl, case):
    for kind in KINDS:
        m = len(case.candidates)
        prior = order(m).double()
        found = select(case._replace(prior=prior), m, impl, orthogonality=kind, prior_weight=1e7)
        assert torch.equal(found.indices, prior.argsort(descending=True))
