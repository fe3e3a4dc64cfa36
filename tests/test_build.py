"""The build: what it refuses, in words, what it packs, and that it can be repeated."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
NO_CACHE = [
    "--no-cache-dir"
]  # pip would give the wheel of an sdist again, whatever the variables are by then

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file() or not shutil.which("cmake") or not shutil.which("ninja"),
    reason="needs a checkout, cmake and ninja",
)


def configure(folder, *defines, **environment):
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *defines]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_configure_without_torch_names_the_option(tmp_path):
    done = configure(tmp_path, "-DFASTKIT_TORCH_ROOT=/nowhere")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "FASTKIT_TORCH_ROOT must be the folder of a torch >= 2.10, got '/nowhere'" in message


@pytest.mark.parametrize("wanted", ["ON", "AUTO"])
def test_only_cuda_on_insists_on_nvcc(tmp_path, wanted):
    defines = f"-DFASTKIT_TORCH_ROOT={TORCH}", f"-DFASTKIT_CUDA={wanted}"
    done = configure(tmp_path, *defines, CUDACXX="/nowhere/nvcc")
    message = " ".join(done.stderr.split())
    assert (done.returncode == 0) == (wanted == "AUTO"), message
    assert ("FASTKIT_CUDA=ON needs nvcc" in message) == (wanted == "ON")


@pytest.fixture
def backend(monkeypatch):
    """build_backend.py, fresh, on a Linux machine with a compiler and nothing set."""
    pytest.importorskip("setuptools", reason="needs setuptools, which the build backend extends")
    for name in ("CC", "CXX", "FASTKIT_NATIVE", "FASTKIT_HOST_TESTS", "FASTKIT_TORCH_ROOT"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sysconfig, "get_platform", lambda: "linux-x86_64")
    return module


NATIVE = {
    "compiler": ({}, None),
    "auto": ({"FASTKIT_NATIVE": "AUTO"}, None),
    "on": ({"FASTKIT_NATIVE": "ON"}, None),
    "off": ({"FASTKIT_NATIVE": "OFF"}, "FASTKIT_NATIVE=OFF"),
    "CC": ({"CC": "false"}, "CC=false compiles no C program"),
    "CXX": ({"CXX": "false -O2"}, "CXX=false -O2 compiles no C++ program"),
    "no CXX": ({"CXX": "/nowhere/c++"}, "CXX=/nowhere/c++ compiles no C++ program"),
    "no compiler": ({"PATH": ""}, "none of c++, g++ and clang++ is on PATH"),
}


@pytest.mark.parametrize("case", NATIVE)
def test_the_library_is_left_out_where_it_is_not_wanted_or_no_compiler_works(backend, monkeypatch, case):
    variables, expected = NATIVE[case]
    if expected is None and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert backend.why_pure() == expected


def test_a_compiler_that_is_there_and_does_not_work_is_none(backend, monkeypatch, tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("false"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.why_pure() == "c++ compiles no C++ program"


def test_other_systems_have_the_library_only_if_asked(backend, monkeypatch):
    monkeypatch.setattr(backend.sysconfig, "get_platform", lambda: "macosx-14.0-arm64")
    reason = "on macosx-14.0-arm64 the native library is built with FASTKIT_NATIVE=ON alone"
    assert backend.why_pure() == reason


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FASTKIT_NATIVE": "off"}, "FASTKIT_NATIVE must be AUTO, ON or OFF, got 'off'"),
        ({"FASTKIT_NATIVE": ""}, "FASTKIT_NATIVE must be AUTO, ON or OFF, got ''"),
        ({"FASTKIT_NATIVE": "ON", "CC": "false"}, "FASTKIT_NATIVE=ON needs a C++ compiler, and CC=false"),
    ],
)
def test_what_fastkit_native_refuses(backend, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"^fastkit: ") as refusal:
        backend.why_pure()
    assert expected in str(refusal.value)


def test_a_build_asks_for_what_is_not_there_and_no_more(backend, monkeypatch):
    monkeypatch.setattr(backend, "why_pure", lambda: None)
    monkeypatch.setenv("FASTKIT_HOST_TESTS", "0")
    assert backend.build_requirements(editable=False) == []  # torch, cmake and ninja are here
    monkeypatch.setenv("PATH", "")
    assert backend.build_requirements(editable=False) == ["ninja", "cmake>=3.22"]
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    torch_, *_ = backend.build_requirements(editable=False)
    assert torch_ == backend.pinned("torch")
    monkeypatch.setattr(backend, "why_pure", lambda: "FASTKIT_NATIVE=OFF")
    assert backend.build_requirements(editable=True) == []


@pytest.mark.parametrize("hook", ["sdist", "wheel", "editable"])
def test_only_editable_builds_ask_for_pybind11_and_an_sdist_for_nothing(backend, monkeypatch, hook):
    monkeypatch.setattr(backend, "why_pure", lambda: None)
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "wants_host_tests", lambda editable: editable)
    for name in ("sdist", "wheel", "editable"):
        monkeypatch.setattr(backend.build_meta, f"get_requires_for_build_{name}", lambda _: [])
    asked = getattr(backend, f"get_requires_for_build_{hook}")()
    assert ("pybind11>=2.13" in asked) == (hook == "editable")
    assert (backend.pinned("torch") in asked) == (hook != "sdist")


def copy(folder):
    ignored = shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=ignored)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, never built."""
    return copy(tmp_path_factory.mktemp("copy") / "tree")


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The build backend's only requirement, in a folder."""
    folder = tmp_path_factory.mktemp("setuptools")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "setuptools>=77"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def run_hook(tree, tools, tmp_path_factory):
    """Calls a hook of the build backend: (the file that it makes, what it prints)."""

    def run_hook(name, **environment):
        out = tmp_path_factory.mktemp(name)
        script = f"import build_backend; build_backend.build_{name}({str(out)!r})"
        path = f"{tree}{os.pathsep}{tools}"
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **environment}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = out.iterdir()
        return file, done.stdout

    return run_hook


