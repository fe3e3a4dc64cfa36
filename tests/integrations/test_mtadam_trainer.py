"""MTAdamTrainer beside the same loop by hand: what it computes, its checkpoints and options."""

import json

import pytest
import torch
from mtadam_trainers import (
    RATE,
    TERMS,
    Hand,
    MTAdamTrainer,
    Seen,
    accelerate,
    assert_logged,
    assert_same,
    data,
    everything,
    model,
    trained,
    trainer,
    transformers,
    within,
)

from fastkit.optim import MTAdam

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


# What it computes


@pytest.mark.parametrize("options", [{}, {"anchor": "sentence", "amsgrad": True, "max_scale": 10.0}])
def test_it_is_the_loop_by_hand(tmp_path, options):
    net = model(dropout=0.0)
    seen = Seen(net)
    run = trainer(tmp_path, net, mtadam=options or None)
    run.train()
    hand = Hand(seen.batches, **options)
    assert_same(everything(run), everything(hand))
    for number, logs in enumerate(run.state.log_history[:2]):
        assert logs["step"] == 3 * number + 3
        assert_logged(logs, hand.history[3 * number : 3 * number + 3])


def test_both_heads_learn_whatever_the_weights(tmp_path):
    """The sentence has a thousand times the weight of the word."""
    run = trainer(tmp_path, evaluated=data(), max_steps=80, per_device_train_batch_size=10)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    for term in TERMS:
        assert after[f"eval_loss_{term}"] < 0.5 * before[f"eval_loss_{term}"]


def test_accumulation_is_one_step(tmp_path):
    net = model(dropout=0.0)
    seen = Seen(net)
    run = trained(tmp_path, net, gradient_accumulation_steps=4, max_steps=2, logging_steps=1)
    hand = Hand(seen.batches, parts=4)
    assert_same(everything(run), everything(hand))
    for logs, number in zip(run.state.log_history, (0, 4), strict=False):
        assert_logged(logs, [torch.tensor(hand.history[number : number + 4]).sum(0).tolist()])


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path):
    """Of 10 batches 4, 4 and 2, each divided by how many there are."""
    net = model(dropout=0.0)
    options = {"num_train_epochs": 1, "max_steps": -1, "lr_scheduler_type": "constant", "logging_steps": 1}
    run = trained(tmp_path, net, gradient_accumulation_steps=4, **options)
    assert run.state.global_step == 3
    for logs in run.state.log_history[:3]:
        assert 3 < logs["loss_word"] < 4


@pytest.mark.parametrize("parts", [1, 2])
def test_bf16_of_the_trainer(tmp_path, parts):
    net = model(dropout=0.0)
    seen = Seen(net)
    run = trainer(tmp_path, net, bf16=True, gradient_accumulation_steps=parts, max_steps=4)
    run.train()
    hand = Hand(seen.batches, parts, autocast=True)
    assert_same(everything(run), everything(hand), 1e-6)
    assert all(param.dtype == torch.float32 for param in net.parameters())


class WithScaler(MTAdamTrainer):
    """With the GradScaler that accelerate makes for fp16, which it has on a GPU alone."""

    scale = 2.0**8

    def create_optimizer(self, model=None):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=2)
        return super().create_optimizer(model)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_scaler_changes_nothing(tmp_path, parts):
    runs = [
        trainer(tmp_path, model(dropout=0.0), kind, max_steps=4, gradient_accumulation_steps=parts)
        for kind in (MTAdamTrainer, WithScaler)
    ]
    for run in runs:
        run.train()
    assert runs[1].accelerator.scaler.get_scale() == 4 * WithScaler.scale
    assert_same(everything(runs[0]), everything(runs[1]))
    assert all(param.grad is None for param in runs[1].model.parameters())
    for logs, others in zip(*(run.state.log_history[:1] for run in runs), strict=True):
        assert {key: logs[key] for key in logs if "norm" in key or "loss" in key} == {
            key: others[key] for key in others if "norm" in key or "loss" in key
        }


def test_steps_that_overflow_under_a_scaler_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(WithScaler, "scale", 2.0**126)
    net = model()
    before = [param.detach().clone() for param in net.parameters()]
    run = trainer(tmp_path, net, WithScaler, max_steps=3)
    run.train()
    assert run.accelerator.scaler.get_scale() == 2.0**123
    assert all(torch.equal(param, old) for param, old in zip(net.parameters(), before, strict=True))


