"""A BERT with two heads in an MTAdamTrainer, and the same loop by hand."""

import inspect

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from fastkit.integrations.transformers import MTAdamTrainer  # noqa: E402

TERMS = ["word", "sentence"]
RATE = 1e-2


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
