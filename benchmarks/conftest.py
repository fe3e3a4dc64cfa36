"""The cases of ``fastkit.bench`` under pytest-benchmark, a test for each contestant of each case::

    pytest benchmarks --benchmark-only --benchmark-json=out.json [--quick] [--rounds N]

A copy precedes each call, and so does the contestant that is the floor, where a case has one. A contestant
that differs from float64 fails. In the JSON, ``extra_info`` has the median ratio to the floor (``x floor``),
and that divided by the fastest peer's (``x fastest peer``). Outputs touch fresh pages here, unless
GLIBC_TUNABLES is ``fastkit.bench.harness.WARM_MALLOC``, and contestants do not take turns: what to quote is
``python -m fastkit bench``.
"""

import os
import statistics
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import pytest

from fastkit.bench import cases
from fastkit.bench.case import Skip
from fastkit.bench.device import DEVICES
from fastkit.bench.harness import WARM_MALLOC
from fastkit.bench.measure import Settings, rounds_of

SETTINGS = Settings(rounds=20, short=0.0, seconds=3.0, longest_call=3.0)
CASES = {}  # by title, which stands for them in the JSON


def pytest_addoption(parser):
    parser.addoption(
        "--rounds", type=int, default=SETTINGS.rounds, help="of a contestant; default: %(default)s"
    )
    parser.addoption("--quick", action="store_true", help="only shapes that fit the caches, no torch.compile")


def pytest_generate_tests(metafunc):
    """``test_bench_<stem>.py`` has the cases of the stem."""
    stem = metafunc.definition.path.stem.removeprefix("test_bench_")
    own = cases.of(stem).cases(quick=metafunc.config.getoption("--quick"))
    CASES.update({case.title: case for case in own})
    metafunc.parametrize(
        ("title", "label"), [(case.title, label) for case in own for label in case.contest().makers]
    )


@pytest.fixture
def time_contestant(benchmark, request):
    """Checks one contestant of a case, then times it."""
    settings = replace(SETTINGS, rounds=request.config.getoption("--rounds"))

    def time_contestant(title, label):
        case, contest = CASES[title], _contest(title)
        device = DEVICES[case.device]
        try:
            call = contest.makers[label]()
            call_s, extra_bytes, result = device.measured(call)
        except Skip as skip:
            pytest.skip(str(skip))
        error = contest.error(result)
        del result
        assert error <= case.tolerance
        if call_s > settings.longest_call:
            pytest.skip(f"{call_s:.1f} s a call")

        copy, copied_bytes = device.copy(case.floor_bytes, settings.copy_bytes)
        floor = contest.makers[case.floor]() if case.floor else None
        rates, floors = [], []

        def before_each_round():
            rates.append(copied_bytes / device.seconds(copy))
            floors.append(case.floor_bytes / rates[-1] if floor is None else device.seconds(floor))
            for _ in range(2 if case.warm else 0):  # brings its data back into the caches
                call()

        benchmark.group = title
        rounds = rounds_of(case, call_s, settings)
        benchmark.pedantic(call, setup=before_each_round, rounds=rounds, warmup_rounds=1)
        ratios = [s / floor_s for s, floor_s in zip(benchmark.stats.stats.data, floors[1:], strict=True)]
        benchmark.extra_info.update(
            {
                "x floor": statistics.median(ratios),
                "copy GB/s": statistics.median(rates) / 1e9,
                "error": error,
                "extra MB": extra_bytes / 1e6,
                "peer": label != next(iter(contest.makers)) and label not in case.yardsticks,
                "warm memory": os.environ.get("GLIBC_TUNABLES") == WARM_MALLOC,
            }
        )

    return time_contestant


@lru_cache(maxsize=1)  # tests of a case, being neighbours, share its inputs
def _contest(title):
    return CASES[title].contest()


def pytest_benchmark_update_json(benchmarks, output_json):
    entries = sorted(output_json["benchmarks"], key=lambda entry: entry["group"])
    for _, group in groupby(entries, key=lambda entry: entry["group"]):
        infos = [entry["extra_info"] for entry in group]
        fastest = min((info["x floor"] for info in infos if info["peer"]), default=None)
        for info in infos:
            info["x fastest peer"] = None if fastest is None else info["x floor"] / fastest
