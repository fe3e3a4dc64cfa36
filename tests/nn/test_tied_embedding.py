"""nn.TiedEmbedding: what it computes, and the gradient of one matrix from its two ends."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, embedding, linear

from fastkit import _native
from fastkit.nn import TiedEmbedding

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

needs_kernel = pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))

V, H = 11, 6
IDS = torch.tensor([[1, 3, 1, 7, 0], [10, 3, 2, 2, 2]])
TARGET = torch.tensor([[3, 1, 7, 0, -100], [3, 2, 2, 2, 10]])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tied(dtype=torch.float64, **options):
    module = TiedEmbedding(V, H, **options).to(dtype)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    return module


class Twin(nn.Module):
    """Of a tied one: the same values in two matrices, and all logits in memory."""

    def __init__(self, module):
        super().__init__()
        self.input = nn.Parameter(module.weight.detach().clone())
        self.output = nn.Parameter(module.weight.detach().clone())
        self.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())
        self.module = [module]

    def loss(self, mix, ids=IDS, target=TARGET, **options):
        (module,) = self.module
        h = mix(embedding(ids, self.input, module.padding_idx) * module.embed_scale)
        z = linear(h, self.output, self.bias)
        if module.softcap is not None:
            z = module.softcap * torch.tanh(z / module.softcap)
        excluded = list(module.exclude_ids)
        z = z.index_fill(-1, torch.tensor(excluded, dtype=torch.int64), -math.inf)
        return cross_entropy(z.flatten(0, -2), target.flatten(), **options)


def mixing(dtype=torch.float64):
    """A model of one layer: so that the gradient of the lookup is none of the softmax."""
    return nn.Sequential(nn.Linear(H, H), nn.Tanh()).to(dtype)


def train(module, mix, ids=IDS, target=TARGET, **options):
    loss = module.loss(mix(module.embed(ids)), target, **options)
    loss.backward()
    return loss


OPTIONS = [
    {},
    {"bias": True},
    {"padding_idx": 2, "embed_scale": H**0.5},
    {"softcap": 0.7},
    {"exclude_ids": (4, 8), "bias": True},
    {"exclude_ids": range(4, 10)[:3], "padding_idx": -1},
]


# What it computes


@pytest.mark.parametrize("fused", [False, True], ids=["returned", "fused"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_tied_gradient_is_the_sum_of_the_untied_ones(options, fused):
    """(7) of the paper's update rules: each row gets what both matrices would."""
    module, mix = tied(**options, fused_accumulate=fused), mixing()
    twin = Twin(module)
    loss = train(module, mix)
    expected = twin.loss(mix)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    both = twin.input.grad + twin.output.grad
    torch.testing.assert_close(module.weight.grad, both, rtol=1e-12, atol=1e-12)
    # Half of it, which a tie that is lost leaves behind, is told apart.
    for half in (twin.input.grad, twin.output.grad):
        assert (module.weight.grad - half).abs().max() > 1e-3
    if twin.bias is not None:
        torch.testing.assert_close(module.bias.grad, twin.bias.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["returned", "fused"])
@pytest.mark.parametrize("end", ["output", "input"])
def test_one_end_alone(end, fused):
    module, mix = tied(bias=True, tie_grad=end, fused_accumulate=fused), mixing()
    twin = Twin(module)
    train(module, mix)
    twin.loss(mix).backward()
    torch.testing.assert_close(module.weight.grad, getattr(twin, end).grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.bias.grad, twin.bias.grad, rtol=1e-12, atol=1e-12)
    assert module.weight.grad.layout == torch.strided


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.3},
        {"weight": torch.arange(1.0, V + 1, dtype=torch.float64), "label_smoothing": 0.1},
        {"reduction": "sum"},
        {"ignore_index": 3},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_of_the_loss_are_those_of_cross_entropy(options):
    module, mix = tied(bias=True, fused_accumulate=True), mixing()
    twin, target = Twin(module), TARGET.clamp(min=0)
    loss = train(module, mix, target=target, **options)
    expected = twin.loss(mix, target=target, **options)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert abs(loss - module.loss(mix(module.embed(IDS)), target)) > 1e-3  # it is not ignored
    torch.testing.assert_close(module.weight.grad, twin.input.grad + twin.output.grad, rtol=1e-12, atol=1e-12)


