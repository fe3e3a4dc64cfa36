"""The benchmark harness: its statistics, its refusals to state a ratio, its child processes, its reports."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastkit import __version__, reference
from fastkit.__main__ import main
from fastkit.bench import cases, child, demo, device, full, gpu, harness, machine, measure, progress, report
from fastkit.bench.case import Case, Fault, Skip
from fastkit.bench.cases import iir_scan, iir_scan_chunks, iir_scan_modes, iir_scan_peers, iir_scan_step
from fastkit.bench.cases.iir_scan_contest import Yardstick
from fastkit.bench.cases.iir_scan_modes import Bank, Fixed, Sections, TimeVarying
from fastkit.bench.harness import Row, border, interval
from fastkit.bench.measure import AGAIN, Check, Rounds, Settings

CASE = Case("op", "1x1", "fwd", floor_bytes=10**9, contest=lambda: pytest.fail("not to be made"))
PASSED = Check(error=1e-6, build_s=0.0, call_s=0.1, extra_bytes=10**6, clones=1.0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In child processes: on a busy machine threads wait for one another, and burn what they wait."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


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


MODES = [
    (Fixed, (3, 1, 384), False),
    (Fixed, (1, 1, 384), False),
    (TimeVarying, (2, 9, 64), False),
    (Bank, (2, 9, 256), False),
    (Bank, (2, 9, 256), True),
    (Sections, (5, 1, 384), False),
]


def makers_of(contest):
    """Those whose package is installed, and what they make."""
    for label, make in contest.makers.items():
        try:
            yield label, make()
        except Skip as skip:
            package = label.split()[0]
            assert package in iir_scan_peers.PACKAGES
            assert str(skip).startswith(f"{package} is ")  # not installed, or made for another torch


def test_a_package_that_cannot_be_used_is_skipped_in_words(tmp_path, monkeypatch):
    with pytest.raises(Skip, match=r"^no_such_package is not installed$"):
        iir_scan_peers.load("no_such_package.part")
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.99: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Skip, match=r"^broken_package is installed, but does not load$"):
        iir_scan_peers.load("broken_package")


def check_every_contestant(case, results, tolerance):
    """All agree, one wrong number in any result is seen, and yardsticks are named as such."""
    contest = case.contest()
    assert next(iter(contest.makers)) == "fastkit"
    for label, call in makers_of(contest):
        given = call()
        assert not isinstance(given, Yardstick) or label in case.yardsticks
        parts, error = (
            (given.result, given.measure) if isinstance(given, Yardstick) else (given, contest.error)
        )
        assert isinstance(given, Yardstick) or len(parts) == results
        assert contest.error(given) < tolerance, label
        for i, part in enumerate(parts):
            part = torch.as_tensor(part).detach()
            for fault in (0.01 * part.abs().max(), torch.nan):
                wrong = part.clone()
                wrong[(-1,) * wrong.ndim] += fault
                assert not error((*parts[:i], wrong, *parts[i + 1 :])) <= case.tolerance, label


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_iir_scan_agrees_and_a_wrong_one_does_not(view, backward):
    case = iir_scan_chunks.case(2, 9, 256, chunk=32, view=view, backward=backward, compile=False)
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-4)


@pytest.mark.parametrize(("mode", "size", "view"), MODES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_form_of_the_modes_agrees_and_a_wrong_one_does_not(mode, size, view, backward):
    case = iir_scan_modes.case(mode, size, view=view, backward=backward)
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-5)


def test_every_contestant_of_a_step_agrees_and_a_wrong_one_does_not():
    case = iir_scan_step.case(3, 5)
    check_every_contestant(case, results=3, tolerance=1e-6)
    differentiable = {label: call() for label, call in makers_of(case.contest())}
    assert differentiable["with grad"][0].requires_grad
    assert differentiable["op call"].result[0].requires_grad


class FakeLpc:
    """torchlpc and philtorch by their documented interface: rows of samples, coefficients for each."""

    EXTENSION_LOADED = True

    @staticmethod
    def sample_wise_lpc(x, a):
        assert x.shape == a.shape[:2] and a.shape[2] == 2
        return reference.iir_scan(x[None], a[None], chunk=1)[0]

    @staticmethod
    def lfilter(b, a, x, *, form, backend):
        assert form == "df1" and backend in ("ssm", "torchlpc") and b.shape == (*x.shape, 3)
        return reference.iir_scan(x[None], a[None], b[None], chunk=1)[0]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_peers_are_given_is_the_same_work(view, backward, monkeypatch):
    """Where they are not installed, their place is taken by what computes the same."""
    load = iir_scan_peers.load
    fakes = {"torchlpc": FakeLpc, "philtorch.lpv": FakeLpc}
    monkeypatch.setattr(iir_scan_peers, "load", lambda module: fakes.get(module) or load(module))
    case = iir_scan_chunks.case(2, 9, 64, chunk=16, view=view, backward=backward, compile=False)
    assert {"torchlpc + FIR", "philtorch", "torchlpc poles"} <= {*dict(makers_of(case.contest()))}
    check_every_contestant(case, results=4 if backward else 1, tolerance=1e-4)


@pytest.mark.parametrize(("mode", "by"), [(Fixed, "iir_scan"), (Sections, "sosfilt")])
def test_what_is_exact_for_long_signals_is_the_reference(mode, by):
    """Gradients too: the sums over rows that share a filter."""
    contest = iir_scan_modes.case(mode, (3, 1, 768), backward=True).contest()
    x, a, b, gy = (t.detach().double() for t in contest.inputs)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    if by == "iir_scan":
        y = reference.iir_scan(x, a, b)
    else:
        y = reference.sosfilt(x, torch.cat([b, torch.ones_like(a[..., :1]), a], -1)[0, 0])
    for actual, (expected, _) in zip(
        (y.detach(), *torch.autograd.grad(y, leaves, gy)), contest.expected, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_the_filters_of_the_modes_are_near_the_unit_circle_and_stable():
    for mode, size, _ in MODES:
        inputs = iir_scan_modes.case(mode, size).contest().inputs
        radii = inputs.a[..., 1].sqrt()
        assert 0.98 < radii.max() < 0.9991
        assert (inputs.a[..., 0].abs() < 2 * radii).all()  # pairs, not two real poles


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stem", cases.stems())
def test_the_cases_of_each_stem_travel_to_child_processes(stem, quick):
    module = cases.of(stem)
    for chosen in (module.cases(quick=quick), module.demo_cases(quick=quick), module.gpu_cases()):
        titles = [case.title for case in chosen]
        assert len({*titles}) == len(titles)
        for case, title in zip(pickle.loads(pickle.dumps(chosen)), titles, strict=True):
            assert case.title == title
            assert case.yardsticks <= {*case.contest().makers}
            assert not quick or case.device == "cuda" or case.warm


def test_a_module_joins_by_being_there_and_parts_do_not(tmp_path, monkeypatch):
    for name in ("iir_scan.py", "iir_scan_step.py", "moments.py", "lora_linear.py", "lora_linear_rows.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(cases, "__path__", [str(tmp_path)])
    assert cases.stems() == ["iir_scan", "lora_linear", "moments"]


def test_the_shapes_of_iir_scan():
    chosen = iir_scan.cases()
    floors = {(case.op, case.shape, case.direction): case.floor_bytes for case in chosen}
    samples = 8 * 256 * 16384
    assert floors["iir_scan", "8x16384x256 view", "fwd+bwd"] == 24 * samples
    assert floors["iir_scan", "8x256x16384 chunk 1", "fwd"] == 28 * samples
    assert floors["iir_scan", "8x16384x256 view F=4", "fwd+bwd"] == 20 * samples
    assert floors["iir_scan", "16x1x480000 fixed", "fwd+bwd"] == 24 * 16 * 480000
    assert {op for op, *_ in floors} == {"iir_scan", "sosfilt", "iir_step"}


def test_torch_compile_is_skipped_where_it_cannot_compile(tmp_path, monkeypatch):
    make = iir_scan_chunks.case(1, 1, 32, chunk=32).contest().makers["compiled"]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(Skip, match=r"Python\.h"):
        make()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(Skip, match=r"C\+\+ compiler"):
        make()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
def test_the_peak_memory_of_a_call_is_its_own():
    """64 MiB for a moment, although a larger call came before."""
    torch.ones(64 << 20)
    measured = device.Cpu().measured(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < measured.extra_bytes < 80 << 20


class FakeGpu:
    """A clock that a call advances by the seconds that it returns; a copy runs at 1000 GB/s."""

    def __init__(self):
        self.calls = []
        self.broken = False

    def seconds(self, call):
        result = call()
        self.calls.append(result)
        return result

    def measured(self, call):
        return device.Measured(call(), 5 << 20, 0.0)

    def copy(self, floor_bytes, copy_bytes):
        return (lambda: floor_bytes / 1e12), floor_bytes

    def clone(self, floor_bytes):
        return lambda: 0.5

    def touch(self, extra_bytes):
        self.calls.append(f"touch {extra_bytes}")

    def works(self):
        return not self.broken


class FakeContest:
    @property
    def makers(self):
        calls = {"ours": lambda: 0.002, "slow": lambda: 0.1, "broken": lambda: 1 / 0}
        return {label: lambda call=call: call for label, call in calls.items()}

    def error(self, result):
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setitem(device.DEVICES, "cuda", fake := FakeGpu())
    return fake


GPU_CASE = replace(CASE, contest=FakeContest, device="cuda")


def test_the_device_of_a_case_times_it_and_copies_for_it(fake_gpu):
    settings = Settings(rounds=6, short=0.0, seconds=0.35)
    jobs = [(GPU_CASE, label) for label in FakeContest().makers]
    checks = dict(zip(FakeContest().makers, measure.check(jobs, settings), strict=True))
    assert str(checks["broken"]) == "ZeroDivisionError: division by zero"
    assert (checks["ours"].call_s, checks["ours"].extra_bytes, checks["ours"].clones) == (
        0.002,
        5 << 20,
        0.004,
    )

    plan = harness.plan(GPU_CASE, checks, settings)
    (timed,) = measure.rounds([(GPU_CASE, plan)], settings)
    assert fake_gpu.calls[0] == f"touch {5 << 20}"
    assert timed.copy_gb_s == pytest.approx([1000] * 6)  # of the floor's bytes
    assert timed.call_s == {"ours": [0.002] * 6, AGAIN: [0.002] * 6, "slow": [0.1] * 3}
    ours, _, slow, broken = harness.rows(GPU_CASE, checks, timed, settings, best=1000.0)
    assert (ours.ratio, slow.ratio, ours.faster) == pytest.approx((2, 100, 50))  # the floor of 1 GB is 1 ms
    assert (ours.clones, ours.extra_mb) == (None, (5 << 20) / 1e6)
    assert broken.note.startswith("failed: ZeroDivisionError")
    assert "fresh pages" not in report.table([ours, slow, broken])


def test_a_broken_device_ends_the_process_that_has_it(fake_gpu):
    """The harness gives a new process to the contestants that remain; here they would all fail."""
    results = measure.check([(GPU_CASE, "ours"), (GPU_CASE, "broken"), (GPU_CASE, "slow")], Settings())
    assert isinstance(next(results), Check)
    fake_gpu.broken = True
    with pytest.raises(ZeroDivisionError):
        next(results)
    fake_gpu.broken = False
    assert isinstance(next(measure.rounds([(GPU_CASE, {"broken": PASSED})], Settings())), Skip)
    fake_gpu.broken = True
    with pytest.raises(ZeroDivisionError):
        next(measure.rounds([(GPU_CASE, {"broken": PASSED})], Settings()))


def test_the_cases_of_a_gpu_have_its_contestants_and_no_warm_shape():
    chosen = iir_scan.gpu_cases()
    for case in chosen:
        ours, other, *rest = case.contest().makers
        assert (case.device, case.warm, ours, other) == ("cuda", False, "fastkit cuda", "fastkit triton")
        assert {"chunk-parallel", "compiled"} <= {*rest}
        assert case.yardsticks == {"fastkit triton"}
    floors = {(case.shape, case.direction): case.floor_bytes for case in chosen}
    assert floors["8x65536x256 view", "fwd+bwd"] == 24 * 8 * 256 * 65536
    assert floors["16x1x480000 fixed", "fwd"] == 8 * 16 * 480000


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_its_benchmark_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "Child", lambda *_: pytest.fail("nothing is to be started"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "not run: no CUDA device\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_an_implementation_that_cannot_run_is_skipped_with_the_reason(impl, monkeypatch):
    make = iir_scan_chunks.case(1, 1, 32, chunk=32, device="cuda").contest().makers[f"fastkit {impl}"]
    with pytest.raises(Skip, match=r"no such implementation|no CUDA|without CUDA|not installed|\.so"):
        make()


def test_the_benchmark_of_a_gpu_writes_each_case_and_tells_a_wrong_result(tmp_path, monkeypatch, capsys):
    row = Row("op", "1x1", "fwd", "fastkit cuda", ratio=1.0, rounds=5, extra_mb=1.0)
    wrong = [
        "differs: error nan, tolerance 1e-04",
        "failed: RuntimeError: an illegal memory access",
        "failed: its process ended with exit code 1",
        "failed: took over 90 s",
    ]
    fine = [
        "skipped: no CUDA device",
        "skipped: triton is not installed; pip install 'fastkit[triton]'",
        "skipped: out of memory",
        "skipped: 3.1 s a call",
        "void: the machine was busy in 30 of 40 rounds",
    ]
    faults = [replace(row, contestant="fastkit triton", ratio=None, note=note) for note in wrong]
    results = [
        [row],
        *([replace(row, contestant="fastkit cuda again", ratio=None, note=note)] for note in fine),
        *([replace(fault, contestant="compiled")] for fault in faults),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.info, "report", dict)
    monkeypatch.setattr(gpu.info, "describe", lambda facts: "")
    for rows, code in [(results, 0), *(([*results, [fault]], 1) for fault in faults)]:
        of_stem = SimpleNamespace(gpu_cases=lambda rows=rows: rows)
        monkeypatch.setattr(gpu, "cases", SimpleNamespace(stems=lambda: ["op"], of={"op": of_stem}.get))
        monkeypatch.setattr(gpu, "run", lambda cases, settings: [cases])
        assert gpu.main(["--out", str(tmp_path)]) == code
        with (tmp_path / "gpu.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows)
        output = capsys.readouterr().out
        assert "op 1x1 fwd" in output
        told = [line for line in output.splitlines() if line.startswith("wrong: ")]
        assert told == [f"wrong: op 1x1 fwd, fastkit triton: {rows[-1][0].note}"] * code


def test_want_of_memory_is_no_fault():
    assert measure._skip(torch.OutOfMemoryError("CUDA out of memory. Tried")).note == "skipped: out of memory"
    assert measure._skip(RuntimeError("b\nc")).note == "failed: RuntimeError: b"


@pytest.mark.parametrize("ends", ["rival", "ours"])
def test_who_ends_the_rounds_on_a_gpu_is_found_out(monkeypatch, ends):
    """A child has no name for what ended it; ours are timed once more, without the rivals."""
    ended = Fault("its process ended with exit code 1")
    planned = []

    class Child:
        def __init__(self, work, settings, env, limit):
            self.check = work is measure.check

        def do(self, job):
            if self.check:
                return PASSED
            planned.append([*job[1]])
            if ends in job[1]:
                return ended
            return Rounds([10.0] * 5, {label: [0.1] * 5 for label in job[1]}, threads=2, load=0.5)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    class Contest:
        makers = dict.fromkeys(("ours", "our other", "rival"))

    monkeypatch.setattr(harness, "Child", Child)
    case = replace(GPU_CASE, contest=Contest, yardsticks=frozenset({"our other"}))
    ((table,),) = harness.run([case])
    rows = {row.contestant: row for row in table}
    assert planned == [["ours", "our other", "rival", AGAIN], ["ours", "our other", AGAIN]]
    assert rows.pop("rival").note == f"skipped: rounds with all contestants: {ended}"
    assert {row.note for row in rows.values()} == {"" if ends == "rival" else f"failed: {ended}"}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 9, 256), (2, 16, 512)])
def test_every_form_on_a_gpu_agrees(shape):
    settings = Settings(rounds=5, seconds=1.0)
    for view in (False, True):
        case = iir_scan_chunks.case(*shape, chunk=32, view=view, backward=True, compile=False, device="cuda")
        ((rows,),) = harness.run([case], settings)
        for row in rows:
            assert not row.note.startswith("differs") and "Error" not in row.note


CHILD_WORK = """
import os, time

