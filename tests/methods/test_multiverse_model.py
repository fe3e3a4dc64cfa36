"""MultiverseForSequenceClassification: any classifier with many heads, saved, folded, and under PEFT."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification  # noqa: E402

from fastkit.methods.multiverse import (  # noqa: E402
    MultiverseConfig,
    MultiverseForSequenceClassification,
    fold_heads,
)
from fastkit.nn import MultiverseHead  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 60, "max_position_embeddings": 40,
}  # fmt: skip
IDS = torch.randint(2, 60, (6, 7), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 1
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])
BASES = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, pad_token_id=1, bos_token_id=0, eos_token_id=2),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=60
    ),
    "electra": lambda: transformers.ElectraConfig(**SMALL, embedding_size=32),
    "albert": lambda: transformers.AlbertConfig(**SMALL, embedding_size=16),
    "mpnet": lambda: transformers.MPNetConfig(**SMALL, pad_token_id=1),
    "deberta": lambda: transformers.DebertaV2Config(**SMALL),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
    ),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=60, decoder_start_token_id=0,
        eos_token_id=1,
    ),
}  # fmt: skip


def made(base="bert", **options):
    torch.manual_seed(0)
    options = {"num_labels": 3, "num_heads": 8, **options}
    return MultiverseForSequenceClassification(MultiverseConfig(base=BASES[base](), **options))


@pytest.mark.parametrize("base", BASES)
def test_any_classifier_is_saved_loaded_and_folded(tmp_path, base):
    model = made(base).eval()
    model.head.eliminate([1, 6])
    with torch.no_grad():
        found = model(input_ids=IDS, labels=LABELS)
        model.save_pretrained(tmp_path / "model")
        fold_heads(model).save_pretrained(tmp_path / "folded")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
        assert type(loaded) is MultiverseForSequenceClassification
        assert loaded.head.active.tolist() == model.head.active.tolist()
        again = loaded(input_ids=IDS, labels=LABELS)
        assert torch.equal(again.logits, found.logits) and torch.equal(again.loss, found.loss)
        assert type(folded) is type(model.model) and folded.config.num_labels == 3
        logits = folded(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, found.logits)  # it is as it was
    assert (logits - found.logits).abs().max() <= 1e-6
    assert found.logits.shape == (6, 3) and found.count == 6
    assert isinstance(model.head, MultiverseHead)


@pytest.mark.parametrize("base", ["bert", "xlm-roberta"])
def test_the_last_layer_is_the_classifiers_where_others_are_as_wide(base):
    """As many labels as hidden units; and of XLM-RoBERTa the encoder is registered after the classifier."""
    config = {
        "bert": BASES["bert"],
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SMALL, pad_token_id=1),
    }[base]()
    config.num_labels = 32
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    last = classifier.classifier if base == "bert" else classifier.classifier.out_proj
    with torch.no_grad():
        expected = classifier(input_ids=IDS).logits
        model = MultiverseForSequenceClassification.from_base(classifier, num_heads=2)
        model.head.weight.copy_(last.weight.expand_as(model.head.weight))
        model.head.bias.copy_(last.bias.expand_as(model.head.bias))
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
        logits = fold_heads(model)(input_ids=IDS).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_checkpoint_of_an_encoder_gets_heads(tmp_path):
    """All its weights are taken, the dtype too."""
    torch.manual_seed(1)
    encoder = transformers.BertModel(BASES["bert"]()).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path)
    model = MultiverseForSequenceClassification.from_base(
        tmp_path, num_labels=3, num_heads=5, ortho="huber", dtype=torch.bfloat16
    )
    assert model.head.num_heads == 5 and model.config.ortho == "huber" and model.num_labels == 3
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.model.bert.state_dict()[name], tensor), name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(input_ids=IDS, labels=LABELS).loss.dtype == torch.float32


def test_a_model_that_is_there_gets_heads():
    torch.manual_seed(0)
    config = BASES["bert"]()
    config.id2label = {0: "no", 1: "yes"}
    config.label2id = {"no": 0, "yes": 1}
    classifier = transformers.BertForSequenceClassification(config).eval()
    weight = classifier.classifier.weight
    model = MultiverseForSequenceClassification.from_base(classifier, num_heads=4)
    assert model.model is classifier and model.config.id2label == {0: "no", 1: "yes"} and not model.training
    assert model.config.problem_type == "single_label_classification"
    assert weight not in set(model.parameters())
    with pytest.raises(TypeError, match="a model that is there takes no num_labels; set its config"):
        MultiverseForSequenceClassification.from_base(classifier, num_labels=4)


def test_a_classifiers_own_last_layer_may_have_other_labels(tmp_path):
    model = made()
    fold_heads(model).save_pretrained(tmp_path)
    again = MultiverseForSequenceClassification.from_base(
        tmp_path, num_labels=5, num_heads=4, ignore_mismatched_sizes=True
    )
    assert again.head.weight.shape == (4, 5, 32)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_labels_that_are_named_later_are_kept(tmp_path):
    names, numbers = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model = made()
    model.config.id2label, model.config.label2id = names, numbers
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for one in (model, loaded):
        config = fold_heads(one).config
        assert config.id2label == names and config.label2id == numbers
    config = MultiverseConfig(base=BASES["bert"](), num_heads=4)
    config.num_labels = 5
    late = MultiverseForSequenceClassification(config)
    assert late.head.num_classes == late.num_labels == fold_heads(late).config.num_labels == 5


def test_a_configuration_that_is_given_is_left_as_it_is():
    base = BASES["bert"]()
    base.id2label = {0: "no", 1: "yes"}
    made_of_it = [MultiverseConfig(base=base, num_labels=labels) for labels in (3, 5)]
    assert base.id2label == {0: "no", 1: "yes"} and base.problem_type is None
    assert [config.base.num_labels for config in made_of_it] == [3, 5]


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_labels_are_those_of_the_base_where_none_are_given(problem):
    base = BASES["bert"]()
    base.id2label, base.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    base.problem_type = problem
    config = MultiverseConfig(base=base)
    assert config.id2label == base.id2label and config.label2id == base.label2id and config.num_labels == 3
    assert config.problem_type == (problem or "single_label_classification")
    again = MultiverseConfig.from_dict(config.to_diff_dict())
    assert again.id2label == base.id2label and again.problem_type == config.problem_type
    assert MultiverseConfig(base=base, problem_type="multi_label_classification").num_labels == 3
    assert MultiverseConfig(base=base, num_labels=1).problem_type == "regression"
    assert MultiverseConfig(base=base, id2label={0: "no", 1: "yes"}).base.id2label == {0: "no", 1: "yes"}


def test_what_is_asked_of_the_model_reaches_the_classifier(tmp_path):
    model = made()
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.get_input_embeddings().weight.shape == (64, 32)
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
        assert loaded.model.bert.config._attn_implementation == attention
    found = loaded.eval()(input_ids=IDS, output_hidden_states=True)
    assert len(found.hidden_states) == 2
    loaded.set_attn_implementation("eager")
    assert len(loaded(input_ids=IDS, output_attentions=True).attentions) == 1
    tuples = made("bert")
    tuples.model.config.return_dict = False
    assert tuples.eval()(input_ids=IDS, labels=LABELS).logits.shape == (6, 3)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_loaded_in_any_precision(tmp_path, saved, dtype):
    model = made().to(saved).eval()
    model.head.scores.copy_(torch.linspace(0.1, 0.9, 8))
    model.head.eliminate([3])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.head.active, model.head.active)
    assert torch.equal(loaded.head.scores, model.head.scores)  # in float32 as they are
    found = loaded(input_ids=IDS, labels=LABELS)
    assert found.loss.dtype == torch.float32 and found.logits.dtype == dtype
    assert torch.equal(fold_heads(loaded)(input_ids=IDS).logits, found.logits)
    # Half an eps of each of a few layers' roundings: logits are below 0.5.
    expected = model(input_ids=IDS).logits.float()
    torch.testing.assert_close(found.logits.float(), expected, rtol=0, atol=0.02)


def test_checkpoints_of_activations_change_nothing():
    torch.manual_seed(0)
    found = []
    model = made().train()
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert model.take_sums()[2] == 12  # not of what is computed once more
    assert not made("albert").supports_gradient_checkpointing


@pytest.mark.parametrize(
    ("problem", "labels", "target"),
    [
        ("single_label_classification", 3, LABELS),
        ("multi_label_classification", 3, torch.nn.functional.one_hot(LABELS).float()),
        ("regression", 1, LABELS.float()),
    ],
)
def test_problems_are_those_of_transformers(problem, labels, target):
    model = made(num_labels=labels, problem_type=problem).eval()
    found = model(input_ids=IDS, labels=target)
    x = model.model(input_ids=IDS).logits
    assert x.shape == (6, 32)
    torch.testing.assert_close(found.loss, model.head.loss(x, target).loss)
    folded = fold_heads(model)
    plain = folded(input_ids=IDS, labels=target)
    torch.testing.assert_close(plain.logits, found.logits, rtol=0, atol=1e-6)
    assert folded.config.problem_type == problem
    assert made(num_labels=1).config.problem_type == "regression"
    assert made(num_labels=2).config.problem_type == "single_label_classification"


def test_what_training_found_is_added_up_until_it_is_taken():
    model = made(hidden_dropout_prob=0.0)
    assert model.take_sums() is None
    model.eval()(input_ids=IDS, labels=LABELS)
    model.train()(input_ids=IDS)
    assert model.take_sums() is None  # neither evaluation nor a forward without labels
    model.model.eval()  # no dropout
    x = model.model(input_ids=IDS).logits
    expected = model.head.loss(x, LABELS)
    for rows in (slice(0, 2), slice(2, 6)):
        model(input_ids=IDS[rows], labels=LABELS[rows])
    losses, correct, count = model.take_sums()
    torch.testing.assert_close(losses, expected.head_losses.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(correct, expected.correct) and count == 6
    assert model.take_sums() is None
    assert copy.deepcopy(model).take_sums() is None


def test_evaluation_gives_metrics_what_they_expect():
    assert set(MultiverseConfig.keys_to_ignore_at_inference) == {"head_losses", "correct", "count", "penalty"}
    found = made().eval()(input_ids=IDS, labels=LABELS, output_hidden_states=True)
    assert set(found) == {
        "loss", "logits", "hidden_states", "head_losses", "correct", "count", "penalty",
    }  # fmt: skip
    loss, logits, *_ = made().eval()(input_ids=IDS, labels=LABELS, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)


def test_it_compiles_whole():
    model = made().train()
    model.model.eval()
    model(input_ids=IDS, labels=LABELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=IDS, labels=LABELS)
    found.loss.backward()
    torch.testing.assert_close(found.loss, model(input_ids=IDS, labels=LABELS).loss)
    assert model.head.weight.grad.abs().sum() > 0
    assert model.take_sums()[2] == 18


def test_heads_are_trained_and_saved_under_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = made()
    base = copy.deepcopy(model.state_dict())
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(adapted.parameters(), 0.05)
    for step in range(4):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        if step == 1:
            model.head.eliminate([2, 5], optimizer)
    assert not torch.equal(model.head.weight, base["head.weight"])
    assert not model.head.weight[[2, 5]].any() and model.head.num_active == 6
    adapted.save_pretrained(tmp_path)
    fresh = made()
    fresh.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    adapted.eval()
    with pytest.raises(TypeError, match=r"got one under PEFT; pass model.merge_and_unload\(\)"):
        fold_heads(model)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        merged = loaded.merge_and_unload()
        assert merged.head.num_active == 6
        logits = fold_heads(merged).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_checkpoint_of_other_sizes_is_refused_or_begun_anew(tmp_path):
    model = made()
    model.head.eliminate([0])
    model.save_pretrained(tmp_path)
    for name, value in (("num_labels", 4), ("num_heads", 6)):
        with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, **{name: value})
    anew = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_heads=6, ignore_mismatched_sizes=True
    )
    assert anew.head.weight.shape == (6, 3, 32) and anew.head.num_active == 6
    assert anew.head.weight.isfinite().all() and 0.01 < anew.head.weight.std() < 0.03
    anew = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, ignore_mismatched_sizes=True
    )
    assert anew.head.weight.shape == (8, 4, 32) and anew.head.num_active == 8
    assert anew.head.weight.abs().sum((1, 2)).all()  # of the head that was eliminated too


def test_a_checkpoint_without_an_active_head_is_refused(tmp_path):
    model = made()
    model.head.active.zero_()
    model.save_pretrained(tmp_path)
    for load in (AutoModelForSequenceClassification, MultiverseForSequenceClassification):
        with pytest.raises(ValueError, match="active must have a head that takes part, got a checkpoint"):
            load.from_pretrained(tmp_path)


def test_what_has_no_such_layer_is_refused():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, pad_token_id=0)
    with pytest.raises(
        ValueError,
        match="GPT2ForSequenceClassification must end in a linear layer with a bias and 2 outputs, got one"
        " without a bias",
    ):
        MultiverseForSequenceClassification(MultiverseConfig(base=config, num_heads=4))
    with pytest.raises(ValueError, match="MultiverseHead: num_heads must be at most in_features = 32"):
        made(num_heads=33)
    with pytest.raises(
        ValueError,
        match="MultiverseConfig: problem_type must be one of single_label_classification,"
        " multi_label_classification, regression, got 'ranking'",
    ):
        made(problem_type="ranking")
    with pytest.raises(ValueError, match="MultiverseForSequenceClassification must end in a linear layer"):
        MultiverseForSequenceClassification.from_base(made(num_labels=32))  # whose pooler is as wide
    model = made(inference="best")
    with pytest.raises(ValueError, match="fold_heads: inference must be \"mean_logits\", got 'best'"):
        fold_heads(model)
    with pytest.raises(
        TypeError, match="fold_heads: model must be a MultiverseForSequenceClassification, got"
    ):
        fold_heads(model.model)
