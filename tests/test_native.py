"""A library that is missing, foreign or stale costs speed and one warning, never an answer."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy.random.mtrand
import pytest
import torch

import fastkit
from fastkit import _native

pytestmark = pytest.mark.native

SCHEMA = b"m.def(...)"
REBUILD, BUILD_HERE = "; rebuild with `pip install", "; build it on this machine with `pip install"
REINSTALL = "; reinstall with `pip install"
linux = pytest.mark.skipif(sys.platform != "linux", reason="of files of Linux")


# A whole one of this platform, of which torch knows nothing.
SOME_LIBRARY = Path(numpy.random.mtrand.__file__)


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
        return shutil.copy(SOME_LIBRARY, tmp_path / "_C.so")

    return library


def facts_of(version=fastkit.__version__, schema=SCHEMA):
    return json.dumps({"version": version, "schema_sha256": hashlib.sha256(schema).hexdigest()})


def test_a_library_that_fits_is_used(library_that_says, schema):
    facts, reason = _native._load(library_that_says(facts_of()), schema)
    assert facts["version"] == fastkit.__version__
    assert reason is None


def test_missing(tmp_path, schema):
    path = tmp_path / "none.so"
    unbuilt = f"{path} is missing: this checkout has not been built; {_native.REBUILD}"
    assert _native._load(path, schema) == ({}, unbuilt)
    damaged = f"{path} is missing: this installation is damaged; {_native.REINSTALL}"
    assert _native._load(path, tmp_path / "none") == ({}, damaged)


@pytest.mark.parametrize("purelib", ["true", "false"])
def test_missing_from_a_pure_python_build(tmp_path, monkeypatch, schema, purelib):
    """As the wheel's own metadata tell, of the package that they are of."""
    info = tmp_path / f"fastkit-{fastkit.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastkit\nVersion: {fastkit.__version__}\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {purelib}\nTag: py3-none-any\n")
    monkeypatch.syspath_prepend(tmp_path)

    def reason(package, schema):
        return _native._load(package / "_C.so", schema)[1]

    installed, nowhere = tmp_path / "fastkit", tmp_path / "none"
    pure = f"this is a pure-Python build, without the library; {_native.BUILD_NATIVE}"
    assert (reason(installed, nowhere) == pure) is (purelib == "true")
    assert "FASTKIT_NATIVE=ON" in pure
    assert "this installation is damaged" in reason(tmp_path / "another" / "fastkit", nowhere)
    assert "this checkout has not been built" in reason(installed, schema)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_a_torch_that_is_too_old_is_told_before_loading(monkeypatch, library_that_says, schema, version):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    monkeypatch.setattr(torch, "__version__", version)
    reason = f"torch {version} is too old; upgrade torch with `pip install 'torch>=2.10'`"
    assert _native._load(SOME_LIBRARY, schema) == ({}, reason)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.0+cpu", "3.0"])
def test_a_torch_that_is_new_enough(monkeypatch, library_that_says, schema, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert _native._load(library_that_says(facts_of()), schema)[1] is None


OTHER_PROCESSOR = 243  # RISC-V


def another_processor(content):
    return content[:18] + OTHER_PROCESSOR.to_bytes(2, sys.byteorder) + content[20:]


@linux
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_processor, r"RISC-V of 64 bits, this is \S+ of 64 bits"),
        (lambda content: content[:4] + b"\x01" + content[5:], r".* of 32 bits, this is \S+ of 64 bits"),
        (lambda content: another_processor(content)[:20], r"RISC-V of 64 bits, this is \S+ of 64 bits"),
        (lambda content: b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01", "macOS"),
        (lambda content: b"MZ\x90\x00", "Windows"),
    ],
    ids=["processor", "bits", "processor, cut off", "macOS", "Windows"],
)
def test_built_for_another_platform(tmp_path, schema, change, what):
    path = tmp_path / "_C.so"
    path.write_bytes(change(SOME_LIBRARY.read_bytes()))
    for checkout, cure in ((schema, REBUILD), (tmp_path / "none", BUILD_HERE)):
        facts, reason = _native._load(path, checkout)
        assert facts == {}
        words = re.escape(f"{path} was built for another platform (") + what + re.escape(f"){cure}")
        assert re.match(words, reason), reason


