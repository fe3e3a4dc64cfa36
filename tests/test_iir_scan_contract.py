"""What iir_scan and its relatives promise: a table in which every cell is a test, and the page that shows it.

``python tests/test_iir_scan_contract.py`` writes the table into docs/ops/iir_scan.md, between its markers.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastkit import ops, reference
from fastkit._dispatch import IMPLS, unavailable
from fastkit.ops.iir_scan import KERNELS
from fastkit.reference import IIRState

PAGE = Path(__file__).parents[1] / "docs" / "ops" / "iir_scan.md"
BEGIN, END = "<!-- contract table: begin -->", "<!-- contract table: end -->"

native = pytest.mark.native
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp
]


# The rows


class Mode(NamedTuple):
    op: str
    shapes: dict[str, tuple[int, ...]]  # of what is differentiated, in the order of the op's arguments
    options: dict[str, Any]


X, STATE = (2, 3, 4), {"state_y": (2, 3, 2), "state_x": (2, 3, 2)}
PACKED = {"cu_seqlens": torch.tensor([0, 3, 3, 4])}  # with chunk=2: 2 + 0 + 1 chunks

MODES = {
    "iir_scan": Mode("iir_scan", {"x": X, "a": (1, 3, 1, 2), "b": (2, 1, 1, 3)}, {}),
    "iir_scan, chunks": Mode("iir_scan", {"x": X, "a": (2, 3, 2, 2), "b": (2, 3, 2, 3)}, {"chunk": 3}),
    "iir_scan, carry=False": Mode(
        "iir_scan", {"x": X, "a": (2, 3, 2, 2), "b": (2, 3, 2, 3)}, {"chunk": 3, "carry": False}
    ),
    "iir_scan, chunk=1": Mode("iir_scan", {"x": X, "a": (2, 3, 4, 2), "b": (2, 3, 4, 3)}, {"chunk": 1}),
    "iir_scan, bank": Mode("iir_scan", {"x": X, "a": (1, 3, 2, 2, 2), "b": (2, 3, 2, 2, 3)}, {"chunk": 3}),
    "iir_scan, packed": Mode(
        "iir_scan", {"x": (1, 3, 4), "a": (1, 1, 3, 2), "b": (1, 3, 3, 3)}, {"chunk": None, **PACKED}
    ),
    "iir_scan, packed, chunks": Mode(
        "iir_scan", {"x": (1, 3, 4), "a": (1, 3, 3, 2), "b": (1, 1, 3, 3)}, {"chunk": 2, **PACKED}
    ),
    "iir_scan, check_stable": Mode(
        "iir_scan", {"x": X, "a": (1, 3, 1, 2), "b": (2, 1, 1, 3)}, {"check_stable": True}
    ),
    "iir_scan_with_state": Mode(
        "iir_scan_with_state", {"x": X, "a": (2, 1, 2, 2), "b": (1, 3, 2, 3), **STATE}, {"chunk": 3}
    ),
    "iir_scan_with_state, bank": Mode(
        "iir_scan_with_state",
        {"x": X, "a": (2, 3, 1, 2, 2), "b": (1, 3, 1, 2, 3), **STATE, "state_y": (2, 3, 2, 2)},
        {},
    ),
    "iir_scan_with_state, packed": Mode(
        "iir_scan_with_state",
        {"x": (1, 2, 4), "a": (1, 2, 3, 2), "b": (1, 1, 3, 3), "state_y": (3, 2, 2), "state_x": (3, 2, 2)},
        {"chunk": 2, **PACKED},
    ),
    "iir_step": Mode("iir_step", {"x": (2, 3), "a": (2, 1, 2), "b": (1, 3, 3), **STATE}, {}),
    "iir_step, bank": Mode(
        "iir_step", {"x": (2, 3), "a": (1, 3, 2, 2), "b": (2, 3, 2, 3), **STATE, "state_y": (2, 3, 2, 2)}, {}
    ),
    "sosfilt": Mode("sosfilt", {"x": (5, 4), "sos": (2, 6)}, {}),
}


def inputs_of(mode: Mode, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Noise, and stable poles; what goes with a half-precision x is float32."""
    generator = torch.Generator().manual_seed(seed)
    arithmetic = torch.float32 if dtype.itemsize == 2 else dtype

    def poles(*shape: int) -> Tensor:
        u1, u2 = (2 * torch.rand(2, *shape, generator=generator, dtype=torch.float64) - 1).unbind()
        return torch.stack([0.9 * u1 * (1 + 0.8 * u2), 0.8 * u2], -1)

    inputs = {}
    for name, shape in mode.shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "a":
            tensor = poles(*shape[:-1])
        elif name == "sos":
            tensor = torch.cat([tensor[:, :3], torch.full((shape[0], 1), 1.25), 1.25 * poles(shape[0])], 1)
        inputs[name] = tensor.to(dtype if name == "x" else arithmetic)
    return inputs


