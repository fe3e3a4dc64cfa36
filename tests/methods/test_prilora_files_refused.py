"""Folders that load_prilora refuses, each in words and before the model has changed."""

import json
import math
import re
import shutil

import pytest
import torch
from prilora_folders import (
    CONFIG,
    OURS,
    STATE,
    TENSORS,
    assert_close,
    config_of,
    fresh,
    gpt2,
    in_peft,
    llama,
    logits,
    made_by_peft,
    safetensors_torch,
    tensors_of,
    trained,
    transformers,
)
from torch import nn

from fastkit.methods._folder import digest
from fastkit.methods._safetensors import read_tensors, write_tensors
from fastkit.methods.prilora import PRILoRAConfig, apply_prilora, load_prilora
from fastkit.nn import PRILoRALinear

# PEFT asks a model of transformers for a property that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def unchanged(model):
    """Whether it is what ``fresh`` makes, with all parameters trainable."""
    same = all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), fresh().state_dict().values(), strict=True)
    )
    modules = any(isinstance(module, PRILoRALinear) for module in model.modules())
    return same and not modules and all(p.requires_grad for p in model.parameters())


@pytest.fixture
def ours(tmp_path):
    trained().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def plain(ours):
    """The same, as if PEFT had made it."""
    (ours / OURS).unlink()
    (ours / STATE).unlink()
    return ours


def assert_refused(folder, message, kind=ValueError):
    """``message``: whole, but for `load_prilora: ` and a `...` for what others say."""
    model = fresh()
    with pytest.raises(kind) as caught:
        load_prilora(model, folder)
    pattern = re.escape(f"load_prilora: {message}").replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), caught.value
    assert unchanged(model)


def edit_config(folder, **options):
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **options}))


