"""EliminationCallback: a Trainer whose heads go, that goes on where it was stopped, and takes the best."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkit.integrations.transformers import EliminationCallback  # noqa: E402
from fastkit.methods.multiverse import (  # noqa: E402
    HeadEliminator,
    MultiverseConfig,
    MultiverseForSequenceClassification,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]
OPTIONS = {"policy": "fraction", "fraction": 0.25, "interval": 3, "start": 3, "stop": 12}
STEPS = 12


def model_of(dropout=0.1):
    torch.manual_seed(0)
    base = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40,
        max_position_embeddings=12, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return MultiverseForSequenceClassification(MultiverseConfig(base=base, num_labels=2, num_heads=12))


def data(examples=48):
    ids = torch.randint(1, 40, (examples, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def trainer(out, callback, model=None, **options):
    settings = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "weight_decay": 0.1, "seed": 3, "report_to": [], "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return transformers.Trainer(
        model=model_of() if model is None else model,
        args=transformers.TrainingArguments(str(out), **{**settings, **options}),
        train_dataset=data(),
        eval_dataset=data(16),
        callbacks=[] if callback is None else [callback],
    )


def assert_same_bits(one, other):
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_heads_go_as_the_losses_say(tmp_path, accumulation):
    """An eliminator of one's own, fed with what a hook sees, drops the same heads."""
    callback = EliminationCallback(**OPTIONS)
    run = trainer(
        tmp_path,
        callback,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
    )
    model = run.model
    seen, expected = [], []
    own = HeadEliminator(12, total_steps=STEPS, **OPTIONS)
    model.register_forward_hook(
        lambda module, args, found: seen.append((found.head_losses, found.correct, found.count))
    )

    class Replay(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert len(seen) == accumulation
            while seen:
                own.add(*seen.pop(0))
            dropped = own.step()
            if dropped:
                expected.append((state.global_step, dropped))

    run.add_callback(Replay())
    run.train()
    assert callback.events == expected and [step for step, _ in expected] == [3, 6, 9, 12]
    gone = [head for _, heads in expected for head in heads]
    assert len(gone) == 3 + 2 + 1 + 1 and model.head.num_active == 5
    assert not model.head.active[gone].any() and not model.head.weight[gone].any()
    assert torch.equal(model.head.active, callback.eliminator.active)
    kept = model.head.active
    torch.testing.assert_close(model.head.scores[kept], callback.eliminator.scores()[kept].float())
    metrics = run.evaluate()
    assert metrics["eval_loss"] > 0


def test_micro_batches_train_as_the_joint_batch(tmp_path):
    """The loss is a mean: a Trainer that took it for a sum would step twice as far."""
    weights = []
    for accumulation in (1, 2):
        options = {
            "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation,
            "max_steps": 1, "optim": "sgd", "weight_decay": 0.0, "learning_rate": 1.0, "max_grad_norm": 0.0,
        }  # fmt: skip
        run = trainer(tmp_path, None, model_of(dropout=0.0), **options)
        begun = run.model.head.weight.detach().clone()
        run.train()
        weights.append(run.model.head.weight.detach() - begun)
    assert weights[0].abs().max() > 1e-4
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-7)


def test_a_run_that_is_resumed_drops_the_same_heads(tmp_path):
    straight = EliminationCallback(**OPTIONS)
    run = trainer(tmp_path / "straight", straight)
    run.train()
    stopped = trainer(tmp_path / "stopped", EliminationCallback(**OPTIONS))
    stopped.add_callback(StopAfter(5))
    stopped.train()
    for restores in (False, True):  # the Trainer may make the callback anew
        callback = EliminationCallback(**OPTIONS)
        resumed = trainer(tmp_path / "stopped", callback, restore_callback_states_from_checkpoint=restores)
        resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
        (callback,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, EliminationCallback))
        assert callback.events == straight.events and len(callback.events) == 4
        assert_same_bits(resumed.model, run.model)
        assert torch.equal(callback.eliminator.scores(), straight.eliminator.scores())


