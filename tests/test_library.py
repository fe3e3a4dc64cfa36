"""What the native library asks of others and shows to them: one file must serve every torch from 2.10."""

import os
import shutil
import sys

import pytest

from fastkit import _native

pytest.importorskip("elftools", reason="needs pyelftools, which reads the library")

from library_faults import compile_, faults, torch_root

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and a C++ compiler"),
]


@pytest.mark.skipif(not _native.LIBRARY.is_file(), reason="the library is not built")
def test_the_library_asks_and_shows_no_more_than_it_must():
    assert faults(_native.LIBRARY) == []


SOUND = """
    extern "C" int aoti_torch_get_dim(void*, long*);
    extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int, void**);
    int sound(void** stream) {
        if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream(0, stream);
        return aoti_torch_get_dim(nullptr, new long);  // new is libstdc++'s
    }
"""
LINK = ("-Wl,--no-as-needed", f"-L{torch_root() / 'lib'}", "-ltorch")
OUTSIDE = "which is no C function of torch 2.10"
CASES = {
    "sound": ("", LINK, []),
    "c10": (
        "namespace c10 { void throw_(); } void use() { c10::throw_(); }",
        LINK,
        [f"needs _ZN3c106throw_Ev, {OUTSIDE}"],
    ),
    "python": (
        'extern "C" int Py_IsInitialized(); int use() { return Py_IsInitialized(); }',
        LINK,
        [f"needs Py_IsInitialized, {OUTSIDE}"],
    ),
    "torch 2.11": (
        'extern "C" __attribute__((weak)) int torch_from_blob(); int use() { return torch_from_blob(); }',
        LINK,
        [f"needs torch_from_blob, {OUTSIDE}"],
    ),
    "CUDA": (
        'extern "C" int torch_get_current_cuda_blas_handle(void**);'
        "int use() { return torch_get_current_cuda_blas_handle(nullptr); }",
        LINK,
        ["needs torch_get_current_cuda_blas_handle, which is in no torch without CUDA: declare it weak"],
    ),
    "rpath": ("", (*LINK, "-Wl,--disable-new-dtags,-rpath,/nowhere"), ["has a DT_RPATH"]),
    "runpath": ("", (*LINK, "-Wl,--enable-new-dtags,-rpath,/nowhere"), ["has a DT_RUNPATH"]),
    "openmp": ("", (*LINK, "-fopenmp"), ["needs the library libgomp.so.1"]),
    "no torch": ("", (), ["does not need libtorch.so"]),
    "export": ('__attribute__((visibility("default"))) void shown() {}', LINK, ["exports _Z5shownv"]),
    "path": (
        '#line 1 "/home/me/fastkit/csrc/a.cpp"\nconst char* where() { return __FILE__; }',
        LINK,
        ["holds the path /home/me/fastkit/csrc/a.cpp"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_library_with_a_fault_is_told(tmp_path, case):
    source, link, expected = CASES[case]
    library = tmp_path / "lib.so"
    options = "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"
    compile_(*options, "-xc++", "-", "-xnone", "-o", library, *link, source=SOUND + source)
    assert faults(library) == expected
