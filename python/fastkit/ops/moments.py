"""Count, mean and scatter of the rows of a matrix, and their merging."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops._checks import FLOATING, HALF, arithmetic, check_tensors
from fastkit.ops.moments_autograd import differentiable_moments
from fastkit.ops.moments_checks import check_merge, check_moments, check_values
from fastkit.reference import Moments

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}
_OF_MERGE: Kernels = {}


def moments(
    x: Tensor,  # (N, D)
    *,
    weights: Tensor | None = None,  # (N,)
    impl: Impl | None = None,
) -> Moments:  # count (), mean (D,), scatter (D, D)
    """Count, mean and scatter of the rows of x: what means, covariances and principal axes are made of.

    ::

        count   = sum_i w_i
        mean    = sum_i w_i x_i / count
        scatter = sum_i w_i (x_i - mean) (x_i - mean)^T

    Equivalent to ``fastkit.reference.moments``; without weights, ``.covariance()`` is ``torch.cov(x.T)``. For
    rows that come in chunks, merge the moments of the chunks with ``merge_moments``.

    Args:
        x: rows, ``(N, D)``, float32, float64, bfloat16 or float16; any strides, no rows too.
        weights: w, ``(N,)``, in the dtype of x, or float32 for a half-precision x; finite and not negative.
            Of a row that was seen k times, k; of a row that is left out, 0. Default: all 1.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or raises.
            Default: the kernel where one covers the device and dtype, on a GPU all but float64, else the
            reference; where that is for want of a kernel that another installation has, one warning says so.

    Returns:
        ``Moments(count, mean, scatter)``: count ``()`` float64; mean ``(D,)`` and scatter ``(D, D)`` in
        float64 for float64 x, else in float32, the scatter symmetric bit for bit. Of no rows, or of weights
        that are all zero, all three are zero, and mean nothing to a merge. ``.covariance(correction=1)`` is
        ``scatter / (count - correction)``; ``.second_moment()`` is ``scatter / count + mean mean^T``; both
        refuse a count that is too small.

    Raises:
        ValueError: a shape or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here; tensors are on different devices; or a weight is negative or
            not finite, which is looked at on a CPU, but not under function transforms, and by the reference
            not under ``torch.compile``: there the formula holds for what weights there are.

    Numerics: rows are shifted before they are multiplied, so a mean that is large beside the deviations does
    no harm. With u half the eps of the arithmetic (float32 for half precision, else x's dtype) and s the
    square roots of the scatter's diagonal, ``|error of scatter_ij| <= (N + 10) u s_i s_j``, up to terms of
    u^2, and ``|error of mean| <= u |mean| + (N + 4) u (mean of |x - mean|)``. The count is summed in
    float64. A NaN reaches the mean of its column, and the row and column of the scatter, whatever its
    weight. Subnormal numbers are flushed to zero on x86.

    Support: gradients of any order to x and weights (``torch.compile`` keeps the first only);
    ``torch.func``, ``torch.vmap`` and forward mode run the reference; ``torch.compile(fullgraph=True)``;
    autocast lowers nothing, and weights in half precision are raised to float32. Where all weights are
    zero, mean and scatter have no gradient. Deterministic on one device and number of threads. DTensor is
    refused: merge the moments of the local rows.

    Memory and work: ``N D^2`` multiply-adds, of which the CPU kernel does half, as the scatter is symmetric;
    the gradient takes another ``N D^2``. The CPU kernel reads rows of any stride where they lie, and makes no
    centred copy; it has 6 D^2 bytes (float64: 8 D^2) for each thread, and less than x for all. The reference
    and the gradient make copies of x. Saved for backward: the mean, and the arguments by reference.

    Source: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
    Recommendations", The American Statistician 37, 1983.

    Example:
        >>> import torch, fastkit.ops
        >>> result = fastkit.ops.moments(torch.tensor([[1.0, 0], [3, 2], [5, 1]]))
        >>> result.mean, result.covariance()
        (tensor([3., 1.]), tensor([[4., 1.],
                [1., 1.]]))
    """
    op = "moments"
    check_tensors(op, x=x, weights_=weights)
    if weights is not None and weights.dtype in HALF and autocasts(x):
        weights = weights.to(arithmetic(x))
    check_moments(op, x, weights)
    chosen = choose(op, impl, x, KERNELS)
    if chosen != "cpu":  # which looks at the weights as it reads them
        check_values(op, weights)
    if impl == "reference" or transforms():
        with without_autocast(x):
            return reference.moments(x, weights=weights)
    return differentiable_moments(x, weights, chosen)


def merge_moments(
    a: Moments,
    b: Moments,
    *,
    impl: Impl | None = None,
) -> Moments:  # count (), mean (D,), scatter (D, D)
    """The moments of the rows of a and of b together.

    ::

        count   = a.count + b.count,    d = b.mean - a.mean
        mean    = a.mean + (b.count / count) d
        scatter = a.scatter + b.scatter + (a.count b.count / count) d d^T

    Equivalent to ``fastkit.reference.merge_moments``, and, up to rounding, to ``moments`` of all the rows.

    Args:
        a, b: results of ``moments`` or of ``merge_moments``, of one width D and on one device; mean and
            scatter may be float32 in one and float64 in the other. Where one count is 0 the result is the
            other side, exactly.
        impl: ``"reference"`` or None; there is no other implementation.

    Returns:
        ``Moments(count, mean, scatter)``, in float64 where a or b is, else in float32.

    Raises:
        ValueError: a shape or the name ``impl`` is not as above.
        TypeError: a or b is no ``Moments`` of dense tensors with the dtypes of such a result.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: computed in float64 and rounded once, which of k merged chunks is up to k roundings of the
    scatter, and of the mean, by u |mean| each. Begin with ``moments(x[:0].double())``, which holds nothing,
    in float64, and the sum of the stream stays in float64: its chunks alone are rounded.

    Support: gradients of any order to all six tensors, where both counts are positive; where one is 0, mean
    and scatter have the gradients of the other side alone. Forward mode, ``torch.func``, ``torch.vmap`` and
    ``torch.compile(fullgraph=True)``; autocast changes nothing. Deterministic, and without a host
    synchronisation.

    Memory and work: a few passes over ``(D, D)`` in float64.

    Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
    COMPSTAT 1982.

    Example:
        >>> import torch, fastkit.ops
        >>> x = torch.tensor([[1.0], [3], [5], [7]])
        >>> a, b = fastkit.ops.moments(x[:1]), fastkit.ops.moments(x[1:])
        >>> fastkit.ops.merge_moments(a, b)
        Moments(count=tensor(4., dtype=torch.float64), mean=tensor([4.]), scatter=tensor([[20.]]))
    """
    op = "merge_moments"
    check_merge(op, a, b)
    choose(op, impl, a.mean, _OF_MERGE)
    return reference.merge_moments(a, b)
