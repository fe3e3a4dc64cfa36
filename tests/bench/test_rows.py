"""The rows of a benchmark: their statistics, when they state no ratio, and how they are written."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastkit import __version__
from fastkit.bench import harness, measure, report
from fastkit.bench.case import Case, Fault, Skip
from fastkit.bench.harness import Row, border, interval
from fastkit.bench.measure import AGAIN, Check, Rounds, Settings

CASE = Case("op", "1x1", "fwd", floor_bytes=10**9, contest=lambda: pytest.fail("not to be made"))
PASSED = Check(error=1e-6, build_s=0.0, call_s=0.1, extra_bytes=10**6, clones=1.0)


def rows(call_s, copy_gb_s, *, checks=None, best=None):
    """Of CASE, whose floor is 1 GB, from the seconds of each label's calls."""
    checks = checks or {label: PASSED for label in call_s if label != AGAIN}
    timed = Rounds(list(copy_gb_s), call_s, threads=2, load=0.5)
    return harness.rows(CASE, checks, timed, Settings(), best=best or max(copy_gb_s))


def test_a_ratio_is_the_median_over_rounds_of_time_over_floor():
    """10 GB/s is 0.1 s for the floor of 1 GB, 20 GB/s is 0.05 s."""
    ours, again, other = rows(
        {"ours": [0.1, 0.05, 0.1], AGAIN: [0.2, 0.1, 0.1], "other": [0.3]}, [10.0, 20.0, 20.0]
    )
    assert (ours.ratio, again.ratio, other.ratio) == pytest.approx((1, 2, 3))
    assert (ours.rounds, other.rounds) == (3, 1)
    assert (ours.contestant, again.contestant, other.contestant) == ("ours", "ours again", "other")
    assert (ours.copy_q1, ours.copy_q2, ours.copy_q3) == (15, 20, 20)
    assert (ours.threads, ours.load) == (2, 0.5)


def test_faster_is_against_the_fastest_other_form():
    ours, *rest = rows({"ours": [0.1], AGAIN: [0.05], "slow": [2.0], "quick": [0.4]}, [10.0])
    assert ours.faster == pytest.approx(4)
    assert [row.faster for row in rest] == [None] * 3


def test_yardsticks_are_not_what_ours_is_faster_than():
    checks = dict.fromkeys(("ours", "copy", "other"), PASSED)
    timed = Rounds([10.0], {"ours": [0.1], AGAIN: [0.1], "copy": [0.05], "other": [0.4]}, threads=2, load=0.5)
    case = replace(CASE, yardsticks=frozenset({"copy"}))
    ours, _, copy, _ = harness.rows(case, checks, timed, Settings(), best=10.0)
    assert (ours.faster, copy.ratio) == (pytest.approx(4), pytest.approx(0.5))


def test_a_floor_that_is_a_contestant_is_timed_in_each_round():
    case = replace(CASE, floor="least", yardsticks=frozenset({"least"}))
    call_s = {"ours": [0.2, 0.6, 0.3], AGAIN: [0.2, 0.2, 0.1], "least": [0.1, 0.2, 0.1], "slow": [0.5]}
    checks = dict.fromkeys(("ours", "least", "slow"), PASSED)
    timed = Rounds([10.0, 10.0, 10.0], call_s, threads=2, load=0.5)
    ours, again, least, slow = harness.rows(case, checks, timed, Settings(), best=10.0)
    assert (ours.ratio, again.ratio, least.ratio, slow.ratio) == pytest.approx((3, 1, 1, 5))
    assert (ours.floor, slow.rounds, ours.faster) == ("least", 1, pytest.approx(5 / 3))
    assert "floor least; copy" in report.table([ours, again, least, slow])


