"""The audit of a wheel, .ci/audit_wheel.py: it accepts what is sound and says what is not."""

import importlib.util
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs pyelftools, which reads the library")
pytest.importorskip("packaging", reason="needs packaging, which reads names of wheels")

from library_faults import compile_, torch_root

AUDIT = Path(__file__).parents[1] / ".ci" / "audit_wheel.py"
MACHINE = platform.machine()
TAG = f"py3-none-manylinux_2_34_{MACHINE}"
NAME = f"fastkit-1.0-{TAG}.whl"
INFO = "fastkit-1.0.dist-info"

pytestmark = pytest.mark.skipif(
    not AUDIT.is_file() or sys.platform != "linux" or not shutil.which("c++"),
    reason="needs a checkout, Linux and a C++ compiler",
)


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit_wheel", AUDIT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Makes a small library that needs what the real one needs."""

    def library(*link, source=""):
        file = tmp_path_factory.mktemp("library") / "_C.so"
        text = f'extern "C" int aoti_torch_get_dim(void*, long*);{source}\n'
        text += "int dim(void* t) { return aoti_torch_get_dim(t, new long); }"
        options = "-O1", "-s", "-shared", "-fPIC", "-fvisibility=hidden", "-xc++", "-", "-xnone", "-o", file
        compile_(*options, "-Wl,--no-as-needed", f"-L{torch_root() / 'lib'}", "-ltorch", *link, source=text)
        return file.read_bytes()

    return library


@pytest.fixture(scope="module")
def sound(library):
    """The files of a wheel that has no fault."""
    metadata = "Metadata-Version: 2.4\nName: fastkit\nVersion: 1.0\nLicense-Expression: Apache-2.0\n"
    return {
        "fastkit/__init__.py": "",
        "fastkit/ops/__init__.py": "",
        "fastkit/py.typed": "",
        "fastkit/_C.so": library(),
        f"{INFO}/METADATA": metadata + 'Requires-Dist: torch>=2.10\nRequires-Dist: x; extra == "y"\n',
        f"{INFO}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {TAG}\n",
        f"{INFO}/licenses/LICENSE": "Apache",
    }


@pytest.fixture
def faults(audit, sound, tmp_path):
    """The audit, less auditwheel's part, of the sound wheel with changes: None leaves a file out."""

    def faults(changes=(), name=NAME, max_mb=5.0):
        files = {file: text for file, text in {**sound, **dict(changes)}.items() if text is not None}
        files[f"{INFO}/RECORD"] = "".join(f"{file},,\n" for file in files)
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for file, text in files.items():
                wheel.writestr(file, text)
        path = tmp_path / name
        _, library = audit.library_facts(path)
        return audit.name_faults(path, "manylinux_2_34") + audit.content_faults(path, max_mb) + library

    return faults


def test_a_sound_wheel_is_accepted(faults):
    assert faults() == []


