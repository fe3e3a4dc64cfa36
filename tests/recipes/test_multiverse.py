"""run multiverse: arms differ in what they are said to, labels of other sets, and what a folder holds."""

import json
import random
import re

import numpy as np
import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.recipes import _glue, _multiverse_transfer, _tokens, multiverse
from fastkit.recipes._encoder import encoder, write_random
from fastkit.recipes._finetuning import TaskTokens
from fastkit.recipes._multiverse_transfer import Transfer

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "transformers", "tokenizers"):
    pytest.importorskip(package)

CPU = torch.device("cpu")
OPTIONS = {
    "steps": 40,
    "every": 20,
    "tokens": 128,
    "heads": 16,
    "lr": 0.02,
    "margin": 0.01,
    "policy": "fraction",
}
TINY = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]


def folder_of(folder, classes, parts, seed=0):
    """Pairs of sentences; the label says whether both are about the same, and of three how far apart."""
    folder.mkdir()
    draw = random.Random(seed)
    topics = ("sun", "rain", "snow")
    for part, count in parts.items():
        lines = ["sentence1\tsentence2\tlabel"]
        for i in range(count):
            label = i % classes
            one = draw.randrange(3)
            other = (one + label) % 3
            first, second = (" ".join([topics[t]] * draw.randint(1, 8)) for t in (one, other))
            lines.append(f"{first}\t{second}\t{label}")
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        "two": folder_of(folder / "two", 2, {"train": 60, "dev": 20}),
        "three": folder_of(folder / "three", 3, {"train": 30, "dev": 12, "test": 18}, 1),
        "also": folder_of(folder / "also", 2, {"train": 16, "dev": 8}, 2),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory, sets):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "small"
    write_random(folder, _glue.load(sets["two"]).train.first)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(encoder(str(folder)).tokenizer), **sizes)).save_pretrained(folder)
    return str(folder)


def arguments(sets, model, out, *more):
    return [
        "run", "multiverse", "--data", str(sets["two"]), "--model", model, *TINY, "--threads", "1",
        "--transfer", str(sets["three"]), str(sets["also"]), "--out", str(out), *map(str, more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sets, model):
    out = tmp_path_factory.mktemp("multiverse") / "out"
    assert main(arguments(sets, model, out, "--seeds", 3, 5, "--sweep", 4, 24)) == 0
    return out


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


# Other sets


def test_labels_of_two_and_three_classes_are_joined():
    part = _glue.Part(["a"] * 4, ["b"] * 4, np.array([0, 1, 2, 2]))
    three, two = Transfer("x", part, 3), Transfer("y", part._replace(y=np.array([0, 1, 1, 0])), 2)
    # Of three: neutral and contradiction together are beyond entailment where neither is alone.
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.9, 0.05, 0.05]]).log()
    assert three.accuracy(logits) == 0.75
    assert two.accuracy(logits) == 0.75  # the first is said to be not entailed
    binary = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]]).log()
    assert three.accuracy(binary) == 0.75  # labels 1 and 2 are one
    assert two.accuracy(binary) == 1.0
    shares = _multiverse_transfer.joined(logits.exp(), 1)
    torch.testing.assert_close(shares, torch.tensor([[0.3, 0.7], [0.8, 0.2], [0.3, 0.7], [0.05, 0.95]]))


def named(folder, labels, **parts):
    """Pairs whose labels have names."""
    folder.mkdir()
    for part, rows in {"train": labels, "dev": labels, **parts}.items():
        lines = ["sentence1\tsentence2\tlabel", *(f"sun\train\t{label}" for label in rows)]
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_of_labels_with_names_that_is_kept_which_both_have(tmp_path):
    """In the order of the alphabet entailment is the first of two, and the second of three."""
    two = named(tmp_path / "two", ["entailment", "not_entailment"])
    three = named(tmp_path / "three", ["entailment", "neutral", "contradiction"])
    (other,) = _multiverse_transfer.load([three], _glue.load(two), 10)
    assert other.accuracy(torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.3, 0.7]]).log()) == 1
    assert other.accuracy(torch.tensor([[0.2, 0.8], [0.8, 0.2], [0.7, 0.3]]).log()) == 0
    (other,) = _multiverse_transfer.load([two], _glue.load(three), 10)
    # Of contradiction, entailment, neutral: the first and the third are what is not entailed.
    assert other.accuracy(torch.tensor([[0.2, 0.6, 0.2], [0.3, 0.4, 0.3]]).log()) == 1
    assert other.accuracy(torch.tensor([[0.3, 0.4, 0.3], [0.2, 0.6, 0.2]]).log()) == 0


def test_of_matched_and_mismatched_parts_the_first_is_taken(tmp_path):
    labels = ["0", "1", "2"]
    mnli = named(tmp_path / "mnli", labels * 3, dev_matched=labels, dev_mismatched=labels * 2)
    (mnli / "dev.tsv").unlink()
    (other,) = _multiverse_transfer.load([mnli], _glue.load(named(tmp_path / "two", ["0", "1"])), 10)
    assert len(other.part.y) == 3


