"""iir_scan against its float64 oracle: inputs, and budgets derived from the recursion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit._threads import threads
from fastkit.reference import IIRState
from fastkit.testing import Expected, Size, assert_matches_reference


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
    arithmetic = torch.promote_types(dtype, torch.float32)
    shape = (*rows, chunks, *([] if filters is None else [filters]))
    angle = math.pi * torch.rand(*shape, generator=generator, dtype=arithmetic)
    a = torch.stack([-2 * radius * angle.cos(), torch.full_like(angle, radius**2)], -1)
    b = torch.randn(*shape, 3, generator=generator, dtype=arithmetic)
    x, gy = torch.randn(2, *rows, time, generator=generator, dtype=arithmetic).to(dtype)
    return x.clone(), a, b, gy.clone()  # each with memory of its own: a sanitizer sees where it ends


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

    ``|A^-1|`` is dense, ``(T + 2, T + 2)`` for each row of coefficients: for small sizes only. A packed call
    is expected to give what its sequences give one by one. All is computed on the CPU, sample by sample.
    """
    x, a, gy = (t.detach().cpu() for t in (x, a, gy))
    b = None if b is None else b.detach().cpu()
    zero = IIRState(*map(torch.zeros_like, make_state(x, a, cu_seqlens)))
    state = zero if state is None else IIRState(*(part.detach().cpu() for part in state))
    gend = zero if gend is None else IIRState(*(part.detach().cpu() for part in gend))
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
    with threads(1):
        system = _System(call)
        values, errors = _values(call, system), _errors(call, system, sequences)
    expected = {}
    for name, value in values.items():
        dtype = call.x.dtype if name in ("y", "gx") else call.a.dtype
        stored = torch.finfo(dtype)
        budget = errors[name] + stored.eps * (value.abs() + stored.tiny)
        oracle = 2 if dtype == torch.float64 else 1  # it errs as well
        expected[name] = Expected(value, oracle * budget)
    expected["end_x"] = Expected(values["end_x"], torch.zeros_like(values["end_x"]))  # a copy
    return expected


class _Band(NamedTuple):
    """A matrix in which sample t of the result sees samples t - lag alone: its diagonals by their lags.

    A diagonal is (B|1, C|1, F, T + 2), element t for row t.
    """

    diagonals: dict[int, Tensor]

    def abs(self) -> _Band:
        return _Band({lag: diagonal.abs() for lag, diagonal in self.diagonals.items()})

    def times(self, signal: Tensor) -> Tensor:
        terms = [d * pad(signal, (lag, -lag)) for lag, d in self.diagonals.items()]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def transposed_times(self, signal: Tensor) -> Tensor:
        terms = [pad(d * signal, (-lag, lag)) for lag, d in self.diagonals.items()]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


