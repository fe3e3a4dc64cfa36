"""Second-order recursive filters with coefficients per chunk of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkit import _native, reference
from fastkit._autograd import Function
from fastkit._dispatch import Impl, Kernels, choose

KERNELS: Kernels = {"cpu": (torch.float32, torch.float64)}

_ONE_CHUNK = 2**62  # longer than any T; a constant, where T itself would make every length a graph of its own

if _native.REASON is None:
    _fwd = torch.ops.fastkit.iir_scan_fwd.default
    _bwd = torch.ops.fastkit.iir_scan_bwd.default

    @torch.library.register_fake("fastkit::iir_scan_fwd")
    def _(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
        _check_fake(x, a, b)
        return torch.empty_like(x)

    @torch.library.register_fake("fastkit::iir_scan_bwd")
    def _(
        gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool,
        needs_x: bool, needs_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _check_fake(x, gy, y, a, b)
        rows = (x.shape[0], x.shape[1], a.shape[2])
        return (
            torch.empty_like(x) if needs_x else x.new_empty(0),
            a.new_empty((*rows, 2) if needs_coefficients else 0),
            a.new_empty((*rows, 3) if needs_coefficients and b is not None else 0),
        )

    def _check_fake(x: Tensor, *others: Tensor | None) -> None:
        # One argument on the meta device is enough for the dispatcher to come here.
        for other in others:
            if other is not None and other.device != x.device:
                raise RuntimeError(f"iir_scan: tensors must be on one device, got {x.device}, {other.device}")


def iir_scan(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K, 2)
    b: Tensor | None = None,  # (B|1, C|1, K, 3)
    *,
    chunk: int | None = None,
    carry: bool = True,
    check_stable: bool = False,
    impl: Impl | None = None,
) -> Tensor:  # (B, C, T)
    """Filter each row of ``x`` by a second-order recursion whose coefficients change from chunk to chunk.

    ::

        y[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y[t-1] - a2 y[t-2],    (a, b) = those of chunk t // chunk

    (direct form I; samples before the first are zero). Equivalent to ``fastkit.reference.iir_scan``, and for
    one filter to ``scipy.signal.lfilter((b0, b1, b2), (1, a1, a2), x)``.

    Args:
        x: signal, ``(B, C, T)``, float32 or float64 (float16, bfloat16: by the reference). Rows run at full
            speed when time or channels have stride 1, so the view ``h.transpose(1, 2)`` of ``(B, T, C)``
            activations costs no copy; other strides are copied first.
        a: ``(a1, a2)`` of the denominator ``1 + a1/z + a2/z^2``, ``(B|1, C|1, K, 2)``, in x's dtype
            (float32 for a half-precision x), any strides; K = 1 if ``chunk`` is None, else
            ``ceil(T / chunk)``.
        b: ``(b0, b1, b2)`` of the numerator, ``(B|1, C|1, K, 3)``. Default: ``(1, 0, 0)``, all-pole.
        chunk: samples per set of coefficients; the last chunk may be short. Default: one filter for all T.
        carry: whether the history of x and y crosses into the next chunk. False: it is zero at each start.
        check_stable: refuse poles on or outside the unit circle (reads ``a``: synchronises a GPU).
        impl: ``"cpu"`` or ``"reference"`` runs exactly that, backward included, or raises. Default: the
            kernel where one covers the device and dtype, else the reference.

    Returns:
        y, ``(B, C, T)``, with the dtype of x and, where x is dense, its strides. It is saved for backward:
        do not write to it in place.

    Raises:
        ValueError: a shape, ``chunk``, the name ``impl`` or a pole (with ``check_stable``) is not as above.
        TypeError: an argument is no dense tensor, or its type or dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, or ``check_stable`` is asked
            for while compiling.

    Numerics: arithmetic in the dtype of the coefficients; the coefficient gradients of a row are summed in
    float32 over at most 128 samples and in float64 beyond. Subnormal numbers are flushed to zero on x86. A
    rounding error is filtered like a sample: ``|error| <= 4 eps |A^-1| (|B| |x| + |A - 1| |y|)`` with the
    absolute impulse responses, which the tests check. Unstable filters are computed: they overflow to inf,
    and then to NaN. A NaN stays in its row, and with ``carry=False`` in its chunk.

    Support: gradients of any order to x, a and b (``torch.compile`` keeps the first only: PyTorch drops
    second-order terms of compiled functions), ``torch.func.grad``, ``torch.compile(fullgraph=True)``,
    autocast (x is left as it is, half-precision coefficients become float32), deterministic. Forward-mode
    differentiation and ``torch.vmap`` are refused.

    Memory and work: 8 bytes and 5 multiply-adds a float32 sample forward, 16 bytes and 10 multiply-adds
    backward. Allocated are the results, a copy of what has other strides (such as the expanded gradient of a
    sum), and coefficient gradients per row before they are summed over broadcast rows. Saved for backward:
    x, a, b, y.

    Source: Lutati, Zimerman, Wolf, "Focus Your Attention (with Adaptive IIR Filters)", EMNLP 2023, eq. 4-8
    as a recurrence; ``carry=True`` and the numerator are our extensions.

    Example:
        >>> import torch, fastkit.ops
        >>> x = torch.zeros(1, 1, 6); x[..., 0] = 1
        >>> fastkit.ops.iir_scan(x, torch.tensor([[[[-0.5, 0.0]]]]))
        tensor([[[1.0000, 0.5000, 0.2500, 0.1250, 0.0625, 0.0312]]])
    """
    _check_tensors(x, a, b)
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        a = _float32_if_half(a)
        b = None if b is None else _float32_if_half(b)
    _check(x, a, b, chunk, carry)
    if check_stable:
        _check_stable(a)
    if choose("iir_scan", impl, x, KERNELS) == "reference":
        y = reference.iir_scan(x, a, b, chunk=chunk, carry=carry)
        return torch.empty_like(x).copy_(y)  # in the strides that the kernels give
    return _Scan.apply(x, a, b, _ONE_CHUNK if chunk is None else chunk, carry)


class _Scan(Function):
    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool) -> Tensor:
        return _fwd(x, a, b, chunk, carry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, a, b, ctx.chunk, ctx.carry = inputs
        ctx.save_for_backward(x, a, b, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, y = ctx.saved_tensors
        (gy,) = grad_outputs
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        gx, ga, gb = _scan_backward(gy, x, y, a, b, ctx.chunk, ctx.carry, needs_x, needs_a or needs_b)
        return gx if needs_x else None, ga if needs_a else None, gb if needs_b else None, None, None


def _scan_backward(
    gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool,
    needs_x: bool, needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, a and b of ``<gy, y>``, summed over broadcast rows; themselves differentiable.

    What is not needed is empty.
    """
    gx, ga, gb = _ScanBackward.apply(gy, x, y, a, b, chunk, carry, needs_x, needs_coefficients)
    if needs_coefficients:
        ga = ga.sum_to_size(a.shape)
        gb = gb if b is None else gb.sum_to_size(b.shape)
    return gx, ga, gb


class _ScanBackward(Function):
    """gx = B' l, ga = -sum l y[t-i], gb = sum l x[t-i] per row and chunk, where l = A'^-1 gy.

    A y = y[t] + a1 y[t-1] + a2 y[t-2] and B x = b0 x[t] + ... are the recursion's two sides, ' transposes.
    For cotangents (vx, va, vb) its value is <gy, A^-1 r> with r = B vx + Vb x - Va y: the forward tangent.
    So its gradients are one more scan and the backward of the scans that r is made of.
    """

    @staticmethod
    def forward(
        gy: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, chunk: int, carry: bool,
        needs_x: bool, needs_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _bwd(gy, x, y, a, b, chunk, carry, needs_x, needs_coefficients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gy, x, y, a, b, ctx.chunk, ctx.carry, ctx.needs_x, ctx.needs_coefficients = inputs
        ctx.save_for_backward(gy, x, y, a, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, y, a, b = ctx.saved_tensors
        vx, va, vb = grad_outputs
        chunk, carry = ctx.chunk, ctx.carry
        no_poles = a.new_zeros(1, 1, 1, 2).expand(1, 1, a.shape[2], 2)  # A = 1: only b acts

        def fir(taps: Tensor, u: Tensor) -> Tensor:
            return _Scan.apply(u, no_poles, taps, chunk, carry)

        def fir_transposed(taps: Tensor, g: Tensor) -> Tensor:
            return _scan_backward(g, g, g, no_poles, taps, chunk, carry, True, False)[0]

        def taps_gradient(g: Tensor, u: Tensor, taps: Tensor) -> Tensor:
            return _scan_backward(g, u, u, no_poles, taps, chunk, carry, False, True)[2]

        terms = []
        if ctx.needs_x:
            terms.append(vx if b is None else fir(b, vx))
        if ctx.needs_coefficients:
            va = pad(va, (1, 0))
            terms.append(-fir(va, y))
            if b is not None:
                terms.append(fir(vb, x))
        r = sum(terms[1:], start=terms[0])
        tangent = _Scan.apply(r, a, None, chunk, carry)
        l, ga, _ = _scan_backward(gy, r, tangent, a, None, chunk, carry, True, True)  # noqa: E741

        gx = gy_y = gb = None
        if ctx.needs_x and b is not None:
            gb = taps_gradient(l, vx, b)
        if ctx.needs_coefficients:
            gy_y = -fir_transposed(va, l)
            if b is not None:
                gx = fir_transposed(vb, l)
        return tangent, gx, gy_y, ga, gb, None, None, None, None


def _float32_if_half(coefficients: Tensor) -> Tensor:
    return coefficients.float() if coefficients.dtype in _HALF else coefficients


_HALF = (torch.float16, torch.bfloat16)


def _check_tensors(x: Tensor, a: Tensor, b: Tensor | None) -> None:
    for name, tensor in (("x", x), ("a", a), *([] if b is None else [("b", b)])):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"iir_scan: {name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"iir_scan: {name} is a DTensor; pass {name}.to_local() or {name}.full_tensor()")
        if tensor.layout != torch.strided:
            raise TypeError(f"iir_scan: {name} must be dense, got {tensor.layout}; pass {name}.to_dense()")


def _check(x: Tensor, a: Tensor, b: Tensor | None, chunk: int | None, carry: bool) -> None:
    if x.dtype.is_complex:
        raise TypeError(f"iir_scan: x must be real, got {x.dtype}; filter x.real and x.imag apart")
    if x.dtype not in (torch.float32, torch.float64, *_HALF):
        raise TypeError(f"iir_scan: x must be floating point, got {x.dtype}; cast it to torch.float32")
    if x.dim() != 3:
        raise ValueError(
            f"iir_scan: x must have shape (B, C, T), got {_shape(x)}; add axes, as in x[None, None]"
        )
    time = x.shape[-1]
    if time == 0:
        raise ValueError(f"iir_scan: x must have T >= 1, got {_shape(x)}; skip the call for T = 0")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, (int, torch.SymInt))):
        raise TypeError(f"iir_scan: chunk must be an int or None, got {chunk!r}")
    if chunk is not None and not 1 <= chunk < 2**31:
        raise ValueError(f"iir_scan: chunk must be in [1, 2**31), got {chunk}; None is one filter for all T")
    if not isinstance(carry, bool):
        raise TypeError(f"iir_scan: carry must be True or False, got {carry!r}")
    chunks = 1 if chunk is None else -(-time // chunk)
    _check_coefficients("a", a, 2, x, chunks, chunk)
    if b is not None:
        _check_coefficients("b", b, 3, x, chunks, chunk)


def _check_coefficients(
    name: str, coefficients: Tensor, taps: int, x: Tensor, chunks: int, chunk: int | None
) -> None:
    batch, channels = x.shape[:2]
    if coefficients.device != x.device:
        raise RuntimeError(
            f"iir_scan: {name} must be on the device of x, {x.device}, got {coefficients.device};"
            f" move it with {name}.to(x.device)"
        )
    want = torch.float32 if x.dtype in _HALF else x.dtype
    if coefficients.dtype != want:
        raise TypeError(
            f"iir_scan: {name} must be {want} for x of {x.dtype}, got {coefficients.dtype};"
            f" cast it with {name}.to({want})"
        )
    shape = coefficients.shape
    if name == "a" and coefficients.dim() == 4 and shape[-1] == 3:
        raise ValueError(
            f"iir_scan: a must hold (a1, a2) of a denominator 1 + a1/z + a2/z^2, got {_shape(coefficients)};"
            " for (a0, a1, a2) pass a[..., 1:] / a[..., :1] and b / a[..., :1]"
        )
    fits = (
        coefficients.dim() == 4
        and (shape[0] == batch or shape[0] == 1)
        and (shape[1] == channels or shape[1] == 1)
        and shape[2] == chunks
        and shape[3] == taps
    )
    if not fits:
        raise ValueError(
            f"iir_scan: {name} must have shape (B|1, C|1, K, {taps}) ="
            f" ({batch}|1, {channels}|1, {chunks}, {taps}) for x of shape {_shape(x)} and chunk={chunk},"
            f" got {_shape(coefficients)}; K is 1 for chunk=None, else ceil(T / chunk)"
        )


def _check_stable(a: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "iir_scan: check_stable=True reads values and cannot be compiled; check before, or leave it False"
        )
    a1, a2 = a.detach().unbind(-1)
    stable = (a2.abs() < 1) & (a1.abs() < 1 + a2)  # NaN is not stable
    if not bool(stable.all()):
        row, channel, k = (int(i) for i in (~stable).nonzero()[0])
        raise ValueError(
            f"iir_scan: a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
            f" (a1, a2) = ({float(a1[row, channel, k]):.6g}, {float(a2[row, channel, k]):.6g})"
            f" at a[{row}, {channel}, {k}]; scale the poles inwards, or leave check_stable=False"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
