"""iir_scan and its relatives of generated arguments: a right answer, or a refusal in words."""

from itertools import accumulate

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    TAME,
    Made,
    arithmetic_of,
    assert_same_finiteness,
    assert_within,
    check_generated,
    check_raw,
    drawn,
    found_in,
    in_float64,
    kinds_of,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.ops.iir_scan import KERNELS
from fastkit.testing.iir_scan import expected_results

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

ROWS, TIMES = (1, 1, 2, 3, 5, 17, 0), (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 40)
POLES = *["poles"] * 12, "normal", "integers", "zeros", "huge", "subnormal", "nan", "inf"
CHUNKS = None, None, 1, 2, 3, 16, 50, 2**31 - 1


def filters_of(choose, shape, dtype):
    """a and perhaps b, of the shape but for the taps."""
    dtype = arithmetic_of(dtype)
    narrow = [choose((size, 1)) if axis < 2 else size for axis, size in enumerate(shape)]
    a = drawn(choose, *narrow, 2, dtype=dtype, kind=POLES)
    narrow = [choose((size, 1)) if axis < 2 else size for axis, size in enumerate(shape)]
    return a, drawn(choose, *narrow, 3, dtype=dtype) if choose((False, True, True)) else None


def state_of(choose, rows, filters, dtype):
    if choose((False, True)):
        return None
    dtype = arithmetic_of(dtype)
    return IIRState(drawn(choose, *rows, *filters, 2, dtype=dtype), drawn(choose, *rows, 2, dtype=dtype))


