"""What iir_scan and its relatives refuse, and in which words."""

import math

import pytest
import torch

from fastkit.ops import IIRState, iir_scan, iir_scan_with_state, iir_step, sosfilt
from fastkit.testing import Size
from fastkit.testing.iir_scan import make_inputs

pytestmark = pytest.mark.native


class DTensor(torch.Tensor):
    """Has the name by which the op knows one; the real class needs a process group."""


def zeros(*shape, **options):
    return torch.zeros(shape, device="cpu", **options)


def refusal(error, op, *args, **options):
    with pytest.raises(error) as caught:
        op(*args, **options)
    return str(caught.value)


# iir_scan

X, A, B = zeros(2, 3, 9), zeros(1, 3, 1, 2), zeros(2, 1, 1, 3)
BANK_A, BANK_B = zeros(1, 3, 1, 4, 2), zeros(2, 1, 1, 4, 3)
UNSTABLE = torch.tensor([(0.0, 0.0), (0.5, 1.25), (0.0, 0.0)])[None, :, None]
PACKED = {"x": zeros(1, 3, 9), "a": zeros(1, 3, 2, 2), "b": None, "cu_seqlens": torch.tensor([0, 4, 9])}
REFUSALS = [
    (TypeError, {"b": B.as_subclass(DTensor)}, "b is a DTensor; pass b.to_local() or b.full_tensor()"),
    (TypeError, {"x": [1.0]}, "x must be a tensor, got list"),
    (TypeError, {"a": None}, "a must be a tensor, got NoneType"),
    (TypeError, {"a": A.to_sparse()}, "a must be dense, got torch.sparse_coo; pass a.to_dense()"),
    (TypeError, {"carry": "no"}, "carry must be True or False, got 'no'"),
    (
        TypeError,
        {"x": X.to(torch.complex64)},
        "x must be real, got torch.complex64; filter x.real and x.imag apart",
    ),
    (TypeError, {"x": X.int()}, "x must be floating point, got torch.int32; cast it to torch.float32"),
    (ValueError, {"x": X[0]}, "x must have shape (B, C, T), got (3, 9); add axes, as in x[None, None]"),
    (
        ValueError,
        {"x": X[..., :0]},
        "x must have T >= 1, got (2, 3, 0); skip the call for T = 0, or take iir_scan_with_state",
    ),
    (TypeError, {"chunk": 3.0}, "chunk must be an int or None, got 3.0"),
    (TypeError, {"chunk": True}, "chunk must be an int or None, got True"),
    (ValueError, {"chunk": 0}, "chunk must be in [1, 2**31), got 0; None is one filter for all T"),
    (ValueError, {"chunk": -4}, "chunk must be in [1, 2**31), got -4; None is one filter for all T"),
    (
        ValueError,
        {"chunk": 2**31},
        "chunk must be in [1, 2**31), got 2147483648; None is one filter for all T",
    ),
    (
        RuntimeError,
        {"a": A.to("meta")},
        "a must be on the device of x, cpu, got meta; move it with a.to(x.device)",
    ),
    (
        TypeError,
        {"x": X.bfloat16(), "a": A.bfloat16()},
        "a must be torch.float32 for x of torch.bfloat16, got torch.bfloat16;"
        " cast it with a.to(torch.float32)",
    ),
    (
        TypeError,
        {"x": X.half(), "b": B.half()},
        "b must be torch.float32 for x of torch.float16, got torch.float16; cast it with b.to(torch.float32)",
    ),
    (
        TypeError,
        {"b": B.double()},
        "b must be torch.float32 for x of torch.float32, got torch.float64; cast it with b.to(torch.float32)",
    ),
    (
        ValueError,
        {"a": zeros(1, 3, 1, 3)},
        "a must hold (a1, a2) of a denominator 1 + a1/z + a2/z^2, got (1, 3, 1, 3);"
        " for (a0, a1, a2) pass a[..., 1:] / a[..., :1] and b / a[..., :1]",
    ),
    (
        ValueError,
        {"a": zeros(1, 3, 1, 4, 3), "b": BANK_B},
        "a must hold (a1, a2) of a denominator 1 + a1/z + a2/z^2, got (1, 3, 1, 4, 3);"
        " for (a0, a1, a2) pass a[..., 1:] / a[..., :1] and b / a[..., :1]",
    ),
    (
        ValueError,
        {"a": A[:, :2]},
        "a must have shape (B|1, C|1, K[, F], 2) = (2|1, 3|1, 1, 2) for x of shape (2, 3, 9)"
        " and chunk=None, got (1, 2, 1, 2); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": A[0]},
        "a must have shape (B|1, C|1, K[, F], 2) = (2|1, 3|1, 1, 2) for x of shape (2, 3, 9)"
        " and chunk=None, got (3, 1, 2); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": A.expand(1, 3, 2, 2), "chunk": 4},
        "a must have shape (B|1, C|1, K[, F], 2) = (2|1, 3|1, 3, 2) for x of shape (2, 3, 9)"
        " and chunk=4, got (1, 3, 2, 2); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": A.expand(1, 3, 3, 2), "chunk": 4},
        "b must have shape (B|1, C|1, K, 3) = (2|1, 3|1, 3, 3) for x of shape (2, 3, 9)"
        " and chunk=4, got (2, 1, 1, 3); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": BANK_A},
        "b must have shape (B|1, C|1, K, F, 3) = (2|1, 3|1, 1, 4, 3) for x of shape (2, 3, 9)"
        " and chunk=None, got (2, 1, 1, 3); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"b": BANK_B},
        "b must have shape (B|1, C|1, K, 3) = (2|1, 3|1, 1, 3) for x of shape (2, 3, 9)"
        " and chunk=None, got (2, 1, 1, 4, 3); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": BANK_A, "b": BANK_B[:, :, :, :3]},
        "b must have shape (B|1, C|1, K, F, 3) = (2|1, 3|1, 1, 4, 3) for x of shape (2, 3, 9)"
        " and chunk=None, got (2, 1, 1, 3, 3); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": BANK_A[:, :, :, :0], "b": None},
        "a must have shape (B|1, C|1, K, F, 2) = (2|1, 3|1, 1, 0, 2) for x of shape (2, 3, 9)"
        " and chunk=None, got (1, 3, 1, 0, 2); K is 1 for chunk=None, else ceil(T / chunk)",
    ),
    (
        ValueError,
        {"a": UNSTABLE, "check_stable": True},
        "a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
        " (a1, a2) = (0.5, 1.25) at a[0, 1, 0]; scale the poles inwards, or leave check_stable=False",
    ),
    (
        ValueError,
        {"a": BANK_A + math.nan, "b": BANK_B, "check_stable": True},
        "a must have its poles inside the unit circle (|a2| < 1 and |a1| < 1 + a2), got"
        " (a1, a2) = (nan, nan) at a[0, 0, 0, 0]; scale the poles inwards, or leave check_stable=False",
    ),
    (ValueError, {"impl": "numpy"}, "impl must be one of reference, cpu, cuda, triton or None, got 'numpy'"),
    # Packed sequences; what only their values tell is below.
    (TypeError, {**PACKED, "cu_seqlens": [0, 4, 9]}, "cu_seqlens must be a tensor, got list"),
    (
        TypeError,
        {**PACKED, "cu_seqlens": torch.tensor([0.0, 4, 9])},
        "cu_seqlens must be int32 or int64, got torch.float32; cast it",
    ),
    (
        ValueError,
        {**PACKED, "cu_seqlens": torch.tensor([[0, 4, 9]])},
        "cu_seqlens must have shape (S + 1,) with S >= 1 sequences, got (1, 3);"
        " it holds where each begins, and the total",
    ),
    (
        ValueError,
        {**PACKED, "cu_seqlens": torch.tensor([0])},
        "cu_seqlens must have shape (S + 1,) with S >= 1 sequences, got (1,);"
        " it holds where each begins, and the total",
    ),
    (
        RuntimeError,
        {**PACKED, "cu_seqlens": torch.tensor([0, 4, 9]).to("meta")},
        "cu_seqlens must be on the device of x, cpu, got meta; move it with cu_seqlens.to(x.device)",
    ),
    (
        ValueError,
        {**PACKED, "x": X},
        "with cu_seqlens x must have shape (1, C, total), got (2, 3, 9);"
        " concatenate the sequences along time",
    ),
    (
        ValueError,
        {**PACKED, "a": zeros(1, 3, 3, 2)},
        "a must have shape (B|1, C|1, K[, F], 2) = (1|1, 3|1, 2|1, 2) for x of shape (1, 3, 9)"
        " and chunk=None, got (1, 3, 3, 2); K is S or 1 for chunk=None, else the sum of ceil(length / chunk)",
    ),
]


