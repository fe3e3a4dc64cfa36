"""The raw ops of iir_scan made differentiable, to any order, forward and backward, and batched by vmap.

In operators, a filter solves ``A y = B x``: ``A y = y[t] + a1 y[t-1] + a2 y[t-2]``, ``B x = b0 x[t] + ...``,
the state being the samples before the first. Everything here follows from two facts: the tangent of y is
``A^-1 (B x' + B' x - A' y)``, one more scan, and the backward of a scan is linear in its cotangents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from fastkit import _native
from fastkit._autograd import Function, added, differentiates, forward_mode, transforms
from fastkit.ops import iir_scan_triton
from fastkit.ops._checks import check_one_device

ONE_CHUNK = 2**62  # longer than any T; a constant, where T itself would make every length a graph of its own
_TILE = 128  # samples between the states that a bank or cascade keeps for backward

if _native.REASON is None:
    _fwd = torch.ops.fastkit.iir_scan_fwd.default
    _bwd = torch.ops.fastkit.iir_scan_bwd.default
    _step_fwd = torch.ops.fastkit.iir_step_fwd.default
    _sosfilt_fwd = torch.ops.fastkit.sosfilt_fwd.default
    _sosfilt_bwd = torch.ops.fastkit.sosfilt_bwd.default

    @torch.library.register_fake("fastkit::iir_scan_fwd")
    def _(
        x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
        cu_seqlens: Tensor | None, chunk: int, carry: bool, needs_end: bool, needs_borders: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_one_device("iir_scan", x, a, b, state_y, state_x, cu_seqlens)
        batch, chunks = _batch_and_chunks(x, a, cu_seqlens, chunk)
        filters, rows = tuple(a.shape[3:-1]), (batch, x.shape[1])
        borders = (x.shape[0], x.shape[2] // _TILE + chunks + 1, *(filters or (1,)), 2, x.shape[1])
        return (
            torch.empty_like(x),
            a.new_empty((*rows, *filters, 2) if needs_end else 0),
            a.new_empty((*rows, 2) if needs_end else 0),
            a.new_empty(borders if needs_borders and x.device.type != "cuda" else 0),  # there, it walks again
        )

    @torch.library.register_fake("fastkit::iir_scan_bwd")
    def _(
        gy: Tensor, gend_y: Tensor | None, gend_x: Tensor | None, x: Tensor, y: Tensor | None,
        borders: Tensor | None, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
        cu_seqlens: Tensor | None, chunk: int, carry: bool, needs_x: bool, needs_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_one_device("iir_scan", x, gy, gend_y, gend_x, y, borders, a, b, state_y, state_x, cu_seqlens)
        _, chunks = _batch_and_chunks(x, a, cu_seqlens, chunk)
        rows = (x.shape[0], x.shape[1], chunks, *a.shape[3:-1])
        return (
            torch.empty_like(x) if needs_x else x.new_empty(0),
            a.new_empty((*rows, 2) if needs_coefficients else 0),
            a.new_empty((*rows, 3) if needs_coefficients and b is not None else 0),
            a.new_empty(0 if state_y is None else state_y.shape),
            a.new_empty(0 if state_x is None else state_x.shape),
        )

    @torch.library.register_fake("fastkit::sosfilt_fwd")
    def _(x: Tensor, a: Tensor, b: Tensor, needs_borders: bool) -> tuple[Tensor, Tensor]:
        check_one_device("iir_scan", x, a, b)
        borders = (x.shape[0], x.shape[2] // _TILE + 2, a.shape[0], 2, x.shape[1])
        return torch.empty_like(x), a.new_empty(borders if needs_borders and a.shape[0] > 1 else 0)

    @torch.library.register_fake("fastkit::sosfilt_bwd")
    def _(
        gy: Tensor, x: Tensor, borders: Tensor, a: Tensor, b: Tensor, needs_x: bool, needs_coefficients: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        check_one_device("iir_scan", x, gy, borders, a, b)
        return (
            torch.empty_like(x) if needs_x else x.new_empty(0),
            a.new_empty(a.shape if needs_coefficients else 0),
            b.new_empty(b.shape if needs_coefficients else 0),
        )

    @torch.library.register_fake("fastkit::iir_step_fwd")
    def _(
        x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor, state_x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_one_device("iir_scan", x, a, b, state_y, state_x)
        return x.new_empty(x.shape), state_y.new_empty(state_y.shape), state_x.new_empty(state_x.shape)

    def _batch_and_chunks(x: Tensor, a: Tensor, cu_seqlens: Tensor | None, chunk: int) -> tuple[int, int]:
        """How many states there are, and chunks with a gradient of their own (more than K if those share)."""
        if cu_seqlens is None:
            return x.shape[0], a.shape[2]
        sequences = cu_seqlens.shape[0] - 1
        return sequences, sequences if chunk == ONE_CHUNK else a.shape[2]


class Call(NamedTuple):
    """What of a call is not differentiated."""

    cu_seqlens: Tensor | None
    chunk: int
    carry: bool
    triton: bool = False  # else native; what is derived from a call runs in the same


def _run(
    x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int, carry: bool, triton: bool, needs_end: bool, needs_borders: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if triton:  # without states, as what is derived from such a call is
        y = iir_scan_triton.forward(x, a, b, chunk, carry)
        return y, a.new_empty(0), a.new_empty(0), a.new_empty(0)
    return _fwd(x, a, b, state_y, state_x, cu_seqlens, chunk, carry, needs_end, needs_borders)


def _run_backward(
    gy: Tensor, gend_y: Tensor | None, gend_x: Tensor | None, x: Tensor, y: Tensor | None,
    borders: Tensor | None, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int, carry: bool, triton: bool, needs_x: bool, needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if triton:
        needs = (needs_x, needs_coefficients)
        gradients = iir_scan_triton.backward(gy, x, y, a, b, chunk, carry, *needs)
        return *gradients, a.new_empty(0), a.new_empty(0)
    return _bwd(
        gy, gend_y, gend_x, x, y, borders, a, b, state_y, state_x, cu_seqlens, chunk, carry, needs_x,
        needs_coefficients,
    )  # fmt: skip


def scan(
    x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None, call: Call,
    needs_end: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and, where needed, the final state."""
    if not differentiates(x, a, b, state_y, state_x):
        return _run(x, a, b, state_y, state_x, *call, needs_end, False)[:3]
    y, end_y, end_x, _ = _apply(x, a, b, state_y, state_x, *call, needs_end)
    return y, end_y, end_x


