"""sosfilt, a cascade of sections in one pass: against scipy, within the budget of its sections; gradients."""

import pytest
import torch

from fastkit import reference
from fastkit._threads import threads
from fastkit.ops import iir_scan, sosfilt
from fastkit.testing import Size, assert_matches_reference
from fastkit.testing.iir_scan import expected_results, make_inputs

pytestmark = pytest.mark.native

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def make_sections(count, dtype, *, radius=0.9, seed=0):
    _, a, b, _ = make_inputs(Size(1, count, 1, None), radius=radius, dtype=dtype, seed=seed)
    a, b = a[0, :, 0], b[0, :, 0] / 2
    return torch.cat([b, torch.ones(count, 1).to(a), a], -1)


SHAPES = {
    "time": lambda T: torch.randn(T),
    "rows": lambda T: torch.randn(3, T),
    "batch": lambda T: torch.randn(2, 3, T),
    "view": lambda T: torch.randn(2, T, 3).mT,
    "many": lambda T: torch.randn(2, 17, T),
    "many-view": lambda T: torch.randn(2, T, 17).mT,
    "every-other": lambda T: torch.randn(2, 5, 2 * T)[..., ::2],
    "four-axes": lambda T: torch.randn(2, 2, 3, T),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sections", range(1, 10))
def test_sosfilt_is_scipys(kernel, sections, shape):
    signal = pytest.importorskip("scipy.signal")
    torch.manual_seed(0)
    x, sos = SHAPES[shape](40).double(), make_sections(sections, torch.float64)
    y = sosfilt(x, sos, impl=kernel)
    assert y.shape == x.shape
    torch.testing.assert_close(y.cpu(), torch.from_numpy(signal.sosfilt(sos.cpu().numpy(), x.cpu().numpy())))


def test_sosfilt_of_a_long_design(impl):
    """A Butterworth filter of order 8, whose polynomial would have lost its digits."""
    signal = pytest.importorskip("scipy.signal")
    sos = signal.butter(8, [50, 200], "bandpass", fs=48_000, output="sos")
    torch.manual_seed(0)
    x = torch.randn(1, 2000 if impl == "reference" else 20_000, dtype=torch.float64)
    y = sosfilt(x, torch.tensor(sos), impl=impl)
    # scipy runs the transposed form, in the same precision: near z = 1 a rounding is 1e5 times amplified.
    expected = torch.from_numpy(signal.sosfilt(sos, x.cpu().numpy()))
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-6, atol=1e-9)


def expected_cascade(x, sos, gy):
    """y and the gradient of x, and what rounding explains: the budget of each section, filtered by the rest.

    What a section is given is stored in x's dtype, or not rounded at all.
    """
    sections = [(s[4:].view(1, 1, 1, 2), s[:3].view(1, 1, 1, 3)) for s in sos]
    zeros = torch.zeros_like(x)
    eps = torch.finfo(x.dtype).eps
    responses = [
        reference.iir_scan(torch.eye(x.shape[-1]).to(x.device).double()[None], a.double(), b.double())[
            0
        ].abs()
        for a, b in sections
    ]

    def walk(signal, budget_of):
        value, error = signal.double(), torch.zeros_like(signal, dtype=torch.float64)
        for value_of, budget, response in budget_of:
            stored = value.to(x.dtype)  # what a section is given, at most half a unit off
            error = error + eps * value.abs()
            value, error = value_of(value), error @ response + budget(stored)
        return value, error

    def forward(a, b):
        return (
            lambda v: reference.iir_scan(v, a.double(), b.double()),
            lambda v: expected_results(v, a, b, zeros)["y"].budget,
        )

    def backward(a, b):
        return (
            lambda g: reference.iir_scan(g.flip(-1), a.double(), b.double()).flip(-1),
            lambda g: expected_results(zeros, a, b, g)["gx"].budget,
        )

    y = walk(x, [(*forward(*s), r) for s, r in zip(sections, responses, strict=True)])
    back = list(zip(sections, responses, strict=True))[::-1]
    return y, walk(gy, [(*backward(*s), r.mT) for s, r in back])


# Every count of sections with every dtype, in one shape each; every shape with every one of either.
CASCADES = [
    (sections, dtype, ("batch", "view", "many", "many-view")[(i + j) % 4])
    for i, sections in enumerate([1, 2, 3, 6, 9])
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("sections", "dtype", "shape"), CASCADES, ids=str)
def test_sosfilt_is_as_precise_as_its_sections(kernel, sections, dtype, shape):
    torch.manual_seed(0)
    x = SHAPES[shape](150)
    x, gy = x.to(dtype), torch.randn_like(x).to(dtype)
    sos = make_sections(sections, torch.float32 if dtype.itemsize == 2 else dtype)
    leaf = x.detach().requires_grad_()
    y = sosfilt(leaf, sos, impl=kernel)
    gx = torch.autograd.grad(y, leaf, gy)[0]
    with threads(1):
        expected_y, expected_gx = expected_cascade(x.cpu(), sos.cpu(), gy.cpu())
    assert_matches_reference(y, *expected_y, name="y")
    assert_matches_reference(gx, *expected_gx, name="gx")
    assert y.dtype == gx.dtype == dtype


