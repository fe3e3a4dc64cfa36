"""Tying: of transformers' models and of others, that a tie which is lost is found, and mended."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from fastkit.methods.tied_embedding import (
    HalfGradientError,
    UntiedError,
    assert_tied,
    retie,
    tie_embeddings,
)
from fastkit.nn import TiedEmbedding

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT
]

V, H = 17, 8
IDS = torch.tensor([[1, 5, 3, 3, 9], [0, 2, 16, 5, 5]])
ENDS = {"input": "embed", "output": "head"}


class Net(nn.Module):
    """A bag of words, whose two ends have names of their own."""

    def __init__(self, width=H, head=None):
        super().__init__()
        self.embed = nn.Embedding(V, H, padding_idx=0)
        self.mix = nn.Linear(H, width)
        self.head = nn.Linear(width, V) if head is None else head

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Detached(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight.detach(), self.bias)


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def gradient_of_twin(net):
    """What the matrix should get: the sum over both ends, each with a matrix of its own."""
    twin = copy.deepcopy(net)
    twin.head.weight = nn.Parameter(twin.embed.weight.detach().clone())
    cross_entropy(twin(IDS).flatten(0, 1), IDS.flatten()).backward()
    return twin.embed.weight.grad, twin.head.weight.grad


def gradient(net):
    net.zero_grad()
    cross_entropy(net(IDS).flatten(0, 1), IDS.flatten()).backward()
    return net.embed.weight.grad


# Any module


def test_two_modules_share_one_parameter_and_its_gradient():
    net = Net().double()
    bias = net.head.bias
    assert tie_embeddings(net, **ENDS) is net
    assert net.head.weight is net.embed.weight and net.head.bias is bias
    assert "head.weight" not in dict(net.named_parameters())
    assert_tied(net)
    torch.testing.assert_close(gradient(net), sum(gradient_of_twin(net)), rtol=1e-12, atol=1e-12)
    other = copy.deepcopy(net)
    assert_tied(other)
    assert other.embed.weight is not net.embed.weight


def test_to_empty_loses_the_tie_and_retie_mends_it():
    net = tie_embeddings(Net().to("meta"), **ENDS)
    assert_tied(net)
    net.to_empty(device="cpu")
    message = "embed and head must have one weight, got two; call retie(model)"
    with refused(UntiedError, f"assert_tied: {message}"):
        assert_tied(net)
    assert retie(net) is net
    net.load_state_dict(Net().state_dict())
    assert_tied(net)
    parameter = net.embed.weight
    assert retie(net).embed.weight is parameter  # which is left as it is


def test_half_of_the_gradient_is_found():
    """An error of its own: the values are right, and the loss falls, with a part of the gradient."""
    net = tie_embeddings(Net().double(), **ENDS)
    halves = gradient_of_twin(net)
    net.head.weight = nn.Parameter(net.embed.weight.detach())  # the memory is shared, the gradient is not
    torch.testing.assert_close(gradient(net), halves[0], rtol=1e-12, atol=1e-12)
    assert (sum(halves) - halves[0]).abs().max() > 1e-3
    message = (
        "embed and head must have one parameter, got two that share their memory, each with its part of the"
        " gradient; call retie(model)"
    )
    with refused(HalfGradientError, f"assert_tied: {message}"):
        assert_tied(net)
    torch.testing.assert_close(gradient(retie(net)), sum(halves), rtol=1e-12, atol=1e-12)

    net = tie_embeddings(Net(head=Detached(H, V)).double(), **ENDS)
    torch.testing.assert_close(gradient(net), gradient_of_twin(net)[0], rtol=1e-12, atol=1e-12)
    message = (
        "the gradient of head, the output, must reach the weight that both ends share, got none; look for a"
        " detach(), a no_grad() or tie_grad on the way"
    )
    with refused(HalfGradientError, f"assert_tied: {message}"):
        assert_tied(net)
    assert_tied(net, gradient=False)


def test_a_tied_embedding_is_both_ends():
    class Model(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.tied = TiedEmbedding(V, H, exclude_ids=[3], **options)

    assert_tied(Model(), input="tied", output="tied")
    assert_tied(TiedEmbedding(V, H, fused_accumulate=True), input="", output="")
    for end, other in (("input", "output"), ("output", "embedding")):
        with pytest.raises(HalfGradientError, match=f"the gradient of tied, the {other}, must reach"):
            assert_tied(Model(tie_grad=end), input="tied", output="tied")


def test_a_tied_embedding_alone():
    for function in (assert_tied, tie_embeddings, retie):
        function(TiedEmbedding(V, H))
    for end, other in (("input", "output"), ("output", "embedding")):
        with pytest.raises(HalfGradientError, match=f"of TiedEmbedding, the {other}, must reach the weight"):
            assert_tied(TiedEmbedding(V, H, tie_grad=end))
    capped = TiedEmbedding(V, H, softcap=1.0)
    nn.init.constant_(capped.weight, 10.0)  # a row of ones would have all logits at the softcap
    assert_tied(capped)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_is_asserted_where_nothing_is_differentiated(mode):
    net = tie_embeddings(Net(), **ENDS)
    detached = tie_embeddings(Net(head=Detached(H, V)), **ENDS)
    with mode():
        assert_tied(net)
        with pytest.raises(HalfGradientError, match="the gradient of head, the output, must reach"):
            assert_tied(detached)


def test_tensors_without_memory():
    with FakeTensorMode():
        net = Net()
        message = "embed and head must have one weight, got two; call retie(model)"
        with refused(UntiedError, f"assert_tied: {message}"):
            assert_tied(net, **ENDS)
        assert_tied(tie_embeddings(net, **ENDS))


def test_what_is_asserted_changes_nothing():
    net = Net()
    net.embed.max_norm = 0.1
    before = net.embed.weight.detach().clone()
    assert_tied(tie_embeddings(net, **ENDS))
    assert torch.equal(net.embed.weight, before) and net.embed.max_norm == 0.1
    net = tie_embeddings(Net(), **ENDS)
    net.mix.eval()
    net.embed.weight.requires_grad_(False)
    net.embed.weight.grad = torch.ones(V, H)
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    assert_tied(net)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.embed.weight.grad, torch.ones(V, H)) and not net.embed.weight.requires_grad


class DTensor(torch.Tensor):
    """By its name."""


def test_refusals():
    net, wide = Net(), Net(width=5)
    quantised, sharded, wrapped = Net(), Net(), Net()
    quantised.head.weight = nn.Parameter(torch.zeros(V, H, dtype=torch.int8), requires_grad=False)
    sharded.head._parameters["weight"] = torch.randn(V, H).as_subclass(DTensor)
    wrapped.head = nn.Sequential(wrapped.head)
    refusals = [
        (net, {}, ValueError, "input and output must be named for Net, which does not know its input and"
         " output embeddings; give the names of the two modules"),
        (net, {"input": "embed"}, ValueError, "input and output must be given both or neither, got 'embed',"
         " None"),
        (net, {"input": "embed", "output": "heads"}, ValueError, "output must be the name of a module of Net,"
         " got 'heads'; see model.named_modules()"),
        (wide, ENDS, ValueError, "head.weight must have the shape of embed.weight, (17, 8), got (17, 5);"
         " project what goes into the output to the width of the embedding first, with an nn.Linear"),
        (quantised, ENDS, TypeError, "head.weight must be a floating-point matrix, got torch.int8 of shape"
         " (17, 8); dequantise it"),
        (sharded, ENDS, TypeError, "head.weight is a DTensor; tie the model before it is sharded, both ends"
         " in one group"),
        (wrapped, ENDS, ValueError, "head must have a parameter `weight` of its own, got Sequential; merge or"
         " unload what wraps it"),
    ]  # fmt: skip
    for function in (tie_embeddings, retie, assert_tied):
        for model, ends, error, message in refusals:
            if function is assert_tied and model is wide:
                continue
            with refused(error, f"{function.__name__}: {message}"):
                function(model, **ends)
    with refused(TypeError, "tie_embeddings: model must be an nn.Module, got dict"):
        tie_embeddings({})


# Models of transformers


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": H, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": V}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, **dropouts, **options))


def test_a_model_of_transformers_is_tied_saved_and_loaded(tmp_path):
    model = gpt2(tie_word_embeddings=False)
    with refused(UntiedError, "assert_tied: transformer.wte and lm_head must have one weight, got two; call"
                 " retie(model)"):  # fmt: skip
        assert_tied(model)
    with refused(ValueError, "retie: GPT2LMHeadModel must be tied by its configuration, got"
                 " config.tie_word_embeddings=False; call tie_embeddings(model)"):  # fmt: skip
        retie(model)
    assert tie_embeddings(model) is model
    assert_tied(model)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_tied(loaded)
    assert torch.equal(loaded.lm_head.weight, model.transformer.wte.weight)
    assert_tied(copy.deepcopy(model))


def test_names_of_its_own_ends_tie_a_model_of_transformers_as_without(tmp_path):
    """Else the file would have no head, of a model that says it is not tied."""
    for function in (tie_embeddings, retie):
        model = function(gpt2(tie_word_embeddings=False), input="transformer.wte", output="lm_head")
        assert_tied(model)
        assert model.config.tie_word_embeddings
        model.save_pretrained(tmp_path / function.__name__)
        loaded = type(model).from_pretrained(tmp_path / function.__name__)
        assert_tied(loaded)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_what_tying_survives():
    model = gpt2()
    assert_tied(model)
    model.resize_token_embeddings(V + 3)
    assert_tied(model)
    assert model.lm_head.weight.shape == (V + 3, H)
    with torch.device("meta"):
        shell = gpt2()
    assert_tied(shell)
    shell.load_state_dict(gpt2().state_dict(), assign=True)
    retie(shell)  # assignment makes two of what the file has twice
    assert_tied(shell)


@pytest.mark.parametrize("how", ["to_empty", "set_input_embeddings"])
def test_a_lost_tie_of_transformers_is_mended(how):
    model = gpt2().to("meta") if how == "to_empty" else gpt2()
    if how == "to_empty":
        model.to_empty(device="cpu")
    else:
        model.set_input_embeddings(nn.Embedding(V, H))
    with pytest.raises(UntiedError, match=r"transformer\.wte and lm_head must have one weight, got two"):
        assert_tied(model)
    before = model.get_input_embeddings().weight
    assert_tied(retie(model))
    assert model.lm_head.weight is before
    model.set_input_embeddings(nn.Embedding(V + 1, H))
    message = (
        "retie: lm_head.weight must have the shape of transformer.wte.weight, (18, 8), got (17, 8); resize"
        " one with resize_token_embeddings or by hand"
    )
    with refused(ValueError, message):
        retie(model)


def test_an_adapter_around_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = gpt2(tie_word_embeddings=False)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config).get_base_model()
    with pytest.raises(ValueError, match=r"lm_head must have a parameter `weight` of its own, got Modules"):
        tie_embeddings(wrapped)
    with pytest.raises(ValueError, match="merge or unload what wraps it"):
        assert_tied(wrapped)


def test_a_class_that_does_not_say_how_it_is_tied(monkeypatch):
    model = gpt2(tie_word_embeddings=False)
    monkeypatch.setattr(type(model), "_tied_weights_keys", None)
    message = (
        "tie_embeddings: GPT2LMHeadModel must say how it is tied, got no lm_head.weight in its"
        " _tied_weights_keys; name input='transformer.wte', output='lm_head' to tie it without its"
        " configuration, as it will not be saved"
    )
    with refused(ValueError, message):
        tie_embeddings(model)
    assert not model.config.tie_word_embeddings
    tie_embeddings(model, input="transformer.wte", output="lm_head")
    assert_tied(model)
