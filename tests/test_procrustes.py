"""ops.polar and ops.procrustes against the SVD in float64: spectra, scales, shapes, derivatives, compile."""

import itertools
import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from fastkit._threads import threads
from fastkit.ops import procrustes_iterations as iterations
from fastkit.ops.procrustes import KERNELS as KERNELS  # for the fixtures
from fastkit.ops.procrustes import polar, procrustes
from fastkit.ops.procrustes_iterations import LAST, PRODUCTS, QUINTICS, RATIONALS, by_products, factor, on_cpu
from fastkit.testing import assert_matches_reference
from fastkit.testing.procrustes import expected_factor, log_spaced, orthogonal, with_spectrum

pytestmark = [
    pytest.mark.native,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # of torch.func
]

FLOAT, DOUBLE = torch.float32, torch.float64
# What runs a schedule; its steps, without and with those that float64 has besides; the lowest singular value.
SCHEDULES = {
    "cpu": (
        on_cpu,
        (*RATIONALS, *QUINTICS, *QUINTICS),
        (*RATIONALS, *QUINTICS, LAST, *QUINTICS, LAST),
        iterations.LOWEST_ON_CPU,
    ),
    "products": (by_products, PRODUCTS, (*PRODUCTS, LAST), iterations.LOWEST_ON_GPU),
}


def defect(w):
    """The largest element of W^T W - 1."""
    w = w.detach().double()
    return float((w.mT @ w - torch.eye(w.shape[-1], dtype=DOUBLE, device=w.device)).abs().max())


def check(m, impl=None):
    """Raises unless the factor is the SVD's within its budget, and orthogonal; which it returns."""
    w = polar(m, impl=impl)
    assert w.dtype == m.dtype and w.shape == m.shape and w.is_contiguous()
    for each, of in zip(w.reshape(-1, *m.shape[-2:]), m.reshape(-1, *m.shape[-2:]), strict=True):
        value, budget = expected_factor(of)
        over = (each.double() - value).abs() - budget
        assert over.max() <= 0, f"{over.max():.3g} over a budget of {budget.max():.3g}"
    assert defect(w) <= 64 * torch.finfo(m.dtype).eps
    return w


# Spectra


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("D", [2, 3, 17, 64, 65, 150])
def test_log_spaced(D, condition, dtype, impl):
    check(with_spectrum(log_spaced(D, condition), dtype=dtype, seed=D), impl)


def test_the_error_at_a_condition_of_a_thousand(native):
    """Which an SVD in float32 has too."""
    for D, seed in ((300, 0), (300, 1), (120, 2)):
        m = with_spectrum(log_spaced(D, 1e3), seed=seed)
        w = polar(m)
        assert (w - expected_factor(m).value).abs().max() <= 1e-5
        assert defect(w) <= 1e-5


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_sizes_around_a_square(dtype, native):
    """Of the 12 to 48 numbers that a vector's lanes make of it; and more squares than a sum has at a time."""
    for D in (11, 12, 13, 23, 24, 25, 31, 32, 33, 47, 48, 49, 97, 333):
        m = with_spectrum(log_spaced(D, 100.0), dtype=dtype, seed=D)
        w, orthogonal = on_cpu(m[None])
        value, budget = expected_factor(m)
        assert orthogonal.all() and ((w[0].double() - value).abs() <= budget).all()
    m = with_spectrum(log_spaced(30, 100.0), 70, dtype=dtype)
    w, orthogonal = on_cpu(m[None])
    value, budget = expected_factor(m)
    assert orthogonal.all() and ((w[0].double() - value).abs() <= budget).all()


