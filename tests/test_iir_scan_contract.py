"""What iir_scan and its relatives promise: the modes of the table on their page, and what they refuse.

``python tests/test_iir_scan_contract.py`` writes the table into docs/ops/iir_scan.md, between its markers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contracts import checks_of, write_page
from torch import Tensor

from fastkit import ops, reference
from fastkit._dispatch import unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.reference import IIRState
from fastkit.testing.contract import Contract, Mode, Refusal, arithmetic_of

# The rows


def inputs_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Noise, and stable poles; what goes with a half-precision x is float32."""
    generator = torch.Generator().manual_seed(seed)

    def poles(*shape: int) -> Tensor:
        u1, u2 = (2 * torch.rand(2, *shape, generator=generator, dtype=torch.float64) - 1).unbind()
        return torch.stack([0.9 * u1 * (1 + 0.8 * u2), 0.8 * u2], -1)

    inputs = []
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "a":
            tensor = poles(*shape[:-1])
        elif name == "sos":
            tensor = torch.cat([tensor[:, :3], torch.full((shape[0], 1), 1.25), 1.25 * poles(shape[0])], 1)
        inputs.append(tensor.to(dtype if name == "x" else arithmetic_of(dtype)))
    return tuple(inputs)


def function_of(
    op: str, has_state: bool, options: dict[str, Any], impl: str | None
) -> Callable[..., tuple[Tensor, ...]]:
    if impl is None:
        run = partial(getattr(reference, op), **{k: v for k, v in options.items() if k != "check_stable"})
    else:
        run = partial(getattr(ops, op), **options, impl=impl)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        if has_state:
            *rest, state_y, state_x = leaves
            y, end = run(*rest, IIRState(state_y, state_x))
            return y, end.y, end.x
        return (run(*leaves),)

    return function


def mode(op: str, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]) -> Mode:
    """``shapes``: of what is differentiated, in the order of the op's arguments."""
    has_state = "state_y" in shapes

    def dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (dtype, *[arithmetic_of(dtype)] * 2) if has_state else (dtype,)

    return Mode(partial(inputs_of, shapes), partial(function_of, op, has_state, options), dtypes)


X, STATE = (2, 3, 4), {"state_y": (2, 3, 2), "state_x": (2, 3, 2)}
PACKED = {"cu_seqlens": torch.tensor([0, 3, 3, 4])}  # with chunk=2: 2 + 0 + 1 chunks

MODES = {
    "iir_scan": mode("iir_scan", {"x": X, "a": (1, 3, 1, 2), "b": (2, 1, 1, 3)}, {}),
    "iir_scan, chunks": mode("iir_scan", {"x": X, "a": (2, 3, 2, 2), "b": (2, 3, 2, 3)}, {"chunk": 3}),
    "iir_scan, carry=False": mode(
        "iir_scan", {"x": X, "a": (2, 3, 2, 2), "b": (2, 3, 2, 3)}, {"chunk": 3, "carry": False}
    ),
    "iir_scan, chunk=1": mode("iir_scan", {"x": X, "a": (2, 3, 4, 2), "b": (2, 3, 4, 3)}, {"chunk": 1}),
    "iir_scan, bank": mode("iir_scan", {"x": X, "a": (1, 3, 2, 2, 2), "b": (2, 3, 2, 2, 3)}, {"chunk": 3}),
    "iir_scan, packed": mode(
        "iir_scan", {"x": (1, 3, 4), "a": (1, 1, 3, 2), "b": (1, 3, 3, 3)}, {"chunk": None, **PACKED}
    ),
    "iir_scan, packed, chunks": mode(
        "iir_scan", {"x": (1, 3, 4), "a": (1, 3, 3, 2), "b": (1, 1, 3, 3)}, {"chunk": 2, **PACKED}
    ),
    "iir_scan, check_stable": mode(
        "iir_scan", {"x": X, "a": (1, 3, 1, 2), "b": (2, 1, 1, 3)}, {"check_stable": True}
    ),
    "iir_scan_with_state": mode(
        "iir_scan_with_state", {"x": X, "a": (2, 1, 2, 2), "b": (1, 3, 2, 3), **STATE}, {"chunk": 3}
    ),
    "iir_scan_with_state, bank": mode(
        "iir_scan_with_state",
        {"x": X, "a": (2, 3, 1, 2, 2), "b": (1, 3, 1, 2, 3), **STATE, "state_y": (2, 3, 2, 2)},
        {},
    ),
    "iir_scan_with_state, packed": mode(
        "iir_scan_with_state",
        {"x": (1, 2, 4), "a": (1, 2, 3, 2), "b": (1, 1, 3, 3), "state_y": (3, 2, 2), "state_x": (3, 2, 2)},
        {"chunk": 2, **PACKED},
    ),
    "iir_step": mode("iir_step", {"x": (2, 3), "a": (2, 1, 2), "b": (1, 3, 3), **STATE}, {}),
    "iir_step, bank": mode(
        "iir_step", {"x": (2, 3), "a": (1, 3, 2, 2), "b": (2, 3, 2, 3), **STATE, "state_y": (2, 3, 2, 2)}, {}
    ),
    "sosfilt": mode("sosfilt", {"x": (5, 4), "sos": (2, 6)}, {}),
}


