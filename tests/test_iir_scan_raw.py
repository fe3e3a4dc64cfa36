"""Misuse of iir_scan's raw ops: whatever they are given, they raise and do not crash."""

import pytest
import torch

from fastkit.ops.iir_scan_autograd import ONE_CHUNK
from fastkit.testing import Size
from fastkit.testing.iir_scan import make_inputs, make_packed_inputs, make_state

pytestmark = pytest.mark.native


def raw_inputs(filters=None):
    x, a, b, gy = make_inputs(Size(2, 3, 300, 130), filters=filters)
    state = make_state(x, a)
    forward = [x, a, b, *state, None, 130, True, True, filters is not None]
    y, end_y, end_x, borders = torch.ops.fastkit.iir_scan_fwd(*forward)
    backward = [gy, end_y, end_x, x, y, borders, a, b, *state, None, 130, True, True, True]
    return forward, backward


def of(tensor, **changes):
    """The tensor with sizes changed: dimension -> size."""
    shape = list(tensor.shape)
    for dim, size in changes.items():
        shape[int(dim[1:])] = size
    return torch.zeros(shape, dtype=tensor.dtype)


FORWARD = ["x", "a", "b", "state_y", "state_x", "cu_seqlens", "chunk", "carry", "needs_end", "needs_borders"]
BACKWARD = [
    "gy", "gend_y", "gend_x", "x", "y", "borders", "a", "b", "state_y", "state_x", "cu_seqlens", "chunk",
    "carry", "needs_x", "needs_coefficients",
]  # fmt: skip

# argument -> what to make of it; of both directions where it is one of both
MISUSE = {
    "x-2d": ("x", lambda t: t[0]),
    "x-4d": ("x", lambda t: t[None]),
    "x-int": ("x", lambda t: t.int()),
    "x-complex": ("x", lambda t: t.to(torch.complex64)),
    "x-double": ("x", lambda t: t.double()),
    "x-shorter": ("x", lambda t: t[..., :200]),
    "x-longer": ("x", lambda t: of(t, d2=500)),
    "x-fewer-channels": ("x", lambda t: t[:, :2]),
    "a-3d": ("a", lambda t: t[0]),
    "a-taps": ("a", lambda t: of(t, **{f"d{t.dim() - 1}": 3})),
    "a-one-tap": ("a", lambda t: t[..., :1]),
    "a-fewer-chunks": ("a", lambda t: t[:, :, :1]),
    "a-no-chunks": ("a", lambda t: t[:, :, :0]),
    "a-channels": ("a", lambda t: t[:, :2]),
    "a-half": ("a", lambda t: t.half()),
    "b-taps": ("b", lambda t: t[..., :2]),
    "b-fewer-chunks": ("b", lambda t: t[:, :, :1]),
    "b-other-rank": ("b", lambda t: t[0]),
    "b-double": ("b", lambda t: t.double()),
    "state_y-batch": ("state_y", lambda t: t[:1]),
    "state_y-channels": ("state_y", lambda t: t[:, :1]),
    "state_y-last": ("state_y", lambda t: t[..., :1]),
    "state_y-rank": ("state_y", lambda t: t.flatten()),
    "state_y-dtype": ("state_y", lambda t: t.double()),
    "state_x-batch": ("state_x", lambda t: t[:1]),
    "state_x-rank": ("state_x", lambda t: t[..., None]),
    "chunk-0": ("chunk", lambda _: 0),
    "chunk-negative": ("chunk", lambda _: -3),
    "chunk-least": ("chunk", lambda _: -(2**63)),
    "chunk-other": ("chunk", lambda _: 75),
    "cu_seqlens": ("cu_seqlens", lambda _: torch.tensor([0, 300])),
    "gy-shape": ("gy", lambda t: t[..., :-1]),
    "gy-dtype": ("gy", lambda t: t.double()),
    "gend_y-shape": ("gend_y", lambda t: t[:1]),
    "gend_x-shape": ("gend_x", lambda t: t[..., :1]),
}


def misused(call, names, name, change):
    call = list(call)
    call[names.index(name)] = change(call[names.index(name)])
    return call


@pytest.mark.parametrize("misuse", MISUSE)
@pytest.mark.parametrize("filters", [None, 3])
def test_raw_scan_misused(native, filters, misuse):
    name, change = MISUSE[misuse]
    forward, backward = raw_inputs(filters)
    if name in FORWARD:
        with pytest.raises(RuntimeError):
            torch.ops.fastkit.iir_scan_fwd(*misused(forward, FORWARD, name, change))
    with pytest.raises(RuntimeError):
        torch.ops.fastkit.iir_scan_bwd(*misused(backward, BACKWARD, name, change))


