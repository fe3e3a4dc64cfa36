"""apply_prilora: what becomes of the model, all of it or nothing, and the way back."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

from fastkit.methods.prilora import PRILoRA, PRILoRAConfig, apply_prilora, pruning
from fastkit.nn import PRILoRALinear

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(4, 6)


def logits(model):
    return model(input_ids=IDS).logits


def adamw(prilora, lr=0.01):
    return torch.optim.AdamW(prilora.parameters(), lr=lr)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_at_first_it_computes_what_it_did(make_bert):
    model = make_bert()
    before = logits(model)
    prilora = apply_prilora(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert prilora.model is model and isinstance(prilora, PRILoRA)
    assert all(model.get_submodule(name) is layer for name, layer in prilora.layers.items())
    assert "12 layers of ranks 4 to 12, 2 modules in full, 0 steps, 0 events" in repr(prilora)


def test_only_adapters_and_modules_to_save_are_trained(make_bert):
    model = make_bert()
    prilora = apply_prilora(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"{name}.{part}" for name in prilora.layers for part in ("lora_a", "lora_b")}
    heads = {f"{head}.{part}" for head in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")}
    assert trained == expected | heads
    assert {id(p) for p in prilora.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_options_reach_the_layers(make_bert):
    config = PRILoRAConfig(alpha=8, scaling="constant", dropout=0.25, beta=0.5)
    prilora = apply_prilora(make_bert(), config)
    for layer in prilora.layers.values():
        assert (layer.scale, layer.dropout, layer.beta, layer.statistic) == (1.0, 0.25, 0.5, True)


@pytest.mark.parametrize("options", [{"ratio": 0}, {"importance": "magnitude"}, {"importance": "random"}])
def test_squares_are_summed_only_for_what_needs_them(make_bert, train, options):
    prilora = apply_prilora(make_bert(), PRILoRAConfig(interval=2, **options))
    train(prilora.model, adamw(prilora), range(2))
    assert not any(layer.statistic or layer.folds for layer in prilora.layers.values())
    assert prilora.events == ([] if "ratio" in options else [2])


@pytest.mark.parametrize("training", [False, True])
def test_layers_train_as_those_they_replace(make_bert, training):
    prilora = apply_prilora(make_bert().train(training))
    assert {layer.training for layer in prilora.layers.values()} == {training}


def test_undo_gives_the_original_back_bit_for_bit(make_bert, train):
    model = make_bert()
    model.bert.embeddings.requires_grad_(False)
    modules, flags = list(model.named_modules()), [p.requires_grad for p in model.parameters()]
    before, state = logits(model), state_of(model)
    prilora = apply_prilora(model, PRILoRAConfig(interval=2, mode="hard"))
    train(model, adamw(prilora), range(5))
    assert not torch.equal(logits(model), before)
    prilora.merge()
    assert prilora.undo() is model
    assert list(model.named_modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert not prilora.automatic and not vars(model).get("_fastkit_prilora")
    for method in ("undo", "state_dict"):
        with pytest.raises(RuntimeError, match=f"^PRILoRA: {method} needs the model with its adapters"):
            getattr(prilora, method)()
    again = apply_prilora(model)
    assert again.steps == 0 and again.automatic


def test_undo_where_one_layer_is_merged(make_bert):
    model = make_bert()
    before = logits(model)
    prilora = apply_prilora(model)
    next(iter(prilora.layers.values())).merge()
    assert torch.equal(logits(prilora.undo()), before)


def test_what_fails_in_the_middle_changes_nothing(make_bert, monkeypatch):
    model = make_bert()
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    made = []

    class Fails(PRILoRALinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
            if len(made) == 5:
                raise MemoryError("no more")

    monkeypatch.setattr("fastkit.methods.prilora.model.PRILoRALinear", Fails)
    with pytest.raises(MemoryError, match="no more"):
        apply_prilora(model)
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert not pruning._watching


def test_what_cannot_be_trained_changes_nothing(make_bert):
    model = make_bert()
    model.classifier.register_parameter(
        "codes", torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    )
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="floating point"):
        apply_prilora(model)
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert not pruning._watching


def test_merge_and_unmerge(make_bert, train):
    prilora = apply_prilora(make_bert())
    model = prilora.model
    train(model, adamw(prilora), range(3))
    model.eval()
    before, state = logits(model), state_of(model)
    assert prilora.merge() is prilora
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="merged already"):
        prilora.merge()
    assert prilora.unmerge() is prilora
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_if_one_layer_cannot_be_merged_none_is():
    model = nn.Sequential()
    model.layers = nn.ModuleList([nn.Linear(4, 4), Scaled(4, 4)])
    prilora = apply_prilora(model)
    with pytest.raises(RuntimeError, match="the weight of Scaled is not a plain floating-point tensor"):
        prilora.merge(reversible=False)
    assert not any(layer.merged for layer in prilora.layers.values())


def test_conv1d_is_adapted_trained_and_merged():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, pad_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config).eval()
    before = logits(model)
    prilora = apply_prilora(model, PRILoRAConfig(interval=2))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    optimizer = adamw(prilora)
    model.train()
    for _ in range(2):
        logits(model).square().sum().backward()
        optimizer.step()
    assert prilora.events == [2]
    model.eval()
    trained = logits(model)
    prilora.merge()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    prilora.undo()
    assert torch.equal(logits(model), before)


# Copies, and who keeps whom


def test_pruning_goes_on_where_the_handle_is_dropped(make_bert, train):
    model = make_bert()
    apply_prilora(model, PRILoRAConfig(interval=2))
    gc.collect()
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), range(2))
    assert model._fastkit_prilora.events == [2]


def test_the_hook_does_not_keep_the_model(make_bert, train):
    prilora = apply_prilora(make_bert())
    train(prilora.model, adamw(prilora), range(1))
    kept = weakref.ref(prilora.model)
    del prilora
    gc.collect()
    assert kept() is None and not pruning._watching


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_handle_of_its_own(make_bert, train, copied):
    model = make_bert()
    first = apply_prilora(model, PRILoRAConfig(interval=2))
    train(model, adamw(first), range(1))
    other = copied(model)
    second = other._fastkit_prilora
    assert second is not first and second.model is other and second.automatic
    assert all(other.get_submodule(name) is layer for name, layer in second.layers.items())
    train(other, adamw(second), range(1, 2))
    assert (first.steps, second.steps) == (1, 2) and second.events == [2]
    original = make_bert()
    assert torch.equal(logits(second.undo()), logits(original))
    assert first.automatic and isinstance(model.bert.encoder.layer[0].output.dense, PRILoRALinear)


# What is refused


def test_a_second_adapter_is_refused(make_bert):
    model = make_bert()
    prilora = apply_prilora(model)
    message = (
        "apply_prilora: model must have no adapters yet, got bert.encoder.layer.0.attention.self.query, a"
        " PRILoRALinear; there is one adapter a model: call undo() of the first, or merge it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_prilora(model)
    assert vars(model)["_fastkit_prilora"] is prilora


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_peft_are_refused(make_bert):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_bert(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    for given, found in ((model, "a model, a PeftModel"), (model.base_model.model, "query, a Linear")):
        with pytest.raises(ValueError, match=f"{found}[A-Za-z]* of PEFT; use attach_prilora, or unload"):
            apply_prilora(given)


def test_a_wrapped_model_is_refused(make_bert):
    message = (
        "apply_prilora: model must not be wrapped yet, got a DataParallel; call it with model.module, and"
        " wrap that after"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_prilora(nn.DataParallel(make_bert()))


def test_types_are_refused(make_bert):
    with pytest.raises(TypeError, match=r"^apply_prilora: model must be a torch\.nn\.Module, got str$"):
        apply_prilora("bert")
    with pytest.raises(TypeError, match=r"^apply_prilora: config must be a PRILoRAConfig, got dict$"):
        apply_prilora(make_bert(), {"ratio": 0.5})
