"""linear_cross_entropy in training and evaluation, beside its products and the ways to write it today."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastkit import ops
from fastkit._dispatch import Impl
from fastkit.bench.case import Call, Case, Skip
from fastkit.bench.contest import DeviceType, Yardstick, compiler, load, makers_of_ours, our_others
from fastkit.ops.linear_cross_entropy import KERNELS

PRODUCTS = "mm, same products"
PACKAGES = ("liger-kernel", "cut-cross-entropy")  # of GPUs
_CHUNKS = 8  # of tokens
_SMOOTHING, _SOFTCAP, _Z_LOSS = 0.1, 30.0, 1e-4


def case(
    N: int,
    V: int,
    D: int,
    *,
    backward: bool = True,
    everything: bool = False,
    warm: bool = False,
    compile: bool = True,
    packages: bool = True,
    device: DeviceType = "cpu",
) -> Case:
    """N tokens, V classes, D columns; the mean, whose gradients go to input and weight; on a GPU in bfloat16.

    ``everything``: with a bias, weights of classes and tokens, smoothing, a softcap and a z-loss. Without
    ``backward`` under ``no_grad``. The floor are the products, written to memory that is there: that of the
    logits, and with backward the two of the gradients. ``packages``: beside others' forms of the loss, which
    have no options.
    """
    element = 2 if device == "cuda" else 4
    names = " all options" if everything else "", " bf16" if device == "cuda" else ""
    return Case(
        op="linear_cross_entropy",
        shape=f"{N}x{V}x{D}{''.join(names)}",
        direction="fwd+bwd" if backward else "fwd",
        floor_bytes=element * (N + V) * D * (2 if backward else 1) + 8 * N,
        contest=partial(_Loss, (N, V, D), backward, everything, compile, packages, device),
        warm=warm,
        tolerance=2e-2 if device == "cuda" else 1e-4,
        yardsticks=our_others(device, KERNELS) | {PRODUCTS},
        floor=PRODUCTS,
        device=device,
        peers=PACKAGES if device == "cuda" else (),
    )


class _Inputs(NamedTuple):
    """The arguments of each form; what follows the targets is of all options alone."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    token_weight: Tensor | None

    def of(self, begin: int, end: int) -> _Inputs:
        """Of some of the tokens."""
        of_tokens = None if self.token_weight is None else self.token_weight[begin:end]
        tokens = self.input[begin:end], self.target[begin:end]
        return self._replace(input=tokens[0], target=tokens[1], token_weight=of_tokens)