def work(jobs, settings):
    for job in jobs:
        if job == "die":
            os._exit(3)
        if job == "hang":
            time.sleep(600)
        yield job.upper()
"""


def test_a_job_that_dies_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    (tmp_path / "child_work.py").write_text(CHILD_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    from child_work import work  # type: ignore[import-not-found]

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.monotonic()
    with child.Child(work, None, env, limit=2.0) as process:
        results = [process.do(job) for job in ("a", "die", "hang", "b")]
    assert time.monotonic() - start < 60
    assert results[::3] == ["A", "B"]
    assert str(results[1]) == "its process ended with exit code 3"
    assert str(results[2]) == "took over 2 s"


@pytest.fixture
def small_bench(tmp_path, monkeypatch):
    """A benchmark of one small case; the path of its results, which has some of this case and of another."""
    of_stem = SimpleNamespace(cases=lambda quick: [iir_scan_step.case(2, 3)])
    monkeypatch.setattr(cases, "of", lambda stem: of_stem)
    monkeypatch.setattr(full, "_quick", lambda rounds: Settings(rounds=rounds, copy_bytes=4 << 20))
    path = tmp_path / machine.name() / f"{__version__}-quick.csv"
    path.parent.mkdir()
    report.write_csv([OLD, OTHER], path)
    return path


OLD = Row("iir_step", "2x3", "fwd", "of another time")
OTHER = Row("other", "1x1", "fwd", "ours", ratio=2.0, rounds=40)


def test_bench_writes_results_and_keeps_those_of_other_cases(small_bench, tmp_path, capfd):
    assert main(["bench", "iir_scan", "--quick", "--rounds", "5", "--out", str(tmp_path)]) == 0
    output = capfd.readouterr()
    assert "iir_step 2x3 fwd" in output.out and "the ceiling of this run" in output.out
    assert "it/s" not in output.err  # not a terminal: no bar
    *rows, last = report.read_csv(small_bench)
    assert last == OTHER
    labels = ["fastkit", "fastkit again", "with grad", "copies", "op call", "eager"]
    assert [row.contestant for row in rows] == labels
    for row in rows:
        assert row.error is not None and row.error < 1e-6
        assert row.note.startswith("void") or (row.ratio and row.threads and row.copy_q2 and row.measured)
    assert small_bench.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bench_resumes_with_what_was_not_measured(small_bench, tmp_path, monkeypatch):
    (case,) = cases.of("iir_scan").cases(quick=True)
    known = [replace(OLD, versions=harness.versions(case.peers)), OTHER]
    report.write_csv(known, small_bench)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "Child", lambda *_: pytest.fail("nothing is to be measured"))
        assert main(["bench", "--quick", "--resume", "--out", str(tmp_path)]) == 0
    assert report.read_csv(small_bench) == known
    report.write_csv([replace(OLD, versions="others"), OTHER], small_bench)
    monkeypatch.setattr(progress, "run", lambda cases, settings: ([[OLD]] for _ in cases))
    assert main(["bench", "--quick", "--resume", "--out", str(tmp_path)]) == 0
    assert report.read_csv(small_bench) == [OLD, OTHER]


def test_bench_works_without_the_packages_of_recipes(small_bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(full, "find_spec", lambda module: None)
    monkeypatch.setattr(progress, "run", lambda cases, settings: ([[row]] for row in [OLD]))
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "iir_step 2x3 fwd" in output and "copy rate: not measured" in output
    assert "no PNG: matplotlib not found; install with pip install 'fastkit[recipes]'" in output
    assert report.read_csv(small_bench) == [OLD, OTHER]
    assert not small_bench.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["iir_scan", "lora"], f"bench: STEM must be one of {', '.join(cases.stems())}, got lora\n"),
        (["--rounds", "0"], "argument --rounds: must be positive, got 0"),
        (["iir_scan", "--out", "OUT"], "has other columns than this version of fastkit writes; move it away"),
    ],
)
def test_bench_refuses_in_words_before_it_measures(arguments, refusal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "Child", lambda *_: pytest.fail("nothing is to be started"))
    path = tmp_path / machine.name() / f"{__version__}.csv"
    path.parent.mkdir()
    path.write_text("another,file\n1,2\n")
    try:
        code = main(["bench", *(str(tmp_path) if word == "OUT" else word for word in arguments)])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert refusal in capsys.readouterr().err
    assert path.read_text() == "another,file\n1,2\n"


HANGING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from fastkit.bench import cases, full
from fastkit.bench.case import Case
from fastkit.bench.cases import iir_scan_step
from fastkit.bench.measure import Settings

class Hang:
    makers = {"ours": lambda: time.sleep(600)}

if __name__ == "__main__":
    from hanging import Hang
    chosen = [iir_scan_step.case(2, 3), Case("op", "1x1", "fwd", 1000, Hang)]
    cases.of = lambda stem: SimpleNamespace(cases=lambda quick: chosen)
    full._quick = lambda rounds: Settings(rounds=2, copy_bytes=4 << 20)
    full.main([], Path(sys.argv[1]), quick=True)
"""


