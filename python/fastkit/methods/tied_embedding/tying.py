"""One parameter for the embedding and the output of a model; that it is one, and that both ends reach it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastkit.methods.tied_embedding.probe import undisturbed
from fastkit.nn import TiedEmbedding
from fastkit.ops._checks import FLOATING

Model = TypeVar("Model", bound=nn.Module)

_TIE = "_fastkit_tied"  # the attribute of a model that says how it is tied: copies keep it


class UntiedError(AssertionError):
    """The embedding and the output have two matrices."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class HalfGradientError(UntiedError):
    """They have one matrix, and the gradient of one of them does not reach it."""


class End(NamedTuple):
    """A module with one of the matrices."""

    name: str
    module: Any


class _Tie(NamedTuple):
    names: tuple[str, ...]  # of the embeddings, and last of the output
    configured: bool  # whether it is transformers that ties them, by the model's configuration


def tie_embeddings(model: Model, *, input: str | None = None, output: str | None = None) -> Model:
    """Give the output of a model the matrix of its embedding, as one parameter; returns the model.

    Args:
        model: one of transformers, whose two ends it knows; then ``config.tie_word_embeddings`` is set, so
            that it is saved and loaded as tied. Or any other module, with the two named.
        input, output: names of two modules in it that have a ``weight`` (V, H) each, as an ``nn.Embedding``
            and an ``nn.Linear``. The model keeps the names, for ``retie`` and ``assert_tied``. Where they are
            the two ends that a model of transformers knows, it is tied as if they were not named. Of others
            its configuration does not know: ``save_pretrained`` leaves the matrix of the output out, and
            ``from_pretrained`` makes a new one; call ``tie_embeddings`` with the names again.

    The value is that of the embedding; the output keeps its bias. An encoder's embedding is left alone, see
    ``tie_three_way``. Tie before the optimizer is made, which would go on with a matrix that the model no
    longer has, and before the model is sharded.

    Raises:
        ValueError: the two matrices differ in shape; a name is of no module; an end has no ``weight`` of its
            own, as one that an adapter wraps; transformers does not know how to tie the model.
        TypeError: a matrix is quantised, or sharded (a DTensor).

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017.
    """
    op = "tie_embeddings"
    *embeddings, last = _ends(op, model, input, output)
    for first in embeddings:
        _check_same_shape(op, first, last)
    if embeddings[0].module is not last.module:  # a TiedEmbedding is tied
        _tie(op, model, embeddings, last, named=input is not None)
    return model


def retie(model: Model, *, input: str | None = None, output: str | None = None) -> Model:
    """Make one parameter of the two matrices again, where the tie was lost; returns the model.

    ``to_empty()``, ``set_input_embeddings()`` and the like make two of them. The value is that of the
    embedding; a tie that was not lost is left as it is. For a model that ``tie_embeddings`` or
    ``tie_three_way`` tied by names they need not be given again; after the latter it is of all three
    matrices, with the value of the decoder's. An optimizer made before goes on with a matrix that the model
    no longer has.

    Raises:
        ValueError: the model is none of those that are tied: call ``tie_embeddings``; else as there.
        TypeError: as ``tie_embeddings``.
    """
    op = "retie"
    *embeddings, last = _ends(op, model, input, output)
    known = input is not None or hasattr(model, _TIE) or embeddings[0].module is last.module
    if not known and not hasattr(_config(model), "tie_word_embeddings"):
        raise ValueError(
            f"retie: {type(model).__name__} must have been tied before, got one that was not; call"
            " tie_embeddings(model)"
        )
    if (
        _is_configured(model, embeddings, last, input)
        and not known
        and not _config(model).tie_word_embeddings
    ):
        raise ValueError(
            f"retie: {type(model).__name__} must be tied by its configuration, got"
            " config.tie_word_embeddings=False; call tie_embeddings(model)"
        )
    for first in embeddings:
        _check_same_shape(op, first, last)
    if any(weight_of(op, first) is not weight_of(op, last) for first in embeddings):
        _tie(op, model, embeddings, last, named=input is not None)
    return model


