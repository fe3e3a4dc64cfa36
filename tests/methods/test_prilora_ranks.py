"""The ramp of ranks, and which modules of a model are adapted, trained in full, or refused."""

import itertools
import re

import pytest
import torch
from torch import nn

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora
from fastkit.methods.prilora.names import block_of
from fastkit.methods.prilora.ranks import ranks

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
transformers = pytest.importorskip("transformers")

SIZES = {"num_attention_heads": 2, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(f'apply_prilora: {message}')}$")


def of(model, **options):
    return {name: layer.rank for name, layer in apply_prilora(model, PRILoRAConfig(**options)).layers.items()}


# The ramp


def test_the_ramp_of_twelve_blocks():
    assert ranks(12, 4, 12) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert ranks(12, 4, 12, "floor") == [4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12]
    assert ranks(12, 12, 4) == [12, 11, 11, 10, 9, 8, 8, 7, 6, 5, 5, 4]
    assert sum(ranks(12, 4, 12)) == sum(ranks(12, 12, 4)) == sum(ranks(12, 4, 12, "budget")) == 96


def test_short_stacks():
    assert ranks(1, 4, 12) == [12] and ranks(2, 4, 12) == [4, 12] and ranks(0, 4, 12) == []
    assert ranks(2, 4, 5) == [4, 5] and ranks(3, 4, 5) == [4, 5, 5]  # a half is rounded upwards


@hypothesis.given(st.integers(1, 60), st.integers(1, 64), st.integers(1, 64))
def test_what_holds_of_every_ramp(layers, start, final):
    nearest, floor, budget = (ranks(layers, start, final, kind) for kind in ("nearest", "floor", "budget"))
    exact = [start + (final - start) * i / max(layers - 1, 1) for i in range(layers)]
    if layers == 1:
        exact = [final]
    assert all(abs(r - e) <= 0.5 + 1e-9 for r, e in zip(nearest, exact, strict=True))
    assert all(0 <= e - r + 1e-9 < 1 + 1e-6 for r, e in zip(floor, exact, strict=True))
    assert all(abs(r - e) < 1 for r, e in zip(budget, exact, strict=True))
    assert abs(sum(budget) - sum(exact)) <= 0.5 + 1e-6
    assert {nearest[-1], floor[-1], budget[-1]} == {final}
    assert all((b - a) * (final - start) >= 0 for a, b in itertools.pairwise(nearest))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("bert.encoder.layer.3.attention.self.query", ("bert.encoder.layer", 3)),
        ("decoder.block.10.layer.1.EncDecAttention.q", ("decoder.block", 10)),
        ("transformer.h.0.attn.c_attn", ("transformer.h", 0)),
        ("model.layers.7", ("model.layers", 7)),
        ("layers.2.linear1", ("layers", 2)),
        ("visual.blocks.1.mlp", ("visual.blocks", 1)),
        ("bert.pooler.dense", None),
        ("sublayers.3.x", None),
        ("layers.x", None),
    ],
)
def test_the_block_of_a_name(name, block):
    assert block_of(name) == block


# Models


BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]


def test_all_projections_of_the_blocks_of_bert(make_bert):
    found = of(make_bert(layers=3))
    assert found == {
        f"bert.encoder.layer.{block}.{name}": rank for block, rank in enumerate((4, 8, 12)) for name in BERT
    }


def test_deberta():
    config = transformers.DebertaV2Config(
        **SIZES, num_hidden_layers=3, relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=True, max_position_embeddings=16, position_buckets=4,
    )  # fmt: skip
    model = transformers.DebertaV2ForSequenceClassification(config)
    prilora = apply_prilora(model)
    ends = {name.rpartition("layer.1.")[2] for name in prilora.layers if ".layer.1." in name}
    attention = {f"attention.self.{kind}_proj" for kind in ("query", "key", "value")}
    assert ends == attention | {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert prilora.modules_to_save == ["pooler", "classifier"]


def test_each_stack_of_an_encoder_and_decoder_has_its_ramp():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=40
    )
    prilora = apply_prilora(transformers.T5ForConditionalGeneration(config))
    found = {name: layer.rank for name, layer in prilora.layers.items()}
    assert [found[f"encoder.block.{i}.layer.0.SelfAttention.q"] for i in range(2)] == [4, 12]
    assert [found[f"decoder.block.{i}.layer.1.EncDecAttention.v"] for i in range(3)] == [4, 8, 12]
    assert [found[f"decoder.block.{i}.layer.2.DenseReluDense.wo"] for i in range(3)] == [4, 8, 12]
    assert len(found) == 2 * 6 + 3 * 10 and prilora.modules_to_save == []  # lm_head is the embedding


def test_conv1d_and_score_head():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, pad_token_id=0
    )
    prilora = apply_prilora(transformers.GPT2ForSequenceClassification(config))
    ends = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(prilora.layers) == [f"transformer.h.{i}.{end}" for i in range(2) for end in ends]
    assert prilora.modules_to_save == ["score"]


def test_llama_and_an_untied_output():
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=False)
    prilora = apply_prilora(transformers.LlamaForCausalLM(config))
    names = {name.rpartition(".")[2] for name in prilora.layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert prilora.modules_to_save == []  # the output's embedding is frozen as the input's


def test_projections_of_embeddings_are_frozen():
    config = transformers.ElectraConfig(**SIZES, num_hidden_layers=2, embedding_size=8)
    prilora = apply_prilora(transformers.ElectraForSequenceClassification(config))
    assert prilora.modules_to_save == ["classifier"]


def test_what_multihead_attention_reads_past_its_layer_is_left_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    found = of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert list(found) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]


