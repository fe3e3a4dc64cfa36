"""Times several ways to compute one thing, in multiples of the time that its least memory traffic takes.

The memory bandwidth of a machine drifts, and differs from its neighbour's: no bare time is worth quoting.
Here a round copies a large array and calls every contestant. A contestant's ratio in a round is its time
over that of the floor: the bytes that no implementation can avoid, at the copy rate of the round. A row gives
the median ratio over the rounds with a 95 % bootstrap interval; our own code, timed twice, shows the noise.
Rounds in which the machine is busy are void, and so is a row that loses more than half of its rounds to that.

Contestants run in child processes. The first, with the allocator as users have it, compares results with
float64 and measures memory; what disagrees is not timed. The second does the rounds. It is started with
``WARM_MALLOC``, so that outputs reuse warm memory: the first touch of fresh pages costs several copies.

On a GPU the same, but for what ``device.Gpu`` says: time by events, a cold L2, a copy of as many bytes as the
floor. Copies of different sizes differ in rate, so GPU cases of different floors are for runs of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastkit.bench import measure
from fastkit.bench.case import Case, Skip
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


Progress = Callable[..., Iterable[Any]]  # wraps an iterable, as ``tqdm.tqdm`` does


def _silent(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def run(
    cases: Sequence[Case], settings: Settings | None = None, *, progress: Progress = _silent
) -> list[Row]:
    """Check the contestants of ``cases`` and time those that agree."""
    settings = settings or Settings()
    with TemporaryDirectory() as cache:  # what is compiled for the check is ready for the rounds
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        jobs = [(case, label) for case in cases for label in case.contest().makers]
        results = in_child(measure.check, jobs, settings, env, settings.longest_build)
        checks: dict[Case, dict[str, Check | Skip]] = {case: {} for case in cases}
        for (case, label), result in zip(jobs, progress(results, total=len(jobs), desc="check"), strict=True):
            checks[case][label] = result

        plans = [(case, plan(case, checks[case], settings)) for case in cases]
        env["GLIBC_TUNABLES"] = WARM_MALLOC
        results = in_child(measure.rounds, plans, settings, env, 10 * settings.longest_build)
        timed = list(progress(results, total=len(plans), desc="time"))
    rates = [rate for result in timed if isinstance(result, Rounds) for rate in result.copy_gb_s]
    return [
        row
        for case, result in zip(cases, timed, strict=True)
        for row in rows(case, checks[case], result, settings, best=max(rates, default=0.0))
    ]


def in_child(
    work: Callable[..., Iterator[Any]],
    jobs: Sequence[Any],
    settings: Settings,
    env: dict[str, str],
    limit: float,
) -> Iterator[Any]:
    """What ``work(jobs, settings)`` yields for each job, from a child process.

    A job that takes over ``limit`` seconds, or takes the child down, yields a Skip; the rest get a new child.
    """
    remaining = list(jobs)
    while remaining:
        ours, theirs = Pipe()
        code = f"from fastkit.bench.measure import serve; serve({theirs.fileno()})"
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=env,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a group of its own: compilers that it has started end with it
        )
        theirs.close()
        try:
            with suppress(EOFError, OSError):
                ours.send((work, remaining, settings))
                ours.recv()  # the limit counts from here, when it has imported what it needs
            alive = True
            while remaining and alive:
                try:
                    alive = ours.poll(limit)
                    result = ours.recv() if alive else Skip(f"took over {limit:g} s")
                except (EOFError, OSError):
                    alive = False
                    result = Skip(f"its process ended with exit code {child.wait()}")
                del remaining[0]
                yield result
        finally:
            ours.close()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


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
        return f"skipped: {check}"
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
    shared = Row(case.op, case.shape, case.direction, "", floor_mb=case.floor_bytes / 1e6)
    rates = np.array(timed.copy_gb_s if isinstance(timed, Rounds) else [])
    idle = rates >= best / 2
    if isinstance(timed, Rounds) and idle.any():
        q1, q2, q3 = (float(q) for q in np.quantile(rates[idle], (0.25, 0.5, 0.75)))
        shared = replace(shared, copy_q1=q1, copy_q2=q2, copy_q3=q3, threads=timed.threads, load=timed.load)

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
                row = replace(row, note=f"skipped: {timed}")
            else:
                row = replace(row, **_ratio(case, np.array(timed.call_s[label]), rates, idle))
        table.append(row)

    rivals = [row for row in table[2:] if row.contestant not in case.yardsticks]
    others = [row.ratio for row in rivals if row.ratio is not None]
    if table[0].ratio is not None and others:
        table[0] = replace(table[0], faster=min(others) / table[0].ratio)
    return table


def _ratio(case: Case, call_s: np.ndarray, rates: np.ndarray, idle: np.ndarray) -> dict[str, Any]:
    """The fields of a Row that the rounds decide."""
    rates, idle = rates[: len(call_s)], idle[: len(call_s)]
    if 2 * idle.sum() < len(call_s):
        busy = len(call_s) - int(idle.sum())
        return {"note": f"void: the machine was busy in {busy} of {len(call_s)} rounds"}
    ratios = (call_s * rates * 1e9 / case.floor_bytes)[idle]
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
