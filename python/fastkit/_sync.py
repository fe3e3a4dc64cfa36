"""That files are on the disk, and not only with the system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """What was put into the folder, renamed or taken out of it, is so after the machine has stopped too."""
    if os.name != "posix":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """The file is the old one or the whole new one, whenever the process or the machine stops.

    ``write`` is given the path of another file, beside it.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
