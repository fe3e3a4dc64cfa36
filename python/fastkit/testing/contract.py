"""What an op promises, as a table in which every cell is a test, and the page that shows it.

A row is a mode of an op, a column a check of it in one implementation. ``tests/test_<stem>_contract.py`` has
an op's rows, and writes the table into ``docs/ops/<stem>.md``.
"""

# torch.func.jvp and vjp have another result only where they are asked for one.
# pyright: reportAssignmentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastkit._dispatch import Impl

Function = Callable[..., tuple[Tensor, ...]]

BEGIN, END = "<!-- contract table: begin -->", "<!-- contract table: end -->"


class Mode(NamedTuple):
    """A row: an op as a function of what is differentiated, x first, that returns all its outputs."""

    inputs: Callable[[torch.dtype, int], tuple[Tensor, ...]]  # for a dtype of x, and a seed
    function: Callable[[Impl | None], Function]  # of an implementation, or where None of fastkit.reference
    dtypes: Callable[[torch.dtype], tuple[torch.dtype, ...]]  # of the outputs, for a dtype of x


class Refusal(NamedTuple):
    """What a cell has instead of a yes."""

    text: str  # of the RuntimeError
    impls: tuple[str, ...] = ("cpu", "reference")  # the other says yes


@dataclass(frozen=True)
class Contract:
    """The table of an op."""

    modes: Mapping[str, Mode]
    implementations: Mapping[str, str]  # "yes" for one that the checks run; or which calls it covers
    refusals: Mapping[tuple[str, str], Refusal]  # by mode and capability; all other cells are yes

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(impl for impl, answer in self.implementations.items() if answer == "yes")

    def check(self, mode: str, capability: str, impl: Impl) -> None:
        """Raise unless the cell is what the table says."""
        refusal = self.refusals.get((mode, capability))
        if refusal is None or impl not in refusal.impls:
            CAPABILITIES[capability](self.modes[mode], impl)
            return
        try:
            CAPABILITIES[capability](self.modes[mode], impl)
        except RuntimeError as error:
            if refusal.text not in str(error):
                raise
        else:
            raise AssertionError(f"{mode}, {capability}: {impl} says yes; the table has a refusal")

    def table(self) -> str:
        """In Markdown."""
        notes = list(dict.fromkeys(self.refusals.values()))
        cells = [["", *CAPABILITIES]]
        for mode in self.modes:
            refusals = [self.refusals.get((mode, capability)) for capability in CAPABILITIES]
            cells.append([mode, *("yes" if r is None else f"({notes.index(r) + 1})" for r in refusals)])
        lines = [*_aligned(cells), ""]
        for number, (text, impls) in enumerate(notes, 1):
            others = [f"`{impl}` says yes" for impl in self.running if impl not in impls]
            lines += [f"{number}. {' and '.join(f'`{impl}`' for impl in impls)}: RuntimeError"]
            lines += [f'   "{text}"' + "".join(f"; {other}" for other in others)]
        if notes:
            lines.append("")
        lines += _aligned(
            [["`impl`", "runs"], *([f"`{i}`", runs] for i, runs in self.implementations.items())]
        )
        return "\n".join(lines)

    def on_page(self, text: str) -> str:
        """A page with the table as it is now."""
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        return f"{before}{BEGIN}\n\n{self.table()}\n\n{END}{after}"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]


# The columns


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Of arithmetic on tensors of a dtype, and of what goes with a half-precision x."""
    return torch.promote_types(dtype, torch.float32)


def _leaves(mode: Mode, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in mode.inputs(dtype, 0)]


def _cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def _differentiable(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A statistic is not; ``check_dtype`` holds an op to its reference in which are."""
    return tuple(y for y in outputs if y.requires_grad)