def function_of(mode: Mode, module: ModuleType, impl: str | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The op, or its reference, as a function of the leaves alone, which returns all its outputs."""
    op = getattr(module, mode.op)
    options = dict(mode.options)
    if module is reference:
        options.pop("check_stable", None)
    else:
        options["impl"] = impl
    has_state = "state_y" in mode.shapes

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        if has_state:
            *rest, state_y, state_x = leaves
            y, end = op(*rest, IIRState(state_y, state_x), **options)
            return y, end.y, end.x
        return (op(*leaves, **options),)

    return function


def cotangents_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def gradients_of(
    function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, cotangents_of(outputs), create_graph=create_graph)


def differentiable(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors.values()]


def assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], stored: torch.dtype) -> None:
    """Up to some roundings of the largest value: by the arithmetic, and in half precision by the storage."""
    arithmetic = torch.float32 if stored.itemsize == 2 else stored
    eps = 64 * torch.finfo(arithmetic).eps + (2 * torch.finfo(stored).eps if stored.itemsize == 2 else 0)
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        assert result.shape == value.shape
        assert (result.double() - value).abs().max() <= eps * value.abs().max()


# The columns: each is a check of one mode in one implementation


def check_dtype(dtype: torch.dtype) -> Callable[[Mode, str], None]:
    """Outputs and gradients, and their dtypes, are those of the float64 reference on the same numbers."""

    def check(mode: Mode, impl: str) -> None:
        inputs = inputs_of(mode, dtype)
        function, expected = function_of(mode, ops, impl), function_of(mode, reference)
        leaves, leaves64 = differentiable(inputs), differentiable({n: t.double() for n, t in inputs.items()})
        outputs, outputs64 = function(*leaves), expected(*leaves64)
        cotangents = cotangents_of(outputs)
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
        gradients64 = torch.autograd.grad(outputs64, leaves64, [g.double() for g in cotangents])
        arithmetic = torch.float32 if dtype.itemsize == 2 else dtype
        assert [y.dtype for y in outputs] == [dtype, arithmetic, arithmetic][: len(outputs)]
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
        assert_near(outputs, outputs64, dtype)
        assert_near(gradients, gradients64, dtype)

    return check


def check_first(mode: Mode, impl: str) -> None:
    """Against differences, element by element."""
    assert gradcheck(function_of(mode, ops, impl), differentiable(inputs_of(mode)))


def check_second(mode: Mode, impl: str) -> None:
    assert gradgradcheck(function_of(mode, ops, impl), differentiable(inputs_of(mode)), fast_mode=True)


def check_third(mode: Mode, impl: str) -> None:
    function = function_of(mode, ops, impl)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        return gradients_of(function, list(leaves), create_graph=True)

    assert gradgradcheck(gradients, differentiable(inputs_of(mode)), fast_mode=True)


def check_jvp(mode: Mode, impl: str) -> None:
    leaves, tangents = (tuple(inputs_of(mode, seed=seed).values()) for seed in (0, 1))
    outputs, results = torch.func.jvp(function_of(mode, ops, impl), leaves, tangents)
    values, expected = torch.func.jvp(function_of(mode, reference), leaves, tangents)
    assert_near(outputs, values, torch.float64)
    assert_near(results, expected, torch.float64)


def check_hvp(mode: Mode, impl: str) -> None:
    """Forward over reverse."""
    leaves, tangents = (tuple(inputs_of(mode, seed=seed).values()) for seed in (0, 1))

    def gradients(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def loss(*leaves: Tensor) -> Tensor:
            outputs = function(*leaves)
            return sum((g * y).sum() for g, y in zip(cotangents_of(outputs), outputs, strict=True))

        return torch.func.grad(loss, tuple(range(len(leaves))))

    _, results = torch.func.jvp(gradients(function_of(mode, ops, impl)), leaves, tangents)
    _, expected = torch.func.jvp(gradients(function_of(mode, reference)), leaves, tangents)
    assert_near(results, expected, torch.float64)


def check_vmap(mode: Mode, impl: str) -> None:
    """Outputs and gradients per entry, with every argument batched, and with x alone."""
    function, expected = function_of(mode, ops, impl), function_of(mode, reference)
    entries = [tuple(inputs_of(mode, seed=seed).values()) for seed in range(3)]
    _, *shared = entries[0]
    for dims in ((0,) * len(entries[0]), (0, *[None] * len(shared))):
        alone = [entry if dims[-1] == 0 else (entry[0], *shared) for entry in entries]
        columns = zip(*alone, strict=True)
        batched = [torch.stack(t) if dim == 0 else t[0] for t, dim in zip(columns, dims, strict=True)]
        outputs = torch.vmap(function, in_dims=dims)(*batched)
        assert_near(outputs, stack([expected(*entry) for entry in alone]), torch.float64)

        def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
            outputs, pullback = torch.func.vjp(function, *leaves)
            return pullback(tuple(torch.ones_like(y) for y in outputs))

        def expected_gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
            leaves = tuple(t.detach().requires_grad_() for t in leaves)
            return torch.autograd.grad([y.sum() for y in expected(*leaves)], leaves)

        results = torch.vmap(gradients, in_dims=dims)(*batched)
        assert_near(results, stack([expected_gradients(*entry) for entry in alone]), torch.float64)


def stack(entries: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(each) for each in zip(*entries, strict=True))


def check_compile(mode: Mode, impl: str) -> None:
    """One graph forward and one backward, with the results of the reference."""
    torch._dynamo.reset()
    compiled = torch.compile(function_of(mode, ops, impl), backend="aot_eager", fullgraph=True)
    leaves, expected = differentiable(inputs_of(mode)), function_of(mode, reference)
    assert_near(compiled(*leaves), expected(*leaves), torch.float64)
    assert_near(gradients_of(compiled, leaves), gradients_of(expected, leaves), torch.float64)


CAPABILITIES: dict[str, Callable[[Mode, str], None]] = {
    "float64": check_dtype(torch.float64),
    "float32": check_dtype(torch.float32),
    "bfloat16": check_dtype(torch.bfloat16),
    "float16": check_dtype(torch.float16),
    "1st": check_first,
    "2nd": check_second,
    "3rd": check_third,
    "jvp": check_jvp,
    "hvp": check_hvp,
    "vmap": check_vmap,
    "compile": check_compile,
}


# The cells: yes, but for these


class Refusal(NamedTuple):
    text: str  # of the RuntimeError
    impls: tuple[str, ...] = ("cpu", "reference")  # the other says yes


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
RUNNING = tuple(impl for impl, answer in IMPLEMENTATIONS.items() if answer == "yes")


@native
@pytest.mark.parametrize("impl", RUNNING)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("mode", MODES)
def test_cell(mode, capability, impl):
    reason = unavailable(impl, KERNELS)
    if reason is not None:
        pytest.skip(reason)
    refusal = REFUSALS.get((mode, capability))
    if refusal is None or impl not in refusal.impls:
        CAPABILITIES[capability](MODES[mode], impl)
    else:
        with pytest.raises(RuntimeError, match=re.escape(refusal.text)):
            CAPABILITIES[capability](MODES[mode], impl)


@native
def test_the_table_has_every_implementation_and_no_stray_refusal():
    assert set(IMPLEMENTATIONS) == set(IMPLS)
    assert all(mode in MODES and capability in CAPABILITIES for mode, capability in REFUSALS)


# The page


def table() -> str:
    """The contract in Markdown."""
    notes = list(dict.fromkeys(REFUSALS.values()))
    cells = [["", *CAPABILITIES]]
    for mode in MODES:
        refusals = [REFUSALS.get((mode, capability)) for capability in CAPABILITIES]
        cells.append([mode, *("yes" if r is None else f"({notes.index(r) + 1})" for r in refusals)])
    lines = [*_aligned(cells), ""]
    for number, (text, impls) in enumerate(notes, 1):
        others = [f"`{impl}` says yes" for impl in RUNNING if impl not in impls]
        lines += [f"{number}. {' and '.join(f'`{impl}`' for impl in impls)}: RuntimeError"]
        lines += [f'   "{text}"' + "".join(f"; {other}" for other in others)]
    lines += [
        "",
        *_aligned([["`impl`", "runs"], *([f"`{i}`", answer] for i, answer in IMPLEMENTATIONS.items())]),
    ]
    return "\n".join(lines)


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]


def with_table(text: str) -> str:
    """A page with the table as it is now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def page() -> str:
    if not PAGE.is_file():
        pytest.skip("the tests are here without the documentation")
    return PAGE.read_text()


def test_page_has_the_table():
    text = page()
    assert text == with_table(text), f"run: python {Path(__file__).name}"


# A diagonal state-space model is a bank


@native
@pytest.mark.parametrize("impl", RUNNING)
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
    PAGE.write_text(with_table(PAGE.read_text()))
