"""Arrays of an .npz that nobody vouches for."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastkit._command import Refusal
from fastkit.recipes._experiment import sha256

Array = np.ndarray[Any, Any]


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, Array]:
    """Those of these names; others are not read.

    Raises:
        Refusal: it cannot be read, has objects, or lacks one.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in keys if key in archive}
    except Exception as error:  # of half a dozen kinds, from zipfile, zlib and numpy
        raise Refusal(
            f"{path} must be an .npz of plain arrays, got one that cannot be read ({error})"
        ) from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise Refusal(f"{path} must have the keys {', '.join(keys)}, got a file without {', '.join(missing)}")
    return arrays


def described(array: Array) -> str:
    return f"{array.dtype} of shape {array.shape}"


def hash_of(arrays: Iterable[Array]) -> str:
    """SHA-256 of dtypes, shapes and values."""
    return sha256(f"{a.dtype}{a.shape}".encode() + np.ascontiguousarray(a).data for a in arrays)