def test_the_test_part_is_taken_or_what_there_is(sets):
    task = _glue.load(sets["two"])
    found = _multiverse_transfer.load([sets["three"], sets["also"]], task, 10)
    assert [(each.name, len(each.part.y), each.classes) for each in found] == [
        ("three", 10, 3),
        ("also", 8, 2),
    ]
    assert found[0].part.first == _glue.load(sets["three"]).held_out["test"].first[:10]


def test_other_sets_that_do_not_go_with_it_are_refused(sets, tmp_path):
    task = _glue.load(sets["two"])
    for folder, message in (
        (folder_of(tmp_path / "five", 5, {"train": 20, "dev": 10}), "or be of two where that is of three"),
        (sets["two"], "must be other sets than --data, each once, got two again"),
        (
            named(tmp_path / "names", ["yes", "no", "maybe"]),
            "must have a label in common with --data, 0, 1, and one alone, or numbers as it has, got .* with"
            " maybe, no, yes; rename its labels",
        ),
        (
            tmp_path / "nowhere",
            "--transfer must be a folder, got nothing there: .*; give the folder that holds",
        ),
    ):
        with pytest.raises(Refusal, match=message):
            _multiverse_transfer.load([folder], task, 10)
    single = tmp_path / "single"
    single.mkdir()
    for part in ("train", "dev"):
        (single / f"{part}.tsv").write_text("sentence\tlabel\nsun\t0\nrain\t1\n")
    with pytest.raises(Refusal, match="--transfer must have pairs of sentences as --data has"):
        _multiverse_transfer.load([single], task, 10)


# Arms


def test_arms_differ_in_what_they_are_said_to(sets, model):
    task, base = _glue.load(sets["two"]), encoder(model)
    config = {**multiverse._DEFAULTS, **OPTIONS, "length": 32, "ortho": "huber", "policy": "margin"}
    data = multiverse.Data(TaskTokens(task, base, model, config, CPU), [])
    made = {}
    for name, arm in multiverse.ARMS.items():
        torch.manual_seed(7)
        training = multiverse.Training(arm, 16, base, data, seed=1, config=config, device=CPU)
        head = training.model.head
        made[name] = (head.num_heads, head.ortho, training.eliminator.policy)
        assert training.eliminator.margin == 0.01 and training.eliminator.total_steps == 40
        assert [list(batch) for batch in training.batches] == [
            list(batch) for batch in _tokens.plan(data.task.train.lengths, 128, 40, 1)
        ]
    assert made == {
        "one": (1, None, "none"),
        "heads": (16, None, "none"),
        "orthogonal": (16, "huber", "none"),
        "multiverse": (16, "huber", "margin"),
    }


def test_the_loss_of_training_is_that_of_the_heads_that_were_trained(sets, model):
    task, base = _glue.load(sets["two"]), encoder(model)
    config = {**multiverse._DEFAULTS, **OPTIONS, "length": 32, "ortho": "abs"}
    data = multiverse.Data(TaskTokens(task, base, model, config, CPU), [])
    arm = multiverse.ARMS["multiverse"]
    training = multiverse.Training(arm, 16, base, data, seed=1, config=config, device=CPU)
    seen = []
    training.model.register_forward_hook(
        lambda model, args, found: seen.append(found.head_losses[model.head.active].mean().item())
    )
    figures = training.advance()
    assert figures["heads"] < 16 and len(seen) == 20
    assert figures["train_loss"] == pytest.approx(sum(seen) / 20, rel=1e-5)


# A run


def test_metrics_have_each_arm_seed_and_set(finished):
    metrics = metrics_of(finished)
    for name in ("dev_accuracy", "three_accuracy", "also_accuracy", "heads", "cosine", "agreement"):
        assert list(metrics["figures"][name]) == list(multiverse.ARMS)
        assert all(of["seeds"].keys() == {"3", "5"} for of in metrics["figures"][name].values())
    heads = {arm: of["seeds"] for arm, of in metrics["figures"]["heads"].items()}
    assert heads["one"] == {"3": 1, "5": 1} and heads["heads"] == heads["orthogonal"] == {"3": 16, "5": 16}
    assert all(1 <= count < 16 for count in heads["multiverse"].values())
    cosine = {arm: of["mean"] for arm, of in metrics["figures"]["cosine"].items()}
    assert cosine["one"] == 0 and all(value > 0 for arm, value in cosine.items() if arm != "one")
    assert metrics["figures"]["agreement"]["one"]["mean"] == 1
    assert [each["rows"] for each in metrics["data"]["transfer"]] == [18, 8]
    assert list(metrics["sweep"]["heads"]) == ["H=4", "H=24"]
    assert metrics["sweep"]["heads"]["H=24"]["seeds"]["3"] < 24
    accuracy = {arm: of["seeds"]["5"] for arm, of in metrics["figures"]["three_accuracy"].items()}
    difference = metrics["differences"]["multiverse minus one"]["three_accuracy"]["seeds"]["5"]
    assert difference == pytest.approx(accuracy["multiverse"] - accuracy["one"])
    assert metrics["plain_baselines"]["majority"] == {
        "dev_accuracy": 0.5, "three_accuracy": pytest.approx(1 / 3), "also_accuracy": 0.5,
    }  # fmt: skip


