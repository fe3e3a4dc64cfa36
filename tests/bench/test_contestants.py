"""What a benchmark compares: all contestants do the same work, and one that does not is seen."""

import math

import numpy as np
import pytest
import torch

from fastkit import reference
from fastkit.bench.case import Skip
from fastkit.bench.cases import (
    iir_scan_chunks,
    iir_scan_modes,
    iir_scan_peers,
    iir_scan_step,
    linear_cross_entropy_loss,
    lora_linear_layer,
    lora_linear_prune,
    moments_covariance,
    procrustes_factor,
    topk_similarity_csls,
    topk_similarity_search,
)
from fastkit.bench.cases.iir_scan_modes import Bank, Fixed, Sections, TimeVarying
from fastkit.bench.contest import SAME_WORK, Yardstick, load, make_product

MODES = [
    (Fixed, (3, 1, 384), False),
    (Fixed, (1, 1, 384), False),
    (TimeVarying, (2, 9, 64), False),
    (Bank, (2, 9, 256), False),
    (Bank, (2, 9, 256), True),
    (Sections, (5, 1, 384), False),
]


def makers_of(contest):
    """Those whose package is installed, and what they make."""
    for label, make in contest.makers.items():
        try:
            yield label, make()
        except Skip as skip:
            package = label.split()[0]
            assert package in (*iir_scan_peers.PACKAGES, "peft", "sklearn", "faiss", "torch")
            assert str(skip).startswith(f"{package} is ")  # not installed, or made for another torch


def test_a_package_that_cannot_be_used_is_skipped_in_words(tmp_path, monkeypatch):
    with pytest.raises(Skip, match=r"^no_such_package is not installed$"):
        load("no_such_package.part")
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.99: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Skip, match=r"^broken_package is installed, but does not load$"):
        load("broken_package")


def check_every_contestant(case, results, tolerance):
    """All agree, one wrong number in any result is seen, and yardsticks are named as such."""
    contest = case.contest()
    assert next(iter(contest.makers)) == "fastkit"
    for label, call in makers_of(contest):
        given = call()
        assert not isinstance(given, Yardstick) or label in case.yardsticks
        parts, error = (
            (given.result, given.measure) if isinstance(given, Yardstick) else (given, contest.error)
        )
        assert isinstance(given, Yardstick) or len(parts) == results
        assert contest.error(given) < tolerance, label
        for i, part in enumerate(parts):
            part = torch.as_tensor(part).detach()
            for fault in (0.01 * part.abs().max(), torch.nan):
                wrong = part.clone()
                wrong[(-1,) * wrong.ndim] += fault
                assert not error((*parts[:i], wrong, *parts[i + 1 :])) <= case.tolerance, label


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_iir_scan_agrees_and_a_wrong_one_does_not(view, backward):
    case = iir_scan_chunks.case(2, 9, 256, chunk=32, view=view, backward=backward, compile=False)
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-4)


@pytest.mark.parametrize(("mode", "size", "view"), MODES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_the_modes_agrees_and_a_wrong_one_does_not(mode, size, view, backward):
    case = iir_scan_modes.case(mode, size, view=view, backward=backward)
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-5)


def test_every_contestant_of_a_step_agrees_and_a_wrong_one_does_not():
    case = iir_scan_step.case(3, 5)
    check_every_contestant(case, results=3, tolerance=1e-6)
    differentiable = {label: call() for label, call in makers_of(case.contest())}
    assert differentiable["with grad"][0].requires_grad
    assert differentiable["op call"].result[0].requires_grad


@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_a_layer_agrees_and_a_wrong_one_does_not(backward):
    case = lora_linear_layer.case(30, 20, 24, 4, backward=backward, compile=False)
    assert {"frozen layer", "peft unmasked"} == case.yardsticks
    check_every_contestant(case, results=5 if backward else 2, tolerance=1e-5)


