"""run prilora: arms differ in what they are said to, rows are honest, a killed run ends the same."""

import csv
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkit.__main__ import main
from fastkit._command import Refusal
from fastkit.recipes import _glue, _tokens, prilora
from fastkit.recipes._encoder import encoder, write_random
from fastkit.recipes._prilora_arms import ARMS, Adapted, prilora_config
from fastkit.recipes.prilora import load_classifier

for package in ("sklearn", "tqdm", "matplotlib", "transformers", "peft", "tokenizers"):
    pytest.importorskip(package)

OPTIONS = {"steps": 4, "every": 2, "tokens": 256, "interval": 1}
TINY = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
CONFIG = {**prilora._DEFAULTS, **OPTIONS}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of sentences of up to 20 words: entailment if both are about the same."""
    folder = tmp_path_factory.mktemp("pairs") / "rte"
    folder.mkdir()
    draw = random.Random(0)
    for part, count in (("train", 80), ("dev", 20), ("test", 30)):
        lines = ["sentence1\tsentence2\tlabel"]
        for i in range(count):
            about = [draw.choice(("sun", "rain")) for _ in range(2)]
            texts = [" ".join([word] * draw.randint(1, 20)) for word in about]
            lines.append("\t".join([*texts, str(int(about[0] != about[1]) if i > 1 else i)]))
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    """A folder with an encoder of width 32, in fp16."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "small"
    write_random(folder, _glue.load(data).train.first)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(encoder(str(folder)).tokenizer), **sizes)
    BertModel(config).half().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, model):
    out = tmp_path_factory.mktemp("prilora") / "out"
    arguments = ["run", "prilora", "--data", str(data), "--model", model, *TINY, "--seeds", "3", "5"]
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


# Batches


def test_batches_hold_at_most_so_many_tokens_and_each_sentence_once_an_epoch():
    lengths = np.random.default_rng(0).integers(3, 60, 2500)
    batches = _tokens.plan(lengths, 256, 1000, seed=0)
    assert len(batches) == 1000
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 256
    epoch = next(n for n in range(1000) if sum(map(len, batches[:n])) == len(lengths))
    assert sorted(np.concatenate(batches[:epoch])) == list(range(len(lengths)))
    tokens = sum(lengths[batch].sum() for batch in batches[:epoch])
    assert tokens / sum(len(batch) * lengths[batch].max() for batch in batches[:epoch]) > 0.9
    means = [lengths[batch].mean() for batch in batches[:epoch]]
    assert abs(np.corrcoef(means, np.arange(epoch))[0, 1]) < 0.3  # not from short to long
    again, other = (_tokens.plan(lengths, 256, 1000, seed=seed) for seed in (0, 1))
    assert all(map(np.array_equal, batches, again)) and not all(map(np.array_equal, batches, other))


def test_padding_changes_no_logit(model, data):
    torch.manual_seed(0)
    base, part = encoder(model), _glue.load(data).held_out["test"]
    classifier = base.classifier(["0", "1"]).eval()
    tokens = _tokens.tokenised(base.tokenizer, part, 128)
    logits = _tokens.predict(classifier, _tokens.held_out(tokens, 512, CPU))
    for i in range(len(part.y)):
        alone = base.tokenizer(part.first[i], part.second[i], return_tensors="pt")
        torch.testing.assert_close(classifier(**alone).logits[0], logits[i])


def test_pieces_of_words_are_numbered_alike_in_each_process(tmp_path):
    """The trainer's own order of letters inside words is not."""
    texts = ["the quick brown fox jumps over the lazy dog", "sphinx of black quartz judge my vow"] * 3
    write_random(tmp_path / "model", texts)
    pieces = encoder(str(tmp_path / "model")).tokenizer.get_vocab()
    inside = [number for piece, number in sorted(pieces.items()) if re.fullmatch("##[a-z]", piece)]
    assert len(inside) == 26 and inside == sorted(inside)


def test_long_sentences_are_cut(model, data):
    tokens = _tokens.tokenised(encoder(model).tokenizer, _glue.load(data).train, 10)
    assert tokens.lengths.max() == 10


# Arms


def adapted(arm, model, seed=0, **options):
    torch.manual_seed(seed)
    classifier = encoder(model).classifier(["0", "1"])
    return Adapted(arm, classifier, prilora_config(ARMS[arm], seed, {**CONFIG, **options}))