def test_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = trained(tmp_path), trained(tmp_path, activation_checkpointing=True)
    assert_same(everything(plain), everything(checkpointed), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo, about what it imports
def test_a_compiled_model(tmp_path):
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    net, other = (model(dropout=0.0, layers=1) for _ in range(2))
    plain, compiled = trained(tmp_path, net, max_steps=2), trained(tmp_path, other, max_steps=2, **options)
    assert_same(everything(plain), everything(compiled), 1e-5)


def test_streaming_is_batched(tmp_path):
    options = {"mode": "streaming", "on_nonfinite": "skip_term"}
    runs = [everything(trained(tmp_path, max_steps=3, mtadam=own)) for own in (None, options)]
    for run in runs:
        for key in [key for key in run if ".key.bias" in key]:
            del run[key]  # softmax takes no notice of them: their gradients are roundings, and so their steps
    assert_same(*runs, 1e-5)


# Its checkpoints


class StopAfter(transformers.TrainerCallback):
    """As if it were killed: without a last checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}])
def test_it_goes_on_with_the_same_bits(tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 3, **options}
    straight = trainer(tmp_path / "straight", **options)
    straight.train()
    run = trainer(tmp_path / "stopped", callbacks=[StopAfter(4)], **options)
    run.train()
    resumed = trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert within(resumed).terms == tuple(TERMS)
    assert_same(everything(resumed), everything(straight))
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in r.state.log_history]
        for r in (resumed, straight)
    ]
    assert logs[0] == logs[1]
    json.dumps(logs)


def test_other_terms_are_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match="terms"):
        trainer(tmp_path, terms=TERMS[::-1], **options).train(resume_from_checkpoint=True)


def test_a_training_that_is_stopped_within_a_step_begins_anew(tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=2, callbacks=[StopAfter(1)])
    run.train()
    assert run.state.global_step == 1
    run.pop_callback(StopAfter)
    run.add_callback(StopWithin())
    run.train()
    run.pop_callback(StopWithin)
    run.train()
    assert run.state.global_step == 6


class StopWithin(transformers.TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


# Options


def test_an_optimizer_of_ones_own(tmp_path):
    net = model()
    optimizer = MTAdam(net.parameters(), lr=RATE, terms=TERMS, anchor=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    run = trainer(tmp_path, net, terms=None, optimizers=(optimizer, schedule))
    run.train()
    assert within(run) is optimizer and run.terms == tuple(TERMS) and optimizer.param_groups[0]["lr"] == RATE
    assert optimizer.state[net.word.weight]["step"] == run.state.global_step == 6


def test_options_are_those_of_the_arguments(tmp_path):
    options = {"adam_beta1": 0.8, "adam_epsilon": 1e-6}
    run = trainer(tmp_path, **options)
    decayed, rest = run.create_optimizer().param_groups
    assert decayed["betas"] == (0.8, 0.999, 0.9) and decayed["eps"] == 1e-6 and decayed["lr"] == RATE
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decayed["decoupled_weight_decay"] and rest["decoupled_weight_decay"]
    own = {"betas": (0.5, 0.9, 0.5), "decoupled_weight_decay": False}
    decayed, _ = trainer(tmp_path, mtadam=own, **options).create_optimizer().param_groups
    assert decayed["betas"] == (0.5, 0.9, 0.5) and not decayed["decoupled_weight_decay"]


def test_a_model_that_is_made_anew(tmp_path):
    run = trainer(tmp_path, model_init=lambda: model(), max_steps=3)
    run.train()
    first = everything(run)
    run.train()
    assert_same(first, everything(run))


# accelerate without a Trainer


@pytest.mark.parametrize("parts", [1, 3])
def test_accelerate_alone_in_bf16(parts):
    net, other = model(dropout=0.0), model(dropout=0.0)
    options = {"lr": RATE, "terms": TERMS}
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=parts)
    loader = torch.utils.data.DataLoader(data(24), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(net, MTAdam(net.parameters(), **options), loader)
    reference = MTAdam(other.parameters(), **options)
    for number, batch in enumerate(loader, 1):
        with accelerator.accumulate(prepared):
            for term, loss in prepared(**batch)["losses"].items():
                optimizer.optimizer.backward_term(term, loss / parts)
            optimizer.step()
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = other(**batch)["losses"]
        for term, loss in losses.items():
            reference.backward_term(term, loss / parts)
        if number % parts == 0:
            reference.step()
    assert int(reference.state[other.word.weight]["step"]) == 6 // parts
    for (name, param), twin in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6, msg=name)