def test_every_form_of_pruning_agrees_and_a_wrong_one_does_not():
    contest = lora_linear_prune.case(30, 20, 4).contest()
    for label, call in makers_of(contest):
        mask, norm = call()
        assert contest.error((mask, norm)) < 1e-6, label
        assert not contest.error((~mask, norm)) <= 1.0
        assert not contest.error((mask, 1.01 * norm)) <= 1e-4


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_a_loss_agrees_and_a_wrong_one_does_not(backward, everything):
    case = linear_cross_entropy_loss.case(30, 50, 12, backward=backward, everything=everything, compile=False)
    assert {"mm, same products"} == case.yardsticks
    check_every_contestant(case, results=(4 if everything else 3) if backward else 1, tolerance=1e-5)


class FakeLiger:
    """Liger's function by its documented interface: input and weight, and more results than the loss."""

    class LigerFusedLinearCrossEntropyFunction:
        @staticmethod
        def apply(x, weight, target):
            return reference.linear_cross_entropy(x, weight, target), None, None


class FakeCce:
    linear_cross_entropy = staticmethod(reference.linear_cross_entropy)


def test_what_peers_of_a_gpu_are_given_is_the_same_loss(monkeypatch):
    fakes = {"liger_kernel.ops.fused_linear_cross_entropy": FakeLiger, "cut_cross_entropy": FakeCce}
    monkeypatch.setattr(linear_cross_entropy_loss, "load", fakes.__getitem__)
    contest = linear_cross_entropy_loss.case(30, 50, 12).contest()
    for make in (contest.make_liger, contest.make_cce):
        assert contest.error(make()()) < 1e-5
    of_gpu = linear_cross_entropy_loss.case(30, 50, 12, device="cuda").contest()
    assert {"liger_kernel", "cut_cross_entropy", "torch in chunks"} <= {*of_gpu.makers}


@pytest.mark.parametrize("weights", [False, True])
def test_every_form_of_moments_agrees_and_a_wrong_one_does_not(weights):
    case = moments_covariance.case(300, 20, weights=weights, compile=False)
    assert {SAME_WORK} == case.yardsticks
    check_every_contestant(case, results=2, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(30, 30), (2, 3, 12, 12)])
def test_every_way_to_a_factor_agrees_and_a_wrong_one_does_not(shape):
    check_every_contestant(procrustes_factor.polar_case(*shape), results=1, tolerance=2e-5)


def test_every_way_to_a_map_agrees_and_a_wrong_one_does_not():
    check_every_contestant(procrustes_factor.procrustes_case(100, 20), results=1, tolerance=1e-5)


def test_the_condition_of_a_matrix_is_what_it_says():
    (m,) = procrustes_factor.polar_case(2, 30, 30).contest().inputs
    assert torch.linalg.cond(m.double()) == pytest.approx(1e3, rel=1e-4)


class FakeFaiss:
    """Its exhaustive index, by its documented interface."""

    class IndexFlatIP:
        def __init__(self, width):
            self.width = width

        def add(self, keys):
            assert keys.dtype == np.float32 and keys.shape[1] == self.width
            self.keys = keys

        def search(self, queries, k):
            values, indices = torch.from_numpy(queries @ self.keys.T).topk(k)
            return values.numpy(), indices.numpy()


SEARCHES = [
    topk_similarity_search.case(30, 50, 8, compile=False),
    topk_similarity_search.case(30, 50, 8, metric="cosine", compile=False),
    topk_similarity_search.case(1, 50, 8, compile=False),
    topk_similarity_csls.case(30, 50, 8, compile=False),
]


