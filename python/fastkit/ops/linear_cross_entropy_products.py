"""linear_cross_entropy by blocks of logits: the vendor's products, and a kernel between them.

``z = h W^T + c`` is had for some tokens and some neighbouring classes at a time, a block that a cache holds.
A kernel folds it into what a token needs of all its logits (``sums_``), or makes of it the gradient dz
(``gradient_``), of which two more products take ``dh += dz W`` and ``dW += dz^T h``. The rest is a few
numbers a token.

Backward computes the blocks again: 8 N V D operations in all. Where the loss is one number its gradient is
known up to a factor, and ``forward`` can form it at once, with all logits of some tokens at hand: 6 N V D.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkit import _native
from fastkit._autograd import without_autocast
from fastkit.ops._checks import arithmetic, check_one_device
from fastkit.ops._define import define
from fastkit.ops.linear_cross_entropy_checks import refuse_targets

_MIB = 1 << 20
_BLOCK_BYTES = 8 * _MIB  # of logits on a CPU
_BLOCK_TOKENS = 2048
_KEPT_BYTES = 125 * _MIB // 2  # of all logits of some tokens, as many as these at the least:
_KEPT_TOKENS = 128  # with fewer, adding to dW takes longer than its product
_GPU_BLOCK_BYTES = 48 * _MIB  # of logits and dz
_GPU_CLASSES = 1024  # of a block at the least: with fewer its products are slow

# What is wider than its factors is added to by addmm; older versions of PyTorch may refuse it.
_ADDS_WIDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)

if _native.REASON is None:

    @torch.library.register_fake("fastkit::linear_cross_entropy_sums_")
    @torch.library.register_fake("fastkit::linear_cross_entropy_gradient_")
    def _(*_: Any) -> None:
        pass


class Options(NamedTuple):
    """What a loss is made of, besides tensors."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    softcap: float  # 0: none
    z_loss: float


class Needs(NamedTuple):
    """Which gradients are formed."""

    input: bool
    weight: bool
    bias: bool


class _Native:
    @staticmethod
    def sums_(*args: Any) -> None:
        torch.ops.fastkit.linear_cross_entropy_sums_.default(*args)

    @staticmethod
    def gradient_(*args: Any) -> None:
        torch.ops.fastkit.linear_cross_entropy_gradient_.default(*args)


class _Call(NamedTuple):
    """n tokens, V classes, and what is done with them; numbers in the arithmetic's dtype."""

    rows: Tensor  # (n, D), in the dtype of the products
    target: Tensor  # (n,) int64
    target_weight: Tensor | None  # (n,): the class weight of the target
    token_weight: Tensor | None  # (n,)
    ignored: Tensor | None  # (n,): what does not count; None: nothing
    unknown: Tensor | None  # (n,): whose target is no class; None: nothing
    linear_weight: Tensor  # (V, D)
    linear_bias: Tensor | None  # (V,)
    class_weight: Tensor | None  # (V,)
    options: Options
    kernels: Any  # with sums_ and gradient_

    @property
    def dtype(self) -> torch.dtype:
        return arithmetic(self.linear_weight)

    def of(self, begin: int, end: int) -> _Call:
        """Of some of the tokens."""
        per_token = {name: getattr(self, name) for name in self._fields[:6]}
        return self._replace(**{name: t[begin:end] for name, t in per_token.items() if t is not None})


def forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float, softcap: float,
    z_loss: float, needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, lse (N,), and the gradients of a loss that is one number, empty unless needed."""
    options = Options(reduction, ignore_index, label_smoothing, softcap, z_loss)
    with torch.no_grad(), without_autocast(input):
        call, place = _prepare(input, linear_weight, linear_bias, target, weight, token_weight, options, impl)
        gradients: tuple[Tensor, ...] = tuple(input.new_empty(0) for _ in needs)
        if any(needs):
            losses, lse, gradients = _with_gradients(call, place, input, Needs(*needs))
        else:
            losses, lse = _finish(call, _sums(call))
        loss = _among_all(losses, place, input) if reduction == "none" else losses.sum() / _divisor(call)
        return loss, _among_all(lse, place, input), *gradients


def backward(
    g_loss: Tensor | None, g_lse: Tensor | None, lse: Tensor, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, softcap: float, z_loss: float,
    needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients, of logits that are computed again; empty unless needed."""
    options = Options(reduction, ignore_index, label_smoothing, softcap, z_loss)
    with torch.no_grad(), without_autocast(input):  # create_graph asks for a graph here too
        args = (input, linear_weight, linear_bias, target, weight, token_weight, options, impl)
        call, place = _prepare(*args, checks=False)
        if place is not None:
            lse = lse[place]
            g_loss = g_loss[place] if g_loss is not None and g_loss.dim() else g_loss
            g_lse = None if g_lse is None else g_lse[place]
        scale = lse.new_zeros(()) if g_loss is None else g_loss.to(call.dtype)
        if reduction != "none":
            scale = scale / _divisor(call)
        coefficients = _coefficients(call, lse, scale.expand_as(lse), g_lse)
        unit = _unit(coefficients) if call.rows.dtype == torch.float16 else None
        if unit is not None:
            coefficients = coefficients / unit
        gradients = _Gradients(call, Needs(*needs), unit)
        tokens, classes = _block_shape(call)
        block = call.rows.new_empty(tokens * classes, dtype=call.dtype)
        for first, last in _spans(len(linear_weight), classes):
            for begin, end in _spans(len(call.rows), tokens):
                part = call.of(begin, end)
                logits = _logits(part, block, first, last)
                gradients.add(part, logits, lse[begin:end], coefficients[begin:end], begin, first)
        return gradients.finish(place, input)


