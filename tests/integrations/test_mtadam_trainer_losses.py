"""Where MTAdamTrainer finds the losses of a batch, and what it says of them in evaluation and in the log."""

import pytest
import torch
from mtadam_trainers import (
    TERMS,
    Hand,
    MTAdamTrainer,
    Seen,
    TwoHeads,
    assert_same,
    data,
    everything,
    model,
    trained,
    trainer,
    transformers,
    within,
)
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


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