@pytest.mark.parametrize("scaling", ["lora", "constant", "rslora"])
def test_adapters_have_as_many_parameters_in_all_arms_and_start_as_the_same_model(model, data, scaling):
    tokens = _tokens.tokenised(encoder(model).tokenizer, _glue.load(data).train, 128)
    inputs = _tokens.batch(tokens, np.arange(8), CPU)
    logits, facts, saved = {}, {}, {}
    for name in ARMS:
        arm = adapted(name, model, scaling=scaling)
        logits[name], facts[name] = arm.model.eval()(**inputs).logits, arm.facts()
        saved[name] = sum(
            p.numel() for n, p in arm.model.named_parameters() if "classifier" in n and p.requires_grad
        )
        assert {p.dtype for p in arm.model.parameters()} == {torch.float32}
        arm.close()
    full = facts.pop("full")
    assert (
        full["adapter_parameters"] == 0
        and full["trained_parameters"] > 2 * facts["uniform"]["trained_parameters"]
    )
    assert len({tuple(fact.values()) for fact in facts.values()}) == 1
    assert facts["uniform"]["adapter_parameters"] == 8 * 4 * (4 * 2 * 32 + 2 * (32 + 64))
    pooler_and_head = 32 * 32 + 32 + 2 * 32 + 2
    assert facts["uniform"]["trained_parameters"] == facts["uniform"]["adapter_parameters"] + pooler_and_head
    assert set(saved.values()) == {2 * 32 + 2}
    assert all(torch.equal(logits["full"], other) for other in logits.values())


def test_the_uniform_arm_is_pefts_own(model):
    from peft import PeftModel

    arm = adapted("uniform", model)
    assert isinstance(arm.model, PeftModel)
    config = arm.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (8, 16, {})
    names = [name for name, p in arm.model.named_parameters() if p.requires_grad]
    assert not any(key in name for name in names for key in ("embeddings", "base_layer", "LayerNorm"))
    assert not any("fastkit" in type(module).__module__ for module in arm.model.modules())


def test_ramps_rise_and_fall(model):
    for name, expected in (("4-12", [4, 7, 9, 12]), ("12-4", [12, 9, 7, 4]), ("uniform+prune", [8] * 4)):
        arm = adapted(name, model)
        ranks = [arm.handle.layers[f"bert.encoder.layer.{i}.attention.self.query"].rank for i in range(4)]
        assert ranks == expected
        arm.close()


def test_arms_of_one_seed_see_the_same_head_batches_and_dropout(model, data):
    """Before the first step that their adapters change: its loss is the same."""
    losses = {}
    config = {**CONFIG, "steps": 1, "every": 1, "lr": 1e-3}
    base = encoder(model)
    task = prilora.TaskTokens(_glue.load(data), base, model, config, CPU)
    for name in ARMS:
        for seed in (0, 1):
            arm = adapted(name, model, seed)
            torch.randn(len(name))  # whatever is drawn
            losses[name, seed] = prilora.Training(arm, task, seed=seed, config=config, device=CPU).advance()[
                "train_loss"
            ]
            arm.close()
    for seed in (0, 1):
        assert len({losses[name, seed] for name in ARMS if name != "full"}) == 1
        assert losses["full", seed] == pytest.approx(losses["uniform", seed], rel=1e-6)
    assert losses["full", 0] != losses["full", 1]


# A run


def test_what_is_left(finished):
    metrics = metrics_of(finished)
    assert metrics["recipe"] == "prilora" and metrics["seeds"] == [3, 5] and metrics["device"] == "cpu"
    assert metrics["data"]["task"] == "rte" and metrics["data"]["test"] == 30
    assert metrics["model"].keys() == {"name", "sha256"}
    figures = metrics["figures"]
    assert figures.keys() == {"train_loss"} | {
        f"{p}_{f}" for p in ("dev", "test") for f in ("loss", "accuracy")
    }
    for arms in figures.values():
        assert arms.keys() == set(ARMS)
        assert all(arm["seeds"].keys() == {"3", "5"} and arm["std"] is not None for arm in arms.values())
    for name, facts in metrics["arms"].items():
        pruned = name in ("uniform+prune", "prilora", "magnitude", "random")
        assert facts["prunings"] == (4 if pruned else 0)
        assert facts["sparsity"] == (0.5 if pruned else 0)  # after the last step
    assert 0.3 < metrics["plain_baselines"]["majority"]["test_accuracy"] < 0.8


