"""benchmarks/gpu.sh: what its summary says of tools that are missing, refuse, fail or take too long."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STEPS = ["build", "tests", "memcheck", "racecheck", "benchmark"]
TOOLS = """
    bash cat dirname env grep mkdir mktemp mv nproc rm sed sleep sort tail tee timeout tr
""".split()  # noqa: SIM905

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests are here without the checkout"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs bash and the GNU tools"),
]

# As the script calls it: what it does is in variables, so that each test can have a step fail.
PYTHON = """
case "$*" in
  -) cat >/dev/null; echo "90a-real NVIDIA Fake 9000" ;;
  "-c import "*) exit "${NO_PYTEST:-0}" ;;
  "-m pip"*) echo "pip $*"; exit "${PIP:-0}" ;;
  "-m fastkit info") echo "library: fake"; exit "${INFO:-0}" ;;
  "-m fastkit.bench.gpu"*) echo "rows"; exit "${BENCHMARK:-0}" ;;
  "-m pytest"*sanitize*) echo "${SANITIZED:-3 passed in 1s}"; exit "${SANITIZE:-0}" ;;
  "-m pytest"*) [ -z "${HANG:-}" ] || sleep 30; echo "${TESTED:-7 passed in 1s}"; exit "${TESTS:-0}" ;;
esac
"""
SANITIZER = """
[ -z "${REFUSES:-}" ] || { echo "========= Device not supported"; exit 1; }
while [ "${1%python3}" = "$1" ]; do shift; done
"$@"
code=$?
exit "${SANITIZER:-$code}"
"""


@pytest.fixture
def path(tmp_path):
    """A PATH with the GNU tools, and a GPU machine's tools that do nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    for name, body in {
        "python3": PYTHON,
        "compute-sanitizer": SANITIZER,
        **dict.fromkeys(("nvcc", "cmake", "ninja"), ""),
    }.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}")
        (folder / name).chmod(0o755)
    return folder


def run(path, out, **variables):
    """The exit code, and of each step its result."""
    env = {"PATH": str(path), "OUT": str(out), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([SCRIPT], env=env | variables, capture_output=True, text=True, timeout=120)
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == STEPS
    assert all(row["seconds"].isdigit() for row in rows)
    for row in rows:
        assert f"{row['step']}: {row['result']} ({row['seconds']} s)" in done.stdout
    return done.returncode, {row["step"]: row["result"] for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_nothing_runs_and_that_is_no_failure(path, tmp_path):
    (path / "python3").unlink()
    (path / "python3").write_text(f'#!{shutil.which("bash")}\nexec {sys.executable} "$@"\n')
    (path / "python3").chmod(0o755)
    code, results = run(path, tmp_path / "out")
    assert (code, results) == (0, dict.fromkeys(STEPS, "not run: no CUDA device"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["log.txt", "summary.csv"]


def test_all_steps_pass_and_the_log_has_what_they_said(path, tmp_path):
    code, results = run(path, tmp_path / "out")
    assert (code, results) == (0, {**dict.fromkeys(STEPS, "passed"), "build": "passed, by pip"})
    log = (tmp_path / "out" / "log.txt").read_text()
    for text in (
        "pip -m pip install -v --no-build-isolation --no-deps -e .",
        "library: fake",
        "7 passed",
        "rows",
    ):
        assert text in log


ABSENT = (
    "E   ModuleNotFoundError: No module named 'hypothesis'\nERROR tests/test_a.py\n7 passed, 1 error in 1s"
)
WRONG = "FAILED tests/test_a.py::test_b - AssertionError\n1 failed, 7 passed in 1s"


@pytest.mark.parametrize(
    ("variables", "code", "expected"),
    [
        ({"PIP": "1"}, 1, {"build": "failed: exit code 1", "benchmark": "not run: the build failed"}),
        (
            {"INFO": "1"},
            1,
            {"build": "failed: the library does not load", "tests": "not run: the library does not load"},
        ),
        (
            {"TESTS": "1", "TESTED": WRONG},
            1,
            {"tests": "failed: 1 failed, 7 passed in 1s", "benchmark": "passed"},
        ),
        ({"TESTS": "1", "TESTED": ABSENT}, 0, {"tests": "passed, without the files that need hypothesis"}),
        ({"TESTS": "1", "TESTED": f"{ABSENT}\n{WRONG}"}, 1, {"tests": "failed: 1 failed, 7 passed in 1s"}),
        ({"TESTS": "139"}, 1, {"tests": "failed: exit code 139"}),
        ({"TESTED": "9 skipped in 1s"}, 0, {"tests": "not run: all were skipped"}),
        ({"TESTS": "5"}, 0, {"tests": "not run: no test needs a GPU"}),
        ({"REFUSES": "1"}, 0, dict.fromkeys(("memcheck", "racecheck"), "not run: Device not supported")),
        ({"SANITIZED": "3 skipped in 1s"}, 0, {"memcheck": "not run: all tests were skipped"}),
        ({"SANITIZER": "99"}, 1, {"memcheck": "failed: errors found", "benchmark": "passed"}),
        ({"SANITIZE": "1", "SANITIZED": WRONG}, 1, {"racecheck": "failed: 1 failed, 7 passed in 1s"}),
        ({"NO_PYTEST": "1"}, 0, {"tests": "not run: pytest is not installed", "benchmark": "passed"}),
        ({"BENCHMARK": "1"}, 1, {"benchmark": "failed: exit code 1", "tests": "passed"}),
        ({"BUDGET": "0"}, 1, {"build": "failed: exit code 125"}),
    ],
    ids=str,
)
def test_a_step_that_fails_or_cannot_run(path, tmp_path, variables, code, expected):
    actual, results = run(path, tmp_path / "out", **variables)
    assert actual == code
    assert {step: results[step] for step in expected} == expected


def test_tools_that_are_missing(path, tmp_path):
    (path / "compute-sanitizer").unlink()
    code, results = run(path, tmp_path / "out")
    assert (code, results["memcheck"], results["benchmark"]) == (0, "not run: no compute-sanitizer", "passed")
    (path / "nvcc").unlink()
    code, results = run(path, tmp_path / "out")
    assert (code, {*results.values()}) == (0, {"not run: no nvcc"})


def test_a_test_that_hangs_fails_and_leaves_time_for_no_more(path, tmp_path):
    code, results = run(path, tmp_path / "out", HANG="1", BUDGET="8")
    assert code == 1
    assert results["tests"].startswith("failed: took over ")
    assert {results[step] for step in STEPS[2:]} == {"not run: no time left"}