def edit_tensors(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    safetensors_torch.save_file(tensors, folder / TENSORS, {"format": "pt"})


QUERY = "bert.encoder.layer.1.attention.self.query"
KEY = f"base_model.model.{QUERY}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), f"{QUERY} must have lora_A of rank 4, got no such tensor"),
        (
            lambda t: [t.pop(f"{KEY}.lora_{key}.weight") for key in "AB"],
            f"{QUERY} must have lora_A of rank 4, got no such tensor",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(3, 16)}),
            f"{QUERY} must have lora_A of rank 4 and shape (4, 16), got rank 3 and shape (3, 16)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(16, 7)}),
            f"{QUERY} must have lora_B of rank 4 and shape (16, 4), got rank 7 and shape (16, 7)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(64)}),
            f"{QUERY} must have lora_B of rank 4 and shape (16, 4), got rank none and shape (64,)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 16, dtype=torch.int8)}),
            f"{QUERY} must have lora_A in a floating-point dtype, got torch.int8",
        ),
        (
            lambda t: t.pop("base_model.model.classifier.bias"),
            "classifier of modules_to_save must have bias, got no such tensor",
        ),
        (
            lambda t: t.update({"base_model.model.classifier.bias": torch.zeros(3)}),
            "classifier of modules_to_save must have bias of shape (2,), got (3,); does the model have as"
            " many classes?",
        ),
        (
            lambda t: t.update({"base_model.model.classifier.bias": torch.zeros(2, dtype=torch.int64)}),
            "classifier of modules_to_save must have bias in torch.float32, got torch.int64",
        ),
        (
            lambda t: t.update({"base_model.model.bert.embeddings.word_embeddings.weight": torch.zeros(1)}),
            f"{TENSORS} must have tensors of adapters and of modules_to_save, got"
            " bert.embeddings.word_embeddings.weight, which is of neither kind: modules_to_save is"
            " ['bert.pooler', 'classifier']; load it with PEFT",
        ),
        (
            lambda t: t.update({"base_model.model.bert.encoder.layers.1.q.lora_A.weight": torch.zeros(1)}),
            "the adapter must be of this model, got tensors of bert.encoder.layers.1.q, which"
            " BertForSequenceClassification has not; the nearest are ...",
        ),
        (
            lambda t: t.update({"base_model.model.bert.embeddings.lora_A.weight": torch.zeros(1)}),
            "target_modules must name bert.embeddings, which has tensors, got ['dense', 'key', 'query',"
            " 'value']",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_magnitude_vector.weight": torch.zeros(1)}),
            f"{TENSORS} must have A and B of linear layers, got {KEY}.lora_magnitude_vector.weight, a"
            " magnitude of DoRA; load it with PEFT",
        ),
        (
            lambda t: t.update({"base_model.model.bert.e.lora_embedding_A": torch.zeros(1)}),
            f"{TENSORS} must have A and B of linear layers, got base_model.model.bert.e.lora_embedding_A,"
            " of an embedding; load it with PEFT",
        ),
        (
            lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(1)}),
            f"{TENSORS} must have names that begin with base_model.model., got {QUERY}.lora_A.weight; is"
            " it of PEFT?",
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_named(plain, change, message):
    edit_tensors(plain, change)
    assert_refused(plain, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'; load it with PEFT"),
        (
            {"use_dora": True},
            "use_dora must be false, got true: the magnitudes of DoRA are not part of a LoRA layer; load"
            " it with PEFT",
        ),
        ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'; load it with PEFT"),
        ({"lora_bias": True}, "lora_bias is an option that is not known here, got True; load it with PEFT"),
        (
            {"target_parameters": ["w"]},
            "target_parameters is an option that is not known here, got ['w']; load it with PEFT",
        ),
        ({"some_day": 1}, "some_day is an option that is not known here, got 1; load it with PEFT"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights must leave the base model as it is, got 'pissa', which changes its weights;"
            " convert"
            " the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
        ),
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": True}, "r must be an integer of at least 1, got True"),
        ({"rank_pattern": {"a": 1.5}}, "rank_pattern['a'] must be an integer of at least 1, got 1.5"),
        ({"rank_pattern": [4]}, "rank_pattern must be an object, got list"),
        ({"rank_pattern": {"(": 4}}, "'(' must be a regular expression (...)"),
        ({"lora_alpha": -1}, "lora_alpha must be positive and finite, got -1"),
        ({"lora_alpha": 10**400}, "lora_alpha must be positive and finite, got 1000..."),
        ({"lora_alpha": "8"}, "lora_alpha must be positive and finite, got '8'"),
        ({"lora_alpha": math.nan}, "lora_alpha must be positive and finite, got nan"),
        ({"lora_dropout": 1}, "lora_dropout must be in [0, 1), got 1"),
        ({"use_rslora": 3}, "use_rslora must be true or false, got 3"),
        ({"target_modules": {"a": 1}}, "target_modules must be a list of names, got {'a': 1}"),
        ({"target_modules": "("}, "'(' must be a regular expression (...)"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names, got 'classifier'"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a list of integers, got ['1']"),
    ],
)  # fmt: skip
def test_options_that_are_not_loras_are_named(plain, options, message):
    edit_config(plain, **options)
    assert_refused(plain, f"{plain / CONFIG}: {message}")


def test_modules_that_are_adapted_and_saved_are_named(plain):
    edit_config(plain, modules_to_save=["uery"])  # PEFT compares letters
    assert_refused(
        plain,
        "modules_to_save must not be adapted too, got bert.encoder.layer.0.attention.self.query with"
        " bert.encoder.layer.0.attention.self.query among targets",
    )


TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # by PEFT


@TIED
def test_a_tied_head_that_is_trained_is_saved_with_its_embedding(tmp_path):
    prilora = trained(gpt2, modules_to_save=["lm_head"])
    prilora.save_pretrained(tmp_path)
    assert set(config_of(tmp_path)["modules_to_save"]) == {"lm_head", "transformer.wte"}
    assert_close(logits(in_peft(tmp_path, gpt2)), logits(prilora.model))
    assert torch.equal(logits(load_prilora(fresh(gpt2), tmp_path).model), logits(prilora.model))