def test_weights_of_tokens_and_the_penalty_of_lse():
    module = tied()
    h = torch.randn(2, 5, H, dtype=torch.float64)
    token_weight = torch.rand(2, 5, dtype=torch.float64)
    losses = module.loss(h, TARGET, reduction="none", z_loss=0.1, token_weight=token_weight)
    z = module.logits(h)
    plain = cross_entropy(z.flatten(0, 1), TARGET.flatten(), reduction="none").view(2, 5)
    plain = plain + 0.1 * z.logsumexp(-1).square() * (TARGET != -100)
    torch.testing.assert_close(losses, plain * token_weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_those_of_the_loss(options):
    module = tied(**options)
    h = torch.randn(2, 5, H, dtype=torch.float64)
    z = module.logits(h)
    assert torch.equal(
        z[..., list(module.exclude_ids)], z.new_full((2, 5, len(module.exclude_ids)), -math.inf)
    )
    expected = cross_entropy(z.flatten(0, 1), TARGET.flatten())
    torch.testing.assert_close(module.loss(h, TARGET), expected, rtol=1e-12, atol=1e-12)


def test_padding_is_of_the_lookup_alone():
    """The softmax pushes its row, which exclude_ids ends; both together leave it at zero."""
    for options, still in [({}, False), ({"exclude_ids": [2]}, True)]:
        module = tied(padding_idx=2, **options)
        assert not module.weight[2].any()
        target = TARGET.masked_fill(TARGET == 2, -100)
        train(module, mixing(), target=target)
        assert (not module.weight.grad[2].any()) is still
        assert module.weight.grad[3].any()


def test_excluded_rows_get_no_gradient_from_logits_either():
    module = tied(exclude_ids=(4, 8), bias=True)
    z = module.logits(torch.randn(5, H, dtype=torch.float64))
    z.logsumexp(-1).sum().backward()
    rows = module.weight.grad.any(1)
    assert rows.tolist() == [i not in (4, 8) for i in range(V)]
    assert (module.bias.grad != 0).tolist() == rows.tolist()


def test_a_first_block_of_excluded_tokens_leaves_the_loss_finite():
    """Longer than what any implementation takes at once."""
    module = TiedEmbedding(5000, 4, exclude_ids=range(4500)).double()
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = module.loss(h, torch.tensor([4500, 4999, 4600]))
    expected = cross_entropy(h @ module.weight[4500:].T, torch.tensor([0, 499, 100]))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    assert h.grad.isfinite().all() and not module.weight.grad[:4500].any()


def test_at_first_logits_of_unit_inputs_have_unit_variance():
    module = TiedEmbedding(2000, 64, bias=True, padding_idx=5)
    assert module.logits(torch.randn(200, 64)).std().item() == pytest.approx(1, rel=0.05)
    assert not module.weight[5].any() and not module.bias.any()


@pytest.mark.parametrize("fused", [False, True], ids=["returned", "fused"])
def test_gradcheck(fused):
    module = tied(bias=True, embed_scale=2.0, softcap=3.0, fused_accumulate=fused)
    mix = mixing()

    def losses(weight, bias):
        parts = {"weight": weight, "bias": bias}
        h = functional_call(module, parts, (IDS,))
        return functional_call(Losses(module, mix), {f"module.{k}": v for k, v in parts.items()}, (h,))

    class Losses(nn.Module):
        def __init__(self, module, mix):
            super().__init__()
            self.module, self.mix = module, mix

        def forward(self, h):
            return self.module.loss(self.mix(h), TARGET.clamp(min=0), reduction="none", label_smoothing=0.1)

    parts = [p.detach().clone().requires_grad_() for p in (module.weight, module.bias)]
    assert torch.autograd.gradcheck(losses, parts)


# As a module


def test_it_stands_where_an_embedding_stood():
    plain = nn.Embedding(V, H, padding_idx=2)
    module = TiedEmbedding(V, H, padding_idx=2)
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module(IDS), plain(IDS))
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (V, H, 2)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert list(tied(bias=True, exclude_ids=[1]).state_dict()) == ["weight", "bias"]
    assert torch.equal(module(IDS.int()), plain(IDS))


def test_weight_decay_is_once():
    module = tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before = module.weight.detach().clone()
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.1 * 0.5), rtol=1e-12, atol=0)