def _prepare(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, options: Options, impl: str, *, checks: bool = True,
) -> tuple[_Call, Tensor | None]:  # fmt: skip
    """The call, and the places of its tokens among all; None where they are all."""
    dtype, vocabulary = arithmetic(input), len(linear_weight)
    target = target.long().contiguous()  # beside int32 an ignore_index would wrap
    ignored = target == options.ignore_index
    unknown = place = None
    if input.is_cuda:  # whose values are not looked at
        unknown = ~ignored & ((target < 0) | (target >= vocabulary))
        rows = input.masked_fill(ignored.unsqueeze(1), 0.0)  # NaN of an ignored token stays there
    else:
        if checks:
            refuse_targets("linear_cross_entropy", target, vocabulary, options.ignore_index)
        rows = input.to(dtype)
        if bool(ignored.any()):
            place = (~ignored).nonzero()[:, 0]
            rows, target = rows[place], target[place]
            token_weight = None if token_weight is None else token_weight[place]
        ignored = None
    bias, class_weight, of_tokens = (
        None if t is None else t.to(dtype).contiguous() for t in (linear_bias, weight, token_weight)
    )
    target_weight = None if class_weight is None else class_weight[target.clamp(0, vocabulary - 1)]
    kernels = importlib.import_module("fastkit.triton.linear_cross_entropy") if impl == "triton" else _Native
    call = _Call(
        rows, target, target_weight, of_tokens, ignored, unknown, linear_weight, bias, class_weight, options,
        kernels,
    )  # fmt: skip
    return call, place


def _among_all(values: Tensor, place: Tensor | None, input: Tensor) -> Tensor:
    """Of all tokens, where those that were left out have 0."""
    if place is None:
        return values
    return values.new_zeros((len(input), *values.shape[1:])).index_copy_(0, place, values)


# --- blocks -------------------------------------------------------------------------------------------------


