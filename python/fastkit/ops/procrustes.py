"""The orthogonal polar factor of a matrix, and the orthogonal map that takes one table to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkit._autograd import Function, autocasts, transforms, without_autocast
from fastkit._dispatch import Impl, InPyTorch, Kernels, choose
from fastkit.ops._checks import FLOATING, arithmetic, check_tensors, widened
from fastkit.ops.procrustes_autograd import polar_factor, refuse_singular
from fastkit.ops.procrustes_checks import check_finite, check_polar, check_procrustes
from fastkit.ops.procrustes_iterations import scaled, warn_of_singular
from fastkit.reference.procrustes import cross_product, decomposed, is_singular
from fastkit.reference.procrustes import polar as reference_polar
from fastkit.reference.procrustes import procrustes as reference_procrustes

KERNELS: Kernels = InPyTorch(cpu=FLOATING, cuda=FLOATING)


def polar(m: Tensor, *, impl: Impl | None = None) -> Tensor:  # (..., D, D) -> (..., D, D)
    """The orthogonal matrix W next to m: of ``m = W H`` with H symmetric and not negative.

    Equivalent to ``u @ vh``, of ``u, _, vh = torch.linalg.svd(m)``. W may be a reflection.

    Args:
        m: ``(..., D, D)``, float32, float64, bfloat16 or float16; any strides; a batch may be empty.
        impl: ``"cpu"`` or ``"cuda"`` is the iteration, for tensors there; ``"reference"`` is the SVD in
            float64. Default: the iteration.

    Returns:
        W, like m, dense.

    Raises:
        ValueError: m is not square, or ``impl`` is none of the above.
        TypeError: m is no dense tensor, or its dtype is not as above; complex ones are refused.
        torch.linalg.LinAlgError: m has NaN or inf, as of ``torch.linalg.svd``.
        RuntimeError: ``impl`` cannot run here; or, in backward, m is singular.

    A matrix whose least singular value is at most eps of its norm (the root of the sum of squares), with the
    eps of its dtype, is singular: its factor is not unique. W is the SVD's then, and there is one warning.

    Numerics: in m's dtype, half precision in float32, with a scale of its own for each matrix; products are
    IEEE's, TF32 or not. Where singular values span more than about 6e3 the SVD runs, in float64.

    Support: gradients of any order where m is not singular, equal singular values or not
    (``torch.compile`` keeps the first only); ``torch.func``, ``torch.vmap`` and forward mode run the
    reference; ``torch.compile(fullgraph=True)``. Under autocast half precision is computed, and returned, in
    float32.

    Memory and work: on the CPU 8 D^3 multiply-adds, 12 where singular values span more than 2000, and four
    matrices; on a GPU 31 products, five matrices, and one look at values a call, after all products.
    Backward: an eigendecomposition and 6 products.

    Source: the rational steps are those of Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for
    computing the matrix polar decomposition", SIAM J. Matrix Anal. Appl. 31 (2010); polynomials that are the
    best of their degree on what interval is left: Amsel, Persson, Musco, Gower, "The Polar Express" (2025).

    Example:
        >>> import torch, fastkit.ops
        >>> fastkit.ops.polar(torch.tensor([[0.0, -3.0], [2.0, 0.0]])).round(decimals=4) + 0.0
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    op = "polar"
    check_tensors(op, m=m)
    if autocasts(m):
        (m,) = widened(m)
    check_polar(op, m)
    chosen = choose(op, impl, m, KERNELS)
    if m.numel() == 0:
        return m.clone(memory_format=torch.contiguous_format)
    with without_autocast(m):
        if chosen == "reference" or transforms():
            return _guarded(op, m, lambda: reference_polar(m), m.dtype)
        matrices = m.reshape(-1, *m.shape[-2:]).to(arithmetic(m))
        return polar_factor(matrices, op).reshape(m.shape).to(m.dtype)