def test_every_instruction_set(run_script, isa):
    """The kernels are compiled once for each; all must be right, not only the one loaded here."""
    script = f"""if True:
        import json, torch
        from fastkit.ops.procrustes_iterations import on_cpu
        from fastkit.testing.procrustes import expected_factor, log_spaced, with_spectrum
        assert json.loads(torch.ops.fastkit.build_info())["cpu_isa"] == {isa!r}
        for dtype in (torch.float32, torch.float64):
            for D in (1, 5, 6, 7, 12, 13, 16, 17, 24, 25, 32, 33, 100):
                m = with_spectrum(log_spaced(D, 100.0), dtype=dtype, seed=D)
                w, orthogonal = on_cpu(m[None])
                value, budget = expected_factor(m)
                assert orthogonal.all() and ((w[0].double() - value).abs() <= budget).all(), (dtype, D)
        """
    done = run_script(script, FASTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_any_number_of_threads_gives_the_same_bits(native):
    m = torch.stack([with_spectrum(log_spaced(150, c), seed=i) for i, c in enumerate((10.0, 1e3, 5e3))])
    w = polar(m)
    with threads(2):
        assert torch.equal(polar(m), w)
    with threads(4):
        assert torch.equal(polar(m), w) and torch.equal(polar(m[1]), w[1])


@pytest.mark.parametrize("condition", [1e6, 1e7])
def test_next_to_singular(condition, native):
    """To float32 the second is singular; to float64, and where the iteration falls back to it, neither."""
    m = with_spectrum(log_spaced(40, condition), dtype=DOUBLE)
    check(m)
    if condition == 1e6:
        m = m.float()
        w = check(m)
        assert (w - expected_factor(m).value).abs().max() <= 1e-7
    else:
        with pytest.warns(RuntimeWarning, match="polar: 1 of 1 matrices are singular"):
            w = polar(m.float())
        assert defect(w) <= 1e-6


@pytest.mark.parametrize("spectrum", [[1.0] * 5, [2.0, 2, 2, 1, 1], [3.0, 1, 1, 1, 1e-2]])
def test_equal_singular_values(spectrum, impl):
    m = with_spectrum(torch.tensor(spectrum, dtype=DOUBLE)).to(torch.get_default_device()).requires_grad_()
    w = check(m, impl)
    (gradient,) = torch.autograd.grad((w * torch.arange(5.0)).sum(), m)
    assert gradient.isfinite().all()


def test_what_is_orthogonal_stays(impl):
    for D in (1, 2, 7, 80):
        for w in (torch.eye(D), -torch.eye(D), orthogonal(D, D).float().to(torch.get_default_device())):
            assert (check(w, impl) - w).abs().max() <= 4e-6


@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e37])
def test_scale(scale, impl):
    """A power of two changes no bit; subnormal numbers are numbers, of few digits."""
    m = with_spectrum(log_spaced(6, 1e2)).to(torch.get_default_device())
    check(m * scale, impl)
    power = 2.0 ** round(math.log2(scale) / 2)
    assert torch.equal(polar(m * power, impl=impl), polar(m, impl=impl))


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_matrices_of_subnormal_numbers(dtype, native):
    """Of a size that float32 is iterated in itself."""
    m = with_spectrum(log_spaced(70, 10.0), dtype=dtype)
    w = polar(m)
    for exponent in (-12, -2, 2, 20) if dtype == FLOAT else (20,):  # of the smallest normal number
        scaled = (m.double() * 2.0**exponent * torch.finfo(dtype).tiny).to(dtype)
        check(scaled)
        if exponent == 20:
            assert (polar(scaled) - w).abs().max() <= 1e-5


def test_reflections(impl):
    for signs in itertools.product((1.0, -1.0), repeat=3):
        m = torch.diag(torch.tensor(signs)) @ (torch.eye(3) + 0.1)
        assert torch.linalg.det(check(m, impl)).sign() == math.prod(signs)


@pytest.mark.parametrize("D", [1, 2, 3])
def test_numbers_and_small_matrices(D, impl):
    m = torch.randn(200, D, D, generator=torch.Generator(torch.get_default_device()).manual_seed(D))
    w = check(m, impl)
    if D == 1:
        assert torch.equal(w, m.sign())


# Singular ones


