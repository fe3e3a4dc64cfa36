"""What the child processes of a benchmark do: check contestants, and time them."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby

import torch

from fastkit.bench.case import Call, Case, Contest, Fault, Skip
from fastkit.bench.device import DEVICES, Device

AGAIN = "again"  # the label of the A/A row: our contestant a second time


@dataclass(frozen=True)
class Settings:
    rounds: int = 40
    short: float = 1.0  # a contestant whose calls in a round take no longer has all rounds
    seconds: float = 15.0  # for the timed calls of another one, which has fewer
    longest_call: float = 8.0  # what is slower than that is not timed
    longest_build: float = 60.0  # to make (perhaps compile) a contestant and to check it
    copy_bytes: int = 512 << 20  # on a CPU, of each of the two arrays whose copy gives the rate


@dataclass(frozen=True)
class Check:
    """What a contestant's first calls show."""

    error: float
    build_s: float
    call_s: float
    extra_bytes: int  # the peak during a call, above what was there before it
    clones: float  # the time of a call, in clones of a tensor that move the floor's bytes


@dataclass(frozen=True)
class Rounds:
    """The rounds of one case."""

    copy_gb_s: list[float]
    call_s: dict[str, list[float]]  # of the first rounds: a slow contestant has fewer
    threads: int
    load: float
    measured: str = ""  # when they ended


def check(jobs: Iterable[tuple[Case, str]], settings: Settings) -> Iterator[Check | Skip]:
    """Makes and checks each (case, label); the jobs of a case, being neighbours, share its inputs."""
    torch.ones((), requires_grad=True).backward()  # the first of a process imports half a second's worth
    # Not by the case itself: from the parent it comes as another object with each job.
    for _, group in groupby(jobs, key=lambda job: job[0].title):
        yield from _check_case(group)


def _check_case(jobs: Iterator[tuple[Case, str]]) -> Iterator[Check | Skip]:
    case, first = next(jobs)
    device = DEVICES[case.device]
    contest = case.contest()
    clone = device.clone(case.floor_bytes)
    for label in chain([first], (label for _, label in jobs)):
        try:
            yield _check(contest, label, device, clone)
        except Exception as error:
            if not device.works():
                raise  # ends this process: the next contestant gets a new one
            yield _skip(error)


def _check(contest: Contest, label: str, device: Device, clone: Call) -> Check:
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what other contestants have imported and made: the collections below need not look at it
    start = time.perf_counter()
    call = contest.makers[label]()
    build_s = time.perf_counter() - start
    clone_s = device.measured(clone).seconds
    device.warm_up(call)
    call_s, extra_bytes, result = device.measured(call)
    error = contest.error(result)
    del result
    if call_s < 0.2:  # the first call may also have started threads, or loaded kernels
        again = [(device.measured(clone).seconds, *device.measured(call)[:2]) for _ in range(3)]
        clone_s, call_s, extra_bytes = (statistics.median(column) for column in zip(*again, strict=True))
    return Check(error, build_s, call_s, int(extra_bytes), call_s / clone_s)


def rounds(jobs: Iterable[tuple[Case, Mapping[str, Check]]], settings: Settings) -> Iterator[Rounds | Skip]:
    """The rounds of each case, with the contestants that have passed: a copy, then all in random order."""
    for case, checks in jobs:
        device = DEVICES[case.device]
        try:
            yield _rounds(case, checks, settings, device)
        except Exception as error:
            if not device.works():
                raise
            yield _skip(error)


def _rounds(case: Case, checks: Mapping[str, Check], settings: Settings, device: Device) -> Rounds:
    load = os.getloadavg()[0]
    copy, copied_bytes = device.copy(case.floor_bytes, settings.copy_bytes)
    # What the hungriest needs, touched and freed: a contestant that is called once has no call to warm up.
    device.touch(max((check.extra_bytes for check in checks.values()), default=0))
    contest = case.contest()
    ours = next(iter(contest.makers))
    calls = {label: contest.makers[ours if label == AGAIN else label]() for label in checks}
    call_s = {label: check.call_s for label, check in checks.items()}
    for label, seconds in call_s.items():
        device.warm_up(calls[label])
        if seconds < settings.seconds / 2:  # warms up, and may show fewer seconds, without fresh pages
            call_s[label] = min(seconds, device.seconds(calls[label]))
    planned = {label: rounds_of(case, seconds, settings) for label, seconds in call_s.items()}
    copy()

    times: dict[str, list[float]] = {label: [] for label in calls}
    rates = []
    shuffle = random.Random(0).shuffle
    for i in range(max(planned.values(), default=0)):
        rates.append(copied_bytes / device.seconds(copy) / 1e9)
        labels = [label for label in calls if i < planned[label]]
        shuffle(labels)
        # The slow ones last: the copy speaks for what comes soon after it.
        for label in sorted(labels, key=lambda label: planned[label] < settings.rounds):
            seconds = _warm_seconds if _is_warm(case, call_s[label]) else _seconds
            times[label].append(seconds(device, calls[label]))
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Rounds(rates, times, torch.get_num_threads(), load, now)


def rounds_of(case: Case, call_s: float, settings: Settings) -> int:
    """How many rounds a contestant of ``call_s`` seconds a call takes part in."""
    round_s = (5 if _is_warm(case, call_s) else 1) * call_s
    if round_s <= settings.short:
        return settings.rounds
    return max(1, min(settings.rounds, int(settings.seconds / round_s)))


def _is_warm(case: Case, call_s: float) -> bool:
    return case.warm and call_s < 0.1  # a longer call does not notice what the caches held


def _seconds(device: Device, call: Call) -> float:
    return device.seconds(call)


def _warm_seconds(device: Device, call: Call) -> float:
    """Of a call whose data are in the caches: two calls bring them there."""
    for _ in range(2):
        call()
    return statistics.median(device.seconds(call) for _ in range(3))


def _skip(error: Exception) -> Skip:
    if isinstance(error, Skip):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Skip("out of memory")
    first_line = str(error).strip().split("\n")[0]
    return Fault(f"{type(error).__name__}: {first_line}")
