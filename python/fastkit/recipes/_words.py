"""Word vectors of two languages and dictionaries between them; docs/data.md describes the files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkit._command import Refusal
from fastkit.methods.word_translation import Vectors, load_vectors
from fastkit.recipes._experiment import sha256
from fastkit.recipes._options import check_folder

SUFFIXES = (".vec", ".vec.gz", ".npz", ".safetensors")  # of tables in a folder
Entries = list[tuple[str, str]]


class Languages(NamedTuple):
    """Two tables, the most frequent words first, and what is known of translations."""

    names: tuple[str, str]  # source, target
    source: Vectors
    target: Vectors
    test: Entries | None  # only to measure by
    train: Entries | None  # only for supervised arms

    def facts(self) -> dict[str, Any]:
        """Names, sizes and hash, for metrics.json."""
        tables = self.source, self.target
        chunks = (
            part
            for table in tables
            for part in ("\n".join(table.words or ()).encode(), table.vectors.numpy().tobytes())
        )
        entries = {"test": self.test, "train": self.train}
        return {
            "name": "-".join(self.names),
            "words": [len(table) for table in tables],
            "columns": [table.vectors.shape[1] for table in tables],
            "left_out": [dict(table.dropped) for table in tables],
            **{name: None if some is None else len(some) for name, some in entries.items()},
            "sha256": sha256([*chunks, repr(entries).encode()]),
        }


def load(folder: Path, *, max_words: int | None = None, source: str | None = None) -> Languages:
    """The two tables in ``folder``, and the dictionaries from one to the other.

    Args:
        max_words: of each table, the first so many are read.
        source: the name of the source language. Default: as the dictionaries' names have it, else the first
            of the alphabet.

    Raises:
        Refusal: they are not there, or not as docs/data.md says.
    """
    check_folder(folder, "two files by --source and --target")
    paths = {
        _language(path): path for path in sorted(folder.iterdir()) if path.name.lower().endswith(SUFFIXES)
    }
    if len(paths) != 2:
        names = ", ".join(path.name for path in paths.values()) or "none"
        raise Refusal(
            f"--data must hold two files of word vectors ({', '.join(SUFFIXES)}), got {names} in {folder};"
            " give them by --source and --target"
        )
    dictionaries = {
        (pair[0], pair[1], kind): path
        for path in sorted(folder.iterdir())
        if (found := _DICTIONARY.fullmatch(path.name)) is not None
        for pair, kind in [(found.group(1, 2), _kind(found[3]))]
        if kind is not None and set(pair) == set(paths)
    }
    if source is None:
        source = next((pair[0] for pair in dictionaries), min(paths))
    if source not in paths:
        raise Refusal(f"--from must be one of {', '.join(paths)}, got {source}")
    target = next(name for name in paths if name != source)
    test, train = (dictionaries.get((source, target, kind)) for kind in ("test", "train"))
    return load_files(paths[source], paths[target], test, train, max_words=max_words, names=(source, target))


def load_files(
    source: Path,
    target: Path,
    test: Path | None = None,
    train: Path | None = None,
    *,
    max_words: int | None = None,
    names: tuple[str, str] | None = None,
) -> Languages:
    """Of files that are named one by one; a Refusal where one is not as docs/data.md says."""
    names = names or (_language(source), _language(target))
    tables = [_table(path, max_words) for path in (source, target)]
    entries = [None if path is None else read_dictionary(path) for path in (test, train)]
    return Languages(names, tables[0], tables[1], entries[0], entries[1])


def read_dictionary(path: Path) -> Entries:
    """Pairs of words, a source and a target, two fields a line with a tab or a blank between."""
    try:
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            f"{path} must be a dictionary in UTF-8, got one that cannot be read ({error})"
        ) from error
    entries: Entries = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        fields = line.split("\t") if "\t" in line else line.split(" ")
        fields = [field for field in fields if field]
        if not fields:
            continue
        if len(fields) != 2:
            raise Refusal(
                f"{path}: line {number} must have two words, got {len(fields)} fields: {line[:60]!r}"
            )
        entries.append((fields[0], fields[1]))
    if not entries:
        raise Refusal(f"{path} must have pairs of words, got none")
    return entries


def generated(words: int = 2000, columns: int = 60, noise: float = 0.1) -> Languages:
    """Made up: skewed clusters with axes of decaying size, turned in each language, with noise of its own."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres = randn(50, columns).exp()
    of = torch.randint(len(centres), (words,), generator=generator)
    latent = (centres[of] + 0.5 * randn(words, columns)) * torch.linspace(1.5, 0.3, columns)
    turns = [torch.linalg.qr(randn(columns, columns)).Q for _ in range(2)]
    order = torch.randperm(words, generator=generator)
    source = latent @ turns[0].T + noise * randn(words, columns)
    target = (latent @ turns[1].T + noise * randn(words, columns))[order]
    names = [f"a{i}" for i in range(words)], [f"b{i}" for i in order.tolist()]
    entries = [(f"a{i}", f"b{i}") for i in range(words)]
    return Languages(
        ("a", "b"), Vectors(names[0], source), Vectors(names[1], target), entries[::2], entries[1::2]
    )


_DICTIONARY = re.compile(r"([^-.]+)-([^-.]+)\.(.+)\.(?:tsv|txt)")


def _kind(name: str) -> str | None:
    """Which dictionary a file is: as it says, or as MUSE numbers the words."""
    return {"test": "test", "train": "train", "5000-6500": "test", "0-5000": "train"}.get(name)


def _language(path: Path) -> str:
    """``en`` of en.npz, wiki.en.vec and cc.en.300.vec.gz."""
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    parts: Sequence[str] = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


def _table(path: Path, max_words: int | None) -> Vectors:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of equal words, of which the first is kept
            table = load_vectors(path, max_words=max_words, zeros="eps", bad_lines="skip")
    except (OSError, ValueError, ImportError) as error:
        raise Refusal(str(error)) from error
    if table.words is None:
        raise Refusal(f"{path} must have words, got vectors alone; save it with them by save_vectors")
    return table