def singular_ones(D=4):
    of_rank = with_spectrum(torch.cat([torch.ones(D - 1), torch.zeros(1)]), seed=3)
    return {"zero": torch.zeros(D, D), "ones": torch.ones(D, D), "rank D - 1": of_rank}


@pytest.mark.parametrize("name", singular_ones())
def test_singular(name, impl):
    """An orthogonal factor, W^T m symmetric and not negative, and one warning for a whole batch."""
    m = singular_ones()[name].to(torch.get_default_device())
    batch = torch.stack([torch.eye(4), m, m])
    with pytest.warns(RuntimeWarning, match="polar: 2 of 3 matrices are singular") as caught:
        w = polar(batch, impl=impl)
    assert len(caught) == 1
    assert defect(w) <= 1e-6
    h = w.mT @ batch
    assert (h - h.mT).abs().max() <= 1e-5 and torch.linalg.eigvalsh(h).min() >= -1e-5
    assert (w[0] - torch.eye(4)).abs().max() <= 1e-6


def test_nothing_singular_is_taken_for_orthogonal(native):
    """Rounding errors in the direction that is missing do not grow to a singular value of 1."""
    for (run, *_), D in itertools.product(SCHEDULES.values(), (30, 120)):
        for least in (0.0, 1e-9, 1e-7):
            spectrum = log_spaced(D, 10.0)
            spectrum[-1] = least
            assert not run(with_spectrum(spectrum)[None])[1].any()


def test_fewer_rows_than_columns_are_singular(impl):
    source, target = torch.randn(5, 8), torch.randn(5, 9)
    with pytest.warns(RuntimeWarning, match="procrustes: 1 of 1 matrices are singular"):
        w = procrustes(source, target, impl=impl)
    assert defect(w) <= 1e-6
    with pytest.warns(RuntimeWarning, match="singular"):
        assert defect(procrustes(source[:0], target[:0], impl=impl)) <= 1e-6


def test_columns_that_depend_on_each_other_are_singular(impl):
    """To the reference's product, in float64; of a product in float32 its rounding hid it in one of four."""
    for seed in range(20):
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        source = torch.randn(1000, 3, generator=generator)
        a, b = torch.randint(-8, 9, (2, 1000, 1), generator=generator).float()
        with pytest.warns(RuntimeWarning, match="procrustes: 1 of 1 matrices are singular"):
            w = procrustes(source.requires_grad_(), torch.cat([a, b, a + b], 1), impl=impl)
        with pytest.raises(RuntimeError, match="procrustes: the gradient needs matrices that are not"):
            w.sum().backward()


def test_the_gradient_of_a_singular_matrix_is_refused_and_that_beside_it_is_not(impl):
    m = torch.stack([2 * torch.eye(3), torch.ones(3, 3)]).requires_grad_()
    with pytest.warns(RuntimeWarning, match="singular"):
        w = polar(m, impl=impl)
    with pytest.raises(RuntimeError, match=r"polar: the gradient needs .* got 1 of 2"):
        torch.autograd.grad(w.sum(), m, retain_graph=True)
    if impl != "reference":  # whose derivatives are NaN there
        (gradient,) = torch.autograd.grad((w[0] * torch.arange(3.0)).sum(), m)
        assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


# Schedules


def value_of(steps, x):
    for step in steps:
        if isinstance(step, iterations.Rational):
            x = x * (step.a + step.b * x**2) / (1 + step.c * x**2)
        else:
            x = sum(c * x ** (2 * k + 1) for k, c in enumerate(step))
    return x


@pytest.mark.parametrize(("name", "error"), [("cpu", 1e-6), ("products", 1e-10)])
def test_a_schedule_takes_its_interval_to_one(name, error):
    _, steps, precise, lowest = SCHEDULES[name]
    x = torch.logspace(math.log10(lowest), 0, 200_000, dtype=DOUBLE)
    assert (value_of(steps, x) - 1).abs().max() <= error
    assert (value_of(precise, x) - 1).abs().max() <= 1e-14
    above = value_of(steps, 1 + torch.linspace(0, 0.01, 1000, dtype=DOUBLE))
    assert (above - 1).abs().max() <= 2e-5  # were the scale found a little too small