def scan_call(choose):
    op = choose((iir_scan, iir_scan_with_state))
    dtype, B, C, T = choose(OF_CALLS), choose(ROWS), choose(ROWS), choose(TIMES)
    chunk, filters = choose(CHUNKS), choose(((), (), (1,), (2,), (3,)))
    if op is iir_scan_with_state and choose(range(12)) == 11:
        T = 0
    call = {"chunk": chunk, "carry": choose((True, False)), "cu_seqlens": None, "check_stable": False}
    K, batch = 1 if chunk is None else -(-T // chunk), B
    if choose((False, False, True)):
        lengths = [choose((*TIMES, 0, 0)) for _ in range(choose((1, 2, 3, 5)))]
        offsets = [0, *accumulate(lengths)]
        if choose(range(8)) == 7:
            offsets[choose(range(len(offsets)))] += choose((-3, -1, 1, 2**31 - 50))
        B, T, batch = 1, sum(lengths), len(lengths)
        K = choose((1, batch)) if chunk is None else sum(-(-length // chunk) for length in lengths)
        layout = choose(("dense", "dense", "stepped", "offset"))
        dtype_of = choose((torch.int32, torch.int64))
        call["cu_seqlens"] = Made((batch + 1,), dtype_of, layout=layout, values=tuple(offsets))
    call["x"] = drawn(choose, B, C, T, dtype=dtype)
    call["a"], call["b"] = filters_of(choose, (B, C, K, *filters), dtype)
    if op is iir_scan_with_state:
        call["state"] = state_of(choose, (batch, C), filters, dtype)
    if choose(range(12)) == 11:
        call["check_stable"] = True
    return op, spoiled(choose, call)


def step_call(choose):
    dtype, B, C, filters = choose(OF_CALLS), choose(ROWS), choose(ROWS), choose(((), (), (1,), (2,), (3,)))
    a, b = filters_of(choose, (B, C, *filters), dtype)
    call = {"x_t": drawn(choose, B, C, dtype=dtype), "a": a, "b": b}
    return iir_step, spoiled(choose, call | {"state": state_of(choose, (B, C), filters, dtype)})


def sos_call(choose):
    dtype, T, S = choose(OF_CALLS), choose(TIMES), choose((1, 1, 2, 3, 5))
    rows = choose(((), (1,), (3,), (17,), (2, 3), (2, 5), (2, 1, 3), (0,), (3, 0)))
    sos = drawn(choose, S, 6, dtype=arithmetic_of(dtype), kind=SECTIONS)
    return sosfilt, spoiled(choose, {"x": drawn(choose, *rows, T, dtype=dtype), "sos": sos})


SECTIONS = *["sections"] * 8, "normal", "zeros", "nan", "inf", "huge"


def any_call(choose):
    return choose((scan_call, scan_call, scan_call, step_call, sos_call))(choose)


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, CHECKS[op], also=("iir_scan",))


def check_scan(call, found, plain):
    kinds = kinds_of(call)
    if "huge" in kinds or call["a"].kind == "large":  # which overflow on the way
        return
    arguments = plain_values(found.arguments, None)
    x, state = arguments["x"], arguments.get("state")
    if not kinds <= {*TAME, "poles"} or not x.numel():
        return check_finiteness(found, plain, bool(x.numel()))
    gy, gend = cotangents_of(found)
    options = {name: call[name] for name in ("chunk", "carry")}
    expected = expected_results(
        x, arguments["a"], arguments["b"], gy, state, gend, cu_seqlens=arguments["cu_seqlens"], **options
    )
    compare(found, plain, expected)


def check_step(call, found, plain):
    kinds = kinds_of(call)
    if "huge" in kinds or call["a"].kind == "large":  # which overflow on the way
        return
    arguments = plain_values(found.arguments, None)
    if not kinds <= {*TAME, "poles"} or not arguments["x_t"].numel():
        return check_finiteness(found, plain, bool(arguments["x_t"].numel()))
    x, a, b = arguments["x_t"], arguments["a"], arguments["b"]
    gy, gend = cotangents_of(found)
    longer = x.unsqueeze(-1), a.unsqueeze(2), None if b is None else b.unsqueeze(2), gy.unsqueeze(-1)
    expected = expected_results(*longer, arguments["state"], gend)
    for name in expected.keys() & {"y", "gx"}:
        expected[name] = type(expected[name])(*(t.squeeze(-1) for t in expected[name]))
    for name in expected.keys() & {"ga", "gb"}:
        expected[name] = type(expected[name])(*(t.squeeze(2) for t in expected[name]))
    compare(found, plain, expected)


NAMES = {
    "result": "y", "[0]": "y", "[1].y": "end_y", "[1].x": "end_x", "x": "gx", "x_t": "gx", "a": "ga",
    "b": "gb", "state.y": "gstate_y", "state.x": "gstate_x", "state[0]": "gstate_y", "state[1]": "gstate_x",
}  # fmt: skip


def cotangents_of(found):
    given = {NAMES[place]: t for place, t in found.cotangents.items()}
    return given["y"], IIRState(given["end_y"], given["end_x"]) if "end_y" in given else None


def compare(found, plain, expected):
    for answer in (found, plain):
        for place, result in answer.results.items():
            assert_within(result, *expected[NAMES[place]], place)
    if not all(result.isfinite().all() for result in found.results.values()):
        return  # a y that overflows as it is stored is read again in backward
    for path, gradient in found.gradients.items():
        assert_within(gradient, *expected[NAMES[path]], f"the gradient of {path}")


def check_finiteness(found, plain, some):
    """NaN is where it is in the reference, numbers beside it are numbers, and without samples all is equal.

    In backward a NaN stays in its row.
    """
    for place, result in found.results.items():
        assert_same_finiteness(result, plain.results[place], place)
        assert some or torch.equal(result.nan_to_num(), plain.results[place].nan_to_num())
    for path in found.gradients.keys() & {"x", "x_t"}:
        gradient = found.gradients[path]
        rows = torch.ones(gradient.shape[:2], dtype=torch.bool)
        for _, tensor in found_in(found.arguments, torch.Tensor):
            if tensor.is_floating_point():
                finite = tensor.isfinite().flatten(2).all(2) if tensor.dim() > 2 else tensor.isfinite()
                rows &= finite if len(finite) in (1, len(rows)) else finite.all(0, keepdim=True)
        expected = plain.gradients[path]  # which may overflow as it is stored
        assert (gradient.isfinite() | ~expected.isfinite())[rows].all()


def check_sections(call, found, plain):
    """Each section as iir_scan; an error is filtered by the absolute responses of those after it."""
    kinds = kinds_of(call)
    if "huge" in kinds or not found.arguments["x"].numel():
        return
    if not kinds <= {*TAME, "sections"}:
        return
    x, sos = (plain_values(found.arguments[name], None) for name in ("x", "sos"))
    rows = x.reshape(1, -1, x.shape[-1])
    T, stored = rows.shape[-1], torch.finfo(x.dtype)
    info = torch.finfo(arithmetic_of(x.dtype))
    value, error = rows.double(), torch.zeros_like(rows, dtype=torch.float64)
    impulse = torch.eye(1, T, dtype=torch.float64).unsqueeze(0)
    for section in sos.double():
        a, b = (section[4:] / section[3])[None, None, None], (section[:3] / section[3])[None, None, None]
        response = iir_scan(impulse, a, b, impl="reference").abs().squeeze()
        poles = iir_scan(impulse, a, impl="reference").abs().squeeze()
        toeplitz = [rows_of(taps.reshape(T)) for taps in (response, poles)]
        given = value.abs()
        value = iir_scan(value, a, b, impl="reference")
        size = filtered(given, b.abs()) + filtered(value.abs(), torch.cat([0 * a[..., :1], a.abs()], -1))
        error = error @ toeplitz[0] + (10 * (info.eps / 2 * size + info.tiny)) @ toeplitz[1]
        if x.dtype.itemsize == 2 and rows.shape[1] <= 4:
            error = error + stored.eps * (value.abs() + stored.tiny)  # sections one by one, each rounded
            if (value.abs() >= stored.max).any():
                return
    budget = 2 * (error + stored.eps * (value.abs() + stored.tiny))
    for answer in (found, plain):
        assert_within(answer.results["result"], value.view_as(x), budget.view_as(x), "result")
    if kinds <= {"normal", "integers", "sections"} and x.dtype.itemsize > 2:
        exact = in_float64(sosfilt, found)
        for path, gradient in found.gradients.items():
            value = exact.gradients[path]
            budget = 2.0**12 * info.eps * value.abs().max()
            assert_within(gradient, value, budget.expand(value.shape), f"the gradient of {path}")


def rows_of(response):
    """A matrix that a row of samples is multiplied by: row s is the response from sample s on."""
    late = torch.arange(len(response))
    return torch.stack([torch.roll(response, s).where(late >= s, 0.0) for s in range(len(response))])


def filtered(signal, taps):
    return iir_scan(signal, torch.zeros(1, 1, 1, 2, dtype=torch.float64), taps, impl="reference")


CHECKS = {
    iir_scan: check_scan,
    iir_scan_with_state: check_scan,
    iir_step: check_step,
    sosfilt: check_sections,
}


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


SIGNAL = torch.ones(1, 1, 5), torch.zeros(1, 1, 1, 2)


def test_check_stable_is_a_bool():
    for value in (torch.tensor([1, 2]), None, 1):
        with pytest.raises(TypeError, match=r"^iir_scan: check_stable must be True or False, got"):
            iir_scan(*SIGNAL, check_stable=value)


def test_what_reads_values_is_refused_on_the_meta_device():
    x, a = (t.to("meta") for t in SIGNAL)
    with pytest.raises(
        RuntimeError, match=r"^iir_scan: check_stable=True reads values, got a on the meta device"
    ):
        iir_scan(x, a, check_stable=True)
    with pytest.raises(
        RuntimeError, match=r"^iir_scan: cu_seqlens must have values, got a tensor on the meta"
    ):
        iir_scan(x, a, cu_seqlens=torch.tensor([0, 5]).to("meta"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_refused_offsets_are_told_in_the_op_s_words_alone(impl):
    with pytest.raises(
        RuntimeError, match=r"^iir_scan: cu_seqlens must end at the number of samples, 5, got 3;"
    ):
        iir_scan(*SIGNAL, cu_seqlens=torch.tensor([0, 3]), impl=impl)


# The raw ops


def raw_call(choose):
    name = choose(
        ("iir_scan_fwd", "iir_scan_fwd", "iir_scan_bwd", "iir_scan_bwd", "iir_step_fwd", "sosfilt_fwd")
    )
    dtype, B, C, T = choose(FLOATS), choose(ROWS), choose(ROWS), choose((*TIMES, 0, 130, 300))
    chunk, filters = choose((1, 2, 3, 16, 50, 2**62)), choose(((), (), (1,), (2,), (3,)))
    wide, tame = arithmetic_of(dtype), {"kind": "normal"}

    def of(*shape, dtype=dtype):
        return drawn(choose, *shape, dtype=dtype, **tame)

    def maybe(made):
        return choose((made, made, None))

    if name == "sosfilt_fwd":
        S = choose((1, 2, 3))
        a = drawn(choose, S, 2, dtype=wide, kind="poles")
        call = {"x": of(B, C, T), "a": a, "b": of(S, 3, dtype=wide)}
    elif name == "iir_step_fwd":
        a, b = filters_of(choose, (B, C, *filters), dtype)
        states = of(B, C, *filters, 2, dtype=wide), of(B, C, 2, dtype=wide)
        call = {"x": of(B, C), "a": a, "b": b, "state_y": states[0], "state_x": states[1]}
    else:
        K, batch, offsets = -(-T // chunk) if chunk < 2**62 else 1, B, None
        if choose((False, False, True)):
            lengths = [choose((*TIMES, 0, 0, 150)) for _ in range(choose((1, 2, 3)))]
            B, T, batch = 1, sum(lengths), len(lengths)
            K = choose((1, batch)) if chunk == 2**62 else sum(-(-length // chunk) for length in lengths)
            kind = choose((torch.int32, torch.int64))
            offsets = Made((batch + 1,), kind, values=(0, *accumulate(lengths)))
        a, b = filters_of(choose, (B, C, K, *filters), dtype)
        a = drawn(choose, *a.shape, dtype=wide, kind="poles")
        states = maybe(of(batch, C, *filters, 2, dtype=wide)), maybe(of(batch, C, 2, dtype=wide))
        call = {"x": of(B, C, T), "a": a, "b": b, "state_y": states[0], "state_x": states[1]}
        call |= {"cu_seqlens": offsets, "chunk": chunk, "carry": choose((True, False))}
        if name == "iir_scan_fwd":
            call |= {"needs_end": choose((True, False)), "needs_borders": choose((True, False))}
        else:
            ends = maybe(of(batch, C, *filters, 2, dtype=wide)), maybe(of(batch, C, 2, dtype=wide))
            chunks = batch if offsets is not None and chunk == 2**62 else K
            borders = of(B, T // 128 + chunks + 1, *(filters or (1,)), 2, C, dtype=wide) if filters else None
            first = {"gy": of(B, C, T), "gend_y": ends[0], "gend_x": ends[1], "x": call.pop("x")}
            call = first | {"y": of(B, C, T), "borders": borders} | call
            call |= {"needs_x": choose((True, False)), "needs_coefficients": choose((True, False))}
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    borders = ["[3]"] if name == "iir_scan_fwd" else []  # a bank's own, of which not all are used
    return name, list(call.values()), [], borders


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