def test_without_its_floor_a_case_has_no_ratio():
    case = replace(CASE, floor="least", yardsticks=frozenset({"least"}))
    checks = {"ours": PASSED, "least": Skip("it is not there")}
    timed = Rounds([10.0], {"ours": [0.1], AGAIN: [0.1]}, threads=2, load=0.5)
    ours, _, least = harness.rows(case, checks, timed, Settings(), best=10.0)
    assert (ours.ratio, ours.note) == (None, "skipped: its floor, least, has no time")
    assert least.note == "skipped: it is not there"


def test_busy_rounds_are_void():
    """In the busy round both are slow, but not alike: it would make us look four times better."""
    call_s = {"ours": [0.1, 0.1, 0.1], AGAIN: [0.1, 0.1, 0.1]}
    ours, _ = rows(call_s, [10.0, 2.5, 10.0])
    assert (ours.ratio, ours.rounds) == (pytest.approx(1), 2)
    assert (ours.copy_q1, ours.copy_q3) == (10, 10)


def test_a_row_that_loses_most_rounds_is_void():
    call_s = {"ours": [0.1] * 3, AGAIN: [0.1] * 3, "other": [0.1]}
    ours, again, other = rows(call_s, [10.0, 4.9, 4.9])
    assert ours.note == again.note == "void: the machine was busy in 2 of 3 rounds"
    assert ours.ratio is ours.low is ours.faster is None
    assert other.ratio == pytest.approx(1)


def test_the_best_copy_rate_is_that_of_the_whole_run():
    call_s = {"ours": [0.1, 0.1], AGAIN: [0.1, 0.1]}
    assert rows(call_s, [10.0, 10.0], best=20.0)[0].ratio is not None
    assert rows(call_s, [10.0, 10.0], best=21.0)[0].note == "void: the machine was busy in 2 of 2 rounds"


@pytest.mark.parametrize(
    ("check", "note"),
    [
        (replace(PASSED, error=2e-4), "differs: error 2e-04, tolerance 1e-04"),
        (replace(PASSED, error=float("nan")), "differs: error nan, tolerance 1e-04"),
        (replace(PASSED, call_s=8.1), "skipped: 8.1 s a call"),
        (Skip("scipy is not installed"), "skipped: scipy is not installed"),
    ],
)
def test_what_disagrees_or_cannot_be_timed_is_listed_without_a_ratio(check, note):
    checks = {"ours": PASSED, "other": check}
    plan = harness.plan(CASE, checks, Settings())
    assert set(plan) == {"ours", AGAIN}
    ours, _, other = rows({label: [0.1] for label in plan}, [10.0], checks=checks)
    assert (other.note, other.ratio, ours.ratio, ours.faster) == (note, None, pytest.approx(1), None)


def test_the_others_are_timed_when_ours_disagrees():
    checks = {"ours": replace(PASSED, error=1.0), "other": PASSED}
    plan = harness.plan(CASE, checks, Settings())
    assert set(plan) == {"other"}
    ours, again, other = rows({"other": [0.2]}, [10.0], checks=checks)
    assert (ours.ratio, again.ratio, other.ratio) == (None, None, pytest.approx(2))
    assert ours.note.startswith("differs")


def test_a_case_whose_rounds_failed_has_rows():
    timed = Fault("its process ended with exit code -9")
    for row in harness.rows(CASE, {"ours": PASSED, "other": PASSED}, timed, Settings(), best=0.0):
        assert (row.ratio, row.note) == (None, "failed: its process ended with exit code -9")


def test_slow_contestants_get_fewer_rounds():
    settings = Settings(rounds=40, short=0.0, seconds=10.0)
    warm = replace(CASE, warm=True)
    assert [measure.rounds_of(CASE, s, settings) for s in (0.01, 0.25, 1.0, 99.0)] == [40, 40, 10, 1]
    assert measure.rounds_of(warm, 0.08, settings) == 25  # five calls a round
    assert measure.rounds_of(warm, 0.2, settings) == 40  # too long for the caches to matter: one