METADATA = {
    "torch>=2.10": ("METADATA", "torch>=2.10", 'torch>=2.10; extra == "gpu"', "do not require torch>=2.10"),
    "a floor of torch that is not tested": ("METADATA", "torch>=2.10", "torch>=2.9", "do not require torch"),
    "license": ("METADATA", "Apache-2.0", "MIT", "have the license MIT, not Apache-2.0"),
    "version": ("METADATA", "Version: 1.0", "Version: 1.1", "say Version: 1.1, its file name 1.0"),
    "purelib": ("WHEEL", "false", "true", "say Root-Is-Purelib: true"),
    "tag": ("WHEEL", "2_34", "2_28", "have the tags py3-none-manylinux_2_28"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_are_not_as_they_must_be(faults, sound, case):
    file, old, new, expected = METADATA[case]
    path = f"{INFO}/{file}"
    (fault,) = faults({path: sound[path].replace(old, new, 1)})
    assert fault.startswith("its metadata ") and expected in fault


FILES = {
    "a library more": ({"fastkit/_other.so": "x"}, "it holds fastkit/_other.so, which does not belong in it"),
    "a vendored library": ({"fastkit.libs/libgomp.so.1": "x"}, "it holds fastkit.libs/libgomp.so.1"),
    "the module of tests": ({"fastkit/_host.cpython-311.so": "x"}, "it holds fastkit/_host"),
    "tests": ({"tests/test_a.py": ""}, "it holds tests/test_a.py"),
    "a source": ({"fastkit/csrc/a.cu": ""}, "it holds fastkit/csrc/a.cu"),
    "no library": ({"fastkit/_C.so": None}, "it has no fastkit/_C.so"),
    "no license": ({f"{INFO}/licenses/LICENSE": None}, "it has no license"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_belong_or_are_not_there(faults, case):
    changes, expected = FILES[case]
    (fault,) = faults(changes)
    assert fault.startswith(expected)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("py3-none-any", "its tag is py3-none-any, not py3-none-<platform>"),
        (f"cp311-cp311-manylinux_2_34_{MACHINE}", "not py3-none-<platform>"),
        (f"py3-none-linux_{MACHINE}", "auditwheel repair gives it one"),
        (f"py3-none-manylinux_2_39_{MACHINE}", "and manylinux_2_34 is the newest allowed"),
    ],
)
def test_names_with_a_tag_that_is_not_allowed(faults, sound, tag, expected):
    stated = {f"{INFO}/WHEEL": sound[f"{INFO}/WHEEL"].replace(TAG, tag)}
    (fault,) = faults(stated, name=f"fastkit-1.0-{tag}.whl")
    assert expected in fault


def test_a_name_that_was_tampered_with(faults):
    name = f"fastkit-1.0-py3-none-manylinux_2_28_{MACHINE}.whl"
    (fault,) = faults(name=name)
    assert re.search(r"have the tags .*2_34.*, its file name .*2_28", fault)
    assert any("is no name of a wheel" in fault for fault in faults(name="fastkit-1.0.whl"))


def test_a_wheel_that_is_too_large(faults):
    (fault,) = faults(max_mb=1e-3)
    assert re.fullmatch(r"it has [\d.]+ MB, and 0.001 MB are allowed", fault)


def test_faults_of_the_library(faults, library):
    (fault,) = faults({"fastkit/_C.so": library("-Wl,--enable-new-dtags,-rpath,/nowhere")})
    assert fault == "fastkit/_C.so has a DT_RUNPATH"
    source = "namespace c10 { void throw_(); } void use() { c10::throw_(); }"
    (fault,) = faults({"fastkit/_C.so": library(source=source)})
    assert fault.startswith("fastkit/_C.so needs _ZN3c106throw_Ev")


SHOWN = {
    "sym_tag": f"manylinux_2_34_{MACHINE}",
    "unsupported_isa": False,
    "external_libs": {"libtorch.so": None},
}
AUDITWHEEL = {
    "sound": ({}, []),
    "vendors": (
        {"external_libs": {"libfoo.so.1": "/usr/lib/libfoo.so.1"}},
        ["would put libfoo.so.1 into it"],
    ),
    "new": (
        {"sym_tag": f"manylinux_2_39_{MACHINE}"},
        ["and manylinux_2_34 is the newest allowed", "newer than its name says"],
    ),
    "none": ({"sym_tag": f"linux_{MACHINE}"}, ["its symbols are those of linux"]),
    "cpu": ({"unsupported_isa": True}, ["a CPU newer than its tag says"]),
    "unread": ({"error": "no ELF"}, ["auditwheel cannot read it: no ELF"]),
}


@pytest.mark.parametrize("case", AUDITWHEEL)
def test_what_auditwheel_says_is_judged(audit, case):
    changes, expected = AUDITWHEEL[case]
    found = audit.auditwheel_faults({**SHOWN, **changes}, Path(NAME), "manylinux_2_34")
    assert len(found) == len(expected)
    assert all(part in fault for fault, part in zip(found, expected, strict=True))


def test_symbols_newer_than_the_name_says(audit):
    name = Path(f"fastkit-1.0-py3-none-manylinux_2_28_{MACHINE}.whl")
    (fault,) = audit.auditwheel_faults(SHOWN, name, "manylinux_2_34")
    assert fault == f"its symbols are those of manylinux_2_34_{MACHINE}, newer than its name says"


@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="needs auditwheel")
def test_the_script_prints_and_returns_what_it_found(audit, faults, tmp_path, capsys):
    faults({"fastkit/_other.so": "x"})
    assert audit.main([str(tmp_path / NAME)]) == 1
    printed = capsys.readouterr().out
    assert "fault: it holds fastkit/_other.so" in printed and printed.endswith("1 faults\n")
