"""fastkit bench and fastkit demo, whole: what they write and keep, and what ends them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkit import __version__, _command
from fastkit.__main__ import main
from fastkit.bench import cases, child, demo, full, harness, machine, progress, report
from fastkit.bench.cases import iir_scan_chunks, iir_scan_step
from fastkit.bench.harness import Row
from fastkit.bench.measure import Settings

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
    assert main(["bench", "iir_scan", "--quick", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "iir_step 2x3 fwd" in output and "copy rate: not measured" in output
    assert "no PNG: matplotlib not found; install with pip install 'fastkit[recipes]'" in output
    assert report.read_csv(small_bench) == [OLD, OTHER]
    assert not small_bench.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["iir_scan", "lora"], f"bench: STEM must be one of {', '.join(cases.stems())}, got lora\n"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
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


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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
    # Where tests run side by side it would measure nothing.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, env=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    entries = json.loads(results.read_text())["benchmarks"]
    infos = {entry["params"]["label"]: entry["extra_info"] for entry in entries}
    assert [*infos] == ["fastkit", "with grad", "copies", "op call", "eager"]
    assert {entry["group"] for entry in entries} == {"iir_step 64x512 fwd"}
    for info in infos.values():
        assert info["x floor"] > 0
        assert info["x fastest peer"] == pytest.approx(info["x floor"] / infos["eager"]["x floor"])


def test_the_demo_measures_trains_and_writes_its_files(tmp_path, monkeypatch, capfd):
    chunks = [
        iir_scan_chunks.case(1, 4, 64, chunk=16, warm=True, backward=backward, compile=False)
        for backward in (False, True)
    ]
    chosen = {"iir_scan": chunks, "another": [iir_scan_step.case(2, 3)]}
    monkeypatch.setattr(cases, "stems", lambda: [*chosen])
    monkeypatch.setattr(cases, "of", lambda stem: SimpleNamespace(demo_cases=lambda quick: chosen[stem]))
    monkeypatch.setattr(demo, "_QUICK", Settings(rounds=2, copy_bytes=4 << 20))
    train = demo.train_digits
    monkeypatch.setattr(demo, "train_digits", lambda **_: train(seeds=(0,), epochs=1))

    assert demo.main(tmp_path / "out", quick=True) == 0
    output = capfd.readouterr()
    assert "x floor" in output.out and "without it" in output.out
    assert "it/s" not in output.err  # not a terminal: no bars
    rows = report.read_csv(tmp_path / "out" / "demo.csv")
    assert {row.op for row in rows} == {"iir_scan", "iir_step"}
    forward = [row.contestant for row in rows if (row.op, row.direction) == ("iir_scan", "fwd")]
    assert forward[:5] == ["fastkit", "fastkit again", "chunk-parallel", "loop", "scipy"]
    for row in rows:
        assert row.note or (row.ratio and row.error < 1e-4)
        assert row.note.startswith(("", "void")) or row.note.endswith("is not installed")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_names_the_extra_that_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_command, "find_spec", lambda module: None if module == "sklearn" else True)
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 1
    message = "demo: scikit-learn not found; install with pip install 'fastkit[recipes]'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()
