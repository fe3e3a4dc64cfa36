"""What polar and procrustes must be whatever the matrix: orthogonal, equivariant, the best."""

import pytest
import torch

from fastkit._dispatch import unavailable
from fastkit._threads import threads
from fastkit.ops.procrustes import KERNELS, polar, procrustes
from fastkit.testing.procrustes import orthogonal, with_spectrum

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

CONDITION = 1e3


@pytest.fixture(params=["reference", "cpu"], scope="module")
def impl(request):
    reason = unavailable(request.param, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    with threads(1):
        yield request.param


@strategies.composite
def matrices(draw):
    """Of any spectrum within the condition, with equal singular values too; in either dtype."""
    sizes = strategies.one_of(strategies.integers(1, 20), strategies.integers(60, 90))
    exponents = strategies.lists(strategies.floats(-3, 0), min_size=1, max_size=5)
    size, some = draw(sizes), draw(exponents)
    spectrum = 10.0 ** torch.tensor([0.0, *some], dtype=torch.float64)
    spectrum = spectrum[torch.arange(size) % len(spectrum)]
    dtype = draw(strategies.sampled_from([torch.float32, torch.float64]))
    return with_spectrum(spectrum, dtype=dtype, seed=draw(strategies.integers(0, 1000)))


def given(test=None, **strategy):
    """Runs ``test`` on many calls; always the same ones."""
    settings = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    return lambda test: settings(hypothesis.given(**strategy)(test))


def tolerance(m, condition=CONDITION):
    return torch.finfo(m.dtype).eps * (48 + condition / 4)


def orthogonal_like(m, seed):
    return orthogonal(*m.shape, seed=seed).to(m.dtype)


@given(m=matrices())
def test_orthogonal_and_the_rest_is_symmetric_and_positive(impl, m):
    w = polar(m, impl=impl).double()
    eps = torch.finfo(m.dtype).eps
    assert (w.mT @ w - torch.eye(len(m))).abs().max() <= 64 * eps
    assert (w @ w.mT - torch.eye(len(m))).abs().max() <= 64 * eps
    h = w.mT @ m.double()
    assert (h - h.mT).abs().max() <= 64 * eps
    assert torch.linalg.eigvalsh((h + h.mT) / 2).min() > 0
    assert (w @ h - m).abs().max() <= 64 * eps


@given(m=matrices(), seed=strategies.integers(0, 1000))
def test_turns_with_the_matrix(impl, m, seed):
    """Of Q1 M Q2 it is Q1 W Q2, and of M^T it is W^T."""
    left, right = orthogonal_like(m, seed), orthogonal_like(m, seed + 1)
    w = polar(m, impl=impl)
    assert (polar(left @ m @ right, impl=impl) - left @ w @ right).abs().max() <= 2 * tolerance(m)
    assert (polar(m.mT, impl=impl) - w.mT).abs().max() <= 2 * tolerance(m)


@given(m=matrices(), power=strategies.integers(-100, 120), factor=strategies.floats(0.1, 10))
def test_has_no_scale(impl, m, power, factor):
    """By a power of two, or a sign, not in a single bit."""
    w = polar(m, impl=impl)
    assert (polar(m * factor, impl=impl) - w).abs().max() <= 2 * tolerance(m)
    scaled, turned = polar(m * 2.0**power, impl=impl), polar(-m, impl=impl)
    if impl == "reference":  # LAPACK scales in its own way
        assert max((scaled - w).abs().max(), (turned + w).abs().max()) <= 2 * tolerance(m)
    else:
        assert torch.equal(turned, -w)
        assert torch.equal(scaled, w) or power < -90  # where digits of small entries are lost


@given(m=matrices(), seed=strategies.integers(0, 1000))
def test_no_orthogonal_matrix_is_nearer(impl, m, seed):
    """Nor has a larger trace with m, be it close by or anywhere."""
    w = polar(m, impl=impl).double()
    best = (w * m).sum()
    noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    skew = noise - noise.mT
    slack = 64 * torch.finfo(m.dtype).eps * len(m) ** 0.5 * m.double().norm()
    for other in (orthogonal(*m.shape, seed=seed), *(w @ torch.matrix_exp(h * skew) for h in (1e-3, 0.1))):
        assert (other * m).sum() <= best + slack
        assert (w - m).norm() <= (other - m).norm() + slack


@given(m=matrices())
def test_of_its_factor_it_is_the_factor(impl, m):
    w = polar(m, impl=impl)
    assert (polar(w, impl=impl) - w).abs().max() <= tolerance(m, 1.0)


@given(m=matrices())
def test_its_gradient_has_no_part_along_the_matrix_and_is_what_a_small_step_makes(impl, m):
    """Scale changes nothing; along G the change of a loss is that of two calls."""
    if m.dtype == torch.float32:
        m = m.double()
    cotangent = orthogonal(*m.shape, seed=5)
    leaf = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(polar(leaf, impl=impl), leaf, cotangent)
    assert (gradient * m).sum().abs() <= 1e-9 * CONDITION * len(m)
    direction = orthogonal(*m.shape, seed=6)
    step = 1e-6 / CONDITION
    ends = [(polar(m + h * direction, impl=impl) * cotangent).sum() for h in (step, -step)]
    change = (ends[0] - ends[1]) / (2 * step)
    assert (change - (gradient * direction).sum()).abs() <= 1e-4 * (1 + gradient.norm() * direction.norm())


@given(
    D=strategies.integers(1, 20),
    E=strategies.integers(1, 20),
    seed=strategies.integers(0, 1000),
)
def test_no_map_is_better(impl, D, E, seed):
    """Its residual, of the tables or for E < D of the map back, is the least."""
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(60, width, generator=generator, dtype=torch.float64) for width in (D, E))
    w = procrustes(source, target, impl=impl)
    x, y, w, (P, Q) = (source, target, w, (E, D)) if E >= D else (target, source, w.mT, (D, E))
    assert (w.mT @ w - torch.eye(Q)).abs().max() <= 1e-12
    residual = (x @ w.mT - y).norm()
    for other in (orthogonal(P, Q, seed=seed), torch.linalg.qr(w + 1e-3 * orthogonal(P, Q, seed=seed))[0]):
        other = other * (other * w).sum(0).sign()
        assert residual <= (x @ other.mT - y).norm() + 1e-10


@given(seed=strategies.integers(0, 1000), D=strategies.integers(2, 12))
def test_the_order_of_rows_and_a_turn_of_either_table(impl, seed, D):
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(80, D, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(80, generator=generator)
    turn = orthogonal(D, D, seed=seed)
    w = procrustes(source, target, impl=impl)
    assert (procrustes(source[order], target[order], impl=impl) - w).abs().max() <= 1e-9
    assert (procrustes(source @ turn.mT, target, impl=impl) - w @ turn.mT).abs().max() <= 1e-9
    assert (procrustes(source, target @ turn.mT, impl=impl) - turn @ w).abs().max() <= 1e-9
