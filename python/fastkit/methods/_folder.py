"""A folder of files that is the old one or the whole new one, whenever the process or the machine stops.

    .fastkit-writing/   files that are being written; of no meaning to anyone
    .fastkit-new/       by being renamed to this, they are the folder's, and take the place of those in it

What was renamed and not moved yet is read where it is, and moved by the next that writes. A reader that does
not know of it, as PEFT, must not take half of each: so ``last``, the file without which it does not load, is
taken away before the first of the others is replaced, and brought last. Where it has not changed, it stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastkit._sync import sync_folder

WRITING, NEW = ".fastkit-writing", ".fastkit-new"
_LARGEST_JSON = 64 << 20  # bytes: far beyond any list of layers


def replace_files(folder: Path, files: Mapping[str, Callable[[Path], object]], *, last: str) -> None:
    """Write the files, each by a function of its path, and make them the folder's; others are left alone.

    ``last`` names one of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder, last=last)
    writing = folder / WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for name, write in files.items():
        write(writing / name)
        with (writing / name).open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(writing)
    writing.rename(folder / NEW)
    sync_folder(folder)
    finish(folder, last=last)


def finish(folder: Path, *, last: str) -> None:
    """Move what a process that was stopped had written whole."""
    new = folder / NEW
    if not new.is_dir():
        return
    names = sorted(path.name for path in new.iterdir())
    if last in names and (folder / last).exists():
        if (folder / last).read_bytes() == (new / last).read_bytes():
            (new / last).unlink()
            names.remove(last)
        else:
            (folder / last).unlink()
            sync_folder(folder)
    for name in sorted(names, key=lambda name: name == last):
        (new / name).replace(folder / name)
        sync_folder(folder)
    new.rmdir()
    sync_folder(folder)


def find_file(folder: Path, name: str) -> Path | None:
    """Where the folder's file is; None if it has none."""
    return next((path for path in (folder / NEW / name, folder / name) if path.is_file()), None)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_bytes(json.dumps(facts, indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """What the file says; ValueError if it is none of JSON."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} must have at most {_LARGEST_JSON} bytes, got {path.stat().st_size}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON, got what is not ({error})") from error


def digest(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