def assert_tied(
    model: nn.Module, *, input: str | None = None, output: str | None = None, gradient: bool = True
) -> None:
    """That the embedding and the output of a model have one matrix, and that the gradient of both reaches it.

    Args:
        model, input, output: as for ``tie_embeddings``; the two may be one ``TiedEmbedding``, and the model
            may be one itself. A model that ``tie_three_way`` has tied is looked at in all three places.
        gradient: whether to call both modules, on a token and on a row of small numbers, and differentiate
            what they return. Neither weights change, nor ``.grad``, the state of random numbers, or training
            mode; hooks of the modules and of the parameter are called.

    Raises:
        UntiedError: there are two matrices, with a memory each.
        HalfGradientError: the two share their memory, but are two parameters, each with a gradient of its
            own; or there is one, which an end detaches, so that it trains with a part of its gradient. A loss
            falls all the same.
        ValueError, TypeError: as ``tie_embeddings``.
    """
    *embeddings, last = _ends("assert_tied", model, input, output)
    for first in embeddings:
        _check_tie(first, last, gradient)


def _check_tie(first: End, last: End, gradient: bool) -> None:
    weight, other = (weight_of("assert_tied", end) for end in (first, last))
    if weight is not other:
        if _has_values(weight) and _has_values(other) and weight.data_ptr() == other.data_ptr():
            raise HalfGradientError(
                f"assert_tied: {first.name} and {last.name} must have one parameter, got two that share their"
                " memory, each with its part of the gradient; call retie(model)"
            )
        raise UntiedError(
            f"assert_tied: {first.name} and {last.name} must have one weight, got two; call retie(model)"
        )
    if gradient:
        _check_gradients(first, last, weight)


@torch.inference_mode(False)
def _check_gradients(first: End, last: End, weight: nn.Parameter) -> None:
    tied = isinstance(first.module, TiedEmbedding) and first.module is last.module
    required = weight.requires_grad
    padding = getattr(first.module, "padding_idx", None)
    ids = torch.full((1, 1), 1 if padding == 0 and len(weight) > 1 else 0, device=weight.device)
    # Small, so that no softcap is at its bound.
    row = weight.new_full((1, 1, weight.shape[1]), 2**-10, requires_grad=False)
    calls = ((first, first.module, ids), (last, last.module.logits if tied else last.module, row))
    try:
        weight.requires_grad_(True)  # one that is frozen is to be tied too
        for end, call, argument in calls:
            with undisturbed(end.module), _unbounded(end.module), torch.enable_grad():
                found = _gradient(call(argument), weight)
            if found is None or (_has_values(found) and not bool(found.any())):
                what = "embedding" if argument is ids else "output"
                raise HalfGradientError(
                    f"assert_tied: the gradient of {end.name}, the {what}, must reach the weight that both"
                    " ends share, got none; look for a detach(), a no_grad() or tie_grad on the way"
                )
    finally:
        weight.requires_grad_(required)


@contextlib.contextmanager
def _unbounded(module: Any) -> Generator[None]:
    """Without ``max_norm`` of an ``nn.Embedding``, by which a lookup writes to its weight."""
    norm = getattr(module, "max_norm", None)
    try:
        if norm is not None:
            module.max_norm = None
        yield
    finally:
        if norm is not None:
            module.max_norm = norm


def _gradient(made: Tensor, weight: nn.Parameter) -> Tensor | None:
    if not made.requires_grad:
        return None
    finite = made.where(made.isfinite(), 0)  # excluded tokens have -inf
    return torch.autograd.grad(finite.sum(), weight, allow_unused=True)[0]


def _has_values(tensor: Tensor) -> bool:
    """Not on the meta device, nor fake."""
    return tensor.device.type != "meta" and type(tensor.data) is Tensor


def check_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")


def remember_tie(model: nn.Module, *names: str, configured: bool = False) -> None:
    """The names of the embeddings and, last, of the output, for ``retie`` and ``assert_tied``."""
    setattr(model, _TIE, _Tie(names, configured))


def _is_configured(model: nn.Module, embeddings: list[End], last: End, input: str | None) -> bool:
    """Whether the tie is a matter of transformers: of the model's own two ends, unless it was recorded."""
    tie: _Tie | None = getattr(model, _TIE, None)
    if input is None and tie is not None:
        return tie.configured
    own = _own_ends(model)
    if own is None or not hasattr(_config(model), "tie_word_embeddings"):
        return False
    return own[0] is embeddings[0].module and own[1] is last.module


def _tie(op: str, model: nn.Module, embeddings: list[End], last: End, *, named: bool) -> None:
    if _is_configured(model, embeddings, last, "" if named else None):
        try:
            return tie_as_transformers(op, model, embeddings, last)
        except ValueError:  # it has no account of them: they are tied by their names
            if not named:
                raise
    share(*embeddings, last)
    remember_tie(model, *(end.name for end in (*embeddings, last)))


