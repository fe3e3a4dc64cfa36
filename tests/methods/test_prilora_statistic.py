"""Which layers share a sum, and that it is the same as each summing for itself."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastkit import _native
from fastkit.methods.prilora import PRILoRAConfig, apply_prilora

transformers = pytest.importorskip("transformers")

needs_kernel = pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))

SELF = "bert.encoder.layer.0.attention.self"


def adamw(prilora):
    return torch.optim.AdamW(prilora.parameters(), lr=0.01)


def summing(prilora):
    return [name for name, layer in prilora.layers.items() if layer.statistic]


def by_itself(prilora):
    """A reference: each layer sums, and folds, for itself."""
    prilora.close()

    def step(optimizer):
        optimizer.step()
        for layer in prilora.layers.values():
            layer.fold_()

    return step


def test_query_key_and_value_share_one(make_bert, train):
    prilora = apply_prilora(make_bert())
    optimizer = adamw(prilora)
    assert len(summing(prilora)) == 12 and prilora.owners == {}
    train(prilora.model, optimizer, range(1))
    assert prilora.owners[f"{SELF}.key"] == prilora.owners[f"{SELF}.value"] == f"{SELF}.query"
    rest = [name for name in prilora.layers if not name.endswith(("key", "value"))]
    assert summing(prilora) == [name for name, owner in prilora.owners.items() if name == owner] == rest
    train(prilora.model, optimizer, range(1, 3))
    query, key = (prilora.layers[f"{SELF}.{kind}"] for kind in ("query", "key"))
    assert torch.equal(query.input_square, key.input_square) and int(key.folds) == 3
    assert not key.square_sum.any()


def test_the_averages_are_those_of_layers_by_themselves(make_bert, train):
    shared, apart = (apply_prilora(make_bert(), PRILoRAConfig(beta=0.75)) for _ in range(2))
    step, optimizer = by_itself(apart), adamw(apart)
    train(shared.model, adamw(shared), range(4))
    train(apart.model, optimizer, range(4), step=lambda: step(optimizer))
    for a, b in zip(shared.layers.values(), apart.layers.values(), strict=True):
        assert torch.equal(a.input_square, b.input_square) and torch.equal(a.folds, b.folds)


def test_what_reads_something_else_too_does_not_share():
    """In DeBERTa query and key are also of the relative positions, and value is not."""
    config = transformers.DebertaV2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, max_position_embeddings=16,
        position_buckets=4,
    )  # fmt: skip
    prilora = apply_prilora(transformers.DebertaV2ForSequenceClassification(config))
    ids = torch.randint(40, (2, 6))
    prilora.model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    adamw(prilora).step()
    ends = {name.rpartition(".")[2]: owner.rpartition(".")[2] for name, owner in prilora.owners.items()}
    assert (ends["query_proj"], ends["key_proj"], ends["value_proj"]) == (
        "query_proj",
        "query_proj",
        "value_proj",
    )


def test_cross_attention_shares_what_it_reads_from_the_encoder():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    prilora = apply_prilora(transformers.T5ForConditionalGeneration(config))
    ids = torch.randint(40, (2, 6))
    prilora.model(input_ids=ids, labels=ids).loss.backward()
    adamw(prilora).step()
    at = "decoder.block.0.layer.1.EncDecAttention"
    owners = [prilora.owners[f"{at}.{kind}"].rpartition(".")[2] for kind in "qkvo"]
    assert owners == ["q", "k", "k", "o"]


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x, y):
        first, second, third = self.layers
        return first(x) + second(x) + third(y)


def test_it_is_decided_by_a_step_whose_sums_are_finite_and_only_once():
    prilora = apply_prilora(Siblings(), PRILoRAConfig(rank_start=2, rank_final=2))
    optimizer = adamw(prilora)

    def step(x, y):
        prilora.model(x, y).sum().backward()
        optimizer.step()

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    step(x.index_fill(0, torch.tensor([1]), math.nan), y)  # of the third the sum is finite
    first = prilora.owners
    assert first == {name: name for name in prilora.layers}
    prilora.undo()
    prilora = apply_prilora(prilora.model, PRILoRAConfig(rank_start=2, rank_final=2))
    optimizer = adamw(prilora)
    step(x * math.nan, y * math.inf)
    assert prilora.owners == {} and len(summing(prilora)) == 3
    step(x, y)
    assert list(prilora.owners.values()) == ["layers.0", "layers.0", "layers.2"]
    step(x, x)
    assert list(prilora.owners.values()) == ["layers.0", "layers.0", "layers.2"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_average_as_it_was(value):
    prilora = apply_prilora(Siblings(), PRILoRAConfig(rank_start=2, rank_final=2))
    prilora.close()
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    prilora.model(x, y)
    prilora.step()
    before = [layer.input_square.clone() for layer in prilora.layers.values()]
    x[1, 2] = value
    prilora.model(x, y)
    prilora.step()
    first, second, third = prilora.layers.values()
    assert torch.equal(first.input_square, before[0]) and torch.equal(second.input_square, before[1])
    assert not torch.equal(third.input_square, y.square().sum(0) * 2)
    assert [int(layer.folds) for layer in (first, second, third)] == [1, 1, 2]
    assert not any(layer.square_sum.any() for layer in (first, second, third))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(make_bert, train, reentrant):
    plain, checkpointed = (apply_prilora(make_bert(), PRILoRAConfig(interval=2)) for _ in range(2))
    checkpointed.model.config.use_cache = False
    checkpointed.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    for prilora in (plain, checkpointed):
        train(prilora.model, adamw(prilora), range(4))
    assert checkpointed.events == [2, 4] and checkpointed.owners == plain.owners
    assert plain.owners[f"{SELF}.value"] == f"{SELF}.query"
    tensors = checkpointed.state_dict()["tensors"]
    assert all(torch.equal(value, tensors[key]) for key, value in plain.state_dict()["tensors"].items())


class Attention(nn.Module):
    """A block that may be checkpointed."""

    def __init__(self, reentrant):
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(6, 6) for _ in range(3))
        self.reentrant = reentrant

    def attend(self, x):
        return self.out(torch.tanh(self.query(x)) * self.key(x))

    def forward(self, x):
        if self.reentrant is None:
            return x + self.attend(x)
        return x + checkpoint(self.attend, x, use_reentrant=self.reentrant)


class Blocks(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(reentrant)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@needs_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("within", "around"), [(None, None), (False, None), (None, True)])
def test_a_compiled_model_is_one_graph_that_shares(within, around):
    """Compiled before the sums are shared, and again after; checkpoints are in it, or it is in one."""
    config = PRILoRAConfig(interval=2, rank_start=2, rank_final=3)
    plain, compiled = apply_prilora(Blocks(), config), apply_prilora(Blocks(within), config)
    graph = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    for prilora, run in ((plain, plain.model), (compiled, graph)):
        optimizer = adamw(prilora)
        for number in range(3):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number)).requires_grad_()
            optimizer.zero_grad()
            y = run(x) if around is None or prilora is plain else checkpoint(run, x, use_reentrant=around)
            y.square().sum().backward()
            optimizer.step()
    assert compiled.events == [2] and compiled.owners == plain.owners
    assert list(plain.owners.values()) == ["layers.0.query", "layers.0.query", "layers.0.out"]
    for a, b in zip(plain.layers.values(), compiled.layers.values(), strict=True):
        torch.testing.assert_close(a.input_square, b.input_square)
        torch.testing.assert_close(a.lora_a, b.lora_a, rtol=1e-3, atol=1e-4)


def test_a_moved_and_cast_model_goes_on(make_bert, train):
    prilora = apply_prilora(make_bert(), PRILoRAConfig(interval=2))
    optimizer = adamw(prilora)
    train(prilora.model, optimizer, range(1))
    prilora.model.to("cpu").double()
    train(prilora.model, adamw(prilora), range(1, 2))
    assert prilora.events == [2]
    assert {layer.input_square.dtype for layer in prilora.layers.values()} == {torch.float32}
