"""Drives CMake, and decides what the build needs on this machine; all other metadata is in pyproject.toml."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "python" / "fastkit"
CMAKE_MINIMUM = (3, 22)


def find_torch() -> Path | None:
    """The torch package to build against, found without importing it: also from pip's isolated build."""
    if root := os.environ.get("FASTKIT_TORCH_ROOT"):
        return Path(root)
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folders = [Path(sysconfig.get_path("platlib"))]
    if environment := os.environ.get("VIRTUAL_ENV"):
        folders += Path(environment).glob("lib/python*/site-packages")
    return next((f / "torch" for f in folders if (f / "torch" / "include").is_dir()), None)


def pinned(package: str) -> str:
    """``package==version`` as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith(f"{package}=="))


def build_requirements() -> list[str]:
    """What this machine lacks; a torch that is already there is never downloaded again."""
    missing = []
    if find_torch() is None:
        missing += [pinned("torch"), "numpy"]
    if shutil.which("ninja") is None:
        missing.append("ninja")
    if cmake_version() < CMAKE_MINIMUM:
        missing.append("cmake>=" + ".".join(map(str, CMAKE_MINIMUM)))
    return missing


def cmake_version() -> tuple[int, ...]:
    if shutil.which("cmake") is None:
        return (0, 0)
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0)


def version() -> str:
    match = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())
    assert match is not None
    return match[1]


class BuildNative(build_ext):
    """Builds fastkit/_C.so, and in editable installs fastkit._host, by CMake and ninja."""

    def run(self) -> None:
        torch_root = find_torch()
        if torch_root is None:
            raise SystemExit("fastkit: no torch to build against; install one or set FASTKIT_TORCH_ROOT")
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("fastkit: the build needs cmake and ninja; pip install cmake ninja")
        options = {
            "FASTKIT_TORCH_ROOT": torch_root.resolve(),
            "FASTKIT_VERSION": version(),
            "FASTKIT_CUDA": os.environ.get("FASTKIT_CUDA", "AUTO"),
            "FASTKIT_HOST_TESTS": "ON" if self.wants_host_tests() else "OFF",
        }
        if archs := os.environ.get("FASTKIT_CUDA_ARCHS"):
            options["FASTKIT_CUDA_ARCHS"] = archs
        # Every combination has a folder of its own, library included: CMake keeps what it found at first.
        tools = [
            os.environ.get(name) for name in ("CC", "CXX", "CUDACXX", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
        ]
        facts = (sorted(options.items()), sys.executable, tools, shutil.which("nvcc"))
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        folder = ROOT / "build" / f"cmake-{key}"
        options["FASTKIT_OUTPUT_DIR"] = folder / "fastkit"
        # These may live in a build environment that is gone at the next install: named every time.
        options["CMAKE_MAKE_PROGRAM"] = ninja
        if options["FASTKIT_HOST_TESTS"] == "ON":
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
            options["Python_EXECUTABLE"] = sys.executable
        defines = [f"-D{name}={value}" for name, value in options.items()]
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), **os.environ}
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], check=True)
        subprocess.run([cmake, "--build", folder], check=True, env=environment)
        inplace = self.inplace or self.editable_mode
        package = PACKAGE if inplace else Path(self.build_lib) / "fastkit"
        package.mkdir(parents=True, exist_ok=True)
        for library in (folder / "fastkit").glob("*.so"):
            # Removed, not overwritten: a process may have the old file mapped.
            (package / library.name).unlink(missing_ok=True)
            shutil.copy2(library, package / library.name)

    def wants_host_tests(self) -> bool:
        wanted = os.environ.get("FASTKIT_HOST_TESTS", "1" if self.editable_mode else "0") == "1"
        return wanted and Path(sysconfig.get_path("include"), "Python.h").is_file()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class CleanPython(build_py):
    """Copies the modules that there are; setuptools would keep those that have been deleted since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastkit", ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """The library has no Python in it: one wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("fastkit._C", sources=[])],
    cmdclass={"build_py": CleanPython, "build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    setup_requires=build_requirements(),
)