@TIED
def test_a_tied_base_has_one_value_for_both(tmp_path):
    """PEFT has two copies, which it may have trained apart."""
    made_by_peft(
        tmp_path, gpt2, task="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True,
        modules_to_save=["wte", "lm_head"],
    )  # fmt: skip
    base = fresh(gpt2)
    message = (
        "load_prilora: modules_to_save must not be tied to others, got transformer.wte.weight, which is also"
        " lm_head.weight and has another value there; untie them"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_prilora(base, tmp_path)
    assert torch.equal(logits(base), logits(fresh(gpt2)))
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "transformer.wte"))
    edit_tensors(tmp_path, lambda t: t.update({embedding: t[head].clone()}))
    assert_close(logits(load_prilora(fresh(gpt2), tmp_path).model), logits(in_peft(tmp_path, gpt2)))


def test_targets_that_match_nothing_are_named(plain):
    edit_config(plain, target_modules=["qkv"])
    assert_refused(
        plain,
        "target_modules must match modules of BertForSequenceClassification, got ['qkv'], which matches"
        " nothing; is the adapter of another model?",
    )


def test_the_rank_that_a_config_gives_is_that_of_the_tensors(plain):
    edit_config(plain, rank_pattern={})
    name = "bert.encoder.layer.0.attention.self.query"
    assert_refused(
        plain, f"{name} must have lora_A of rank 5 and shape (5, 16), got rank 2 and shape (2, 16)"
    )


def test_an_adapter_of_another_model_is_refused(tmp_path):
    trained(llama).save_pretrained(tmp_path)
    assert_refused(
        tmp_path,
        "the adapter must be of this model, got tensors of model.layers.0.mlp.down_proj, which"
        " BertForSequenceClassification has not...",
    )


def test_an_adapter_of_a_larger_model_is_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    trained(model=transformers.BertForSequenceClassification(config)).save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query"
    assert_refused(
        tmp_path, f"{name} must have lora_A of rank 2 and shape (2, 16), got rank 2 and shape (2, 32)"
    )


def test_dora_by_peft_is_refused(tmp_path):
    made_by_peft(tmp_path, target_modules=["query"], use_dora=True)
    assert_refused(tmp_path, f"{tmp_path / CONFIG}: use_dora must be false, got true...")


def test_a_model_with_adapters_is_refused(ours):
    prilora = trained()
    before = logits(prilora.model)
    with pytest.raises(ValueError, match=r"^load_prilora: model must have no adapters yet"):
        load_prilora(prilora.model, ours)
    assert torch.equal(logits(prilora.model), before)


def test_a_folder_without_its_files_is_refused(ours, tmp_path):
    assert_refused(
        tmp_path / "no", f"folder must be one, got {tmp_path / 'no'}; is the path right?", FileNotFoundError
    )
    for name in (STATE, TENSORS, CONFIG):
        (ours / name).unlink()
        assert_refused(
            ours, f"{ours} must have {name}, got none; is it the folder of an adapter?", FileNotFoundError
        )


def test_a_pickle_is_not_opened(plain):
    (plain / TENSORS).rename(plain / "adapter_model.bin")
    assert_refused(
        plain,
        f"{plain} must have {TENSORS}, got adapter_model.bin, which may run code when it is read; load it"
        " with PEFT, if you trust it, and save it again",
    )


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_tensors_of_another_time_are_refused(ours, tmp_path, name):
    trained(seed=1).save_pretrained(tmp_path / "later")
    shutil.copy(tmp_path / "later" / name, ours / name)
    assert_refused(
        ours,
        f"{name} must be the file that {OURS} was written with, got another; copy the folder again, or, if"
        f" another program has replaced it, delete {OURS}: then it is loaded as a LoRA of PEFT",
    )


def test_a_config_of_another_time_is_refused(ours):
    edit_config(ours, base_model_name_or_path="anywhere")  # which says nothing about the adapter
    load_prilora(fresh(), ours)
    edit_config(ours, lora_alpha=3)
    name = min(trained().layers)
    assert_refused(
        ours,
        f"{name} must have alpha 16.0, as it was saved, got alpha 3 by {CONFIG}; restore that, or delete"
        f" {OURS}: then the folder is loaded as a LoRA of PEFT",
    )
    edit_config(ours, lora_alpha=16, modules_to_save=["classifier"])
    assert_refused(ours, "modules_to_save must have bert.pooler, as it was saved, got ['classifier']")