def test_what_is_excluded_survives_meta_and_copies():
    module = TiedEmbedding(V, H, exclude_ids=[8, 4, 4], device="meta")
    module.logits(torch.ones(1, H, device="meta"))  # which leaves nothing behind that is there
    module.to_empty(device="cpu").reset_parameters()
    assert excluded(module) == [4, 8]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.logits(torch.ones(1, H)), module.logits(torch.ones(1, H)))


def excluded(module):
    z = module.logits(torch.ones(1, H, dtype=module.weight.dtype))
    return (z == -math.inf).nonzero()[:, 1].tolist()


def test_what_is_excluded_survives_a_state_that_is_assigned():
    module = TiedEmbedding(V, H, exclude_ids=[4, 8], device="meta")
    module.load_state_dict({"weight": torch.randn(V, H)}, assign=True)
    assert excluded(module) == [4, 8] and list(module.buffers()) == []
    assert module.loss(torch.ones(2, H), torch.tensor([1, 2])).isfinite()


def test_what_is_excluded_survives_transformers(tmp_path):
    """Whose ``from_pretrained`` gives buffers that are not in the file memory, and no values."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "fastkit_excluding"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.tied = TiedEmbedding(V, H, exclude_ids=[4, 8])
            self.post_init()

    Model(Config()).save_pretrained(tmp_path)
    assert excluded(Model.from_pretrained(tmp_path).tied) == [4, 8]


def test_what_is_excluded_is_not_kept_from_a_call_in_which_it_may_not_be():
    """A tensor of inference is not to be saved for backward, and one of a transform is of it alone."""
    module, h = tied(exclude_ids=(4, 8)), torch.randn(3, H, dtype=torch.float64)
    with torch.inference_mode():
        module.logits(h)
    torch.vmap(module.logits)(h)
    module.logits(h).logsumexp(-1).sum().backward()
    assert module.weight.grad.isfinite().all()


def test_a_copy_trains_its_own_matrix():
    module, mix = tied(fused_accumulate=True), mixing()
    h = module.embed(IDS)  # whose graph lives while the copy is made
    other = copy.deepcopy(module)
    train(other, mix)
    assert module.weight.grad is None and other.weight.grad is not None
    module.loss(mix(h), TARGET).backward()
    torch.testing.assert_close(module.weight.grad, other.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"fused_accumulate": True}, {"exclude_ids": (4, 8)}], ids=str)
@needs_kernel
def test_it_compiles_whole(options):
    module = tied(torch.float32, **options)

    def loss(ids, target):
        return module.loss(torch.tanh(module.embed(ids)), target)

    expected = loss(IDS, TARGET)
    expected.backward()
    gradient, module.weight.grad = module.weight.grad, None
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(IDS, TARGET)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module.weight.grad, gradient)


def test_transforms():
    module = tied(fused_accumulate=True)
    weight = module.weight.detach()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.tied = module

        def forward(self):
            return self.tied.loss(torch.tanh(self.tied(IDS)), TARGET.clamp(min=0))

    gradient = torch.func.grad(lambda w: functional_call(Loss(), {"tied.weight": w}, ()))(weight)
    Loss()().backward()
    torch.testing.assert_close(gradient, module.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["returned", "fused"])
def test_autocast(fused):
    module = tied(torch.float32, fused_accumulate=fused)
    mix = mixing(torch.float32)
    train(module, mix)
    gradient, module.weight.grad = module.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        h = mix(module.embed(IDS))
        loss = module.loss(h, TARGET)
    loss.backward()
    assert h.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32
    torch.testing.assert_close(module.weight.grad, gradient, rtol=0.05, atol=0.01)


# What it refuses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_embeddings": 0}, ValueError, "num_embeddings must be a positive int, got 0"),
        ({"embedding_dim": 2.5}, ValueError, "embedding_dim must be a positive int, got 2.5"),
        ({"padding_idx": 11}, ValueError, "padding_idx must be in [-11, 11), got 11"),
        ({"embed_scale": 0.0}, ValueError, "embed_scale must be finite and not 0, got 0.0"),
        ({"tie_grad": "none"}, ValueError, "tie_grad must be one of both, output, input, got 'none'"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None, got 0.0"),
        ({"exclude_ids": [3, 11]}, ValueError, "exclude_ids must be in [0, 11), got 11"),
        ({"exclude_ids": [-1]}, ValueError, "exclude_ids must be in [0, 11), got -1"),
        ({"exclude_ids": range(11)}, ValueError, "exclude_ids must leave a token to predict, got all 11"),
        (
            {"exclude_ids": [1], "softcap": 2.0},
            ValueError,
            "softcap must be None with exclude_ids, got 2.0; it would make the -inf of their logits finite",
        ),
        ({"padding_idx": 1.5}, TypeError, "padding_idx must be an int, got float; pass int(padding_idx)"),
        ({"embed_scale": "a"}, TypeError, "embed_scale must be a number, got str; pass float(embed_scale)"),
        ({"softcap": "a"}, TypeError, "softcap must be a number, got str; pass float(softcap)"),
        ({"exclude_ids": [1.7]}, TypeError, "exclude_ids must be ints, got [1.7]"),
        ({"exclude_ids": "12"}, TypeError, "exclude_ids must be ints, got '12'"),
        ({"exclude_ids": 3}, TypeError, "exclude_ids must be ints, got 3"),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating point and real, got torch.int8"),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'TiedEmbedding: {message}')}$"):
        TiedEmbedding(**{"num_embeddings": V, "embedding_dim": H, **options})


def test_refused_arguments():
    module = tied(exclude_ids=(4, 8))
    h = torch.randn(2, 5, H, dtype=torch.float64)
    refusals = [
        (TypeError, "ids must be int64 or int32, got torch.float64", lambda: module(h)),
        (TypeError, "ids must be a tensor, got list", lambda: module([1])),
        (TypeError, "h must be a tensor, got list", lambda: module.logits([1.0] * H)),
        (TypeError, "target must be a tensor, got list", lambda: module.loss(h[0, 0], [1])),
        (
            TypeError,
            "h must have the dtype of weight, torch.float64, got torch.float16; cast it, or run under"
            " torch.autocast",
            lambda: module.logits(h.half()),
        ),
        (RuntimeError, "ids must be in [0, 11), got 11", lambda: module(torch.tensor([3, 11]))),
        (RuntimeError, "ids must be in [0, 11), got -1", lambda: module(torch.tensor(-1))),
        (
            ValueError,
            "h must have shape (..., 6), the width of the embeddings, got (2, 5, 5); for another width"
            " project it first, with an nn.Linear",
            lambda: module.loss(h[..., :5], TARGET),
        ),
        (ValueError, "h must have shape (..., 6)", lambda: module.logits(h[0, 0, 0])),
        (
            RuntimeError,
            "target must not be one of exclude_ids, got 8; a token that has no target gets ignore_index",
            lambda: module.loss(h, TARGET.masked_fill(TARGET == 7, 8)),
        ),
        (
            ValueError,
            "label_smoothing must be 0 with exclude_ids, got 0.1; it gives each token a share, and excluded"
            " ones can have none",
            lambda: module.loss(h, TARGET, label_smoothing=0.1),
        ),
    ]
    for error, message, call in refusals:
        with pytest.raises(error, match=re.escape(f"TiedEmbedding: {message}")):
            call()
    with pytest.raises(RuntimeError, match="target must be in "):
        module.loss(h, TARGET + 9)
    target = TARGET.clamp(min=0).masked_fill(TARGET == 7, 8)
    assert module.loss(h, target, ignore_index=8).isfinite()  # which it may be to ignore
    with pytest.raises(RuntimeError, match="target must not be one of exclude_ids, got 8"):
        module.loss(h, target.int(), ignore_index=2**32 + 8)  # which is 8 in int32


def test_a_weight_that_is_replaced():
    module = tied(torch.float32)
    module.weight = nn.Parameter(torch.zeros(V, H, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight must be floating point and real, got torch\.int8"):
        module.loss(torch.randn(2, H), torch.tensor([1, 2]))


class DTensor(torch.Tensor):
    """By its name."""


def test_a_sharded_weight_is_refused_with_the_cure():
    module = tied(torch.float32)
    del module.weight
    module.weight = torch.randn(V, H).as_subclass(DTensor)
    for call in (lambda: module(IDS), lambda: module.loss(torch.randn(2, H), torch.tensor([1, 2]))):
        with pytest.raises(TypeError, match=r"weight is a DTensor, .*register_fsdp_forward_method"):
            call()