def test_one_round_does_where_singular_values_span_a_thousand():
    x = torch.logspace(math.log10(1 / 2000), 0, 100_000, dtype=DOUBLE)
    assert (value_of((*RATIONALS, *QUINTICS), x) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_never_passes_one(name):
    """What is below its interval stays below 1: and is seen not to be orthogonal."""
    _, steps, _, lowest = SCHEDULES[name]
    x = torch.logspace(-12, math.log10(lowest), 100_000, dtype=DOUBLE)
    y = value_of(steps, x)
    assert (y <= 1 + 1e-6).all() and (y > 0).all()
    assert y[0] / x[0] <= 2e5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_each_schedule(name, dtype, native):
    """A GPU's too: it is made of PyTorch's products."""
    for D, condition in ((5, 10.0), (90, 1.0), (90, 1e3), (90, 3e3), (90, 6e3)):
        m = with_spectrum(log_spaced(D, condition), dtype=dtype)
        w, orthogonal = SCHEDULES[name][0](m[None])
        value, budget = expected_factor(m)
        assert orthogonal.all() and ((w[0].double() - value).abs() <= budget).all()


def test_the_scale_is_found_for_spectra_of_any_shape(native):
    """The largest singular value, by powers of the Gram matrix and a few vectors: never far below it."""
    for D, rest in itertools.product((2, 30, 200), (0.0, 0.3, 0.6, 0.8, 0.95, 1.0)):
        spectrum = torch.full((D,), rest, dtype=DOUBLE)
        spectrum[0] = 1.0
        for m in (torch.diag(spectrum.float()), with_spectrum(spectrum, seed=D)):
            found = iterations._largest_eigenvalue((m.mT @ m)[None])
            assert 1.0 <= iterations._MARGIN * found.sqrt() <= iterations._MARGIN + 1e-5
            divided, _ = torch.ops.fastkit.polar_fwd(
                m[None], [], [1.0, 0.0, 0.0]
            )  # x -> x, of what is divided
            assert 1 / 1.2 - 1e-5 <= torch.linalg.matrix_norm(divided[0], 2) <= 1.0


# Shapes, strides, dtypes


def test_a_batch_of_any_conditioning(impl):
    conditions = [1.0, 1e2, 1e6, 10.0, 1e5, 1e3]
    m = torch.stack([with_spectrum(log_spaced(70, c), seed=i) for i, c in enumerate(conditions)])
    m = m.to(torch.get_default_device()).view(2, 3, 70, 70)
    w = check(m, impl)
    for i, j in itertools.product(range(2), range(3)):
        assert_matches_reference(w[i, j], *expected_factor(m[i, j]))


def test_strides(impl):
    m = with_spectrum(log_spaced(6, 20.0)).to(torch.get_default_device())
    wide = torch.zeros(12, 20)
    wide[::2, 3:-11] = m
    expected = check(m, impl)
    for same in (m.mT.contiguous().mT, wide[::2, 3:-11], m.flip(0).flip(0)):
        assert (check(same, impl) - expected).abs().max() <= 1e-6
    assert torch.equal(check(m.expand(3, 6, 6), impl)[1], check(m.expand(3, 6, 6), impl)[2])
    assert (check(m.mT, impl) - expected.mT).abs().max() <= 2e-6


def test_arguments_are_not_written_to(impl):
    m = with_spectrum(log_spaced(6, 1e2)).to(torch.get_default_device())
    before = m.clone()
    polar(m, impl=impl)
    polar(m.double(), impl=impl)
    procrustes(m, m, impl=impl)
    assert torch.equal(m, before)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3), (0, 2, 4, 4)])
def test_nothing(shape, impl):
    m = torch.zeros(shape, requires_grad=True)
    w = polar(m, impl=impl)
    assert w.shape == shape
    w.sum().backward()
    assert m.grad is not None and m.grad.shape == shape


