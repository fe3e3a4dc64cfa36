"""A library that is missing, foreign or stale costs speed and one warning, never an answer."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy.random.mtrand
import pytest
import torch

import fastkit
from fastkit import _native

pytestmark = pytest.mark.native

SCHEMA = b"m.def(...)"
REBUILD, REINSTALL = "; rebuild with `pip install", "; reinstall with `pip install"


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.cpp"
    path.write_bytes(SCHEMA)
    return path


@pytest.fixture
def library_that_says(tmp_path, monkeypatch):
    """A library that loads, and of itself says what the test wants."""

    def library(facts):
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        monkeypatch.setattr(torch.ops.fastkit, "build_info", lambda: facts, raising=False)
        path = tmp_path / "_C.so"
        path.touch()
        return path

    return library


def facts_of(version=fastkit.__version__, schema=SCHEMA):
    return json.dumps({"version": version, "schema_sha256": hashlib.sha256(schema).hexdigest()})


def test_a_library_that_fits_is_used(library_that_says, schema):
    facts, reason = _native._load(library_that_says(facts_of()), schema)
    assert facts["version"] == fastkit.__version__
    assert reason is None


def test_missing(tmp_path, schema):
    path = tmp_path / "none.so"
    assert _native._load(path, schema) == ({}, f"{path} is missing; {_native.REBUILD}")
    assert _native._load(path, tmp_path / "none") == ({}, f"{path} is missing; {_native.REINSTALL}")


def test_not_a_library(tmp_path, schema):
    path = tmp_path / "text.so"
    path.write_text("not a library")
    facts, reason = _native._load(path, schema)
    assert facts == {}
    assert reason.startswith(f"{path} could not be loaded (")
    assert reason.endswith(f"); {_native.REBUILD}")


def test_built_from_another_schema(library_that_says, schema):
    """In a checkout the schema decides, so that a new version needs no new build."""
    facts, reason = _native._load(library_that_says(facts_of(schema=b"older")), schema)
    assert facts == {}
    assert "is stale: it was built from another csrc/schema.cpp; rebuild with `pip install" in reason
    assert _native._load(library_that_says(facts_of(version="0.0.9")), schema)[1] is None


def test_built_for_another_version(library_that_says, tmp_path):
    """Elsewhere the version does; there is no schema to compare with."""
    facts, reason = _native._load(library_that_says(facts_of(version="0.0.9")), tmp_path / "none")
    assert facts == {}
    assert f"is stale: built for 0.0.9, the package is {fastkit.__version__}; reinstall" in reason
    other_schema = library_that_says(facts_of(schema=b"older"))
    assert _native._load(other_schema, tmp_path / "none")[1] is None


@pytest.mark.parametrize("facts", ["", "{}", '{"version": "0.1.0"}'])
def test_a_library_that_does_not_say_what_it_is(library_that_says, schema, facts):
    facts, reason = _native._load(library_that_says(facts), schema)
    assert facts == {}
    assert REBUILD in reason


def test_an_instruction_set_that_does_not_exist_is_the_reason_not_the_build(run_script):
    script = "import json; from fastkit import _native; print(json.dumps(_native.REASON))"
    if _native.REASON is not None:
        pytest.skip(_native.REASON)
    assert json.loads(run_script(script, FASTKIT_CPU_ISA="neon").stdout) == (
        "FASTKIT_CPU_ISA must be baseline, avx2 or avx512; unset it for the best that the CPU has"
    )


def package_copy(folder):
    """The package without its library, under ``folder``; the path at which it looks for one."""
    package = Path(fastkit.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    return shutil.copytree(package, folder / "python" / "fastkit", ignore=ignored) / "_C.so"


CALLS = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastkit import _native
    from fastkit.ops import iir_scan
    x, a = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[[-0.5, 0.0]]]])
    results = [iir_scan(x, a).tolist() for _ in range(3)]
try:
    refusal = iir_scan(x, a, impl="cpu")
except RuntimeError as error:
    refusal = str(error)
warned = [(str(w.message), w.category.__name__, w.filename) for w in caught]
print(json.dumps([str(_native.LIBRARY), results, warned, refusal]))
"""


@pytest.mark.parametrize("what", ["missing", "text", "foreign", "stale"])
def test_the_first_call_warns_and_every_call_is_right(run_script, tmp_path, what):
    library = package_copy(tmp_path)
    reason, cure = f"{library} could not be loaded (", REINSTALL
    if what == "missing":
        reason = f"{library} is missing"
    elif what == "text":
        library.write_text("not a library")
    elif what == "foreign":
        shutil.copy(numpy.random.mtrand.__file__, library)
    else:
        if _native.REASON is not None:
            pytest.skip(_native.REASON)
        shutil.copy(_native.LIBRARY, library)
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "schema.cpp").write_text("newer")
        reason, cure = f"{library} is stale: it was built from another csrc/schema.cpp", REBUILD

    done = run_script(CALLS, PYTHONPATH=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    path, results, warned, refusal = json.loads(done.stdout)
    assert path == str(library)
    assert results == 3 * [[[[1.0, 0.5, 0.25]]]]
    [(message, category, filename)] = warned
    because = f'impl="cpu" cannot run: {reason}'
    assert message.startswith(f"fastkit runs its slow reference implementations: {because}")
    assert cure in message
    assert category == "RuntimeWarning"
    assert filename == "<string>"  # the caller's line, not the package's
    assert refusal.startswith(f"iir_scan: {because}")
    assert refusal.endswith('; use impl="reference"')


COMPILED_CALL = """
import json, warnings, torch
from fastkit.ops import iir_scan
x, a = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[[-0.5, 0.0]]]])
compiled = torch.compile(lambda x, a: iir_scan(x, a), backend="aot_eager", fullgraph=True)
with warnings.catch_warnings():
    warnings.filterwarnings("error", message="fastkit")
    result = compiled(x, a).tolist()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    iir_scan(x, a)
print(json.dumps([result, len(caught)]))
"""


def test_a_compiled_call_is_right_and_leaves_the_warning_to_the_next(run_script, tmp_path):
    package_copy(tmp_path)
    done = run_script(COMPILED_CALL, PYTHONPATH=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[[1.0, 0.5, 0.25]]], 1]
