"""What every recipe needs: a folder that survives being killed, and the figures that are left in it.

The folder, ``--out``:

    config.json      what the run is: configuration, data, versions, threads; written before anything else
    results.jsonl    a line for each finished row of a table of arms and seeds
    training/        of a row that is not finished: its state after the last stretch, an epoch or some steps
    models/          of a row that is finished: what the recipe's own loader reads, a file or a folder
    metrics.json, curves.csv, curves.png    written last, from results.jsonl
    lock             held while a process runs

Files and folders are replaced whole, and results.jsonl only grows, so a process can be killed between any two
instructions. What a row computes depends on its seed and on what its last checkpoint holds: on one machine,
device and number of threads, it comes out the same to the bit whether it was interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

import torch

from fastkit import __version__
from fastkit._command import Refusal
from fastkit._sync import replace_file, sync_folder
from fastkit.recipes._figures import Row, curves, draw, finite, summary

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are the user's to avoid
    fcntl = None

FORMAT = 1  # of config.json and of every checkpoint

T = TypeVar("T")


# Randomness


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """torch's generators seeded inside, and afterwards as they were before.

    Recipes draw from nothing else: numpy and scikit-learn are given a generator or a seed of their own.
    """
    # Asking a device for its state would make a context on it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def deterministic(device: torch.device) -> Generator[None]:
    """On a GPU, algorithms alone that give the same bits each time; on the CPU, all of torch's do."""
    if device.type == "cpu":
        yield
        return
    # cuBLAS reads it when it is first used, and torch refuses products without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


# Files


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """The folder is the old one, none, or the whole new one, which ``write`` fills; never a part of one."""
    temporary, old = (path.with_name(f"{path.name}.{suffix}") for suffix in ("tmp", "old"))
    for folder in (temporary, old):  # what a kill left
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for folder, _, files in os.walk(temporary):
        for name in files:
            with Path(folder, name).open("r+b") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    if path.exists():
        path.replace(old)
    temporary.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Tensors, numbers, strings, and lists and dicts of them: what ``read_checkpoint`` takes back."""
    replace_file(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Runs nothing that the file holds; refuses what is not a checkpoint of this format, in words."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of half a dozen kinds, for a file that is cut off or none of torch's
        raise Refusal(f"{path} must be a checkpoint, got a file that cannot be read ({error})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise Refusal(f"{path} must be a checkpoint of format {FORMAT}, got format {found}")
    return state


def read_model(path: Path, recipe: str, build: Callable[[dict[str, Any]], T]) -> T:
    """What ``build`` makes of a checkpoint; one of something else is refused, in words."""
    state = read_checkpoint(path)
    try:
        return build(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Refusal(f"{path} must be a model of run {recipe}, got another checkpoint ({error})") from error


def sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


# A run


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Training(Protocol):
    """What a recipe trains in a row."""

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """What ``advance`` changes, besides torch's generators: model, optimizer, scheduler."""
        ...

    def advance(self) -> Mapping[str, float]:
        """Figures after one more stretch of the training: an epoch, or some steps."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Of what was trained, when it was: counts of parameters and the like."""
        ...

    def save(self, path: Path) -> None:
        """The model, for the recipe's own loader, as a file or a folder."""
        ...