def procrustes(
    source: Tensor,  # (N, D)
    target: Tensor,  # (N, E)
    *,
    impl: Impl | None = None,
) -> Tensor:  # (E, D)
    """The orthogonal map that takes ``source`` next to ``target``.

    ::

        W = argmin ||source W^T - target||    over W with orthonormal columns, E >= D

    It is the factor U V^T of ``target^T source = U S V^T``; for E = D an orthogonal matrix, reflections
    allowed, as of ``scipy.linalg.orthogonal_procrustes(source, target)[0].T``. For E < D the factor has
    orthonormal rows, and minimises ``||target W - source||``: our choice, for the norm of ``source W^T``
    depends on W there, and its minimum has no closed form. For any D and E the factor has the largest inner
    product of ``source W^T`` and ``target``.

    Args:
        source: ``(N, D)``, float32, float64, bfloat16 or float16.
        target: ``(N, E)``, its row i belonging to that of source; of the same dtype. Neither is centred.
        impl: as of ``polar``.

    Returns:
        W, ``(E, D)``, in the dtype of source: ``source @ W.T`` is the mapped table.

    Raises: as ``polar``; ValueError and TypeError for shapes and dtypes that do not fit each other.

    With ``N < min(D, E)``, or columns that depend on each other, ``target^T source`` is singular: see
    ``polar``.

    Numerics: both tables are scaled by powers of two, exactly; the product ``target^T source`` is PyTorch's,
    with its settings, in float32 for half precision; in float64 for all dtypes where the SVD runs. For the
    rest see ``polar``.

    Support: as ``polar``, to source and target.

    Memory and work: N D E multiply-adds and a copy of both tables; and ``polar`` of a ``(E, D)`` matrix.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31
    (1966).

    Example:
        >>> import torch, fastkit.ops
        >>> source, turn = torch.eye(3, 2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> fastkit.ops.procrustes(source, source @ turn.T).round(decimals=4) + 0.0
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    op = "procrustes"
    check_tensors(op, source=source, target=target)
    if autocasts(source):
        source, target = widened(source, target)
    check_procrustes(op, source, target)
    chosen = choose(op, impl, source, KERNELS)
    with without_autocast(source):
        if chosen == "reference" or transforms():
            m = cross_product(source.detach(), target.detach())
            return _guarded(op, m, lambda: reference_procrustes(source, target).contiguous(), source.dtype)
        m = _cross_product(source, target)
        tall = m.shape[0] >= m.shape[1]
        w = polar_factor((m if tall else m.mT).unsqueeze(0), op, (source.detach(), target.detach()))[0]
        return (w if tall else w.mT.contiguous()).to(source.dtype)


def _cross_product(source: Tensor, target: Tensor) -> Tensor:  # (E, D), in the dtype of the arithmetic
    """``target^T source`` but for scale. What is singular by its shape is so to the last bit."""
    dtype = arithmetic(source)
    few = source.shape[0] < min(source.shape[1], target.shape[1])
    if source.shape[0] > 0:
        source, target = scaled(source.to(dtype)), scaled(target.to(dtype))
    precise = torch.float64 if few else dtype
    return (target.to(precise).mT @ source.to(precise)).to(dtype)


def _guarded(
    op: str,
    m: Tensor,  # (..., P, Q), P >= Q
    factor: Callable[[], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The reference's factor of m, with the warning and the refusals of the iteration: it looks at values.

    ``dtype`` is that of the arguments. Where values cannot be looked at, derivatives of what is singular are
    NaN.
    """
    if transforms() or torch.compiler.is_compiling() or m.is_meta or type(m.detach()) is not Tensor:
        return factor()
    m = m.detach().double().reshape(-1, *m.shape[-2:])
    check_finite(op, m, len(m))
    singular = is_singular(decomposed(m)[1], m.shape, dtype)
    warn_of_singular(op, singular)
    w = factor()
    return _Refused.apply(w, singular, op) if w.requires_grad and bool(singular.any()) else w


class _Refused(Function):
    """The same tensor, without a gradient where a matrix is singular."""

    @staticmethod
    def forward(w: Tensor, singular: Tensor, op: str) -> Tensor:
        return w.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, singular, ctx.op = inputs
        ctx.save_for_backward(singular)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        (singular,) = ctx.saved_tensors
        refuse_singular(ctx.op, singular & (g != 0).flatten(-2).any(-1).reshape(-1))
        return g, None, None