@pytest.mark.parametrize(("error", "arguments", "message"), REFUSALS)
def test_scan_refuses(error, arguments, message):
    options = {"x": X, "a": A, "b": B, **arguments}
    tensors = [options.pop(name) for name in ("x", "a", "b")]
    assert refusal(error, iir_scan, *tensors, **options) == f"iir_scan: {message}"


OFFSETS = {
    "later-start": (
        [1, 4, 9],
        "cu_seqlens must start at 0, got 1; it holds S + 1 offsets, the first of them 0",
    ),
    "negative": (
        [0, -1, 9],
        "cu_seqlens must not decrease, got 0 before -1 at index 1; pass cumulative lengths, not",
    ),
    "decreasing": (
        [0, 6, 4, 9],
        "cu_seqlens must not decrease, got 6 before 4 at index 2; pass cumulative lengths",
    ),
    "lengths": (
        [0, 4, 5],
        "cu_seqlens must end at the number of samples, 9, got 5; x must hold exactly the packed",
    ),
    "too-long": (
        [0, 4, 10],
        "cu_seqlens must end at the number of samples, 9, got 10; x must hold exactly the",
    ),
    "huge": (
        [0, 2**62, 9],
        f"cu_seqlens must not decrease, got {2**62} before 9 at index 2; pass cumulative",
    ),
    "wrapping": (
        [0, 2**63 - 1, -5, 9],
        f"cu_seqlens must not decrease, got {2**63 - 1} before -5 at index 2; pass cumulative lengths",
    ),
    "least": ([0, -(2**63), 9], f"cu_seqlens must not decrease, got 0 before {-(2**63)} at index 1; pass"),
}


