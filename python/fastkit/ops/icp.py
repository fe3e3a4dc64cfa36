"""One epoch of iterative closest points between two tables, for many restarts that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkit import _native, reference
from fastkit._autograd import without_autocast
from fastkit._dispatch import Impl, InPyTorch, Kernels, choose
from fastkit.ops import icp_products
from fastkit.ops._checks import check_one_device, check_tensors
from fastkit.ops.icp_checks import DTYPES, check_arguments, check_options, check_pairs, refuse_transforms
from fastkit.reference import ICPEpoch

KERNELS: Kernels = InPyTorch(cpu=DTYPES, cuda=DTYPES)
_COLUMNS = 64  # of csrc/cuda/icp.cu at most; wider tables go through products

if _native.REASON is None:
    _fwd = torch.ops.fastkit.icp_epoch_fwd.default

    @torch.library.register_fake("fastkit::icp_epoch_fwd")
    def _(
        source: Tensor, target: Tensor, w_xy: Tensor, w_yx: Tensor, seeds: Tensor, *options: object
    ) -> ICPEpoch:
        check_one_device("icp_epoch", source, target, w_xy, w_yx, seeds)
        return _empty(source, target, w_xy)


def icp_epoch(
    source: Tensor,  # (n, D)
    target: Tensor,  # (m, D)
    w_xy: Tensor,  # (R, D, D)
    w_yx: Tensor,  # (R, D, D)
    seeds: Tensor,  # (R,)
    *,
    epoch: int,
    batch_size: int = 128,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    cycle_weight: float = 1e-2,
    pairs: tuple[Tensor, Tensor] | None = None,  # (R, n), (R, m)
    mutual_only: bool = False,
    impl: Impl | None = None,
) -> ICPEpoch:  # w_xy, w_yx (R, D, D), nearest_target (R, n), nearest_source (R, m), cost (R,), mutual (R,)
    """One epoch of iterative closest points, with a map each way and a cycle, for R restarts at once.

    First the pairs, each row with the nearest mapped row of the other table, the lower index first::

        a(i) = argmin_j |x_i - W_yx y_j|^2              b(j) = argmin_i |y_j - W_xy x_i|^2
        cost = min(mean_i |x_i - W_yx y_a(i)|^2,  mean_j |y_j - W_xy x_b(j)|^2)

    Then steps of Adam on both maps, each on a batch of B rows x and B rows y, to lessen ::

        ( |y_a - W_xy x|^2 + |x_b - W_yx y|^2
          + cycle_weight (|W_yx W_xy x - x|^2 + |W_xy W_yx y - y|^2) ) / 2,    means over the batch

    Equivalent to ``fastkit.reference.icp_epoch``. A restart's result has the same bits whatever other
    restarts are in the call.

    Args:
        source: rows x, ``(n, D)``, n and D at least 1, float32 or float64; any strides.
        target: rows y, ``(m, D)``, in the dtype of source.
        w_xy: the maps of source to target, ``(R, D, D)``, in the dtype of source: ``x @ w_xy[r].T`` is the
            mapped table. To begin with, the identity; an orthogonal diagonal of signs is, bit for bit, the
            same as the identity and a target whose columns have these signs.
        w_yx: the maps of target to source, likewise.
        seeds: ``(R,)`` int64, any; with ``epoch`` it decides the order in which rows are visited.
        epoch: counts from 0, below 2^32.
        batch_size: B, at most n and m, unless ``mutual_only``. There are ``min(n, m) // B`` steps, and rows
            beyond them are left out.
        lr, betas, eps: of Adam, whose moments are zeros when the epoch begins.
        cycle_weight: 0 leaves the two maps apart.
        pairs: a ``(R, n)`` and b ``(R, m)``, int64, instead of the search: of an earlier epoch, or what is
            known. Default: search.
        mutual_only: only rows that are the nearest of their nearest are visited: x_i with b(a(i)) = i, y_j
            with a(b(j)) = j. With fewer than B of them, there is one step with them all; without any, none.
        impl: ``"cpu"``, ``"cuda"`` or ``"reference"`` runs exactly that or raises. Default: the kernel where
            one covers the device and dtype, else the reference; where that is for want of a kernel that
            another installation has, one warning says so. On a GPU tables of more than 64 columns, or of
            float64, go through PyTorch's products instead, restart by restart.

    Returns:
        ``ICPEpoch(w_xy, w_yx, nearest_target, nearest_source, cost, mutual)``: the maps after the steps;
        a ``(R, n)`` and b ``(R, m)``, int64, -1 where no row of the other table can be chosen; the cost
        before the steps, ``(R,)``, in the dtype of source; and of how many i b(a(i)) = i, ``(R,)`` int64.

        Where NaN or inf in a table or a map, or an overflow, makes one of the two means not finite, the cost
        is inf, and the maps are as they were. It touches no other restart. A row of a table that is not
        finite is not chosen while another is.

    Raises:
        ValueError: a shape, an option, an entry of ``pairs`` (looked at on a CPU, not under
            ``torch.compile``), or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, or the call is under a
            ``torch.func`` transform.

    Numerics: in the dtype of the tables. Pairs are ranked by ``x . k - |k|^2 / 2``, k being the mapped row,
    so one that rounding makes equal to the best, or better, may be chosen; equal rows have equal scores. The
    cost is taken from differences of the pairs, and its means in float64. Constants of Adam are float64.
    Rows are visited in ascending order of the first word of Philox4x32-10 with the seed as key and (row,
    epoch, 0 for source and 1 for target, 0) as counter: the same in every implementation.

    Support: not differentiable: what is passed is detached, and ``torch.func`` transforms are refused.
    Deterministic, whatever the number of threads. ``torch.compile(fullgraph=True)``, but not of the
    reference, which looks at values. Autocast changes nothing.

    Memory and work: of each restart ``2 n m D`` multiply-adds and a few (D, D) matrices; a step ``4 B D^2 + 8
    D^3``. The (n, m) matrix of scores is never whole.

    Source: Hoshen, Wolf, "Non-Adversarial Unsupervised Word Translation", EMNLP 2018, arXiv:1801.06126. The
    gradients in closed form, from four moments of a batch, are our derivation.

    Example:
        >>> import torch, fastkit.ops
        >>> source = torch.tensor([[3.0, 0], [0, 1], [-2, -1]])
        >>> target = source * torch.tensor([1.0, -1])  # the second axis is turned
        >>> signs = torch.tensor([[1.0, 1], [1, -1]]).diag_embed()  # two restarts
        >>> result = fastkit.ops.icp_epoch(
        ...     source, target, signs, signs, torch.arange(2), epoch=0, batch_size=3
        ... )
        >>> result.cost, result.nearest_target[1], result.mutual
        (tensor([2.6667, 0.0000]), tensor([0, 1, 2]), tensor([2, 3]))
    """
    op = "icp_epoch"
    refuse_transforms(op)
    check_tensors(op, source=source, target=target, w_xy=w_xy, w_yx=w_yx, seeds=seeds)
    check_arguments(op, source, target, w_xy, w_yx, seeds)
    rows = source.shape[0], target.shape[0]
    check_options(op, rows, epoch, batch_size, lr, betas, eps, cycle_weight, mutual_only)
    nearest = check_pairs(op, pairs, source, target, w_xy.shape[0])
    chosen = choose(op, impl, source, KERNELS)
    if source.is_meta:
        return _empty(source, target, w_xy)
    tensors = source, target, w_xy, w_yx, seeds
    with torch.no_grad(), without_autocast(source):
        if chosen == "cpu" or (chosen == "cuda" and _has_kernel(source)):
            options = (epoch, batch_size, lr, *betas, eps, cycle_weight, mutual_only)
            return ICPEpoch(*_fwd(*tensors, *nearest, *options))
        run = icp_products.icp_epoch if chosen == "cuda" else reference.icp_epoch
        return run(
            *tensors, epoch=epoch, batch_size=batch_size, lr=lr, betas=betas, eps=eps,
            cycle_weight=cycle_weight, pairs=pairs, mutual_only=mutual_only,
        )  # fmt: skip


def _has_kernel(source: Tensor) -> bool:
    """Whether the library has one for such a table on a GPU."""
    fits = source.dtype == torch.float32 and source.shape[1] <= _COLUMNS
    return fits and _native.REASON is None and bool(_native.BUILD_INFO["cuda"])


def _empty(source: Tensor, target: Tensor, w: Tensor) -> ICPEpoch:
    restarts = w.shape[0]
    return ICPEpoch(
        source.new_empty(w.shape),
        source.new_empty(w.shape),
        source.new_empty((restarts, source.shape[0]), dtype=torch.int64),
        source.new_empty((restarts, target.shape[0]), dtype=torch.int64),
        source.new_empty(restarts),
        source.new_empty(restarts, dtype=torch.int64),
    )
