"""Word vectors as arrays: .npz, .npy and .safetensors. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkit.methods._safetensors import safetensors
from fastkit.methods.word_translation.vector_rows import KeptRows, Rules
from fastkit.methods.word_translation.vector_text import Errors

Array = np.ndarray[Any, Any]
Words = Sequence[str] | str | os.PathLike[str]

FORMAT = "fastkit word vectors 1"
LARGEST_METADATA = 90 << 20  # bytes: safetensors reads headers of up to 100 MB
_BLOCK = 1 << 20  # numbers that are converted at a time
_FLOATING = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


def read_npz(path: Path, rules: Rules, *, errors: Errors) -> KeptRows:
    keys = ("words", "vectors")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in keys if key in archive}
    except Exception as error:  # of half a dozen kinds, from zipfile, zlib and numpy
        raise rules.error(
            f"must be an .npz of plain arrays, got one that cannot be read ({error})"
        ) from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise rules.error(f"must have the arrays words and vectors, got a file without {', '.join(missing)}")
    _check_table(rules, arrays["vectors"])
    return _keep(rules, arrays["vectors"], _names(rules, arrays["words"], errors))


def read_npy(path: Path, rules: Rules, *, words: Words | None, errors: Errors) -> tuple[KeptRows, bool]:
    """The vectors, and whether they have words."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(table, np.ndarray):
            table.close()
            raise ValueError("an archive")
    except Exception as error:  # as above
        raise rules.error(
            f"must be an .npy of a plain array, got one that cannot be read ({error})"
        ) from error
    _check_table(rules, table)
    names = _words_of(path, rules, words, errors)
    return _keep(rules, table, names), names is not None


def read_safetensors(
    path: Path, rules: Rules, *, words: Words | None, errors: Errors
) -> tuple[KeptRows, bool]:
    """The vectors, and whether they have words."""
    library = safetensors("safetensors", f"load_vectors: {rules.name}")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if "vectors" not in list(file.keys()):
                raise rules.error(f"must have a tensor vectors, got {sorted(file.keys())}")
            table = file.get_slice("vectors")
            shape, dtype = tuple(table.get_shape()), table.get_dtype()
            if len(shape) != 2 or shape[1] == 0 or dtype not in _FLOATING:
                raise rules.error(f"must have floating vectors of shape (n, D), got {dtype} of shape {shape}")
            names = _words_in(rules, metadata) if words is None else None
            if names is None:
                names = _words_of(path, rules, words, errors)
            return _keep(rules, table, names, shape), names is not None
    except library.SafetensorError as error:
        raise rules.error(f"must be a whole safetensors file, got one that is not ({error})") from error


def write_npz(path: Path, words: Sequence[str], vectors: Tensor) -> None:
    with path.open("wb") as file:
        np.savez(file, words=np.array(words), vectors=vectors.numpy())


def write_npy(path: Path, vectors: Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, vectors.numpy(), allow_pickle=False)


def metadata_of(words: Sequence[str]) -> dict[str, str]:
    return {"format": FORMAT, "words": json.dumps(list(words), ensure_ascii=False, separators=(",", ":"))}


def write_safetensors(path: Path, metadata: dict[str, str], vectors: Tensor) -> None:
    safetensors("safetensors.torch", "save_vectors").save_file({"vectors": vectors}, path, metadata)


def words_file(path: Path) -> Path:
    """Where save_vectors writes the words of an .npy."""
    return path.with_name(f"{path.stem}.words.txt")


def _keep(
    rules: Rules, table: Any, names: Sequence[str] | None, shape: tuple[int, ...] | None = None
) -> KeptRows:
    """Of (n, D) numbers, those that the rules let stay; where there are no words, rows are named."""
    count, columns = table.shape if shape is None else shape
    if names is not None and len(names) != count:
        raise rules.error(f"must have a word for each vector, got {len(names)} words and {count} vectors")
    kept = KeptRows(rules, columns, count)
    begin = 0
    while begin < count and kept.left(1) == 1:
        room = kept.room(min(kept.left(count - begin), _BLOCK // columns + 1))
        end = begin + len(room)
        _copy(table[begin:end], room)
        some = [f"row {i}" for i in range(begin, end)] if names is None else list(names[begin:end])
        finite = torch.isfinite(room).all(1)
        for i in (~finite).nonzero().flatten().tolist():
            kept.leave_out_not_finite(some[i])
        rows = finite.nonzero().flatten().tolist()
        kept.keep(rows, [some[i] for i in rows], (~room.any(1)).nonzero().flatten().tolist())
        begin = end
    return kept


def _copy(rows: Array | Tensor, room: Tensor) -> None:
    if isinstance(rows, Tensor):
        room.copy_(rows)
        return
    with np.errstate(over="ignore"):  # becomes inf, which is refused as such
        np.copyto(room.numpy(), rows, casting="same_kind")


def _check_table(rules: Rules, table: Array) -> None:
    if table.ndim != 2 or table.shape[1] == 0 or table.dtype.kind != "f":
        raise rules.error(
            f"must have floating vectors of shape (n, D), got {table.dtype} of shape {table.shape}"
        )


def _names(rules: Rules, words: Array, errors: Errors) -> list[str]:
    if words.ndim != 1 or words.dtype.kind not in "US":
        raise rules.error(
            f"must have words of shape (n,) that are strings, got {words.dtype} of shape {words.shape}"
        )
    try:
        names = words.tolist()
    except Exception as error:  # what is in the file is no string
        raise rules.error(f"must have words that are strings, got some that are not ({error})") from error
    if words.dtype.kind == "U":
        return names
    return [_decoded(rules, word, f"word {i}", errors) for i, word in enumerate(names)]


def _decoded(rules: Rules, word: bytes, where: str, errors: Errors) -> str:
    try:
        return word.decode(errors=errors)
    except UnicodeDecodeError:
        raise rules.error(
            f"must have words in UTF-8, got {word!r} at {where}; pass errors='replace'"
        ) from None


def _words_in(rules: Rules, metadata: dict[str, str]) -> list[str] | None:
    """Those of a file that save_vectors has written."""
    if "words" not in metadata:
        return None
    found = metadata.get("format")
    if found != FORMAT:
        raise rules.error(f"must have the format {FORMAT!r} in its metadata beside words, got {found!r}")
    try:
        names = json.loads(metadata["words"])
    except (ValueError, RecursionError) as error:
        raise rules.error(f"must have words in JSON in its metadata, got what is none ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise rules.error("must have a list of words in its metadata, got something else")
    return names


def _words_of(path: Path, rules: Rules, words: Words | None, errors: Errors) -> Sequence[str] | None:
    """Those that are given, or of a file; that is beside the vectors unless it is named."""
    if words is None:
        beside = [words_file(path), path.with_suffix(".txt")]
        words = next((file for file in beside if file.is_file()), None)
        if words is None:
            return None
    if not isinstance(words, (str, os.PathLike)):
        return words
    file = Path(words)
    if not file.is_file():
        raise FileNotFoundError(
            f"load_vectors: words must be a list or a file with a word a line, got {file}"
        )
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [
        _decoded(rules, line.removesuffix(b"\r"), f"line {i} of {file}", errors)
        for i, line in enumerate(lines, 1)
    ]
