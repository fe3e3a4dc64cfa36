"""methods.focus: models of transformers, causal to the last bit, saved, trained, compiled, refused."""

import copy
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastkit.methods.focus import (  # noqa: E402
    FocusConfig,
    FocusForCausalLM,
    FocusForSequenceClassification,
    FocusModel,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**changed):
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "qk_size": 8,
        "attn_chunk": 8, "bin_length": 12, "pool": 4, "filter_hidden": 5, "kernel_length": 20,
    }  # fmt: skip
    return FocusConfig(**{**sizes, **changed})


def ids(*shape):
    return torch.randint(0, 20, shape)


# The paper's counts


def matrices(model):
    """The block matrices: q, k, v, the gates, U and the feed-forward layers'."""
    return sum(
        p.numel()
        for name, p in model.layers.named_parameters()
        if p.dim() == 2 and ".filter." not in name and not name.endswith("bias")
    )


def test_the_counts_of_the_paper():
    """Focus-H has 21 million parameters, Focus 22, in a table; 256, 2048 and 1024 are what makes it so."""
    with torch.device("meta"):
        model = FocusModel(FocusConfig())
    assert matrices(model) == 20_971_520
    assert matrices(model) + model.global_conv.kernel.numel() == 22_020_096


# Causality

ARMS = [
    {},
    {"coefficients": "constant"},
    {"share_global_conv": False},
    {"conv_glu": True},
    {"kernel_length": None},
]


def is_causal(model, tokens):
    with torch.no_grad():
        y = model(tokens).logits
        for t in (0, 1, 7, 8, 11, 12, 23, 24, 35):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 7) % 20
            if not torch.equal(model(changed).logits[:, :t], y[:, :t]):
                return False
    return True


@pytest.mark.parametrize("options", ARMS)
def test_causal_to_the_last_bit(options):
    assert is_causal(FocusForCausalLM(config(**options)).eval(), ids(2, 36))


def test_the_published_filter_is_not_causal():
    assert not is_causal(FocusForCausalLM(config(filtering="paper")).eval(), ids(2, 36))


# As transformers' models


@pytest.mark.parametrize(
    "options", [{}, {"position": "rotary", "share_global_conv": False, "first": "learned"}]
)
@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        ("AutoModel", FocusModel),
        ("AutoModelForCausalLM", FocusForCausalLM),
        ("AutoModelForSequenceClassification", FocusForSequenceClassification),
    ],
)
def test_saved_and_loaded(tmp_path, auto, kind, options):
    model = kind(config(**options)).eval()
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert type(loaded) is kind and loaded.config.bin_length == 12
    tokens = ids(2, 30)
    assert torch.equal(model(tokens)[0], loaded(tokens)[0])
    assert set(model.state_dict()) == set(loaded.state_dict())


def test_tied_embeddings(tmp_path):
    model = FocusForCausalLM(config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = FocusForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = FocusForCausalLM(config(tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    model.resize_token_embeddings(25)
    assert model(ids(1, 9)).logits.shape == (1, 9, 25)


def test_begins_as_the_layers_do():
    """The initialisation of transformers leaves that of the layers as it is."""
    model = FocusModel(config())
    layer = model.layers[0].layer
    bound = (3 / (2 * 5 / 4)) ** 0.5
    assert 0.6 * bound < layer.filter.mlp[2].weight.abs().max() <= bound
    assert 0.8 < model.global_conv.kernel.std() < 1.2
    assert layer.query.weight.abs().max() <= (6 / 24) ** 0.5 and layer.query.weight.std() > 0.2
    assert model.layers[0].mlp[0].weight.std() < 0.03
    assert model.embed_tokens.weight.std() < 0.03


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    FocusForCausalLM(config()).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|mismatched|shape"):
        FocusForCausalLM.from_pretrained(tmp_path, hidden_size=24)


@pytest.mark.parametrize("options", [{}, {"share_global_conv": False}])
def test_gradient_checkpointing_changes_no_gradient(options):
    model, tokens = FocusForCausalLM(config(**options)).train(), ids(2, 30)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_labels_give_the_loss():
    model, tokens = FocusForCausalLM(config()).eval(), ids(2, 30)
    labels = tokens.clone()
    labels[:, :5] = -100
    out = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    kept = model(tokens, logits_to_keep=3).logits
    torch.testing.assert_close(kept, out.logits[:, -3:])


def test_hidden_states():
    model, tokens = FocusModel(config()).eval(), ids(2, 30)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert isinstance(model(tokens, return_dict=False), tuple)


@pytest.mark.parametrize("options", [{}, {"share_global_conv": False}, {"coefficients": "constant"}])
def test_padding_from_either_side(options):
    model = FocusForCausalLM(config(**options)).eval()
    tokens, mask = ids(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :13], mask[1, 17:] = 0, 0
    logits = model(tokens, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        alone = model(tokens[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, rtol=1e-4, atol=1e-5)


def test_a_mask_with_a_hole_is_refused():
    mask = torch.ones(1, 9)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match=r"^FocusModel: the padding mask must have one run of tokens"):
        FocusModel(config())(ids(1, 9), attention_mask=mask)


def test_packed_sequences_as_the_collator_packs_them():
    model = FocusForCausalLM(config()).eval()
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [ids(n).tolist() for n in (5, 30, 13)]
    for more in (True, False):
        collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=more)
        batch = collate([{"input_ids": row, "labels": row} for row in rows])
        out = model(**batch)
        expected = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
        torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)


def packed(lengths=(5, 30, 13)):
    rows = [ids(n).tolist() for n in lengths]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    return rows, batch["input_ids"], batch["position_ids"]


def test_packed_sequences_beside_a_mask_that_hides_nothing():
    model, (rows, tokens, places) = FocusForCausalLM(config()).eval(), packed()
    expected = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
    mask = torch.ones_like(tokens)
    logits = model(tokens, mask, position_ids=places).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"^FocusModel: padding_mask and cu_seqlens exclude each other"):
        model(tokens, mask, cu_seq_lens_q=torch.tensor([0, 5, 35, 48]))


def test_position_ids_of_a_padded_row_are_not_those_of_packed_ones():
    model, tokens = FocusForCausalLM(config()).eval(), ids(1, 30)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, mask, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(logits, model(tokens[:, 4:]).logits, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_not_classified():
    model, (_, tokens, places) = FocusForSequenceClassification(config(num_labels=4)), packed()
    for more in ({"position_ids": places}, {"cu_seq_lens_q": torch.tensor([0, 5, 35, 48])}):
        with pytest.raises(ValueError, match=r"^FocusForSequenceClassification: a row must be one sequence"):
            model(tokens, **more)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 25])