class _System:
    """The recursion of a call, ``A y = B x + s``, and its adjoint, ``A^T l = g``, solved sample by sample.

    All in float64 and with an axis of filters: signals are (B, C, F|1, T + 2) and hold sample t at t + 2.
    """

    def __init__(self, call: _Call) -> None:
        x, a, b, gy, state, gend, chunk, carry = call
        self.bank = a.dim() == 5
        self.time = x.shape[-1]
        t = torch.arange(self.time, device="cpu")
        self.k = torch.zeros_like(t) if chunk is None else t // chunk
        start = 0 if chunk is None else self.k * chunk
        # (T,), 1 or 0: whether sample t - lag counts for sample t.
        self.is_history = [((self.k == 0) | (t - lag >= start) | carry).double() for lag in range(3)]
        chunks = torch.arange(a.shape[2], device="cpu")
        self.in_chunk = (self.k.unsqueeze(-1) == chunks).double()  # (T, K)

        all_pole = torch.tensor([1.0, 0.0, 0.0], device="cpu").expand(*a.shape[:-1], 3)
        self.feedback = self._band(a, range(1, 3))  # A - 1
        self.taps = self._band(all_pole if b is None else b, range(3))  # B
        self.xs = torch.cat([state.x.flip(-1), x], -1).double().unsqueeze(2)
        state_y = pad(self.with_filters(state.y, 2).flip(-1), (0, self.time))
        self.ys = self.solve(self.taps.times(self.xs) + state_y)

        self.ends = torch.ones(2, dtype=torch.float64, device="cpu")  # the last two samples, a final state
        if self.time > 0:
            self.ends[0] = self.is_history[1][-1]  # else the older one is zero there
        self.gys = pad(gy.double().unsqueeze(2), (2, 0))
        self.gend_ys = pad(self.with_filters(gend.y, 2).flip(-1) * self.ends, (self.time, 0))
        self.gend_xs = pad(gend.x.double().flip(-1) * self.ends, (self.time, 0))
        self.ls = self.solve_transposed(self.gys + self.gend_ys)

    def with_filters(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.double() if self.bank else tensor.double().unsqueeze(dim)

    def without_filters(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor if self.bank else tensor.squeeze(dim)

    def _band(self, coefficients: Tensor, lags: range) -> _Band:
        per_sample = self.with_filters(coefficients, 3)[:, :, self.k].movedim(2, 3)  # (B|1, C|1, F, T, taps)
        taps = zip(lags, per_sample.unbind(-1), strict=True)
        return _Band({lag: pad(tap * self.is_history[lag], (2, 0)) for lag, tap in taps})

    def solve(self, right: Tensor) -> Tensor:
        """``A^-1 right``."""
        first, second = (-self.feedback.diagonals[lag] for lag in (1, 2))
        return _recursion(first.unbind(-1), second.unbind(-1), right.unbind(-1)).movedim(0, -1)

    def inverse(self) -> Tensor:
        """``A^-1``, (B|1, C|1, F, T + 2, T + 2): row by row."""
        first, second = (-self.feedback.diagonals[lag].unsqueeze(-2) for lag in (1, 2))
        eye = torch.eye(self.time + 2, dtype=torch.float64, device="cpu")
        return _recursion(first.unbind(-1), second.unbind(-1), eye.unbind()).movedim(0, -2)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``A^-T right``, from the last sample to the first."""
        first, second = (pad(-self.feedback.diagonals[lag], (-lag, lag)).unbind(-1)[::-1] for lag in (1, 2))
        return _recursion(first, second, right.unbind(-1)[::-1]).flip(0).movedim(0, -1)

    def sum_over_chunks(self, terms: list[Tensor], like: Tensor) -> Tensor:
        """Of samples, (B, C, F, T) for each tap, to the shape of these coefficients."""
        sums = torch.stack([term @ self.in_chunk for term in terms], -1).movedim(3, 2)  # (B, C, K, F, taps)
        return self.without_filters(sums, 3).sum_to_size(like.shape)


def _recursion(first: Sequence[Tensor], second: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """y[i] = right[i] + first[i] y[i-1] + second[i] y[i-2]."""
    y1 = y2 = torch.zeros_like(right[0])
    ys = []
    for f1, f2, u in zip(first, second, right, strict=True):
        y1, y2 = torch.addcmul(torch.addcmul(u, f2, y2), f1, y1), y1
        ys.append(y1)
    return torch.stack(ys)


def _values(call: _Call, system: _System) -> dict[str, Tensor]:
    """Each result: what ``reference.iir_scan_with_state`` and autograd through it give."""
    a, b = call.a, call.b
    ys, ls, ends = system.ys, system.ls, system.ends
    gxs = system.taps.transposed_times(ls).sum(2) + system.gend_xs

    def gradients(coefficients: Tensor, lags: range, signal: Tensor) -> Tensor:
        past = {lag: signal[..., 2 - lag : 2 - lag + system.time] * system.is_history[lag] for lag in lags}
        return system.sum_over_chunks([ls[..., 2:] * past[lag] for lag in lags], coefficients)

    values = {
        "y": ys[..., 2:].sum(2),
        "end_y": system.without_filters((ys[..., -2:] * ends).flip(-1), 2),
        "end_x": (system.xs[:, :, 0, -2:] * ends).flip(-1),
        "gx": gxs[..., 2:],
        "ga": -gradients(a, range(1, 3), ys),
        "gstate_y": system.without_filters(ls[..., :2].flip(-1), 2),
        "gstate_x": gxs[..., :2].flip(-1),
    }
    if b is not None:
        values["gb"] = gradients(b, range(3), system.xs)
    return values


def _errors(call: _Call, system: _System, sequences: int) -> dict[str, Tensor]:
    """How far arithmetic may take each result from its value: see ``expected_results``."""
    x, a, b = call.x, call.a, call.b
    arithmetic, stored = torch.finfo(a.dtype), torch.finfo(x.dtype)
    filters, time = system.ys.shape[2], system.time

    def rounded(magnitude: Tensor, roundings: int = _ROUNDINGS) -> Tensor:
        # A subnormal number may be flushed to zero: an error of up to tiny.
        return roundings * (arithmetic.eps / 2 * magnitude + arithmetic.tiny)

    decay = system.inverse().abs_()
    feedback, taps = system.feedback.abs(), system.taps.abs()
    xs, ys, ls = system.xs.abs(), system.ys.abs(), system.ls.abs()

    magnitudes = taps.times(xs) + feedback.times(ys)
    error_ys = _product(decay, pad(rounded(magnitudes[..., 2:]), (2, 0)))  # the state is exact
    gradients = system.gys.abs() + system.gend_ys.abs() + feedback.transposed_times(ls)
    error_ls = _product(decay.mT, rounded(gradients))
    sums = _ROUNDINGS + 3 * (filters - 1)  # tap after tap, each of every filter
    error_gxs = taps.transposed_times(error_ls + rounded(ls, sums)).sum(2)
    error_gxs = error_gxs + rounded(system.gend_xs.abs(), sums)

    saved = ys[..., 2:]
    error_saved = error_ys
    if x.dtype.itemsize == 2 and filters == 1:
        error_saved = error_ys + pad(stored.eps * (saved + stored.tiny), (2, 0))

    def sum_budget(coefficients: Tensor, lags: range, signal: Tensor, error: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1] // max(1, coefficients.shape[0] * coefficients.shape[1])
        terms = (time if call.chunk is None else min(call.chunk, time)) + rows * sequences
        l, error_l = ls[..., 2:], error_ls[..., 2:]  # noqa: E741
        budgets = []
        for lag in lags:
            past = slice(2 - lag, 2 - lag + time)
            magnitude = signal[..., past] * system.is_history[lag]
            budget = error_l * magnitude + (l + error_l) * (error[..., past] * system.is_history[lag])
            budgets.append(budget + rounded(l * magnitude, terms))
        return system.sum_over_chunks(budgets, coefficients)

    errors = {
        "y": error_ys[..., 2:].sum(2) + rounded(saved.sum(2), filters - 1),
        "end_y": system.without_filters((error_ys[..., -2:] * system.ends).flip(-1), 2),
        "end_x": torch.zeros_like(call.state.x, dtype=torch.float64),
        "gx": error_gxs[..., 2:],
        "ga": sum_budget(a, range(1, 3), ys, error_saved),
        "gstate_y": system.without_filters(error_ls[..., :2].flip(-1), 2),
        "gstate_x": error_gxs[..., :2].flip(-1),
    }
    if b is not None:
        errors["gb"] = sum_budget(b, range(3), xs, torch.zeros_like(xs))
    return errors


def _product(matrix: Tensor, signal: Tensor) -> Tensor:
    """(B|1, C|1, F, T + 2, T + 2) by (B, C, F, T + 2): what shares a matrix is its columns."""
    columns = signal[..., None, None]
    shared = [dim for dim in (0, 1) if matrix.shape[dim] == 1]
    for dim in shared:
        columns = columns.transpose(dim, 4 + dim)
    product = (matrix @ columns.flatten(-2)).unflatten(-1, columns.shape[-2:])
    for dim in shared:
        product = product.transpose(dim, 4 + dim)
    return product[..., 0, 0]


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