class Run:
    """A folder of a recipe, held by one process at a time: ``with Run(...) as run``.

    Args:
        recipe: its name.
        out: the folder; made if it is not there.
        config: all that decides what a row computes; plain data.
        data: name, sizes and hash of the data; plain data.
        resume: go on with what is in ``out``, which must be of the same config, data, versions and number
            of threads. Else ``out`` must be empty.
        packages: installed packages that the figures depend on, besides torch and numpy.
        device: where the rows are trained; a run goes on only on a device of the same name.
        unit, stretch: what curves are drawn over; from one point to the next, ``stretch`` units.
        suffix: of the models' names.

    Raises:
        Refusal: ``out`` is not as above, or another process holds it.
    """

    def __init__(
        self,
        recipe: str,
        out: Path,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        resume: bool,
        packages: Sequence[str] = (),
        device: torch.device | None = None,
        unit: str = "epoch",
        stretch: int = 1,
        suffix: str = ".pt",
    ) -> None:
        self.out = out
        self._unit, self._stretch, self._suffix = unit, stretch, suffix
        self.config = dict(config)
        self.rows: dict[tuple[str, str, int], Row] = {}
        self._facts = {
            "format": FORMAT, "recipe": recipe, "config": dict(config), "data": dict(data),
            "versions": _versions(packages), "threads": torch.get_num_threads(),
            "device": _device_name(device),
        }  # fmt: skip
        self._facts = json.loads(json.dumps(self._facts))  # tuples become lists, as in the file
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._check(resume)  # before anything is written
            self._lock = (out / "lock").open("ab")
        except OSError as error:
            raise Refusal(f"--out must be a folder that can be written to, got {out} ({error})") from error
        try:
            self._hold()
            self._open(begun=self._check(resume))
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._results.close()
        self._lock.close()

    def _check(self, resume: bool) -> bool:
        """Whether there is a run to go on with."""
        # A process that is killed at its start leaves no more than these.
        if {path.name for path in self.out.iterdir()} <= {"lock", "config.json.tmp"}:
            return False
        if not resume:
            raise Refusal(f"--out must be empty, got {self.out}; take another, or go on with it by --resume")
        try:
            before = json.loads((self.out / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise Refusal(
                f"--out must be a run's folder for --resume, got {self.out} without a config.json that can be"
                " read; take another"
            ) from error
        changes = list(_differences(before, self._facts))
        if changes:
            raise Refusal(
                f"--resume must be given what {self.out} was begun with, got {'; '.join(changes)};"
                " repeat what it was, or take another --out"
            )
        return True

    def _hold(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refusal(
                f"--out must be a folder that no other run uses, got {self.out}; wait for that run to end"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _open(self, *, begun: bool) -> None:
        if not begun:
            write_json(self.out / "config.json", self._facts)
        (self.out / "training").mkdir(exist_ok=True)
        (self.out / "models").mkdir(exist_ok=True)
        self._results = (self.out / "results.jsonl").open("a+b")
        try:
            self._read_results()
        except BaseException:
            self._results.close()
            raise
        sync_folder(self.out)
        for key in self.rows:  # a kill right after the row was finished leaves its state
            self._state(*key).unlink(missing_ok=True)

    def _read_results(self) -> None:
        self._results.seek(0)
        lines = self._results.read().splitlines(keepends=True)
        whole = 0  # bytes
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # a kill cut it off: the row runs again from its last checkpoint
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise Refusal(
                    f"{self._results.name} must hold a row in each line, got another line {number}; take"
                    " another --out"
                ) from error
            self.rows[row[:3]] = row
            whole += len(line)
        self._results.truncate(whole)
        os.fsync(self._results.fileno())

    # Rows

    def row(
        self,
        table: str,
        arm: str,
        seed: int,
        begin: Callable[[], Training],
        *,
        stretches: int,
        keeps_model: bool = True,
    ) -> Row:
        """The finished row, trained now if it was not before; its figures are those of the last stretch.

        Args:
            begin: called with torch's generators seeded by ``seed``.
            keeps_model: whether ``models`` gets what was trained, before the row counts as finished.
        """
        if (table, arm, seed) in self.rows:
            return self.rows[table, arm, seed]
        with seeded(seed):
            training = begin()
            row = self.train(table, arm, seed, training, stretches=stretches)
        if keeps_model:
            training.save(self.model_path(table, arm, seed))
        return self.append(row)

    def train(self, table: str, arm: str, seed: int, training: Training, *, stretches: int) -> Row:
        """A row up to its last stretch, from its last checkpoint on if it has one; not yet finished."""
        from tqdm import tqdm

        path = self._state(table, arm, seed)
        curve: list[dict[str, float | None]] = []
        seconds = 0.0
        if path.exists():
            state = read_checkpoint(path)
            for name, part in training.parts.items():
                part.load_state_dict(state["parts"][name])
            _set_generators(state["generators"])
            curve, seconds = state["curve"], state["seconds"]
        start = time.perf_counter() - seconds
        with tqdm(
            total=stretches * self._stretch,
            initial=len(curve) * self._stretch,
            desc=f"{table}: {arm}, seed {seed}",
            unit=self._unit,
            disable=None,
            leave=False,
        ) as bar:
            while len(curve) < stretches:
                curve.append(finite(training.advance()))
                seconds = time.perf_counter() - start
                state = {
                    "parts": {name: part.state_dict() for name, part in training.parts.items()},
                    "generators": _generators(), "curve": curve, "seconds": seconds,
                }  # fmt: skip
                write_checkpoint(path, state)
                bar.update(self._stretch)
        return Row(table, arm, seed, curve[-1], curve, seconds, dict(training.facts()))

    def append(self, row: Row) -> Row:
        """The row is finished: in results.jsonl for good, when this returns."""
        row = row._replace(figures=finite(row.figures))
        self._results.write(json.dumps(row._asdict(), allow_nan=False).encode() + b"\n")
        self._results.flush()
        os.fsync(self._results.fileno())
        self.rows[row[:3]] = row
        self._state(*row[:3]).unlink(missing_ok=True)
        return row

    def model_path(self, table: str, arm: str, seed: int) -> Path:
        return self.out / "models" / f"{_file_name(table, arm, seed)}{self._suffix}"

    def _state(self, table: str, arm: str, seed: int) -> Path:
        return self.out / "training" / f"{_file_name(table, arm, seed)}.pt"

    # What is left

    def finished(self, table: str, seeds: Sequence[int]) -> list[Row]:
        return [row for row in self.rows.values() if row.table == table and row.seed in seeds]

    def write(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int],
        *,
        picture: Callable[[Path], object] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """metrics.json, curves.csv and curves.png of these rows.

        Args:
            picture: writes curves.png, in the place of curves.
            more: goes into metrics.json as it is.
        """
        metrics = {
            **self._facts,
            "seeds": list(seeds),
            "wall_seconds": round(sum(row.seconds for row in self.rows.values()), 1),
            "figures": summary(rows),
            **more,
        }
        write_json(self.out / "metrics.json", metrics)
        over = rows, self._unit, self._stretch
        replace_file(self.out / "curves.csv", lambda path: path.write_bytes(curves(*over)))
        replace_file(self.out / "curves.png", picture or (lambda path: draw(path, *over)))
        return metrics

    def written(self, *more: str) -> str:
        """The line that names the files."""
        names = "metrics.json", "curves.csv", "curves.png", *more
        return f"written: {', '.join(str(self.out / name) for name in names)}"


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} {now!r} instead of {before!r}"


def _file_name(table: str, arm: str, seed: int) -> str:
    return quote(f"{table}-{arm}-{seed}", safe="=,+ ").replace(" ", "_")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {"fastkit": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _device_name(device: torch.device | None) -> str:
    if device is None or device.type == "cpu":
        return "cpu"
    return f"{device.type}: {torch.cuda.get_device_name(device)}"


def _generators() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