# The cells: yes, but for these

PACKED_VMAP = Refusal("vmap of packed sequences is not supported; put its axis into C", ("cpu",))
PACKED_COMPILE = Refusal("Could not guard on data-dependent expression", ("reference",))

REFUSALS = {
    ("iir_scan, packed", "vmap"): PACKED_VMAP,
    ("iir_scan, packed, chunks", "vmap"): PACKED_VMAP,
    ("iir_scan_with_state, packed", "vmap"): PACKED_VMAP,
    ("iir_scan, packed", "compile"): PACKED_COMPILE,
    ("iir_scan, packed, chunks", "compile"): PACKED_COMPILE,
    ("iir_scan_with_state, packed", "compile"): PACKED_COMPILE,
    ("iir_scan, check_stable", "vmap"): Refusal(
        "attempting to use a Tensor in some data-dependent control flow"
    ),
    ("iir_scan, check_stable", "compile"): Refusal("check_stable=True reads values and cannot be compiled"),
}

# Whether an implementation runs here; or which calls it covers, with tests of its own.
IMPLEMENTATIONS = {
    "cpu": "yes",
    "reference": "yes",
    "cuda": "every mode, of CUDA tensors",
    "triton": "of `iir_scan`, single filters, fixed or in chunks of 16 samples and more",
}

CONTRACT = Contract(MODES, IMPLEMENTATIONS, REFUSALS)

test_cell, test_the_table, test_page_has_the_table = checks_of("iir_scan", CONTRACT, KERNELS)


# A diagonal state-space model is a bank


@pytest.mark.native
@pytest.mark.parametrize("impl", CONTRACT.running)
def test_diagonal_ssm_is_a_bank(impl):
    reason = unavailable(impl, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    batch, channels, modes, time = 2, 3, 8, 200
    decay, step = torch.rand(2, channels, 1, generator=generator, dtype=torch.float64).unbind()
    frequency = math.pi * torch.arange(modes)
    pole = torch.exp((0.01 + 0.1 * step) * torch.complex(-0.1 - decay, frequency.to(decay)))
    real, imaginary = torch.randn(2, channels, modes, generator=generator, dtype=torch.float64).unbind()
    residue = torch.complex(real, imaginary)  # the product of a mode's input and output weights
    skip = torch.randn(channels, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, channels, time, generator=generator, dtype=torch.float64)

    state = torch.zeros(batch, channels, modes, dtype=torch.complex128)
    ys = []
    for x_t in x.unbind(-1):
        state = pole * state + x_t.unsqueeze(-1)
        ys.append(2 * (residue * state).real.sum(-1) + skip[:, 0] * x_t)
    expected = torch.stack(ys, -1)

    d = skip * (torch.arange(modes) == 0)  # the skip once, in the first filter
    a = torch.stack([-2 * pole.real, pole.abs() ** 2], -1)
    b = torch.stack(
        [2 * residue.real + d, -2 * (residue * pole.conj()).real + d * a[..., 0], d * a[..., 1]], -1
    )
    y = ops.iir_scan(x, a[None, :, None], b[None, :, None], impl=impl)
    assert (y - expected).abs().max() <= 1e-10


if __name__ == "__main__":
    write_page("iir_scan", CONTRACT)
