"""What a type checker tells a user: pyright in its strict mode, on the package as it is imported."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastkit

PACKAGE = Path(fastkit.__file__).parent

# A line that must be refused has an ignore, which is an error where there is nothing to ignore.
USER = '''\
"""A program of somebody else's."""

from collections.abc import Mapping, Sequence
from typing import assert_type

import torch
from torch import Tensor, nn

from fastkit import info, ops, reference
from fastkit.methods.prilora import PRILoRA, PRILoRAConfig, apply_prilora
from fastkit.methods.tied_embedding import (
    LSTMState,
    TiedLanguageModel,
    VariationalDropout,
    bptt_batches,
    tie_embeddings,
    tie_three_way,
)
from fastkit.methods.word_translation import RowPairs, Vectors, WordTranslator, load_vectors, row_pairs
from fastkit.nn import AdaptiveIIR, PRILoRALinear, TiedEmbedding
from fastkit.optim import MTAdam

assert_type(info.available("iir_scan"), dict[str, bool | str])

x, a = torch.randn(8, 4, 100), torch.zeros(1, 1, 1, 2)
assert_type(ops.iir_scan(x, a, chunk=None, impl="reference"), Tensor)
y, state = ops.iir_scan_with_state(x, a)
assert_type(state, ops.IIRState)
assert_type(ops.iir_step(x[..., 0], a[:, :, 0], None, state), tuple[Tensor, ops.IIRState])
assert_type(reference.iir_scan(x, a), Tensor)
assert_type(ops.sosfilt(x, torch.zeros(1, 6)), Tensor)
ops.iir_scan(x, a, None, 16)  # pyright: ignore[reportCallIssue]
ops.iir_scan(x, a, impl="gpu")  # pyright: ignore[reportArgumentType]

found = ops.topk_similarity(y[0], y[1], 5, metric="cosine")
assert_type(found, ops.TopK)
assert_type(found.indices, Tensor)
assert_type(ops.csls_topk(y[0], y[1], 5), ops.TopK)
ops.topk_similarity(y[0], y[1], 5, metric="angle")  # pyright: ignore[reportArgumentType]
assert_type(ops.moments(y[0]), ops.Moments)
assert_type(ops.moments(y[0]).covariance(), Tensor)
assert_type(ops.procrustes(y[0], y[1]), Tensor)

layer = AdaptiveIIR(4, parameterization="triangle", adaptive=False)
assert_type(layer.forward(x), Tensor)
assert_type(layer.logits, nn.Parameter)
AdaptiveIIR(4, parameterization="circle")  # pyright: ignore[reportArgumentType]
low_rank = PRILoRALinear(nn.Linear(4, 4), rank=2)
assert_type(low_rank.lora_a, nn.Parameter)
assert_type(low_rank.prune_(0.5), Tensor)
tied = TiedEmbedding(10, 4, exclude_ids=[0])
assert_type(tied.loss(tied.embed(torch.arange(3)), torch.arange(3), reduction="none"), Tensor)
assert_type(tie_embeddings(layer, input="", output=""), AdaptiveIIR)
TiedEmbedding(10, 4, tie_grad="none")  # pyright: ignore[reportArgumentType]
assert_type(tie_three_way(layer, encoder="", decoder="", output=""), AdaptiveIIR)
model = TiedLanguageModel.from_preset("small", tie=True, dropout=VariationalDropout(word=0.1))
assert_type(model, TiedLanguageModel)
for ids, target in bptt_batches(torch.arange(100), 2, 10):
    assert_type(model.loss(ids, target), tuple[Tensor, LSTMState])
assert_type(model.generate(torch.zeros(1, 1, dtype=torch.long), 3), Tensor)
TiedLanguageModel.from_preset("huge")  # pyright: ignore[reportArgumentType]
TiedLanguageModel(10, 4, pr_norm="l1")  # pyright: ignore[reportArgumentType]

optimizer = MTAdam(layer.parameters(), lr=1e-3, terms=["one", "two"])
losses = {"one": y.mean(), "two": None}
assert_type(optimizer.step(losses), Sequence[Tensor | None] | Mapping[str, Tensor | None] | None)
assert_type(optimizer.step([y.mean(), y.sum()]), Sequence[Tensor | None] | Mapping[str, Tensor | None] | None)
assert_type(optimizer.terms, tuple[str, ...] | None)
assert_type(optimizer.grad_norms(layer.logits), dict[str, Tensor])
MTAdam(layer.parameters(), on_nonfinite="stop")  # pyright: ignore[reportArgumentType]

adapters = apply_prilora(nn.Sequential(nn.Linear(4, 4)), PRILoRAConfig(rank_final=4))
assert_type(adapters, PRILoRA)
assert_type(adapters.layers, dict[str, PRILoRALinear])
assert_type(adapters.undo(), nn.Module)

words = load_vectors("words.vec", max_words=1000)
assert_type(words, Vectors)
assert_type(words.words, list[str] | None)
assert_type(row_pairs([("one", "un")], ["one"], ["un"]), RowPairs)
translator = WordTranslator("paper", restarts=4).fit(words.vectors, words.vectors.numpy())
assert_type(translator, WordTranslator)
assert_type(translator.transform(words.vectors), Tensor)
scores, indices = translator.translate(words.vectors, 3)
assert_type(indices, Tensor)
assert_type(translator.score(torch.zeros(1, 2)).precision, dict[int, float])
assert_type(WordTranslator.load("translator"), WordTranslator)
'''


@pytest.mark.native
def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").is_file()


def run_pyright(folder, *arguments):
    """Its report on the fastkit that is imported here: it finds packages through the first python of PATH."""
    pyright = shutil.which("pyright", path=Path(sys.executable).parent) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("needs pyright: pip install 'fastkit[dev]'")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run(
        [pyright, "--outputjson", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_users_file_has_the_types_that_are_documented(tmp_path):
    options = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))
    (tmp_path / "user.py").write_text(USER)
    report = run_pyright(tmp_path)
    assert report["summary"]["filesAnalyzed"] == 1
    lines = USER.splitlines()
    errors = [f"{lines[e['range']['start']['line']]}: {e['message']}" for e in report["generalDiagnostics"]]
    assert errors == []


@pytest.mark.slow
def test_every_type_of_the_interface_is_known(tmp_path):
    """With what other libraries leave unknown left out, but they must be there to be derived from."""
    for library in ("transformers", "triton"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    report = run_pyright(tmp_path, "--verifytypes", "fastkit", "--ignoreexternal")
    types = report["typeCompleteness"]
    assert Path(types["packageRootDirectory"]) == PACKAGE
    incomplete = [
        f"{symbol['name']}: {'; '.join(d['message'] for d in symbol['diagnostics'])}"
        for symbol in types["symbols"]
        if symbol["isExported"] and (symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"])
    ]
    assert incomplete == []
    assert types["completenessScore"] == 1
