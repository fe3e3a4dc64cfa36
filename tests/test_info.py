"""`fastkit.info` and the command line: what would run here, why not the rest, and what to do next."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkit
from fastkit import _dispatch, _native, info
from fastkit.__main__ import RECIPES, main

pytestmark = pytest.mark.native

IMPLS = ["reference", "cpu", "cuda", "triton"]


def test_available_answers_true_or_a_reason_for_every_implementation():
    answers = info.available("iir_scan")
    assert list(answers) == IMPLS
    assert answers["reference"] is True
    assert answers["cpu"] is (True if _native.REASON is None else _native.REASON)
    missing = "triton is not installed", "no CUDA device", "no C compiler", "no Python.h"
    missing += "torch was built without CUDA", "the driver is too old"
    assert answers["triton"] is True or answers["triton"].startswith(missing)


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match=f"op must be one of {', '.join(info.STEMS)}, got 'fir_scan'"):
        info.available("fir_scan")


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: out of memory\nand many lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    monkeypatch.setattr(info, "_lacking_on_gpu", lambda _: None)
    report = info.report()
    assert not report["ok"] and report["next"] == "look at nvidia-smi"
    assert report["cuda_device"] is None


KEYS = ["ok", "next", "fastkit", "python", "torch", "triton", "threads", "cuda_device", "library", "ops"]
BUILD_KEYS = ["version", "schema_sha256", "compiler", "torch_target", "cuda", "cuda_archs", "cuda_driver"]
BUILD_KEYS += ["cpu_isas", "cpu_isa", "refusal"]


def test_report_is_plain_data_and_says_what_the_library_is():
    facts = info.report()
    assert json.loads(json.dumps(facts)) == facts
    assert sorted(facts) == sorted(KEYS)
    assert facts["torch"] == torch.__version__
    assert list(facts["ops"]) == list(info.STEMS)
    assert all(list(answers) == IMPLS for answers in facts["ops"].values())
    library = facts["library"]
    assert library["loaded"] is (_native.REASON is None)
    if _native.REASON is None:
        assert sorted(library) == sorted(["file", "loaded", *BUILD_KEYS])
        assert library["cpu_isa"] in library["cpu_isas"]
        assert library["torch_target"] == "2.10"
        assert library["cuda_driver"] == "" or library["cuda"] is not None
    else:
        assert library == {"file": str(_native.LIBRARY), "loaded": False, "reason": _native.REASON}


def test_every_key_of_the_report_is_documented():
    documented = info.report.__doc__
    assert all(key in documented for key in [*KEYS, "file", "loaded", "reason", *BUILD_KEYS])


def test_info_command_prints_a_line_for_each_op_and_each_reason_once(capsys):
    code = main(["info"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("fastkit ")
    if code == 0:
        assert _native.REASON is None
    else:
        assert lines.pop().startswith("next: ")
    head = next(i for i, line in enumerate(lines) if line.split() == IMPLS)
    rows = [line.split() for line in lines[head + 1 :]]
    reasons = {number: " ".join(reason) for number, *reason in rows[len(info.STEMS) :]}
    assert len(set(reasons.values())) == len(reasons)
    for stem, *cells in rows[: len(info.STEMS)]:
        answers = [cell == "yes" or reasons[cell] for cell in cells]
        assert dict(zip(IMPLS, answers, strict=True)) == info.available(stem)


def test_info_command_for_programs_has_the_exit_code(capsys):
    code = main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (0 if facts["ok"] else 1)
    assert facts["ok"] is (facts["next"] is None)
    assert facts["ok"] <= facts["library"]["loaded"]
    assert facts["ops"]["iir_scan"]["reference"] is True


def test_a_command_that_names_none_of_its_own_prints_what_there_is(capsys):
    assert main([]) == 2
    assert re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE) == [
        "info",
        "demo",
        "bench",
        "run",
    ]
    assert main(["run"]) == 2
    assert re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE) == [*RECIPES]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastkit {fastkit.__version__}\n"


def test_a_reader_that_has_gone_is_no_traceback(run_script):
    """As of `info | head`."""
    script = """if True:
        import os, sys
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w")
        from fastkit.__main__ import main
        raise SystemExit(main(["info"]))
        """
    done = run_script(script)
    assert (done.returncode, done.stderr) == (141, "")


# --- the library is not used ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("the library is missing (a; b); rebuild it", "rebuild it"),
        ("FASTKIT_CPU_ISA must be avx2; unset it for the best", "unset FASTKIT_CPU_ISA for the best"),
        ("no such thing as FASTKIT_CPU_ISA names; unset it", "unset FASTKIT_CPU_ISA"),
    ],
)
def test_reason_of_a_library_that_is_not_used_reaches_the_user(monkeypatch, capsys, reason, cure):
    monkeypatch.setattr(_native, "REASON", reason)
    assert info.available("iir_scan")["cpu"] == reason
    assert main(["info"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"library: not used: {reason}" in lines
    assert lines[-1] == f"next: {cure}"


# --- torch cannot be used -------------------------------------------------------------------------

NOT_INSTALLED = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
WITHOUT_CUDNN = "raise ImportError('libcudnn.so.9: cannot open shared object file\\nmore')"
WITHOUT_A_MODULE = "raise ModuleNotFoundError(\"No module named 'filelock'\", name='filelock')"
WITHOUT_TORCH = {
    NOT_INSTALLED: "torch is not installed; ",
    WITHOUT_CUDNN: "torch cannot be imported (ImportError: libcudnn.so.9: cannot open shared object file); ",
    WITHOUT_A_MODULE: "torch cannot be imported (ModuleNotFoundError: No module named 'filelock'); ",
    "pass": "torch cannot be imported (AttributeError: module 'torch' has no attribute '__version__'); ",
}


@pytest.mark.parametrize("source", WITHOUT_TORCH, ids=["none", "broken", "lacks a module", "empty"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_info_answers_without_torch(tmp_path, source, options):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), str(Path(fastkit.__file__).parents[1])])
    command = [sys.executable, "-m", "fastkit", "info", *options]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    reason = WITHOUT_TORCH[source]
    if options:
        facts = json.loads(done.stdout)
        assert sorted(facts) == sorted(KEYS)
        assert (facts["ok"], facts["torch"], facts["ops"]) == (False, None, {})
        assert facts["library"]["reason"].startswith(reason)
        assert facts["library"]["reason"].endswith(f"; {facts['next']}")
        assert "torch>=2.10" in facts["next"]
    else:
        lines = done.stdout.splitlines()
        assert f"library: not used: {reason}" in done.stdout
        assert lines[-1].startswith("next: ") and "torch>=2.10" in lines[-1]


def test_info_answers_with_a_torch_that_is_too_old(run_script):
    """It may lack anything that the ops call: they are not imported."""
    script = """if True:
        import sys, torch
        torch.__version__ = "2.9.1"
        sys.modules["fastkit.ops"] = None
        from fastkit.__main__ import main
        raise SystemExit(main(["info", "--json"]))
        """
    done = run_script(script)
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert sorted(facts) == sorted(KEYS)
    assert (facts["ok"], facts["torch"], facts["ops"]) == (False, "2.9.1", {})
    cure = "upgrade torch with `pip install 'torch>=2.10'`"
    assert (facts["library"]["reason"], facts["next"]) == (f"torch 2.9.1 is too old; {cure}", cure)


# --- a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A machine as a library that is used, torch, its driver and Triton see it."""

    def gpu(*, library="13.0", torch_cuda="13.0", driver="13.1", device=True, triton=True, tool=None):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(_native, "REASON", None)
        facts = dict.fromkeys(BUILD_KEYS, "") | _native.BUILD_INFO | {"cuda": library}
        monkeypatch.setattr(_native, "BUILD_INFO", facts)
        monkeypatch.setattr(_dispatch, "_ask_driver", lambda: driver if library else "")
        monkeypatch.setattr(_dispatch, "_HAS_TRITON", triton)
        monkeypatch.setattr(_dispatch, "_search_build_tools", lambda: tool)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")

    return gpu