def _ends(op: str, model: nn.Module, input: str | None, output: str | None) -> list[End]:
    """The embeddings, of which a three-way tie has two, and last the output."""
    check_module(op, model)
    if (input is None) != (output is None):
        raise ValueError(f"{op}: input and output must be given both or neither, got {input!r}, {output!r}")
    if input is not None and output is not None:
        return [named_end(op, model, "input", input), named_end(op, model, "output", output)]
    tie: _Tie | None = getattr(model, _TIE, None)
    if tie is not None:
        arguments = [*("input" for _ in tie.names[1:]), "output"]
        return [named_end(op, model, *pair) for pair in zip(arguments, tie.names, strict=True)]
    if isinstance(model, TiedEmbedding):
        return [End(type(model).__name__, model)] * 2
    found = _own_ends(model)
    if found is None:
        raise ValueError(
            f"{op}: input and output must be named for {type(model).__name__}, which does not know its input"
            " and output embeddings; give the names of the two modules"
        )
    return ends_of(model, *found)


def ends_of(model: nn.Module, *modules: Any) -> list[End]:
    """With the names that they have in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    return [End(names.get(id(module), type(module).__name__), module) for module in modules]


def _own_ends(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """Those that a model of transformers knows."""
    try:
        found = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if all(isinstance(module, nn.Module) for module in found) else None


def named_end(op: str, model: nn.Module, argument: str, name: str) -> End:
    try:
        return End(name or type(model).__name__, model.get_submodule(name))
    except AttributeError:
        raise ValueError(
            f"{op}: {argument} must be the name of a module of {type(model).__name__}, got {name!r}; see"
            " model.named_modules()"
        ) from None


def weight_of(op: str, end: End) -> nn.Parameter:
    weight = end.module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{op}: {end.name} must have a parameter `weight` of its own, got {type(end.module).__name__};"
            " merge or unload what wraps it"
        )
    if type(weight.data).__name__ == "DTensor" or type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{op}: {end.name}.weight is a DTensor; tie the model before it is sharded, both ends in one"
            " group"
        )
    if weight.dtype not in FLOATING or weight.dim() != 2:
        raise TypeError(
            f"{op}: {end.name}.weight must be a floating-point matrix, got {weight.dtype} of shape"
            f" {tuple(weight.shape)}; dequantise it"
        )
    return weight


def _check_same_shape(op: str, first: End, last: End) -> None:
    sizes = [tuple(weight_of(op, end).shape) for end in (first, last)]
    if sizes[0] == sizes[1]:
        return
    cure = "resize one with resize_token_embeddings or by hand"
    if sizes[0][1] != sizes[1][1]:
        cure = "project what goes into the output to the width of the embedding first, with an nn.Linear"
    raise ValueError(
        f"{op}: {last.name}.weight must have the shape of {first.name}.weight, {sizes[0]}, got {sizes[1]};"
        f" {cure}"
    )


def share(first: End, *others: End) -> None:
    for end in others:
        end.module.weight = first.module.weight


def _config(model: Any) -> Any:
    return getattr(model, "config", None)


def tie_as_transformers(op: str, model: Any, embeddings: list[End], last: End) -> None:
    """By the model's own account of what is tied, which saving and loading go by too."""
    before = model.config.tie_word_embeddings
    model.config.tie_word_embeddings = True
    known: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    *keys, key = (f"{end.name}.weight" for end in (*embeddings, last))
    root = _root(known, key)
    three = len(embeddings) > 1
    missing = [each for each in keys if _root(known, each) != root] if three else [key][key in known :]
    if missing:
        model.config.tie_word_embeddings = before
        arguments = ("decoder", "encoder", "output") if three else ("input", "output")
        ends = zip(arguments, (*embeddings, last), strict=True)
        raise ValueError(
            f"{op}: {type(model).__name__} must say how it is tied, got no {missing[-1]} in its"
            f" _tied_weights_keys; name {', '.join(f'{name}={end.name!r}' for name, end in ends)} to tie it"
            " without its configuration, as it will not be saved"
        )
    if three:  # the matrix that the others are tied to may be one beside the three
        model.get_submodule(root.rpartition(".")[0]).weight = embeddings[0].module.weight
    if hasattr(model.config, "scale_decoder_outputs"):  # of T5, which sets it for one that is made tied
        model.config.scale_decoder_outputs = True
    model.all_tied_weights_keys = known
    model.tie_weights()
    for first in embeddings:
        if last.module.weight is not first.module.weight:  # where its account is of another pair
            share(first, last)


def _root(known: dict[str, str], key: str) -> str:
    """What a key is tied to, in the end."""
    for _ in known:
        key = known.get(key, key)
    return key
