"""Calls that nobody would write: what is drawn of them, and what an op may make of one.

An op answers, or it refuses in words and the reference refuses too. Its answer is the reference's within the
budgets of ``fastkit.testing``; it is the same whatever lay in memory before, shares no memory with an
argument, and changes none, unless the op's name says so. ``tests/test_<stem>_generated.py`` has how the
arguments of a stem are drawn, and what its answers are held to.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

Choose = Callable[[Sequence[Any]], Any]
"""Chooses one of a sequence: of hypothesis, or of a seeded generator where there is no hypothesis."""

Call = dict[str, Any]
"""Arguments by name: options as they are, tensors as ``Made``, also within lists and named tuples."""

FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16
OF_CALLS = torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (
    *FLOATS,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)

SIZES = 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 25, 33, 40
SIZES_AND_NONE = *SIZES, 0

# Numbers, those with a plus not negative. Of "small" and "large" ones products of three stay normal; what is
# done with "huge" ones overflows.
TAME = "normal", "integers", "zeros", "small", "large"
KINDS = *["normal"] * 12, "integers", "integers", "zeros", "small", "large", "huge", "subnormal", "nan", "inf"
POSITIVE = *["+normal"] * 10, "zeros", "+huge", "+subnormal", "+inf", "nan", "inf"

LAYOUTS = (
    *["dense"] * 6,
    "reversed",
    "swapped",
    "stepped",
    "rows",
    "offset",
    "expanded",
    "repeated",
    "negated",
)
OWN_MEMORY = "dense", "dense", "dense", "reversed", "swapped", "stepped", "rows", "offset"
NO_TENSORS = "sparse", "nested", "zero"  # layouts, but not of memory

# What is passed in place of an option, whatever it is.
ODD = (
    None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf,
    2**31 - 1, 2**31, 2**32, 2**62, 2**63, -(2**63), 10**400, "0.5", "", "dot", (), [], [0.5], {}, 1j,
    np.float32(0.5), np.int64(1), torch.tensor(0.5), torch.tensor([1, 2]), object, IndexError("1"),
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A tensor to be made, with the same numbers each time."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "dense"
    seed: int = 0
    grad: bool = False
    device: str = "cpu"
    values: tuple[Any, ...] | None = None  # instead of a kind

    def tensor(self) -> Tensor:
        """In memory of its own, whose gaps are NaN, or true."""
        if self.layout in NO_TENSORS:
            return _no_tensor(self)
        core = list(self.shape)
        spread = [axis for axis, size in enumerate(core) if size != 1]
        if self.layout in ("expanded", "repeated") and spread:
            core[spread[0 if self.layout == "expanded" else -1]] = 1
        tensor = _room(core, self.dtype, self.layout)
        tensor.copy_(self._numbers(core))
        tensor = tensor.expand(self.shape)
        if self.device != "cpu":
            tensor = tensor.to(self.device)
        if self.grad and self.dtype in FLOATS:
            tensor.requires_grad_()
        return tensor

    def _numbers(self, shape: list[int]) -> Tensor:
        if self.values is not None:
            return torch.tensor(self.values).reshape(self.shape)[tuple(slice(size) for size in shape)]
        if self.kind.startswith("+"):
            return replace(self, kind=self.kind[1:])._numbers(shape).abs()
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind in ("poles", "sections"):
            return _stable(x, self.kind == "sections")
        if self.kind == "integers":
            return (1.5 * x).round()
        if self.kind == "zeros":
            return 0 * x
        info = torch.finfo(self.dtype if self.dtype in FLOATS else torch.float32)
        if self.kind == "small":
            return x * info.tiny**0.25
        if self.kind == "large":
            return x * info.max**0.25
        if self.kind == "huge":
            return x.tanh() * info.max
        if self.kind == "subnormal":
            return x * info.tiny / 8
        if self.kind == "nan":
            return x.masked_fill(x > 1.3, math.nan)  # one in ten
        if self.kind == "inf":
            return torch.where(x.abs() > 1.6, x * math.inf, x)
        if self.kind == "map":  # next to the identity, in the last two axes
            return torch.eye(*shape[-2:]) + 0.2 * x if len(shape) > 1 else x
        if self.kind in ("scatter", "-scatter"):  # positive, or negative, semidefinite in the last two axes
            square = len(shape) > 1 and shape[-1] == shape[-2]
            return (1 if self.kind == "scatter" else -1) * (x @ x.mT if square else x)
        return x


def _stable(x: Tensor, sections: bool) -> Tensor:
    """Filters with poles at 0.9, of noise: (a1, a2) in the last axis, or (b0, b1, b2, a0, a1, a2)."""
    if x.dim() == 0:
        return x
    angle = x[..., -1:]
    taps = torch.cat([-1.8 * angle.cos(), torch.full_like(angle, 0.81)], -1)
    if sections:
        a0 = 0.5 + angle.abs()
        taps = torch.cat([x[..., :3], a0, a0 * taps], -1)
    width = min(taps.shape[-1], x.shape[-1])
    return torch.cat([taps[..., :width], x[..., width:]], -1)


def _room(shape: list[int], dtype: torch.dtype, layout: str) -> Tensor:
    """Memory for so many numbers, as the layout has it, in the midst of other numbers."""

    def base(*sizes: int) -> Tensor:
        filled = torch.full(sizes, math.nan if dtype.is_floating_point else 1, dtype=torch.float32)
        return filled.to(dtype)

    if layout == "reversed":
        return base(*shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    if layout == "swapped" and len(shape) > 1:
        return base(*shape[:-2], shape[-1], shape[-2]).mT
    if layout == "stepped" and shape:
        return base(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "rows" and shape:
        return base(*shape[:-1], shape[-1] + 3)[..., 2:-1]
    if layout == "offset":
        size = math.prod(shape)
        return base(size + 4)[3 : 3 + size].view(shape)
    if layout == "negated" and dtype in (torch.float32, torch.float64):
        return torch.zeros(shape, dtype=dtype.to_complex()).conj().imag
    return base(*shape)


def _no_tensor(made: Made) -> Tensor:
    dtype = made.dtype if made.dtype in FLOATS else torch.float32
    if made.layout == "zero":
        return torch._efficientzerotensor(made.shape, dtype=dtype)
    dense = replace(made, dtype=dtype, layout="dense", grad=False, device="cpu").tensor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        return dense.to_sparse() if made.layout == "sparse" else torch.nested.nested_tensor([dense])


# Drawing


def drawn(choose: Choose, *shape: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Made:
    """A tensor of any kind and layout, but for what is given of it."""
    fields.setdefault("kind", KINDS)
    fields.setdefault("layout", LAYOUTS)
    chosen = {name: choose(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return Made(shape, dtype, seed=choose(range(1000)), grad=choose((False, False, True)), **chosen)


def spoiled(choose: Choose, call: Call, faults: Sequence[int] = (0, 0, 0, 0, 0, 1, 1, 1, 2)) -> Call:
    """The call, with so many arguments that are not what the op expects; now and then on the meta device."""
    for _ in range(choose(faults)):
        name = choose(sorted(call))
        call = call | {name: _spoiled(choose, call[name])}
    if choose(range(24)) == 23:
        call = mapped(lambda made: replace(made, device="meta"), call)
    if choose(range(16)) == 15:
        call = call | {"impl": choose(("cpu", "cpu", "reference", "cuda", "triton", "numpy", 0, []))}
    return call


def _spoiled(choose: Choose, value: Any) -> Any:
    if isinstance(value, Made):
        return _spoiled_tensor(choose, value)
    if isinstance(value, (list, tuple)) and len(value) and any(made_in(value)):
        at = choose(range(len(value)))
        items = list(value)
        fault = choose(("item", "item", "item", "none", "fewer", "more", "odd"))
        if fault == "odd":
            return choose(ODD)
        if fault in ("item", "none"):
            items[at] = _spoiled(choose, items[at]) if fault == "item" else None
        elif fault == "more":
            items.append(items[at])
        else:
            del items[at]
        return _like(value, items)
    return choose(ODD)


def _spoiled_tensor(choose: Choose, made: Made) -> Any:
    fault = choose(("rank", "size", "size", "dtype", "dtype", "device", "layout", "kind", "object"))
    if fault == "dtype":
        return replace(made, dtype=choose(DTYPES))
    if fault == "device":
        return replace(made, device="meta")
    if fault == "layout":
        return replace(made, layout=choose((*NO_TENSORS, "expanded", "repeated", "negated")))
    if fault == "object":
        return choose(ODD)
    made = replace(made, values=None)
    if fault == "kind":
        return replace(made, kind=choose(KINDS))
    shape = list(made.shape)
    if fault == "rank":
        return replace(made, shape=tuple(choose(([*shape, 2], [2, *shape], shape[1:], shape[:-1], []))))
    if shape:
        at = choose(range(len(shape)))
        shape[at] = choose((0, 1, shape[at] + 1, max(0, shape[at] - 1), 40))
    return replace(made, shape=tuple(shape))


# Walking through the arguments of a call, and through results


def children(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        dot = f"{path}." if path else ""
        yield from ((f"{dot}{name}", item) for name, item in zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(value))


def found_in(value: Any, kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is of a type, by where it is, as ``state.y`` and ``grads[2]``."""
    if isinstance(value, kind):
        yield path or "result", value
    for name, item in children(value, path):
        yield from found_in(item, kind, name)