def test_meta():
    m = torch.zeros(2, 3, 3, device="meta")
    assert polar(m).shape == m.shape and procrustes(m[0], m[0, :, :2]).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_stored_once(dtype, impl):
    m = with_spectrum(log_spaced(20, 50.0), dtype=dtype).to(torch.get_default_device())
    w = polar(m, impl=impl)
    assert w.dtype == dtype
    expected = polar(m.float(), impl=impl)
    assert (w - expected).abs().max() <= 2 * torch.finfo(dtype).eps
    source, target = torch.randn(30, 4).to(dtype), torch.randn(30, 4).to(dtype)
    assert procrustes(source, target, impl=impl).dtype == dtype


def test_autocast_computes_in_float32(native):
    m = with_spectrum(log_spaced(70, 1e3))
    w = polar(m)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(m), w)
        assert polar(m.bfloat16()).dtype == FLOAT
        assert polar(m.double()).dtype == DOUBLE
        leaf = m.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((polar(leaf) * m).sum(), leaf)
        source, target = m[:, :8], m[:, 8:16]
        assert torch.equal(procrustes(source, target), procrustes(source.float(), target.float()))
    leaf = m.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad((polar(leaf) * m).sum(), leaf)[0])


def test_lowered_precision_of_products_is_not_taken(native):
    backend = torch.backends.mkldnn.matmul
    m = with_spectrum(log_spaced(100, 1e3))
    w = polar(m)
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        assert torch.equal(polar(m), w)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


def test_an_inherited_precision_stays_inherited(native):
    """Backward sets it for its own products, and then back to what it was: nothing of its own."""
    backends = torch.backends
    before = backends.fp32_precision
    m = with_spectrum(log_spaced(10, 10.0)).requires_grad_()
    try:
        backends.fp32_precision = "tf32"
        polar(m).square().sum().backward()
        assert backends.mkldnn.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = before


def test_ten_runs_have_the_same_bits(impl):
    m = torch.stack([with_spectrum(log_spaced(70, c)) for c in (10.0, 1e6)]).to(torch.get_default_device())
    state = torch.random.get_rng_state()
    w = polar(m, impl=impl)
    assert all(torch.equal(polar(m, impl=impl), w) for _ in range(9))
    assert torch.equal(torch.random.get_rng_state(), state)


# procrustes


@pytest.mark.parametrize(("D", "E"), [(1, 1), (5, 5), (4, 9), (9, 4), (1, 6), (6, 1), (80, 80)])
def test_procrustes_is_the_reference(D, E, impl):
    source, target = torch.randn(300, D), torch.randn(300, E)
    w = procrustes(source, target, impl=impl)
    expected = procrustes(source.double(), target.double(), impl="reference")
    assert w.shape == (E, D) and w.is_contiguous()
    assert (w - expected).abs().max() <= 1e-4
    assert defect(w if E >= D else w.mT) <= 64 * torch.finfo(FLOAT).eps


@pytest.mark.parametrize(("D", "E"), [(6, 6), (4, 9)])
def test_procrustes_finds_the_map(D, E, impl):
    source = torch.randn(50, D)
    true = orthogonal(E, D).float().to(torch.get_default_device())
    for scale in (1e-25, 1.0, 1e25):  # whose product is no number of float32
        w = procrustes(scale * source, scale * (source @ true.mT), impl=impl)
        assert (w - true).abs().max() <= 1e-5
    with_noise = procrustes(source, source @ true.mT + 1e-3 * torch.randn(50, E), impl=impl)
    assert (with_noise - true).abs().max() <= 1e-2


# Derivatives


@pytest.mark.parametrize("spectrum", [[3.0, 2, 1], [2.0, 2, 0.5], [1.0, 1, 1]])
def test_gradcheck_of_polar(spectrum, impl):
    m = with_spectrum(torch.tensor(spectrum), dtype=DOUBLE).to(torch.get_default_device()).requires_grad_()
    function = lambda m: polar(m, impl=impl)  # noqa: E731
    assert gradcheck(function, m) and gradgradcheck(function, m)