def skip_on_gpu(impl):
    if impl == "cuda":
        pytest.skip("to look at the values of cu_seqlens would wait for the GPU")


@pytest.mark.parametrize("op", [iir_scan, iir_scan_with_state])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_values_of_cu_seqlens(impl, offsets, chunk, op):
    """Every implementation on the CPU has the same words."""
    skip_on_gpu(impl)
    values, message = OFFSETS[offsets]
    x, cu_seqlens = torch.zeros(1, 3, 9), torch.tensor(values)
    a = torch.zeros(1, 3, 1 if chunk is None else 4, 2)
    with pytest.raises(RuntimeError) as caught:
        op(x, a, chunk=chunk, cu_seqlens=cu_seqlens, impl=impl)
    assert f": {message}" in str(caught.value)


@pytest.mark.parametrize("op", [iir_scan, iir_scan_with_state])
@pytest.mark.parametrize("chunks", [1, 3, 5])
def test_chunks_that_do_not_fit_cu_seqlens(impl, chunks, op):
    """Lengths 4 and 5 in chunks of 3 are 2 and 2 chunks, not the 3 of 9 samples."""
    skip_on_gpu(impl)
    x, a, b = torch.zeros(1, 3, 9), torch.zeros(1, 3, 4, 2), torch.zeros(1, 3, 4, 3)
    options = {"chunk": 3, "cu_seqlens": torch.tensor([0, 4, 9]), "impl": impl}
    assert op(x, a, b, **options) is not None
    message = refusal(RuntimeError, op, x, torch.zeros(1, 3, chunks, 2), None, **options)
    words = (
        f": a must have K = 4 chunks for these cu_seqlens, got {chunks};"
        " chunks restart at every sequence: K is the sum of ceil(length / chunk)"
    )
    assert words in message
    assert ": b must have " in refusal(RuntimeError, op, x, a, torch.zeros(1, 3, chunks, 3), **options)


def test_impl_of_another_device_is_refused():
    for call in (
        lambda: iir_scan(X, A, impl="cuda"),
        lambda: iir_step(X[..., 0], A[:, :, 0], impl="cuda"),
        lambda: sosfilt(X, zeros(1, 6), impl="cuda"),
    ):
        with pytest.raises(RuntimeError, match='impl="cuda" cannot run'):
            call()


@pytest.mark.parametrize("op", [iir_scan, iir_scan_with_state])
def test_check_stable_is_refused_while_compiling(op):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, a: op(x, a, check_stable=True), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="check_stable=True reads values and cannot be compiled"):
        compiled(X, A)


