"""ops.phrase_scores and ops.select_phrases against float64: sizes, image sets, strides, ties, bits."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkit import ops
from fastkit._threads import threads
from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS as KERNELS  # for the fixtures
from fastkit.testing import assert_matches_reference
from fastkit.testing.phrase_scores import (
    ImageSet,
    check,
    check_selection,
    expected_deflated,
    expected_scores,
    make_image_set,
    stacked,
)

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

RAW = torch.ops.fastkit
FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = "penalty", "deflate"

# m, D, S: one, around vectors (4, 8, 16) and tiles (6, 8), and panels of columns (16, 32).
SIZES = [
    (1, 1, 0), (1, 2, 1), (2, 1, 1), (3, 2, 2), (5, 7, 9), (6, 3, 3), (7, 8, 1), (8, 15, 4), (9, 16, 5),
    (12, 17, 6), (15, 31, 7), (16, 33, 8), (17, 32, 2), (31, 5, 3), (33, 65, 1), (65, 33, 9), (129, 4, 6),
    (64, 129, 4), (130, 64, 0),
]  # fmt: skip
WEIGHTS = {"variance_weight": 3.0, "orthogonality_weight": 1.5, "prior_weight": -0.5}


def assert_all_equal(results, expected):
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, want), i


def score(inputs, **options):
    candidates, centroid, scatter, chosen, prior = inputs
    return phrase_scores(candidates, centroid, scatter, chosen, prior=prior, **options)


def select(inputs, k, **options):
    candidates, centroid, scatter, _, prior = inputs
    return select_phrases(candidates, scatter, k, centroid=centroid, prior=prior, **options)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize(("m", "D", "S"), SIZES)
def test_scores(impl, m, D, S, dtype):
    for prior, weights in ((False, {}), (True, {}), (True, WEIGHTS)):
        inputs = make_image_set(m, D, S, prior=prior, dtype=dtype)
        found = check(inputs, weights, impl=impl)
        assert (found.increment >= 0).all() and (found.variance >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize(("m", "D", "S"), SIZES)
def test_selections(impl, m, D, S, dtype, kind):
    """Of one, of some, of all where there are few."""
    for k in {1, min(m, S + 1), m if m < 20 else 1}:
        inputs = make_image_set(m, D, prior=k % 2 == 0, dtype=dtype, seed=k)
        check_selection(inputs, k, {} if k % 3 else WEIGHTS, orthogonality=kind, impl=impl)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize(("m", "D", "S"), [(7, 8, 1), (17, 33, 3), (33, 65, 6)])
def test_half_precision(impl, m, D, S, dtype):
    """Scores are those of the numbers as they are, in float32; others may be in either dtype."""
    inputs = make_image_set(m, D, S, prior=True, dtype=dtype)
    for of in (inputs, ImageSet(inputs.candidates, *(t.float() for t in inputs[1:]))):
        found = check(of, impl=impl)
        assert {t.dtype for t in found} == {FLOAT}
        for kind in KINDS:
            check_selection(of, 5, orthogonality=kind, impl=impl)
    lowered = ImageSet(*(t.to(dtype) for t in inputs))
    check(lowered, impl=impl)
    raised = ImageSet(*(t.float() for t in lowered))
    assert_all_equal(score(lowered, impl=impl), score(raised, impl=impl))
    assert_all_equal(select(lowered, 4, impl=impl), select(raised, 4, impl=impl))


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_means_of_any_size(impl, mean):
    """Candidates about the centroid, which is far from 0 or not."""
    inputs = make_image_set(40, 24, 3, mean=mean)
    check(inputs, impl=impl)
    for kind in KINDS:
        check_selection(inputs, 8, orthogonality=kind, impl=impl)


def test_the_budgets_reject_what_is_a_little_wrong():
    """As a centroid that is not of unit length, a phrase that is forgotten, or an error of a thousandth."""
    inputs = make_image_set(40, 24, 3, dtype=FLOAT)
    expected = expected_scores(inputs)
    for name, other in (
        ("variance", {"scatter": 1.001 * inputs.scatter}),
        ("variance", {"centroid": inputs.candidates[0]}),
        ("increment", {"chosen": inputs.chosen[:2]}),
        ("increment", {"chosen": inputs.chosen[[0, 1, 1]]}),
    ):
        found = getattr(score(inputs._replace(**other)), name)
        with pytest.raises(AssertionError, match=name):
            assert_matches_reference(found, *expected[name], name=name)
    alone = expected_deflated(inputs, [3, 5])["variance"]
    with pytest.raises(AssertionError):
        assert_matches_reference(expected_deflated(inputs, [3])["variance"].value, *alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_pick_is_seen(monkeypatch, kind):
    inputs = make_image_set(20, 9)
    k, found = 4, select(make_image_set(20, 9), 4, orthogonality=kind)
    others = [i for i in range(20) if i not in found.indices.tolist()]
    for place, other in ((0, others[0]), (3, others[-1]), (2, int(found.indices[0]))):
        wrong = found._replace(indices=found.indices.clone())
        wrong.indices[place] = other
        monkeypatch.setattr(ops, "select_phrases", lambda *_, wrong=wrong, **__: wrong)
        with pytest.raises(AssertionError):
            check_selection(inputs, k, orthogonality=kind)


def test_the_defaults_are_those_of_the_published_code(impl):
    inputs = make_image_set(9, 6, 2, prior=True)
    weights = {"variance_weight": 10.0, "orthogonality_weight": 80.0, "prior_weight": 8.0}
    assert_all_equal(score(inputs, impl=impl), score(inputs, **weights, impl=impl))
    whole = {name: int(weight) for name, weight in weights.items()}
    assert_all_equal(score(inputs, impl=impl), score(inputs, **whole, impl=impl))
    expected = select(inputs, 3, orthogonality="penalty", **weights, impl=impl)
    assert_all_equal(select(inputs, 3, impl=impl), expected)


def test_the_results_are_named(impl):
    inputs = make_image_set(3, 2)
    found = score(inputs, impl=impl)
    assert type(found) is ops.PhraseScores and found._fields == ("score", "variance", "increment")
    found = select(inputs, 1, impl=impl)
    assert type(found) is ops.PhraseSelection and found._fields == ("indices", "scores", "variances")


# Nothing chosen, what is next to the centroid, ties


def test_chosen_of_no_row_is_none(impl):
    inputs = make_image_set(9, 6, prior=True)
    found = score(inputs, impl=impl)
    assert not found.increment.any()
    assert_all_equal(score(inputs._replace(chosen=inputs.candidates[:0]), impl=impl), found)
    three = check(inputs._replace(chosen=inputs.candidates.new_zeros(3, 0, 6)), impl=impl)
    assert not three.increment.any()


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BFLOAT, HALF], ids=str)
def test_a_candidate_that_is_the_centroid_has_no_variance(impl, dtype):
    inputs = make_image_set(9, 6, dtype=dtype)
    inputs.candidates[[2, 8]] = inputs.centroid
    found = check(inputs, impl=impl)
    assert (found.variance == 0).tolist() == [i in (2, 8) for i in range(9)]
    for kind in KINDS:
        picks = check_selection(inputs, 9, orthogonality=kind, impl=impl)
        assert sorted(picks.indices.tolist()) == list(range(9))


def test_where_every_candidate_is_the_centroid(impl):
    inputs = make_image_set(5, 4)
    inputs = inputs._replace(candidates=inputs.centroid.expand(5, 4))
    for kind in KINDS:
        found = select(inputs, 5, orthogonality=kind, impl=impl)
        assert not found.variances.any() and sorted(found.indices.tolist()) == list(range(5))


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_candidates_the_first_is_chosen(kernel, kind):
    """In tiles of any height a row has the same bits."""
    for m, D in ((7, 3), (40, 17), (90, 64)):
        inputs = make_image_set(m, D, repeated=True, seed=m)
        picks = check_selection(inputs, m, orthogonality=kind, impl=kernel).indices.tolist()
        _, group = inputs.candidates.unique(dim=0, return_inverse=True)
        assert len(group.unique()) < m
        for of in group.unique():
            members = (group == of).nonzero().flatten().tolist()
            assert [i for i in picks if i in members] == members


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_overflow_are_chosen_once_and_last(kernel, kind):
    inputs = make_image_set(6, 4, prior=True)
    inputs.prior[:] = torch.tensor([0.0, -3e38, -2e38, 1.0, -3e38, -1e38])
    for impl in (kernel, "reference"):
        found = select(inputs, 6, orthogonality=kind, impl=impl)
        assert {*found.indices[:2].tolist()} == {0, 3} and found.indices[2:].tolist() == [1, 2, 4, 5]
        assert found.scores[:2].isfinite().all() and (found.scores[2:] == -torch.inf).all()


def test_deflation_leaves_nothing_of_what_was_chosen(impl):
    """A second one of the same direction has no variance; no more directions than columns have any."""
    inputs = make_image_set(12, 5, seed=1)
    inputs.candidates[6:] = inputs.candidates[:6]
    found = check_selection(inputs, 12, orthogonality="deflate", impl=impl)
    assert (found.variances[:5] > 0).all() and not found.variances[5:].any()
    assert {i % 6 for i in found.indices[:5].tolist()} == {i % 6 for i in range(12)} - {
        int(i) % 6 for i in found.indices[5:] if (int(i) + 6) % 12 in found.indices[5:]
    }
    total = found.variances.double().sum()
    assert total <= inputs.scatter.double().trace() * (1 + 1e-6)


def test_a_pick_of_which_nothing_is_left_takes_nothing_away(impl):
    """That of a prior which outweighs all: its rest is rounding, and no direction."""
    inputs = make_image_set(20, 16, prior=True)
    inputs.candidates[1] = inputs.candidates[0]
    inputs.prior.zero_()
    inputs.prior[:2] = torch.tensor([1e6, 1e5])
    found = check_selection(inputs, 10, orthogonality="deflate", impl=impl)
    assert found.indices[:2].tolist() == [0, 1] and found.variances[1] == 0
    without = ImageSet(*inputs)._replace(candidates=inputs.candidates[1:], prior=inputs.prior[1:])
    other = select(without, 9, orthogonality="deflate", impl=impl)
    torch.testing.assert_close(found.variances[2:], other.variances[1:], rtol=1e-4, atol=1e-4)


# Lengths


@pytest.mark.parametrize("exponent", [-18, -10, 10, 18, -36, 37], ids=str)
def test_rows_of_any_length(impl, exponent):
    """Whose squares are 0 or infinite too."""
    inputs = make_image_set(17, 9, 4)
    scale = 10.0**exponent
    check(inputs._replace(candidates=scale * inputs.candidates), impl=impl)
    check(inputs._replace(centroid=scale * inputs.centroid), impl=impl)
    check(inputs._replace(chosen=scale * inputs.chosen), impl=impl)
    check_selection(inputs._replace(candidates=scale * inputs.candidates), 5, impl=impl)


def test_rows_of_different_lengths(impl):
    inputs = make_image_set(17, 9, 4, dtype=DOUBLE)
    lengths = torch.logspace(-8, 8, 17, dtype=DOUBLE).unsqueeze(1)
    check(inputs._replace(candidates=lengths * inputs.candidates), impl=impl)
    check_selection(inputs._replace(candidates=lengths * inputs.candidates), 17, impl=impl)


def test_powers_of_two_change_no_bit(impl):
    inputs = make_image_set(17, 9, 4)
    scaled = ImageSet(
        2.0**20 * inputs.candidates, 2.0**-9 * inputs.centroid, inputs.scatter, 4 * inputs.chosen, None
    )
    assert_all_equal(score(scaled, impl=impl), score(inputs, impl=impl))


# Image sets


def some_sets(G=3, m=11, D=10, S=4, dtype=FLOAT):
    return stacked([make_image_set(m, D, S, prior=True, dtype=dtype, seed=seed) for seed in range(G)])


@pytest.mark.parametrize("in_front", [*itertools.product([False, True], repeat=5)], ids=str)
def test_image_sets_in_front_of_any_arguments(impl, in_front):
    """Each set is scored by itself; what has no sets is all sets'."""
    sets = some_sets()
    inputs = ImageSet(*(t if front else t[0] for t, front in zip(sets, in_front, strict=True)))
    found = check(inputs, impl=impl)
    assert found.score.dim() == 1 + any(in_front)
    if impl == "cpu" and any(in_front):
        for g in range(3):
            one = ImageSet(*(t[g] if front else t for t, front in zip(inputs, in_front, strict=True)))
            assert_all_equal([t[g] for t in found], score(one, impl=impl))
    if not in_front[3]:
        for kind in KINDS:
            check_selection(inputs, 5, orthogonality=kind, impl=impl)


