"""What iir_scan and its relatives refuse, in words."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastkit.ops._checks import FLOATING, arithmetic, check_device, shape
from fastkit.reference import IIRState


def check_scan(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: IIRState | None,
    chunk: int | None,
    carry: bool,
    cu_seqlens: Tensor | None,
    check_stable: bool,
) -> None:
    _check_signal(op, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape (B, C, T), got {shape(x)}; add axes, as in x[None, None]")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, (int, torch.SymInt))):
        raise TypeError(f"{op}: chunk must be an int or None, got {chunk!r}")
    if chunk is not None and not 1 <= chunk < 2**31:
        raise ValueError(f"{op}: chunk must be in [1, 2**31), got {chunk}; None is one filter for all T")
    for name, value in (("carry", carry), ("check_stable", check_stable)):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r}")
    if x.shape[-1] == 0 and op == "iir_scan":
        raise ValueError(
            f"{op}: x must have T >= 1, got {shape(x)}; skip the call for T = 0, or take iir_scan_with_state"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(op, cu_seqlens, x)
    _check_coefficients(op, "a", a, 2, x, a, chunk, cu_seqlens)
    if b is not None:
        _check_coefficients(op, "b", b, 3, x, a, chunk, cu_seqlens)
    if state is not None:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(op, state, x, a, batch, "B" if cu_seqlens is None else "S")


def check_step(op: str, x: Tensor, a: Tensor, b: Tensor | None, state: IIRState | None) -> None:
    _check_signal(op, x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have shape (B, C), got {shape(x)}; take x[..., t] of a signal")
    for name, coefficients, taps in (("a", a, 2), *([] if b is None else [("b", b, 3)])):
        _check_like_x(op, name, coefficients, x)
        got = coefficients.shape
        fits = (
            (len(got) in (3, 4) if name == "a" else len(got) == a.dim())
            and got[0] in (1, x.shape[0])
            and got[1] in (1, x.shape[1])
            and (len(got) == 3 or (got[2] == a.shape[2] and got[2] >= 1))
            and got[-1] == taps
        )
        if not fits:
            raise ValueError(
                f"{op}: {name} must have shape (B|1, C|1[, F], {taps}) with (B, C) = {shape(x)}, got"
                f" {shape(coefficients)}; there is no axis of chunks: pass those of this sample, a[:, :, k]"
            )
    if state is not None:
        _check_state(op, state, x, a, x.shape[0], "B")


def check_sosfilt(op: str, x: Tensor, sos: Tensor) -> None:
    _check_signal(op, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have shape (..., T) with T >= 1, got {shape(x)}")
    _check_like_x(op, "sos", sos, x)
    if sos.dim() != 2 or sos.shape[0] == 0 or sos.shape[1] != 6:
        raise ValueError(
            f"{op}: sos must have shape (S, 6) with S >= 1 rows (b0, b1, b2, a0, a1, a2), got {shape(sos)};"
            ' scipy.signal.butter(..., output="sos") returns it'
        )


def refuse_unstable(op: str, a: Tensor) -> None:
    if a.device.type == "meta":
        raise RuntimeError(f"{op}: check_stable=True reads values, got a on the meta device")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: check_stable=True reads values and cannot be compiled; check before, or leave it False"
        )
    a1, a2 = a.detach().unbind(-1)
    stable = (a2.abs() < 1) & (a1.abs() < 1 + a2)  # NaN is not stable
    if not bool(stable.all()):
        index = tuple(int(i) for i in (~stable).nonzero()[0])
        raise ValueError(
            f"{op}: a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
            f" (a1, a2) = ({float(a1[index]):.6g}, {float(a2[index]):.6g})"
            f" at a[{', '.join(map(str, index))}]; scale the poles inwards, or leave check_stable=False"
        )


def check_offsets(
    op: str, cu_seqlens: Tensor, x: Tensor, a: Tensor, b: Tensor | None, chunk: int | None
) -> None:
    """The values, for the reference; the kernel has the same checks."""
    offsets = cu_seqlens.tolist()
    total = x.shape[-1]
    if offsets[0] != 0:
        raise RuntimeError(
            f"{op}: cu_seqlens must start at 0, got {offsets[0]}; it holds S + 1 offsets, the first of them 0"
        )
    for i, (begin, end) in enumerate(pairwise(offsets)):
        if end < begin:
            raise RuntimeError(
                f"{op}: cu_seqlens must not decrease, got {begin} before {end} at index {i + 1};"
                " pass cumulative lengths, not lengths"
            )
    if offsets[-1] != total:
        raise RuntimeError(
            f"{op}: cu_seqlens must end at the number of samples, {total}, got {offsets[-1]};"
            " x must hold exactly the packed sequences"
        )
    if chunk is None:
        return
    chunks = sum(-(-(end - begin) // chunk) for begin, end in pairwise(offsets))
    for name, coefficients in (("a", a), ("b", b)):
        if coefficients is not None and coefficients.shape[2] != chunks:
            raise RuntimeError(
                f"{op}: {name} must have K = {chunks} chunks for these cu_seqlens, got"
                f" {coefficients.shape[2]}; chunks restart at every sequence: K is the sum of"
                " ceil(length / chunk)"
            )


def _check_signal(op: str, x: Tensor) -> None:
    if x.dtype.is_complex:
        raise TypeError(f"{op}: x must be real, got {x.dtype}; filter x.real and x.imag apart")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}; cast it to torch.float32")


def _check_like_x(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Device and dtype of what goes with x."""
    check_device(op, name, tensor, x)
    want = arithmetic(x)
    if tensor.dtype != want:
        raise TypeError(
            f"{op}: {name} must be {want} for x of {x.dtype}, got {tensor.dtype};"
            f" cast it with {name}.to({want})"
        )


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, x: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}; cast it")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (S + 1,) with S >= 1 sequences, got {shape(cu_seqlens)};"
            " it holds where each begins, and the total"
        )
    check_device(op, "cu_seqlens", cu_seqlens, x)
    if cu_seqlens.device.type == "meta":
        raise RuntimeError(f"{op}: cu_seqlens must have values, got a tensor on the meta device")
    if x.shape[0] != 1:
        raise ValueError(
            f"{op}: with cu_seqlens x must have shape (1, C, total), got {shape(x)};"
            " concatenate the sequences along time"
        )


