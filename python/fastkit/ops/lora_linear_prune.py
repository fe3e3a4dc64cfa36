"""The pruning of a low-rank layer's A by the statistic of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkit import _native, reference
from fastkit._autograd import transforms
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops import lora_linear_triton
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.lora_linear_checks import check_pruning, check_rows, check_values, check_written

NORM_KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}
PRUNE_KERNELS: Kernels = {"cpu": FLOATING, "cuda": FLOATING}

if _native.REASON is None:
    _column_square_sums = torch.ops.fastkit.column_square_sums.default
    _prune_rows_ = torch.ops.fastkit.prune_rows_.default
    torch.library.register_fake("fastkit::column_square_sums", lora_linear_triton.fake_column_square_sums)

    @torch.library.register_fake("fastkit::prune_rows_")
    def _(matrices: list[Tensor], norms: list[Tensor], ratio: float, masks: list[Tensor]) -> None:
        pass


def column_norms(
    x: Tensor,  # (..., D)
    *,
    impl: Impl | None = None,
) -> Tensor:  # (D,)
    """The L2 norm of each column of ``x`` over all its rows, the statistic by which A is pruned.

    ::

        norm[k] = sqrt(sum over rows i of x[i, k]^2)

    Equivalent to ``x.reshape(-1, D).norm(dim=0).float()``.

    Args:
        x: activations, ``(..., D)``, float32, float64, bfloat16 or float16; any strides (columns of another
            stride than 1 are copied first), zero rows too.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that or raises. Default: the kernel
            where one covers the device and dtype (Triton has no float64), else the reference; where that is
            for want of a kernel that another installation has, one warning says so.

    Returns:
        ``(D,)`` float32, through which no gradient flows; a column with NaN or inf has a norm that is NaN or
        inf.

    Raises:
        ValueError: x is a number, or the name ``impl`` is not as above.
        TypeError: x is no dense tensor of a dtype above.
        RuntimeError: ``impl`` cannot run here.

    Numerics: squares are summed in float32, for float64 x in float64: on the CPU over 256 rows, and those
    sums in float64, so that ``|error| <= 130 eps norm / 2`` whatever the number of rows, and the number of
    threads changes no bit. The sum is rounded to float32: norms beyond 1.8e19 are inf, for float64 x too, and
    those below about 1e-19 lose precision, down to 0.

    Support: ``torch.compile(fullgraph=True)``; ``torch.func`` transforms run the reference; float32
    under autocast too; deterministic.

    Memory and work: one read of x; allocated are D numbers for every 256 rows.

    Source: Benedek, Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", Findings of EACL 2024;
    that the statistic is the L2 norm is our choice.

    Example:
        >>> import torch, fastkit.ops
        >>> fastkit.ops.column_norms(torch.tensor([[3.0, 0], [4, 1]]))
        tensor([5., 1.])
    """
    check_tensors("column_norms", x=x)
    check_rows("column_norms", x)
    chosen = choose("column_norms", impl, x, NORM_KERNELS)
    if chosen == "reference" or transforms():
        return reference.column_norms(x)
    # Of a short call each op of PyTorch's is a good part: none that does nothing.
    rows = x.detach() if x.requires_grad else x
    rows = rows if rows.dim() == 2 else rows.reshape(-1, x.shape[-1])
    square_sums = lora_linear_triton.column_square_sums if chosen == "triton" else _column_square_sums
    return square_sums(rows).sqrt_()


def prune_rows_(
    lora_a: Tensor,  # (R, D)
    input_norm: Tensor,  # (D,)
    ratio: float,
    *,
    impl: Impl | None = None,
) -> Tensor:  # (R, D)
    """Zero, in each row of ``lora_a``, a share of the entries: those with the least ``|A| input_norm``.

    ::

        score[r, k] = |A[r, k]| input_norm[k],    A[r, k] = 0 for the floor(ratio D) least of row r

    Of equal scores the lower index goes first, and a NaN is greater than any number. Equivalent to
    ``fastkit.reference.prune_rows_``: a stable ``argsort`` of each row.

    Args:
        lora_a: A, ``(R, D)``, float32, float64, bfloat16 or float16; any strides, but not expanded. It is
            written to in place. It may be a leaf that requires grad: nothing is recorded, and its version
            counts up, so that a graph which saved it before refuses to run backward.
        input_norm: ``(D,)`` float32 on the device of ``lora_a``, finite and not negative, as ``column_norms``
            gives it. On a GPU its values are not looked at: there signs do not count, and NaN is highest.
        ratio: the share of a row that is zeroed, in [0, 1); exactly ``math.floor(ratio * D)`` entries are.
        impl: ``"cpu"``, ``"cuda"`` or ``"reference"`` runs exactly that or raises. Default: the kernel where
            one covers the device, else the reference; where that is for want of a kernel that another
            installation has, one warning says so.

    Returns:
        mask, ``(R, D)`` bool: True where A is kept, as ``lora_linear`` takes it. What is kept is untouched.

    Raises:
        ValueError: a shape, ``ratio``, the strides of ``lora_a`` or the name ``impl`` are not as above.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, or, on a CPU, a value of
            ``input_norm`` is not as above; nothing has been written then.

    Numerics: a score is one product in float32, for float64 A in float64; half precision is raised first.
    All implementations agree bit for bit.

    Support: not differentiable; ``torch.compile(fullgraph=True)``; ``torch.func`` transforms run the
    reference; deterministic.

    Memory and work: reads and writes A once; no sort. The threshold of a row is bisected in passes over its
    scores, which stay in the caches: a comparison an entry in each of 32 passes (float64: 64) at most, about
    15 for random scores. Allocated are the mask and, on the CPU, the scores of one row for each thread.

    Source: Benedek, Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", Findings of EACL 2024;
    our choice are the score, which is that of Sun et al., "A Simple and Effective Pruning Approach for Large
    Language Models" (Wanda), ICLR 2024, the comparison within rows, and the order of ties.

    Example:
        >>> import torch, fastkit.ops
        >>> a = torch.tensor([[1.0, -3, 2, 2]])
        >>> fastkit.ops.prune_rows_(a, torch.tensor([9.0, 1, 1, 1]), 0.5)
        tensor([[ True,  True, False, False]])
        >>> a
        tensor([[ 1., -3.,  0.,  0.]])
    """
    return _prune("prune_rows_", [lora_a], [input_norm], ratio, impl)[0]


def prune_rows_grouped_(
    lora_as: Sequence[Tensor],  # each (R, D), of any R and D
    input_norms: Sequence[Tensor],  # each (D,)
    ratio: float,
    *,
    impl: Impl | None = None,
) -> list[Tensor]:  # each (R, D)
    """``prune_rows_`` of many matrices in one call: threads, or the warps of a launch, share all their rows.

    Args:
        lora_as: the matrices, as of ``prune_rows_``: of any shapes and dtypes, on one device. Each is listed
            once. Views of one tensor may be listed that have no entry in common; where other matrices, or
            norms, overlap, which values their common entries have in the end is not specified.
        input_norms: one for each. Several matrices may have the same, as those do that read the same input.
        ratio, impl: as of ``prune_rows_``.

    Returns:
        The masks, one for each; of an empty list, an empty list.

    Raises:
        As ``prune_rows_``; ValueError too where the lists differ in length, or two matrices begin at the same
        address (which is not looked at while compiling).

    Numerics, Support, Source: as ``prune_rows_``; the masks are those of single calls, bit for bit.

    Memory and work: as of the single calls. On a GPU one launch for every 500 matrices of a dtype, and
    nothing is copied to it, so that a CUDA graph can capture the call.

    Example:
        >>> import torch, fastkit.ops
        >>> norm, query, value = torch.ones(3), torch.tensor([[1.0, 2, 3]]), torch.tensor([[3.0, 2, 1]])
        >>> fastkit.ops.prune_rows_grouped_([query, value], [norm, norm], 0.4)
        [tensor([[False,  True,  True]]), tensor([[ True,  True, False]])]
    """
    op = "prune_rows_grouped_"
    for name, value in (("lora_as", lora_as), ("input_norms", input_norms)):
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(value).__name__}")
    return _prune(op, list(lora_as), list(input_norms), ratio, impl)


def _prune(
    op: str, matrices: list[Tensor], norms: list[Tensor], ratio: float, impl: Impl | None
) -> list[Tensor]:
    check_pruning(op, matrices, norms, ratio)
    check_written(op, matrices)
    if not matrices:
        return []
    if choose(op, impl, matrices[0], PRUNE_KERNELS) == "reference" or transforms():
        check_values(norms)
        return reference.prune_rows_grouped_(matrices, norms, ratio)
    masks = [torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device) for matrix in matrices]
    with torch.no_grad():
        _prune_rows_(matrices, norms, float(ratio), masks)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([m for m in matrices if not m.is_inference()])
    return masks
