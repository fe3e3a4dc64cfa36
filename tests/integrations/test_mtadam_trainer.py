"""MTAdamTrainer: a BERT with two heads in a Trainer, beside the same loop by hand."""

import inspect
import json

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from fastkit.integrations.transformers import MTAdamTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
TERMS = ["word", "sentence"]
RATE = 1e-2


@pytest.fixture(autouse=True)
def one_process(monkeypatch, one_thread):
    """No logging to elsewhere, no progress bars; and accelerate as if it were new."""
    monkeypatch.setenv("WANDB_DISABLED", "true")
    transformers.utils.logging.set_verbosity_error()
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
        state._reset_state()


class TwoHeads(transformers.BertPreTrainedModel):
    """Of each sequence, whether its first word is odd, and every word again."""

    accepts_loss_kwargs = False
    weights = (1.0, 1000.0)

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.word = nn.Linear(config.hidden_size, config.vocab_size)
        self.sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, word_labels=None, sentence_labels=None):
        out = self.bert(input_ids=input_ids)
        words, sentence = self.word(out.last_hidden_state), self.sentence(out.pooler_output)
        losses = None
        if word_labels is not None:
            losses = {
                "word": self.weights[0] * nn.functional.cross_entropy(words.mT, word_labels),
                "sentence": self.weights[1] * nn.functional.cross_entropy(sentence, sentence_labels),
            }
        return self.output(losses, words, sentence)

    def output(self, losses, words, sentence):
        return {"losses": losses, "words": words, "sentence_logits": sentence}


def model(kind=TwoHeads, dropout=0.1, layers=2):
    torch.manual_seed(0)
    return kind(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
            vocab_size=30, max_position_embeddings=8,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def data(examples=40):
    ids = torch.randint(1, 30, (examples, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "word_labels": row, "sentence_labels": int(row[0]) % 2} for row in ids]


def arguments(out, **options):
    settings = {
        "max_steps": 6,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "logging_steps": 3,
        "seed": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(out), **{**settings, **options})


def trainer(out, net=None, kind=MTAdamTrainer, evaluated=None, rows=None, terms=TERMS, args=None, **options):
    """Options of MTAdamTrainer, or of its arguments."""
    names = [*inspect.signature(transformers.Trainer).parameters, "losses", "mtadam"]
    own = {name: options.pop(name) for name in names if name in options}
    return kind(
        model=model() if net is None and "model_init" not in own else net,
        args=arguments(out, **options) if args is None else args,
        train_dataset=data() if rows is None else rows,
        eval_dataset=evaluated,
        terms=terms,
        **own,
    )


def trained(out, *args, **options):
    """A Trainer that has trained: the seed of dropout is that of its making."""
    run = trainer(out, *args, **options)
    run.train()
    return run


def within(run):
    """The MTAdam of a Trainer, or of the loop by hand."""
    return getattr(run.optimizer, "optimizer", run.optimizer)


def everything(run):
    """Parameters and state."""
    optimizer = within(run)
    found = {}
    for name, param in run.model.named_parameters():
        found[name] = param.detach().clone()
        for key, entry in optimizer.state.get(param, {}).items():
            found[f"{name}: {key}"] = entry.clone()
    return found


def assert_same(a, b, tolerance=None):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if tolerance is None:
            assert torch.equal(value, b[key]), key
        else:
            torch.testing.assert_close(
                value, b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


class Seen:
    """The batches that a model is trained on."""

    def __init__(self, net):
        self.batches = []
        net.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, net, args, kwargs):
        if net.training:
            self.batches.append(kwargs)


class Hand:
    """The same training without a Trainer: AdamW's groups, a linear schedule, accumulation."""

    def __init__(self, batches, parts=1, net=None, autocast=False, **options):
        self.model = model(dropout=0.0) if net is None else net
        self.history = []  # of each batch, by term
        named = list(self.model.named_parameters())
        rest = [p for name, p in named if "bias" in name or "LayerNorm" in name]
        decayed = [p for name, p in named if not any(p is q for q in rest)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest}]
        self.optimizer = MTAdam(groups, lr=RATE, terms=TERMS, decoupled_weight_decay=True, **options)
        schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, 0, len(batches) // parts)
        self.model.train()
        for number, batch in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = self.model(**batch)["losses"]
            self.history.append([0.0 if loss is None else loss.item() / parts for loss in losses.values()])
            for term, loss in losses.items():
                self.optimizer.backward_term(term, None if loss is None else loss / parts)
            if number % parts == 0:
                self.optimizer.step()
                schedule.step()