@pytest.mark.parametrize("facts", [[], {"format": 2}, {"format": 1, "uniform": False}])
def test_a_prilora_json_of_another_form_is_refused(ours, facts):
    (ours / OURS).write_text(json.dumps(facts))
    assert_refused(ours, f"{OURS} must have ...")


def test_a_uniform_export_beyond_a_layers_size_is_told_from_the_other(tmp_path):
    net = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    prilora = apply_prilora(net, PRILoRAConfig(target_modules=["0", "1"], ranks={"0": 1, "1": 2}))
    prilora.save_pretrained(tmp_path, uniform=True)
    load_prilora(prilora.undo(), tmp_path).undo()
    edit_config(tmp_path, r=3, lora_alpha=3)
    (tmp_path / OURS).unlink()
    edit_tensors(
        tmp_path,
        lambda t: t.update(
            {k: nn.functional.pad(v, (0, 0, 0, 1) if "_A" in k else (0, 1)) for k, v in t.items()}
        ),
    )
    message = "0 must have a rank of at most 2, the least of its sizes, got 3; is it a uniform export?"
    with pytest.raises(ValueError, match=message):
        load_prilora(net, tmp_path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, OURS, STATE])
def test_a_file_that_is_cut_off_or_spoilt_is_refused(ours, name):
    whole = (ours / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    cuts = [0, 1, 7, 8, 9, len(whole) // 3, len(whole) - 2]
    spoilt = [whole[:n] for n in cuts] + [b"[" * 100_000, b"\xff" * 64, b"null", b"{}"]
    for _ in range(8):
        at = int(torch.randint(len(whole) // 2, (), generator=generator))
        spoilt.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    expected = logits(load_prilora(fresh(), ours).model)
    for content in spoilt:
        (ours / name).write_bytes(content)
        model = fresh()
        try:
            prilora = load_prilora(model, ours)
        except ValueError as error:
            assert str(error).startswith("load_prilora: ") and unchanged(model)
        else:  # what says nothing about the adapter
            assert name in (CONFIG, OURS) and torch.equal(logits(prilora.model), expected)


def test_a_state_that_is_not_of_its_adapter_is_refused(ours):
    """With the digests of what it is now."""
    tensors, metadata = read_tensors(ours / STATE)
    state = json.loads(metadata["fastkit.prilora"])

    def write(**changes):
        text = json.dumps({**state, "state": {**state["state"], **changes}})
        write_tensors(ours / STATE, tensors, {"fastkit.prilora": text})
        facts = json.loads((ours / OURS).read_text())
        facts["digests"][STATE] = digest(ours / STATE)
        (ours / OURS).write_text(json.dumps(facts))

    write()
    load_prilora(fresh(), ours)
    some = next(iter(state["state"]["ranks"]))
    for changes in (
        {"counts": {}},
        {"counts": None},
        {"steps": -1},
        {"events": [1.5]},
        {"owners": {some: "no"}},
        {"owners": {some: [1]}},
        {"owners": {some: "bert.encoder.layer.0.output.dense"}},
        {"ranks": {some: 2}},
        {"scales": {**state["state"]["scales"], some: 77.0}},
        {"config": []},
        {"config": {"ratio": 2}},
        {"config": {"alpha": 10**400}},
        {"config": {"no": 2}},
        {"format": 9},
    ):
        write(**changes)
        model = fresh()
        with pytest.raises(ValueError):
            load_prilora(model, ours)
        assert unchanged(model), changes


def test_wrong_types_are_refused(ours):
    with pytest.raises(TypeError, match=r"^load_prilora: model must be a torch\.nn\.Module, got str$"):
        load_prilora("bert", ours)
    with pytest.raises(TypeError, match=r"^load_prilora: config must be a PRILoRAConfig, got dict$"):
        load_prilora(fresh(), ours, config={})