@pytest.mark.parametrize("filters", [None, 3])
def test_check_stable_lets_stable_poles_pass(impl, filters):
    x, a, b, _ = make_inputs(Size(2, 3, 9, 4), filters=filters, radius=0.999)
    options = {"chunk": 4, "impl": impl}
    y, _ = iir_scan_with_state(x, a, b, check_stable=True, **options)
    assert torch.equal(iir_scan(x, a, b, check_stable=True, **options), y)
    assert torch.equal(iir_scan(x, a, b, **options), y)


# iir_scan_with_state

Y_STATE, X_STATE = zeros(2, 3, 2), zeros(2, 3, 2)
STATES = [
    (TypeError, [Y_STATE, X_STATE], "state must be an IIRState(y, x) or None, got list"),
    (TypeError, Y_STATE, "state must be an IIRState(y, x) or None, got Tensor"),
    (TypeError, (Y_STATE, X_STATE, X_STATE), "state must be an IIRState(y, x) or None, got tuple"),
    (TypeError, IIRState(None, X_STATE), "state.y must be a tensor, got None; pass state=None for zeros"),
    (TypeError, IIRState(Y_STATE, None), "state.x must be a tensor, got None; pass state=None for zeros"),
    (TypeError, IIRState(0.0, X_STATE), "state.y must be a tensor, got float"),
    (
        TypeError,
        IIRState(Y_STATE, X_STATE.to_sparse()),
        "state.x must be dense, got torch.sparse_coo; pass state.x.to_dense()",
    ),
    (
        TypeError,
        IIRState(Y_STATE.double(), X_STATE),
        "state.y must be torch.float32 for x of torch.float32, got torch.float64; cast it with"
        " state.y.to(torch.float32)",
    ),
    (
        TypeError,
        IIRState(Y_STATE, X_STATE.half()),
        "state.x must be torch.float32 for x of torch.float32, got torch.float16; cast it with"
        " state.x.to(torch.float32)",
    ),
    (
        RuntimeError,
        IIRState(Y_STATE, X_STATE.to("meta")),
        "state.x must be on the device of x, cpu, got meta; move it with state.x.to(x.device)",
    ),
    (
        ValueError,
        IIRState(Y_STATE[:1], X_STATE),
        "state.y must have shape (B, C, 2) = (2, 3, 2), got (1, 3, 2);"
        " it is what the call before returned for the same rows, or zeros",
    ),
    (
        ValueError,
        IIRState(Y_STATE, X_STATE[:, :2]),
        "state.x must have shape (B, C, 2) = (2, 3, 2), got (2, 2, 2);"
        " it is what the call before returned for the same rows, or zeros",
    ),
    (
        ValueError,
        IIRState(Y_STATE.unsqueeze(2), X_STATE),
        "state.y must have shape (B, C, 2) = (2, 3, 2), got (2, 3, 1, 2);"
        " it is what the call before returned for the same rows, or zeros",
    ),
    (
        ValueError,
        IIRState(Y_STATE, X_STATE[..., :1]),
        "state.x must have shape (B, C, 2) = (2, 3, 2), got (2, 3, 1);"
        " it is what the call before returned for the same rows, or zeros",
    ),
]


@pytest.mark.parametrize(("error", "state", "message"), STATES)
def test_state_refused(error, state, message):
    """By a scan and by a step."""
    assert refusal(error, iir_scan_with_state, X, A, B, state) == f"iir_scan_with_state: {message}"
    step = X[..., 0], A[:, :, 0], B[:, :, 0], state
    assert refusal(error, iir_step, *step) == f"iir_step: {message}"


def test_state_of_a_bank_and_of_packed_sequences_refused():
    of_bank = refusal(ValueError, iir_scan_with_state, X, BANK_A, BANK_B, IIRState(Y_STATE, X_STATE))
    assert "state.y must have shape (B, C, F, 2) = (2, 3, 4, 2), got (2, 3, 2)" in of_bank
    three = torch.tensor([0, 2, 4, 9])
    packed = refusal(
        ValueError, iir_scan_with_state, X[:1], A, None, IIRState(Y_STATE, X_STATE), cu_seqlens=three
    )
    assert "state.y must have shape (S, C, 2) = (3, 3, 2), got (2, 3, 2)" in packed


def test_with_state_refuses_what_scan_does():
    """All but T = 0, in its own name."""
    for error, arguments, message in REFUSALS:
        options = {"x": X, "a": A, "b": B, **arguments}
        if isinstance(options["x"], torch.Tensor) and options["x"].shape[-1] == 0:
            continue
        tensors = [options.pop(name) for name in ("x", "a", "b")]
        got = refusal(error, iir_scan_with_state, *tensors, **options)
        assert got == f"iir_scan_with_state: {message}"


