"""What a device measures, what ends a process on one, and the benchmark of a GPU."""

import csv
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastkit.bench import device, gpu, harness, measure, report
from fastkit.bench.case import Case, Fault, Skip
from fastkit.bench.cases import (
    iir_scan_chunks,
    linear_cross_entropy_loss,
    moments_covariance,
    procrustes_factor,
    topk_similarity_csls,
    topk_similarity_search,
)
from fastkit.bench.harness import Row
from fastkit.bench.measure import AGAIN, Check, Rounds, Settings


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
        self.warmed = 0

    def warm_up(self, call):
        call()
        self.warmed += 1

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


CASE = Case("op", "1x1", "fwd", floor_bytes=10**9, contest=FakeContest, device="cuda")
PASSED = Check(error=1e-6, build_s=0.0, call_s=0.1, extra_bytes=10**6, clones=1.0)


def test_the_device_of_a_case_times_it_and_copies_for_it(fake_gpu):
    settings = Settings(rounds=6, short=0.0, seconds=0.35)
    jobs = [(CASE, label) for label in FakeContest().makers]
    checks = dict(zip(FakeContest().makers, measure.check(jobs, settings), strict=True))
    assert str(checks["broken"]) == "ZeroDivisionError: division by zero"
    assert (checks["ours"].call_s, checks["ours"].extra_bytes, checks["ours"].clones) == (
        0.002,
        5 << 20,
        0.004,
    )

    plan = harness.plan(CASE, checks, settings)
    (timed,) = measure.rounds([(CASE, plan)], settings)
    assert (
        fake_gpu.warmed == 2 + 3
    )  # to check: all but the broken; to time: ours, ours again and the slow one
    assert fake_gpu.calls[0] == f"touch {5 << 20}"
    assert timed.copy_gb_s == pytest.approx([1000] * 6)  # of the floor's bytes
    assert timed.call_s == {"ours": [0.002] * 6, AGAIN: [0.002] * 6, "slow": [0.1] * 3}
    ours, _, slow, broken = harness.rows(CASE, checks, timed, settings, best=1000.0)
    assert (ours.ratio, slow.ratio, ours.faster) == pytest.approx((2, 100, 50))  # the floor of 1 GB is 1 ms
    assert (ours.clones, ours.extra_mb) == (None, (5 << 20) / 1e6)
    assert broken.note.startswith("failed: ZeroDivisionError")
    assert "fresh pages" not in report.table([ours, slow, broken])


def test_a_broken_device_ends_the_process_that_has_it(fake_gpu):
    """The harness gives a new process to the contestants that remain; here they would all fail."""
    results = measure.check([(CASE, "ours"), (CASE, "broken"), (CASE, "slow")], Settings())
    assert isinstance(next(results), Check)
    fake_gpu.broken = True
    with pytest.raises(ZeroDivisionError):
        next(results)
    fake_gpu.broken = False
    assert isinstance(next(measure.rounds([(CASE, {"broken": PASSED})], Settings())), Skip)
    fake_gpu.broken = True
    with pytest.raises(ZeroDivisionError):
        next(measure.rounds([(CASE, {"broken": PASSED})], Settings()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_its_benchmark_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "Child", lambda *_: pytest.fail("nothing is to be started"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "not run: no CUDA device\n"
    assert not (tmp_path / "out").exists()


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
    case = replace(CASE, contest=Contest, yardsticks=frozenset({"our other"}))
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make",
    [
        lambda: moments_covariance.case(5000, 100, compile=False, device="cuda"),
        lambda: moments_covariance.case(5000, 100, weights=True, compile=False, device="cuda"),
        lambda: procrustes_factor.polar_case(3, 100, 100, device="cuda"),
        lambda: procrustes_factor.procrustes_case(1000, 100, device="cuda"),
        lambda: topk_similarity_search.case(5000, 3000, 64, compile=False, device="cuda"),
        lambda: topk_similarity_search.case(
            5000, 3000, 64, dtype=torch.bfloat16, compile=False, device="cuda"
        ),
        lambda: topk_similarity_csls.case(5000, 3000, 64, compile=False, device="cuda"),
        lambda: linear_cross_entropy_loss.case(1000, 3000, 64, compile=False, device="cuda"),
        lambda: linear_cross_entropy_loss.case(1000, 3000, 64, everything=True, compile=False, device="cuda"),
    ],
)
def test_what_is_bound_by_arithmetic_agrees_on_a_gpu(make):
    ((rows,),) = harness.run([make()], Settings(rounds=5, seconds=1.0))
    for row in rows:
        assert not row.note.startswith("differs") and "Error" not in row.note