def made_in(value: Any) -> list[Made]:
    return [made for _, made in found_in(value, Made)]


def mapped(function: Callable[[Made], Any], value: Any) -> Any:
    if isinstance(value, Made):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [mapped(function, item) for item in value])
    return value


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, list):
        return items
    fits = hasattr(value, "_fields") and len(items) == len(value)
    return type(value)(*items) if fits else tuple(items)


def kinds_of(call: Call) -> set[str]:
    return {made.kind.removeprefix("+") for made in made_in(call) if made.values is None}


def is_meta(call: Call) -> bool:
    return any(made.device == "meta" for made in made_in(call))


# What an op makes of a call


class Answer(NamedTuple):
    arguments: Call  # after the call
    results: dict[str, Tensor]
    gradients: dict[
        str, Tensor
    ]  # of the arguments, for the cotangents of the results; zeros where none flows
    cotangents: dict[str, Tensor]
    refusal: str  # of the backward


class Refusal(NamedTuple):
    kind: type[Exception]
    text: str


_OF_PYTORCH = (  # tangents of forward mode, and views whose sign is yet to be turned, where they are listed
    "ZeroTensors are immutable",
    " fallback doesn't currently support mutable TensorLists",
)


class _Memory:
    """The bytes in which the tensors of a call lie, and which of them an op may write."""

    def __init__(self, arguments: Call) -> None:
        dense = [t for _, t in found_in(arguments, Tensor) if _has_memory(t)]
        self.tensors = [(t, _bytes_of(t).clone()) for t in dense]
        self.addresses = {t.untyped_storage().data_ptr() for t in dense if t.untyped_storage().nbytes()}

    def is_unchanged(self, but: Sequence[Tensor] = ()) -> bool:
        """``but`` entries of these: what lies between them counts."""
        entries = {id(t) for t in but}
        for tensor, before in self.tensors:
            if id(tensor) in entries:
                if overlaps(tensor):
                    continue
                place = torch.empty(0, dtype=tensor.dtype).set_(
                    before.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
                )
                place.copy_(-tensor.detach() if tensor.is_neg() else tensor.detach())
            if not torch.equal(_bytes_of(tensor), before):
                return False
        return True


