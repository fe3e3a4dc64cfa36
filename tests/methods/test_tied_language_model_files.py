"""Files of the paper's language models: what is saved is loaded, and what is damaged refused."""

import json
import re

import pytest
import torch

from fastkit.methods.tied_embedding import (
    TiedLanguageModel,
    VariationalDropout,
    language_model_files,
)

pytestmark = pytest.mark.native

V, H = 11, 6
IDS = torch.tensor([[1, 5, 3, 3, 9, 0, 10], [0, 2, 7, 5, 5, 4, 1]])


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def made(**options):
    return TiedLanguageModel(V, H, init_range=0.5, **options).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie": True, "projection": True, "pr_norm": "paper", "pr_weight": 0.5, "dropout": 0.25},
        {"projection": True, "projection_bias": False},
        {"tie": True, "dropout": VariationalDropout(word=0.1, per_gate=False), "num_layers": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_saved_and_loaded_bit_for_bit(tmp_path, options, dtype):
    pytest.importorskip("safetensors")
    model = TiedLanguageModel(V, H, **options).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    loaded = TiedLanguageModel.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    assert loaded._settings() == model._settings()
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model.eval()(IDS)[0])
    loaded.train().loss(IDS, IDS)[0].backward()
    for parameter in loaded.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    asked = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in loaded.parameters()] == asked


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    old, new = made(tie=True), made(tie=True, projection=True)
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("of the user")

    def fail(path, facts):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(language_model_files, "write_json", fail)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(tmp_path)
    loaded = TiedLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.embedding.weight, old.embedding.weight) and loaded.projection is None
    new.save_pretrained(tmp_path)
    loaded = TiedLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.projection.weight, new.projection.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip


def test_files_that_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    made().save_pretrained(tmp_path)
    config, tensors = tmp_path / "config.json", tmp_path / "model.safetensors"
    facts, content, state = json.loads(config.read_text()), tensors.read_bytes(), load_file(tensors)
    options = ", ".join(sorted(facts["model"]))

    def load():
        return TiedLanguageModel.from_pretrained(tmp_path)

    with refused(
        FileNotFoundError, f"TiedLanguageModel: {tmp_path / 'none'} must hold config.json, got none"
    ):
        TiedLanguageModel.from_pretrained(tmp_path / "none")

    refusals = [
        ({**facts, "kind": "bert"}, f"{config} must be of a language model of fastkit, got one of something"
         " else"),
        ([1], f"{config} must be of a language model of fastkit, got one of something else"),
        ({**facts, "format": 2}, f"{config} must have format 1, got 2; read it with the fastkit that wrote"
         f" it, {facts['fastkit']!r}"),
        ({**facts, "model": {"vocab_size": V}}, f"{config} must have the options {options} of a model, got"
         " others"),
        ({**facts, "model": None}, f"{config} must have the options {options} of a model, got others"),
    ]  # fmt: skip
    sizes = f"{tmp_path} must hold an embedding of shape"
    for change, message in [
        ({"vocab_size": 10**15}, f"{sizes} ({10**15}, 6) and 2 layers, as config.json says, got an embedding"
         " of shape (11, 6) and 2 layers"),
        ({"num_layers": 10**9}, f"{sizes} (11, 6) and {10**9} layers, as config.json says, got an embedding"
         " of shape (11, 6) and 2 layers"),
        ({"tie": 1}, f"{tmp_path} must hold one model, got what is none (TiedLanguageModel: tie must be True"
         " or False, got 1)"),
        ({"dropout": {"word": 2}}, f"{tmp_path} must hold one model, got what is none (VariationalDropout:"
         " word must be in [0, 1), got 2)"),
        ({"dropout": "all"}, f"{tmp_path} must hold one model, got what is none (TiedLanguageModel: dropout"
         " must be a number, got 'all')"),
        ({"pr_norm": []}, f"{tmp_path} must hold one model, got what is none (TiedLanguageModel: pr_norm must"
         " be one of 'code', 'paper', got [])"),
    ]:  # fmt: skip
        refusals.append(({**facts, "model": {**facts["model"], **change}}, message))
    for written, message in refusals:
        config.write_text(json.dumps(written))
        with refused(ValueError, f"TiedLanguageModel: {message}"):
            load()
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON, got what is not"):
        load()
    config.write_text(json.dumps({**facts, "model": {**facts["model"], "tie": True}}))
    with pytest.raises(ValueError, match=r"(?s)must hold one model, .*Missing key.*embedding\.bias"):
        load()
    config.write_text(json.dumps(facts))

    tensors.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        load()
    save_file({**state, "lstm.weight_hh_l1": torch.zeros(4 * H, 2 * H).double()}, tensors)
    with pytest.raises(ValueError, match=r"(?s)must hold one model.*size mismatch for lstm\.weight_hh_l1"):
        load()
    save_file({**state, "output.bias": torch.zeros(V)}, tensors)
    with refused(
        ValueError,
        f"TiedLanguageModel: the tensors of {tmp_path} must be of one floating-point dtype, got"
        " torch.float32, torch.float64",
    ):
        load()
    save_file({name: tensor for name, tensor in state.items() if name != "embedding.weight"}, tensors)
    with pytest.raises(ValueError, match="got no embedding and 2 layers"):
        load()
    tensors.unlink()
    with refused(FileNotFoundError, f"TiedLanguageModel: {tmp_path} must hold model.safetensors, got none"):
        load()
    tensors.write_bytes(content)
    assert load().vocab_size == V