def test_differences_are_of_pairs(finished):
    metrics = metrics_of(finished)
    asked = {f"{one} minus {other}" for one, other in prilora.QUESTIONS}
    assert metrics["differences"].keys() == asked
    figures = metrics["figures"]["test_loss"]
    for question in ("4-12 minus uniform", "prilora minus random"):
        one, other = question.split(" minus ")
        found = metrics["differences"][question]["test_loss"]
        pairs = [figures[one]["seeds"][seed] - figures[other]["seeds"][seed] for seed in ("3", "5")]
        assert list(found["seeds"].values()) == pairs
        assert found["mean"] == pytest.approx(np.mean(pairs))
        assert found["stderr"] == pytest.approx(np.std(pairs, ddof=1) / 2**0.5)


def test_curves_are_over_steps_and_look_at_the_test_part_once(finished):
    with (finished / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["arm"], line["step"]) for line in lines] == [
        (seed, arm, step) for seed in "35" for arm in ARMS for step in "24"
    ]
    assert all((line["test_accuracy"] == "") == (line["step"] == "2") for line in lines)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arm", ARMS)
def test_models_give_the_figures_that_are_reported(finished, data, arm):
    """Adapters by peft alone."""
    metrics, part = metrics_of(finished), _glue.load(data).held_out["test"]
    for seed in (3, 5):
        model, tokenizer, classes = load_classifier(finished / "models" / f"test-{arm}-{seed}")
        assert classes == ["0", "1"] and not model.training
        assert not any("fastkit" in type(module).__module__ for module in model.modules())
        logits = _tokens.predict(model, _tokens.held_out(_tokens.tokenised(tokenizer, part, 128), 4096, CPU))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.y)).item()
        assert loss == pytest.approx(metrics["figures"]["test_loss"][arm]["seeds"][str(seed)], abs=1e-6)


def test_pruned_arms_are_others_than_those_that_are_not(finished):
    losses = {
        arm: tuple(found["seeds"].values())
        for arm, found in metrics_of(finished)["figures"]["test_loss"].items()
    }
    assert len(set(losses.values())) == len(ARMS)


def test_arms_and_seeds_are_added_to_a_finished_run(finished, data, model, monkeypatch, capsys):
    before = (finished / "results.jsonl").read_bytes()
    monkeypatch.setattr(prilora.Training, "advance", lambda _: pytest.fail("trained again"))
    arguments = [
        "run",
        "prilora",
        "--data",
        str(data),
        "--model",
        model,
        *TINY,
        "--out",
        str(finished),
        "--resume",
    ]
    assert main([*arguments, "--seeds", "3", "--arms", "uniform", "4-12"]) == 0
    assert (finished / "results.jsonl").read_bytes() == before
    printed = capsys.readouterr().out
    assert "4-12 minus uniform" in printed
    assert main([*arguments, "--seeds", "3", "5"]) == 0


