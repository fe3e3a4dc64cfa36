"""Files of safetensors, which keep what methods have learnt: to read one runs nothing that is in it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import Tensor


def safetensors(module: str, what: str) -> ModuleType:
    """``safetensors`` or a module of it; ``what`` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what} needs safetensors, which is not installed; pip install "fastkit[hf]"'
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file = safetensors("safetensors.torch", f"writing {path.name}").save_file
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}  # no two share memory, which safetensors refuses
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        apart[name] = tensor if alone else tensor.clone()
        seen.add(storage.data_ptr())
    save_file(apart, path, dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata; ValueError if the file is not whole."""
    library = safetensors("safetensors", f"reading {path.name}")
    try:
        with library.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (library.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got one that is not ({error})") from error
