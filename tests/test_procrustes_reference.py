"""reference.polar and reference.procrustes against SciPy and their definition; their derivatives."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastkit.reference.procrustes import is_singular, polar, procrustes
from fastkit.testing.procrustes import least_divisor, log_spaced, orthogonal, with_spectrum

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # of torch.func
]

DOUBLE = torch.float64


def tables(N, D, E, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, width, generator=generator, dtype=dtype) for width in (D, E))


def near(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


# What they are


@pytest.mark.parametrize("D", [1, 2, 3, 8, 33])
def test_polar_is_scipys(D):
    linalg = pytest.importorskip("scipy.linalg")
    m = with_spectrum(log_spaced(D, 1e3), dtype=DOUBLE, seed=D)
    w, h = linalg.polar(m.numpy())
    assert near(polar(m), torch.from_numpy(w))
    assert near(polar(m).mT @ m, torch.from_numpy(h))


@pytest.mark.parametrize("D", [1, 2, 5, 20])
def test_procrustes_is_scipys(D):
    linalg = pytest.importorskip("scipy.linalg")
    source, target = tables(3 * D, D, D)
    r, _ = linalg.orthogonal_procrustes(source.numpy(), target.numpy())
    assert near(procrustes(source, target), torch.from_numpy(r.T))


@pytest.mark.parametrize("P", [4, 7])
def test_a_rectangular_factor_is_scipys(P):
    linalg = pytest.importorskip("scipy.linalg")
    source, target = tables(20, 4, P)
    w, _ = linalg.polar((target.mT @ source).numpy())
    assert near(procrustes(source, target), torch.from_numpy(w))
    assert near(procrustes(target, source), torch.from_numpy(w.T.copy()))


def test_polar_is_the_sign_of_a_number():
    assert torch.equal(polar(torch.tensor([[[-3.0]], [[0.5]]])), torch.tensor([[[-1.0]], [[1.0]]]))


def test_a_batch_is_its_matrices():
    m = torch.stack([with_spectrum(log_spaced(4, 10.0**k), seed=k) for k in range(6)]).view(2, 3, 4, 4)
    w = polar(m)
    for i, j in itertools.product(range(2), range(3)):
        assert near(w[i, j], polar(m[i, j]), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float64_and_rounds_once(dtype):
    m = with_spectrum(log_spaced(9, 20.0), dtype=dtype)
    assert torch.equal(polar(m), polar(m.double()).to(dtype))
    source, target = tables(30, 5, 5, dtype=dtype)
    assert torch.equal(procrustes(source, target), procrustes(source.double(), target.double()).to(dtype))


def test_a_reflection_stays_one():
    m = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
    assert torch.equal(polar(m), torch.diag(torch.tensor([1.0, 1.0, -1.0])))


# Derivatives


SPECTRA = {
    "apart": [3.0, 2.0, 1.0],
    "two equal": [2.0, 2.0, 0.5],
    "all equal": [1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gradcheck_of_polar(spectrum):
    m = with_spectrum(torch.tensor(SPECTRA[spectrum]), dtype=DOUBLE).requires_grad_()
    assert gradcheck(polar, m) and gradgradcheck(polar, m)


def test_gradcheck_of_the_identity():
    assert gradcheck(polar, torch.eye(3, dtype=DOUBLE).requires_grad_())


@pytest.mark.parametrize(("D", "E"), [(3, 3), (2, 4), (4, 2)])
def test_gradcheck_of_procrustes(D, E):
    leaves = [t.requires_grad_() for t in tables(6, D, E)]
    assert gradcheck(procrustes, leaves) and gradgradcheck(procrustes, leaves, fast_mode=True)


def test_the_tangent_solves_a_sylvester_equation():
    """W X, with X skew and H X + X H = W^T G - G^T W."""
    m, g = with_spectrum(log_spaced(5, 30.0), dtype=DOUBLE), orthogonal(5, 5, seed=9)
    w, tangent = torch.func.jvp(polar, (m,), (g,))
    h, x = w.mT @ m, w.mT @ tangent
    assert near(x, -x.mT) and near(h @ x + x @ h, w.mT @ g - g.mT @ w)


@pytest.mark.parametrize("rows", [4, 6])
def test_the_least_divisor_is_that_of_the_worst_direction(rows):
    s = torch.tensor([3.0, 2.0, 1.0, 0.01], dtype=DOUBLE)
    jacobian = torch.func.jacrev(polar)(with_spectrum(s, rows, dtype=DOUBLE)).reshape(4 * rows, 4 * rows)
    norm = torch.linalg.matrix_norm(jacobian, 2)
    assert near(norm * least_divisor(s, rows), torch.ones((), dtype=DOUBLE), 1e-9)


def test_derivatives_of_a_singular_matrix_are_nan_and_those_beside_it_are_not():
    m = torch.stack([torch.eye(3, dtype=DOUBLE), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE))])
    m.requires_grad_()
    w = polar(m)
    assert near(w[1] @ w[1].mT, torch.eye(3, dtype=DOUBLE))
    (gradient,) = torch.autograd.grad(w.sum(), m)
    assert gradient[0].isfinite().all() and gradient[1].isnan().all()


def test_is_singular_when_the_rounding_of_entries_could_make_it_so():
    s = torch.tensor([[1.0, 1.0], [1.0, 2e-7], [1.0, 1e-7], [0.0, 0.0], [1e30, 1e25]], dtype=DOUBLE)
    shape = torch.Size([2, 2])
    assert is_singular(s, shape, torch.float32).tolist() == [False, False, True, True, False]
    assert is_singular(s, shape, torch.bfloat16).tolist() == [False, False, True, True, False]
    assert is_singular(s, shape, DOUBLE).tolist() == [False, False, False, True, False]
