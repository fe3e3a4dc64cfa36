"""benchmarks/gpu.sh: what its summary says of tools that are missing, refuse, fail or take too long."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STEPS = ["build", "tests", "racecheck", "memcheck", "benchmark"]
TOOLS = """
    bash cat dirname env grep mkdir mktemp mv nproc rm sed setsid sleep sort tail tee timeout tr wc
""".split()  # noqa: SIM905

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests are here without the checkout"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs bash and the GNU tools"),
]

# As the script calls it: what it does is in variables, so that each test can have a step fail. What LACKS
# names cannot be imported; what HANGS names does not end.
PYTHON = """
hang() { [ "${HANGS:-}" != "$1" ] || sleep 60; }
case "$*" in
  -) cat >/dev/null; echo "${WARNS:-}" >&2; echo "${DEVICE-90a-real NVIDIA Fake 9000}"; exit "${TORCH:-0}" ;;
  "-m fastkit info" | "-c import sys, fastkit"*) echo "library: fake"; exit "${INFO:-0}" ;;
  "-c import "*) case " ${LACKS:-} " in *" ${2#import } "*) exit 1 ;; esac ;;
  "-m pip"*) echo "pip $*, CUDA $FASTKIT_CUDA"; exit "${PIP:-0}" ;;
  "-m fastkit.bench.gpu"*)
    [ -z "${OUTLIVED:-}" ] || setsid sleep 60 &
    [ -z "${STUBBORN:-}" ] || trap "" TERM
    echo "${MEASURED:-rows}"; hang benchmark; exit "${BENCHMARK:-0}" ;;
  "-m pytest"*sanitize*) echo "${SANITIZED:-3 passed in 1s}"; exit "${SANITIZE:-0}" ;;
  "-m pytest"*) hang tests; echo "${TESTED:-7 passed in 1s}"; exit "${TESTS:-0}" ;;
esac
"""
SANITIZER = """
[ -z "${REFUSES:-}" ] || { echo "========= Device not supported"; exit 1; }
echo "sanitizer: $*"
tool=$2
while [ "${1%python3}" = "$1" ]; do shift; done
"$@"
code=$?
[ "${HANGS:-}" != "$tool" ] || sleep 60
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
        **dict.fromkeys(("nvcc", "g++", "cmake", "ninja"), ""),
    }.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}")
        (folder / name).chmod(0o755)
    return folder


def run(path, out, **variables):
    """The exit code, and of each step its result."""
    nothing = str(path.parent / "nothing")
    env = {"PATH": str(path), "OUT": str(out), "HOME": os.environ.get("HOME", "/"), "CUDA_HOME": nothing}
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
        "pip -m pip install -v --no-build-isolation --no-deps -e ., CUDA ON",
        "library: fake",
        "7 passed",
        "sanitizer: --tool racecheck --error-exitcode 99 --kernel-name kernel_substring=fastkit",
        "sanitizer: --tool memcheck --error-exitcode 99 --report-api-errors no",
        "rows",
    ):
        assert text in log


def absent(module):
    return (
        f"E   ModuleNotFoundError: No module named '{module}'\nERROR tests/test_a.py\n7 passed, 1 error in 1s"
    )