def _block_shape(call: _Call) -> tuple[int, int]:
    """Tokens and classes of a block: on a GPU all tokens, so that dW is one product for each class."""
    tokens, vocabulary = max(len(call.rows), 1), len(call.linear_weight)
    if call.rows.is_cuda:
        classes = _GPU_BLOCK_BYTES // ((call.dtype.itemsize + call.rows.dtype.itemsize) * tokens)
        return tokens, min(max(classes // 128 * 128, _GPU_CLASSES), vocabulary)
    tokens = min(tokens, _BLOCK_TOKENS)
    return tokens, min(_BLOCK_BYTES // (call.dtype.itemsize * tokens), vocabulary)


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, step):
        yield begin, min(begin + step, total)


def _product(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> None:
    """Half precision is multiplied as it is, and summed in float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if adds else torch.mm(a, b, out=out)
    elif not adds:
        torch.mm(a, b, out.dtype, out=out)
    elif _ADDS_WIDER:
        torch.addmm(out, a, b, out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out.dtype))


def _logits(part: _Call, room: Tensor, first: int, last: int) -> Tensor:
    """Dense, in ``room``: rows as far apart as V might meet in a cache."""
    logits = room[: len(part.rows) * (last - first)].view(len(part.rows), last - first)
    _product(part.rows, part.linear_weight[first:last].to(part.rows.dtype).T, logits)
    return logits if part.linear_bias is None else logits.add_(part.linear_bias[first:last])


def _sums(call: _Call) -> Tensor:
    state = _no_sums(call)
    tokens, classes = _block_shape(call)
    block = call.rows.new_empty(tokens * classes, dtype=call.dtype)
    for first, last in _spans(len(call.linear_weight), classes):
        for begin, end in _spans(len(call.rows), tokens):
            part = call.of(begin, end)
            _add_sums(part, state[begin:end], _logits(part, block, first, last), first)
    return state


def _no_sums(call: _Call) -> Tensor:
    """Of each token: the largest z, the sum of e^(z - that), the target's z, and the weighted sum of z."""
    state = call.rows.new_zeros((len(call.rows), 4), dtype=call.dtype)
    state[:, 0] = -torch.inf
    state[:, 2] = torch.nan
    return state


def _add_sums(part: _Call, state: Tensor, logits: Tensor, first: int) -> None:
    options = part.options
    part.kernels.sums_(
        state, logits, part.target, first, options.softcap, part.class_weight, options.label_smoothing > 0
    )


def _with_gradients(
    call: _Call, place: Tensor | None, input: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Losses, lse, and the gradients of the losses' sum or mean."""
    vocabulary, count = len(call.linear_weight), len(call.rows)
    most = max(_KEPT_BYTES // (vocabulary * call.dtype.itemsize), _KEPT_TOKENS)
    most = min(most, _BLOCK_TOKENS)
    tokens = -(-count // max(-(-count // most), 1)) or 1  # parts of one size
    kept = call.rows.new_empty(tokens * vocabulary)
    scale = 1 / _divisor(call)
    losses, lse = call.rows.new_empty(count), call.rows.new_empty(count)
    gradients = _Gradients(call, needs)
    classes = list(_spans(vocabulary, _block_shape(call)[1]))
    for begin, end in _spans(count, tokens):
        part, n = call.of(begin, end), end - begin
        state = _no_sums(part)
        blocks: list[Tensor] = []
        for first, last in classes:
            blocks.append(_logits(part, kept[n * first :], first, last))
            _add_sums(part, state, blocks[-1], first)
        losses[begin:end], lse[begin:end] = _finish(part, state)
        coefficients = _coefficients(part, lse[begin:end], scale.expand(n), None)
        for block, (first, _) in zip(blocks, classes, strict=True):
            gradients.add(part, block, lse[begin:end], coefficients, begin, first)
    return losses, lse, gradients.finish(place, input)


class _Gradients:
    """Sums of the gradients over blocks, in units of ``unit``, in the arithmetic's dtype."""

    def __init__(self, call: _Call, needs: Needs, unit: Tensor | None = None) -> None:
        self.unit = unit
        weight, rows, dtype = call.linear_weight, call.rows, call.dtype
        tokens, classes = _block_shape(call)
        self.input = rows.new_empty(rows.shape, dtype=dtype) if needs.input else None
        self.bias = weight.new_zeros(len(weight), dtype=dtype) if needs.bias else None
        make = weight.new_empty if len(rows) else weight.new_zeros
        self.weight = make(weight.shape) if needs.weight else None
        # Where the weight has half precision, the sums of one block.
        halved = weight.dtype != dtype
        self.sums = weight.new_empty((classes, weight.shape[1]), dtype=dtype) if halved else None
        # Triton's kernel does not write over what it reads.
        self.room = None if call.kernels is _Native else rows.new_empty(tokens * classes)

    def add(
        self, part: _Call, logits: Tensor, lse: Tensor, coefficients: Tensor, begin: int, first: int
    ) -> None:
        """Those of a block of logits, which may be written over; it begins at that token and that class."""
        n, last = len(logits), first + logits.shape[1]
        dz = logits if self.room is None else self.room[: logits.numel()].view(logits.shape)
        part.kernels.gradient_(
            dz, logits, part.target, lse, coefficients, first, part.options.softcap, part.class_weight
        )
        if self.input is not None:
            weight = part.linear_weight[first:last].to(dz.dtype)
            _product(dz, weight, self.input[begin : begin + n], adds=first > 0)
        if self.weight is not None:
            sums = self.weight[first:last] if self.sums is None else self.sums[: last - first]
            _product(dz.T, part.rows, sums, adds=begin > 0)
            if self.sums is not None:
                self.weight[first:last] = self._scaled(sums)
        if self.bias is not None:
            self.bias[first:last] += dz.sum(0, dtype=self.bias.dtype)

    def finish(self, place: Tensor | None, input: Tensor) -> tuple[Tensor, ...]:
        of_input = None
        if self.input is not None:
            of_input = _among_all(self._scaled(self.input), place, input).to(input.dtype)
        of_bias = None if self.bias is None else self._scaled(self.bias)
        # Empty ones of their own: an op may return no tensor twice.
        return tuple(input.new_empty(0) if t is None else t for t in (of_input, self.weight, of_bias))

    def _scaled(self, sums: Tensor) -> Tensor:
        return sums if self.unit is None else sums * self.unit


# --- a few numbers a token ----------------------------------------------------------------------------------


def _divisor(call: _Call) -> Tensor:
    """What the sum of the losses is divided by."""
    if call.options.reduction != "mean":
        return call.rows.new_ones((), dtype=call.dtype)
    if call.target_weight is None:
        counted = call.target.new_tensor(len(call.target)) if call.ignored is None else (~call.ignored).sum()
        return counted.to(call.dtype)
    return _counted(call, call.target_weight).sum()


def _counted(call: _Call, values: Tensor) -> Tensor:
    """0 for an ignored token."""
    return values if call.ignored is None else values.masked_fill(call.ignored, 0.0)


def _shares(call: _Call) -> tuple[Tensor | float, float, Tensor | float]:
    """What of the loss is the target's and each class's, and the classes' weights in all."""
    options, vocabulary = call.options, len(call.linear_weight)
    of_target = 1.0 if call.target_weight is None else call.target_weight
    total = float(vocabulary) if call.class_weight is None else call.class_weight.sum()
    return (1 - options.label_smoothing) * of_target, options.label_smoothing / vocabulary, total


def _finish(call: _Call, state: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and lse, of the sums over all classes."""
    largest, exponentials, of_target, weighted = state.unbind(1)
    of_the_target, of_each, total = _shares(call)
    lse = largest + exponentials.log()
    losses = of_the_target * (lse - of_target)
    if of_each:
        losses = losses + of_each * (total * lse - weighted)
    if call.options.z_loss:
        losses = losses + call.options.z_loss * lse.square()
    if call.token_weight is not None:
        losses = losses * call.token_weight
    if call.unknown is not None:
        losses = losses.masked_fill(call.unknown, torch.nan)
    return _counted(call, losses), _counted(call, lse)


def _coefficients(call: _Call, lse: Tensor, scale: Tensor, g_lse: Tensor | None) -> Tensor:
    """(n, 3): a, b, c of ``dz = a p - b [class is the target] - c class_weight``.

    scale: the gradient to each loss.
    """
    if call.token_weight is not None:
        scale = scale * call.token_weight
    if call.unknown is not None:
        scale = scale.masked_fill(call.unknown, torch.nan)
    of_the_target, of_each, total = _shares(call)
    of_p = scale * (of_the_target + of_each * total)
    if call.options.z_loss:  # else lse = inf would make NaN of every class
        of_p = of_p + scale * (2 * call.options.z_loss * lse)
    if g_lse is not None:
        of_p = of_p + g_lse
    terms = [_counted(call, t) for t in (of_p, scale * of_the_target, scale * of_each)]
    return torch.stack(terms, 1)


def _unit(coefficients: Tensor) -> Tensor:
    """The power of two at the largest: what is a mean's is small, and dz in float16 would be zero."""
    largest = coefficients.abs().amax() if coefficients.numel() else coefficients.new_ones(())
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where((largest > 0) & largest.isfinite(), unit, 1.0)


def _fake_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float, softcap: float,
    z_loss: float, needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    op, others = "linear_cross_entropy", (linear_weight, linear_bias, target, weight, token_weight)
    check_one_device(op, input, *others)
    dtype = arithmetic(input)
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, input.new_empty(target.shape, dtype=dtype), *_fake_gradients(input, linear_weight, needs)


def _fake_backward(
    g_loss: Tensor | None, g_lse: Tensor | None, lse: Tensor, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, softcap: float, z_loss: float,
    needs: list[bool], impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_gradients(input, linear_weight, needs)


def _fake_gradients(input: Tensor, linear_weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    of_input, of_weight, of_bias = needs
    vocabulary = linear_weight.shape[0]  # len() would make it a constant of a graph
    return (
        input.new_empty(input.shape if of_input else 0),
        linear_weight.new_empty(linear_weight.shape if of_weight else 0),
        input.new_empty(vocabulary if of_bias else 0, dtype=arithmetic(input) if of_bias else None),
    )


_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " Tensor? token_weight, str reduction, int ignore_index, float label_smoothing, float softcap,"
    " float z_loss, bool[] needs, str impl"
)
run_forward: Callable[..., Any] = define(
    "fastkit_products",
    f"linear_cross_entropy_fwd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
)
run_backward: Callable[..., Any] = define(
    "fastkit_products",
    f"linear_cross_entropy_bwd(Tensor? g_loss, Tensor? g_lse, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)
