"""PRILoRACallback: a Trainer that prunes, is stopped and goes on, without a call of its user's."""

import shutil
import warnings

import pytest
import torch

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora, load_prilora
from fastkit.nn import PRILoRALinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from fastkit.integrations.transformers import PRILoRACallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
CONFIG = PRILoRAConfig(rank_start=2, rank_final=4, interval=4, mode="hard", dropout=0.1)
STATE = "prilora_state.safetensors"


def bert(dropout=0.1):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
            max_position_embeddings=12, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def lora():
    options = {"target_modules": ["query", "value", "dense"], "lora_dropout": 0.1, "task_type": "SEQ_CLS"}
    return peft.get_peft_model(bert(), peft.LoraConfig(r=3, **options))


def data(examples=40):
    ids = torch.randint(1, 40, (examples, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def trainer(out, callback, model=None, evaluated=None, **options):
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "seed": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.Trainer(
        model=bert() if model is None else model,
        args=transformers.TrainingArguments(str(out), **{**settings, **options}),
        train_dataset=data(),
        eval_dataset=evaluated,
        callbacks=[callback],
    )


def assert_same_bits(a, b):
    assert a.steps == b.steps and a.events == b.events
    for key, value in a.state_dict()["tensors"].items():
        assert torch.equal(value, b.state_dict()["tensors"][key]), key
    others = b.model.state_dict()
    for key, value in a.model.state_dict().items():
        assert torch.equal(value, others[key]), key


def test_it_adapts_the_model_and_prunes_it_without_a_call(tmp_path):
    callback = PRILoRACallback(CONFIG)
    run = trainer(tmp_path, callback)
    prilora = callback.prilora
    assert prilora.model is run.model and isinstance(
        run.model.bert.encoder.layer[0].output.dense, PRILoRALinear
    )
    run.train()
    assert prilora.steps == 12 and prilora.events == [4, 8, 12]
    assert all((~layer.mask).float().mean() == 0.5 for layer in prilora.layers.values())
    prilora.save_pretrained(tmp_path / "adapter")
    ids = torch.ones(2, 6, dtype=torch.long)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_it_goes_on_with_the_same_bits(tmp_path, mode):
    """Across the event after step 8."""
    config = PRILoRAConfig(**{**CONFIG.to_dict(), "mode": mode})
    straight = PRILoRACallback(config)
    trainer(tmp_path / "straight", straight).train()
    stopped = PRILoRACallback(config)
    run = trainer(tmp_path / "stopped", stopped)
    run.add_callback(StopAfter(7))
    run.train()
    assert stopped.prilora.steps == 7
    assert (tmp_path / "stopped" / "checkpoint-6" / STATE).is_file()
    assert not list((tmp_path / "stopped").glob("*.safetensors*"))
    resumed = PRILoRACallback(config)
    trainer(tmp_path / "stopped", resumed).train(resume_from_checkpoint=True)
    assert straight.prilora.events == [4, 8, 12]
    assert_same_bits(resumed.prilora, straight.prilora)


class StopAfter(transformers.TrainerCallback):
    """As if it were killed: without a last checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_peft_model_is_attached_to_and_goes_on_with_the_same_bits(tmp_path):
    config = PRILoRAConfig(rank_start=2, rank_final=4, interval=4, mode="hard")
    straight = PRILoRACallback(config)
    trainer(tmp_path / "straight", straight, lora()).train()
    assert straight.prilora.events == [4, 8, 12]
    assert straight.prilora.model.peft_config["default"].rank_pattern
    run = trainer(tmp_path / "stopped", PRILoRACallback(config), lora())
    run.add_callback(StopAfter(7))
    run.train()
    resumed = PRILoRACallback(config)
    trainer(tmp_path / "stopped", resumed, lora()).train(resume_from_checkpoint=True)
    assert_same_bits(resumed.prilora, straight.prilora)
    load_prilora(bert(), tmp_path / "stopped" / "checkpoint-12")  # a folder of PEFT


def test_gradient_accumulation_is_one_step(tmp_path):
    config = PRILoRAConfig(rank_start=2, rank_final=4, interval=4)
    results = []
    for batch in (4, 1):
        callback = PRILoRACallback(config)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        model = bert(dropout=0.0)
        trainer(tmp_path, callback, model, max_steps=5, save_strategy="no", optim="sgd", **options).train()
        results.append(callback.prilora)
    whole, cut = results
    assert whole.steps == cut.steps == 5 and whole.events == cut.events == [4]
    for name, layer in whole.layers.items():
        other = cut.layers[name]
        torch.testing.assert_close(layer.input_square, other.input_square, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.lora_a, other.lora_a, rtol=1e-3, atol=1e-5)
        assert int(layer.folds) == int(other.folds) == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain, checkpointed = PRILoRACallback(CONFIG), PRILoRACallback(CONFIG)
    trainer(tmp_path, plain, max_steps=5, save_strategy="no").train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about the names of these options
        trainer(tmp_path, checkpointed, max_steps=5, save_strategy="no", **options).train()
    assert checkpointed.prilora.events == [4]
    for name, layer in plain.prilora.layers.items():
        other = checkpointed.prilora.layers[name]
        torch.testing.assert_close(layer.lora_a, other.lora_a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.input_square, other.input_square, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.mask, other.mask)


def test_the_best_model_has_its_own_state(tmp_path):
    callback = PRILoRACallback(CONFIG)
    worst_is_best = {"metric_for_best_model": "loss", "greater_is_better": True}
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6, **worst_is_best}
    run = trainer(tmp_path, callback, evaluated=data(8), **options)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    assert callback.prilora.steps == 6 and callback.prilora.events == [4]


def test_a_handle_may_be_given(tmp_path):
    prilora = apply_prilora(bert(), CONFIG)
    for callback in (PRILoRACallback(prilora), PRILoRACallback()):
        run = trainer(tmp_path, callback, prilora.model, max_steps=2, save_strategy="no")
        assert callback.prilora is prilora and run.model is prilora.model
    callback = PRILoRACallback()
    trainer(tmp_path, callback)
    assert callback.prilora.config == PRILoRAConfig()


# Being stopped


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before the Trainer's checkpoint", "before its own"])
def test_a_process_that_is_killed_while_it_saves_can_be_resumed(tmp_path, moment, monkeypatch):
    """From whichever checkpoint the Trainer has whole, also where it keeps one alone."""
    straight = PRILoRACallback(CONFIG)
    trainer(tmp_path / "straight", straight).train()
    run = trainer(tmp_path / "killed", PRILoRACallback(CONFIG), save_steps=3, save_total_limit=1)

    def killed(*args, **kwargs):
        if run.state.global_step >= 6:
            raise Killed
        return before(*args, **kwargs)

    owner, method = (run, "_save_checkpoint") if "Trainer" in moment else (PRILoRACallback, "on_save")
    before = getattr(owner, method)
    monkeypatch.setattr(owner, method, killed)
    with pytest.raises(Killed):
        run.train()
    monkeypatch.undo()
    [checkpoint] = (tmp_path / "killed").glob("checkpoint-*")
    assert checkpoint.name == ("checkpoint-3" if "Trainer" in moment else "checkpoint-6")
    resumed = PRILoRACallback(CONFIG)
    trainer(tmp_path / "killed", resumed, save_steps=3).train(resume_from_checkpoint=True)
    assert_same_bits(resumed.prilora, straight.prilora)
    assert (checkpoint / STATE).is_file() and not list((tmp_path / "killed").glob("*.safetensors*"))


def test_it_resumes_from_a_folder_that_was_moved(tmp_path):
    trainer(tmp_path / "first", PRILoRACallback(CONFIG), max_steps=6).train()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "first" / "checkpoint-6", moved)
    with pytest.raises(ValueError, match="must have a state of PRILoRA, got none of"):
        trainer(tmp_path / "second", PRILoRACallback(CONFIG)).train(resume_from_checkpoint=str(moved))
    callback = PRILoRACallback(CONFIG, resume_from=moved)
    trainer(tmp_path / "second", callback).train(resume_from_checkpoint=str(moved))
    assert callback.prilora.events == [4, 8, 12]


def test_a_state_of_another_run_is_not_taken(tmp_path):
    trainer(tmp_path / "first", PRILoRACallback(CONFIG), max_steps=6).train()
    trainer(tmp_path / "second", PRILoRACallback(CONFIG), max_steps=6, seed=4).train()
    checkpoint = tmp_path / "first" / "checkpoint-6"
    with pytest.raises(ValueError, match="must have a state of PRILoRA, got that of other adapters"):
        trainer(tmp_path / "second", PRILoRACallback(CONFIG)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE).write_bytes((checkpoint / STATE).read_bytes()[:-5])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        trainer(tmp_path / "first", PRILoRACallback(CONFIG)).train(resume_from_checkpoint=True)


# What it says


def test_it_warns_when_nothing_is_pruned(tmp_path):
    callback = PRILoRACallback(CONFIG)
    run = trainer(tmp_path, callback, save_strategy="no")
    callback.prilora.close()
    message = (
        r"^PRILoRACallback: A must have been pruned after step 4 of the optimizer, got no such event in 8"
        r" steps, of which PRILoRA has seen 0; see that the optimizer is a torch\.optim\.Optimizer that holds"
        r" the adapters, close\(\) was not called, and the layers are in training mode$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        run.train()
    assert len([w for w in caught if "PRILoRACallback" in str(w.message)]) == 1


def test_it_warns_when_the_layers_are_in_eval(tmp_path):
    callback = PRILoRACallback(CONFIG)
    run = trainer(tmp_path, callback, save_strategy="no")
    run.add_callback(InEval())
    message = r"got no such event in 8 steps, of which PRILoRA has seen 8; .* layers are in training mode$"
    with pytest.warns(UserWarning, match=message):
        run.train()
    assert callback.prilora.events == []


class InEval(transformers.TrainerCallback):
    """The model stays in eval, where the Trainer would have it in training mode before each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        model = kwargs["model"]
        model.train = lambda mode=True: type(model).train(model, False)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.0}, {"start": 9}])