@pytest.mark.parametrize("shape", ["time", "batch", "many", "many-view"])
@pytest.mark.parametrize("sections", [1, 4, 9])
def test_gradients_of_sosfilt(impl, sections, shape):
    """Through the reference, section by section, with their a0."""
    torch.manual_seed(0)
    x, sos = SHAPES[shape](40).double(), make_sections(sections, torch.float64)
    sos = sos * torch.linspace(0.5, 2, sections).double().unsqueeze(-1)
    gy = torch.randn_like(x)

    def run(filtered):
        leaves = [t.detach().requires_grad_() for t in (x, sos)]
        y = filtered(*leaves)
        return y, *torch.autograd.grad(y, leaves, gy)

    torch.testing.assert_close(run(lambda x, sos: sosfilt(x, sos, impl=impl)), run(reference.sosfilt))


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=str)
@pytest.mark.parametrize("shape", ["batch", "many"])
def test_only_some_gradients_of_sosfilt(impl, shape, wanted):
    torch.manual_seed(0)
    inputs = SHAPES[shape](20), make_sections(3, torch.float32)

    def run(wanted):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        sosfilt(*leaves, impl=impl).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    full = run((0, 1))
    for i, grad in enumerate(run(wanted)):
        assert torch.equal(grad, full[i]) if i in wanted else grad is None


def filtered_in_turn(x, sos, impl):
    for section in (sos / sos[:, 3:4])[:, None, None, None]:
        x = iir_scan(x, section[..., 4:], section[..., :3], impl=impl)
    return x


def with_gradients(filtered, x, sos, gy, impl):
    leaves = [t.detach().requires_grad_() for t in (x, sos)]
    y = filtered(*leaves, impl=impl)
    return y.detach(), *torch.autograd.grad(y, leaves, gy)


LONG = [
    (2, (1, 1), 30_001, 1),
    (3, (2, 3), 6 * 6528 + 1, 16),  # a row a thread, in blocks of which the last is one sample
    (2, (1, 5), 6 * 8192, 16),
    (3, (2, 9), 385, 1),
    (4, (1, 17), 1024, 2),
    (1, (3, 3), 129, 1),
    (9, (3, 3), 128, 1),
    (2, (1, 2), 600_001, 1),  # written past the caches, as is the next
    (2, (1, 17), 70_000, 1),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("sections", "rows", "T", "count"), LONG, ids=str)
def test_sosfilt_is_its_sections_in_turn(native, sections, rows, T, count, layout):
    """What backward computes again it takes up from states at tiles' and at blocks' starts."""
    torch.manual_seed(0)
    x, gy = torch.randn(2, *rows, T, dtype=torch.float64)
    if layout == "channels_last":
        x, gy = (t.mT.contiguous().mT for t in (x, gy))
    sos = make_sections(sections, torch.float64)
    with threads(count):
        found, expected = (
            with_gradients(filtered, x, sos, gy, native) for filtered in (sosfilt, filtered_in_turn)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for again, first in zip(with_gradients(sosfilt, x, sos, gy, native), found, strict=True):
            assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sosfilt_of_half_precision_and_many_threads(native, dtype):
    """Rounds what it is given and what it gives, and nothing in between."""
    torch.manual_seed(0)
    x, gy = torch.randn(2, 2, 3, 20_481).to(dtype)
    sos = make_sections(3, torch.float32)
    with threads(16):
        y, gx, gsos = with_gradients(sosfilt, x, sos, gy, native)
        exact_y, exact_gx, exact_gsos = with_gradients(sosfilt, x.double(), sos.double(), gy.double(), native)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact_y, rtol=eps, atol=1e-5)
    torch.testing.assert_close(gx.double(), exact_gx, rtol=eps, atol=1e-5)
    assert (gsos - exact_gsos).abs().max() < 1e-4 * exact_gsos.abs().max()


@pytest.mark.parametrize(("sections", "rows", "T", "count"), LONG, ids=str)
def test_sosfilt_is_not_finite_where_its_sections_are_not(native, sections, rows, T, count):
    torch.manual_seed(0)
    x, gy = torch.randn(2, *rows, T)
    sos = make_sections(sections, torch.float32)
    x[..., 0, T // 2] = torch.inf
    gy[..., -1, T // 3] = torch.nan
    with threads(count):
        found, expected = (
            with_gradients(filtered, x, sos, gy, native) for filtered in (sosfilt, filtered_in_turn)
        )
    for name, actual, wanted in zip(("y", "gx", "gsos"), found, expected, strict=True):
        assert torch.equal(actual.isfinite(), wanted.isfinite()), name


def test_sosfilt_keeps_little_for_backward(native):
    """States of every 128 samples, and what it was given."""
    x, sos = torch.randn(16, 1280).requires_grad_(), make_sections(4, torch.float32).requires_grad_()
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sosfilt(x, sos, impl=native)
    assert sum(kept.values()) < 1.1 * x.nbytes


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9)], ids=str)
def test_sosfilt_of_no_rows(impl, shape):
    leaves = [t.requires_grad_() for t in (torch.zeros(shape), make_sections(2, torch.float32))]
    y = sosfilt(*leaves, impl=impl)
    assert y.shape == shape
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert not any(gradient.any() for gradient in gradients)