def _has_memory(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor._is_zerotensor()
    )


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def bits_of(tensor: Tensor) -> Tensor:
    dense = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8)


def attempt(
    op: Callable[..., Any],
    call: Call,
    *,
    also: Sequence[str] = (),
    writes: Sequence[str] = (),
    dirt: Answer | None = None,
) -> Answer | Refusal:
    """The answer, or how the op refuses. AssertionError, if it does neither or touches what is not its own.

    Args:
        also: what an error may begin with, besides the op's name.
        writes: the arguments that are written to.
        dirt: an answer, with whose sizes memory is filled and freed before.
    """
    name = op.__name__
    begins = tuple(f"{each}: " for each in (name, *also))
    arguments = mapped(Made.tensor, call)
    memory = _Memory(arguments)
    if dirt is not None:
        _soil([*dirt.results.values(), *dirt.gradients.values()])
    written = [t for each in writes for _, t in found_in(arguments.get(each), Tensor)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*matrices are singular", RuntimeWarning)
            outcome = op(**arguments)
    except Exception as error:
        if str(error).startswith(_OF_PYTORCH):
            return Refusal(type(error), str(error))
        if not memory.is_unchanged():
            raise AssertionError(f"{name} refuses, and has changed an argument: {error}") from error
        return _refusal(name, error, begins)
    results = dict(found_in(outcome, Tensor)) if outcome is not None else {}
    _assert_own_memory(name, results, memory)
    gradients, cotangents, refusal = _backward(name, arguments, results, begins)
    if not memory.is_unchanged(written):
        raise AssertionError(f"{name} changes what it was not to write")
    return Answer(arguments, results, gradients, cotangents, refusal)


def _refusal(name: str, error: Exception, begins: tuple[str, ...]) -> Refusal:
    text = str(error)
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        raise AssertionError(f"{name} raises {type(error).__name__}: {text}") from error
    if not text.startswith(begins) or len(text) < len(name) + 20:
        raise AssertionError(f"{name} refuses in other words: {type(error).__name__}: {text}") from error
    return Refusal(type(error), text)


def _assert_own_memory(name: str, results: Mapping[str, Tensor], memory: _Memory) -> None:
    for place, result in results.items():
        if _has_memory(result) and result.untyped_storage().data_ptr() in memory.addresses:
            raise AssertionError(f"{name}: {place} shares memory with an argument")


def _backward(
    name: str, arguments: Call, results: Mapping[str, Tensor], begins: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    leaves = {path: t for path, t in found_in(arguments, Tensor) if t.requires_grad and t.is_leaf}
    outputs = {place: t for place, t in results.items() if t.requires_grad}
    cotangents = {place: _cotangent(t, i) for i, (place, t) in enumerate(results.items())}
    none = {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}
    if not outputs or not leaves or name.endswith("_"):
        return none, cotangents, ""
    memory = _Memory({"arguments": arguments, "results": results})
    try:
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [cotangents[place] for place in outputs],
            allow_unused=True,
        )
    except Exception as error:
        return {}, cotangents, _refusal(name, error, begins).text
    if not memory.is_unchanged():
        raise AssertionError(f"{name}: backward changes an argument or a result")
    found = {p: none[p] if g is None else g for p, g in zip(leaves, gradients, strict=True)}
    for path, gradient in found.items():
        if gradient.shape != leaves[path].shape or gradient.dtype != leaves[path].dtype:
            raise AssertionError(f"{name}: the gradient of {path} is {gradient.dtype}, {gradient.shape}")
    return found, cotangents, ""


def _cotangent(result: Tensor, seed: int) -> Tensor:
    made = Made(tuple(result.shape), result.dtype, seed=1000 + seed)
    return made.tensor().to(result.device)


def _soil(tensors: Sequence[Tensor]) -> None:
    sizes = [t.numel() * t.element_size() for t in tensors]
    dirty = [torch.full((size,), 0xAB, dtype=torch.uint8) for size in sizes]
    del dirty


def verdict(
    op: Callable[..., Any],
    call: Call,
    check: Callable[[Call, Answer, Answer], None],
    *,
    also: Sequence[str] = (),
    writes: Sequence[str] = (),
    differs: Callable[[Call, Answer | Refusal, Answer | Refusal], bool] = lambda *_: False,
) -> str:
    """Whether the op gives an "answer" or a "refusal". AssertionError, if it does what it may not do.

    Args:
        check: raises unless an answer is right; it is given that of the reference besides.
        also, writes: as of ``attempt``.
        differs: whether op and reference may differ in whether they answer this call.
    """
    name = op.__name__
    found = attempt(op, call, also=also, writes=writes)
    impl = call.get("impl")
    if impl not in (None, "cpu", "reference") or (impl == "cpu" and is_meta(call)):
        if isinstance(found, Answer) and all(len(v) for v in call.values() if isinstance(v, (list, tuple))):
            raise AssertionError(f"{name} answers, with impl={impl!r}")
        return "refusal"
    plain = attempt(op, call | {"impl": "reference"}, also=also, writes=writes)
    if any(isinstance(each, Refusal) and each.text.startswith(_OF_PYTORCH) for each in (found, plain)):
        return "refusal"
    if isinstance(found, Refusal) or isinstance(plain, Refusal):
        both = isinstance(found, Refusal) and isinstance(plain, Refusal) and found.kind is plain.kind
        if not both and not differs(call, found, plain):
            what = [f"refuses: {o.text}" if isinstance(o, Refusal) else "answers" for o in (found, plain)]
            raise AssertionError(f"{name} {what[0]}; the reference {what[1]}")
        return "refusal" if isinstance(found, Refusal) else "answer"
    _assert_same_form(name, found, plain)
    if any(made.layout == "zero" for made in made_in(call)):  # PyTorch's operations make 0 of NaN times these
        plain = attempt(op, mapped(_with_memory, call) | {"impl": "reference"}, also=also, writes=writes)
        assert isinstance(plain, Answer)
    if is_meta(call):
        return "answer"
    again = attempt(op, call, also=also, writes=writes, dirt=found)
    _assert_same_bits(name, found, again)
    check(call, found, plain)
    return "answer"


def _with_memory(made: Made) -> Made:
    if made.layout != "zero":
        return made
    dtype = made.tensor().dtype
    return replace(made, layout="dense", kind="zeros", dtype=dtype, grad=False, device="cpu")


def _assert_same_form(name: str, found: Answer, plain: Answer) -> None:
    def form(answer: Answer) -> dict[str, tuple[Any, ...]]:
        return {
            place: (tuple(t.shape), t.dtype, t.device)
            for place, t in chain(answer.results.items(), answer.gradients.items())
        }

    if bool(found.refusal) != bool(plain.refusal):
        raise AssertionError(f"{name}: backward refuses in one alone: {found.refusal or plain.refusal}")
    if form(found) != form(plain):
        raise AssertionError(f"{name} gives {form(found)}; the reference {form(plain)}")


def _assert_same_bits(name: str, found: Answer, again: Answer | Refusal) -> None:
    if isinstance(again, Refusal):
        raise AssertionError(f"{name} refuses what it has answered: {again.text}")
    first = chain(found.results.items(), found.gradients.items(), found_in(found.arguments, Tensor))
    second = chain(again.results.items(), again.gradients.items(), found_in(again.arguments, Tensor))
    for (place, one), (_, other) in zip(first, second, strict=True):
        if _has_memory(one) and not torch.equal(bits_of(one), bits_of(other)):
            raise AssertionError(f"{name}: {place} has other bits the second time")


# What is right


def plain_values(value: Any, dtype: torch.dtype | None = torch.float64) -> Any:
    """The tensors of a call's arguments, or of results: dense, detached, and floating ones of a dtype."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            return value
        dense = value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        return dense.to(dtype) if dtype is not None and dense.is_floating_point() else dense
    if isinstance(value, dict):
        return {name: plain_values(item, dtype) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [plain_values(item, dtype) for item in value])
    return value


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(got: Tensor, value: Tensor, budget: Tensor, name: str) -> None:
    """Raise unless each element errs by at most its budget, and is not finite where the value is not.

    Where numbers of the budget's size overflow in the arithmetic, or the result as it is stored, anything
    may come out. A budget that is not a number says only that the result is finite.
    """
    if got.shape != value.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(value.shape)}")
    stored, arithmetic = torch.finfo(got.dtype), torch.finfo(arithmetic_of(got.dtype))
    got = got.detach().resolve_neg().double()
    budget = budget.expand(value.shape)
    fits = value.abs() < stored.max * (1 - stored.eps) - budget.nan_to_num(nan=0.0)
    fits &= ~(budget > arithmetic.eps * arithmetic.max / 8)
    fits |= ~value.isfinite()
    right = torch.where(
        value.isfinite(), ((got - value).abs() <= budget) | (budget.isnan() & got.isfinite()), ~got.isfinite()
    )
    wrong = (fits & ~right).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {value.numel()} elements are wrong; at {at}: got {float(got[at]):.9g},"
            f" expected {float(value[at]):.9g}, budget {float(budget[at]):.3g}"
        )


def assert_same_finiteness(got: Tensor, value: Tensor, name: str) -> None:
    """Raise unless the elements that are finite are so in both."""
    got, value = got.detach(), value.detach()
    other = (got.isfinite() != value.isfinite()).nonzero()
    if len(other):
        at = tuple(other[0].tolist())
        raise AssertionError(f"{name}: got {float(got[at]):.9g}, expected {float(value[at]):.9g}, at {at}")


def assert_gradients_near(found: Answer, exact: Mapping[str, Tensor], size: float = 0.0) -> None:
    """Raise unless gradients are those in float64, up to some roundings of the largest, or of ``size``.

    As the contract of an op has it (``fastkit.testing.contract``).
    """
    for path, gradient in found.gradients.items():
        value = exact[path]
        eps = 64 * torch.finfo(arithmetic_of(gradient.dtype)).eps
        if gradient.dtype.itemsize == 2:
            eps += 2 * torch.finfo(gradient.dtype).eps
        most = value.abs().max() if value.numel() else value.new_zeros(())
        budget = eps * most.clamp(min=size) + torch.finfo(gradient.dtype).tiny
        assert_within(gradient, value, budget.expand(value.shape), f"the gradient of {path}")


def in_float64(op: Callable[..., Any], found: Answer) -> Answer:
    """The reference on the numbers of an answered call, as they were raised to float64."""
    leaves = found.gradients.keys()
    raised = plain_values(found.arguments) | {"impl": "reference"}
    for path, tensor in found_in(raised, Tensor):
        tensor.requires_grad_(path in leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*matrices are singular", RuntimeWarning)
        outcome = op(**raised)
    results = dict(found_in(outcome, Tensor))
    outputs = {place: t for place, t in results.items() if t.requires_grad}
    of = {path: t for path, t in found_in(raised, Tensor) if path in leaves}
    gradients = {path: torch.zeros_like(t) for path, t in of.items()}
    if outputs and of:
        cotangents = [found.cotangents[place].to(t.dtype) for place, t in outputs.items()]
        given = torch.autograd.grad(list(outputs.values()), list(of.values()), cotangents, allow_unused=True)
        gradients |= {path: g for path, g in zip(of, given, strict=True) if g is not None}
    return Answer(raised, {p: t.detach() for p, t in results.items()}, gradients, found.cotangents, "")


# Running


def check_generated(
    make: Callable[[Choose], Any], judge: Callable[[Any], str], examples: int, *, least: float = 0.2
) -> None:
    """Judges so many calls, always the same ones; at least a share of them must be answered."""
    hypothesis = pytest.importorskip("hypothesis")
    strategies = pytest.importorskip("hypothesis.strategies")
    outcomes: Counter[str] = Counter()

    @strategies.composite
    def calls(draw: Callable[..., Any]) -> Any:
        return make(lambda options: draw(strategies.sampled_from(options)))

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(calls())
    def run(call: Any) -> None:
        outcomes[judge(call)] += 1

    # Constants of all modules that are loaded would be drawn too: other calls after each change of the code.
    providers = pytest.importorskip("hypothesis.internal.conjecture.providers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", providers.Constants)
        providers.CONSTANTS_CACHE.cache.clear()
        run()
    providers.CONSTANTS_CACHE.cache.clear()
    total = outcomes.total()
    assert outcomes["answer"] >= least * total, f"of {total} calls too few are answered: {outcomes}"
    assert outcomes["refusal"] >= total / 20, f"of {total} calls too few are refused: {outcomes}"


def check_raw(make: Callable[[Choose], Any], judge: Callable[[Any], str], calls: int) -> None:
    """As ``check_generated``, of raw ops and without hypothesis, so that it runs where a wheel is tested."""
    outcomes: Counter[str] = Counter()
    for seed in range(calls):
        call = make(random.Random(seed).choice)
        try:
            outcomes[judge(call)] += 1
        except Exception as error:
            raise AssertionError(f"call {seed}: {call}") from error
    assert outcomes["answer"] >= calls / 5, f"too few calls are answered: {outcomes}"
    assert outcomes["refusal"] >= calls / 20, f"too few calls are refused: {outcomes}"


def raw_verdict(name: str, call: Sequence[Any], written: Sequence[int] = (), but: Sequence[str] = ()) -> str:
    """What ``torch.ops.fastkit.<name>`` makes of a call: an "answer", or RuntimeError.

    AssertionError, if the answer, ``but`` some results, has other numbers than for dense copies of the
    arguments, or anything is changed but the arguments whose numbers are ``written``. On the meta device
    there are fakes in Python, which expect the ranks that ops have.
    """
    op = getattr(torch.ops.fastkit, name)
    arguments = list(mapped(Made.tensor, list(call)))
    copies = plain_values(arguments, None)
    memory = _Memory({"arguments": arguments})
    tensors = [t for i in written for _, t in found_in(arguments[i], Tensor)]
    try:
        found = op(*arguments)
    except RuntimeError:
        return "refusal"
    except Exception:
        if not is_meta({"": list(call)}):
            raise
        return "refusal"
    finally:
        assert memory.is_unchanged(tensors), f"{name} changes what it was not to write"
    if is_meta({"": list(call)}) or any(overlaps(t) for t in tensors):
        return "answer"
    expected = op(*copies)
    pairs = [(found, expected), *((arguments[i], copies[i]) for i in written)]
    for one, other in pairs:
        for (place, got), (_, value) in zip(found_in(one, Tensor), found_in(other, Tensor), strict=True):
            if place in but or not got.is_floating_point():
                continue  # indices of scores that rounding makes equal may differ
            eps = 1e3 * torch.finfo(got.dtype).eps
            got, value = got.detach().resolve_neg().double(), value.double()
            most = torch.where(value.isfinite(), value.abs(), 0.0).sum()
            near = ((got - value).abs() <= eps * most) | ~(got.isfinite() & value.isfinite())
            assert near.all(), f"{name}: {place} is not what it is of dense copies"
    return "answer"


def overlaps(tensor: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(tensor.size(), tensor.stride(), strict=True))