@linux
@pytest.mark.parametrize("kept", [0, 19, 63, 64, 200, 4096, 0.25, 0.5])
def test_cut_off(tmp_path, schema, kept):
    """To load what breaks off in what the loader maps would end the process."""
    content = SOME_LIBRARY.read_bytes()
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    path = tmp_path / "_C.so"
    path.write_bytes(content[:kept])
    facts, reason = _native._load(path, tmp_path / "none")
    assert facts == {}
    count = len(path.read_bytes())
    what = "it is not a library" if count < 20 else f"it ends after {count} of "
    assert reason.startswith(f"{path} is damaged: {what}")
    assert reason.endswith(f"; {_native.REINSTALL}")
    assert _native._load(path, schema)[1].endswith(f"; {_native.REBUILD}")
    path.write_bytes(content)
    assert _native._damaged(path) is None


@linux
def test_text_in_its_place(tmp_path, schema):
    path = tmp_path / "_C.so"
    path.write_text("version https://example.org/a/pointer/to/a/large/file")
    assert _native._load(path, schema) == ({}, f"{path} is damaged: it is not a library; {_native.REBUILD}")


@linux
def test_for_a_newer_system(tmp_path, schema):
    """A copy that asks for a C library that is yet to come: the loader's own words."""
    content = SOME_LIBRARY.read_bytes()
    [version] = set(re.findall(rb"\0(GLIBC_2\.\d\d)(?=\0)", content)[:1])
    path = tmp_path / "_C.so"
    path.write_bytes(content.replace(b"\0" + version + b"\0", b"\0GLIBC_9.99\0"))
    reason = f"{path} needs GLIBC 9.99, and this system has an older one; "
    assert _native._load(path, schema) == ({}, reason + _native.REBUILD)
    assert _native._load(path, tmp_path / "none") == ({}, reason + _native.BUILD_HERE)


@linux
def test_for_a_torch_that_has_more(tmp_path, schema):
    """A copy of the library that asks for what no torch has."""
    if _native.REASON is not None:
        pytest.skip(_native.REASON)
    content = _native.LIBRARY.read_bytes()
    symbol = b"\0aoti_torch_get_sizes\0"
    assert symbol in content
    path = tmp_path / "_C.so"
    path.write_bytes(content.replace(symbol, b"\0aoti_torch_get_seven\0"))
    reason = f"{path} needs aoti_torch_get_seven, which torch {torch.__version__} does not have; "
    assert _native._load(path, schema) == ({}, reason + _native.REBUILD)
    assert _native._load(path, tmp_path / "none") == ({}, reason + _native.BUILD_HERE)


def test_what_the_loader_says_else_is_quoted(tmp_path, monkeypatch, schema):
    def load(path):
        raise OSError("Could not load this library") from OSError("libm.so.9: cannot open\nand more")

    monkeypatch.setattr(torch.ops, "load_library", load)
    reason = f"{SOME_LIBRARY} could not be loaded (OSError: libm.so.9: cannot open); "
    assert _native._load(SOME_LIBRARY, schema) == ({}, reason + _native.REBUILD)
    assert _native._load(SOME_LIBRARY, tmp_path / "none") == ({}, reason + _native.BUILD_HERE)


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
    reason, cure = f"{library} is missing: this installation is damaged", REINSTALL
    if what == "text":
        library.write_text("not a library")
        reason = f"{library} is damaged: it is not a library"
    elif what == "foreign":
        shutil.copy(SOME_LIBRARY, library)
        reason, cure = f"{library} could not be loaded (AttributeError: ", BUILD_HERE
    elif what == "stale":
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
