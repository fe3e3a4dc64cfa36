"""Small models of transformers, and their training."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_watches():
    """What a test has left is not to see the steps of the next."""
    yield
    from fastkit.methods.prilora import pruning

    for adapters in list(pruning._watching.values()):
        adapters.close()


@pytest.fixture
def make_bert():
    """A BERT that classifies into two, the same each time."""

    transformers = pytest.importorskip("transformers")

    def make(layers=2, **options):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=40,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **options,
        )
        return transformers.BertForSequenceClassification(config)

    return make


@pytest.fixture
def train():
    """Steps of an optimizer on batches of their numbers; ``step`` is what to do instead of a plain one."""

    def train(model, optimizer, numbers, step=None, scale=lambda loss: loss):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(40, (4, 6), generator=generator)
            labels = torch.randint(2, (4,), generator=generator)
            model.zero_grad()
            scale(model(input_ids=ids, labels=labels).loss).backward()
            (step or optimizer.step)()

    return train
