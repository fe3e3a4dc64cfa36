"""nn.PRILoRALinear: what it computes and counts, how it is pruned and merged, and that it is a module."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastkit import _native, ops
from fastkit.nn import PRILoRALinear

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo
]

needs_kernel = pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))

D, O, R = 20, 12, 3  # noqa: E741


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Conv1D(nn.Module):
    """As transformers has it: the weight is transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Quantised(nn.Module):
    """A weight of bytes and a scale, as 8-bit layers have."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D, O
        self.weight = nn.Parameter(torch.randint(-128, 128, (O, D), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) / 64)


BASES = {"linear": lambda: nn.Linear(D, O), "conv1d": lambda: Conv1D(O, D), "quantised": Quantised}


def layer(base="linear", **options):
    """With a B that is not zero, as after some training."""
    made = PRILoRALinear(BASES[base](), **{"rank": R, **options})
    nn.init.normal_(made.lora_b)
    return made


def written_out(module, x, lora_x=None):
    a = module.lora_a.masked_fill(~module.mask, 0.0)
    return module.base_layer(x) + module.alpha / module.rank * linear(
        linear(x if lora_x is None else lora_x, a), module.lora_b
    )


def train_step(module, *batches):
    for x in batches:
        module(x).square().sum().backward()
    module.fold_()


# What it computes


@pytest.mark.parametrize("base", BASES)
def test_forward_and_gradients_are_the_formula(base):
    module = layer(base, alpha=5.0).double()
    module.mask.copy_(torch.rand(R, D) < 0.5)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    leaves = (x, module.lora_a, module.lora_b)
    y, expected = module(x), written_out(module, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gy = torch.randn_like(y)
    for g, want in zip(
        torch.autograd.grad(y, leaves, gy), torch.autograd.grad(expected, leaves, gy), strict=True
    ):
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_at_first_it_is_the_base_layer(base):
    original = BASES[base]()
    module = PRILoRALinear(original, R)
    x = torch.randn(5, D)
    torch.testing.assert_close(module(x), original(x))
    assert module.lora_a.abs().max() <= 1 / math.sqrt(D)
    assert module.lora_a.std().item() == pytest.approx(1 / math.sqrt(3 * D), rel=0.2)


def test_only_the_adapter_is_trained():
    module = layer()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"lora_a", "lora_b"}
    train_step(module, torch.randn(5, D))
    assert module.base_layer.weight.grad is None


def test_it_stands_where_the_linear_layer_stood():
    base = nn.Linear(D, O)
    module = PRILoRALinear(base, R)
    assert (module.in_features, module.out_features) == (D, O)
    assert module.weight is base.weight and module.bias is base.bias
    assert "rank=3, alpha=16, dropout=0, beta=0.9" in repr(module)
    assert PRILoRALinear(nn.Linear(D, O, bias=False), R).bias is None


def test_dropout_is_of_the_low_rank_part_alone_and_in_training_alone():
    module = layer(dropout=0.5)
    x = torch.randn(64, D)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    expected = written_out(module, x, nn.functional.dropout(x, 0.5))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module.square_sum, x.square().sum(0))  # of what is not dropped out
    module.eval()
    torch.testing.assert_close(module(x), written_out(module, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_layer_has_a_float32_adapter(dtype):
    module = PRILoRALinear(nn.Linear(D, O).to(dtype), R)
    assert module.lora_a.dtype == module.lora_b.dtype == torch.float32
    y = module(torch.randn(5, D, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert module.lora_b.grad.dtype == torch.float32


def test_autocast_lowers_it_as_it_lowers_a_linear_layer():
    module = layer()
    x = torch.randn(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = module(x), module.base_layer(x)
    assert y.dtype == frozen.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), written_out(module, x), rtol=0.05, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer("quantised")(x).dtype == torch.bfloat16


# What it counts


@pytest.mark.parametrize("base", BASES)
def test_the_average_follows_its_formula(base):
    module = layer(base, beta=0.75)
    batches = [torch.randn(5, D) for _ in range(3)]
    train_step(module, batches[0])
    first = batches[0].square().sum(0)
    torch.testing.assert_close(module.input_square, first)
    train_step(module, *batches[1:])
    second = sum(x.square().sum(0) for x in batches[1:])
    torch.testing.assert_close(module.input_square, 0.75 * first + 0.25 * second)
    torch.testing.assert_close(module.input_norm, module.input_square.sqrt())
    assert int(module.folds) == 2 and not module.square_sum.any()


def test_a_step_may_be_cut_into_any_batches():
    whole, cut = layer(), layer()
    for _ in range(3):
        x = torch.randn(12, D)
        train_step(whole, x)
        train_step(cut, *x.split([1, 4, 7]))
    torch.testing.assert_close(whole.input_square, cut.input_square, rtol=1e-5, atol=0)
    assert int(whole.folds) == int(cut.folds) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    plain, checkpointed = layer(), layer()
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(5, D, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(checkpointed, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain.square_sum, checkpointed.square_sum)
    assert torch.equal(plain.lora_a.grad, checkpointed.lora_a.grad)


@needs_kernel
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_layer_in_a_checkpoint_counts_once(reentrant):
    plain, compiled = layer(), layer()
    compiled.load_state_dict(plain.state_dict())
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, D, requires_grad=True)
    for _ in range(2):
        plain(x).square().sum().backward()
        checkpoint(graph, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(compiled.square_sum, plain.square_sum)
    torch.testing.assert_close(compiled.lora_a.grad, plain.lora_a.grad)


def test_a_layer_that_is_not_enabled_is_the_base_layer_and_counts_nothing():
    module = layer()
    module.enabled = False
    x = torch.randn(5, D)
    assert torch.equal(module(x), module.base_layer(x)) and not module.square_sum.any()
    module.enabled = True
    torch.testing.assert_close(module(input=x), written_out(module, x))


def test_nothing_is_counted_in_eval_or_without_statistic():
    module = layer().eval()
    module(torch.randn(5, D))
    assert not module.square_sum.any()
    module = layer(statistic=False)
    module(torch.randn(5, D))
    module.fold_()
    assert not module.square_sum.any() and int(module.folds) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_average_as_it_was(value):
    module = layer()
    train_step(module, torch.randn(5, D))
    before = module.input_square.clone()
    x = torch.randn(5, D)
    x[2, 3] = value
    module(x)
    module(torch.randn(5, D))
    module.fold_()
    assert torch.equal(module.input_square, before) and int(module.folds) == 1
    train_step(module, torch.randn(5, D))
    assert int(module.folds) == 2 and module.input_square.isfinite().all()


def test_fold_without_a_training_forward_changes_nothing():
    module = layer()
    train_step(module, torch.randn(5, D))
    before = module.input_square.clone()
    module.fold_()
    assert torch.equal(module.input_square, before) and int(module.folds) == 1


def test_transforms_run_and_count_nothing():
    module = layer()
    x = torch.randn(4, 5, D)
    torch.testing.assert_close(vmap(module)(x), module(x))
    module.square_sum.zero_()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    gradient = torch.func.grad(lambda p: functional_call(module, p, x).square().sum())(parameters)
    assert gradient["lora_a"].abs().sum() > 0 and not module.square_sum.any()


# Pruning


@pytest.mark.parametrize("hard", [False, True])
def test_prune_is_of_each_row_by_magnitude_and_norm(hard):
    module = layer()
    train_step(module, torch.randn(50, D) * torch.logspace(-2, 2, D))
    a, norm = module.lora_a.detach().clone(), module.input_norm
    expected = ops.prune_rows_(a.clone(), norm, 0.3, impl="reference")
    kept = module.prune_(0.3, hard=hard)
    assert torch.equal(kept, expected)
    assert torch.equal(module.lora_a, a * kept)
    assert ((~kept).sum(1) == math.floor(0.3 * D)).all()
    assert torch.equal(module.mask, kept if hard else torch.ones_like(kept))


@pytest.mark.parametrize("hard", [False, True])
def test_what_is_pruned_hard_stays_zero_and_soft_grows_again(hard):
    """Under an optimizer that moves it by what it remembers, too."""
    module = layer()
    optimizer = torch.optim.Adam([module.lora_a, module.lora_b], lr=0.1)

    def step():
        optimizer.zero_grad()
        module(torch.randn(50, D)).square().sum().backward()
        optimizer.step()
        module.fold_()

    step()
    kept = module.prune_(0.5, hard=hard)
    for _ in range(3):
        step()
        grown = module.lora_a[~kept] != 0
        assert not grown.any() if hard else grown.all()
    assert module.lora_a[kept].count_nonzero() == kept.sum()


def test_pruning_needs_a_statistic():
    message = (
        "PRILoRALinear: prune_ needs a statistic, and none was folded; train, and call fold_() after each"
        " optimizer step"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        layer().prune_(0.5)


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_merge_is_one_rounding_away_and_unmerge_gives_the_bits_back(base, dtype):
    module = PRILoRALinear(BASES[base]().to(dtype), R).eval()
    nn.init.normal_(module.lora_b)
    module.mask.copy_(torch.rand(R, D) < 0.5)
    weight, bias = module.weight.clone(), module.bias.clone()
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    a = module.lora_a.masked_fill(~module.mask, 0.0)
    delta = 16 / R * (module.lora_b @ a)
    expected = (weight.to(arithmetic) + (delta.T if base == "conv1d" else delta)).to(dtype)
    x = torch.randn(5, D, dtype=dtype)
    before = module(x)
    assert module.merge() is module and module.merged
    assert torch.equal(module.weight, expected) and torch.equal(module.bias, bias)
    eps = torch.finfo(dtype).eps
    size = linear(x.abs().double(), weight.double().abs() if base == "linear" else weight.double().abs().T)
    size = size + linear(x.abs().double(), delta.double().abs()) + bias.double().abs()
    assert ((module(x).double() - before.double()).abs() <= (4 if eps > 1e-3 else 2 * D) * eps * size).all()
    assert module.unmerge() is module and not module.merged
    assert torch.equal(module.weight, weight) and torch.equal(module(x), before)


def refused(message):
    return pytest.raises(RuntimeError, match=f"^{re.escape(f'PRILoRALinear: {message}')}$")


def test_what_a_merged_layer_refuses():
    module = layer().merge()
    with refused("a merged layer cannot be trained; call unmerge(), or eval() for inference"):
        module(torch.randn(5, D))
    with refused("merge: the layer is merged already; call unmerge() first"):
        module.merge()
    with refused(
        "a merged layer is not saved, for its adapter would be added twice; unmerge() it, or save base_layer"
    ):
        nn.Sequential(module).state_dict()
    with refused("a merged layer is not loaded into, for its weight is another; unmerge() it first"):
        nn.Sequential(module).load_state_dict(nn.Sequential(layer()).state_dict())
    module.half()
    with refused(
        "unmerge: the weight was torch.float32 when it was merged, and is torch.float16 now;"
        " load it from its checkpoint"
    ):
        module.unmerge()


def test_merging_that_cannot_be_undone_is_said_to_be():
    module = layer()
    with refused("unmerge: the layer is not merged; call merge() first"):
        module.unmerge()
    module.merge(reversible=False)
    with refused(
        "unmerge: the weight was merged with reversible=False, and is not known any more;"
        " load it from its checkpoint"
    ):
        module.unmerge()


class Scaled(nn.Linear):
    """Its weight is not all that it computes with."""

    def forward(self, input):
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    "base", [Quantised, lambda: Scaled(D, O), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, O))]
)
def test_a_layer_whose_weight_is_not_all_of_it_is_called_and_not_merged_into(base):
    module = PRILoRALinear(base(), R)
    nn.init.normal_(module.lora_b)
    x = torch.randn(5, D)
    torch.testing.assert_close(module(x), written_out(module, x))
    name = type(module.base_layer).__name__
    with refused(
        f"merge: the weight of {name} is not a plain floating-point tensor; dequantise the layer first, or"
        " keep the adapter apart"
    ):
        module.merge()


# As a module


def test_state_survives_saving_in_a_model_and_goes_on_with_the_same_bits():
    def model():
        torch.manual_seed(5)
        net = nn.Sequential(layer(dropout=0.1), nn.Linear(O, 2))
        return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)

    def steps(net, optimizer, numbers):
        for i in numbers:
            generator = torch.Generator().manual_seed(i)
            torch.manual_seed(i)
            optimizer.zero_grad()
            net(torch.randn(9, D, generator=generator)).square().sum().backward()
            optimizer.step()
            net[0].fold_()
            if i % 2 == 1:
                net[0].prune_(0.5, hard=True)

    straight, optimizer = model()
    steps(straight, optimizer, range(6))
    first, optimizer = model()
    steps(first, optimizer, range(3))
    saved = pickle.loads(pickle.dumps((first.state_dict(), optimizer.state_dict())))
    resumed, optimizer = model()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(resumed, optimizer, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_load_drops_what_was_summed():
    module = layer()
    module(100 * torch.randn(5, D))
    module.load_state_dict(layer().state_dict())
    assert not module.square_sum.any()


def test_made_on_meta_and_loaded_it_counts():
    with torch.device("meta"):
        module = PRILoRALinear(nn.Linear(D, O), R)
    module.load_state_dict(layer().state_dict(), assign=True)
    x = torch.randn(5, D)
    train_step(module, x)
    torch.testing.assert_close(module.input_square, x.square().sum(0))


def test_copies_and_pickles_are_whole():
    module = layer()
    train_step(module, torch.randn(5, D))
    module.merge()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.unmerge()
        x = torch.randn(5, D)
        assert torch.equal(other.eval()(x), layer_of(module).eval()(x))
        assert torch.equal(other.input_square, module.input_square)


def layer_of(merged):
    return copy.deepcopy(merged).unmerge()


def test_casts_leave_the_average_in_float32():
    module = layer()
    train_step(module, 300 * torch.randn(50, D))  # squares that float16 does not have
    average = module.input_square.clone()
    module.half()
    assert module.lora_a.dtype == torch.float16 and torch.equal(module.input_square, average)
    assert module.square_sum.dtype == torch.float32
    module.double()
    assert module.input_square.dtype == torch.float32 and torch.equal(module.input_square, average)


def test_it_moves_with_its_model():
    with torch.device("meta"):
        module = PRILoRALinear(nn.Linear(D, O), R)
    assert {t.device.type for t in (*module.parameters(), *module.buffers(), module.square_sum)} == {"meta"}
    module.to_empty(device="cpu")
    for tensor in (module.input_square, module.folds, module.square_sum):
        tensor.fill_(9)  # whatever the memory held
    module.reset_parameters()
    assert module.mask.all() and not module.lora_b.any()
    assert not any(t.any() for t in (module.input_square, module.folds, module.square_sum))


def test_the_adapter_is_where_its_base_layer_is():
    with torch.device("meta"):
        base = Quantised()
    base.register_buffer("scales", torch.ones(O))  # as of a layer whose weight is brought when it is called
    assert PRILoRALinear(base, R).lora_a.device.type == "cpu"


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_the_base_layer_run(register):
    module = layer()
    x, called = torch.randn(5, D, requires_grad=True), []
    expected = module(x)
    getattr(module.base_layer, register)(lambda *_: called.append(True))
    y = module(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert called


@needs_kernel
def test_compiles_into_one_graph_that_counts():
    module, compiled = layer(), layer()
    compiled.load_state_dict(module.state_dict())
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(5, D)
        train_step(module, x)
        graph(x).square().sum().backward()
        compiled.fold_()
    assert torch.equal(module.input_square, compiled.input_square)
    torch.testing.assert_close(module.lora_a.grad, compiled.lora_a.grad)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be in [1, 12], the least of in_features and out_features, got 0"),
        ({"rank": 13}, "rank must be in [1, 12], the least of in_features and out_features, got 13"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"beta": 1.0}, "beta must be in [0, 1), got 1.0"),
        ({"beta": math.nan}, "beta must be in [0, 1), got nan"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": math.inf}, "alpha must be positive and finite, got inf"),
    ],
)
def test_refuses_in_words(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'PRILoRALinear: {message}')}$"):
        layer(**options)


def test_a_base_that_is_no_linear_layer_is_refused():
    message = (
        "PRILoRALinear: base_layer must be a linear layer with in_features and out_features, or a"
        " transformers Conv1D, got LayerNorm"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PRILoRALinear(nn.LayerNorm(3), R)


def test_a_layer_whose_weight_is_read_past_it_is_refused():
    message = (
        "PRILoRALinear: base_layer must not be the out_proj of nn.MultiheadAttention, which reads its weight"
        " past the layer; adapt other layers"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PRILoRALinear(nn.MultiheadAttention(8, 2).out_proj, R)


def test_the_conv1d_of_transformers_is_taken():
    utils = pytest.importorskip("transformers.pytorch_utils")
    base = utils.Conv1D(O, D)
    module = PRILoRALinear(base, R)
    nn.init.normal_(module.lora_b)
    x = torch.randn(5, D)
    assert (module.in_features, module.out_features) == (D, O)
    torch.testing.assert_close(module(x), written_out(module, x))
