"""What polar and procrustes refuse, and in which words."""

import pytest
import torch

from fastkit import _dispatch, _native
from fastkit.ops.procrustes import KERNELS, polar, procrustes

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]

M = torch.eye(3)
SOURCE, TARGET = torch.randn(6, 3), torch.randn(6, 4)


def refusal(error, function, *args, **options):
    with pytest.raises(error) as caught:
        function(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("m", "error", "words"),
    [
        ([[1.0]], TypeError, "polar: m must be a tensor, got list"),
        (None, TypeError, "polar: m must be a tensor, got NoneType"),
        (M.to_sparse(), TypeError, "polar: m must be dense, got torch.sparse_coo; pass m.to_dense()"),
        (M.int(), TypeError, "polar: m must be floating point and real, got torch.int32; cast it to"),
        (M.bool(), TypeError, "polar: m must be floating point and real, got torch.bool; cast it to"),
        (M + 0j, TypeError, "polar: m must be real, got torch.complex64; the unitary factor is u @ vh of"),
        (M[0], ValueError, "polar: m must have shape (..., D, D), got (3,); of a rectangular"),
        (M[0, 0], ValueError, "polar: m must have shape (..., D, D), got ()"),
        (M[:2], ValueError, "polar: m must have shape (..., D, D), got (2, 3)"),
        (torch.zeros(2, 0, 1), ValueError, "polar: m must have shape (..., D, D), got (2, 0, 1)"),
    ],
    ids=range(10),
)
def test_polar(m, error, words):
    assert refusal(error, polar, m).startswith(words)


def test_what_the_error_proposes_for_a_rectangular_matrix_is_its_factor():
    m = torch.randn(5, 3)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    assert (procrustes(torch.eye(m.shape[1]), m.mT) - u @ vh).abs().max() <= 1e-5
    assert (procrustes(torch.eye(m.shape[0]), m) - (u @ vh).mT).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("source", "target", "error", "words"),
    [
        (SOURCE.numpy(), TARGET, TypeError, "procrustes: source must be a tensor, got ndarray"),
        (SOURCE, TARGET.numpy(), TypeError, "procrustes: target must be a tensor, got ndarray"),
        (SOURCE, TARGET.to_sparse(), TypeError, "procrustes: target must be dense"),
        (
            SOURCE.int(),
            TARGET,
            TypeError,
            "procrustes: source must be floating point and real, got torch.int",
        ),
        (SOURCE + 0j, TARGET, TypeError, "procrustes: source must be real, got torch.complex64"),
        (SOURCE, TARGET + 0j, TypeError, "procrustes: target must have the dtype of source, torch.float32"),
        (
            SOURCE,
            TARGET.double(),
            TypeError,
            "procrustes: target must have the dtype of source, torch.float32",
        ),
        (SOURCE.half(), TARGET, TypeError, "procrustes: target must have the dtype of source, torch.float16"),
        (
            SOURCE[None],
            TARGET,
            ValueError,
            "procrustes: source must have shape (N, D) with D >= 1, got (1, 6,",
        ),
        (
            SOURCE[:, :0],
            TARGET,
            ValueError,
            "procrustes: source must have shape (N, D) with D >= 1, got (6, 0",
        ),
        (SOURCE, TARGET[:5], ValueError, "procrustes: target must have shape (N, E) with N = 6 and E >= 1,"),
        (
            SOURCE,
            TARGET[:, :0],
            ValueError,
            "procrustes: target must have shape (N, E) with N = 6 and E >= 1",
        ),
        (SOURCE, TARGET[0], ValueError, "procrustes: target must have shape (N, E) with N = 6"),
        (SOURCE, TARGET.to("meta"), RuntimeError, "procrustes: target must be on the device of source, cpu,"),
    ],
    ids=range(14),
)
def test_procrustes(source, target, error, words):
    assert refusal(error, procrustes, source, target).startswith(words)


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(bad, impl):
    """As torch.linalg.svd has it; of the class that it raises."""
    m = torch.stack([M, M, M])
    m[1, 0, 2] = bad
    words = refusal(torch.linalg.LinAlgError, polar, m, impl=impl)
    assert words.startswith("polar: m must be finite and not overflow, got NaN or inf in 1 of 3 matrices")
    source = SOURCE.clone()
    source[0, 0] = bad
    words = refusal(torch.linalg.LinAlgError, procrustes, source, TARGET, impl=impl)
    assert words.startswith("procrustes: source and target must be finite")


def test_impl():
    assert refusal(ValueError, polar, M, impl="gpu").startswith("polar: impl must be one of reference, cpu")
    assert "this op has no such implementation" in refusal(RuntimeError, polar, M, impl="triton")
    if not torch.cuda.is_available():
        assert refusal(RuntimeError, procrustes, SOURCE, TARGET, impl="cuda").startswith(
            'procrustes: impl="cuda" cannot run: no CUDA device'
        )


def test_on_a_gpu_no_library_is_needed(monkeypatch):
    monkeypatch.setattr(_native, "REASON", "it is missing")
    assert _dispatch.unavailable("cpu", KERNELS) == "it is missing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _dispatch.unavailable("cuda", KERNELS) is None


@pytest.mark.parametrize(
    ("m", "rationals", "text"),
    [
        (torch.eye(3), [], r"shape \(B, P, Q\)"),
        (torch.zeros(1, 2, 3), [], "P >= Q >= 1"),
        (torch.zeros(1, 2, 0), [], "P >= Q >= 1"),
        (torch.zeros(1, 3, 3, dtype=torch.float16), [], "must be float32 or float64"),
        (torch.zeros(1, 3, 3, dtype=torch.int64), [], "must be float32 or float64"),
        (torch.eye(3)[None], [1.0, 2.0], "three coefficients"),
    ],
)
def test_raw_op_misused(native, m, rationals, text):
    with pytest.raises(RuntimeError, match=f"polar: .*{text}"):
        torch.ops.fastkit.polar_fwd(m, rationals, [])


def test_raw_op_on_nothing(native):
    w, orthogonal = torch.ops.fastkit.polar_fwd(torch.zeros(0, 3, 2), [], [1.0, 0.0, 0.0])
    assert w.shape == (0, 3, 2) and orthogonal.shape == (0,)


@pytest.mark.parametrize("impl", ["reference", None])
def test_the_gradient_of_a_singular_matrix(impl):
    for op, args in (
        (polar, [torch.zeros(2, 3, 3, requires_grad=True)]),
        (procrustes, [torch.zeros(6, 3, requires_grad=True), TARGET]),
    ):
        with pytest.warns(RuntimeWarning, match="singular"):
            w = op(*args, impl=impl)
        words = refusal(RuntimeError, w.sum().backward)
        assert words.startswith(f"{op.__name__}: the gradient needs matrices that are not singular, got")
        assert "detach them" in words