def test_one_image_set_in_front(impl):
    """A dimension of one is kept."""
    inputs = some_sets(1)
    assert check(inputs, impl=impl).score.shape == (1, 11)
    assert check_selection(inputs, 5, impl=impl).indices.shape == (1, 5)


def test_more_image_sets_than_threads(native):
    sets = some_sets(9)
    expected, picks = score(sets), select(sets, 5, orthogonality="deflate")
    for count in (2, 3, 16):
        with threads(count):
            assert_all_equal(score(sets), expected)
            assert_all_equal(select(sets, 5, orthogonality="deflate"), picks)


# Strides, memory, bits


def test_any_strides(impl):
    """The bits of dense tensors, but for the reference's products; arguments are left as they are."""
    inputs = make_image_set(9, 6, 3, prior=True)
    expected, picks = score(inputs, impl=impl), select(inputs, 4, impl=impl)
    padded = torch.full((9, 17), torch.nan)
    padded[:, 4:16:2] = inputs.candidates
    for other in (
        ImageSet(*(t.T.contiguous().T if t.dim() == 2 else t for t in inputs)),
        ImageSet(*(t.repeat_interleave(2, 0)[::2] for t in inputs)),
        ImageSet(*(t.flip(0).flip(0).unsqueeze(-1).expand(*t.shape, 3)[..., 1] for t in inputs)),
        inputs._replace(candidates=padded[:, 4:16:2]),
    ):
        before = [t.clone() for t in other]
        found = check(other, impl=impl), check_selection(other, 4, impl=impl)
        if impl == "cpu":
            assert_all_equal(found[0], expected)
            assert_all_equal(found[1], picks)
        assert_all_equal(other, before)