# Options


def test_targets_by_the_end_of_their_names_and_by_a_whole_expression(make_bert):
    ends = list(of(make_bert(), target_modules=["query", "self.value"]))
    assert ends == list(of(make_bert(), target_modules=r".*\.(query|value)"))
    assert len(ends) == 4


def test_a_ramp_is_of_the_blocks_of_the_model_not_of_those_adapted(make_bert):
    found = of(make_bert(layers=3), target_modules=r".*layer\.[12].*\.query")
    assert list(found.values()) == [8, 12]


def test_outside_the_blocks_it_is_the_mean(make_bert):
    found = of(make_bert(), target_modules=["query", "pooler.dense"], rank_start=4, rank_final=9)
    assert found["bert.pooler.dense"] == 7  # 6.5, rounded


def test_a_ramp_is_clamped(make_bert):
    assert list(of(make_bert(layers=3), rank_start=8, rank_final=30).values()) == [8] * 6 + [16] * 12


def test_ranks_by_name_win_and_the_longest_of_them(make_bert):
    found = of(make_bert(), ranks={"query": 2, "layer.1.attention.self.query": 3, "key": 1})
    assert found["bert.encoder.layer.0.attention.self.query"] == 2
    assert found["bert.encoder.layer.1.attention.self.query"] == 3
    assert found["bert.encoder.layer.1.attention.self.key"] == 1
    assert found["bert.encoder.layer.1.attention.self.value"] == 12


def test_modules_to_save_by_name(make_bert):
    prilora = apply_prilora(make_bert(), PRILoRAConfig(modules_to_save=["classifier"]))
    assert prilora.modules_to_save == ["classifier"]
    prilora.undo()
    assert apply_prilora(prilora.model, PRILoRAConfig(modules_to_save=[])).modules_to_save == []


# What is refused, with nothing changed


def unchanged(model, **options):
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check():
        assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert "_fastkit_prilora" not in vars(model)

    return check


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["query", "valeu"]},
            "target_modules must match modules of BertForSequenceClassification, got valeu, which matches"
            " no name; the nearest are value",
        ),
        (
            {"target_modules": "query"},
            "target_modules must match modules of BertForSequenceClassification, got query, which matches"
            " no whole name; it has attention.self.query, attention.self.key, attention.self.value,"
            " attention.output.dense, intermediate.dense, output.dense, bert.pooler.dense, classifier",
        ),
        (
            {"target_modules": []},
            "target_modules must match modules of BertForSequenceClassification, got [], which matches"
            " no name; it has attention.self.query, attention.self.key, attention.self.value,"
            " attention.output.dense, intermediate.dense, output.dense, bert.pooler.dense, classifier",
        ),
        (
            {"target_modules": ["LayerNorm"]},
            "target_modules must be linear layers with in_features and out_features, or a transformers"
            " Conv1D, got bert.embeddings.LayerNorm, a LayerNorm; name others",
        ),
        (
            {"ranks": {"query": 17}},
            "ranks must be at most 16 for bert.encoder.layer.0.attention.self.query, the least of its"
            " in_features and out_features, got 17",
        ),
        (
            {"target_modules": ["query"], "ranks": {"values": 3}},
            "ranks must be of modules that are adapted, got values, which matches none; it has"
            " attention.self.query",
        ),
        (
            {"modules_to_save": ["clasifier"]},
            "modules_to_save must match modules with parameters of BertForSequenceClassification, got"
            " clasifier, which matches nothing; the nearest are classifier",
        ),
        (
            {"target_modules": ["query", "classifier"], "modules_to_save": ["classifier"]},
            "modules_to_save must not be adapted too, got classifier with classifier among target_modules;"
            " leave it out of one of them",
        ),
    ],
)
def test_refusals(make_bert, options, message):
    model = make_bert()
    check = unchanged(model)
    with refused(message):
        apply_prilora(model, PRILoRAConfig(**options))
    check()


def test_a_model_without_blocks_names_what_it_has():
    with refused(
        "target_modules must be given for Sequential, in which no linear layer is inside a block by its name"
        " (layers.N, layer.N, h.N, blocks.N, block.N); it has 0, 2"
    ):
        apply_prilora(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.out = nn.Linear(6, 8, bias=False)


def test_a_tied_target_is_refused():
    model = Tied()
    model.out.weight = model.embedding.weight
    message = (
        "target_modules must not be tied, got out, whose parameter is also embedding.weight; leave it out of"
        " target_modules, or untie it"
    )
    check = unchanged(model)
    with refused(message):
        apply_prilora(model, PRILoRAConfig(target_modules=["out"]))
    check()
    model.out.weight = nn.Parameter(model.embedding.weight.detach())  # another parameter of the same memory
    with refused(message):
        apply_prilora(model, PRILoRAConfig(target_modules=["out"]))
    assert apply_prilora(model).modules_to_save == ["out"]


def test_a_module_of_two_names_is_refused():
    model = Tied()
    model.layers[1] = model.layers[0]
    with refused(
        "target_modules must not be shared, got layers.0, which is the same module as layers.1; leave it out"
        " of target_modules"
    ):
        apply_prilora(model)
