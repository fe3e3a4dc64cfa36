"""The base of every op's autograd functions, whether a call needs one, and autocast."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` whose ``apply`` takes all arguments of ``forward``, by position.

    PyTorch's inspects the signature at every call, and binds the arguments to it: 20 microseconds.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.forward).parameters.values()
        cls.forward.__signature__ = _Positional(list(parameters))  # pyright: ignore[reportFunctionMemberAccess]


class _Positional(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return super().bind(*args, **kwargs) if kwargs else _Bound(self, args)


class _Bound:
    """What ``apply`` asks of bound arguments."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...]) -> None:
        self.signature = signature
        self.args = args
        self.kwargs: dict[str, Any] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.signature.parameters, self.args, strict=True))

    def apply_defaults(self) -> None:
        pass


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether something may differentiate, batch or trace a call on these.

    If not, the raw op does all that its Function would, without the 10 to 20 microseconds of ``apply``.
    """
    if torch.compiler.is_compiling() or transforms():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transforms() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_mode()  # pyright: ignore[reportPrivateUsage]


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for calls on x."""
    device = x.device.type  # torch.amp.is_autocast_available cannot be traced before torch 2.12
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For calls on x that have cast what is to be cast; where there is no autocast it cannot be disabled."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def forward_mode() -> bool:
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is zero."""
    if left is None or right is None:
        return left if right is None else right
    return left + right