def _apply(*args: Any) -> tuple[Tensor, ...]:
    return (_ForwardScan if forward_mode() else _Scan).apply(*args)


class _Scan(Function):
    @staticmethod
    def forward(
        x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
        cu_seqlens: Tensor | None, chunk: int, carry: bool, triton: bool, needs_end: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _run(x, a, b, state_y, state_x, cu_seqlens, chunk, carry, triton, needs_end, a.dim() == 5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, a, b, state_y, state_x, cu_seqlens, *ctx.call, ctx.needs_end = inputs
        y, _, _, borders = output
        ctx.mark_non_differentiable(borders)
        ctx.set_materialize_grads(False)
        bank = a.dim() == 5
        ctx.save_for_backward(
            x, a, b, state_y, state_x, cu_seqlens, None if bank else y, borders if bank else None
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, a, b, state_y, state_x, cu_seqlens, y, borders = ctx.saved_tensors
        gy, gend_y, gend_x, _ = grad_outputs
        needs_x, needs_a, needs_b, needs_state_y, needs_state_x = ctx.needs_input_grad[:5]
        if not ctx.needs_end:
            gend_y = gend_x = None
        gradients = scan_backward(
            torch.zeros_like(x) if gy is None else gy, gend_y, gend_x, x, y, borders, a, b, state_y, state_x,
            Call(cu_seqlens, *ctx.call), needs_x, needs_a or needs_b,
        )  # fmt: skip
        needs = (needs_x, needs_a, needs_b, needs_state_y, needs_state_x)
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *wanted, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x, a, b, state_y, state_x, cu_seqlens, *rest = args
        _refuse_packed(cu_seqlens)
        fold = _Fold(info.batch_size, x, in_dims[0])
        signals = fold.signal(x, in_dims[0])
        taps = [fold.coefficients(c, dim) for c, dim in zip((a, b), in_dims[1:3], strict=True)]
        states = [fold.signal(s, dim) for s, dim in zip((state_y, state_x), in_dims[3:5], strict=True)]
        return fold.unfold(_apply(signals, *taps, *states, None, *rest))


class _ForwardScan(_Scan):
    """With forward-mode differentiation, for which the compiler has no place."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Scan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6], output[0])
        ctx.end_x = output[2]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        x, a, b, state_y, state_x, cu_seqlens, y = ctx.saved_tensors
        call = Call(cu_seqlens, *ctx.call)
        vx, va, vb, vstate_y, vstate_x = tangents[:5]
        of_filters = []
        for a_f, b_f, state_f, va_f, vb_f, vstate_f in _filters(a, b, state_y, va, vb, vstate_y):
            y_f = y if a.dim() == 4 else scan(x, a_f, b_f, state_f, state_x, call)[0]
            v = (vx, va_f, vb_f, vstate_f, vstate_x)
            of_filters.append(_tangent(x, y_f, a_f, b_f, state_f, state_x, *v, call, ctx.needs_end))
        ty = reduce(torch.add, [t.y for t in of_filters])
        if not ctx.needs_end:
            return ty, a.new_zeros(0), a.new_zeros(0), None
        tend_y = of_filters[0].end_y if a.dim() == 4 else torch.stack([t.end_y for t in of_filters], 2)
        tend_x = _end_of(vx, vstate_x, x, a, call)
        return ty, tend_y, torch.zeros_like(ctx.end_x) if tend_x is None else tend_x, None


def scan_backward(
    gy: Tensor, gend_y: Tensor | None, gend_x: Tensor | None, x: Tensor, y: Tensor | None,
    borders: Tensor | None, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
    call: Call, needs_x: bool = True, needs_coefficients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, a, b and the state, summed over broadcast rows; themselves differentiable.

    What is not needed is empty.
    """
    args: tuple[Any, ...] = (
        gy, gend_y, gend_x, x, y, borders, a, b, state_y, state_x, *call, needs_x, needs_coefficients
    )  # fmt: skip
    again = differentiates(gy, gend_y, gend_x, x, y, a, b, state_y, state_x)
    gx, ga, gb, gstate_y, gstate_x = _apply_backward(*args) if again else _run_backward(*args)
    if needs_coefficients:
        ga = ga.sum_to_size(a.shape)
        gb = gb if b is None else gb.sum_to_size(b.shape)
    return gx, ga, gb, gstate_y, gstate_x


def _apply_backward(*args: Any) -> tuple[Tensor, ...]:
    return (_ForwardScanBackward if forward_mode() else _ScanBackward).apply(*args)


class _ScanBackward(Function):
    """gx = B' l, ga = -sum l y[t-i], gb = sum l x[t-i] per row and chunk, where l = A'^-1 gy (' transposes).

    For cotangents v of its results its value is <gy, tangent in direction v>, and so on for the final state:
    its own gradients are that tangent and the backward of the scans that the tangent is made of.
    """

    @staticmethod
    def forward(
        gy: Tensor, gend_y: Tensor | None, gend_x: Tensor | None, x: Tensor, y: Tensor | None,
        borders: Tensor | None, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
        cu_seqlens: Tensor | None, chunk: int, carry: bool, triton: bool, needs_x: bool,
        needs_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _run_backward(
            gy, gend_y, gend_x, x, y, borders, a, b, state_y, state_x, cu_seqlens, chunk, carry, triton,
            needs_x, needs_coefficients,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gy, gend_y, gend_x, x, y, _, a, b, state_y, state_x, cu_seqlens, *ctx.call, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, gend_y, gend_x, x, y, a, b, state_y, state_x, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        *saved, cu_seqlens = ctx.saved_tensors
        call = Call(cu_seqlens, *ctx.call)
        return *_pull_back(saved, call, grad_outputs), None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        gy, gend_y, gend_x, x, y, borders, a, b, state_y, state_x, cu_seqlens, *rest = args
        _refuse_packed(cu_seqlens)
        fold = _Fold(info.batch_size, x, in_dims[3])
        signals = [
            fold.signal(s, dim)
            for s, dim in zip((gy, gend_y, gend_x, x, y, borders), in_dims[:6], strict=True)
        ]
        taps = [fold.coefficients(c, dim) for c, dim in zip((a, b), in_dims[6:8], strict=True)]
        states = [fold.signal(s, dim) for s, dim in zip((state_y, state_x), in_dims[8:10], strict=True)]
        return fold.unfold(_apply_backward(*signals, *taps, *states, None, *rest))


class _ForwardScanBackward(_ScanBackward):
    """With forward-mode differentiation, which ``torch.func.hessian`` does to a gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _ScanBackward.setup_context(ctx, inputs, output)
        gy, gend_y, gend_x, x, y, _, a, b, state_y, state_x, cu_seqlens = inputs[:11]
        ctx.save_for_forward(gy, gend_y, gend_x, x, y, a, b, state_y, state_x, cu_seqlens)
        ctx.zeros = [torch.zeros_like(t) for t in output]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # What is pulled back from v is linear in v, and its transpose is the derivative: pull once more.
        given = [(i, t) for i, t in enumerate(tangents[:10]) if t is not None]
        saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
        call = Call(saved.pop(), *ctx.call)

        def pull_back(*v: Tensor) -> tuple[Tensor, ...]:
            gradients = _pull_back(saved, call, v)
            each = ((gradients[i], t) for i, t in given)
            return tuple(torch.zeros_like(t) if gradient is None else gradient for gradient, t in each)

        pull_again: Any = torch.func.vjp(pull_back, *ctx.zeros)[1]
        return pull_again(tuple(t for _, t in given))


def _pull_back(saved: Sequence[Any], call: Call, v: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of _ScanBackward's results, in direction v, to its tensors."""
    gy, gend_y, gend_x, x, y, a, b, state_y, state_x = saved
    vx, va, vb, vstate_y, vstate_x = (t if t is not None and t.numel() else None for t in v)
    of_filters = []
    for a_f, b_f, state_f, gend_f, va_f, vb_f, vstate_f in _filters(a, b, state_y, gend_y, va, vb, vstate_y):
        y_f = scan(x, a_f, b_f, state_f, state_x, call)[0] if y is None else y
        v_f = (vx, va_f, vb_f, vstate_f, vstate_x)
        g = _second_order(gy, gend_f, gend_x, x, y_f, a_f, b_f, state_f, state_x, *v_f, call)
        of_filters.append(g if y is not None else _past_y(g, x, y_f, a_f, b_f, state_f, state_x, call))
        gend_x = None  # the end of x is there once
    g = of_filters[0] if a.dim() == 4 else _of_bank(of_filters)
    return g.gy, g.gend_y, g.gend_x, g.x, g.y, None, g.a, g.b, g.state_y, g.state_x


class _Tangent(NamedTuple):
    r: Tensor  # A times it
    y: Tensor
    end_y: Tensor


def _tangent(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None,
    vx: Tensor | None, va: Tensor | None, vb: Tensor | None, vstate_y: Tensor | None, vstate_x: Tensor | None,
    call: Call, needs_end: bool,
) -> _Tangent:  # fmt: skip
    """Of one filter's y, in direction v: A^-1 (B vx + Vb x - Va y), the history being that of each signal."""
    terms = []
    if vx is not None and b is None:
        terms.append(vx)
    elif vx is not None or (vstate_x is not None and b is not None):
        terms.append(_fir(b, torch.zeros_like(x) if vx is None else vx, vstate_x, a, call))
    if va is not None:
        terms.append(-_fir(pad(va, (1, 0)), y, state_y, a, call))
    if vb is not None:
        terms.append(_fir(vb, x, state_x, a, call))
    r = sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(x)
    ty, tend_y, _ = scan(r, a, None, vstate_y, None, call, needs_end)
    return _Tangent(r, ty, tend_y)


class _Gradients(NamedTuple):
    """Of one filter's backward, to its inputs. None is zero."""

    gy: Tensor | None = None
    gend_y: Tensor | None = None
    gend_x: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    state_y: Tensor | None = None
    state_x: Tensor | None = None


def _second_order(
    gy: Tensor, gend_y: Tensor | None, gend_x: Tensor | None, x: Tensor, y: Tensor, a: Tensor,
    b: Tensor | None, state_y: Tensor | None, state_x: Tensor | None, vx: Tensor | None, va: Tensor | None,
    vb: Tensor | None, vstate_y: Tensor | None, vstate_x: Tensor | None, call: Call,
) -> _Gradients:  # fmt: skip
    """Gradients of <gy, ty> + <gend_y, tend_y> + <gend_x, tend_x>, t the tangent in direction v."""
    t = _tangent(x, y, a, b, state_y, state_x, vx, va, vb, vstate_y, vstate_x, call, gend_y is not None)
    l, ga, _, _, _ = scan_backward(gy, gend_y, None, t.r, t.y, None, a, None, vstate_y, None, call)  # noqa: E741
    g = _Gradients(gy=t.y, a=ga)
    if gend_y is not None:
        g = g._replace(gend_y=t.end_y)
    if gend_x is not None:
        g = g._replace(gend_x=_end_of(vx, vstate_x, x, a, call))
    if b is not None and (vx is not None or vstate_x is not None):
        v = torch.zeros_like(x) if vx is None else vx
        poles = _no_poles(a)
        g = g._replace(
            b=scan_backward(l, None, None, v, v, None, poles, b, None, vstate_x, call, needs_x=False)[2]
        )
    if va is not None:
        gy_y, gstate_y = _fir_transposed(pad(va, (1, 0)), l, state_y, a, call)
        g = g._replace(y=-gy_y, state_y=None if gstate_y is None else -gstate_y)
    if vb is not None:
        gx, gstate_x = _fir_transposed(vb, l, state_x, a, call)
        g = g._replace(x=gx, state_x=gstate_x)
    return g


def _no_poles(a: Tensor) -> Tensor:
    """The coefficients of A = 1, with which only b acts."""
    return a.new_zeros(1, 1, 1, 2).expand(1, 1, a.shape[2], 2)


def _fir(taps: Tensor | None, u: Tensor, state: Tensor | None, a: Tensor, call: Call) -> Tensor:
    return scan(u, _no_poles(a), taps, None, state, call)[0]


def _fir_transposed(
    taps: Tensor, g: Tensor, state: Tensor | None, a: Tensor, call: Call
) -> tuple[Tensor, Tensor | None]:
    """To the signal that ``_fir`` was given, and to its state."""
    gradients = scan_backward(
        g, None, None, g, g, None, _no_poles(a), taps, None, state, call, needs_coefficients=False
    )
    return gradients[0], None if state is None else gradients[4]


def _end_of(vx: Tensor | None, vstate_x: Tensor | None, x: Tensor, a: Tensor, call: Call) -> Tensor | None:
    """The final state of x in direction v, which depends on no coefficient."""
    if vx is None and vstate_x is None:
        return None
    v = torch.zeros_like(x) if vx is None else vx
    return scan(v, _no_poles(a), None, None, vstate_x, call, True)[2]


def _past_y(
    g: _Gradients, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor | None,
    state_x: Tensor | None, call: Call,
) -> _Gradients:  # fmt: skip
    """With the gradient to y handed on to what y was computed from."""
    if g.y is None:
        return g
    gx, ga, gb, gstate_y, gstate_x = scan_backward(g.y, None, None, x, y, None, a, b, state_y, state_x, call)
    return g._replace(
        x=added(g.x, gx), y=None, a=added(g.a, ga), b=g.b if b is None else added(g.b, gb),
        state_y=g.state_y if state_y is None else added(g.state_y, gstate_y),
        state_x=g.state_x if state_x is None else added(g.state_x, gstate_x),
    )  # fmt: skip


def _of_bank(of_filters: list[_Gradients]) -> _Gradients:
    summed = _Gradients(*(reduce(added, each) for each in zip(*of_filters, strict=True)))
    stacked = {
        name: _stack([getattr(g, name) for g in of_filters], dim)
        for name, dim in (("gend_y", 2), ("a", 3), ("b", 3), ("state_y", 2))
    }
    return summed._replace(**stacked)


def _filters(a: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """(a, *others) of each filter: its axis is the last but one of coefficients and states alike."""
    if a.dim() == 4:
        return [(a, *others)]
    absent = [None] * a.shape[3]
    return zip(*(absent if t is None else t.unbind(-2) for t in (a, *others)), strict=True)


def _stack(tensors: list[Tensor | None], dim: int) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.stack(present, dim) if present else None


class _Fold:
    """How vmap runs: its axis becomes part of the batch, and is split off the results."""

    def __init__(self, size: int, x: Tensor, dim: int | None) -> None:
        self.size = size
        self.batch = x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]

    def signal(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """(B, ...), whole for each entry."""
        if t is None:
            return None
        t = t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    def coefficients(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """(B|1, ...): shared by all entries where it can be."""
        if t is None or (dim is None and t.shape[0] == 1):
            return t
        t = t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.expand(-1, self.batch, *t.shape[2:]).flatten(0, 1)

    def unfold(self, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        split = [t.unflatten(0, (self.size, self.batch)) if t.dim() > 1 else t for t in results]
        return tuple(split), tuple(0 if t.dim() > 1 else None for t in results)


def _refuse_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise RuntimeError("iir_scan: vmap of packed sequences is not supported; put its axis into C")


# --- sosfilt and iir_step ---------------------------------------------------------------------------------


def series(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x (B, C, T) through filters in series, a (S, 2) and b (S, 3)."""
    if transforms() or x.device.type != "cpu":
        for a_s, b_s in zip(a.unbind(), b.unbind(), strict=True):
            x = scan(x, a_s[None, None, None], b_s[None, None, None], None, None, _WHOLE)[0]
        return x
    if not differentiates(x, a, b):
        return _sosfilt_fwd(x, a, b, False)[0]
    return _SosFilt.apply(x, a, b, a.requires_grad or b.requires_grad)[0]


_WHOLE = Call(None, ONE_CHUNK, True)


class _SosFilt(Function):
    """One pass each way, in which backward computes what is between the filters again."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, needs_sections: bool) -> tuple[Tensor, Tensor]:
        return _sosfilt_fwd(x, a, b, needs_sections)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, a, b, _ = inputs
        y, borders = output
        ctx.mark_non_differentiable(borders)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, y if a.shape[0] == 1 else borders)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, a, b, kept = ctx.saved_tensors
        g, _ = grad_outputs
        if g is None:
            return None, None, None, None
        needs_x, *needs = ctx.needs_input_grad[:3]
        again = differentiates(g, x, a, b) and not torch.compiler.is_compiling()
        run = _series_backward if again else _sosfilt_bwd
        gx, ga, gb = run(g, x, kept, a, b, needs_x, any(needs))
        return gx if needs_x else None, ga if needs[0] else None, gb if needs[1] else None, None


def _series_backward(
    g: Tensor, x: Tensor, _: Tensor, a: Tensor, b: Tensor, needs_x: bool, needs_sections: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As sosfilt_bwd, of scans, which are differentiable."""
    sections = [
        (a_s[None, None, None], b_s[None, None, None])
        for a_s, b_s in zip(a.unbind(), b.unbind(), strict=True)
    ]
    signals = [x]
    for section in sections:
        signals.append(scan(signals[-1], *section, None, None, _WHOLE)[0])
    ga, gb = [], []
    for s in reversed(range(len(sections))):
        g, ga_s, gb_s, _, _ = scan_backward(
            g, None, None, signals[s], signals[s + 1], None, *sections[s], None, None, _WHOLE,
            s > 0 or needs_x, needs_sections,
        )  # fmt: skip
        ga.insert(0, ga_s)
        gb.insert(0, gb_s)
    if not needs_sections:
        return g, None, None
    return g, torch.stack(ga).view_as(a), torch.stack(gb).view_as(b)


def step(
    x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor, state_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the state after it."""
    if x.device.type != "cpu" or (transforms() and not torch.compiler.is_compiling()):
        return step_of_scan(x, a, b, state_y, state_x)
    if differentiates(x, a, b, state_y, state_x):
        return _Step.apply(x, a, b, state_y, state_x)
    return _step_fwd(x, a, b, state_y, state_x)


def step_of_scan(
    x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor, state_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A step, as a scan of one sample."""
    one = a.dim() == 4 and a.shape[2] == 1  # a bank of one filter runs as that filter
    if one:
        a, b, state_y = a.squeeze(2), None if b is None else b.squeeze(2), state_y.squeeze(2)
    b = None if b is None else b.unsqueeze(2)
    y, end_y, end_x = scan(x.unsqueeze(-1), a.unsqueeze(2), b, state_y, state_x, _WHOLE, True)
    return y.squeeze(-1), end_y.unsqueeze(2) if one else end_y, end_x


class _Step(Function):
    """y = sum over f of y0_f, y0 = b0 x + b1 x1 + b2 x2 - a1 y1 - a2 y2; then (y0, y1) and (x, x1)."""

    @staticmethod
    def forward(
        x: Tensor, a: Tensor, b: Tensor | None, state_y: Tensor, state_x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _step_fwd(x, a, b, state_y, state_x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        # A few elementwise operations, which PyTorch differentiates further.
        x, a, b, state_y, state_x = ctx.saved_tensors
        gy, gend_y, gend_x = grad_outputs
        bank = a.dim() == 4
        g = gy.to(a.dtype).unsqueeze(-1)
        g0 = (g if bank else g.squeeze(-1)) + gend_y[..., 0]  # to y0 of each filter
        g0 = g0.unsqueeze(-1)
        gstate_y = pad(gend_y[..., 1:], (0, 1)) - g0 * a
        history = torch.cat([x.to(a.dtype).unsqueeze(-1), state_x], -1)
        gb = None
        if b is None:
            ghistory = pad(g0.sum(2) if bank else g0, (0, 2))
        else:
            ghistory = (g0 * b).sum(2) if bank else g0 * b
            gb = (g0 * (history.unsqueeze(2) if bank else history)).sum_to_size(b.shape)
        ghistory = ghistory + pad(gend_x, (0, 1))
        gx = ghistory[..., 0].to(x.dtype)
        return gx, (-g0 * state_y).sum_to_size(a.shape), gb, gstate_y, ghistory[..., 1:]