def test_the_full_benchmark_gives_fewer_rounds_only_to_calls_above_a_second():
    warm = replace(CASE, warm=True)
    assert [measure.rounds_of(CASE, s, Settings()) for s in (0.01, 1.0, 1.5, 7.0)] == [40, 40, 10, 2]
    assert [measure.rounds_of(warm, s, Settings()) for s in (0.001, 0.09, 1.0)] == [40] * 3


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval(rng.lognormal(size=40))
        covered += low <= 1 <= high  # the median of exp(N(0, 1))
    assert 180 <= covered <= 199


def test_the_interval_needs_five_rounds_and_narrows_with_more():
    assert rows({"ours": [0.1] * 4, AGAIN: [0.1] * 4}, [10.0] * 4)[0].low is None
    assert rows({"ours": [0.1] * 5, AGAIN: [0.1] * 5}, [10.0] * 5)[0].low == pytest.approx(1)
    values = np.random.default_rng(2).normal(size=400)
    widths = [np.subtract(*interval(values[:n])[::-1]) for n in (10, 400)]
    assert widths[1] < widths[0] / 2


def test_two_regimes_of_the_memory_are_told_apart():
    rng = np.random.default_rng(3)
    slow, fast = 40 * rng.normal(1, 0.03, 25), 68 * rng.normal(1, 0.03, 15)
    rates = rng.permutation(np.concatenate([slow, fast]))
    between = border(rates)
    assert between is not None and slow.max() < between < fast.min()

    seconds = [(1.2 if rate > between else 0.9) / rate for rate in rates]
    ours = rows({"ours": seconds, AGAIN: seconds}, rates)[0]
    assert (ours.slow_ratio, ours.fast_ratio) == pytest.approx((0.9, 1.2))
    assert (ours.slow_copy, ours.fast_copy) == (np.median(slow), np.median(fast))


@pytest.mark.parametrize("seed", range(5))
def test_one_regime_is_not_split(seed):
    rng = np.random.default_rng(seed)
    assert border(rng.normal(40, 3, size=40)) is None
    assert border(rng.uniform(30, 50, size=40)) is None
    assert border(np.array([40.0] * 38 + [68.0] * 2)) is None  # two rounds are no regime
    assert border(np.full(40, 20.0)) is None


def test_csv_keeps_every_field(tmp_path):
    table = rows(
        {"ours": [0.1] * 5, AGAIN: [0.1] * 5},
        [10.0] * 5,
        checks={"ours": PASSED, "other": Skip('no, "not" here\nnor there')},
    )
    report.write_csv(table, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [list(line) for line in read] == [list(Row.__dataclass_fields__)] * 3
    for row, line in zip(table, read, strict=True):
        for name, text in line.items():
            value = getattr(row, name)
            assert text == ("" if value is None else str(value))
    assert report.read_csv(tmp_path / "rows.csv") == table
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_row_names_versions():
    case = replace(CASE, peers=("numpy", "not-installed"))
    (row, *_) = harness.rows(case, {"ours": PASSED}, Skip(""), Settings(), best=0.0)
    fastkit, torch_, numpy = row.versions.split(", ")
    assert fastkit.startswith(f"fastkit {__version__} (")
    assert (torch_, numpy) == (f"torch {torch.__version__}", f"numpy {np.__version__}")


def test_the_table_has_80_columns_and_every_row():
    table = rows(
        {"ours": [80.0] * 5, AGAIN: [1e-6, 80.0] * 3, "chunk-parallel": [0.123456] * 3},
        [1234.56] * 6,
        checks={
            "ours": replace(PASSED, error=9.99e-300, extra_bytes=10**12, build_s=1e4, clones=1e4),
            "chunk-parallel": PASSED,
            "broken": Skip("RuntimeError: " + "a long story of what went wrong, " * 20),
            "wrong": replace(PASSED, error=1e300),
        },
    )
    lines = report.table([*table, *(replace(row, direction="fwd+bwd") for row in table)]).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("op ")] == ["op 1x1 fwd", "op 1x1 fwd+bwd"]
    for row in table:
        assert sum(line.startswith(f"  {row.contestant} ") for line in lines) >= 2