def _check_coefficients(
    op: str,
    name: str,
    coefficients: Tensor,
    taps: int,
    x: Tensor,
    a: Tensor,
    chunk: int | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_like_x(op, name, coefficients, x)
    batch, channels, time = x.shape
    got = coefficients.shape
    if name == "a" and coefficients.dim() in (4, 5) and got[-1] == 3:
        raise ValueError(
            f"{op}: a must hold (a1, a2) of a denominator 1 + a1/z + a2/z^2, got {shape(coefficients)};"
            " for (a0, a1, a2) pass a[..., 1:] / a[..., :1] and b / a[..., :1]"
        )
    fits = (
        (coefficients.dim() in (4, 5) if name == "a" else coefficients.dim() == a.dim())
        and (got[0] == batch or got[0] == 1)
        and (got[1] == channels or got[1] == 1)
        and got[-1] == taps
    )
    bank = a.dim() == 5
    if fits and bank:
        fits = got[3] == a.shape[3] and got[3] >= 1
    # Where chunks restart with sequences, only the values of cu_seqlens tell K: the kernel checks it.
    if cu_seqlens is None:
        chunks = 1 if chunk is None else -(-time // chunk)
        rule = "K is 1 for chunk=None, else ceil(T / chunk)"
        fits = fits and got[2] == chunks
    else:
        sequences = cu_seqlens.shape[0] - 1
        chunks = f"{sequences}|1" if chunk is None else "K"
        rule = "K is S or 1 for chunk=None, else the sum of ceil(length / chunk)"
        fits = fits and (chunk is not None or got[2] == sequences or got[2] == 1)
    if not fits:
        filters = a.shape[3] if bank else None
        axes = f"K, F, {taps}" if bank else f"K[, F], {taps}" if name == "a" else f"K, {taps}"
        sizes = f"{chunks}, {filters}, {taps}" if bank else f"{chunks}, {taps}"
        raise ValueError(
            f"{op}: {name} must have shape (B|1, C|1, {axes}) = ({batch}|1, {channels}|1, {sizes})"
            f" for x of shape {shape(x)} and chunk={chunk}, got {shape(coefficients)}; {rule}"
        )


def _check_state(op: str, state: IIRState, x: Tensor, a: Tensor, batch: int, axis: str) -> None:
    bank = a.dim() == (5 if x.dim() == 3 else 4)
    filters = (a.shape[-2],) if bank else ()
    rows = (batch, x.shape[1])
    for name, tensor, want, axes in (
        ("state.y", state.y, (*rows, *filters, 2), f"({axis}, C, F, 2)" if bank else f"({axis}, C, 2)"),
        ("state.x", state.x, (*rows, 2), f"({axis}, C, 2)"),
    ):
        _check_like_x(op, name, tensor, x)
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{op}: {name} must have shape {axes} = {want}, got {shape(tensor)};"
                f" it is what the call before returned for the same rows, or zeros"
            )
