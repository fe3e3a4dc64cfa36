"""Three-way tying: of models of transformers and of others, its gradient, its counts, and what it refuses."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastkit.methods.tied_embedding import (
    HalfGradientError,
    UntiedError,
    assert_tied,
    retie,
    tie_embeddings,
    tie_three_way,
)

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT
]

V, H = 17, 8
ENDS = {"encoder": "source", "decoder": "target", "output": "scores"}
SOURCE = torch.tensor([[1, 5, 3, 3], [0, 2, 16, 5]])
TARGET = torch.tensor([[2, 2, 9], [1, 16, 4]])


class Translator(nn.Module):
    """An encoder, a decoder that attends to it, and a readout as wide as the embeddings."""

    def __init__(self, words=V, width=H, hidden=H, *, source_words=None, target_width=None):
        super().__init__()
        target_width = width if target_width is None else target_width
        self.source = nn.Embedding(words if source_words is None else source_words, width)
        self.encoder = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.target = nn.Embedding(words, target_width)
        self.decoder = nn.GRU(target_width, hidden, batch_first=True)
        self.query = nn.Linear(hidden, 2 * hidden)
        self.deeper = nn.GRU(2 * hidden + target_width, hidden, batch_first=True)
        self.readout = nn.Linear(3 * hidden + target_width, width)
        self.scores = nn.Linear(width, words)

    def forward(self, source, target):
        read, _ = self.encoder(self.source(source))
        e = self.target(target)
        h, _ = self.decoder(e)
        context = torch.softmax(self.query(h) @ read.mT, -1) @ read
        h, _ = self.deeper(torch.cat([context, e], -1))
        return self.scores(torch.tanh(self.readout(torch.cat([h, context, e], -1))))


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def trained_once(model):
    loss = cross_entropy(model(SOURCE, TARGET).flatten(0, 1), TARGET.roll(-1, 1).flatten())
    loss.backward()
    return model


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_one_parameter_with_the_gradient_of_three():
    model = Translator().double()
    value, bias = model.target.weight, model.scores.bias
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in (twin.source, twin.scores):
            module.weight.copy_(value)
    assert tie_three_way(model, **ENDS) is model
    assert model.source.weight is model.target.weight is model.scores.weight is value
    assert model.scores.bias is bias
    assert_tied(model)
    trained_once(model)
    trained_once(twin)
    parts = [module.weight.grad for module in (twin.source, twin.target, twin.scores)]
    assert all(part.abs().max() > 1e-4 for part in parts)
    torch.testing.assert_close(value.grad, sum(parts), rtol=1e-12, atol=1e-13)
    assert count(model) == count(twin) - 2 * V * H


def test_a_lost_tie_is_found_at_each_end_and_mended():
    for end in ENDS.values():
        model = tie_three_way(Translator(), **ENDS)
        model.get_submodule(end).weight = nn.Parameter(torch.randn(V, H))
        with pytest.raises(UntiedError, match="must have one weight, got two"):
            assert_tied(model)
        value = model.target.weight
        assert_tied(retie(model))
        assert model.source.weight is model.scores.weight is value
        assert retie(model).target.weight is value
    model = copy.deepcopy(tie_three_way(Translator(), **ENDS))
    assert_tied(model)
    model.to("meta").to_empty(device="cpu")
    with pytest.raises(UntiedError):
        assert_tied(model)
    model = retie(model)
    model.load_state_dict(Translator().state_dict())
    assert_tied(model)


def test_an_end_that_is_detached_is_found():
    class Detached(nn.Embedding):
        def forward(self, input):
            return super().forward(input).detach()

    model = Translator()
    model.source = Detached(V, H)
    tie_three_way(model, **ENDS)
    with pytest.raises(HalfGradientError, match="the gradient of source, the embedding, must reach"):
        assert_tied(model)
    assert_tied(model, gradient=False)


def test_it_more_than_halves_a_translator_of_90_000_words():
    """The sizes of the paper's English to French, which has 168 million parameters, and tied 80."""
    with torch.device("meta"):
        model = Translator(90_000, 500, 1104)
    matrix = 90_000 * 500
    rest = count(model) - 3 * matrix
    assert round(rest / 1e6) == 33
    assert round(count(model) / 1e6) == 168
    untied = count(model)
    decoder = tie_embeddings(copy.deepcopy(model), input="target", output="scores")
    assert count(decoder) == untied - matrix
    assert count(tie_three_way(model, **ENDS)) == matrix + rest
    assert round(count(model) / 1e6) == 78
    assert count(model) < untied / 2
    assert_tied(model)


# Models of transformers


def t5(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": H, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": V}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **options))


def bart(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": H, "vocab_size": V, "max_position_embeddings": 12}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 12}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **ends, forced_eos_token_id=None, **options)
    )