def assert_logged(logs, rows):
    """Of one log: the means over its steps, each a list of what the terms are."""
    means = torch.tensor(rows).mean(0).tolist()
    assert [logs[f"loss_{term}"] for term in TERMS] == pytest.approx(means, rel=1e-5)
    assert logs["loss"] == pytest.approx(sum(means), rel=1e-5)


def test_its_signature_is_as_it_was():
    """What users write down, as of the rest in ``tests/test_public_api.py``, which needs no transformers."""
    assert [str(parameter) for parameter in inspect.signature(MTAdamTrainer).parameters.values()] == [
        "*args: 'Any'",
        "terms: 'Sequence[str] | None' = None",
        "losses: 'str | None' = None",
        "mtadam: 'Mapping[str, Any] | None' = None",
        "**kwargs: 'Any'",
    ]


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


# Where the losses are


class InLoss(TwoHeads):
    def output(self, losses, words, sentence):
        return {"loss": losses, "words": words, "sentence_logits": sentence}


class InFields(TwoHeads):
    def output(self, losses, words, sentence):
        return {**(losses or {}), "words": words, "sentence_logits": sentence}


class Elsewhere(TwoHeads):
    """Beside what is no loss, and what has no gradient."""

    def output(self, losses, words, sentence):
        if losses is not None:
            losses = {"accuracy": 0.5, **losses}
        return {"loss_dict": losses, "loss": torch.zeros(()), "words": words, "sentence_logits": sentence}


class ByMethod(MTAdamTrainer):
    """Whose losses are none of the model's."""

    def compute_losses(self, model, inputs, num_items_in_batch=None):
        output = model(**inputs)
        return {"other": None, **output["losses"]}, output


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (InLoss, {}),
        (InFields, {}),
        (Elsewhere, {"losses": "loss_dict"}),
        (TwoHeads, {"kind": ByMethod}),
        (TwoHeads, {"compute_loss_func": lambda output, labels, num_items_in_batch: output["losses"]}),
    ],
)
def test_all_places_of_the_losses_give_the_same(tmp_path, net, options):
    common = {"evaluated": data(10), "compute_metrics": shapes}
    run = trained(tmp_path, **common)
    other = trained(tmp_path, model(net), **common, **options)
    assert_same(everything(run), everything(other))
    metrics = run.evaluate()
    assert metrics["eval_shapes"] == [[10, 6, 30], [10, 2]]
    others = other.evaluate()
    for key in ("eval_loss", "eval_loss_word", "eval_loss_sentence", "eval_shapes"):
        assert metrics[key] == others[key]


def shapes(predictions):
    """No losses are among them."""
    return {"shapes": [list(logits.shape) for logits in predictions.predictions]}


