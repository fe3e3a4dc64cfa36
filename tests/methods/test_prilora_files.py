"""Folders of adapters: what PEFT makes of ours, and what becomes of PEFT's."""

import copy
import re

import pytest
import torch
from prilora_folders import (
    MODELS,
    RAMP,
    STATE,
    Net,
    assert_close,
    bert,
    config_of,
    fresh,
    gpt2,
    in_peft,
    llama,
    logits,
    made_by_peft,
    peft,
    run,
    t5,
    tensors_of,
    trained,
    training,
)
from torch import nn

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora, load_prilora

# PEFT asks a model of transformers for a property that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