@pytest.mark.parametrize("case", SEARCHES, ids=lambda case: case.title)
def test_every_search_agrees_and_a_wrong_one_does_not(case, monkeypatch):
    """Blocks that do not divide the queries, and all scores at once, are contestants too."""
    monkeypatch.setattr(topk_similarity_search, "ROWS", 13)
    fakes = {"faiss": FakeFaiss}
    monkeypatch.setattr(topk_similarity_search, "load", lambda module: fakes.get(module) or load(module))
    contest = case.contest()
    labels = []
    for label, call in makers_of(contest):
        labels.append(label)
        given = call()
        assert contest.error(given) < 1e-6, label
        if label == SAME_WORK:
            continue
        values, indices = map(torch.as_tensor, given)
        assert contest.error((values + 1e-3 * values.max(), indices)) > case.tolerance
        for wrong in (indices[-1, 1].item(), -1, 50):  # a key twice, and none
            assert contest.error((values, _with_last(indices, wrong))) == math.inf
        others = sorted({*range(50)} - {*indices[-1].tolist()})
        assert all(contest.error((values, _with_last(indices, key))) > case.tolerance for key in others)
        assert not contest.error((_with_last(values, math.nan), indices)) <= case.tolerance
    assert (SAME_WORK in labels) == (case.floor == SAME_WORK) == (case.shape[:2] != "1x")
    assert any(label.endswith("whole") for label in labels) == (case.shape[:2] != "1x")


def _with_last(t, value):
    changed = t.clone()
    changed[-1, -1] = value
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_number_in_a_product_is_seen_and_rounding_is_not(dtype):
    (result,), measure = make_product(10**6, "cpu", dtype)()
    assert result.shape == (100, 100) and result.dtype == dtype
    assert measure((result,)) < 1e-6
    result[-1, -1] += 0.02 * result.abs().max()
    assert measure((result,)) > 1e-3
    result[-1, -1] = torch.nan
    assert not measure((result,)) <= 1


def test_a_product_has_the_work_that_it_is_to_have(monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (*a.shape, *b.shape, *out.shape))
    (sizes,), _ = make_product(9 * 10**9, "cpu")()
    assert sizes == (2146, 2048, 2048, 2048, 2146, 2048)


class FakeLpc:
    """torchlpc and philtorch by their documented interface: rows of samples, coefficients for each."""

    EXTENSION_LOADED = True

    @staticmethod
    def sample_wise_lpc(x, a):
        assert x.shape == a.shape[:2] and a.shape[2] == 2
        return reference.iir_scan(x[None], a[None], chunk=1)[0]

    @staticmethod
    def lfilter(b, a, x, *, form, backend):
        assert form == "df1" and backend in ("ssm", "torchlpc") and b.shape == (*x.shape, 3)
        return reference.iir_scan(x[None], a[None], b[None], chunk=1)[0]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_peers_are_given_is_the_same_work(view, backward, monkeypatch):
    """Where they are not installed, their place is taken by what computes the same."""
    fakes = {"torchlpc": FakeLpc, "philtorch.lpv": FakeLpc}
    monkeypatch.setattr(iir_scan_peers, "load", lambda module: fakes.get(module) or load(module))
    case = iir_scan_chunks.case(2, 9, 64, chunk=16, view=view, backward=backward, compile=False)
    assert {"torchlpc + FIR", "philtorch", "torchlpc poles"} <= {*dict(makers_of(case.contest()))}
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-4)


@pytest.mark.parametrize(("mode", "by"), [(Fixed, "iir_scan"), (Sections, "sosfilt")])
def test_what_is_exact_for_long_signals_is_the_reference(mode, by):
    """Gradients too: the sums over rows that share a filter."""
    contest = iir_scan_modes.case(mode, (3, 1, 768), backward=True).contest()
    x, a, b, gy = (t.detach().double() for t in contest.inputs)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    if by == "iir_scan":
        y = reference.iir_scan(x, a, b)
    else:
        y = reference.sosfilt(x, torch.cat([b, torch.ones_like(a[..., :1]), a], -1)[0, 0])
    for actual, (expected, _) in zip(
        (y.detach(), *torch.autograd.grad(y, leaves, gy)), contest.expected, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_the_filters_of_the_modes_are_near_the_unit_circle_and_stable():
    for mode, size, _ in MODES:
        inputs = iir_scan_modes.case(mode, size).contest().inputs
        radii = inputs.a[..., 1].sqrt()
        assert 0.98 < radii.max() < 0.9991
        assert (inputs.a[..., 0].abs() < 2 * radii).all()  # pairs, not two real poles
