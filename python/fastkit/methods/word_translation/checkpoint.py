"""The stages of a fit: each a state that grows step by step, kept in a folder where one is given.

    config.json    what the fit is: options, digests of the tables, versions; written first
    <stage>.pt     the state of a stage, finished or not

Files are replaced whole, and what a stage computes depends on its state alone: a fit that was killed goes on
from the last states, and ends with the bits of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkit import __version__
from fastkit._sync import replace_file
from fastkit.methods.word_translation.settings import OP

FORMAT = 1
CONFIG = "config.json"
SECONDS = 5.0  # between two writes of a stage that goes on

State = dict[str, Any]


def digest(table: Tensor | None) -> str | None:
    """Of shape and bytes."""
    if table is None:
        return None
    content = hashlib.sha256(f"{table.dtype} {tuple(table.shape)}".encode())
    content.update(table.detach().cpu().contiguous().numpy().reshape(-1).view("uint8").data)
    return content.hexdigest()


class Stages:
    """Runs the stages of one fit.

    Args:
        folder: where states are kept; None: nowhere.
        facts: what decides the result, plain data; a folder of others is refused.
        device: where the tensors of a state are.
        progress: None: bars where tqdm is installed and a terminal reads them; True: bars; False: none.

    Attributes:
        timings: the seconds of each stage, also those before the fit was killed.
    """

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        device: torch.device,
        progress: bool | None,
    ) -> None:
        self.folder = folder
        self.timings: dict[str, float] = {}
        self._device = device
        self._progress = progress
        if folder is not None:
            self._open(folder, facts)

    def run(
        self,
        name: str,
        begin: Callable[[], State],
        advance: Callable[[State], bool],
        steps: int,
        *,
        timed_as: str | None = None,
    ) -> State:
        """The state after all steps of a stage, or after one of which ``advance`` says that it is the last.

        ``advance`` changes the state, which has tensors, numbers, and lists of numbers, and the key "step".
        """
        state = self._read(name)
        if state is None:
            state = {"step": 0, "finished": False, "seconds": 0.0}
            start = written = time.perf_counter()
            state |= begin()
        else:
            written = time.perf_counter()
            start = written - state["seconds"]
        if not state["finished"]:
            with self._bar(name, steps, state["step"]) as update:
                while not state["finished"]:
                    goes_on = advance(state)
                    state["step"] += 1
                    state["finished"] = not goes_on or state["step"] >= steps
                    now = time.perf_counter()
                    state["seconds"] = now - start
                    if state["finished"] or now - written >= SECONDS:
                        self._write(name, state)
                        written = now
                    update()
        key = timed_as or name
        self.timings[key] = self.timings.get(key, 0.0) + state["seconds"]
        return state

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """Of what is no stage: it is done again each time."""
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _bar(self, name: str, steps: int, done: int) -> Generator[Callable[[], object]]:
        tqdm = _tqdm(self._progress)
        if tqdm is None:
            yield lambda: None
            return
        disable = None if self._progress is None else not self._progress
        with tqdm(total=steps, initial=done, desc=name, disable=disable, leave=False) as bar:
            yield bar.update

    def _open(self, folder: Path, facts: Mapping[str, Any]) -> None:
        facts = {
            "format": FORMAT,
            **facts,
            "versions": {"fastkit": __version__, "torch": torch.__version__},
            "device": _device_name(self._device),
        }
        facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            begun = (folder / CONFIG).exists()
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(f"{CONFIG}."))
        except OSError as error:
            raise ValueError(
                f"{OP}: checkpoint must be a folder that can be written to, got {folder} ({error})"
            ) from error
        if not begun:
            if names:
                raise ValueError(
                    f"{OP}: checkpoint must be empty or of an earlier fit, got {folder} with {names[0]}; take"
                    " another folder"
                )
            text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
            replace_file(folder / CONFIG, lambda path: path.write_text(text))
            return
        try:
            before = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{OP}: checkpoint must have a {CONFIG} that can be read, got {folder} ({error}); take"
                " another folder"
            ) from error
        changes = list(_differences(before, facts))
        if changes:
            raise ValueError(
                f"{OP}: checkpoint must be of the same data and settings, got {folder} of others:"
                f" {'; '.join(changes)}; take another folder"
            )

    def _write(self, name: str, state: State) -> None:
        if self.folder is not None:
            replace_file(self.folder / f"{name}.pt", lambda path: torch.save(state, path))

    def _read(self, name: str) -> State | None:
        path = None if self.folder is None else self.folder / f"{name}.pt"
        if path is None or not path.exists():
            return None
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
        except Exception as error:  # of half a dozen kinds, for a file that is cut off or none of torch's
            raise ValueError(
                f"{OP}: checkpoint must have files that can be read, got {path}; remove it"
            ) from error
        if not isinstance(state, dict) or not {"step", "finished", "seconds"} <= set(state):
            raise ValueError(f"{OP}: checkpoint must have states of a fit, got {path}; remove it")
        return state


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} {before!r} there, {now!r} here"


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device.type}: {torch.cuda.get_device_name(device)}"


def _tqdm(progress: bool | None) -> Any:
    if progress is False:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        if progress is None:
            return None
        raise ImportError(
            f"{OP}: progress=True needs tqdm, which is not installed; pip install 'fastkit[recipes]'"
        ) from None
    return tqdm
