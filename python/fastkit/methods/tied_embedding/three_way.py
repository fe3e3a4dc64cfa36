"""Three-way tying: the two embeddings of an encoder and a decoder, and the output, with one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fastkit.methods.tied_embedding.tying import (
    End,
    check_module,
    ends_of,
    named_end,
    remember_tie,
    share,
    tie_as_transformers,
    weight_of,
)

Model = TypeVar("Model", bound=nn.Module)

_OP = "tie_three_way"


def tie_three_way(
    model: Model,
    *,
    encoder: str | None = None,
    decoder: str | None = None,
    output: str | None = None,
    tokenizers: tuple[Any, Any] | None = None,
) -> Model:
    """Give an encoder's embedding, a decoder's and the output one parameter; returns the model.

    It is for models whose two languages have one vocabulary, as joint byte pairs: a row is then the same
    piece of text at all three places.

    Args:
        model: an encoder with a decoder of transformers, whose three ends it knows; then
            ``config.tie_word_embeddings`` is set, so that it is saved and loaded as tied. Or any other
            module, with the three named.
        encoder, decoder, output: names of three modules in it that have a ``weight`` (V, H) each. The model
            keeps the names, for ``retie`` and ``assert_tied``, which then are of all three.
        tokenizers: that of the source and that of the target, to be compared: tokenizers of transformers, or
            mappings of a token to its id. Without, the sizes alone are.

    The value is that of the decoder's embedding; the output keeps its bias. Tie before the optimizer is made,
    and before the model is sharded.

    Raises:
        ValueError: the matrices differ in the number of words or in width; the tokenizers differ; names are
            given in part, or are of no module; an end has no ``weight`` of its own; transformers does not
            know how to tie the three, as where a model is made with two vocabularies; ``model`` is no encoder
            with a decoder.
        TypeError: a matrix is quantised, or sharded (a DTensor); a tokenizer is none.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017.

    Example:
        >>> import torch
        >>> from fastkit.methods.tied_embedding import assert_tied, tie_three_way
        >>> model = torch.nn.ModuleDict({
        ...     "source": torch.nn.Embedding(50, 8),
        ...     "target": torch.nn.Embedding(50, 8),
        ...     "scores": torch.nn.Linear(8, 50),
        ... })
        >>> model = tie_three_way(model, encoder="source", decoder="target", output="scores")
        >>> assert_tied(model)
        >>> sum(p.numel() for p in model.parameters())  # 50 words, 8 wide, and the bias of the output
        450
    """
    check_module(_OP, model)
    if tokenizers is not None:
        _check_vocabularies(*tokenizers)
    names = {"encoder": encoder, "decoder": decoder, "output": output}
    given = {argument: name for argument, name in names.items() if name is not None}
    if given and len(given) < 3:
        raise ValueError(
            f"{_OP}: encoder, decoder and output must be given all or none, got {', '.join(given)} alone"
        )
    if given:
        source, target, last = (named_end(_OP, model, *pair) for pair in given.items())
    else:
        source, target, last = _of_transformers(model)
    for end in (source, last):
        _check_same_shape(target, end)
    if given:
        share(target, source, last)
    else:
        tie_as_transformers(_OP, model, [target, source], last)
    remember_tie(model, target.name, source.name, last.name, configured=not given)
    return model


def _of_transformers(model: Any) -> list[End]:
    config = getattr(model, "config", None)
    if not hasattr(config, "tie_word_embeddings"):
        raise ValueError(
            f"{_OP}: encoder, decoder and output must be named for {type(model).__name__}, which does not"
            " know them; give the names of the three modules"
        )
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{_OP}: {type(model).__name__} must be an encoder with a decoder, got one without; call"
            " tie_embeddings(model)"
        )
    parts = model.get_encoder(), model.get_decoder()
    modules = [*(part.get_input_embeddings() for part in parts), model.get_output_embeddings()]
    for argument, module in zip(("encoder", "decoder", "output"), modules, strict=True):
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{_OP}: {argument} must be named for {type(model).__name__}, which does not know it; give"
                " the names of the three modules"
            )
    return ends_of(model, *modules)


def _check_same_shape(end: End, other: End) -> None:
    sizes, others = (tuple(weight_of(_OP, each).shape) for each in (end, other))
    if sizes[0] != others[0]:
        raise ValueError(
            f"{_OP}: {other.name} must have the vocabulary of {end.name}, {sizes[0]} words, got {others[0]};"
            " make one vocabulary of both languages, as of joint byte pairs"
        )
    if sizes != others:
        raise ValueError(
            f"{_OP}: {other.name} must have the width of {end.name}, {sizes[1]}, got {others[1]}; project"
            " what comes out of the embedding, or goes into the output, with an nn.Linear"
        )


def _check_vocabularies(source: Any, target: Any) -> None:
    one, other = (_vocabulary(tokenizer) for tokenizer in (source, target))
    for token in sorted({*one, *other}):
        if one.get(token) != other.get(token):
            raise ValueError(
                f"{_OP}: tokenizers must have one vocabulary, got {token!r} as {one.get(token)} in that of"
                f" the source and {other.get(token)} in that of the target; train one on both languages"
            )


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    found = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{_OP}: tokenizers must have get_vocab() or be mappings of tokens to ids, got"
            f" {type(tokenizer).__name__}"
        )
    return found  # pyright: ignore[reportUnknownVariableType]
