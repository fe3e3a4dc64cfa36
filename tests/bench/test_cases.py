"""The cases of each stem: that they are found, travel to child processes, and have their contestants."""

import pickle

import pytest
import torch

from fastkit.bench import cases
from fastkit.bench.case import Skip
from fastkit.bench.cases import (
    iir_scan,
    iir_scan_chunks,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    moments,
    procrustes,
    topk_similarity,
)
from fastkit.bench.contest import SAME_WORK


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stem", cases.stems())
def test_the_cases_of_each_stem_travel_to_child_processes(stem, quick):
    module = cases.of(stem)
    for chosen in (module.cases(quick=quick), module.demo_cases(quick=quick), module.gpu_cases()):
        titles = [case.title for case in chosen]
        assert len({*titles}) == len(titles)
        for case, title in zip(pickle.loads(pickle.dumps(chosen)), titles, strict=True):
            assert case.title == title
            assert case.yardsticks <= {*case.contest().makers}
            assert case.floor in {"", *case.yardsticks}
            assert not quick or case.device == "cuda" or case.warm


def test_a_module_joins_by_being_there_and_parts_do_not(tmp_path, monkeypatch):
    for name in ("iir_scan.py", "iir_scan_step.py", "moments.py", "lora_linear.py", "lora_linear_rows.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(cases, "__path__", [str(tmp_path)])
    assert cases.stems() == ["iir_scan", "lora_linear", "moments"]


def test_the_shapes_of_iir_scan():
    chosen = iir_scan.cases()
    floors = {(case.op, case.shape, case.direction): case.floor_bytes for case in chosen}
    samples = 8 * 256 * 16384
    assert floors["iir_scan", "8x16384x256 view", "fwd+bwd"] == 24 * samples
    assert floors["iir_scan", "8x256x16384 chunk 1", "fwd"] == 28 * samples
    assert floors["iir_scan", "8x16384x256 view F=4", "fwd+bwd"] == 20 * samples
    assert floors["iir_scan", "16x1x480000 fixed", "fwd+bwd"] == 24 * 16 * 480000
    assert {op for op, *_ in floors} == {"iir_scan", "sosfilt", "iir_step"}


def test_the_floors_of_what_is_bound_by_arithmetic():
    chosen = [*moments.cases(), *procrustes.cases(), *topk_similarity.cases()]
    floors = {(case.op, case.shape): (case.floor, case.floor_bytes) for case in chosen}
    assert floors["moments", "200000x300"] == (SAME_WORK, 4 * 300 * 200300)
    assert floors["polar", "1024x1024"] == ("svd", 8 * 1024**2)
    assert floors["procrustes", "5000x300"] == ("svd", 4 * 300 * 10300)
    assert floors["csls_topk", "20000x20000x300"] == (SAME_WORK, 4 * 40000 * 300 + 12 * 20000 * 10)
    assert floors["topk_similarity", "1x200000x300"] == ("", 4 * 200001 * 300 + 120)
    assert {op for op, _ in floors} == {"moments", "polar", "procrustes", "topk_similarity", "csls_topk"}


def test_the_floors_of_a_loss_are_its_products():
    """On a GPU of the output layers of language models."""
    cases_of = {case.title: case for case in linear_cross_entropy.cases()}
    assert {case.floor for case in cases_of.values()} == {linear_cross_entropy_loss.PRODUCTS}
    size = 4 * (2048 + 32000) * 512
    assert cases_of["linear_cross_entropy 2048x32000x512 fwd+bwd"].floor_bytes == 2 * size + 8 * 2048
    assert cases_of["linear_cross_entropy 2048x32000x512 fwd"].floor_bytes == size + 8 * 2048
    assert "linear_cross_entropy 2048x10000x512 all options fwd+bwd" in cases_of
    shapes = {case.shape for case in linear_cross_entropy.gpu_cases()}
    assert shapes == {"8192x256000x2304 bf16", "8192x128256x4096 bf16", "8192x50257x768 bf16"}


def test_torch_compile_is_skipped_where_it_cannot_compile(tmp_path, monkeypatch):
    make = iir_scan_chunks.case(1, 1, 32, chunk=32).contest().makers["compiled"]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(Skip, match=r"Python\.h"):
        make()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(Skip, match=r"C\+\+ compiler"):
        make()


def test_the_cases_of_a_gpu_have_its_contestants_and_no_warm_shape():
    chosen = iir_scan.gpu_cases()
    for case in chosen:
        ours, other, *rest = case.contest().makers
        assert (case.device, case.warm, ours, other) == ("cuda", False, "fastkit cuda", "fastkit triton")
        assert {"chunk-parallel", "compiled"} <= {*rest}
        assert case.yardsticks == {"fastkit triton"}
    floors = {(case.shape, case.direction): case.floor_bytes for case in chosen}
    assert floors["8x65536x256 view", "fwd+bwd"] == 24 * 8 * 256 * 65536
    assert floors["16x1x480000 fixed", "fwd"] == 8 * 16 * 480000


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_an_implementation_that_cannot_run_is_skipped_with_the_reason(impl, monkeypatch):
    make = iir_scan_chunks.case(1, 1, 32, chunk=32, device="cuda").contest().makers[f"fastkit {impl}"]
    with pytest.raises(Skip, match=r"no such implementation|no CUDA|without CUDA|not installed|\.so"):
        make()