def test_expanded_tensors(impl):
    inputs = make_image_set(9, 6, 3, prior=True)
    expanded = ImageSet(*(t.expand(4, *t.shape) for t in inputs))
    check(expanded, impl=impl)
    one = inputs.candidates[:1]
    check(inputs._replace(candidates=one.expand(9, 6)), impl=impl)
    check(inputs._replace(prior=inputs.prior[:1].expand(9), chosen=one.expand(3, 6)), impl=impl)
    flat = inputs.candidates[0, :1].expand(9, 6)  # one number for all
    check(inputs._replace(candidates=flat), impl=impl)
    check(inputs._replace(scatter=torch.ones(1, 1).expand(6, 6)), impl=impl)


def test_tensors_of_zeros_that_have_no_memory(impl):
    """As tangents are made of them."""
    inputs = make_image_set(9, 6, 3, prior=True)
    zeros = inputs._replace(scatter=torch.zeros(6, 6), prior=torch.zeros(9))
    none = inputs._replace(scatter=torch._efficientzerotensor((6, 6)), prior=torch._efficientzerotensor((9,)))
    assert_all_equal(score(none, impl=impl), score(zeros, impl=impl))
    for kind in KINDS:
        found = (select(x, 4, orthogonality=kind, impl=impl) for x in (none, zeros))
        assert_all_equal(*found)