def test_raw_scan_of_a_filter_takes_y(native):
    _, backward = raw_inputs()
    for change in (lambda _: None, lambda t: t[..., :-1], lambda t: t.double()):
        with pytest.raises(RuntimeError, match=r"iir_scan: .*y"):
            torch.ops.fastkit.iir_scan_bwd(*misused(backward, BACKWARD, "y", change))


def test_raw_scan_of_a_bank_takes_its_borders(native):
    _, backward = raw_inputs(3)
    for change in (
        lambda _: None,
        lambda t: t[:, :-1],
        lambda t: t[..., :-1],
        lambda t: t.double(),
        lambda t: t.new_empty(0),
        lambda t: t.to("meta"),
    ):
        with pytest.raises(RuntimeError, match=r"iir_scan: .*(borders|one device)"):
            torch.ops.fastkit.iir_scan_bwd(*misused(backward, BACKWARD, "borders", change))


def test_raw_scan_of_a_bank_without_filters(native):
    x, a, b, _ = make_inputs(Size(2, 3, 9, None), filters=2)
    with pytest.raises(RuntimeError):
        torch.ops.fastkit.iir_scan_fwd(
            x, a[:, :, :, :0], b[:, :, :, :0], None, None, None, ONE_CHUNK, True, False, False
        )
    with pytest.raises(RuntimeError):
        torch.ops.fastkit.sosfilt_fwd(x, a[0, 0, 0, :0], b[0, 0, 0, :0], False)
    no_state = torch.zeros(2, 3, 0, 2), torch.zeros(2, 3, 2)
    with pytest.raises(RuntimeError):
        torch.ops.fastkit.iir_step_fwd(x[..., 0], a[:, :, 0, :0], None, *no_state)


@pytest.mark.parametrize("chunk", [ONE_CHUNK, 1, 3])
@pytest.mark.parametrize(
    "values",
    [
        [1, 4, 9],
        [0, -1, 9],
        [0, 6, 4, 9],
        [0, 4, 5],
        [0, 4, 10],
        [0, 2**62, 9],
        [0, 2**63 - 1, -5, 9],
        [0, -(2**63), 9],
        [],
        [0],
        [9],
        [0, 2**63 - 1],
        [0, 2**63 - 1, -(2**63), 9],
        [0, 2**62, 2**63 - 1, -(2**62), 9],
    ],
    ids=str,
)
def test_raw_scan_refuses_cu_seqlens(native, values, chunk):
    """K such that nothing else is wrong, counted as a computer would."""
    x, offsets = torch.zeros(1, 3, 9), torch.tensor(values, dtype=torch.int64)
    for K in (1, max(len(values) - 1, 0), 4, 9):
        a = torch.zeros(1, 3, K, 2)
        with pytest.raises(RuntimeError, match="iir_scan: "):
            torch.ops.fastkit.iir_scan_fwd(x, a, None, None, None, offsets, chunk, True, True, False)


@pytest.mark.parametrize(
    "offsets",
    [torch.tensor([[0, 9]]), torch.tensor([0.0, 9]), torch.tensor([0, 9]).to("meta"), torch.tensor(0)],
    ids=["2d", "float", "meta", "0d"],
)
def test_raw_scan_refuses_other_cu_seqlens(native, offsets):
    x, a = torch.zeros(1, 3, 9), torch.zeros(1, 3, 1, 2)
    with pytest.raises(RuntimeError, match="iir_scan: "):
        torch.ops.fastkit.iir_scan_fwd(x, a, None, None, None, offsets, ONE_CHUNK, True, True, False)


def test_raw_packed_scan_takes_states_of_the_sequences(native):
    x, a, b, gy, offsets = make_packed_inputs([4, 5], 3, None)
    y_state, x_state = make_state(x, a, offsets)
    call = (offsets, ONE_CHUNK, True)
    for states in ((y_state[:1], None), (None, x_state[:1]), (y_state, torch.zeros(3, 3, 2))):
        with pytest.raises(RuntimeError, match="iir_scan: state"):
            torch.ops.fastkit.iir_scan_fwd(x, a, b, *states, *call, True, False)
    with pytest.raises(RuntimeError, match="iir_scan: gend_y"):
        torch.ops.fastkit.iir_scan_bwd(gy, y_state[:1], None, x, x, None, a, b, None, None, *call, True, True)
    with pytest.raises(RuntimeError, match="iir_scan: with cu_seqlens"):
        torch.ops.fastkit.iir_scan_fwd(x.expand(2, 3, 9), a, b, None, None, *call, True, False)


STEP_MISUSE = {
    "x": (0, [lambda t: t[0], lambda t: t[None], lambda t: t[:1], lambda t: t[:, :2], lambda t: t.int()]),
    "a": (1, [lambda t: t[0], lambda t: t[..., :1], lambda t: t[:, :2], lambda t: t.double()]),
    "b": (2, [lambda t: t[0], lambda t: t[..., :2], lambda t: t[:, :2], lambda t: t.half()]),
    "state_y": (
        3,
        [lambda t: t[0], lambda t: t[:1], lambda t: t[:, :1], lambda t: t[..., :1], lambda t: t.double()],
    ),
    "state_x": (
        4,
        [lambda t: t[0], lambda t: t[:1], lambda t: t[:, :1], lambda t: t[..., :1], lambda t: t.double()],
    ),
}