@pytest.mark.parametrize("folder, column, labels, figures", [
    ("STS-B", "score", "01234", {"pearson", "spearman"}),
    ("MRPC", "label", "01", {"accuracy", "f1"}),
    ("CoLA", "label", "01", {"matthews"}),
    ("MNLI", "gold_label", ["neutral", "entailment", "contradiction"], {"accuracy"}),
])  # fmt: skip
def test_tasks_are_judged_by_their_own_metrics(tmp_path, model, folder, column, labels, figures):
    (tmp_path / folder).mkdir()
    pair = folder != "CoLA"
    held_out = ["dev_matched", "dev_mismatched"] if folder == "MNLI" else ["dev"]
    for part in ("train", *held_out):
        lines = ["\t".join(["sentence1", "sentence2", column] if pair else ["sentence", column])]
        for i in range(16):
            texts = [f"rain {'sun ' * (i % 5)}"] * (1 + pair)
            lines.append("\t".join([*texts, labels[i % len(labels)]]))
        (tmp_path / folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    arguments = ["run", "prilora", "--data", str(tmp_path / folder), "--model", model, *TINY, "--seeds", "0"]
    assert main([*arguments, "--preset", "adalora", "--arms", "prilora", "--out", str(tmp_path / "out")]) == 0
    metrics = metrics_of(tmp_path / "out")
    judged = {f"{part}_{figure}" for part in held_out for figure in figures}
    losses = {f"{part}_loss" for part in held_out}
    assert metrics["figures"].keys() == judged | losses | {"train_loss"}
    majority = metrics["plain_baselines"]["majority"]
    assert majority.keys() == (set() if folder == "STS-B" else judged)
    if folder == "MNLI":
        assert metrics["data"]["classes"] == sorted(labels)
        assert list(majority.values()) == [6 / 16] * 2  # neutral, the last of the classes
    assert (metrics["config"]["lr"], metrics["config"]["alpha"], metrics["config"]["length"]) == {
        "STS-B": (2.2e-3, 32, 128), "MRPC": (1e-3, 32, 320), "CoLA": (8e-4, 32, 64),
        "MNLI": (5e-4, 16, 256),
    }[folder]  # fmt: skip
    assert all(arm["mean"] is not None for name in losses for arm in metrics["figures"][name].values())


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2"])
def test_other_kinds_of_models(tmp_path, data, model, kind):
    """With a head of several layers, without token types, with Conv1D and without a padding token."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    sizes = {
        "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    }[kind]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    if kind == "gpt2":
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    else:
        sizes["pad_token_id"] = tokenizer.pad_token_id
    if kind != "roberta":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        "run",
        "prilora",
        "--data",
        str(data),
        "--model",
        str(tmp_path / "model"),
        "--seeds",
        "0",
        *TINY,
    ]
    assert main([*arguments, "--arms", "uniform", "prilora", "--out", str(tmp_path / "out")]) == 0
    figures = metrics_of(tmp_path / "out")["figures"]["test_loss"]
    part = _glue.load(data).held_out["test"]
    for arm in ("uniform", "prilora"):
        loaded, tokenizer, _ = load_classifier(tmp_path / "out" / "models" / f"test-{arm}-0")
        logits = _tokens.predict(loaded, _tokens.held_out(_tokens.tokenised(tokenizer, part, 128), 4096, CPU))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.y)).item()
        assert loss == pytest.approx(figures[arm]["mean"], abs=1e-6)


def test_without_a_model_it_is_a_random_one(tmp_path, data, capfd):
    arguments = ["run", "prilora", "--data", str(data), *TINY, "--arms", "prilora", "full", "--seeds", "0"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    output = capfd.readouterr()
    assert output.err == "" and "model random" in output.out
    assert metrics_of(tmp_path / "out")["model"] == "random"
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    for arm in ("prilora", "full"):
        load_classifier(moved / "models" / f"test-{arm}-0")


def test_without_data_it_makes_some(tmp_path, capsys):
    arguments = ["run", "prilora", "--quick", "--steps", "2", "--every", "1", "--arms", "prilora"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "opinions, model random, 2 steps of at most 1024 tokens, seeds 0\n"
    )


def test_refusals(tmp_path, data, model, capsys):
    def refused(message, *options):
        assert main(["run", "prilora", "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 1
        error = capsys.readouterr().err
        assert re.match(f"run prilora: {re.escape(message)}", error), error
        if (tmp_path / "out").exists():
            import shutil

            shutil.rmtree(tmp_path / "out")

    refused("--steps must be a multiple of --every, got 310 and 50; take 350\n", "--steps", "310")
    refused("--tokens must be at least 8, got 7", "--tokens", "7")
    refused("--length must be at least 8, got 2", "--length", "2")
    refused("--ratio must be at least 0 and below 1, got 1.0", "--ratio", "1")
    refused("--warmup must be at least 0 and below 1, got -0.1", "--warmup", "-0.1")
    refused(
        "--preset adalora must be with one of its tasks", "--preset", "adalora", "--task", "classification"
    )
    refused("--model must be a model with a tokenizer, as a folder or a name, got ", "--model", str(tmp_path))
    if not torch.cuda.is_available():
        refused("--device must be cpu where torch sees no GPU, got cuda; leave it out", "--device", "cuda")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(model).iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:-1000] if path.suffix == ".safetensors" else content)
    refused("--model must be the weights of a model in safetensors that can classify", "--model", str(broken))


@pytest.mark.parametrize("kind", ["albert", "xlm"])
def test_a_model_without_numbered_blocks_is_refused_before_there_is_a_folder(
    tmp_path, data, model, capsys, kind
):
    """Of ALBERT all blocks are one; XLM's parts are each in a list of their own. The arm full takes them."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    sizes = {
        "albert": {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
        "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2},
    }[kind]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    arguments = ["run", "prilora", "--data", str(data), "--model", source, *TINY, "--seeds", "0"]
    arguments += ["--out", str(tmp_path / "out"), "--arms"]
    message = (
        f"run prilora: --model must have numbered blocks with linear layers, got {source} (apply_prilora: "
    )
    capsys.readouterr()  # a bar of the model that was written
    for arms in (["uniform"], ["full", "prilora"]):
        assert main([*arguments, *arms]) == 1
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
    assert main([*arguments, "full"]) == 0


@pytest.mark.parametrize("decay", ["-0.1", "inf", "nan"])
def test_a_weight_decay_that_is_none_is_refused(tmp_path, capsys, decay):
    with pytest.raises(SystemExit):
        main(["run", "prilora", "--weight-decay", decay, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert f"argument --weight-decay: must be finite and at least 0, got {decay}" in error


def test_another_model_or_option_is_refused_by_resume(finished, data, model, capsys, tmp_path):
    arguments = ["run", "prilora", "--data", str(data), *TINY, "--out", str(finished), "--resume"]
    assert main([*arguments, "--model", model, "--lr", "0.5"]) == 1
    assert "config.lr 0.5 instead of" in capsys.readouterr().err
    assert main(arguments) == 1
    assert "config.model 'random' instead of" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(finished, tmp_path):
    with pytest.raises(Refusal, match="must be a model of run prilora, got another"):
        load_classifier(tmp_path)
    import shutil

    broken = shutil.copytree(finished / "models" / "test-prilora-3", tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(Refusal, match="must hold an adapter that fits the encoder"):
        load_classifier(broken)


# Killed


def _rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") > 0
    return rows


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(run_script, tmp_path, data):
    """To the bit: rows, figures, curves and the tensors of every model. An event on either side of each
    checkpoint."""
    file = Path(__file__).with_name("killed_runs.py")
    options = ["--data", str(data), *TINY, "--seeds", "0"]
    command = [str(file), str(tmp_path), "10", "0", "prilora", *options]
    # Imports would count as the time of a whole run, in which the others are killed.
    script = (
        "import runpy, sys, matplotlib.figure, peft, sklearn.metrics;"
        " from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel;"
        " sys.argv = {}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_script(script.format(command))
    assert done.returncode == 0, done.stderr
    assert not re.search("^0 of", done.stdout, re.MULTILINE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _rows(killed / "results.jsonl") == _rows(whole / "results.jsonl")
    assert (killed / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    files = sorted(path.relative_to(whole) for path in (whole / "models").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(killed) for path in (killed / "models").rglob("*.safetensors"))
    assert len(files) == 14  # of our own, two
    for name in files:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list((killed / "training").iterdir())


@pytest.mark.parametrize("arm", ["uniform", "prilora", "random", "full"])
def test_a_row_goes_on_in_the_middle_as_if_it_had_not_stopped(tmp_path, data, model, monkeypatch, arm):
    """Stopped after two of four steps; an event after each."""
    arguments = [
        "run",
        "prilora",
        "--data",
        str(data),
        "--model",
        model,
        *TINY,
        "--arms",
        arm,
        "--seeds",
        "0",
    ]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    advance = prilora.Training.advance

    def stops(training):
        if training.done.count:
            raise KeyboardInterrupt
        return advance(training)

    with monkeypatch.context() as patch:
        patch.setattr(prilora.Training, "advance", stops)
        assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    torch.randn(3)
    assert main([*arguments, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert _rows(tmp_path / "stopped" / "results.jsonl") == _rows(tmp_path / "whole" / "results.jsonl")
    name = f"models/test-{arm}-0/{'' if arm == 'full' else 'adapter_'}model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["uniform", "prilora", "full"])
def test_on_a_gpu_it_learns_the_same_and_twice_the_same_bits(tmp_path, data, model, arm):
    arguments = [
        "run",
        "prilora",
        "--data",
        str(data),
        "--model",
        model,
        *TINY,
        "--arms",
        arm,
        "--seeds",
        "0",
    ]
    for name in ("one", "two"):
        assert main([*arguments, "--device", "cuda", "--out", str(tmp_path / name)]) == 0
    assert _rows(tmp_path / "one" / "results.jsonl") == _rows(tmp_path / "two" / "results.jsonl")
    assert metrics_of(tmp_path / "one")["device"].startswith("cuda: ")
