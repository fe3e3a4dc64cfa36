"""attach_prilora: the LoRA of PEFT, ramped and pruned in place."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora, attach_prilora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).view(4, 6)
ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]


@pytest.fixture
def with_lora(make_bert):
    def made(layers=2, **options):
        config = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "SEQ_CLS", **options}
        model = peft.get_peft_model(make_bert(layers), peft.LoraConfig(**config))
        torch.manual_seed(1)
        return model

    return made


def logits(model):
    model.eval()
    return model(input_ids=IDS).logits


def adamw(model, lr=0.01):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def ranks(model):
    return {
        name.rpartition("base_model.model.")[2]: module.lora_A["default"].weight.shape[0]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def refused(message, kind=ValueError):
    return pytest.raises(kind, match=f"^{re.escape(f'attach_prilora: {message}')}$")


def test_the_ramp_and_what_peft_knows_of_it(with_lora):
    model = with_lora(layers=3)
    before = logits(model)
    attached = attach_prilora(model)
    found = ranks(model)
    assert len(found) == 18 and list(found) == list(attached.layers)
    for name, rank in found.items():
        assert rank == (4, 8, 12)[int(re.search(r"layer\.(\d)", name)[1])] == attached.layers[name].rank
        layer = attached.layers[name].module
        assert layer.r["default"] == rank and layer.scaling["default"] == 16 / rank
    assert model.peft_config["default"].rank_pattern == found
    assert not model.peft_config["default"].alpha_pattern
    assert torch.equal(logits(model), before)  # B is zero
    assert model.base_model.peft_config is model.peft_config


@pytest.mark.parametrize(
    ("options", "scaling", "expected"),
    [
        ({"use_rslora": True}, "rslora", lambda rank: 16 / math.sqrt(rank)),
        ({}, "constant", lambda rank: 2.0),
        ({"alpha_pattern": {"query": 4}}, "lora", lambda rank: None),
    ],
)
def test_scalings(with_lora, options, scaling, expected):
    model = with_lora(**options)
    attached = attach_prilora(model, PRILoRAConfig(scaling=scaling))
    for name, layer in attached.layers.items():
        value = expected(layer.rank) or (4 if "query" in name else 16) / layer.rank
        assert layer.scale == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("options", [{}, {"scaling": "constant"}, {"ranks": {"query": 3}}])
def test_peft_saves_and_loads_what_was_ramped_and_trained(with_lora, make_bert, train, tmp_path, options):
    model = with_lora()
    attached = attach_prilora(model, PRILoRAConfig(interval=2, **options))
    train(model, adamw(model), range(5))
    assert attached.events == [2, 4]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_bert(), tmp_path)
    assert ranks(loaded) == ranks(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_it_trains_as_prilora_itself(make_bert, with_lora, train, mode):
    """From the same A: the same statistics, masks and, but for rounding, weights."""
    config = PRILoRAConfig(interval=2, mode=mode)
    model = with_lora()
    attached = attach_prilora(model, config)
    ours = apply_prilora(make_bert(), config)
    assert ours.modules_to_save == ["bert.pooler", "classifier"]
    for name, layer in ours.layers.items():
        layer.lora_a.data.copy_(attached.layers[name].lora_a.data)
    ours.model.bert.pooler.requires_grad_(False)
    optimizers = [
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        for each in (model, ours.model)
    ]
    for number in range(5):
        for each, optimizer in zip((model, ours.model), optimizers, strict=True):
            train(each, optimizer, [number])
        for name, layer in ours.layers.items():
            other = attached.layers[name]
            torch.testing.assert_close(other.input_square, layer.input_square, rtol=1e-4, atol=1e-5)
            assert torch.equal(other.lora_a == 0, layer.lora_a == 0) and torch.equal(other.mask, layer.mask)
            torch.testing.assert_close(other.lora_a, layer.lora_a, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(other.lora_b, layer.lora_b, rtol=1e-3, atol=1e-5)
    assert attached.events == ours.events == [2, 4] and attached.owners == ours.owners


def test_dropout_autocast_and_disabled_adapters(with_lora, train):
    model = with_lora(lora_dropout=0.5)
    attached = attach_prilora(model, PRILoRAConfig(interval=2))
    layer = next(iter(attached.layers.values()))
    with model.disable_adapter():
        model.train()(input_ids=IDS)
    model.eval()(input_ids=IDS)
    assert not layer.square_sum.any()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        train(model, adamw(model), range(2))
    assert attached.events == [2] and layer.input_square.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(with_lora, train, reentrant):
    found = []
    for checkpointed in (False, True):
        model = with_lora()
        attached = attach_prilora(model)
        if checkpointed:
            model.base_model.model.config.use_cache = False
            model.base_model.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        train(model, adamw(model), range(2))
        found.append([layer.input_square for layer in attached.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.out(torch.tanh(self.query(x)) * self.key(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_counts():
    lora = peft.LoraConfig(target_modules=["query", "key", "out"])
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(Attention()), lora)
        attached = attach_prilora(model, PRILoRAConfig(interval=2, rank_start=2, rank_final=4))
        assert [layer.rank for layer in attached.layers.values()] == [3, 3, 3]  # in no block: the mean
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = adamw(model)
        for number in range(3):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        assert attached.events == [2] and list(attached.owners.values()) == ["0.query", "0.query", "0.out"]
        found.append([layer.input_square for layer in attached.layers.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_conv1d():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, pad_token_id=0
    )
    lora = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="SEQ_CLS")
    model = peft.get_peft_model(transformers.GPT2ForSequenceClassification(config), lora)
    attached = attach_prilora(model, PRILoRAConfig(interval=1))
    model.train()(input_ids=IDS).logits.square().sum().backward()
    adamw(model).step()
    assert attached.events == [1] and [layer.rank for layer in attached.layers.values()] == [4] * 3 + [12] * 3


# Back, copies, and going on


def test_undo_gives_peft_back(with_lora, train):
    model = with_lora(rank_pattern={"query": 5})
    attach_prilora(model).undo()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, modules, given = ranks(model), list(model.modules()), model.peft_config["default"]
    attached = attach_prilora(model, PRILoRAConfig(interval=2))
    train(model, adamw(model), range(3))
    assert ranks(model) != before
    assert attached.undo() is model and ranks(model) == before and list(model.modules()) == modules
    assert model.peft_config["default"] is given and given.rank_pattern == {"query": 5}
    lora = {name for name in state if "lora_" in name}
    assert lora and all(torch.equal(model.state_dict()[name], state[name]) for name in lora)
    assert not attached.automatic and not any(layer._forward_pre_hooks for layer in model.modules())
    with pytest.raises(RuntimeError, match=r"^AttachedPRILoRA: undo needs the model with its adapters"):
        attached.undo()


def test_undo_of_ranks_that_stayed(with_lora, train):
    model = with_lora()
    uniform = PRILoRAConfig(interval=1, rank_start=8, rank_final=8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    attached = attach_prilora(model, uniform)
    train(model, adamw(model), range(2))
    attached.undo()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_counts_for_itself(with_lora, train, copied):
    model = with_lora()
    first = attach_prilora(model, PRILoRAConfig(interval=2))
    other = copied(model)
    second = other._fastkit_prilora
    train(other, adamw(other), range(2))
    assert (first.steps, second.steps) == (0, 2)
    assert not any(layer.square_sum.any() for layer in first.layers.values())
    assert all(int(layer.folds) == 2 for layer in second.layers.values())


def test_resume(with_lora, train):
    def made():
        model = with_lora()
        return attach_prilora(model, PRILoRAConfig(interval=3, mode="hard")), adamw(model)

    straight, optimizer = made()
    train(straight.model, optimizer, range(7))
    first, optimizer = made()
    train(first.model, optimizer, range(4))
    state, of_model, of_optimizer = copy.deepcopy(
        (first.state_dict(), first.model.state_dict(), optimizer.state_dict())
    )
    resumed, optimizer = made()
    resumed.model.load_state_dict(of_model)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(of_optimizer)
    train(resumed.model, optimizer, range(4, 7))
    assert resumed.events == straight.events == [3, 6]
    tensors = resumed.state_dict()["tensors"]
    assert all(torch.equal(t, tensors[name]) for name, t in straight.state_dict()["tensors"].items())


def test_the_manual_form(with_lora, train):
    model = with_lora()
    attached = attach_prilora(model, PRILoRAConfig(interval=2), automatic=False)
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    assert attached.steps == 0
    train(model, optimizer, range(2), step=lambda: (optimizer.step(), attached.step()))
    assert attached.events == [2]


# What is refused, with nothing changed


def test_a_ramp_is_refused_once_b_is_not_zero_and_pruning_is_not(with_lora, train):
    model = with_lora()
    train(model, adamw(model), range(1))
    before = ranks(model)
    with refused(
        "ranks must not change once B is not zero, got bert.encoder.layer.0.attention.self.query with rank 8;"
        " attach before training, or give the ranks that it has"
    ):
        attach_prilora(model)
    assert ranks(model) == before and not model.peft_config["default"].rank_pattern
    attached = attach_prilora(model, PRILoRAConfig(rank_start=8, rank_final=8, interval=1))
    train(model, adamw(model), range(1))
    assert attached.events == [1]


def parts(model):
    """What PEFT keeps of each layer."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    return [dict(getattr(layer, part)) for layer in layers for part in ("r", "lora_alpha", "scaling")]


