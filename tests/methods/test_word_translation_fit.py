"""Fits of small tables: what is recovered, what is said not to be, and what a fit depends on."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from fastkit._threads import threads
from fastkit.methods.word_translation import WordTranslator
from fastkit.methods.word_translation.restarts import draw, principal_scores

pytestmark = pytest.mark.usefixtures("one_thread")

N, D = 600, 30
RESTARTS = 12
FAST = {"components": 20, "restarts": RESTARTS, "epochs": 45}
SHORT = {
    "components": 12,
    "restarts": 6,
    "epochs": 8,
    "halvings": (3, 5),
    "batch_size": 64,
    "trial_rounds": 1,
}
LEARNT = (
    "w_xy_", "w_yx_", "means_x_", "means_y_", "restart_costs_", "restart_mutual_", "restart_epochs_",
    "restart_seeds_", "penalty_",
)  # fmt: skip


def clustered(seed, n=N, d=D):
    """Rows around skewed centres, with axes of decaying size, turned."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, d, generator=g).exp()
    rows = centres[torch.randint(40, (n,), generator=g)] + 0.6 * torch.randn(n, d, generator=g)
    return rows * torch.linspace(1.5, 0.3, d) @ orthogonal(d, g)


def orthogonal(d, generator):
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


def turned(seed, noise=0.0):
    """A table, its turned and shuffled copy, and which rows belong together."""
    g = torch.Generator().manual_seed(100 + seed)
    x = clustered(seed)
    order = torch.randperm(N, generator=g)
    y = (x + noise * torch.randn(N, D, generator=g)) @ orthogonal(D, g)
    return x, y[order], torch.stack([order, torch.arange(N)], 1)


@pytest.fixture(scope="module")
def pair():
    return turned(1)