def test_a_benchmark_that_is_ended_keeps_what_it_has_measured(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    path = tmp_path / machine.name() / f"{__version__}-quick.csv"
    command = [sys.executable, str(tmp_path / "hanging.py"), str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert {row.op for row in report.read_csv(path)} == {"iir_step"}


def test_the_name_of_a_machine(monkeypatch):
    name = machine.name()
    assert name == machine.name() and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    facts = {"model name": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "cpu family": "6", "model": "106"}
    monkeypatch.setattr(machine, "_cpu_facts", lambda: facts)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.name() == "intel-xeon-gold-6338-family-6-model-106-64-cores"


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests are here without benchmarks/")
def test_the_cases_run_under_pytest_benchmark(tmp_path):
    """One small case, with a ratio to the floor and to the fastest peer for each contestant."""
    results = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS),
        "--benchmark-only",
        f"--benchmark-json={results}",
    ]
    command += ["--quick", "--rounds=2", "-k", "iir_step", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    entries = json.loads(results.read_text())["benchmarks"]
    infos = {entry["params"]["label"]: entry["extra_info"] for entry in entries}
    assert [*infos] == ["fastkit", "with grad", "copies", "op call", "eager"]
    assert {entry["group"] for entry in entries} == {"iir_step 64x512 fwd"}
    for info in infos.values():
        assert info["x floor"] > 0
        assert info["x fastest peer"] == pytest.approx(info["x floor"] / infos["eager"]["x floor"])


def test_the_demo_measures_trains_and_writes_its_files(tmp_path, monkeypatch, capfd):
    chosen = [
        iir_scan_chunks.case(1, 4, 64, chunk=16, warm=True, backward=backward, compile=False)
        for backward in (False, True)
    ]
    monkeypatch.setattr(iir_scan, "demo_cases", lambda quick: chosen)
    monkeypatch.setattr(demo, "_QUICK", Settings(rounds=5, copy_bytes=4 << 20))
    train = demo.train_digits
    monkeypatch.setattr(demo, "train_digits", lambda **_: train(seeds=(0,), epochs=1))

    assert demo.main(tmp_path / "out", quick=True) == 0
    output = capfd.readouterr()
    assert "x floor" in output.out and "without it" in output.out
    assert "it/s" not in output.err  # not a terminal: no bars
    rows = report.read_csv(tmp_path / "out" / "demo.csv")
    forward = [row.contestant for row in rows if row.direction == "fwd"]
    assert forward[:5] == ["fastkit", "fastkit again", "chunk-parallel", "loop", "scipy"]
    for row in rows:
        assert row.note or (row.ratio and row.error < 1e-4)
        assert row.note.startswith(("", "void")) or row.note.endswith("is not installed")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_names_the_extra_that_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module == "sklearn" else True)
    assert demo.main(tmp_path / "out", quick=True) == 1
    message = "demo: scikit-learn not found; install with pip install 'fastkit[recipes]'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()