def test_a_scale_is_kept_once_b_is_not_zero(with_lora, train):
    model = with_lora(rank_pattern={r"layer\.0\..*": 4, r"layer\.1\..*": 12})
    assert set(ranks(model).values()) == {4, 12}
    constant, name = PRILoRAConfig(scaling="constant"), "bert.encoder.layer.0.attention.self.query"
    attach_prilora(model, constant).undo()  # B is zero
    train(model, adamw(model), range(1))
    before, kept, lora = logits(model), parts(model), copy.deepcopy(model.peft_config)
    with refused(
        f"{name} must keep its scale once B is not zero, got scale 4 for config's 2; use"
        ' scaling="lora", or attach before training'
    ):
        attach_prilora(model, constant)
    assert torch.equal(logits(model), before) and parts(model) == kept and model.peft_config == lora
    attach_prilora(model).undo()
    assert torch.equal(logits(model), before)
    layer = model.get_base_model().get_submodule(name)
    layer.scale_layer(0.5)
    with refused(
        f"{name} must keep its scale once B is not zero, got scale 2 for config's 4; call its"
        " unscale_layer(), or attach before training"
    ):
        attach_prilora(model)
    assert layer.scaling["default"] == 2.0
    layer.unscale_layer()
    attached = attach_prilora(model)
    assert torch.equal(logits(model), before) and layer._forward_pre_hooks and attached.automatic


