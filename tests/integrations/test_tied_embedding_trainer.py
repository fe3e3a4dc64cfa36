"""A patched causal language model in the Trainer of transformers, beside one that is not."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkit.methods.tied_embedding import assert_tied, patch_causal_lm, unpatch_causal_lm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

V = 40


def model():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": V}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **tokens, **dropouts, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config)


def data():
    """Rows with a column that no forward takes, and with different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, V, (32, 10), generator=generator)
    labels = rows.clone()
    for number, row in enumerate(labels):
        row[: number % 8] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]


def run(folder, net, **options):
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=net, args=args, train_dataset=data(), eval_dataset=data()[:8])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def test_it_trains_as_without(tmp_path):
    """With accumulation, in which the Trainer divides by the tokens of all batches of a step."""
    net, counted = patch_causal_lm(model()), []
    net.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs.get("num_items_in_batch")), with_kwargs=True
    )
    patched, own = run(tmp_path, net), run(tmp_path, model())
    assert len(counted) == 12 and counted[0] == counted[1] != counted[2]  # those of a step
    for mine, theirs in zip(patched.state.log_history, own.state.log_history, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for p, q in zip(patched.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_tied(patched.model)
    evaluated, expected = patched.evaluate(), own.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_label_smoothing_of_the_trainer_is_not_ignored(tmp_path):
    """It takes the labels away and asks for logits, which the model gives."""
    patched = run(tmp_path, patch_causal_lm(model()), label_smoothing_factor=0.2)
    own = run(tmp_path, model(), label_smoothing_factor=0.2)
    assert patched.state.log_history[0]["loss"] == own.state.log_history[0]["loss"]
    for p, q in zip(patched.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_half_precision_of_the_trainer(tmp_path):
    patched = run(tmp_path, patch_causal_lm(model()), bf16=True)
    own = run(tmp_path, model(), bf16=True)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (patched, own)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_accelerate_takes_off_what_it_put_on_and_no_more():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(patch_causal_lm(model()))
    given = {key: rows[None] for key, rows in data()[0].items()}
    assert prepared(**given).logits is None
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped(**given).logits is None
    assert unpatch_causal_lm(unwrapped)(**given).logits is not None