ABSENT = absent("hypothesis")
FAILED = "FAILED tests/test_a.py::test_b - AssertionError"
WRONG = f"{FAILED}\n1 failed, 7 passed in 1s"
INVALID = "========= Invalid __global__ write of size 4 bytes"
DIFFERS = "op 1x1 fwd, fastkit cuda: differs: error nan, tolerance 1e-04"


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
        ({"TESTS": "1", "TESTED": absent("fastkit")}, 1, {"tests": "failed: 7 passed, 1 error in 1s"}),
        ({"TESTS": "1", "TESTED": absent("fastkit.ops.a")}, 1, {"tests": "failed: 7 passed, 1 error in 1s"}),
        ({"TESTS": "1", "TESTED": absent("scipy.a")}, 1, {"tests": "failed: 7 passed, 1 error in 1s"}),
        ({"TESTS": "1", "TESTED": f"ERROR a\n{ABSENT}"}, 1, {"tests": "failed: 7 passed, 1 error in 1s"}),
        ({"TESTS": "1"}, 1, {"tests": "failed: 7 passed in 1s"}),
        ({"TESTS": "2", "TESTED": "1 error in 1s"}, 1, {"tests": "failed: exit code 2"}),
        ({"TESTS": "2"}, 1, {"tests": "failed: exit code 2"}),
        ({"TESTS": "137"}, 1, {"tests": "failed: exit code 137"}),
        ({"TESTS": "139"}, 1, {"tests": "failed: exit code 139"}),
        ({"TESTED": "9 skipped in 1s"}, 0, {"tests": "not run: all were skipped"}),
        ({"TESTS": "5"}, 0, {"tests": "not run: no test needs a GPU"}),
        ({"REFUSES": "1"}, 0, dict.fromkeys(("memcheck", "racecheck"), "not run: Device not supported")),
        ({"SANITIZED": "3 skipped in 1s"}, 0, {"memcheck": "not run: all tests were skipped"}),
        ({"SANITIZER": "99"}, 1, {"memcheck": "failed: errors found", "benchmark": "passed"}),
        ({"SANITIZER": "99", "SANITIZED": INVALID}, 1, {"memcheck": f"failed: {INVALID}"}),
        ({"SANITIZE": "1", "SANITIZED": WRONG}, 1, {"racecheck": f"failed: {FAILED}"}),
        (
            {"SANITIZE": "1", "SANITIZED": f"E  bfloat16 is not supported\n========= not supported\n{WRONG}"},
            1,
            {"memcheck": f"failed: {FAILED}"},
        ),
        ({"SANITIZE": "1", "SANITIZED": "E  is not supported"}, 1, {"memcheck": "failed: exit code 1"}),
        ({"LACKS": "pytest"}, 0, {"tests": "not run: pytest is not installed", "benchmark": "passed"}),
        ({"LACKS": "numpy"}, 0, {"tests": "passed", "benchmark": "not run: numpy is not installed"}),
        ({"BENCHMARK": "1"}, 1, {"benchmark": "failed: exit code 1", "tests": "passed"}),
        ({"BENCHMARK": "1", "MEASURED": f"wrong: {DIFFERS}"}, 1, {"benchmark": f"failed: {DIFFERS}"}),
        ({"BUDGET": "0"}, 1, {"build": "failed: exit code 125"}),
    ],
    ids=str,
)
def test_a_step_that_fails_or_cannot_run(path, tmp_path, variables, code, expected):
    actual, results = run(path, tmp_path / "out", **variables)
    assert actual == code
    assert {step: results[step] for step in expected} == expected


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DEVICE": "", "WARNS": "UserWarning: Failed to initialize NumPy"}, "no CUDA device"),
        ({"DEVICE": "", "TORCH": "1", "WARNS": "No module named 'torch'"}, "no torch that imports"),
    ],
    ids=str,
)
def test_what_torch_warns_of_is_not_why_there_is_no_device(path, tmp_path, variables, reason):
    code, results = run(path, tmp_path / "out", **variables)
    assert (code, results) == (0, dict.fromkeys(STEPS, f"not run: {reason}"))
    assert variables["WARNS"] in (tmp_path / "out" / "log.txt").read_text()


def test_tools_that_are_missing(path, tmp_path):
    log = tmp_path / "out" / "log.txt"
    (path / "compute-sanitizer").unlink()
    code, results = run(path, tmp_path / "out")
    assert (code, results["memcheck"], results["benchmark"]) == (0, "not run: no compute-sanitizer", "passed")

    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (path / "nvcc").rename(tmp_path / "cuda" / "bin" / "nvcc")
    code, results = run(path, tmp_path / "out", CUDA_HOME=str(tmp_path / "cuda"))
    assert (code, results["build"]) == (0, "passed, by pip")
    assert "CUDA ON" in log.read_text()

    code, results = run(path, tmp_path / "out")
    assert (code, results["build"]) == (0, "passed, by pip, without CUDA: no nvcc")
    assert (results["tests"], results["benchmark"]) == ("passed", "passed")
    assert "CUDA OFF" in log.read_text()

    (path / "g++").unlink()
    code, results = run(path, tmp_path / "out")
    assert (code, results["build"]) == (0, "not run: no g++")
    assert (results["tests"], results["benchmark"]) == ("passed", "passed")


@pytest.mark.slow
def test_a_test_that_hangs_fails_and_leaves_time_for_no_more(path, tmp_path):
    code, results = run(path, tmp_path / "out", HANGS="tests", BUDGET="10")
    assert code == 1
    assert results["tests"].startswith("failed: took over ")
    assert {results[step] for step in STEPS[2:]} == {"not run: no time left"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "result"),
    [
        (INVALID, 1, f"failed: {INVALID}"),
        ("=========     at a\n========= ERROR SUMMARY: 0 errors", 0, "not run: took over "),
    ],
)
def test_what_a_sanitizer_found_before_its_time_ran_out_counts(path, tmp_path, text, code, result):
    actual, results = run(path, tmp_path / "out", HANGS="racecheck", SANITIZED=text, BUDGET="218")
    assert (actual, results["racecheck"].startswith(result)) == (code, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "result"),
    [(f"wrong: {DIFFERS}", 1, f"failed: {DIFFERS}"), ("rows", 0, "not run: took over ")],
)
def test_what_was_measured_before_time_ran_out_counts(path, tmp_path, text, code, result):
    actual, results = run(path, tmp_path / "out", HANGS="benchmark", MEASURED=text, BUDGET="10")
    assert (actual, results["benchmark"].startswith(result)) == (code, True)


def test_a_process_that_outlives_a_step_is_not_waited_for(path, tmp_path):
    start = time.monotonic()
    code, _ = run(path, tmp_path / "out", OUTLIVED="1")
    assert (code, time.monotonic() - start < 45) == (0, True)


@pytest.mark.slow
def test_what_does_not_end_when_asked_is_killed(path, tmp_path):
    start = time.monotonic()
    code, results = run(path, tmp_path / "out", HANGS="benchmark", STUBBORN="1", BUDGET="10")
    assert (code, time.monotonic() - start < 45) == (0, True)
    assert results["benchmark"].startswith("not run: took over ")
