"""iir_scan against its float64 oracle: inputs, and budgets derived from the recursion."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkit import ops, reference
from fastkit._dispatch import Impl
from fastkit.reference import IIRState
from fastkit.testing import Size, assert_matches_reference


def make_inputs(
    size: Size,
    *,
    filters: int | None = None,
    radius: float = 0.9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a, b and a cotangent of y: noise, pole pairs at ``radius`` and any angle, any numerator.

    ``filters`` gives a and b the axis of a bank. For a half-precision ``dtype`` a and b are float32.
    """
    chunks = 1 if size.chunk is None else -(-size.T // size.chunk)
    return _make_inputs((size.B, size.C), size.T, chunks, filters, radius, dtype, seed)


def make_packed_inputs(
    lengths: list[int],
    C: int,
    chunk: int | None,
    *,
    filters: int | None = None,
    radius: float = 0.9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, a, b and a cotangent of y, as of ``make_inputs``, for sequences of these lengths; their cu_seqlens.

    With ``chunk=None`` there is one filter a sequence.
    """
    chunks = len(lengths) if chunk is None else sum(-(-length // chunk) for length in lengths)
    inputs = _make_inputs((1, C), sum(lengths), chunks, filters, radius, dtype, seed)
    return *inputs, torch.tensor([0, *accumulate(lengths)])


def make_state(x: Tensor, a: Tensor, cu_seqlens: Tensor | None = None, *, seed: int = 1) -> IIRState:
    """A random state, or a cotangent of one, for a call with these arguments."""
    generator = torch.Generator(x.device).manual_seed(seed)
    rows = (x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, x.shape[1])
    like_a = {"generator": generator, "dtype": a.dtype, "device": x.device}
    y = torch.randn(*rows, *a.shape[3:-1], 2, **like_a)
    return IIRState(y, torch.randn(*rows, 2, **like_a))


def _make_inputs(
    rows: tuple[int, int],
    time: int,
    chunks: int,
    filters: int | None,
    radius: float,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    arithmetic = torch.float32 if dtype.itemsize == 2 else dtype
    shape = (*rows, chunks, *([] if filters is None else [filters]))
    angle = math.pi * torch.rand(*shape, generator=generator, dtype=arithmetic)
    a = torch.stack([-2 * radius * angle.cos(), torch.full_like(angle, radius**2)], -1)
    b = torch.randn(*shape, 3, generator=generator, dtype=arithmetic)
    x, gy = torch.randn(2, *rows, time, generator=generator, dtype=arithmetic).to(dtype)
    return x, a, b, gy


class Expected(NamedTuple):
    """A result in float64, and how far from it rounding may take each element."""

    value: Tensor
    budget: Tensor


# How often a term of one step of the recursion may be rounded: 5 times in order (a product and four sums),
# and some more where a kernel enters a tile with a state that it has combined from others.
_ROUNDINGS = 8


def expected_results(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    gy: Tensor,
    state: IIRState | None = None,
    gend: IIRState | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Expected]:
    """The results of ``ops.iir_scan_with_state`` and their gradients.

    These are ``y`` and the state ``end_y``, ``end_x`` after the last sample, and for their cotangents, ``gy``
    and ``gend``, the gradients ``gx``, ``ga``, ``gb`` and ``gstate_y``, ``gstate_x``, to the state before the
    first sample. Both states are zero by default, as in ``ops.iir_scan``.

    The recursion of a filter is ``A y = B x + s``, with signals that begin two samples before the first:
    there, A is 1, B is 0 and s is the state; elsewhere s is 0. A kernel rounds each step: what it computes
    solves ``A z = B x + s + d`` with ``|d| <= e (|B| |x| + |A - 1| |y|)``, e a few units of rounding. Hence
    ``|z - y| <= |A^-1| |d|``, where ``|A^-1|`` holds the absolute impulse responses: the error of a step is
    filtered like a sample. The sum over a bank of F filters is rounded F - 1 times more.

    Backward, ``l = A^-T g`` has the same bound with the transposes; g is gy, and gend where the last two
    samples of y lie, which for T < 2 are the state's. ``gx = B^T l``, and gend likewise, adds the rounding of
    its products and of their sums, over a bank's filters too. Before the first sample, l and gx are the
    gradients of the state. The gradient of a coefficient adds the rounding of ``sum l[t] y[t-i]`` over its
    chunk, n terms in any order. The y of a single filter is read as it was stored, in half precision rounded
    once more; a bank's are computed again.

    The matrices are dense, ``(T + 2, T + 2)`` for each row of coefficients: for small sizes only. A packed
    call is expected to give what its sequences give one by one.
    """
    x, a, gy = x.detach(), a.detach(), gy.detach()
    b = None if b is None else b.detach()
    zero = IIRState(*map(torch.zeros_like, make_state(x, a, cu_seqlens)))
    state = zero if state is None else IIRState(*(part.detach() for part in state))
    gend = zero if gend is None else IIRState(*(part.detach() for part in gend))
    call = _Call(x, a, b, gy, state, gend, chunk, carry)
    if cu_seqlens is None:
        return _expected_of_rows(call)

    bounds = list(pairwise(cu_seqlens.tolist()))
    chunks = [1 if chunk is None else -(-(end - begin) // chunk) for begin, end in bounds]
    first_chunk = [0, *accumulate(chunks)]

    def one_for_all(coefficients: Tensor) -> bool:
        return chunk is None and coefficients.shape[2] == 1

    def of_sequence(s: int, coefficients: Tensor) -> Tensor:
        if one_for_all(coefficients):
            return coefficients
        return coefficients[:, :, first_chunk[s] : first_chunk[s + 1]]

    parts = [
        _expected_of_rows(
            call._replace(
                x=x[..., begin:end],
                a=of_sequence(s, a),
                b=None if b is None else of_sequence(s, b),
                gy=gy[..., begin:end],
                state=IIRState(state.y[s : s + 1], state.x[s : s + 1]),
                gend=IIRState(gend.y[s : s + 1], gend.x[s : s + 1]),
            ),
            sequences=len(bounds),
        )
        for s, (begin, end) in enumerate(bounds)
    ]

    def join(name: str, tensors: list[Tensor]) -> Tensor:
        coefficients = {"ga": a, "gb": b}.get(name)
        if coefficients is not None and one_for_all(coefficients):
            return torch.stack(tensors).sum(0)
        return torch.cat(tensors, {"y": -1, "gx": -1, "ga": 2, "gb": 2}.get(name, 0))

    return {
        name: Expected(
            join(name, [part[name].value for part in parts]),
            join(name, [part[name].budget for part in parts]),
        )
        for name in parts[0]
    }


class _Call(NamedTuple):
    x: Tensor
    a: Tensor
    b: Tensor | None
    gy: Tensor
    state: IIRState
    gend: IIRState
    chunk: int | None
    carry: bool


def _expected_of_rows(call: _Call, sequences: int = 1) -> dict[str, Expected]:
    """For a call that is not packed, perhaps with one of several sequences that share coefficients."""
    values, errors = _values(call), _errors(call, sequences)
    expected = {}
    for name, value in values.items():
        dtype = call.x.dtype if name in ("y", "gx") else call.a.dtype
        stored = torch.finfo(dtype)
        budget = errors[name] + stored.eps * (value.abs() + stored.tiny)
        oracle = 2 if dtype == torch.float64 else 1  # it errs as well
        expected[name] = Expected(value, oracle * budget)
    expected["end_x"] = Expected(values["end_x"], torch.zeros_like(values["end_x"]))  # a copy
    return expected


def _values(call: _Call) -> dict[str, Tensor]:
    """Each result of the reference, in float64."""
    x, a, b, gy, state, gend, chunk, carry = call
    inputs = {"gx": x, "ga": a, "gb": b, "gstate_y": state.y, "gstate_x": state.x}
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items() if t is not None}
    y, end = reference.iir_scan_with_state(
        leaves["gx"],
        leaves["ga"],
        leaves.get("gb"),
        IIRState(leaves["gstate_y"], leaves["gstate_x"]),
        chunk=chunk,
        carry=carry,
    )
    gradients = torch.autograd.grad(
        (y, *end),
        list(leaves.values()),
        (gy.double(), gend.y.double(), gend.x.double()),
        materialize_grads=True,  # of coefficients that no sample meets
    )
    outputs = {"y": y.detach(), "end_y": end.y.detach(), "end_x": end.x.detach()}
    return {**outputs, **dict(zip(leaves, gradients, strict=True))}


def _errors(call: _Call, sequences: int) -> dict[str, Tensor]:
    """How far arithmetic may take each result from its value: see ``expected_results``.

    All in float64 and with an axis of filters: signals are (B, C, F|1, T + 2) and hold sample t at t + 2,
    matrices are (B|1, C|1, F, T + 2, T + 2).
    """
    x, a, b, gy, state, gend, chunk, carry = call
    bank = a.dim() == 5
    filters = a.shape[3] if bank else 1
    time = x.shape[-1]
    arithmetic, stored = torch.finfo(a.dtype), torch.finfo(x.dtype)
    t = torch.arange(time, device=x.device)
    k = torch.zeros_like(t) if chunk is None else t // chunk
    in_chunk = (k.unsqueeze(-1) == torch.arange(a.shape[2], device=x.device)).double()  # (T, K)

    def is_history(lag: int) -> Tensor:
        """(T,), 1 or 0: whether sample t - lag counts for sample t."""
        start = 0 if chunk is None else k * chunk
        return ((k == 0) | (t - lag >= start) | carry).double()

    def rounded(magnitude: Tensor, roundings: int = _ROUNDINGS) -> Tensor:
        # A subnormal number may be flushed to zero: an error of up to tiny.
        return roundings * (arithmetic.eps / 2 * magnitude + arithmetic.tiny)

    def with_filters(tensor: Tensor, dim: int) -> Tensor:
        return tensor.double() if bank else tensor.double().unsqueeze(dim)

    def matrix(coefficients: Tensor, lags: range) -> Tensor:
        per_sample = with_filters(coefficients, 3)[:, :, k].movedim(2, 3)  # (B|1, C|1, F, T, taps)
        diagonals = [
            torch.diag_embed(pad(tap * is_history(lag), (2 - lag, 0)), offset=-lag)
            for lag, tap in zip(lags, per_sample.unbind(-1), strict=True)
        ]
        return torch.stack(diagonals).sum(0)

    def apply(matrix: Tensor, signal: Tensor) -> Tensor:
        return (matrix @ signal.unsqueeze(-1)).squeeze(-1)

    feedback = matrix(a, range(1, 3))
    all_pole = torch.tensor([1.0, 0.0, 0.0], device=x.device).expand(*a.shape[:-1], 3)
    taps = matrix(all_pole if b is None else b, range(3))
    eye = torch.eye(time + 2, dtype=torch.float64, device=x.device)
    inverse = torch.linalg.solve_triangular(eye + feedback, eye, upper=False, unitriangular=True)
    feedback, decay = feedback.abs(), inverse.abs()

    state_y, state_x = with_filters(state.y, 2).flip(-1), state.x.double().unsqueeze(2).flip(-1)
    xs = torch.cat([state_x, x.double().unsqueeze(2)], -1)
    ys = apply(inverse, apply(taps, xs) + pad(state_y, (0, time)))
    magnitudes = apply(taps.abs(), xs.abs()) + apply(feedback, ys.abs())
    error_ys = apply(decay, pad(rounded(magnitudes[..., 2:]), (2, 0)))  # the state is exact

    ends = torch.ones(2, dtype=torch.float64, device=x.device)  # the last two samples, of the final state
    if time > 0:
        ends[0] = is_history(1)[-1]  # else the older one is zero there
    gend_ys = pad(with_filters(gend.y, 2).flip(-1) * ends, (time, 0))
    gend_xs = pad(gend.x.double().flip(-1) * ends, (time, 0))
    gys = pad(gy.double().unsqueeze(2), (2, 0))
    ls = apply(inverse.mT, gys + gend_ys).abs()
    error_ls = apply(decay.mT, rounded(gys.abs() + gend_ys.abs() + apply(feedback.mT, ls)))
    sums = _ROUNDINGS + 3 * (filters - 1)  # tap after tap, each of every filter
    error_gxs = apply(taps.abs().mT, error_ls + rounded(ls, sums)).sum(2) + rounded(gend_xs.abs(), sums)

    saved = ys[..., 2:].abs()
    error_saved = error_ys
    if x.dtype.itemsize == 2 and filters == 1:
        error_saved = error_ys + pad(stored.eps * (saved + stored.tiny), (2, 0))

    def sum_budget(coefficients: Tensor, lags: range, signal: Tensor, error: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1] // max(1, coefficients.shape[0] * coefficients.shape[1])
        terms = (time if chunk is None else min(chunk, time)) + rows * sequences
        l, error_l = ls[..., 2:], error_ls[..., 2:]  # noqa: E741
        budgets = []
        for lag in lags:
            past = slice(2 - lag, 2 - lag + time)
            magnitude = signal[..., past].abs() * is_history(lag)
            budget = error_l * magnitude + (l + error_l) * (error[..., past] * is_history(lag))
            budgets.append((budget + rounded(l * magnitude, terms)) @ in_chunk)
        budget = torch.stack(budgets, -1).movedim(3, 2)  # (B, C, K, F, taps)
        return (budget if bank else budget.squeeze(3)).sum_to_size(coefficients.shape)

    error_end_y, error_gstate_y = (error_ys[..., -2:] * ends).flip(-1), error_ls[..., :2].flip(-1)
    errors = {
        "y": error_ys[..., 2:].sum(2) + rounded(saved.sum(2), filters - 1),
        "end_y": error_end_y if bank else error_end_y.squeeze(2),
        "end_x": torch.zeros_like(state.x, dtype=torch.float64),
        "gx": error_gxs[..., 2:],
        "ga": sum_budget(a, range(1, 3), ys, error_saved),
        "gstate_y": error_gstate_y if bank else error_gstate_y.squeeze(2),
        "gstate_x": error_gxs[..., :2].flip(-1),
    }
    if b is not None:
        errors["gb"] = sum_budget(b, range(3), xs, torch.zeros_like(xs))
    return errors


def check(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    gy: Tensor | None = None,
    *,
    state: IIRState | None = None,
    with_state: bool = False,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
    impl: Impl | None = None,
) -> dict[str, Tensor]:
    """Assert that ``ops.iir_scan`` and each of its gradients are within budget; return them by name.

    With a ``state``, or where ``with_state`` asks for it, so are the results and gradients of
    ``ops.iir_scan_with_state`` for a random cotangent of the final state, and the gradients of the state.
    """
    gy = torch.randn_like(x) if gy is None else gy
    inputs = {"gx": x, "ga": a, "gb": b}
    if state is not None:
        inputs |= {"gstate_y": state.y, "gstate_x": state.x}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    filters = leaves["gx"], leaves["ga"], leaves.get("gb")
    options = {"chunk": chunk, "carry": carry, "cu_seqlens": cu_seqlens}

    if state is None and not with_state:
        gend = None
        outputs, cotangents = {"y": ops.iir_scan(*filters, **options, impl=impl)}, [gy]
    else:
        gend = make_state(x, a, cu_seqlens, seed=2)
        start = None if state is None else IIRState(leaves["gstate_y"], leaves["gstate_x"])
        y, end = ops.iir_scan_with_state(*filters, start, **options, impl=impl)
        outputs, cotangents = {"y": y, "end_y": end.y, "end_x": end.x}, [gy, *gend]
    gradients = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), cotangents, materialize_grads=True
    )
    results = {name: output.detach() for name, output in outputs.items()}
    results |= zip(leaves, gradients, strict=True)
    expected = expected_results(x, a, b, gy, state, gend, **options)
    for name, result in results.items():
        assert_matches_reference(result, *expected[name], name=name)
    return results