@pytest.mark.parametrize("misuse", STEP_MISUSE)
@pytest.mark.parametrize("filters", [None, 3])
def test_raw_step_misused(native, filters, misuse):
    x, a, b, _ = make_inputs(Size(2, 3, 1, None), filters=filters)
    call = [x[..., 0], a[:, :, 0], b[:, :, 0], *make_state(x, a)]
    at, changes = STEP_MISUSE[misuse]
    for change in changes:
        misused = [change(t) if i == at else t for i, t in enumerate(call)]
        with pytest.raises(RuntimeError, match="iir_step: "):
            torch.ops.fastkit.iir_step_fwd(*misused)


def test_raw_cascade_misused(native):
    x, a, b, gy = make_inputs(Size(2, 3, 300, None))
    a, b = a[0, :, 0], b[0, :, 0]
    borders = torch.ops.fastkit.sosfilt_fwd(x, a, b, True)[1]
    for call in (
        (x[0], a, b),
        (x, a[0], b),
        (x, a, b[:2]),
        (x, a[:, :1], b),
        (x, a, b[:, :2]),
        (x, b, a),
        (x.double(), a, b),
        (x.int(), a, b),
        (x, a.half(), b),
        (x, a, b.half()),
        (x, a[:0], b[:0]),
        (x, a.to("meta"), b),
        (x, a, b.to("meta")),
    ):
        with pytest.raises(RuntimeError, match=r"sosfilt: |iir_scan: "):
            torch.ops.fastkit.sosfilt_fwd(*call, True)
        changed, *coefficients = call
        for needs in ((True, True), (True, False)):
            with pytest.raises(RuntimeError, match=r"sosfilt: |iir_scan: "):
                torch.ops.fastkit.sosfilt_bwd(gy, changed, borders, *coefficients, *needs)


CASCADE_MISUSE = {
    "gy": [
        lambda t: t[0], lambda t: t[:1], lambda t: t[:, :2], lambda t: t[..., :-1], lambda t: t.double(),
        lambda t: t.to("meta"),
    ],
    "x": [lambda t: t[..., :-1], lambda t: t[:, :2], lambda t: of(t, d2=500), lambda t: of(t, d0=3)],
    "borders": [
        lambda t: t[0], lambda t: t[:1], lambda t: t[:, :-1], lambda t: t[:, :, :2], lambda t: t[:, :, :, :1],
        lambda t: t[..., :2], lambda t: t.double(), lambda t: t.new_empty(0), lambda t: t.to("meta"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("misuse", CASCADE_MISUSE)
def test_raw_backward_of_a_cascade_misused(native, misuse):
    x, a, b, gy = make_inputs(Size(2, 3, 300, None))
    a, b = a[0, :, 0], b[0, :, 0]
    call = {"gy": gy, "x": x, "borders": torch.ops.fastkit.sosfilt_fwd(x, a, b, True)[1]}
    for change in CASCADE_MISUSE[misuse]:
        misused = {**call, misuse: change(call[misuse])}
        with pytest.raises(RuntimeError, match=r"sosfilt: |iir_scan: "):
            torch.ops.fastkit.sosfilt_bwd(*misused.values(), a, b, True, True)


def test_raw_backward_of_one_section_takes_y(native):
    x, a, b, gy = make_inputs(Size(2, 3, 300, None))
    a, b = a[0, :1, 0], b[0, :1, 0]
    y, borders = torch.ops.fastkit.sosfilt_fwd(x, a, b, True)
    for other in (borders, y[0], y[..., :-1], y[:, :2], y.double(), y.to("meta")):
        with pytest.raises(RuntimeError, match=r"sosfilt: borders, of one filter y,|iir_scan: .* one device"):
            torch.ops.fastkit.sosfilt_bwd(gy, x, other, a, b, True, True)


def test_raw_ops_refuse_tensors_of_two_devices(native):
    """One on the meta device takes the call to the fake implementation, which computes nothing."""
    forward, backward = raw_inputs()
    message = "iir_scan: tensors must be on one device, got cpu, meta"
    for name in ("a", "b", "state_y", "state_x"):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastkit.iir_scan_fwd(*misused(forward, FORWARD, name, lambda t: t.to("meta")))
    for name in ("gy", "gend_y", "gend_x", "y", "a", "b", "state_y", "state_x"):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastkit.iir_scan_bwd(*misused(backward, BACKWARD, name, lambda t: t.to("meta")))
