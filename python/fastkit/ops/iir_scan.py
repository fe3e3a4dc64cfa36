"""Second-order recursive filters with coefficients per chunk of time, banks and cascades of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkit import reference
from fastkit._autograd import autocasts, transforms
from fastkit._dispatch import Impl, Kernels, choose, covered
from fastkit.ops._checks import FLOATING, HALF, check_tensors, widened
from fastkit.ops.iir_scan_autograd import ONE_CHUNK, Call, scan, series, step
from fastkit.ops.iir_scan_checks import check_offsets, check_scan, check_sosfilt, check_step, refuse_unstable
from fastkit.ops.iir_scan_triton import absent
from fastkit.reference import IIRState

KERNELS: Kernels = {"cpu": FLOATING, "cuda": FLOATING, "triton": FLOATING}


def iir_scan(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K[, F], 2)
    b: Tensor | None = None,  # (B|1, C|1, K[, F], 3)
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
    check_stable: bool = False,
    impl: Impl | None = None,
) -> Tensor:  # (B, C, T)
    """Filter each row of ``x`` by second-order recursions whose coefficients change from chunk to chunk.

    ::

        y[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y[t-1] - a2 y[t-2],    (a, b) = those of chunk t // chunk

    (direct form I; samples before the first are zero); of a bank of F filters the outputs are summed.
    Equivalent to ``fastkit.reference.iir_scan``, and for one filter to
    ``scipy.signal.lfilter((b0, b1, b2), (1, a1, a2), x)``.

    Args:
        x: signal, ``(B, C, T)``, float32, float64, bfloat16 or float16. Rows run at full speed when time or
            channels have stride 1, so the view ``h.transpose(1, 2)`` of ``(B, T, C)`` activations costs no
            copy; other strides are copied first.
        a: ``(a1, a2)`` of the denominator ``1 + a1/z + a2/z^2``, ``(B|1, C|1, K, 2)``, or of a bank,
            ``(B|1, C|1, K, F, 2)``; in x's dtype (float32 for a half-precision x), any strides. K = 1 if
            ``chunk`` is None, else ``ceil(T / chunk)``.
        b: ``(b0, b1, b2)`` of the numerator, ``(B|1, C|1, K[, F], 3)``. Default: ``(1, 0, 0)``, all-pole.
        chunk: samples per set of coefficients; the last chunk may be short, and 1 gives every sample its own.
            Default: one filter for all T.
        carry: whether the history of x and y crosses into the next chunk. False: it is zero at each start.
        cu_seqlens: ``(S + 1,)`` int32 or int64, on x's device: x is ``(1, C, total)`` and holds S sequences,
            the s-th from ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, perhaps empty. History and chunks
            restart with each; K runs over the chunks of all, or, with ``chunk=None``, is S or 1.
        check_stable: refuse poles on or outside the unit circle (reads ``a``: synchronises a GPU).
        impl: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` runs exactly that, backward included, or
            raises. Triton has single filters, fixed or of chunks of 16 samples and more. Default: the kernel
            where one covers the device and the call, else the reference; where that is for want of a
            kernel that another installation has, one warning says so.

    Returns:
        y, ``(B, C, T)``, with the dtype of x and, where x is dense, its strides. It is saved for backward:
        do not write to it in place.

    Raises:
        ValueError: a shape, ``chunk``, the name ``impl`` or a pole (with ``check_stable``) is not as above.
        TypeError: an argument is no dense tensor, or its type or dtype is not as above.
        RuntimeError: ``impl`` cannot run here, tensors are on different devices, the values of ``cu_seqlens``
            or K do not fit (on a GPU they are clamped), or ``check_stable`` is asked for while compiling.

    Numerics: arithmetic in the dtype of the coefficients; the coefficient gradients of a row are summed in
    float32 over at most 128 samples (on a GPU, of each lane) and in float64 beyond. Subnormal numbers are
    flushed to zero on x86 (a half-precision x or y may be subnormal). A rounding error is filtered like a
    sample: ``|error| <= 8 eps |A^-1| (|B| |x| + |A - 1| |y|) / 2`` with the absolute impulse responses,
    which the tests check. With poles near z = 1 (say, 20 Hz at 48 kHz) that is large: take float64 there.
    Unstable filters are computed: they overflow to inf, and then to NaN. A NaN stays in its row, and with
    ``carry=False`` in its chunk.

    Support: gradients of any order to x, a and b (``torch.compile`` keeps the first only: PyTorch drops
    second-order terms of compiled functions), forward-mode differentiation, ``torch.func``, ``torch.vmap``
    (but of packed sequences), ``torch.compile(fullgraph=True)``, autocast (x is left as it is,
    half-precision coefficients become float32), deterministic for a given number of threads (another number
    may change the last bit where a few long rows are cut along time).

    Memory and work on the CPU: 8 bytes and 5 multiply-adds a float32 sample and filter forward, 16 bytes
    and 10 multiply-adds backward; with ``chunk=1``, 20 bytes more forward and 40 more backward. Allocated
    are the results, a copy of what has other strides (such as the expanded gradient of a sum), and
    coefficient gradients per row before they are summed over broadcast rows. Saved for backward: x, a, b,
    y; of a bank, instead of y, 8 F bytes for every 128 samples and for every chunk. On a GPU backward moves
    24 bytes and allocates one more signal like x in the type of arithmetic, of a bank two, and saves no
    states.

    Source: Lutati, Zimerman, Wolf, "Focus Your Attention (with Adaptive IIR Filters)", EMNLP 2023, eq. 4-8
    as a recurrence; ``carry=True``, the numerator and packed sequences are our extensions.

    Example:
        >>> import torch, fastkit.ops
        >>> x = torch.zeros(1, 1, 6); x[..., 0] = 1
        >>> fastkit.ops.iir_scan(x, torch.tensor([[[[-0.5, 0.0]]]]))
        tensor([[[1.0000, 0.5000, 0.2500, 0.1250, 0.0625, 0.0312]]])
    """
    op = "iir_scan"
    check_tensors(op, x=x, a=a, b_=b, cu_seqlens_=cu_seqlens)
    a, b = _widened(x, a, b)
    check_scan(op, x, a, b, None, chunk, carry, cu_seqlens, check_stable)
    if check_stable:
        refuse_unstable(op, a)
    chosen = choose(op, impl, x, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, x, KERNELS, chosen, absent=absent(x, a, chunk, cu_seqlens))
    return _scan(op, x, a, b, None, chunk, carry, cu_seqlens, chosen, needs_end=False)[0]


def iir_scan_with_state(
    x: Tensor,  # (B, C, T)
    a: Tensor,  # (B|1, C|1, K[, F], 2)
    b: Tensor | None = None,  # (B|1, C|1, K[, F], 3)
    state: IIRState | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
    check_stable: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, IIRState]:  # (B, C, T), its final state
    """``iir_scan`` that starts from the samples before the first, and returns those to go on from.

    ::

        y, state = iir_scan_with_state(x[..., :n], a, b)
        rest, state = iir_scan_with_state(x[..., n:], a, b, state)    # equals one call on x, but for rounding

    Args:
        x, a, b, chunk, carry, cu_seqlens, check_stable, impl: as of ``iir_scan``; T may be 0.
        state: ``IIRState(y, x)``: y ``(B, C[, F], 2)`` = (y[-1], y[-2]) of each filter, x ``(B, C, 2)`` =
            (x[-1], x[-2]), in the dtype of the coefficients; with ``cu_seqlens`` S replaces B. The first
            chunk starts from it, with ``carry=False`` too. Default: zeros.

    Returns:
        y, and the state after the last sample, shaped like ``state``. Where T is 0 it is the state given;
        with ``carry=False`` what is before the last chunk is zero in it.

    Raises:
        As ``iir_scan``; ValueError, TypeError too where ``state`` is not as above.

    Numerics, Support, Source: as ``iir_scan``, with gradients of any order to and from the states.

    Example:
        >>> import torch, fastkit.ops
        >>> x, a = torch.ones(1, 1, 3), torch.tensor([[[[-0.5, 0.0]]]])
        >>> y, state = fastkit.ops.iir_scan_with_state(x, a)
        >>> state.y, state.x
        (tensor([[[1.7500, 1.5000]]]), tensor([[[1., 1.]]]))
    """
    op = "iir_scan_with_state"
    check_tensors(op, x=x, a=a, b_=b, cu_seqlens_=cu_seqlens)
    a, b, state = *_widened(x, a, b), _widened_state(op, x, state)
    check_scan(op, x, a, b, state, chunk, carry, cu_seqlens, check_stable)
    if check_stable:
        refuse_unstable(op, a)
    chosen = choose(op, impl, x, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, x, KERNELS, chosen, absent="states")
    y, end_y, end_x = _scan(op, x, a, b, state, chunk, carry, cu_seqlens, chosen, needs_end=True)
    return y, IIRState(end_y, end_x)


def iir_step(
    x_t: Tensor,  # (B, C)
    a: Tensor,  # (B|1, C|1[, F], 2)
    b: Tensor | None = None,  # (B|1, C|1[, F], 3)
    state: IIRState | None = None,
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, IIRState]:  # (B, C)
    """One sample of ``iir_scan_with_state``, for decoding step by step.

    Args:
        x_t: this sample of every row, ``(B, C)``.
        a: ``(B|1, C|1, 2)``, or of a bank ``(B|1, C|1, F, 2)``: the coefficients at this sample.
        b: ``(B|1, C|1[, F], 3)``. Default: ``(1, 0, 0)``.
        state: as of ``iir_scan_with_state``. Default: zeros.
        impl: as of ``iir_scan``.

    Returns:
        y_t, ``(B, C)``, and the state after it. The state given is not written to.

    Raises:
        As ``iir_scan_with_state``.

    Numerics: those of one step of ``iir_scan``. Support: gradients of any order; ``torch.func``, forward-mode
    differentiation and vmap run the reference, a few elementwise operations. Memory and work: reads and
    writes x_t and the state once.

    Example:
        >>> import torch, fastkit.ops
        >>> y, state = fastkit.ops.iir_step(torch.ones(1, 1), torch.tensor([[[-0.5, 0.0]]]))
        >>> fastkit.ops.iir_step(torch.ones(1, 1), torch.tensor([[[-0.5, 0.0]]]), None, state)[0]
        tensor([[1.5000]])
    """
    op = "iir_step"
    check_tensors(op, x=x_t, a=a, b_=b)
    a, b, state = *_widened(x_t, a, b), _widened_state(op, x_t, state)
    check_step(op, x_t, a, b, state)
    batch, channels = x_t.shape
    if state is None:
        filters = a.shape[2:-1]
        state = IIRState(a.new_zeros(batch, channels, *filters, 2), a.new_zeros(batch, channels, 2))
    chosen = choose(op, impl, x_t, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, x_t, KERNELS, chosen, absent="single steps")
    if chosen == "reference":
        return reference.iir_step(x_t, a, b, state)
    y, end_y, end_x = step(x_t, a, b, state.y, state.x)
    return y, IIRState(end_y, end_x)


def sosfilt(
    x: Tensor,  # (..., T)
    sos: Tensor,  # (S, 6)
    *,
    impl: Impl | None = None,
) -> Tensor:  # (..., T)
    """Filter ``x`` along its last axis by second-order sections one after another: a filter of any order.

    Equivalent to ``scipy.signal.sosfilt(sos, x)``, and differentiable.

    Args:
        x: signal, any shape ``(..., T)`` with T >= 1, float32, float64, bfloat16 or float16.
        sos: ``(S, 6)``, a row ``(b0, b1, b2, a0, a1, a2)`` for each section, in x's dtype (float32 for a
            half-precision x); as ``scipy.signal.butter(..., output="sos")`` returns it. Sections are divided
            by their a0 (scipy wants it to be 1).
        impl: as of ``iir_scan``.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        ValueError: a shape or the name ``impl`` is not as above.
        TypeError: an argument is no dense tensor, or its dtype is not as above.
        RuntimeError: ``impl`` cannot run here, or tensors are on different devices.

    Numerics: each section as ``iir_scan``; between sections nothing is rounded to x's dtype where a single
    pass runs them all. A cascade keeps its accuracy at orders where one polynomial has lost it. Support: as
    ``iir_scan``.

    Memory and work: 5 S multiply-adds a sample; on the CPU one pass over x for all sections, else one for
    each. Backward on the CPU is one pass as well, and computes what is between the sections again; where
    ``sos`` has a gradient, 2 S numbers are kept for it of every 128 samples.

    Example:
        >>> import torch, fastkit.ops
        >>> sos = torch.tensor([[1.0, 0, 0, 1, -0.5, 0], [1, 0, 0, 1, -0.5, 0]])
        >>> fastkit.ops.sosfilt(torch.tensor([1.0, 0, 0, 0]), sos)
        tensor([1.0000, 1.0000, 0.7500, 0.5000])
    """
    op = "sosfilt"
    check_tensors(op, x=x, sos=sos)
    sos, _ = _widened(x, sos, None)
    check_sosfilt(op, x, sos)
    chosen = choose(op, impl, x, KERNELS)
    if chosen == "triton":
        chosen = covered(op, impl, x, KERNELS, chosen, absent="cascades")
    if chosen == "reference":
        return reference.sosfilt(x, sos)
    sos = sos / sos[:, 3:4]
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return series(rows, sos[:, 4:], sos[:, :3]).view_as(x)


def _scan(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: IIRState | None,
    chunk: int | None,
    carry: bool,
    cu_seqlens: Tensor | None,
    impl: Impl,
    *,
    needs_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "reference":
        if cu_seqlens is not None:
            check_offsets(op, cu_seqlens, x, a, b, chunk)
        y, end = reference.iir_scan_with_state(
            x, a, b, state, chunk=chunk, carry=carry, cu_seqlens=cu_seqlens
        )
        return _like(x, y), end.y, end.x
    state_y, state_x = (None, None) if state is None else state
    one = a.dim() == 5 and a.shape[3] == 1  # a bank of one filter runs as that filter
    if one:
        a, b = a.squeeze(3), None if b is None else b.squeeze(3)
        state_y = None if state_y is None else state_y.squeeze(2)
    call = Call(cu_seqlens, ONE_CHUNK if chunk is None else chunk, carry, impl == "triton")
    y, end_y, end_x = scan(x, a, b, state_y, state_x, call, needs_end)
    return y, end_y.unsqueeze(2) if one and needs_end else end_y, end_x


def _like(x: Tensor, y: Tensor) -> Tensor:
    """y in the strides that the kernels give; under a transform it stays as it is."""
    return y if transforms() else torch.empty_like(x).copy_(y)


def _widened(x: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Any]:
    """Under autocast, coefficients in float32 where they have half precision."""
    if (a.dtype in HALF or (b is not None and b.dtype in HALF)) and autocasts(x):
        a, b = widened(a, b)
    return a, b


def _widened_state(op: str, x: Tensor, state: IIRState | None) -> IIRState | None:
    if state is None:
        return None
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{op}: state must be an IIRState(y, x) or None, got {type(state).__name__}")
    for name, tensor in (("state.y", state[0]), ("state.x", state[1])):
        if tensor is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"{op}: {name} must be a tensor, got None; pass state=None for zeros")
        check_tensors(op, **{name: tensor})
    return IIRState(*_widened(x, *state))
