"""A linear layer and the cross entropy of what it gives, without the logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms, without_autocast
from fastkit._dispatch import Impl, Kernels, choose
from fastkit.ops._checks import FLOATING, HALF, check_tensors
from fastkit.ops.linear_cross_entropy_autograd import loss_and_lse
from fastkit.ops.linear_cross_entropy_checks import check_loss, check_targets
from fastkit.ops.linear_cross_entropy_products import Options
from fastkit.reference import LinearCrossEntropy
from fastkit.reference.linear_cross_entropy import Reduction

KERNELS: Kernels = {"cpu": FLOATING, "triton": (torch.float32, *HALF)}


def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,  # (...)
    check: bool = False,
    impl: Impl | None = None,
) -> Tensor:  # () or (...)
    """The cross entropy of a linear layer's outputs, whose logits never are in memory all at once.

    With h the input, W the linear weight, t the target, cw the class weights and w the token's weight::

        z = h W^T + linear_bias,  or  softcap tanh((h W^T + linear_bias) / softcap)
        lse = log sum_v e^z[v]
        loss = w ((1 - eps) cw[t] (lse - z[t]) + eps / V sum_v cw[v] (lse - z[v]) + zeta lse^2)

    eps is ``label_smoothing``, zeta ``z_loss``. Equivalent to ``fastkit.reference.linear_cross_entropy``, and
    to ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` with the options that have a name
    there. The products are the vendor's.

    Args:
        input: ``(..., D)``, float32, float64, bfloat16 or float16; any strides, zero tokens too.
        linear_weight: ``(V, D)``, V >= 1, in the dtype of input, as of ``torch.nn.Linear``
            or of a tied embedding.
        target: ``(...)`` int64 or int32, the class of each token: in [0, V), or ``ignore_index``.
        linear_bias: ``(V,)``, in the dtype of input, or float32 for half precision. -inf leaves a class out
            (but not under a ``softcap``, which bounds it). Default: none.
        weight: ``(V,)``, a weight for each class, not negative; dtype as of linear_bias. Default: 1 each.
        reduction: ``"mean"`` divides the sum by ``sum of cw[t]`` over tokens that are not ignored (NaN of
            none), ``"sum"``, or ``"none"``, a loss for each token, 0 where it is ignored.
        ignore_index: a target that says that its token does not count: not its loss, nor its gradient, nor
            NaN that its input may have. It may be a class.
        label_smoothing: eps, in [0, 1): the share of the target that is spread over all V classes.
        softcap: a positive bound of the logits' size, as of Gemma 2. Default: none.
        z_loss: zeta >= 0, of the penalty that keeps lse near 0 (PaLM).
        token_weight: ``(...)``, a factor of each token's loss, of any sign; dtype as of linear_bias. It is
            not part of what the mean divides by. Default: 1 each.
        check: look at the targets on a GPU too, which waits for it. On a CPU they always are looked at.
        impl: ``"cpu"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or raises.
            Default: the kernel where one covers the device and dtype (Triton has no float64), else the
            reference; where that is for want of a kernel that another installation has, one warning says so.

    Returns:
        The loss, ``()``, or ``(...)`` with ``reduction="none"``, in float32 for half precision, else in the
        dtype of input.

    Raises:
        ValueError: a shape, an option or the name ``impl`` is not as above; ``weight`` or ``token_weight``
            requires grad, which none is formed for.
        TypeError: an argument is no dense tensor or number, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, a target is no class (on a
            GPU without ``check`` its loss is NaN, and so are the gradients to its input, the weight and the
            bias; nothing is read out of bounds), ``weight`` is negative or not finite on a CPU (while
            compiling that is not looked at), ``check`` is asked for while compiling, or a gradient is
            differentiated.

    Numerics: logits, their exponentials and all sums are in float32 for half precision, else in the dtype of
    input; no logit is rounded to half precision. On a GPU dz, the gradient to the logits, is rounded to it
    once, before its two products; those sum in float32. lse and z[t] come of the same product: without
    options a loss is no less than some roundings of z[t] below 0. On a CPU the share of a logit that is 87
    (float64: 708) below lse is 0, and on x86 subnormal numbers are taken as 0. Deterministic on a device;
    another number of threads or of tokens may change last bits.

    Support: first derivatives to input, linear_weight and linear_bias, also under
    ``torch.compile(fullgraph=True)``; second ones are refused; ``torch.func``, ``torch.vmap`` and forward
    mode run the reference, which has them all; autocast casts input, linear_weight and linear_bias as it does
    for ``linear``.

    Memory and work: on a CPU ``6 N V D`` operations forward and backward for float32 and float64 where the
    loss is one number: its gradients are formed in forward, if they are wanted, with all logits of some
    tokens at hand, 62.5 MiB or 128 tokens; backward scales them. Elsewhere ``8 N V D``: backward computes the
    logits again, in blocks of 8 MiB (GPU: 48 MiB of logits and dz, or 1024 classes), and float32 sums of the
    gradient to the input. A second backward through a retained graph does so too. Tokens that are ignored
    cost nothing on a CPU. Half precision is widened there: input as a whole, the weight block by block.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017, whose output
    layer it is; softcap: Gemma 2; z-loss: PaLM. The names are those of
    ``torch.nn.functional.linear_cross_entropy``.

    Example:
        >>> import torch, fastkit.ops
        >>> hidden, weight = torch.tensor([[1.0, 0], [0, 1]]), torch.eye(2)
        >>> fastkit.ops.linear_cross_entropy(hidden, weight, torch.tensor([0, -100]))
        tensor(0.3133)
    """
    return _loss(
        "linear_cross_entropy", input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
        label_smoothing, softcap, z_loss, token_weight, check, impl,
    ).loss  # fmt: skip


def linear_cross_entropy_with_lse(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,  # (...)
    check: bool = False,
    impl: Impl | None = None,
) -> LinearCrossEntropy:
    """``linear_cross_entropy``, and the logarithm of the sum of ``e^z`` of each token.

    As DPO and PPO need it: without options, ``-loss`` of ``reduction="none"`` is the logarithm of the
    target's probability, and ``lse - loss`` its logit.

    Args:
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, softcap,
        z_loss, token_weight, check, impl: as of ``linear_cross_entropy``.

    Returns:
        ``LinearCrossEntropy(loss, lse)``: lse ``(...)`` in the dtype of the loss, 0 where a token is ignored;
        gradients flow through both. The weight of a token or a class does not enter lse.

    Raises, Numerics, Support, Memory and work, Source: as ``linear_cross_entropy``; a gradient to lse makes
    backward compute the logits again.

    Example:
        >>> import torch, fastkit.ops
        >>> hidden, weight = torch.tensor([[1.0, 0]]), torch.eye(2)
        >>> fastkit.ops.linear_cross_entropy_with_lse(hidden, weight, torch.tensor([0])).lse
        tensor([1.3133])
    """
    return _loss(
        "linear_cross_entropy_with_lse", input, linear_weight, target, linear_bias, weight, reduction,
        ignore_index, label_smoothing, softcap, z_loss, token_weight, check, impl,
    )  # fmt: skip


def _loss(
    op: str, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, reduction: Reduction, ignore_index: int, label_smoothing: float,
    softcap: float | None, z_loss: float, token_weight: Tensor | None, check: bool, impl: Impl | None,
) -> LinearCrossEntropy:  # fmt: skip
    check_tensors(
        op, input=input, linear_weight=linear_weight, target=target, linear_bias_=linear_bias,
        weight_=weight, token_weight_=token_weight,
    )  # fmt: skip
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    check_loss(
        op, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
        softcap, z_loss, token_weight, check,
    )  # fmt: skip
    check_targets(op, target, linear_weight.shape[0], ignore_index, check)
    chosen = choose(op, impl, input, KERNELS)
    if chosen == "reference" or transforms():
        with without_autocast(input):
            return reference.linear_cross_entropy_with_lse(
                input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
                ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss,
                token_weight=token_weight,
            )  # fmt: skip
    options = Options(reduction, ignore_index, float(label_smoothing), float(softcap or 0), float(z_loss))
    rows, tokens = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    of_tokens = None if token_weight is None else token_weight.reshape(-1)
    loss, lse = loss_and_lse(rows, linear_weight, linear_bias, tokens, weight, of_tokens, options, chosen)
    return LinearCrossEntropy(
        loss if reduction != "none" else loss.view(target.shape), lse.view(target.shape)
    )


def _autocast(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast all in its dtype, as for ``linear``; float64 stays."""
    if not autocasts(input):
        return input, *others
    dtype = torch.get_autocast_dtype(input.device.type)
    return tuple(
        t if t is None or t.dtype not in (torch.float32, *HALF) else t.to(dtype) for t in (input, *others)
    )