@pytest.fixture(scope="module")
def sdist(run_hook):
    """Made where there is neither a torch nor a compiler to be seen."""
    return run_hook("sdist", FASTKIT_TORCH_ROOT="/nowhere", PATH="")[0]


def assert_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        (info,) = (name for name in file.namelist() if name.endswith("/WHEEL"))
        stated = file.read(info).decode().splitlines()
        names = file.namelist()
    assert "Root-Is-Purelib: true" in stated and "Tag: py3-none-any" in stated
    assert not any(name.endswith(".so") for name in names)
    return names


@pytest.mark.slow
def test_an_sdist_holds_what_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    tracked += [p.relative_to(ROOT) for p in (ROOT / "python" / "fastkit").rglob("*.py")]
    tracked += [p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py")]
    assert {str(path) for path in tracked} <= names
    root = "setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "constraints.txt"
    assert {*root, "LICENSE", "README.md", "CHANGELOG.md", "python/fastkit/py.typed"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.slow
def test_an_sdist_without_a_compiler_is_a_pure_python_package(sdist, tmp_path):
    options = "-v", *NO_CACHE, "--no-deps"
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, sdist]
    done = subprocess.run(command, env={**os.environ, "CC": "false"}, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "a pure-Python build, without the native library: CC=false compiles no C program" in printed
    (wheel,) = tmp_path.glob("*.whl")
    names = assert_pure(wheel)
    assert {"fastkit/py.typed", "fastkit/reference/__init__.py", "fastkit/triton/__init__.py"} <= set(names)


@pytest.mark.slow
def test_an_editable_install_without_the_library_leaves_no_old_one(tree, run_hook):
    old = tree / "python" / "fastkit" / "_C.so"
    old.touch()
    wheel, printed = run_hook("editable", FASTKIT_NATIVE="OFF")
    assert not old.exists()
    assert printed.count("a pure-Python build, without the native library: FASTKIT_NATIVE=OFF") == 1
    assert_pure(wheel)


COMPILER = """\
#!{python}
import hashlib, subprocess, sys

compiler, arguments = {compiler!r}, sys.argv[1:]
if "-c" not in arguments or not any("/csrc/" in argument for argument in arguments):
    sys.exit(subprocess.call([*compiler, *arguments]))
at = arguments.index("-o")
_, output = arguments[at : at + 2]
del arguments[at : at + 2]
command = [*compiler, *(a for a in arguments if a != "-c"), "-E", "-P"]
text = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
code = 'extern "C" const char fastkit_%s = 0;' % hashlib.sha256(text).hexdigest()
command = [*compiler, "-x", "c++", "-fPIC", "-c", "-", "-o", output]
subprocess.run(command, check=True, input=code.encode())
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A wheel whose library has, of each source, the hash of its preprocessed text, and runs nothing."""
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    real = shlex.split(os.environ.get("CXX", "c++"))
    compiler.write_text(COMPILER.format(python=sys.executable, compiler=real))
    compiler.chmod(0o755)

    def build(source, name, **environment):
        folder = tmp_path_factory.mktemp(name)
        options = "-q", *NO_CACHE, "--no-deps"
        command = [sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source]
        environment = {**os.environ, "CXX": str(compiler), **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        (wheel,) = folder.iterdir()
        return wheel

    return build


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def build_with_tools(tree, build, tmp_path_factory):
    """With a ninja of its own, which is gone afterwards: so is that of pip's isolated build."""

    def build_with_tools(name):
        tools = tmp_path_factory.mktemp("tools")
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        wheel = build(tree, name, PATH=path, FASTKIT_CUDA="OFF", FASTKIT_NATIVE="ON")
        (tools / "ninja").unlink()
        return wheel

    return build_with_tools


@pytest.fixture(scope="module")
def first(tree, build_with_tools):
    """Built when there was a module more."""
    (tree / "python" / "fastkit" / "gone.py").touch()
    wheel = build_with_tools("first")
    (tree / "python" / "fastkit" / "gone.py").unlink()
    assert {"fastkit/_C.so", "fastkit/gone.py"} <= set(contents(wheel))
    return wheel


@pytest.mark.slow
def test_building_twice_in_one_tree_works_when_the_build_tools_have_moved(first, build_with_tools):
    assert "fastkit/_C.so" in contents(build_with_tools("second"))


@pytest.mark.slow
def test_a_build_holds_what_was_asked_for_whatever_was_built_before(tree, first, build):
    """Options that return find their own library, and modules that are gone stay gone."""
    other = build(tree, "other", FASTKIT_CUDA="OFF", FASTKIT_SYMBOLS="ON")
    again = contents(build(tree, "again", FASTKIT_CUDA="OFF"))
    assert "fastkit/gone.py" not in again
    assert again["fastkit/_C.so"] == contents(first)["fastkit/_C.so"]
    assert contents(other)["fastkit/_C.so"] != again["fastkit/_C.so"]
    assert_pure(build(tree, "pure", FASTKIT_NATIVE="OFF"))


@pytest.mark.slow
def test_a_tree_and_its_sdist_give_the_same_bytes(tree, sdist, build):
    """In two folders: no path of the build is in the wheel, and the sdist has all that a build needs."""
    wheels = [
        build(source, name, FASTKIT_CUDA="OFF", FASTKIT_NATIVE="ON")
        for name, source in {"tree": tree, "sdist": sdist}.items()
    ]
    assert "fastkit/_C.so" in contents(wheels[0])
    assert contents(wheels[0]) == contents(wheels[1])
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
