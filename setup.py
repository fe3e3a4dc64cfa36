"""Drives CMake, where there is a native library to build; all other metadata is in pyproject.toml."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_backend import ROOT, find_torch, wants_host_tests, why_pure
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = ROOT / "python" / "fastkit"


def version() -> str:
    match = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())
    assert match is not None
    return match[1]


def source_date() -> str:
    """When the last commit was made; where there is no repository, the first second that a wheel can have."""
    command = ["git", "-C", ROOT, "log", "-1", "--format=%ct"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return "315532800"


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
            "FASTKIT_SYMBOLS": os.environ.get("FASTKIT_SYMBOLS", "OFF"),
        }
        if archs := os.environ.get("FASTKIT_CUDA_ARCHS"):
            options["FASTKIT_CUDA_ARCHS"] = archs
        # Every combination has a folder of its own, library included: CMake keeps what it found at first.
        tools = [
            os.environ.get(name) for name in ("CC", "CXX", "CUDACXX", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
        ]
        facts = (sorted(options.items()), tools, shutil.which("nvcc"))
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        folder = ROOT / "build" / f"cmake-{key}"
        options["FASTKIT_OUTPUT_DIR"] = folder / "fastkit"
        # These may live in a build environment that is gone at the next install: named every time.
        options["CMAKE_MAKE_PROGRAM"] = ninja
        libraries = ["_C.so"]
        options["FASTKIT_HOST_TESTS"] = "OFF"
        if wants_host_tests(self.editable_mode):  # beside the library, whose objects it shares
            import pybind11

            options["FASTKIT_HOST_TESTS"] = "ON"
            options["pybind11_DIR"] = pybind11.get_cmake_dir()
            options["Python_EXECUTABLE"] = sys.executable
            libraries.append(f"_host{sysconfig.get_config_var('EXT_SUFFIX')}")
        defines = [f"-D{name}={value}" for name, value in options.items()]
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), **os.environ}
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], check=True)
        subprocess.run([cmake, "--build", folder], check=True, env=environment)
        inplace = self.inplace or self.editable_mode
        package = PACKAGE if inplace else Path(self.build_lib) / "fastkit"
        package.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            # Removed, not overwritten: a process may have the old file mapped.
            (package / library).unlink(missing_ok=True)
            shutil.copy2(folder / "fastkit" / library, package / library)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class CleanPython(build_py):
    """Copies the modules that there are; setuptools would keep those that have been deleted since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastkit", ignore_errors=True)
        if (reason := why_pure()) is not None:
            print(f"fastkit: a pure-Python build, without the native library: {reason}", flush=True)
            if self.editable_mode:  # where an earlier build has left it beside the modules
                for library in PACKAGE.glob("*.so"):
                    library.unlink()
        super().run()


class PlatformWheel(bdist_wheel):
    """The library has no Python in it: one wheel for every Python 3 of a platform; without it, of all."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


os.environ.setdefault("SOURCE_DATE_EPOCH", source_date())  # of the files in a wheel
setup(
    ext_modules=[] if why_pure() else [Extension("fastkit._C", sources=[])],
    cmdclass={"build_py": CleanPython, "build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