def test_it_does_not_warn_where_nothing_is_amiss(tmp_path, options):
    config = PRILoRAConfig(**{**CONFIG.to_dict(), **options})
    trainer(tmp_path, PRILoRACallback(config), max_steps=11, save_strategy="no").train()


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^PRILoRACallback: prilora must be a PRILoRAConfig or the handle"):
        PRILoRACallback({"ratio": 0.5})
    with pytest.raises(
        ValueError, match=r"^PRILoRACallback: prilora must be the handle of the Trainer's model"
    ):
        trainer(tmp_path, PRILoRACallback(apply_prilora(bert(), CONFIG)))
    run = trainer(tmp_path, PRILoRACallback(CONFIG))
    run.optimizer = torch.optim.SGD(bert().parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"^PRILoRACallback: the optimizer must hold parameters of the adapters"
    ):
        run.train()
    run = transformers.Trainer(
        model_init=lambda: bert(),
        args=run.args,
        train_dataset=data(),
        callbacks=[PRILoRACallback(CONFIG)],
    )
    with pytest.raises(
        ValueError, match=r"^PRILoRACallback: the Trainer's model must be the one that was adapted"
    ):
        run.train()


def test_a_checkpoint_without_adapters_is_refused(tmp_path):
    trainer(tmp_path, StopAfter(99), max_steps=6, save_only_model=True).train()
    with pytest.raises(ValueError, match="must have a state of PRILoRA, got none of"):
        trainer(tmp_path, PRILoRACallback(CONFIG)).train(resume_from_checkpoint=True)
