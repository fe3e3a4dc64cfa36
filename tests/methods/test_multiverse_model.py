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
    assert weight not in set(model.parameters())
    with pytest.raises(TypeError, match="a model that is there takes no num_labels; set its config"):
        MultiverseForSequenceClassification.from_base(classifier, num_labels=4)


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
    model = made(inference="best")
    with pytest.raises(ValueError, match="fold_heads: inference must be \"mean_logits\", got 'best'"):
        fold_heads(model)
    with pytest.raises(
        TypeError, match="fold_heads: model must be a MultiverseForSequenceClassification, got"
    ):
        fold_heads(model.model)