# iir_step

STEPS = [
    (TypeError, {"x": 1.0}, "x must be a tensor, got float"),
    (
        TypeError,
        {"x": X[..., 0].long()},
        "x must be floating point, got torch.int64; cast it to torch.float32",
    ),
    (ValueError, {"x": X}, "x must have shape (B, C), got (2, 3, 9); take x[..., t] of a signal"),
    (
        ValueError,
        {"a": BANK_A, "b": None},
        "a must have shape (B|1, C|1[, F], 2) with (B, C) = (2, 3), got (1, 3, 1, 4, 2);"
        " there is no axis of chunks: pass those of this sample, a[:, :, k]",
    ),
    (
        ValueError,
        {"a": zeros(3, 3, 2)},
        "a must have shape (B|1, C|1[, F], 2) with (B, C) = (2, 3), got (3, 3, 2);"
        " there is no axis of chunks: pass those of this sample, a[:, :, k]",
    ),
    (
        ValueError,
        {"a": zeros(1, 3, 0, 2), "b": None},
        "a must have shape (B|1, C|1[, F], 2) with (B, C) = (2, 3), got (1, 3, 0, 2);"
        " there is no axis of chunks: pass those of this sample, a[:, :, k]",
    ),
    (
        ValueError,
        {"a": zeros(1, 3, 4, 2)},
        "b must have shape (B|1, C|1[, F], 3) with (B, C) = (2, 3), got (2, 1, 3);"
        " there is no axis of chunks: pass those of this sample, a[:, :, k]",
    ),
    (
        TypeError,
        {"a": zeros(1, 3, 2, dtype=torch.float64)},
        "a must be torch.float32 for x of torch.float32, got torch.float64; cast it with a.to(torch.float32)",
    ),
    (ValueError, {"impl": "numpy"}, "impl must be one of reference, cpu, cuda, triton or None, got 'numpy'"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), STEPS)
def test_step_refuses(error, arguments, message):
    options = {"x": X[..., 0], "a": A[:, :, 0], "b": B[:, :, 0], **arguments}
    tensors = [options.pop(name) for name in ("x", "a", "b")]
    assert refusal(error, iir_step, *tensors, **options) == f"iir_step: {message}"


# sosfilt

SECTIONS = zeros(2, 6) + 1
SOS = [
    (TypeError, {"x": None}, "x must be a tensor, got NoneType"),
    (TypeError, {"sos": [[1.0] * 6]}, "sos must be a tensor, got list"),
    (
        TypeError,
        {"x": X.to(torch.complex64)},
        "x must be real, got torch.complex64; filter x.real and x.imag apart",
    ),
    (TypeError, {"x": X.int()}, "x must be floating point, got torch.int32; cast it to torch.float32"),
    (ValueError, {"x": X[0, 0, 0]}, "x must have shape (..., T) with T >= 1, got ()"),
    (ValueError, {"x": X[..., :0]}, "x must have shape (..., T) with T >= 1, got (2, 3, 0)"),
    (
        TypeError,
        {"sos": SECTIONS.double()},
        "sos must be torch.float32 for x of torch.float32, got torch.float64;"
        " cast it with sos.to(torch.float32)",
    ),
    (
        RuntimeError,
        {"sos": SECTIONS.to("meta")},
        "sos must be on the device of x, cpu, got meta; move it with sos.to(x.device)",
    ),
    *(
        (
            ValueError,
            {"sos": sos},
            "sos must have shape (S, 6) with S >= 1 rows (b0, b1, b2, a0, a1, a2), got"
            f' {tuple(sos.shape)}; scipy.signal.butter(..., output="sos") returns it',
        )
        for sos in (SECTIONS[0], SECTIONS[:0], SECTIONS[:, :5], SECTIONS[None])
    ),
    (ValueError, {"impl": "numpy"}, "impl must be one of reference, cpu, cuda, triton or None, got 'numpy'"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), SOS)
def test_sosfilt_refuses(error, arguments, message):
    options = {"x": X, "sos": SECTIONS, **arguments}
    tensors = [options.pop(name) for name in ("x", "sos")]
    assert refusal(error, sosfilt, *tensors, **options) == f"sosfilt: {message}"