class StopAfter(transformers.TrainerCallback):
    """As if it were killed: without a last checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_the_best_models_mask_comes_back(tmp_path):
    run = trainer(
        tmp_path, EliminationCallback(**OPTIONS), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=4, metric_for_best_model="eval_score", greater_is_better=True,
    )  # fmt: skip
    scores = iter([0.9, 0.5, 0.4])
    run.compute_metrics = lambda found: {"score": next(scores)}
    run.train()
    assert run.state.best_global_step == 4
    assert run.model.head.num_active == 9  # after the check of step 3 alone
    best = MultiverseForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_bits(run.model, best)


def test_scores_of_a_development_set_may_decide(tmp_path):
    """The Trainer evaluates after the check of a step: that of the next evaluation uses what it found."""
    callback = EliminationCallback(**{**OPTIONS, "score": "dev", "start": 6})

    class Scores(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            assert torch.equal(callback.eliminator.active, kwargs["model"].head.active)
            callback.eliminator.add_dev_scores(torch.linspace(0.9, 0.1, 12))  # the last heads are the worst

    run = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=3)
    run.add_callback(Scores())
    run.train()
    assert callback.events == [(6, [11, 10, 9]), (9, [8, 7]), (12, [6])]


def test_a_loss_that_is_not_the_models_is_refused(tmp_path):
    """The heads would be trained by their mean alone, and none of them judged."""

    def mean_logits_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    message = "forward must get labels in each step, got none in step 1; leave out label_smoothing_factor and"
    with pytest.raises(ValueError, match=f"EliminationCallback: {message} compute_loss_func"):
        trainer(tmp_path / "a", EliminationCallback(**OPTIONS), label_smoothing_factor=0.1).train()
    run = trainer(tmp_path / "b", EliminationCallback(**OPTIONS))
    run.compute_loss_func = mean_logits_loss
    with pytest.raises(ValueError, match=message):
        run.train()


def test_in_half_precision_and_compiled_the_same_heads_go(tmp_path):
    events = []
    for name, options in (
        ("plain", {}),
        ("checkpoints", {"gradient_checkpointing": True}),
        ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        ("half", {"bf16": True}),
    ):
        callback = EliminationCallback(**OPTIONS)
        run = trainer(tmp_path / name, callback, save_strategy="no", **options)
        run.train()
        assert run.model.head.num_active == 5 and not run.model.head.weight[~run.model.head.active].any()
        assert run.evaluate()["eval_loss"] > 0
        events.append(callback.events)
    assert events[0] == events[1] == events[2] and len(events[3]) == 4


def test_under_lora(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["head"])
    callback = EliminationCallback(**OPTIONS)
    run = trainer(tmp_path, callback, peft.get_peft_model(model_of(), lora))
    run.train()
    head = run.model.base_model.model.head
    assert head.num_active == 5 and torch.equal(head.active, callback.eliminator.active)
    assert not head.weight[~head.active].any()
    again = EliminationCallback(**OPTIONS)
    resumed = trainer(tmp_path, again, peft.get_peft_model(model_of(), lora))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.events == callback.events
    assert_same_bits(resumed.model, run.model)


def test_stock_metrics_see_the_logits_alone(tmp_path):
    shapes = []
    run = trainer(tmp_path, None)
    run.compute_metrics = lambda found: shapes.append(found.predictions.shape) or {}
    run.evaluate()
    assert shapes == [(16, 2)]


def test_what_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match="num_heads is that of the model and the run, got one more; leave it out"
    ):
        EliminationCallback(num_heads=3)
    with pytest.raises(ValueError, match="HeadEliminator: margin must be finite and not negative, got -1"):
        EliminationCallback(margin=-1)
    with pytest.raises(TypeError, match="HeadEliminator: min_heads must be an integer, got '2'"):
        EliminationCallback(min_heads="2")
    with pytest.raises(ValueError, match="HeadEliminator: stop must leave a check, got stop=5"):
        EliminationCallback(stop=5)  # which no run has, as the interval is 10 at least
    for allowed in ({"stop": 100}, {"start": 50}, {"interval": 2}, {"stop": None, "start": 3}):
        EliminationCallback(**allowed)  # a run may be of any length
    plain = transformers.BertForSequenceClassification(model_of().config.base)
    with pytest.raises(ValueError, match="the model must be a MultiverseForSequenceClassification, got Bert"):
        trainer(tmp_path / "a", EliminationCallback(**OPTIONS), plain).train()
    trainer(tmp_path / "b", None).train()
    with pytest.raises(
        ValueError, match="the checkpoint of step 8 must have a state of this callback, got none"
    ):
        trainer(tmp_path / "b", EliminationCallback(**OPTIONS)).train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8")
        )
    state = json.loads((tmp_path / "b" / "checkpoint-8" / "trainer_state.json").read_text())
    assert "EliminationCallback" not in state["stateful_callbacks"]