@pytest.fixture(scope="module")
def fitted(pair):
    with threads(1):
        return WordTranslator(**FAST).fit(*pair[:2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_turned_and_shuffled_copy_is_recovered(pair, device):
    x, y, pairs = (tensor.to(device) for tensor in pair)
    translator = WordTranslator(**FAST).fit(x, y)
    assert translator.score(pairs, ks=(1,)).precision == {1: 1.0}
    assert translator.converged_
    assert all(getattr(translator, name).device.type == device for name in LEARNT)
    # The map is that of the rows that belong together, up to rounding.
    near = translator.transform(x[pairs[:, 0]]) - unit_centre_unit(y)[pairs[:, 1]]
    assert near.abs().max() < 1e-5


def unit_centre_unit(table):
    table = torch.nn.functional.normalize(table)
    return torch.nn.functional.normalize(table - table.mean(0))


def test_it_is_recovered_both_ways(pair):
    x, y, pairs = pair
    back = WordTranslator(**FAST).fit(y, x)
    assert back.score(pairs.flip(1), ks=(1,)).precision == {1: 1.0}
    assert back.converged_


def test_noise_does_not_hide_the_map():
    x, y, pairs = turned(1, noise=0.2)
    translator = WordTranslator(**FAST).fit(x, y)
    assert translator.converged_
    assert translator.score(pairs, ks=(1, 5)).precision[1] > 0.99


def test_tables_that_have_nothing_in_common_are_said_not_to_have_converged():
    with pytest.warns(UserWarning, match=r"^WordTranslator: not converged: .*try more restarts") as record:
        translator = WordTranslator(**FAST).fit(clustered(10), clustered(20))
    assert len(record) == 1
    assert record[0].filename == __file__
    assert translator.converged_ is False
    best = next(c for c in translator.candidates_ if c.restart == translator.best_restart_)
    assert best.score < 1.05 * translator.control_score_


def test_what_is_learnt(fitted, pair):
    assert fitted.w_xy_.shape == fitted.w_yx_.shape == (D, D)
    assert (fitted.w_xy_ @ fitted.w_xy_.T - torch.eye(D)).abs().max() < 1e-5
    assert torch.equal(fitted.w_yx_, fitted.w_xy_.T)
    for name, dtype in (
        ("costs", torch.float32),
        ("mutual", torch.int64),
        ("epochs", torch.int64),
        ("seeds", torch.int64),
    ):
        value = getattr(fitted, f"restart_{name}_")
        assert value.shape == (RESTARTS,) and value.dtype == dtype
    assert fitted.restart_seeds_.tolist() == [draw(0, (r,))[0] for r in range(RESTARTS)]
    assert [c.restart for c in fitted.candidates_ if c.control] == [RESTARTS, RESTARTS + 1]
    best = max((c for c in fitted.candidates_ if not c.control), key=lambda c: c.score)
    assert best.restart == fitted.best_restart_ and best.agreement == 1.0
    assert best.cost == fitted.restart_costs_[best.restart].item()
    assert best.mutual == fitted.restart_mutual_[best.restart].item()
    wrong = [c.score for c in fitted.candidates_ if c.agreement < 0.05]
    assert fitted.control_score_ == max(wrong)
    assert set(fitted.timings_) == {"preprocess", "restarts", "trials", "refine", "retrieval"}
    assert all(seconds >= 0 for seconds in fitted.timings_.values())


def test_controls_score_what_wrong_restarts_do(fitted):
    """They are worth nothing as a yardstick if they are worse than what may be taken for right."""
    controls = [c.score for c in fitted.candidates_ if c.control]
    wrong = [c.score for c in fitted.candidates_ if not c.control and c.agreement < 0.05]
    assert wrong
    assert all(abs(c.agreement) < 0.05 for c in fitted.candidates_ if c.control)
    assert max(wrong) < 1.05 * max(controls)


def test_the_criterion_is_the_mean_cosine_of_csls_pairs(fitted, pair):
    x, y = (unit_centre_unit(table.double()) for table in pair[:2])
    cosines = x @ fitted.w_xy_.double().T @ y.T
    penalties = [cosines.topk(10, dim).values.mean(dim, keepdim=True) for dim in (1, 0)]
    nearest = (2 * cosines - penalties[0] - penalties[1]).argmax(1)
    expected = cosines.gather(1, nearest[:, None]).mean().item()
    assert fitted.criterion_ == pytest.approx(expected, abs=1e-6)


# Restarts


def test_principal_scores_are_those_of_an_svd():
    table = clustered(3, n=200)
    rows = table.numpy().astype(np.float64)
    rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    expected = u[:, :7] * s[:7]
    expected *= np.where((expected**3).sum(0) < 0, -1, 1)
    scores = principal_scores("X", table, 7).numpy()
    np.testing.assert_allclose(scores, expected / expected.std(), atol=1e-5)
    assert scores.std() == pytest.approx(1, abs=1e-6)
    assert ((scores.astype(np.float64) ** 3).sum(0) >= 0).all()


def test_halvings_drop_what_costs_more(pair):
    options = {**SHORT, "restarts": 9, "candidates": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        halved = WordTranslator(**options).fit(*pair[:2])
        first = WordTranslator(**{**options, "epochs": 4}).fit(*pair[:2])  # one more than the first halving's
        whole = WordTranslator(**{**options, "halvings": ()}).fit(*pair[:2])
    assert whole.restart_epochs_.tolist() == [8] * 9
    assert sorted(halved.restart_epochs_.tolist()) == [4] * 4 + [6] * 2 + [8] * 3
    dropped = halved.restart_epochs_ == 4
    assert first.restart_costs_[dropped].min() >= first.restart_costs_[~dropped].max()
    assert torch.equal(first.restart_costs_[dropped], halved.restart_costs_[dropped])
    kept = halved.restart_epochs_ == 8
    assert torch.equal(whole.restart_costs_[kept], halved.restart_costs_[kept])
    assert halved.restart_epochs_[halved.best_restart_] == 8


def test_a_restart_does_not_depend_on_how_many_there_are(pair):
    options = {**SHORT, "halvings": ()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        few = WordTranslator(**{**options, "restarts": 2}).fit(*pair[:2])
        more = WordTranslator(**{**options, "restarts": 5}).fit(*pair[:2])
        other = WordTranslator(**{**options, "restarts": 2}, seed=1).fit(*pair[:2])
    for name in ("restart_costs_", "restart_mutual_", "restart_seeds_"):
        assert torch.equal(getattr(few, name), getattr(more, name)[:2])
        assert not torch.equal(getattr(few, name), getattr(other, name))


def test_seeds_and_signs_are_of_the_seed_and_the_key_alone():
    seed, signs = draw(7, (3,), 130)
    assert len(signs) == 130 and set(signs) == {-1, 1}
    assert 0 <= seed < 2**63
    assert draw(7, (3,), 5) == (seed, signs[:5])
    assert draw(7, (4,), 130) != (seed, signs) != draw(8, (3,), 130)
    assert draw(7, (3, 1), 130)[0] != seed


# What a fit depends on


def same(a, b):
    scalars = all(
        getattr(a, name) == getattr(b, name)
        for name in ("converged_", "candidates_", "control_score_", "criterion_", "best_restart_")
    )
    return scalars and all(torch.equal(getattr(a, name), getattr(b, name)) for name in LEARNT)


def test_a_fit_has_the_same_bits_again_and_with_any_number_of_threads(fitted, pair):
    with threads(2):
        assert same(WordTranslator(**FAST).fit(*pair[:2]), fitted)


def test_arrays_and_other_precisions_are_taken(fitted, pair):
    x, y = pair[:2]
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    assert same(WordTranslator(**FAST).fit(frozen, y.double().numpy()), fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        halves = WordTranslator(**SHORT).fit(x.half(), y.numpy().astype(np.float16))
        raised = WordTranslator(**SHORT).fit(x.half().float(), torch.nn.Parameter(y.half().float()))
        strided = WordTranslator(**SHORT).fit(x.half().T.contiguous().T, y.half().float().T.contiguous().T)
    assert same(halves, raised) and same(strided, raised)
    assert halves.w_xy_.dtype == torch.float32 and not raised.w_xy_.requires_grad


def test_arguments_are_left_alone(pair):
    x, y = pair[0].clone(), pair[1].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        WordTranslator(**SHORT, preprocess=()).fit(x, y)
    assert torch.equal(x, pair[0]) and torch.equal(y, pair[1])


def test_parameters_are_those_of_scikit_learn():
    steps = ["unit"]
    translator = WordTranslator("release", restarts=7, preprocess=steps)
    assert translator.get_params()["preprocess"] is steps
    assert translator.get_params()["words"] is None
    again = WordTranslator(**translator.get_params())
    assert again.get_params() == translator.get_params()
    assert translator.set_params(restarts=8, seed=3) is translator
    assert (translator.restarts, translator.seed) == (8, 3)
    assert repr(translator) == "WordTranslator(preset='release', restarts=8, preprocess=['unit'], seed=3)"
    with pytest.raises(ValueError, match="set_params must be given arguments of the class, got restart"):
        translator.set_params(restart=8)


def test_copies_are_whole(fitted, pair):
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert same(other, fitted)
        assert torch.equal(other.translate(pair[0][:5]).indices, fitted.translate(pair[0][:5]).indices)


# Other ways to the maps


@pytest.mark.parametrize("transfer", ["procrustes", "icp"])
@pytest.mark.parametrize(
    ("refine", "dictionary"),
    [
        ("none", "s2t"),
        ("reciprocal_icp", "s2t"),
        ("procrustes", "s2t"),
        ("procrustes_csls", "s2t"),
        ("procrustes_csls", "mutual"),
    ],
)
def test_every_transfer_and_refinement(transfer, refine, dictionary):
    x, y, pairs = turned(1, noise=0.2)
    # Batches of 16 words: an epoch of 600 words is 37 steps, about as many as one of 5000 by batches of 128.
    options = {"transfer_epochs": 15, "refine_epochs": 15, "batch_size": 16, "dictionary": dictionary}
    translator = WordTranslator(**FAST, transfer=transfer, refine=refine, **options).fit(x, y)
    assert translator.converged_
    assert translator.score(pairs, ks=(1,)).precision[1] > 0.95
    is_orthogonal = (translator.w_xy_ @ translator.w_xy_.T - torch.eye(D)).abs().max() < 1e-5
    assert is_orthogonal == (
        refine.startswith("procrustes") or (refine == "none" and transfer == "procrustes")
    )
    assert ("transfer" in translator.timings_) == (transfer == "icp")


@pytest.mark.parametrize("preset", ["release", "paper"])
def test_the_published_presets_run_on_tables_as_they_are(pair, preset):
    x, y, pairs = pair
    translator = WordTranslator(
        preset, components=20, restarts=12, epochs=40, transfer_epochs=20, refine_epochs=10, batch_size=16
    ).fit(x, y)
    assert translator.means_x_.shape == (0, D)
    assert [c.control for c in translator.candidates_] == [False, True, True]
    assert translator.restart_epochs_.tolist() == [40] * 12
    assert translator.score(pairs, ks=(1,)).precision[1] > 0.99
    assert torch.equal(translator.transform(x[:3]), translator.transform(x)[:3])


def test_maps_that_leave_the_trial_are_said_not_to_have_converged(pair):
    with pytest.warns(
        UserWarning, match=r"but ICP in all columns has left its map, .* a smaller batch_size"
    ) as record:
        translator = WordTranslator(**FAST, transfer="icp", transfer_epochs=5, refine="none").fit(*pair[:2])
    assert len(record) == 1 and record[0].filename == __file__
    assert not translator.converged_
    assert max(c.score for c in translator.candidates_) > 1.05 * translator.control_score_


def test_maps_that_shrink_are_not_kept_for_their_cosines():
    """Least squares shrinks what is noise, and has cosines that no orthogonal map reaches."""
    from fastkit.methods.word_translation.checkpoint import Stages
    from fastkit.methods.word_translation.refinement import Maps, procrustes_csls
    from fastkit.methods.word_translation.settings import Settings

    x, y, pairs = turned(1, noise=1.0)
    x, y = unit_centre_unit(x), unit_centre_unit(y)
    least = torch.linalg.lstsq(x[pairs[:, 0]], y[pairs[:, 1]]).solution
    refined = procrustes_csls(
        x, y, Maps(least.T, least.inverse()), words=N, rounds=2, settings=Settings(), name="refine",
        stages=Stages(None, {}, torch.device("cpu"), False),
    )  # fmt: skip
    assert refined.score == max(refined.scores[1:]) < refined.scores[0]
    assert (refined.maps.w_xy @ refined.maps.w_xy.T - torch.eye(D)).abs().max() < 1e-5


def test_reciprocal_icp_ends_where_too_few_pairs_are_mutual(pair):
    """Unrelated maps: their few mutual pairs are no ground for a map of 30 columns."""
    from fastkit.methods.word_translation.checkpoint import Stages
    from fastkit.methods.word_translation.refinement import Maps, icp
    from fastkit.methods.word_translation.settings import Settings

    def run(maps):
        stages = Stages(None, {}, torch.device("cpu"), False)
        return icp(
            *tables,
            maps,
            words=40,
            epochs=3,
            mutual_only=True,
            settings=Settings(),
            stages=stages,
            name="refine",
        )

    tables = unit_centre_unit(pair[0]), unit_centre_unit(clustered(5))
    g = torch.Generator().manual_seed(0)
    maps = Maps(orthogonal(D, g), orthogonal(D, g))
    with pytest.warns(
        UserWarning, match=r"should have 30 mutual pairs, got \d+ among 40 and 40 words; it ended"
    ):
        after = run(maps)
    assert torch.equal(after.w_xy, maps.w_xy)
    tables = torch.eye(D)[:2].repeat(20, 1), torch.eye(D)[:2].repeat(20, 1)
    swap = torch.eye(D)
    swap[:2, :2] = swap[:2, :2].flip(0)
    # One way each row is the nearest of itself, the other way of the other: of no pair both are right.
    with pytest.raises(ValueError, match="must have mutual pairs, got 0 among 40 and 40 words; refine="):
        run(Maps(torch.eye(D), swap))


def test_tables_of_different_widths(pair):
    x, _, pairs = pair
    g = torch.Generator().manual_seed(5)
    wide = torch.zeros(N, 34)
    wide[:, :D] = pair[1]
    wide = wide @ orthogonal(34, g)
    options = {**FAST, "restarts": 64, "allow_rect": True}
    there = WordTranslator(**options).fit(x, wide)
    assert there.w_xy_.shape == (34, D) and there.w_yx_.shape == (D, 34)
    assert there.converged_ and there.score(pairs, ks=(1,)).precision[1] > 0.99
    assert there.transform(x).shape == (N, 34) and there.inverse(wide).shape == (N, D)
    back = WordTranslator(allow_rect=True).fit(wide, x, pairs=pairs.flip(1))
    assert back.w_xy_.shape == (D, 34)
    assert back.score(pairs.flip(1), ks=(1,)).precision[1] > 0.99


def test_pairs_that_are_known(pair):
    x, y, pairs = pair
    translator = WordTranslator().fit(x, y, pairs=pairs[:100])
    assert translator.converged_ and translator.candidates_ == [] and translator.best_restart_ == -1
    assert math.isnan(translator.control_score_) and len(translator.restart_costs_) == 0
    assert translator.score(pairs, ks=(1,)).precision == {1: 1.0}
    assert "restarts" not in translator.timings_
    noisy = turned(1, noise=0.6)
    plain = WordTranslator().fit(*noisy[:2], pairs=noisy[2][:40].numpy())
    refined = WordTranslator(refine="procrustes_csls").fit(*noisy[:2], pairs=noisy[2][:40])
    assert refined.criterion_ > plain.criterion_
    assert refined.score(pairs).precision[1] > plain.score(pairs).precision[1]
    with pytest.warns(UserWarning, match="pairs should be at least as many as columns, 30, got 29"):
        WordTranslator().fit(x, y, pairs=pairs[:29])