def test_alphas_by_name_are_refused_with_one_scale_for_all(with_lora, make_bert, train, tmp_path):
    model, config = with_lora(alpha_pattern={"query": 4}), PRILoRAConfig(scaling="constant")
    kept, lora = parts(model), copy.deepcopy(model.peft_config)
    with refused(
        'alpha_pattern must be left out with scaling="constant", which sets alpha, got'
        " {'query': 4}; make the LoRA without, or use scaling=\"lora\""
    ):
        attach_prilora(model, config)
    assert parts(model) == kept and model.peft_config == lora and set(ranks(model).values()) == {8}
    first = with_lora()
    attach_prilora(first, config)
    train(first, adamw(first), range(1))
    first.save_pretrained(tmp_path)  # with the alphas that config gives
    again = peft.PeftModel.from_pretrained(make_bert(), tmp_path)
    before, kept = logits(again), parts(again)
    attach_prilora(again, config)
    assert torch.equal(logits(again), before) and parts(again) == kept


def test_a_ramp_is_refused_once_an_optimizer_holds_the_parameters(with_lora):
    model = with_lora()
    optimizer = adamw(model)
    with refused(
        "ranks must not change once an optimizer holds A and B, got a AdamW with those of"
        " bert.encoder.layer.0.attention.self.query; attach before the optimizer is made",
        RuntimeError,
    ):
        attach_prilora(model)
    del optimizer
    attach_prilora(model)


