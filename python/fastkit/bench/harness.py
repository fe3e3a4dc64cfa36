"""Times several ways to compute one thing, in multiples of the time that its least memory traffic takes.

The memory bandwidth of a machine drifts, and differs from its neighbour's: no bare time is worth quoting.
Here a round copies a large array and calls every contestant. A contestant's ratio in a round is its time
over that of the floor: the bytes that no implementation can avoid, at the copy rate of the round, or, where a
case names a contestant for it, the arithmetic that none can avoid, as timed in the round. A row gives the
median ratio over the rounds with a 95 % bootstrap interval; our own code, timed twice, shows the noise.
Rounds in which the machine is busy are void, and so is a row that loses more than half of its rounds to that.

Contestants run in child processes. One, with the allocator as users have it, compares results with float64
and measures memory; what disagrees is not timed. The other does the rounds, while the first waits. It starts
with ``WARM_MALLOC``, so that outputs reuse warm memory: the first touch of fresh pages costs several copies.
Where the rounds of a case end in an error, ours get others without rivals, who may be the cause.

On a GPU the same, but for what ``device.Gpu`` says: time by events, a cold L2, a copy of as many bytes as the
floor. Copies of different sizes differ in rate, so GPU cases of different floors are for runs of their own.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fastkit import __version__, _native
from fastkit.bench import measure
from fastkit.bench.case import Case, Skip
from fastkit.bench.child import Child
from fastkit.bench.measure import AGAIN, Check, Rounds, Settings

WARM_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=67108864"


@dataclass(frozen=True)
class Row:
    """One contestant of one case. None is what was not measured; ``note`` says why there is no ratio."""

    op: str
    shape: str
    direction: str
    contestant: str
    note: str = ""
    error: float | None = None  # from float64, relative
    ratio: float | None = None  # to the floor: the median of the rounds
    low: float | None = None  # its 95 % interval; none from fewer than five rounds
    high: float | None = None
    rounds: int = 0
    faster: float | None = None  # of ours: the fastest other form's ratio over ours
    extra_mb: float | None = None  # peak memory of a call
    clones: float | None = None  # with the allocator as it is: times a clone of the floor's bytes
    build_s: float | None = None
    floor: str = ""  # the contestant whose time is the floor; else it is that of copying ``floor_mb``
    floor_mb: float | None = None
    copy_q1: float | None = None  # quartiles of the rounds' copy rates, GB/s
    copy_q2: float | None = None
    copy_q3: float | None = None
    slow_copy: float | None = None  # where the rates are of two kinds: the median rate of each
    slow_ratio: float | None = None  # and the ratio in its rounds
    fast_copy: float | None = None
    fast_ratio: float | None = None
    threads: int | None = None
    load: float | None = None
    versions: str = ""  # of fastkit (the kernels that it runs), torch and the peers
    measured: str = ""  # when the case ended

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"


def run(cases: Iterable[Case], settings: Settings | None = None) -> Generator[list[list[Row]], None, None]:
    """Check the contestants of each case and time those that agree; yields the rows of all cases so far.

    Of all, not of the last alone: a case may show that the machine was busy in an earlier one.
    """
    settings = settings or Settings()
    done: list[tuple[Case, dict[str, Check | Skip], Rounds | Skip]] = []
    with TemporaryDirectory() as cache:  # what is compiled for the check is ready for the rounds
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        warm = {**env, "GLIBC_TUNABLES": WARM_MALLOC}
        limit = settings.longest_build
        with (
            Child(measure.check, settings, env, limit) as checking,
            Child(measure.rounds, settings, warm, 10 * limit) as timing,
        ):
            for case in cases:
                checks: dict[str, Check | Skip] = {
                    label: checking.do((case, label)) for label in case.contest().makers
                }
                planned = plan(case, checks, settings)
                timed = timing.do((case, planned))
                rivals = planned.keys() - {next(iter(checks)), AGAIN} - case.yardsticks
                if isinstance(timed, Skip) and rivals:  # whose fault is it? Ours get rounds without them
                    checks |= dict.fromkeys(rivals, Skip(f"rounds with all contestants: {timed}"))
                    timed = timing.do((case, plan(case, checks, settings)))
                done.append((case, checks, timed))
                rates = [rate for *_, timed in done if isinstance(timed, Rounds) for rate in timed.copy_gb_s]
                best = max(rates, default=0.0)
                yield [rows(*results, settings, best=best) for results in done]


def plan(case: Case, checks: dict[str, Check | Skip], settings: Settings) -> dict[str, Check]:
    """Who is timed, ours twice."""
    passed = {
        label: check
        for label, check in checks.items()
        if isinstance(check, Check) and not why_not(case, check, settings)
    }
    ours = next(iter(checks))
    return {**passed, AGAIN: passed[ours]} if ours in passed else passed


def why_not(case: Case, check: Check | Skip, settings: Settings) -> str:
    """Why a contestant is not timed, or "" when it is."""
    if isinstance(check, Skip):
        return check.note
    if not check.error <= case.tolerance:  # nor is NaN
        return f"differs: error {check.error:.0e}, tolerance {case.tolerance:.0e}"
    if check.call_s > settings.longest_call:
        return f"skipped: {check.call_s:.1f} s a call"
    return ""


def rows(
    case: Case,
    checks: dict[str, Check | Skip],
    timed: Rounds | Skip,
    settings: Settings,
    *,
    best: float,
) -> list[Row]:
    """The rows of a case: ours, ours again, the others. ``best`` is the best copy rate of the whole run."""
    shared = Row(case.op, case.shape, case.direction, "", floor=case.floor, floor_mb=case.floor_bytes / 1e6)
    shared = replace(shared, versions=versions(case.peers))
    rates = np.array(timed.copy_gb_s if isinstance(timed, Rounds) else [])
    idle = rates >= best / 2
    floor_s = _floor(case, timed, rates)
    if isinstance(timed, Rounds):
        shared = replace(shared, threads=timed.threads, load=timed.load, measured=timed.measured)
    if idle.any():
        q1, q2, q3 = (float(q) for q in np.quantile(rates[idle], (0.25, 0.5, 0.75)))
        shared = replace(shared, copy_q1=q1, copy_q2=q2, copy_q3=q3)

    table = []
    ours = next(iter(checks))
    for label in (ours, AGAIN, *(label for label in checks if label != ours)):
        check = checks[ours if label == AGAIN else label]
        name = f"{ours} {label}" if label == AGAIN else label
        row = replace(shared, contestant=name, note=why_not(case, check, settings))
        if isinstance(check, Check):
            row = replace(
                row,
                error=check.error,
                extra_mb=check.extra_bytes / 1e6,
                clones=check.clones if case.device == "cpu" else None,  # a GPU has no fresh pages
                build_s=check.build_s,
            )
        if not row.note:
            if isinstance(timed, Skip):
                row = replace(row, note=timed.note)
            elif len(floor_s) == 0:
                row = replace(row, note=f"skipped: its floor, {case.floor}, has no time")
            else:
                row = replace(row, **_ratio(np.array(timed.call_s[label]), floor_s, rates, idle))
        table.append(row)

    rivals = [row for row in table[2:] if row.contestant not in case.yardsticks]
    others = [row.ratio for row in rivals if row.ratio is not None]
    if table[0].ratio is not None and others:
        table[0] = replace(table[0], faster=min(others) / table[0].ratio)
    return table


def versions(peers: Sequence[str]) -> str:
    """Of fastkit, with the CPU kernels that it runs, of torch and of the peers that are installed."""
    found = [
        f"fastkit {__version__} ({_native.BUILD_INFO.get('cpu_isa', 'reference')})",
        f"torch {torch.__version__}",
    ]
    for package in peers:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def _floor(case: Case, timed: Rounds | Skip, rates: np.ndarray) -> np.ndarray:
    """The seconds of the floor in each round that has it."""
    if not case.floor:
        return case.floor_bytes / (rates * 1e9)
    return np.array(timed.call_s.get(case.floor, []) if isinstance(timed, Rounds) else [])


def _ratio(call_s: np.ndarray, floor_s: np.ndarray, rates: np.ndarray, idle: np.ndarray) -> dict[str, Any]:
    """The fields of a Row that the rounds decide."""
    rounds = min(len(call_s), len(floor_s))
    call_s, floor_s, rates, idle = (array[:rounds] for array in (call_s, floor_s, rates, idle))
    if 2 * idle.sum() < len(call_s):
        busy = len(call_s) - int(idle.sum())
        return {"note": f"void: the machine was busy in {busy} of {len(call_s)} rounds"}
    ratios = (call_s / floor_s)[idle]
    rates = rates[idle]
    fields: dict[str, Any] = {"ratio": float(np.median(ratios)), "rounds": len(ratios)}
    if len(ratios) >= _FEWEST_FOR_INTERVAL:
        fields["low"], fields["high"] = interval(ratios)
    between = border(rates)
    if between is not None:
        for name, kind in (("slow", rates < between), ("fast", rates >= between)):
            fields[f"{name}_copy"] = float(np.median(rates[kind]))
            fields[f"{name}_ratio"] = float(np.median(ratios[kind]))
    return fields


_FEWEST_FOR_INTERVAL = 5


def interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    samples = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), (0.025, 0.975))
    return float(low), float(high)


def border(rates: np.ndarray) -> float | None:
    """The rate between a slow and a fast regime of the memory, or None where the rates are of one kind.

    Otsu's threshold: the cut that leaves the least variance within the two sides. They are two regimes if it
    leaves little (a single normal distribution keeps 36 %, a uniform one 25 %) and they are well apart.
    """
    logs = np.sort(np.log(rates))
    fewest = max(3, len(logs) // 10)
    cuts = range(fewest, len(logs) - fewest + 1)
    if not cuts or logs.var() == 0:
        return None
    within = [i * logs[:i].var() + (len(logs) - i) * logs[i:].var() for i in cuts]
    cut = cuts[int(np.argmin(within))]
    explained = 1 - min(within) / (len(logs) * logs.var())
    apart = np.median(logs[cut:]) - np.median(logs[:cut])
    if explained < 0.85 or apart < np.log(1.25):
        return None
    return float(np.exp((logs[cut - 1] + logs[cut]) / 2))