def within(t, value):
    """In memory that has a value on both sides of it."""
    around = torch.full((t.numel() + 128,), value, dtype=t.dtype)
    around[64:-64] = t.flatten()
    return around[64:-64].view_as(t)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize(("m", "D", "S"), [(1, 1, 1), (5, 3, 2), (9, 17, 3), (17, 33, 4)])
def test_nothing_outside_of_the_arguments_is_read(native, m, D, S, dtype):
    inputs = [t.unsqueeze(0) for t in make_image_set(m, D, S, prior=True, dtype=dtype)]
    for value in (7.0, torch.nan):
        candidates, centroid, scatter, chosen, prior = (within(t, value) for t in inputs)
        found = RAW.phrase_scores_fwd(candidates, centroid, scatter, chosen, prior, 10.0, 80.0, 8.0)
        assert_all_equal(found, RAW.phrase_scores_fwd(*inputs, 10.0, 80.0, 8.0))
        for deflate in (False, True):
            options = min(m, 4), deflate, 10.0, 80.0, 8.0
            found = RAW.select_phrases_fwd(candidates, centroid, scatter, prior, *options)
            assert_all_equal(found, RAW.select_phrases_fwd(*inputs[:3], inputs[4], *options))


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_the_number_of_threads_changes_no_bit(native, dtype):
    inputs = make_image_set(700, 70, 5, prior=True, dtype=dtype)
    expected = score(inputs), *(select(inputs, 6, orthogonality=kind) for kind in KINDS)
    for count in (1, 2, 3, 4):
        with threads(count):
            for _ in range(3):
                assert_all_equal(score(inputs), expected[0])
                for kind, picks in zip(KINDS, expected[1:], strict=True):
                    assert_all_equal(select(inputs, 6, orthogonality=kind), picks)
    with threads(2):
        check(inputs)