@pytest.mark.parametrize(
    ("lora", "config", "message"),
    [
        (
            {"use_dora": True},
            {},
            "peft_model must be a plain LoRA, got use_dora=True; make it with use_dora=False",
        ),
        (
            {},
            {"target_modules": ["query"]},
            "target_modules must be left to PEFT, got ('query',); it is that of the LoraConfig",
        ),
        ({}, {"dropout": 0.1}, "dropout must be left to PEFT, got 0.1; it is that of the LoraConfig"),
        (
            {},
            {"alpha": 4.0},
            "alpha must be left to PEFT, got 4 with lora_alpha=16; leave it out",
        ),
        (
            {"use_rslora": True},
            {},
            "scaling must be \"rslora\" with use_rslora=True, and only then, got 'lora' with use_rslora=True",
        ),
        (
            {},
            {"ranks": {"query": 17}},
            "ranks must be at most 16 for bert.encoder.layer.0.attention.self.query, the least of its"
            " in_features and out_features, got 17",
        ),
        (
            {},
            {"ranks": {"kye": 2}},
            "ranks must be of modules that are adapted, got kye, which matches none; the nearest are key",
        ),
        (
            {"target_modules": ["query", "word_embeddings"]},
            {},
            "peft_model must have LoRA of linear layers alone, got bert.embeddings.word_embeddings, a"
            " Embedding of PEFT; leave it out of target_modules",
        ),
        (
            {"init_lora_weights": "eva"},
            {},
            "init_lora_weights must be True or \"gaussian\" where ranks change, got 'eva'; make the LoRA with"
            " one of those",
        ),
    ],
)
def test_refusals(with_lora, lora, config, message):
    if lora.get("init_lora_weights") == "eva":
        model = with_lora()
        model.peft_config["default"].init_lora_weights = "eva"
    else:
        model = with_lora(**lora)
    before, modules = copy.deepcopy(model.peft_config), list(model.modules())
    with refused(message):
        attach_prilora(model, PRILoRAConfig(**config))
    assert list(model.modules()) == modules and model.peft_config == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_models_are_refused(with_lora, make_bert):
    with refused(
        "peft_model must be a model with an adapter of PEFT, got BertForSequenceClassification; use"
        " apply_prilora for a model without",
        TypeError,
    ):
        attach_prilora(make_bert())
    model = with_lora()
    model.add_adapter("other", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with refused(
        "peft_model must have one adapter, got 2 (default, other); attach before others are added, or delete"
        " them"
    ):
        attach_prilora(model)
    model = peft.get_peft_model(make_bert(), peft.IA3Config(target_modules=["key"], feedforward_modules=[]))
    with refused("peft_model must have a LoRA, got IA3; only LoRA has an A to prune"):
        attach_prilora(model)
    model = with_lora()
    attach_prilora(model)
    with refused("peft_model must not be attached to already; call undo() of its handle first"):
        attach_prilora(model)
    model = with_lora()
    model.merge_adapter()
    with refused(
        "peft_model must not be merged, got bert.encoder.layer.0.attention.self.query, which is; unmerge it"
        " first"
    ):
        attach_prilora(model)
    with refused("config must be a PRILoRAConfig, got dict", TypeError):
        attach_prilora(model, {})
