"""`fastkit.info` and the command line: what would run here, and why not the rest."""

import json

import pytest

from fastkit import _native, info
from fastkit.__main__ import main

pytestmark = pytest.mark.native


def test_available_answers_true_or_a_reason_for_every_implementation():
    answers = info.available("iir_scan")
    assert list(answers) == ["reference", "cpu", "cuda", "triton"]
    assert answers["reference"] is True
    assert answers["cpu"] is (True if _native.REASON is None else _native.REASON)
    missing = "triton is not installed", "no CUDA device", "no C compiler", "no Python.h"
    assert answers["triton"] is True or answers["triton"].startswith(missing)


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match=f"op must be one of {', '.join(info.STEMS)}, got 'fir_scan'"):
        info.available("fir_scan")


def test_report_is_plain_data_and_says_what_the_library_is():
    facts = info.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["library"]["loaded"] is (_native.REASON is None)
    if _native.REASON is None:
        assert facts["library"]["cpu_isa"] in facts["library"]["cpu_isas"]
        assert facts["library"]["torch_target"] == "2.10"


def test_info_command_prints_one_line_an_implementation(capsys):
    code = main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert code == (0 if _native.REASON is None else 1)
    assert lines[0].startswith("fastkit ")
    assert [line.split()[0] for line in lines[-4:]] == ["reference", "cpu", "cuda", "triton"]


def test_info_command_for_programs_exits_with_the_library_state(capsys):
    code = main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (0 if facts["library"]["loaded"] else 1)
    assert facts["ops"]["iir_scan"]["reference"] is True


def test_reason_of_a_missing_library_reaches_the_user(monkeypatch, capsys):
    monkeypatch.setattr(_native, "REASON", "the library is missing; rebuild it")
    assert info.available("iir_scan")["cpu"] == "the library is missing; rebuild it"
    assert main(["info"]) == 1
    assert "library: not used: the library is missing; rebuild it" in capsys.readouterr().out