def test_any_length(length):
    model, tokens = FocusForCausalLM(config()), ids(2, length)
    out = model(tokens, labels=tokens)
    assert out.logits.shape == (2, length, 20)
    if length > 1:
        out.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classification(pooling):
    model = FocusForSequenceClassification(config(num_labels=4, classifier_pooling=pooling)).eval()
    tokens, mask = ids(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :13], mask[1, 17:] = 0, 0
    out = model(tokens, attention_mask=mask, labels=torch.tensor([0, 3, 1]))
    for row in range(3):
        alone = model(tokens[row : row + 1, mask[row].bool()]).logits
        torch.testing.assert_close(out.logits[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 3, 1]))
    )
    numbers = FocusForSequenceClassification(config(num_labels=1, problem_type="regression"))
    assert numbers(tokens, labels=torch.randn(3)).loss.shape == ()


def test_generates_what_the_logits_say():
    model, tokens = FocusForCausalLM(config()).eval(), ids(2, 5)
    found = model.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0)
    expected = tokens
    for _ in range(10):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


def test_the_published_filter_does_not_generate():
    model = FocusForCausalLM(config(filtering="paper"))
    with pytest.raises(
        ValueError, match=r'^FocusForCausalLM: generate must have config.filtering="recurrence"'
    ):
        model.generate(ids(1, 5), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^FocusForCausalLM: config.causal must be True, got False"):
        FocusForCausalLM(config(causal=False))


@pytest.mark.parametrize("options", [{}, {"coefficients": "constant"}])
def test_compile(options):
    model, tokens = FocusForCausalLM(config(**options)), ids(2, 30)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    losses = []
    for each in (model, compiled):
        loss = each(tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compile_with_inductor():
    model, tokens = FocusForCausalLM(config(num_hidden_layers=1)), ids(2, 30)
    results = []
    for each in (model, torch.compile(copy.deepcopy(model), fullgraph=True)):
        output = each(tokens, labels=tokens)
        results.append([output.logits, *torch.autograd.grad(output.loss, tuple(each.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_refuses_position_ids_of_a_row(run_script):
    """In a process of its own, for dynamo keeps what it was at when the model raises."""
    script = """
import torch
from fastkit.methods.focus import FocusConfig, FocusModel
sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "qk_size": 4}
model = FocusModel(FocusConfig(**sizes, attn_chunk=8, bin_length=8, kernel_length=8))
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
compiled(torch.zeros(1, 10, dtype=torch.long), position_ids=torch.arange(10)[None])
"""
    done = run_script(script)
    assert done.returncode != 0
    assert "FocusModel: a compiled model cannot read position_ids; give cu_seq_lens_q instead" in done.stderr


def test_trainer_learns(tmp_path):
    """To repeat the token of 3 places before, which lies in the chunk for most."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    rows = ids(64, 3).repeat(1, 8)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = FocusForCausalLM(config())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=100, per_device_train_batch_size=16, learning_rate=1e-2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param": "tanh"}, "^AdaptiveIIR: parameterization must be one of"),
        ({"bin_length": 10}, "^AdaptiveIIR: chunk must be a multiple of pool"),
        ({"num_attention_heads": 3}, "^FocusLayer: channels must be a multiple of num_heads"),
        ({"classifier_pooling": "max"}, "classifier_pooling must be mean or last, got 'max'"),
        ({"filtering": "fft"}, "^FocusLayer: filtering must be one of recurrence, paper"),
    ],
)
def test_configs_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        FocusModel(config(**options))


def test_either_tokens_or_embeddings():
    model = FocusModel(config()).eval()
    tokens = ids(2, 9)
    with torch.no_grad():
        assert torch.equal(
            model(tokens).last_hidden_state,
            model(inputs_embeds=model.embed_tokens(tokens)).last_hidden_state,
        )
    for arguments in ({}, {"input_ids": tokens, "inputs_embeds": model.embed_tokens(tokens)}):
        with pytest.raises(ValueError, match=r"^FocusModel: there must be either input_ids or inputs_embeds"):
            model(**arguments)


def test_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FocusForCausalLM(config())(ids(1, 9))
