"""Derivatives of ops.phrase_scores: of each tensor, of tensors that come from others, where there is none."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS as KERNELS  # for the fixtures
from fastkit.testing.phrase_scores import ImageSet, make_image_set, stacked

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # forward mode
]

DOUBLE = torch.float64
FIELDS = "score", "variance", "increment"


def leaves_of(m=5, D=4, S=2, dtype=DOUBLE, seed=0):
    inputs = make_image_set(m, D, S, prior=True, dtype=dtype, seed=seed)
    return [t.requires_grad_() for t in inputs]


def outputs(impl, **options):
    def call(candidates, centroid, scatter, chosen=None, prior=None):
        return tuple(phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl=impl, **options))

    return call


@pytest.mark.parametrize("S", [1, 2, 4])
def test_gradients_of_all_five(kernel, S):
    """With one chosen phrase the distance before is 0, and so is its gradient."""
    leaves = leaves_of(S=S)
    assert gradcheck(outputs(kernel, variance_weight=2.0, orthogonality_weight=3.0), leaves)
    assert gradgradcheck(outputs(kernel), leaves, fast_mode=True)


@pytest.mark.parametrize("in_front", [*itertools.product([False, True], repeat=5)], ids=str)
def test_gradients_of_image_sets(kernel, in_front):
    """Those of what all sets share are added up."""
    sets = stacked([make_image_set(4, 3, 2, prior=True, dtype=DOUBLE, seed=seed) for seed in range(2)])
    leaves = [
        (t if front else t[0]).detach().requires_grad_() for t, front in zip(sets, in_front, strict=True)
    ]
    assert gradcheck(outputs(kernel), leaves, fast_mode=True)
    assert gradgradcheck(outputs(kernel), leaves, fast_mode=True)


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=5)][1:], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_what_needs_no_gradient_has_none(impl, field, needed):
    """Any arguments, by any one result: what it does not depend on has zeros, or none."""
    every = leaves_of()
    getattr(phrase_scores(*every[:4], prior=every[4], impl=impl), field).sum().backward()
    some = [t.detach().requires_grad_(need) for t, need in zip(every, needed, strict=True)]
    result = getattr(phrase_scores(*some[:4], prior=some[4], impl=impl), field)
    if not result.requires_grad:
        return
    result.sum().backward()
    for leaf, whole, need in zip(some, every, needed, strict=True):
        if not need:
            assert leaf.grad is None
        elif leaf.grad is None:
            assert whole.grad is None or not whole.grad.any()
        else:
            torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_gradients_where_nothing_is_chosen(impl):
    candidates, centroid, scatter, _, prior = leaves_of()
    assert gradcheck(lambda *t: phrase_scores(*t, impl=impl).score, (candidates, centroid, scatter))
    found = phrase_scores(candidates, centroid, scatter, prior=prior, impl=impl)
    assert not found.increment.requires_grad
    none = candidates[:0].detach().requires_grad_()
    found = phrase_scores(candidates, centroid, scatter, none, prior=prior, impl=impl)
    found.score.sum().backward()
    assert none.grad is None or none.grad.shape == (0, 4)
    torch.testing.assert_close(prior.grad, torch.full_like(prior, 8.0))


def test_chosen_rows_that_come_from_candidates(impl):
    """Their gradients go there once, by a graph of its own too."""
    candidates, centroid, scatter, _, prior = leaves_of()

    def call(candidates, centroid):
        return phrase_scores(candidates, centroid, scatter, candidates[1:3], prior=prior, impl=impl).score

    def of_the_same(candidates):
        return phrase_scores(candidates, candidates.mean(0), scatter, candidates, impl=impl).score

    for run, leaves in ((call, (candidates, centroid)), (of_the_same, (candidates,))):
        plain = torch.autograd.grad(run(*leaves).sum(), leaves)
        graph = torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)
        torch.testing.assert_close(graph, plain, rtol=1e-12, atol=1e-12)
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_gradients_where_there_is_none_are_zero(impl, dtype):
    """At a product of 0 the increment has a kink; next to the centroid there is no direction."""
    rows = torch.eye(5, dtype=dtype)
    for chosen in (rows[:1], rows[:2], rows[:3]):
        candidates = torch.stack([rows[4], rows[4] + rows[0], rows[4] + 2 * rows[2]])
        leaves = [
            t.clone().requires_grad_() for t in (candidates, rows[3], torch.eye(5, dtype=dtype), chosen)
        ]
        found = phrase_scores(*leaves, impl=impl)
        assert found.increment[0] == 0
        gradients = torch.autograd.grad(found.increment.sum(), leaves, create_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert not gradients[0][0].any()
    centroid = rows[3].clone().requires_grad_()
    candidates = torch.stack([rows[3], rows[3] + 1e-4 * rows[0], rows[1]]).requires_grad_()
    found = phrase_scores(candidates, centroid, torch.eye(5, dtype=dtype), impl=impl)
    gradients = torch.autograd.grad(found.score.sum(), (candidates, centroid), create_graph=True)
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][:2].any()
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (candidates, centroid))
    assert all(g.isfinite().all() for g in second)


def test_a_change_of_length_changes_nothing(impl):
    """So a gradient is orthogonal to its row, and by the length of a longer row shorter."""
    candidates, centroid, scatter, chosen, _ = leaves_of(7, 6, 3)

    def gradients(scale):
        leaves = [(scale * t).detach().requires_grad_() for t in (candidates, centroid, chosen)]
        score = phrase_scores(leaves[0], leaves[1], scatter, leaves[2], impl=impl).score
        return torch.autograd.grad(score.sum(), leaves), leaves

    one, leaves = gradients(1.0)
    for gradient, leaf in zip(one, leaves, strict=True):
        across = (gradient * leaf).sum(-1)
        assert across.abs().max() <= 1e-10 * gradient.abs().max()
    for scale in (1e-9, 1e9):
        for a, b in zip(one, gradients(scale)[0], strict=True):
            torch.testing.assert_close(scale * b, a, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtypes_of_their_tensors(impl, dtype):
    leaves = leaves_of(9, 8, 3, dtype)
    phrase_scores(*leaves[:4], prior=leaves[4], impl=impl).score.sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    phrase_scores(*doubles[:4], prior=doubles[4], impl="reference").score.sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        eps = 2 * torch.finfo(leaf.dtype).eps + 1e-4  # of float32, some of whose terms cancel
        assert (leaf.grad.double() - double.grad).abs().max() <= eps * double.grad.abs().max()


def test_gradients_of_strides(impl):
    candidates, centroid, scatter, chosen, prior = leaves_of(6, 5, 3)
    transposed = [t.detach().mT.contiguous().mT.requires_grad_() for t in (candidates, scatter, chosen)]
    phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl=impl).score.sum().backward()
    expected = [t.grad for t in (candidates, scatter, chosen)]
    a, b, c = transposed
    phrase_scores(a, centroid, b, c, prior=prior, impl=impl).score.sum().backward()
    for leaf, grad in zip(transposed, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-12)


def test_a_graph_is_kept_and_asked_twice(impl):
    leaves = leaves_of()
    found = phrase_scores(*leaves[:4], prior=leaves[4], impl=impl)
    first = torch.autograd.grad(found.score.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(found.score.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_selection_has_no_gradient(impl):
    candidates, centroid, scatter, _, prior = leaves_of()
    for kind in ("penalty", "deflate"):
        found = select_phrases(
            candidates, scatter, 3, centroid=centroid, prior=prior, orthogonality=kind, impl=impl
        )
        assert not any(t.requires_grad for t in found)
    with torch.no_grad():
        assert not phrase_scores(candidates, centroid, scatter, impl=impl).score.requires_grad


# torch.func, vmap, forward mode: by the reference


def test_vmap_over_any_arguments(impl):
    sets = stacked([make_image_set(6, 5, 3, prior=True, dtype=DOUBLE, seed=seed) for seed in range(3)])
    for dims in itertools.product([None, 0], repeat=5):
        if not any(dim == 0 for dim in dims):
            continue
        inputs = ImageSet(*(t if dim == 0 else t[0] for t, dim in zip(sets, dims, strict=True)))
        found = torch.vmap(outputs(impl), in_dims=dims)(*inputs)
        expected = phrase_scores(*inputs[:4], prior=inputs.prior, impl=impl)
        torch.testing.assert_close(found, tuple(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["penalty", "deflate"])
def test_vmap_of_a_selection(impl, kind):
    sets = stacked([make_image_set(9, 6, prior=True, dtype=DOUBLE, seed=seed) for seed in range(3)])

    def select(candidates, scatter, centroid, prior=None):
        return tuple(
            select_phrases(
                candidates, scatter, 4, centroid=centroid, prior=prior, orthogonality=kind, impl=impl
            )
        )

    found = torch.vmap(select)(sets.candidates, sets.scatter, sets.centroid, sets.prior)
    expected = select(sets.candidates, sets.scatter, sets.centroid, sets.prior)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    shared = torch.vmap(select, in_dims=(None, 0, None))(sets.candidates[0], sets.scatter, sets.centroid[0])
    expected = select(sets.candidates[0], sets.scatter, sets.centroid[0])
    torch.testing.assert_close(shared, expected, rtol=1e-10, atol=1e-10)


def test_vmap_over_image_sets_in_front(impl):
    """A batch of calls that have sets themselves."""
    one, other = (
        stacked([make_image_set(5, 4, 2, dtype=DOUBLE, seed=3 * i + j) for j in range(3)]) for i in range(2)
    )
    batched = [torch.stack([a, b]) for a, b in zip(one[:4], other[:4], strict=True)]
    found = torch.vmap(outputs(impl))(*batched)
    for i, inputs in enumerate((one, other)):
        expected = outputs(impl)(*inputs[:4])
        torch.testing.assert_close([t[i] for t in found], [*expected], rtol=1e-10, atol=1e-10)


def test_jacobians(impl):
    leaves = [t.detach() for t in leaves_of()]
    by_rows = torch.func.jacrev(lambda *t: outputs(impl)(*t)[0], argnums=(0, 1, 2, 3, 4))(*leaves)
    by_columns = torch.func.jacfwd(lambda *t: outputs(impl)(*t)[0], argnums=(0, 1, 2, 3, 4))(*leaves)
    torch.testing.assert_close(by_rows, by_columns, rtol=1e-9, atol=1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves[1], torch.ones(4, dtype=DOUBLE))
        found = phrase_scores(leaves[0], dual, *leaves[2:4], prior=leaves[4], impl=impl)
        tangent = torch.autograd.forward_ad.unpack_dual(found.score).tangent
    torch.testing.assert_close(tangent, by_rows[1].sum(-1), rtol=1e-9, atol=1e-9)