@pytest.mark.parametrize(("D", "E"), [(3, 3), (2, 4), (4, 2)])
def test_gradcheck_of_procrustes(D, E, impl):
    leaves = [torch.randn(6, width, dtype=DOUBLE, requires_grad=True) for width in (D, E)]
    function = lambda source, target: procrustes(source, target, impl=impl)  # noqa: E731
    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_third_derivatives(impl):
    m = (torch.eye(3, dtype=DOUBLE) + 0.3 * torch.randn(2, 3, 3, dtype=DOUBLE)).requires_grad_()

    def gradient(m):
        w = polar(m, impl=impl)
        return torch.autograd.grad((w * torch.arange(3.0)).sum(), m, create_graph=True)

    assert gradgradcheck(gradient, m, fast_mode=True)


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_gradients_in_float32(condition, native):
    m = with_spectrum(log_spaced(80, condition))
    cotangent = torch.randn(80, 80)
    gradients = []
    for leaf in (m.clone().requires_grad_(), m.double().requires_grad_()):
        impl = None if leaf.dtype == FLOAT else "reference"
        gradients.append(torch.autograd.grad(polar(leaf, impl=impl), leaf, cotangent.to(leaf.dtype))[0])
    error, size = (gradients[0] - gradients[1]).abs().max(), gradients[1].abs().max()
    assert error <= 4 * condition * torch.finfo(FLOAT).eps * size + 1e-5


# Raw ops and compile


def test_opcheck(native):
    m = torch.stack([with_spectrum(log_spaced(4, 10.0), 5, seed=i) for i in range(2)])
    w, singular = factor(m, "polar")
    opcheck(torch.ops.fastkit_products.polar.default, (m, "polar"))
    source, target = torch.randn(6, 3), torch.randn(6, 2)
    opcheck(
        torch.ops.fastkit_products.polar.default,
        ((source.mT @ target)[None], "procrustes", target, source),
    )
    opcheck(torch.ops.fastkit_products.polar_tangent.default, (w, m, w, singular, "polar"))


@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_compile(condition, kernel):
    """In one graph, the SVD's branch too."""
    m = with_spectrum(log_spaced(6, condition)).to(torch.get_default_device())
    run = torch.compile(lambda m: polar(m, impl=kernel), backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, lambda m: polar(m, impl=kernel)):
        leaf = m.clone().requires_grad_()
        w = function(leaf)
        results.append((w.detach(), torch.autograd.grad((w * torch.arange(6.0)).sum(), leaf)[0]))
    for compiled, eager in zip(*results, strict=True):
        assert (compiled - eager).abs().max() <= 1e-5 * eager.abs().max()


def test_compiled_refusals(native):
    run = torch.compile(lambda m: polar(m), backend="aot_eager", fullgraph=True)
    m = torch.zeros(3, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        w = run(m)
    with pytest.raises(RuntimeError, match="polar: the gradient needs"):
        w.sum().backward()
    with pytest.raises(torch.linalg.LinAlgError, match="polar: m must be finite"):
        run(torch.full((3, 3), torch.inf, requires_grad=True))


def test_functional_transforms_run_the_reference(impl):
    m = torch.eye(3, dtype=DOUBLE) + 0.3 * torch.randn(4, 3, 3, dtype=DOUBLE)
    function = lambda m: polar(m, impl=impl)  # noqa: E731
    assert (torch.vmap(function)(m) - polar(m)).abs().max() <= 1e-12
    jacobian = torch.func.jacrev(function)(m[0])
    assert (jacobian - torch.func.jacfwd(function)(m[0])).abs().max() <= 1e-12
    leaf = m[0].clone().requires_grad_()
    (row,) = torch.autograd.grad(polar(leaf)[1, 2], leaf)
    assert (row - jacobian[1, 2]).abs().max() <= 1e-12