class _Loss:
    """The loss, and with backward the gradients to the input, the weight and, with all options, the bias."""

    def __init__(
        self,
        size: tuple[int, int, int],
        backward: bool,
        everything: bool,
        compile: bool,
        packages: bool,
        device: DeviceType,
    ) -> None:
        self.size = size
        self.backward = backward
        self.everything = everything
        self.compile = compile
        self.packages = packages and not everything
        self.device: DeviceType = device

    @cached_property
    def inputs(self) -> _Inputs:
        N, V, D = self.size
        generator = torch.Generator(self.device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=self.device)
        rand = partial(torch.rand, generator=generator, device=self.device)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        inputs = _Inputs(
            randn(N, D).to(dtype),
            (2 / D**0.5 * randn(V, D)).to(dtype),
            torch.randint(V, (N,), generator=generator, device=self.device),
            *((randn(V).to(dtype), rand(V), rand(N)) if self.everything else (None, None, None)),
        )
        for leaf in _leaves(inputs):
            leaf.requires_grad_(self.backward)
        return inputs

    @property
    def makers(self) -> Mapping[str, Callable[[], Call]]:
        makers: dict[str, Callable[[], Call]] = {
            **makers_of_ours(self.device, KERNELS, lambda impl: self.call(partial(_ours, impl=impl))),
            PRODUCTS: self.make_products,
            "eager": partial(self.call, _eager),
            "chunks of tokens": partial(self.call, _by_chunks),
        }
        if self.compile:
            makers["compiled"] = self.make_compiled
        if self.packages:
            makers["torch in chunks"] = self.make_torch
            if self.device == "cuda":
                makers |= {"liger_kernel": self.make_liger, "cut_cross_entropy": self.make_cce}
        return makers

    def call(self, form: Callable[..., Tensor]) -> Call:
        inputs = self.inputs
        leaves = _leaves(inputs)

        def call() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(self.backward):
                loss = form(*inputs)
            gradients = torch.autograd.grad(loss, leaves) if self.backward else ()
            return loss.detach(), *gradients

        return call

    def make_compiled(self) -> Call:
        call = self.call(compiler(self.device)(_eager))
        call()
        return call

    def make_torch(self) -> Call:
        """PyTorch's own, by blocks of tokens."""
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Skip("torch is older than 2.13, which has it in chunks")
        options = torch.nn.LinearCrossEntropyOptions()
        of_torch: Any = torch.nn.functional.linear_cross_entropy

        def form(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor | None) -> Tensor:
            return of_torch(x, weight, target, options=options)

        call = self.call(form)
        call()  # the first imports much
        return call

    def make_liger(self) -> Call:
        function = load("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

        def form(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor | None) -> Tensor:
            return function.apply(x, weight, target)[0]

        return self.call(form)

    def make_cce(self) -> Call:
        """Apple's, as it comes: small shares of a gradient are left out."""
        of_apple = load("cut_cross_entropy").linear_cross_entropy

        def form(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor | None) -> Tensor:
            return of_apple(x, weight, target)

        return self.call(form)

    def make_products(self) -> Call:
        """Of matrices as large as these; the second and third take the logits for their gradient."""
        x, weight = (t.detach() for t in self.inputs[:2])
        logits = x.new_empty(len(x), len(weight))
        of_input, of_weight = torch.empty_like(x), torch.empty_like(weight)

        def call() -> Yardstick:
            torch.mm(x, weight.T, out=logits)
            if not self.backward:
                return Yardstick((logits,), self.error_of_products)
            torch.mm(logits, weight, out=of_input)
            torch.mm(logits.T, x, out=of_weight)
            return Yardstick((logits, of_input, of_weight), self.error_of_products)

        return call

    def error(self, result: Any) -> float:
        """The largest in any result, relative to its largest value."""
        if isinstance(result, Yardstick):
            return result.measure(result.result)
        return _error(self.expected, result)

    def error_of_products(self, result: Sequence[Tensor]) -> float:
        """Of some rows of each, from the logits that there are."""
        x, weight = (t.detach().double() for t in self.inputs[:2])
        N, V, _ = self.size
        tokens, classes = (torch.linspace(0, n - 1, min(n, 16)).long() for n in (N, V))
        logits, *gradients = result
        expected, found = [x[tokens] @ weight.T], [logits[tokens]]
        if gradients:
            expected += [logits[tokens].double() @ weight, logits[:, classes].double().T @ x]
            found += [gradients[0][tokens], gradients[1][classes]]
        return _error(expected, found)

    @cached_property
    def expected(self) -> list[Tensor]:
        """In float64, some tokens at a time: their logits have 2^25 numbers."""
        inputs = _Inputs(
            *(t if t is None or t.dtype == torch.int64 else t.detach().double() for t in self.inputs)  # pyright: ignore[reportArgumentType]
        )
        leaves = _leaves(inputs)
        for leaf in leaves:
            leaf.requires_grad_(self.backward)
        N, V, _ = self.size
        rows = max(1, 2**25 // V)
        total = inputs.input.new_zeros(())
        for begin in range(0, N, rows):
            part = _sum(*inputs.of(begin, begin + rows)) / _divisor(inputs.target, inputs.weight)
            if self.backward:
                part.backward()
            total += part.detach()
        return [total, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _leaves(inputs: _Inputs) -> list[Tensor]:
    leaves = [inputs.input, inputs.linear_weight]
    return leaves if inputs.linear_bias is None else [*leaves, inputs.linear_bias]


def _error(expected: Sequence[Tensor], result: Sequence[Tensor]) -> float:
    errors = [
        (actual.detach().double() - want).abs().amax() / want.abs().amax()
        for want, actual in zip(expected, result, strict=True)
    ]
    return float(torch.stack(errors).amax())


# The forms: what follows the targets is None, or all options are on


def _ours(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    if weight is None:
        return ops.linear_cross_entropy(x, linear_weight, target, impl=impl)
    return ops.linear_cross_entropy(
        x,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
        label_smoothing=_SMOOTHING,
        softcap=_SOFTCAP,
        z_loss=_Z_LOSS,
        impl=impl,
    )


def _sum(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
) -> Tensor:
    """Of the losses, from logits that are raised to float32."""
    logits = linear(x, linear_weight, linear_bias)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if weight is None:
        return cross_entropy(logits, target, reduction="sum")
    assert token_weight is not None
    logits = _SOFTCAP * torch.tanh(logits / _SOFTCAP)
    losses = cross_entropy(logits, target, weight=weight, label_smoothing=_SMOOTHING, reduction="none")
    losses = losses + _Z_LOSS * logits.logsumexp(1).square()
    return (losses * token_weight).sum()


def _divisor(target: Tensor, weight: Tensor | None) -> Tensor | int:
    return len(target) if weight is None else weight[target].sum()


def _eager(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
) -> Tensor:
    losses = _sum(x, linear_weight, target, linear_bias, weight, token_weight)
    return losses / _divisor(target, weight)


def _by_chunks(*arguments: Tensor | None) -> Tensor:
    """As torchtune has it: the output layer and the losses of some tokens at a time."""
    inputs = _Inputs(*arguments)  # pyright: ignore[reportArgumentType]
    rows = -(-len(inputs.target) // _CHUNKS)
    parts = [_sum(*inputs.of(begin, begin + rows)) for begin in range(0, len(inputs.target), rows)]
    return torch.stack(parts).sum() / _divisor(inputs.target, inputs.weight)