def test_models_give_the_figures_and_the_ensemble_is_of_all_seeds(finished, sets, model):
    metrics = metrics_of(finished)
    base = encoder(model)
    dev = _glue.load(sets["two"]).held_out["dev"]
    part = _tokens.held_out(_tokens.tokenised(base.tokenizer, dev, 96), 4096, CPU)
    shares = []
    for seed in (3, 5):
        for arm in multiverse.ARMS:
            classifier = multiverse.load_classifier(finished / "models" / f"test-{arm}-{seed}")
            logits = _tokens.predict(classifier, part)
            expected = metrics["figures"]["dev_accuracy"][arm]["seeds"][str(seed)]
            assert (logits.argmax(1) == part.y).double().mean().item() == pytest.approx(expected)
            assert classifier.head.num_active == metrics["figures"]["heads"][arm]["seeds"][str(seed)]
            if arm == "one":
                shares.append(logits.double().softmax(1))
    mean = (sum(shares) / 2).argmax(1)
    assert metrics["ensemble"]["dev_accuracy"] == pytest.approx((mean == part.y).double().mean().item())
    assert set(metrics["ensemble"]) >= {"dev_accuracy", "three_accuracy", "also_accuracy"}


def test_the_table_says_what_metrics_say(finished, sets, model, capsys):
    assert main(arguments(sets, model, finished, "--seeds", 3, "--resume", "--arms", "one")) == 0
    printed = capsys.readouterr().out
    metrics = metrics_of(finished)
    assert metrics["ensemble"] == {} and list(metrics["sweep"]) == []
    value = metrics["figures"]["dev_accuracy"]["multiverse"]["seeds"]["3"]  # it was there
    assert re.search(rf"^  multiverse +{value:.4f} ± -", printed, re.MULTILINE)
    assert "majority" in printed and "16 heads" in printed
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, sets, model, monkeypatch):
    """To the bit: in the middle of a row, after heads were dropped."""
    options = "--seeds", 0, "--arms", "multiverse"
    assert main(arguments(sets, model, tmp_path / "whole", *options)) == 0
    advance = multiverse.Training.advance

    def stops(training):
        if training.done.count == 20:
            assert training.model.head.num_active < 16
            raise KeyboardInterrupt
        return advance(training)

    with monkeypatch.context() as patch:
        patch.setattr(multiverse.Training, "advance", stops)
        assert main(arguments(sets, model, tmp_path / "stopped", *options)) == 130
    assert main(arguments(sets, model, tmp_path / "stopped", *options, "--resume")) == 0
    one, other = (metrics_of(tmp_path / name) for name in ("whole", "stopped"))
    assert one.pop("wall_seconds") > 0 and other.pop("wall_seconds") > 0
    assert one == other
    states = [
        multiverse.load_classifier(tmp_path / name / "models" / "test-multiverse-0").state_dict()
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_run_is_not_resumed_with_other_rows_to_be_tested_on(tmp_path, sets, model, capsys):
    other = folder_of(tmp_path / "other", 2, {"train": 16, "dev": 8}, 2)
    options = [
        *arguments(sets, model, tmp_path / "out", "--arms", "one", "--seeds", 0),
        "--transfer",
        str(other),
    ]
    assert main(options) == 0
    text = (other / "dev.tsv").read_text().splitlines()
    (other / "dev.tsv").write_text("\n".join([text[0], *reversed(text[1:])]) + "\n")
    assert main([*options, "--resume"]) == 1
    assert "--resume" in capsys.readouterr().err


def test_without_data_it_makes_its_own(tmp_path):
    sizes = ["--steps", "4", "--every", "2", "--heads", "4", "--tokens", "64", "--arms", "multiverse"]
    assert main(["run", "multiverse", "--quick", *sizes, "--threads", "1", "--out", str(tmp_path)]) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["model"] == "random" and metrics["config"]["lr"] == 1e-3
    assert {"dev_accuracy", "test_accuracy", "longer opinions_accuracy"} <= set(metrics["figures"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "30"], "--steps must be a multiple of --every, got 40 and 30; take 60"),
        (["--length", "4"], "--length must be at least 8, got 4"),
        (["--heads", "33", "--arms", "heads"], "num_heads must be at most in_features = 32"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, sets, model, capsys, options, message):
    assert main(arguments(sets, model, tmp_path / "out", *options)) == 1
    assert message in capsys.readouterr().err