def test_a_candidate_has_the_same_bits_beside_any_others(native):
    inputs = make_image_set(50, 33, 4, prior=True)
    every = score(inputs)
    for some in (slice(0, 1), slice(7, 20), slice(13, None), slice(49, None)):
        few = inputs._replace(candidates=inputs.candidates[some], prior=inputs.prior[some])
        assert_all_equal(score(few), [t[some] for t in every])


def test_the_first_of_more_are_fewer(impl):
    inputs = make_image_set(20, 9, prior=True)
    for kind in KINDS:
        every = select(inputs, 20, orthogonality=kind, impl=impl)
        for k in (1, 2, 9):
            assert_all_equal(select(inputs, k, orthogonality=kind, impl=impl), [t[:k] for t in every])


def test_results_share_no_memory(impl):
    """With each other or with an argument."""
    inputs = make_image_set(5, 3, 2, prior=True)
    for of in (inputs, inputs._replace(chosen=None, prior=None)):
        tensors = [*score(of, impl=impl), *select(of, 5, impl=impl), *(t for t in of if t is not None)]
        places = [t.untyped_storage().data_ptr() for t in tensors]
        assert len({*places[:3]}) == 3 and len({*places[3:6]}) == 3
        assert not {*places[:6]} & {*places[6:]}


class Largest(TorchDispatchMode):
    """The most elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.itemsize)
        return results


def test_memory(impl):
    """Nothing grows with the square of the candidates; candidates of all sets are not repeated."""
    inputs = make_image_set(60, 5, 3, prior=True)
    inputs.candidates.requires_grad_()
    with Largest() as largest:
        score(inputs, impl=impl).score.sum().backward()
        select(inputs, 6, impl=impl)
        select(inputs, 6, orthogonality="deflate", impl=impl)
    assert largest.elements <= 60 * 6
    sets = make_image_set(60, 5)._replace(scatter=torch.stack([torch.eye(5)] * 8))
    with Largest() as largest:
        score(sets, impl=impl)
    assert largest.elements <= (60 * 8 if impl == "cpu" else 60 * 5 * 8)


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        import fastkit.ops
        from fastkit.testing.phrase_scores import check, check_selection, make_image_set
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        torch.set_num_threads(2)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for m, D, S in {[size for size in SIZES if size[0] < 66]!r}:
                inputs = make_image_set(m, D, S, prior=True, dtype=dtype)
                check(inputs, impl="cpu")
                for kind in {KINDS!r}:
                    check_selection(inputs, min(m, 7), orthogonality=kind, impl="cpu")
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


# Autocast


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_autocast_changes_nothing(impl, dtype):
    inputs = make_image_set(9, 6, 3, prior=True, dtype=dtype)
    device = inputs.candidates.device.type

    def everything(forward, backward):
        leaves = ImageSet(*(t.detach().requires_grad_() for t in inputs))
        with torch.autocast(device, dtype=BFLOAT, enabled=forward):
            found = score(leaves, impl=impl)
            picks = [select(inputs, 4, orthogonality=kind, impl=impl) for kind in KINDS]
        with torch.autocast(device, dtype=BFLOAT, enabled=backward):
            gradients = torch.autograd.grad(found.score.sum(), leaves)
        return *(t.detach() for t in found), *gradients, *picks[0], *picks[1]

    expected = everything(forward=False, backward=False)
    assert_all_equal(everything(forward=True, backward=False), expected)
    if impl != "reference":  # whose backward is PyTorch's own
        assert_all_equal(everything(forward=True, backward=True), expected)