NO_TRITON = "triton is not installed; pip install 'fastkit[triton]'"
CPU_TORCH = "torch was built without CUDA, and there is an NVIDIA driver; install a CUDA build of torch"
HIDDEN = "no CUDA device, though there is an NVIDIA driver; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
UPDATE = "update the NVIDIA driver"
OLD_FOR_US = f"the driver is too old: it runs CUDA 12.8, the library has 13.0; {UPDATE}"
OLD_FOR_TORCH = f"the driver is too old: it runs CUDA 11.4, torch has 12.6; {UPDATE}"
NO_CUDA = f"the library was built without CUDA; {_native.BUILD_CUDA}"
NO_COMPILER = "no C compiler (set CC)"

# The machine; of iir_scan, which has kernels in CUDA and in Triton, what either answers; what to do next.
MACHINES = {
    "all is well": ({}, True, True, None),
    "an older minor version of the driver": ({"driver": "13.0", "library": "13.2"}, True, True, None),
    "a newer driver": ({"driver": "14.0"}, True, True, None),
    "no driver": (
        {"driver": "", "device": False},
        "no CUDA device: there is no NVIDIA driver",
        "no CUDA device",
        None,
    ),
    "no driver, nor Triton": (
        {"driver": "", "device": False, "triton": False},
        "no CUDA device: there is no NVIDIA driver",
        NO_TRITON,
        None,
    ),
    "a driver too old for the library": (
        {"driver": "12.8", "torch_cuda": "12.6"},
        OLD_FOR_US,
        True,
        UPDATE,
    ),
    "a driver too old for torch": (
        {"driver": "11.4", "torch_cuda": "12.6", "device": False},
        OLD_FOR_TORCH,
        OLD_FOR_TORCH,
        UPDATE,
    ),
    "a torch without CUDA": (
        {"torch_cuda": None, "device": False},
        CPU_TORCH,
        CPU_TORCH,
        "install a CUDA build of torch",
    ),
    "a driver without a device": (
        {"device": False},
        HIDDEN,
        HIDDEN,
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    "a library without CUDA": ({"library": None}, NO_CUDA, True, _native.BUILD_CUDA),
    "a library without CUDA, and no device": (
        {"library": None, "device": False},
        NO_CUDA,
        "no CUDA device",
        None,
    ),
    "no Triton": ({"triton": False}, True, NO_TRITON, "pip install 'fastkit[triton]'"),
    "no compiler": (
        {"tool": NO_COMPILER},
        True,
        NO_COMPILER,
        f"give Triton what it needs: {NO_COMPILER}",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_of_a_gpu_it_says_what_runs_why_not_the_rest_and_what_to_do(gpu, capsys, name):
    machine, cuda, triton, cure = MACHINES[name]
    gpu(**machine)
    code = main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    answers = facts["ops"]["iir_scan"]
    assert (answers["cuda"], answers["triton"]) == (cuda, triton)
    assert (facts["ok"], facts["next"]) == (cure is None, cure)
    assert code == (0 if cure is None else 1)
    text = info.describe(facts)
    assert (text.splitlines()[-1] == f"next: {cure}") is (cure is not None)


def test_a_gpu_that_the_user_hides_is_none_to_mend(gpu, monkeypatch):
    gpu(device=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = info.report()
    assert facts["ops"]["iir_scan"]["cuda"] == HIDDEN
    assert (facts["ok"], facts["next"]) == (True, None)


def test_the_driver_is_asked_of_the_library_once(monkeypatch):
    """Without a driver that answers with nothing, in a build with CUDA and in one without."""
    if _native.REASON is not None:
        pytest.skip(_native.REASON)
    asked = torch.ops.fastkit.cuda_driver_version()
    assert isinstance(asked, str)
    assert _dispatch.cuda_driver() == asked
    if torch.version.cuda is not None and torch.cuda.is_available() and _native.BUILD_INFO["cuda"]:
        assert int(asked.split(".")[0]) >= int(torch.version.cuda.split(".")[0])
    _dispatch._ask_driver.cache_clear()
    monkeypatch.setattr(torch.ops.fastkit, "cuda_driver_version", lambda: pytest.fail("asked"))
    monkeypatch.setattr(_native, "BUILD_INFO", {})
    assert _dispatch.cuda_driver() == ""
    _dispatch._ask_driver.cache_clear()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
def test_the_driver_can_be_asked_while_compiling():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + len(_dispatch.cuda_driver()), backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == len(_dispatch.cuda_driver())