def test_losses_that_are_fields_of_a_model_of_transformers(tmp_path):
    """One of the two is None in evaluation, and so is not in the keys of the output."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=8, num_labels=1
    )
    ids = torch.randint(1, 30, (12, 2, 6))
    last = torch.tensor([5, 5])
    rows = [
        {"input_ids": row, "mc_token_ids": last, "labels": row, "mc_labels": n % 2}
        for n, row in enumerate(ids)
    ]
    few = [{key: row[key] for key in row if key != "mc_labels"} for row in rows[:5]]
    run = trainer(
        tmp_path,
        transformers.GPT2DoubleHeadsModel(config),
        rows=rows,
        evaluated=few,
        terms=["loss", "mc_loss"],
        label_names=["labels"],
    )
    run.train()
    logs = run.state.log_history[0]
    assert (
        logs["loss"] == pytest.approx(logs["loss_loss"] + logs["loss_mc_loss"]) and logs["loss_mc_loss"] > 0.1
    )
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_loss"], rel=1e-6)
    assert "eval_loss_mc_loss" not in metrics


def test_the_losses_of_object_detection(tmp_path):
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=[16, 16],
        patch_size=8, num_detection_tokens=4, num_labels=3, use_mid_position_embeddings=False,
    )  # fmt: skip
    rows = [
        {
            "pixel_values": torch.randn(3, 16, 16),
            "labels": {"class_labels": torch.tensor([n % 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])},
        }
        for n in range(8)
    ]
    run = trainer(
        tmp_path,
        transformers.YolosForObjectDetection(config),
        rows=rows,
        terms=["loss_ce", "loss_bbox", "loss_giou"],
        losses="loss_dict",
        data_collator=lambda rows: {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        },
        remove_unused_columns=False,
        max_steps=20,
        logging_steps=10,
    )
    run.train()
    first, second = run.state.log_history[:2]
    assert second["loss_loss_bbox"] < first["loss_loss_bbox"]
    assert second["loss_loss_giou"] < first["loss_loss_giou"]


class EverySecond(TwoHeads):
    """The sentence has a loss in every second batch."""

    calls = 0

    def output(self, losses, words, sentence):
        self.calls += 1
        if self.calls % 2 and losses is not None:
            losses = {**losses, "sentence": None}
        return super().output(losses, words, sentence)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_term_that_is_none_in_a_batch(tmp_path, parts):
    net = model(EverySecond, dropout=0.0)
    seen = Seen(net)
    run = trainer(tmp_path, net, gradient_accumulation_steps=parts, logging_steps=6)
    run.train()
    hand = Hand(seen.batches, parts, model(EverySecond, dropout=0.0))
    assert_same(everything(run), everything(hand))
    sums = torch.tensor(hand.history).sum(0) / 6
    assert run.state.log_history[0]["loss_sentence"] == pytest.approx(sums[1].item(), rel=1e-5)


def test_losses_over_all_labels_of_a_step_are_added_up_as_they_are(tmp_path):
    """By how many there are the function divides, so that parts of different sizes count as they should."""

    def func(output, labels, num_items_in_batch):
        flat = output["words"].flatten(0, 1)
        of_word = nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum")
        odd = nn.functional.cross_entropy(output["sentence_logits"], labels[:, 0] % 2, reduction="sum")
        return {"word": of_word / num_items_in_batch, "sentence": odd / num_items_in_batch}

    rows = [{"input_ids": row["input_ids"], "labels": row["word_labels"]} for row in data()]
    runs = [
        trainer(
            tmp_path,
            model(dropout=0.0),
            rows=rows,
            compute_loss_func=func,
            label_names=["labels"],
            max_steps=3,
            **parts,
        )
        for parts in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    ]
    for run in runs:
        run.train()
    assert_same(*(dict(run.model.named_parameters()) for run in runs), 1e-4)
    losses = [run.state.log_history[0] for run in runs]
    assert losses[0]["loss_word"] == pytest.approx(losses[1]["loss_word"], rel=1e-4)


# Evaluation and logs


def test_evaluation_is_over_examples(tmp_path):
    """Of 10 examples in batches of 4 the last has 2."""
    run = trainer(tmp_path, evaluated=data(10), per_device_eval_batch_size=4)
    metrics = run.evaluate()
    with torch.no_grad():
        whole = run.model.eval()(**torch.utils.data.default_collate(data(10)))["losses"]
    for term in TERMS:
        assert metrics[f"eval_loss_{term}"] == pytest.approx(whole[term].item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(whole.values()).item(), rel=1e-5)
    assert run.predict(data(10)).metrics["test_loss_word"] == metrics["eval_loss_word"]


def test_the_best_model_by_a_term(tmp_path):
    of_word = {"metric_for_best_model": "eval_loss_word", "greater_is_better": False}
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, evaluated=data(10), load_best_model_at_end=True, **of_word, **steps)
    run.train()
    best = min(row["eval_loss_word"] for row in run.state.log_history if "eval_loss_word" in row)
    assert run.state.best_metric == best == run.evaluate()["eval_loss_word"]


def test_norms_are_logged(tmp_path):
    """In the place of that of ``p.grad``, where there is none."""
    run = trainer(tmp_path, max_steps=3)
    run.train()
    logs = run.state.log_history[0]
    assert "grad_norm" not in logs
    optimizer = within(run)
    norms = [optimizer.grad_norms(param) for param in run.model.parameters()]
    for term in TERMS:
        joint = torch.stack([of_param[term] for of_param in norms if of_param]).norm()
        assert logs[f"grad_norm_{term}"] == pytest.approx(joint.item(), rel=1e-5)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite(tmp_path, filtered):
    """Its step is skipped; and in the log it is left out, if the Trainer is to do so."""
    net = model(Broken)
    before = [param.detach().clone() for param in net.parameters()]
    run = trainer(tmp_path, net, max_steps=3, logging_nan_inf_filter=filtered)
    run.train()
    assert all(torch.equal(param, old) for param, old in zip(net.parameters(), before, strict=True))
    logs = run.state.log_history[0]
    assert (logs["loss_sentence"] == 0) == filtered
    assert 3 < logs["loss_word"] < 4


class Broken(TwoHeads):
    weights = (1.0, float("inf"))


# Options


def test_an_optimizer_of_ones_own(tmp_path):
    net = model()
    optimizer = MTAdam(net.parameters(), lr=RATE, terms=TERMS, anchor=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    run = trainer(tmp_path, net, terms=None, optimizers=(optimizer, schedule))
    run.train()
    assert within(run) is optimizer and run.terms == tuple(TERMS) and optimizer.param_groups[0]["lr"] == RATE
    assert_same(everything(run), everything(run))


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


# What is refused


def replaced(run, **attributes):
    """The class, as if accelerate or the machine had said so."""

    class Replaced(run):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            for name, value in attributes.items():
                setattr(self, name, value)

    return Replaced


class Overridden(MTAdamTrainer):
    def compute_loss(self, *args, **kwargs):
        raise AssertionError


REFUSED = {
    "no terms": ({"terms": None}, ValueError, "terms must name the losses, got None"),
    "a name": ({"terms": "word"}, TypeError, "terms must be a list of the losses' names, got 'word'"),
    "a count": ({"terms": 2}, TypeError, "terms must be a list of the losses' names, got 2"),
    "empty": ({"terms": []}, ValueError, r"terms must be one or more different names, got \[\]"),
    "twice": ({"terms": ["a", "a"]}, ValueError, "terms must be one or more different names, got"),
    "options": ({"mtadam": ["anchor"]}, TypeError, "mtadam must be a dict of options, got list"),
    "lr": ({"mtadam": {"lr": 1.0}}, ValueError, "mtadam must not have 'lr'; give it as args.learning_rate"),
    "terms in options": ({"mtadam": {"terms": TERMS}}, ValueError, "mtadam must not have 'terms'; give"),
    "a class": (
        {"optimizer_cls_and_kwargs": (MTAdam, {})},
        ValueError,
        "optimizer_cls_and_kwargs must be None, got a class; pass MTAdam's options as mtadam=",
    ),
    "optim": ({"optim": "adafactor"}, ValueError, "args.optim must be left as it is, .* got 'adafactor'"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor must be 0, got 0.1"),
    "signals": ({"enable_jit_checkpoint": True}, ValueError, "enable_jit_checkpoint must be False, got True"),
    "reentrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        ValueError,
        "use_reentrant must be False in checkpointing, got True",
    ),
    "overridden": ({"kind": Overridden}, ValueError, "compute_loss must not be overridden, .*_losses"),
    "DeepSpeed": (
        {"kind": replaced(MTAdamTrainer, is_deepspeed_enabled=True)},
        ValueError,
        "each process must have the whole model and its own gradients, got DeepSpeed; train on one device",
    ),
    "FSDP": (
        {"kind": replaced(MTAdamTrainer, is_fsdp_enabled=True)},
        ValueError,
        "each process must have the whole model and its own gradients, got FSDP; train on one device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)  # by which enable_jit_checkpoint would go
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^MTAdamTrainer: .*{message}"):
        trainer(tmp_path, **options)


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"^MTAdamTrainer: .* got torch\.nn\.DataParallel over 2 devices; train on"
    ):
        trainer(tmp_path, args=args)


def test_optimizers_that_are_refused(tmp_path):
    net = model()
    params = list(net.parameters())
    for optimizer, options, error, message in [
        (torch.optim.AdamW(params), {}, TypeError, "optimizers must have an MTAdam, got AdamW"),
        (MTAdam(params), {}, ValueError, "the MTAdam of optimizers= must know its terms"),
        (MTAdam(params, terms=2), {}, ValueError, "terms must be those of the optimizer, 0, 1, got word,"),
        (MTAdam(params, terms=TERMS), {"mtadam": {}}, ValueError, "mtadam must be None beside optimizers="),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"^MTAdamTrainer: {message}"):
            trainer(tmp_path, net, optimizers=(optimizer, None), **options)


def test_streaming_with_accumulation_is_refused(tmp_path):
    options = {"mode": "streaming", "on_nonfinite": "skip_term"}
    run = trainer(tmp_path, mtadam=options, gradient_accumulation_steps=2)
    with pytest.raises(
        ValueError, match=r"^MTAdamTrainer: mode must be batched with gradient accumulation, got"
    ):
        run.train()


class Tuple(TwoHeads):
    def output(self, losses, words, sentence):
        return losses, words


class Single(TwoHeads):
    def output(self, losses, words, sentence):
        return {"loss": losses["word"], "words": words}


class Rows(TwoHeads):
    def output(self, losses, words, sentence):
        return {"losses": {"word": losses["word"].expand(4), "sentence": 0.0}}


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (Tuple, {}, TypeError, "the model's output must be a dict or a ModelOutput, got tuple; return one"),
        (Single, {}, ValueError, "losses must have all terms, word, sentence, got loss, words; give None"),
        (Single, {"losses": "loss"}, TypeError, "losses must be a dict by term, got Tensor; return one from"),
        (
            Single,
            {"losses": "parts"},
            ValueError,
            "losses must be a field of the model's output, got 'parts'",
        ),
        (
            TwoHeads,
            {"terms": [*TERMS, "size"]},
            ValueError,
            "losses must have all terms, .*, size, got word, sen",
        ),
        (Rows, {}, TypeError, r"the loss of term 'word' must be a scalar tensor or None, got shape \(4,\)"),
        (
            Rows,
            {"terms": ["sentence"]},
            TypeError,
            "the loss of term 'sentence' must be a scalar .* got float",
        ),
    ],
)
def test_losses_that_are_refused(tmp_path, net, options, error, message):
    with pytest.raises(error, match=f"^MTAdamTrainer: {message}"):
        trainer(tmp_path, model(net), **options).train()


def test_a_norm_to_clip_to_warns(tmp_path):
    with pytest.warns(
        UserWarning, match=r"^MTAdamTrainer: max_grad_norm 0\.5 has no effect: .*; set it to 0$"
    ):
        trainer(tmp_path, max_grad_norm=0.5)


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
