"""A language model as a folder.

    config.json          format, version, and the options that the model was made with
    model.safetensors    its parameters

The two are replaced together, see ``fastkit.methods._folder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastkit import __version__
from fastkit.methods._folder import find_file, read_json, replace_files, write_json
from fastkit.methods._safetensors import read_tensors, safetensors, write_tensors
from fastkit.ops._checks import FLOATING

FORMAT = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_OP, _KIND = "TiedLanguageModel", "fastkit.tied_language_model"


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    safetensors("safetensors.torch", f"writing {TENSORS}")  # or nothing is made
    facts = {"kind": _KIND, "format": FORMAT, "fastkit": __version__, "model": dict(config)}
    replace_files(
        folder,
        {
            TENSORS: lambda path: write_tensors(path, tensors, {"format": "pt"}),
            CONFIG: lambda path: write_json(path, facts),
        },
        last=CONFIG,
    )


def read(folder: Path, options: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and tensors, which agree in the sizes that memory is taken for."""
    places = {name: find_file(folder, name) for name in (CONFIG, TENSORS)}
    for name, path in places.items():
        if path is None:
            raise FileNotFoundError(f"{_OP}: {folder} must hold {name}, got none")
    config_path, tensors_path = places[CONFIG], places[TENSORS]
    assert config_path is not None and tensors_path is not None
    try:
        config = _options(config_path, options)
        tensors = read_tensors(tensors_path)[0]
    except ValueError as error:
        raise ValueError(f"{_OP}: {error}") from error
    sizes = tuple(config[name] for name in ("vocab_size", "hidden_size"))
    embedding = tensors.get("embedding.weight")
    layers = sum(name.startswith("lstm.weight_ih_l") for name in tensors)
    if embedding is None or tuple(embedding.shape) != sizes or layers != config["num_layers"]:
        found = "no embedding" if embedding is None else f"an embedding of shape {tuple(embedding.shape)}"
        raise ValueError(
            f"{_OP}: {folder} must hold an embedding of shape {sizes} and {config['num_layers']} layers, as"
            f" {CONFIG} says, got {found} and {layers} layers"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATING):
        raise ValueError(
            f"{_OP}: the tensors of {folder} must be of one floating-point dtype, got"
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    return config, tensors


def _options(path: Path, options: set[str]) -> dict[str, Any]:
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("kind") != _KIND:
        raise ValueError(f"{path} must be of a language model of fastkit, got one of something else")
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {facts.get('format')!r:.40}; read it with the fastkit"
            f" that wrote it, {facts.get('fastkit')!r:.40}"
        )
    config = facts.get("model")
    if not isinstance(config, dict) or set(config) != options:
        raise ValueError(f"{path} must have the options {', '.join(sorted(options))} of a model, got others")
    return config
