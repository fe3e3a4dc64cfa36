"""Folders of adapters: what PEFT makes of ours, what becomes of PEFT's, and what is refused."""

import contextlib
import copy
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora, load_prilora
from fastkit.methods.prilora import folder as folders
from fastkit.nn import PRILoRALinear

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

# PEFT asks a model of transformers for a property that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, STATE = "prilora.json", "prilora_state.safetensors"
RAMP = {"rank_start": 2, "rank_final": 5, "interval": 2, "mode": "hard"}


def bert(**options):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=40,
            max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, n_positions=12, vocab_size=40, bos_token_id=0, eos_token_id=0
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=40
        )
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=40, max_position_embeddings=12,
        )
    )  # fmt: skip


MODELS = {"bert": bert, "gpt2": gpt2, "t5": t5, "llama": llama}


def fresh(make=bert, **options):
    torch.manual_seed(0)
    return make(**options).eval()


def trained(make=bert, *, model=None, seed=0, **options):
    """A handle whose parameters are all as after some training, masks and statistics included."""
    prilora = apply_prilora(model or fresh(make), PRILoRAConfig(**{**RAMP, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in prilora.layers.values():
            layer.lora_b.normal_(std=0.03)
            layer.input_square.uniform_()
            layer.mask.copy_(torch.rand(layer.mask.shape) < 0.7)
        for name in prilora.modules_to_save:
            for parameter in prilora.model.get_submodule(name).parameters():
                parameter.normal_(std=0.5)
    return prilora


@torch.no_grad()
def logits(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (3, 7), generator=generator)
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **decoder).logits


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def in_peft(folder, make=bert, **options):
    return peft.PeftModel.from_pretrained(fresh(make, **options), folder)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def tensors_of(folder):
    return safetensors_torch.load_file(folder / TENSORS)


# To PEFT


@pytest.mark.parametrize("scaling", ["lora", "constant", "rslora"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_peft_loads_it_with_equal_logits(tmp_path, make, scaling):
    prilora = trained(make, scaling=scaling)
    prilora.save_pretrained(tmp_path)
    loaded = in_peft(tmp_path, make)
    assert_close(logits(loaded), logits(prilora.model))
    assert not torch.allclose(logits(loaded), logits(fresh(make)), atol=1e-2)
    for name, layer in prilora.layers.items():
        module = loaded.base_model.model.get_submodule(name)
        assert module.r["default"] == layer.rank
        assert module.scaling["default"] == pytest.approx(layer.scale)
    assert {layer.rank for layer in prilora.layers.values()} == {2, 4, 5}
    assert bool(config_of(tmp_path)["alpha_pattern"]) == (scaling == "constant")
    assert config_of(tmp_path)["fan_in_fan_out"] == (make == gpt2)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(bert, "SEQ_CLS"), (gpt2, "CAUSAL_LM"), (llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")],
    ids=MODELS,
)
def test_peft_takes_it_for_the_task_that_it_is_of(tmp_path, make, kind):
    trained(make).save_pretrained(tmp_path)
    assert config_of(tmp_path)["task_type"] == kind
    assert type(in_peft(tmp_path, make)).__name__ == peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[kind].__name__


def test_each_stack_has_its_ramp(tmp_path):
    trained(t5).save_pretrained(tmp_path)
    ranks = {
        name.removeprefix("base_model.model."): tensor.shape[0]
        for name, tensor in tensors_of(tmp_path).items()
        if "SelfAttention.q.lora_A" in name
    }
    assert list(dict(sorted(ranks.items())).values()) == [2, 5, 2, 4, 5]  # decoder, encoder


def test_all_that_is_trained_is_in_the_file(tmp_path):
    prilora = trained()
    prilora.save_pretrained(tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["bert.pooler", "classifier"]
    model = prilora.model
    model.bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)  # beside PRILoRA, by the user
    nn.init.normal_(model.bert.encoder.layer[1].output.LayerNorm.weight)
    prilora.save_pretrained(tmp_path)
    assert config_of(tmp_path)["modules_to_save"][2:] == ["bert.encoder.layer.1.output.LayerNorm"]
    assert_close(logits(in_peft(tmp_path)), logits(model))
    loaded = load_prilora(fresh(), tmp_path)
    assert torch.equal(logits(loaded.model), logits(model))
    assert set(loaded.modules_to_save) == set(config_of(tmp_path)["modules_to_save"])


def test_what_is_pruned_hard_is_zero_in_the_file(tmp_path):
    prilora = trained()
    prilora.save_pretrained(tmp_path)
    for name, layer in prilora.layers.items():
        a = tensors_of(tmp_path)[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(a, layer.lora_a.detach() * layer.mask) and not layer.mask.all()


@pytest.mark.parametrize("scaling", ["lora", "constant", "rslora"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_uniform_export_has_one_rank_and_no_scale(tmp_path, make, scaling):
    prilora = trained(make, scaling=scaling)
    prilora.save_pretrained(tmp_path)
    prilora.save_pretrained(tmp_path, uniform=True)
    config = config_of(tmp_path)
    assert config["r"] == config["lora_alpha"] == 5 and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not (tmp_path / STATE).exists()
    tensors = tensors_of(tmp_path)
    for name, layer in prilora.layers.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{key}.weight"] for key in "AB")
        assert a.shape[0] == b.shape[1] == 5
        torch.testing.assert_close(b @ a, layer.delta_weight(), rtol=1e-6, atol=1e-7)
        assert not a[layer.rank :].any() and not b[:, layer.rank :].any()
    assert_close(logits(in_peft(tmp_path, make)), logits(prilora.model))
    assert_close(logits(load_prilora(fresh(make), tmp_path).model), logits(prilora.model))


def test_the_adapter_of_a_merged_model_is_saved(tmp_path):
    prilora = trained()
    expected = logits(prilora.model)
    prilora.merge().save_pretrained(tmp_path)
    assert_close(logits(in_peft(tmp_path)), expected)


def test_peft_can_train_it_on_and_we_take_that_again(tmp_path):
    trained(scaling="constant").save_pretrained(tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "peft")
    assert_close(logits(load_prilora(fresh(), tmp_path / "peft").model), logits(model))


class Net(nn.Module):
    """Names that end as others do, and that regular expressions read otherwise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "x(fc": nn.Linear(8, 8)}) for _ in "ab"
        )
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "ab")}
        )
        self.head = nn.Linear(8, 3)
        self.arrowhead = nn.Linear(3, 3)

    def forward(self, x):
        for block in [*self.layers, *self.decoder["layers"]]:
            for layer in block.values():
                x = layer(x).relu()
        return self.arrowhead(self.head(x))


@pytest.mark.parametrize(
    "targets", [r"layers\.\d\.fc", r"decoder\..*fc", [r"x(fc", "decoder.layers.1.fc"], ["fc"], None]
)
@pytest.mark.parametrize("modules_to_save", [["head"], []])
def test_peft_finds_just_what_was_adapted(tmp_path, targets, modules_to_save):
    torch.manual_seed(0)
    prilora = trained(model=Net(), target_modules=targets, modules_to_save=modules_to_save)
    prilora.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, x = peft.PeftModel.from_pretrained(Net(), tmp_path), torch.randn(4, 8)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == set(prilora.layers)
    assert_close(model(x), prilora.model(x))
    torch.manual_seed(0)
    loaded = load_prilora(Net(), tmp_path)
    assert torch.equal(loaded.model(x), prilora.model(x))
    assert loaded.modules_to_save == modules_to_save


def test_a_parameter_for_which_peft_has_no_place_is_named(tmp_path):
    prilora = trained()
    prilora.layers["bert.encoder.layer.0.attention.self.query"].base_layer.bias.requires_grad_(True)
    message = (
        "save_pretrained: trained parameters must be of adapters, or of modules without one, got"
        " bert.encoder.layer.0.attention.self.query.base_layer.bias, for which the files of PEFT have no"
        " place; freeze it, or save the whole model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prilora.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_trained_module_that_peft_takes_for_adapted_ones_is_named(tmp_path):
    class Confused(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

    prilora = trained(model=Confused(), target_modules=["layers.0.fc"], modules_to_save=["head"])
    prilora.modules_to_save.append("fc")
    message = (
        "save_pretrained: modules_to_save, ['head', 'fc'], must not end the names of adapted modules, got the"
        " adapted layers.0.fc, which PEFT would take for one of them; adapt it or train it whole, not both"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prilora.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# And back


def training(prilora):
    parameters = [p for p in prilora.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.01)


def run(prilora, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        ids = torch.randint(1, 40, (4, 6))
        optimizer.zero_grad()
        prilora.model.train()(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"mode": "soft"}, {"scaling": "rslora"}, {"scaling": "constant"}])
def test_training_goes_on_from_a_folder_with_the_same_bits(tmp_path, options):
    """Across an event, and with dropout."""
    config = PRILoRAConfig(**{**RAMP, "dropout": 0.1, "interval": 3, **options})
    straight = apply_prilora(fresh(), config)
    optimizer = training(straight)
    run(straight, optimizer, range(4))
    straight.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    run(straight, optimizer, range(4, 9))

    resumed = load_prilora(fresh(), tmp_path)
    assert resumed.config == config and resumed.steps == 4 and resumed.events == [3]
    optimizer = training(resumed)
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, range(4, 9))
    assert resumed.events == straight.events == [3, 6, 9]
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_config_changes_how_it_is_pruned_on_and_not_the_adapter(tmp_path):
    prilora = trained(scaling="constant", alpha=8.0)
    prilora.save_pretrained(tmp_path)
    config = PRILoRAConfig(
        ratio=0.25, interval=7, dropout=0.2, rank_start=1, alpha=3.0, target_modules="none"
    )
    loaded = load_prilora(fresh(), tmp_path, config=config, automatic=False)
    assert torch.equal(logits(loaded.model), logits(prilora.model))
    assert (loaded.config.ratio, loaded.config.interval, loaded.config.dropout) == (0.25, 7, 0.2)
    assert loaded.config.alpha == 8.0 and loaded.config.scaling == "constant" and not loaded.automatic


PEFT_CONFIGS = {
    "plain": {"target_modules": ["query", "value"]},
    "patterns": {
        "target_modules": ["query", "dense"],
        "rank_pattern": {r"layer\.1\.attention.*": 3, "query": 2, "^bert.encoder.layer.2.output.dense": 6},
        "alpha_pattern": {"layer.2.attention.self.query": 5, "output.dense": 7},
    },
    "rslora": {
        "target_modules": ["key"], "use_rslora": True, "rank_pattern": {"layer.0.attention.self.key": 1},
    },
    "regex": {"target_modules": r".*\.layer\.[02]\..*(query|intermediate\.dense)"},
    "some layers": {"target_modules": ["key", "dense"], "layers_to_transform": [0, 2]},
    "a pattern of layers": {
        "target_modules": ["key"], "layers_to_transform": 1, "layers_pattern": "layer",
    },
    "all": {"target_modules": "all-linear"},
    "exclusions": {"target_modules": ["dense", "key"], "exclude_modules": ["attention.output.dense"]},
    "modules": {"target_modules": ["query"], "modules_to_save": ["pooler", "LayerNorm"]},
}  # fmt: skip


def made_by_peft(folder, make=bert, *, task="SEQ_CLS", **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type=task, **options)
    model = peft.get_peft_model(fresh(make), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_a_folder_of_peft_is_loaded(tmp_path, options):
    model = made_by_peft(tmp_path, **options)
    loaded = load_prilora(fresh(), tmp_path)
    assert_close(logits(loaded.model), logits(model))
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(loaded.layers) == set(adapted)
    for name, module in adapted.items():
        assert loaded.layers[name].rank == module.r["default"]
        assert loaded.layers[name].scale == pytest.approx(module.scaling["default"])
    assert loaded.config.dropout == 0.1 and loaded.steps == 0
    assert "classifier" in loaded.modules_to_save
    run(loaded, training(loaded), range(2))
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(load_prilora(fresh(), tmp_path / "ours").model), logits(loaded.model))
    assert_close(logits(in_peft(tmp_path / "ours")), logits(loaded.model))


@pytest.mark.parametrize(
    ("make", "task", "targets"),
    [
        (gpt2, "CAUSAL_LM", ["c_attn", "c_proj"]),
        (t5, "SEQ_2_SEQ_LM", ["q", "wo"]),
        (llama, "CAUSAL_LM", ["q_proj"]),
    ],
    ids=["gpt2", "t5", "llama"],
)
def test_folders_of_peft_for_other_models_are_loaded(tmp_path, make, task, targets):
    model = made_by_peft(tmp_path, make, task=task, target_modules=targets, fan_in_fan_out=make == gpt2)
    assert_close(logits(load_prilora(fresh(make), tmp_path).model), logits(model))


def test_a_loaded_model_can_be_undone(tmp_path):
    made_by_peft(tmp_path, target_modules=["query"])
    expected = logits(fresh())
    assert torch.equal(logits(load_prilora(fresh(), tmp_path).undo()), expected)


# What is refused


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
    tensors, metadata = folders.read_tensors(ours / STATE)
    state = json.loads(metadata["fastkit.prilora"])

    def write(**changes):
        text = json.dumps({**state, "state": {**state["state"], **changes}})
        folders.write_tensors(ours / STATE, tensors, {"fastkit.prilora": text})
        facts = json.loads((ours / OURS).read_text())
        facts["digests"][STATE] = folders.digest(ours / STATE)
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


# Being stopped


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Stops the program before its n-th change of the disk."""
    left = [math.inf]

    def counted(function):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return run

    for method in ("replace", "rename", "unlink", "rmdir", "mkdir", "write_bytes"):
        monkeypatch.setattr(Path, method, counted(getattr(Path, method)))
    monkeypatch.setattr(folders.os, "fsync", counted(folders.os.fsync))

    def set_to(changes):
        left[0] = changes

    return set_to


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}, {"uniform": True}], ids=["same", "scale", "uniform"])
def test_a_killed_process_leaves_the_old_adapter_or_the_new_one(tmp_path, killed_at, options):
    uniform = options.pop("uniform", False)
    x = torch.randn(5, 8)

    def net():
        torch.manual_seed(0)
        return Net()

    def made(**options):
        return trained(model=net(), target_modules=["fc"], modules_to_save=["head"], **options)

    @torch.no_grad()
    def those(model):
        y = model(x)
        return {i for i, prilora in enumerate(handles) if torch.allclose(y, prilora.model(x), 1e-6, 1e-6)}

    handles = old, _ = made(), made(seed=1, **options)
    seen, refused, done = set(), 0, False
    for changes in itertools.count():
        folder = tmp_path / str(changes)
        old.save_pretrained(folder)
        killed_at(changes)
        with contextlib.suppress(Killed):
            handles[1].save_pretrained(folder, uniform=uniform)
            done = True
        killed_at(math.inf)
        found = those(load_prilora(net(), folder).model)
        assert len(found) == 1, changes
        seen |= found
        try:
            assert len(those(peft.PeftModel.from_pretrained(net(), folder))) == 1, changes
        except ValueError as error:  # of PEFT, for a moment
            assert "Can't find" in str(error)
            refused += 1
        old.save_pretrained(folder)  # whatever is left, the next one is whole
        assert those(load_prilora(net(), folder).model) == {0}
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS, OURS, STATE]
        if done:
            break
    assert seen == {0, 1} and (refused > 0) == bool(options or uniform)
