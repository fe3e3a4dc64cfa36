"""A fitted translator as one safetensors file: its maps and tables, and beside them options and figures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastkit import __version__
from fastkit._sync import replace_file
from fastkit.methods.word_translation.settings import OP

FORMAT = 1
_KEY = "fastkit.word_translation"  # of the metadata, in which safetensors has strings alone


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The file is the old one or the whole new one, whenever the process or the machine stops."""
    if path.is_dir():
        raise ValueError(
            f"{OP}: path must be a file, got the folder {path}; pass {path / 'words.safetensors'}"
        )
    save_file = _safetensors("safetensors.torch").save_file
    text = json.dumps({"format": FORMAT, "fastkit": __version__, **facts}, allow_nan=False)
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(_apart(copies), temporary, {_KEY: text}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts; ValueError for a file that is not what ``write`` makes."""
    if not path.exists():
        raise FileNotFoundError(f"{OP}: path must be a file of save, got {path}, which is not there")
    safetensors = _safetensors("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{OP}: path must be a whole safetensors file, got {path}, which is not ({error})"
        ) from error
    try:
        facts = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{OP}: {path} must have facts as JSON, got what is not ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(
            f"{OP}: path must be a file of save, got {path}, a safetensors file of something else"
        )
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{OP}: {path} must be of format {FORMAT}, got {facts.get('format')!r}; is it of a later version?"
        )
    return tensors, facts


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two share memory, which safetensors refuses."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        apart[name] = tensor if whole and place not in seen else tensor.clone()
        seen.add(place)
    return apart


def check_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, ...]]) -> None:
    """That the tensors are there, finite where they are floats, and sizes of one letter are equal."""
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{OP}: {path} must have a tensor {name}, got none")
        fits = tensor.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(
                f"{OP}: {name} of {path} must have shape ({expected}), got {tuple(tensor.shape)}"
            )
        if name != "restart_costs_" and not tensor.isfinite().all():
            raise ValueError(f"{OP}: {name} of {path} must be finite, got NaN or inf")
        expected = torch.int64 if name.startswith("restart_") and name != "restart_costs_" else torch.float32
        if tensor.dtype != expected:
            raise ValueError(f"{OP}: {name} of {path} must be {expected}, got {tensor.dtype}")


def _safetensors(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{OP}: the file needs safetensors, which is not installed; pip install "fastkit[hf]"'
        ) from error
