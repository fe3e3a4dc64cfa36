"""One step of MTAdam: Adam for several losses, balanced per loss and per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastkit import _native, reference
from fastkit._dispatch import Impl, Kernels, check_impl, choose
from fastkit.ops._checks import FLOATING
from fastkit.ops.mtadam_checks import check_gradients, check_lists, check_numbers, check_options, check_state

KERNELS: Kernels = {"cpu": FLOATING, "cuda": FLOATING}
NonFinite = Literal["skip", "skip_term", "propagate"]

if _native.REASON is None:
    _square_sums = torch.ops.fastkit.mtadam_square_sums.default
    _update_ = torch.ops.fastkit.mtadam_update_.default

    @torch.library.register_fake("fastkit::mtadam_square_sums")
    def _(grads: list[Tensor | None], n: int) -> Tensor:
        like = next(g for g in grads if g is not None)
        return like.new_empty(n, len(grads) // n, dtype=torch.float64)

    @torch.library.register_fake("fastkit::mtadam_update_")
    def _(*args: object) -> None:
        pass

    def _update_negated_(*args: Any) -> None:
        """Where PyTorch would turn the signs of negated views, but fails at lists that may have None."""
        own = [_turned(arg) for arg in args]
        _update_(*own)
        for i in (0, 2, 3, 4, 5, 6):
            written = zip(args[i], own[i], strict=True) if isinstance(args[i], list) else [(args[i], own[i])]
            for to, of in written:
                if to is not of:
                    to.copy_(of)

    def _turned(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.resolve_neg()
        return [_turned(each) for each in value] if isinstance(value, list) else value

    _library = torch.library.Library("fastkit", "IMPL")
    _library.impl("mtadam_update_", _update_negated_, "Negative")


def mtadam_square_sums(
    grads: Sequence[Tensor | None],  # L n, term-major
    n: int,
    *,
    impl: Impl | None = None,
) -> Tensor:  # (n, L) float64
    """The square sum of the gradient of each of ``n`` tensors under each of L terms.

    ::

        square_sums[i, l] = sum of grads[l n + i]^2,    0 where there is none

    What ``mtadam_update_`` sums itself unless it is given: for gradients in pieces, whose sums are added up
    before the step, as those of sharded parameters are.

    Args:
        grads: the gradients of the first term, n of them, then those of the second, and so on; None where a
            term does not reach a tensor, but one at least is a tensor. Dense, of one dtype (float32, float64,
            bfloat16 or float16) and on one device, those of one tensor of one shape; any strides.
        n: the number of tensors.
        impl: ``"cpu"``, ``"cuda"`` or ``"reference"`` runs exactly that or raises. Default: the kernel where
            one covers the device, else the reference; where that is for want of a kernel that another
            installation has, one warning says so.

    Returns:
        ``(n, L)`` float64, through which no gradient flows.

    Raises:
        ValueError: the number of gradients is no multiple of n, or none is a tensor, or shapes differ.
        TypeError: a gradient is no dense tensor of a dtype above, or dtypes differ.
        RuntimeError: ``impl`` cannot run here, or gradients are on different devices.

    Numerics: squares are summed in float32 (float64 for float64) through at most 130 roundings, and those
    sums in float64, in a fixed order: ``|error| <= 66 eps sum``, of n float64 elements ``(80 + n / 16384)
    eps sum``, and the number of threads changes no bit. The square of a float32 gradient beyond 1.8e19 is
    inf.

    Support: not differentiable; deterministic; DTensor is refused, pass local tensors.

    Memory and work: one read of the gradients.

    Source: Malkiel, Wolf, "MTAdam: Automatic Balancing of Multiple Training Loss Terms", EMNLP 2021.

    Example:
        >>> import torch, fastkit.ops
        >>> fastkit.ops.mtadam_square_sums([torch.tensor([3.0, 4]), None], 1)
        tensor([[25.,  0.]], dtype=torch.float64)
    """
    op = "mtadam_square_sums"
    check_lists(op, grads=grads)
    grads = list(grads)
    like = check_gradients(op, grads, n)
    if choose(op, impl, like, KERNELS) == "reference":
        return reference.mtadam_square_sums(grads, n)
    with torch.no_grad():
        return _square_sums(grads, n)


def mtadam_update_(
    params: Sequence[Tensor],  # n, of any shapes
    grads: Sequence[Tensor | None],  # L n, term-major
    exp_avgs: Sequence[Tensor],  # n, each shaped like its parameter
    exp_avg_sqs: Sequence[Tensor],  # L n, term-major
    grad_norms: Tensor,  # (n, L)
    steps: Tensor,  # (n,)
    *,
    square_sums: Tensor | None = None,  # (n, L) float64
    max_exp_avg_sqs: Sequence[Tensor] | None = None,  # n
    lr: float | Tensor,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ranks: Sequence[float] | None = None,  # (L,)
    anchor: int = 0,
    alive_eps: float = 1e-10,
    max_scale: float | None = None,
    nonfinite: NonFinite = "skip",
    grad_scales: Tensor | None = None,  # (L,) float32
    found_inf: Tensor | None = None,
    impl: Impl | None = None,
) -> None:
    """One step of MTAdam, in place: Adam on n tensors under L losses, each tensor's gradients balanced.

    For each tensor, with its gradients ``g_l``, ``t`` its number of steps, this one included, and ``a`` the
    anchor, or where that is not alive the first term that is::

        n_l <- b3 n_l + (1 - b3) |g_l|,  or |g_l| where n_l was not alive   L2 norm of the whole tensor
        s_l  = rank_l min(n_a / n_l, max_scale),  or 1 where n_l is not alive (n_l <= alive_eps)
        h_l  = s_l g_l,  + weight_decay p if that is not decoupled
        m   <- b1 m + (1 - b1) sum_l h_l
        v_l <- b2 v_l + (1 - b2) h_l^2
        p   <- p - lr / (1 - b1^t) m / (sqrt(max_l v_l / (1 - b2^t)) + eps)

    With one term it is Adam. The paper keeps a first moment a term; since all take the same step, their sum
    is one moving average, ``m``.

    Args:
        params: dense tensors of one dtype, float32, float64, bfloat16 or float16, on one device.
        grads: those of the first term, one a parameter, then those of the second, and so on; dense, in the
            dtype and shape of their parameters. None: the term does not reach the tensor, which is a gradient
            of zeros, but a tensor that no term reaches is left as it is.
        exp_avgs: the first moments m, in float32, for float64 parameters in float64, as all state is. They
            must be dense; what has other strides than they is copied, so give them those of the parameters,
            as ``torch.zeros_like`` does.
        exp_avg_sqs: the second moments v, term-major, with the strides of ``exp_avgs``.
        grad_norms: n_l, dense.
        steps: t before this step.
        square_sums: as of ``mtadam_square_sums``, of the gradients as they are given; default: they are
            summed here.
        max_exp_avg_sqs: amsgrad: the largest ``max_l v_l`` so far, which takes its place in the last line.
        lr: a number, or a tensor of one, which on a GPU is read there.
        betas: b1 and b2 of the moments, b3 of the norms.
        decoupled: parameters are multiplied by ``1 - lr weight_decay`` instead (AdamW). Otherwise the decay
            is part of every term's gradient, as in the authors' code, and acts L times.
        ranks: weights of the balanced terms; default: all 1.
        anchor: the index of the term whose norm the others are given.
        max_scale: default: no limit.
        nonfinite: of a tensor with a gradient whose norm is inf or NaN: ``"skip"`` leaves the tensor and its
            state as they are, ``"skip_term"`` takes that gradient as zeros, ``"propagate"`` goes on.
        grad_scales: what the gradients of each term have been multiplied with, as by a GradScaler; they are
            divided by it as they are read.
        found_inf: a tensor of one float32; where it is not 0 nothing is written, as after a loss that is not
            finite.
        impl: ``"cpu"``, ``"cuda"`` or ``"reference"`` runs exactly that or raises. Default: the kernel where
            one covers the device, else the reference; where that is for want of a kernel that another
            installation has, one warning says so.

    Raises:
        ValueError: lists or shapes do not fit each other, or an option is out of range.
        TypeError: an argument is no dense tensor, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: norms as of ``mtadam_square_sums``; factors and bias corrections in float64, the elements in
    float32 (float64 for float64); a half-precision parameter is rounded once, to the nearest, so that steps
    below half its last digit are lost. The square of a float32 gradient beyond 1.8e19 is inf. On x86 CPUs
    subnormal numbers are zero.

    Support: not differentiable; parameters may be leaves that require grad, nothing is recorded and their
    versions count up; deterministic, whatever the number of threads; on a GPU nothing waits for the device
    and a CUDA graph can capture the call; DTensor is refused, pass local tensors and the square sums of the
    whole. At most 1024 terms.

    Memory and work: per element reads the L gradients, for their norms once more where a tensor's gradients
    do not fit the caches, reads and writes L + 1 moments and the parameter. Nothing of the size of a
    parameter is allocated, unless strides differ.

    Source: Malkiel, Wolf, "MTAdam: Automatic Balancing of Multiple Training Loss Terms", EMNLP 2021, and the
    behaviour of the authors' code. Our choice are: norms that begin with the first one that is alive,
    ``max_scale``, ``nonfinite``, decoupled decay, and one maximum for amsgrad.

    Example:
        >>> import torch, fastkit.ops
        >>> p, m, v = torch.zeros(2), torch.zeros(2), [torch.zeros(2), torch.zeros(2)]
        >>> norms, steps = torch.zeros(1, 2), torch.zeros(1)
        >>> g = [torch.tensor([3.0, 4]), torch.tensor([-40.0, 30])]  # balanced: (3, 4) and (-4, 3)
        >>> fastkit.ops.mtadam_update_([p], g, [m], v, norms, steps, lr=1.0)
        >>> p
        tensor([ 0.2500, -1.7500])
    """
    op = "mtadam_update_"
    maxima = () if max_exp_avg_sqs is None else max_exp_avg_sqs
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": maxima}
    check_lists(op, **lists, grads=grads)
    params, exp_avgs, exp_avg_sqs, maxima = map(list, lists.values())
    grads = list(grads)
    if not params:
        check_impl(op, impl)
        return
    check_state(op, params, grads, exp_avgs, exp_avg_sqs, maxima, grad_norms, steps)
    terms = grad_norms.shape[1]
    check_options(
        op, lr, betas, eps, weight_decay, decoupled, ranks, terms, anchor, alive_eps, max_scale, nonfinite
    )
    n = len(params)
    check_numbers(op, params[0], square_sums, (n, terms), grad_scales, found_inf)
    update_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        grad_norms,
        steps,
        square_sums=square_sums,
        max_exp_avg_sqs=maxima,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        ranks=ranks,
        anchor=anchor,
        alive_eps=alive_eps,
        max_scale=max_scale,
        nonfinite=nonfinite,
        grad_scales=grad_scales,
        found_inf=found_inf,
        impl=choose(op, impl, params[0], KERNELS),
    )


def update_(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_norms: Tensor,
    steps: Tensor,
    *,
    square_sums: Tensor | None,
    max_exp_avg_sqs: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    ranks: Sequence[float] | None,
    anchor: int,
    alive_eps: float,
    max_scale: float | None,
    nonfinite: NonFinite,
    grad_scales: Tensor | None,
    found_inf: Tensor | None,
    impl: Impl,
    first: int = 0,
    applies: bool = True,
) -> None:
    """``mtadam_update_`` of checked arguments; or a part of a step.

    Of gradients of the terms from ``first`` on, as many as there are, the moments are folded in, in the order
    of the terms; where ``applies``, parameters move and steps are counted, which ends the step. A term's fold
    takes the anchor from those up to it: an anchor other than 0 must be among the first part's terms.
    """
    if impl == "reference":
        reference.mtadam_update_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            grad_norms,
            steps,
            square_sums=square_sums,
            max_exp_avg_sqs=max_exp_avg_sqs or None,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            ranks=ranks,
            anchor=anchor,
            alive_eps=alive_eps,
            max_scale=max_scale,
            nonfinite=nonfinite,
            grad_scales=grad_scales,
            found_inf=found_inf,
            first=first,
            applies=applies,
        )
        return
    if not torch.compiler.is_compiling() and any(g is not None and g.is_neg() for g in grads):
        grads = [None if g is None else g.resolve_neg() for g in grads]  # as PyTorch does in other lists
    lr_tensor = None
    if isinstance(lr, Tensor):
        on_device = lr.device == params[0].device
        lr, lr_tensor = (0.0, lr.detach().double()) if on_device else (lr.item(), None)
    with torch.no_grad():
        _update_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            grad_norms,
            steps,
            square_sums,
            lr,
            lr_tensor,
            betas,
            eps,
            weight_decay,
            decoupled,
            () if ranks is None else ranks,
            anchor,
            alive_eps,
            math.inf if max_scale is None else max_scale,
            nonfinite,
            grad_scales,
            found_inf,
            first,
            applies,
        )
    if applies and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])