def _gradients(function: Function, leaves: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    outputs = _differentiable(function(*leaves))
    return torch.autograd.grad(outputs, leaves, _cotangents(outputs), create_graph=create_graph)


def _assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], stored: torch.dtype) -> None:
    """Up to some roundings of the largest value: by the arithmetic, and in half precision by the storage."""
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        coarser = max(stored, result.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        eps = 64 * torch.finfo(arithmetic_of(coarser)).eps
        if coarser.itemsize == 2:
            eps += 2 * torch.finfo(coarser).eps
        assert result.shape == value.shape
        assert (result.double() - value).abs().max() <= eps * value.abs().max()


def _check_dtype(dtype: torch.dtype) -> Callable[[Mode, Impl], None]:
    """Outputs and gradients, and their dtypes, are those of the float64 reference on the same numbers."""

    def check(mode: Mode, impl: Impl) -> None:
        leaves = _leaves(mode, dtype)
        leaves64 = [t.detach().double().requires_grad_() for t in leaves]
        outputs, outputs64 = mode.function(impl)(*leaves), mode.function(None)(*leaves64)
        assert tuple(y.dtype for y in outputs) == mode.dtypes(dtype)
        assert [y.requires_grad for y in outputs] == [y.requires_grad for y in outputs64]
        _assert_near(outputs, outputs64, dtype)
        outputs, outputs64 = _differentiable(outputs), _differentiable(outputs64)
        cotangents = _cotangents(outputs)
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
        gradients64 = torch.autograd.grad(outputs64, leaves64, [g.double() for g in cotangents])
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
        _assert_near(gradients, gradients64, dtype)

    return check


def _check_first(mode: Mode, impl: Impl) -> None:
    """Against differences, element by element."""
    assert gradcheck(mode.function(impl), _leaves(mode))


def _check_second(mode: Mode, impl: Impl) -> None:
    assert gradgradcheck(mode.function(impl), _leaves(mode), fast_mode=True)


def _check_third(mode: Mode, impl: Impl) -> None:
    function = mode.function(impl)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        return _gradients(function, list(leaves), create_graph=True)

    assert gradgradcheck(gradients, _leaves(mode), fast_mode=True)


def _check_jvp(mode: Mode, impl: Impl) -> None:
    leaves, tangents = (mode.inputs(torch.float64, seed) for seed in (0, 1))
    outputs, results = torch.func.jvp(mode.function(impl), leaves, tangents)
    values, expected = torch.func.jvp(mode.function(None), leaves, tangents)
    _assert_near(outputs, values, torch.float64)
    _assert_near(results, expected, torch.float64)


def _check_hvp(mode: Mode, impl: Impl) -> None:
    """Forward over reverse."""
    leaves, tangents = (mode.inputs(torch.float64, seed) for seed in (0, 1))

    def gradients(function: Function) -> Function:
        def loss(*leaves: Tensor) -> Tensor:
            outputs = function(*leaves)
            terms = [(g * y).sum() for g, y in zip(_cotangents(outputs), outputs, strict=True)]
            return sum(terms[1:], terms[0])

        return torch.func.grad(loss, tuple(range(len(leaves))))

    _, results = torch.func.jvp(gradients(mode.function(impl)), leaves, tangents)
    _, expected = torch.func.jvp(gradients(mode.function(None)), leaves, tangents)
    _assert_near(results, expected, torch.float64)


def _check_vmap(mode: Mode, impl: Impl) -> None:
    """Outputs and gradients per entry, with every argument batched, and with x alone."""
    function, expected = mode.function(impl), mode.function(None)
    entries = [mode.inputs(torch.float64, seed) for seed in range(3)]
    _, *shared = entries[0]
    for dims in ((0,) * len(entries[0]), (0, *[None] * len(shared))):
        alone = [entry if dims[-1] == 0 else (entry[0], *shared) for entry in entries]
        columns = zip(*alone, strict=True)
        batched = [torch.stack(t) if dim == 0 else t[0] for t, dim in zip(columns, dims, strict=True)]
        outputs = torch.vmap(function, in_dims=dims)(*batched)
        _assert_near(outputs, _stack([expected(*entry) for entry in alone]), torch.float64)

        def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
            outputs, pullback = torch.func.vjp(function, *leaves)
            return pullback(tuple(torch.ones_like(y) for y in outputs))

        def expected_gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
            leaves = tuple(t.detach().requires_grad_() for t in leaves)
            return torch.autograd.grad([y.sum() for y in _differentiable(expected(*leaves))], leaves)

        results = torch.vmap(gradients, in_dims=dims)(*batched)
        _assert_near(results, _stack([expected_gradients(*entry) for entry in alone]), torch.float64)


def _stack(entries: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(each) for each in zip(*entries, strict=True))


def _check_compile(mode: Mode, impl: Impl) -> None:
    """One graph forward and one backward, with the results of the reference."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    compiled = torch.compile(mode.function(impl), backend="aot_eager", fullgraph=True)
    leaves, expected = _leaves(mode), mode.function(None)
    _assert_near(compiled(*leaves), expected(*leaves), torch.float64)
    _assert_near(_gradients(compiled, leaves), _gradients(expected, leaves), torch.float64)


CAPABILITIES: dict[str, Callable[[Mode, Impl], None]] = {
    "float64": _check_dtype(torch.float64),
    "float32": _check_dtype(torch.float32),
    "bfloat16": _check_dtype(torch.bfloat16),
    "float16": _check_dtype(torch.float16),
    "1st": _check_first,
    "2nd": _check_second,
    "3rd": _check_third,
    "jvp": _check_jvp,
    "hvp": _check_hvp,
    "vmap": _check_vmap,
    "compile": _check_compile,
}