def marian(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": H, "vocab_size": V, "max_position_embeddings": 12}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 12}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return transformers.MarianMTModel(transformers.MarianConfig(**sizes, **ends, **options))


def matrices(model):
    parts = model.get_encoder(), model.get_decoder()
    return [*(part.get_input_embeddings().weight for part in parts), model.get_output_embeddings().weight]


def test_t5_scales_what_a_tied_output_is_given():
    """As one that was made tied, with the same weights."""
    made, tied = t5(tie_word_embeddings=True).eval(), t5(tie_word_embeddings=False).eval()
    tie_three_way(tied)
    tied.load_state_dict(made.state_dict())
    ids = torch.tensor([[3, 5, 2]])
    with torch.no_grad():
        logits = [model(input_ids=ids, decoder_input_ids=ids).logits for model in (made, tied)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("make", [t5, bart, marian])
def test_a_model_of_transformers_is_tied_saved_and_loaded(tmp_path, make):
    model = make(tie_word_embeddings=False)
    for weight in matrices(model):  # of which the class may make one at once
        nn.init.normal_(weight)
    value = model.get_decoder().get_input_embeddings().weight
    assert tie_three_way(model) is model
    assert all(weight is value for weight in matrices(model))
    assert_tied(model)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len({id(weight) for weight in matrices(loaded)}) == 1
    assert torch.equal(matrices(loaded)[0], value)
    model.to("meta").to_empty(device="cpu")
    assert_tied(retie(model))
    assert len({id(weight) for weight in matrices(model)}) == 1


def test_two_vocabularies_are_refused():
    model = marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=V + 2)
    message = (
        "tie_three_way: model.encoder.embed_tokens must have the vocabulary of model.decoder.embed_tokens, 19"
        " words, got 17; make one vocabulary of both languages, as of joint byte pairs"
    )
    with refused(ValueError, message):
        tie_three_way(model)
    model = marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=V, tie_word_embeddings=False)
    message = (
        "tie_three_way: MarianMTModel must say how it is tied, got no model.encoder.embed_tokens.weight in"
        " its _tied_weights_keys; name decoder='model.decoder.embed_tokens',"
        " encoder='model.encoder.embed_tokens', output='lm_head' to tie it without its configuration, as it"
        " will not be saved"
    )
    with refused(ValueError, message):
        tie_three_way(model)
    assert not model.config.tie_word_embeddings
    named = {"decoder": "model.decoder.embed_tokens", "encoder": "model.encoder.embed_tokens"}
    tie_three_way(model, **named, output="lm_head")
    assert_tied(model)
    assert len({id(weight) for weight in matrices(model)}) == 1


# Refusals


class Tokenizer:
    def __init__(self, **vocabulary):
        self.vocabulary = vocabulary

    def get_vocab(self):
        return self.vocabulary


def test_tokenizers_are_compared():
    one, same, other = Tokenizer(a=0, b=1), {"b": 1, "a": 0}, Tokenizer(a=0, b=2)
    tie_three_way(Translator(), **ENDS, tokenizers=(one, same))
    message = "tokenizers must have one vocabulary, got 'b' as {} in that of the source and {} in that of"
    for pair, found in (((one, other), (1, 2)), ((one, {"a": 0}), (1, None)), (({"a": 0}, one), (None, 1))):
        model = Translator()
        with refused(
            ValueError,
            f"tie_three_way: {message.format(*found)} the target; train one on both languages",
        ):
            tie_three_way(model, **ENDS, tokenizers=pair)
        assert model.scores.weight is not model.target.weight
    with refused(
        TypeError,
        "tie_three_way: tokenizers must have get_vocab() or be mappings of tokens to ids, got list",
    ):
        tie_three_way(Translator(), **ENDS, tokenizers=(["a"], ["a"]))


def test_refusals():
    quantised = Translator()
    quantised.scores.weight = nn.Parameter(torch.zeros(V, H, dtype=torch.int8), requires_grad=False)
    refusals = [
        (Translator(), {}, ValueError, "encoder, decoder and output must be named for Translator, which does"
         " not know them; give the names of the three modules"),
        (Translator(), {"encoder": "source", "output": "scores"}, ValueError, "encoder, decoder and output"
         " must be given all or none, got encoder, output alone"),
        (Translator(), {**ENDS, "decoder": "targets"}, ValueError, "decoder must be the name of a module of"
         " Translator, got 'targets'; see model.named_modules()"),
        (Translator(source_words=V + 1), ENDS, ValueError, "source must have the vocabulary of target, 17"
         " words, got 18; make one vocabulary of both languages, as of joint byte pairs"),
        (Translator(target_width=H + 2), ENDS, ValueError, "source must have the width of target, 10, got 8;"
         " project what comes out of the embedding, or goes into the output, with an nn.Linear"),
        (quantised, ENDS, TypeError, "scores.weight must be a floating-point matrix, got torch.int8 of shape"
         " (17, 8); dequantise it"),
        ({}, ENDS, TypeError, "model must be an nn.Module, got dict"),
    ]  # fmt: skip
    for model, ends, error, message in refusals:
        with refused(error, f"tie_three_way: {message}"):
            tie_three_way(model, **ends)
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": H, "n_layer": 1, "n_head": 2, "vocab_size": V, "bos_token_id": 0, "eos_token_id": 0}
    with refused(
        ValueError,
        "tie_three_way: GPT2LMHeadModel must be an encoder with a decoder, got one without; call"
        " tie_embeddings(model)",
    ):
        tie_three_way(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
