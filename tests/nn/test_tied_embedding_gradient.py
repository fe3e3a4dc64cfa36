"""``fused_accumulate`` of nn.TiedEmbedding: the gradient that autograd would have, with one matrix fewer."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fastkit import _native
from fastkit.nn import TiedEmbedding
from fastkit.nn.tied_embedding_gradient import Ends

pytestmark = pytest.mark.native

V, H, N = 23, 6, 40


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(dtype=torch.float64, **options):
    """With the gradient fused, and without."""
    fused = TiedEmbedding(V, H, fused_accumulate=True, **options).to(dtype)
    plain = TiedEmbedding(V, H, **options).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def batch(*shape):
    return torch.randint(V, shape or (N,)), torch.randint(V, shape or (N,))


def loss_of(module, ids, target):
    return module.loss(torch.tanh(module.embed(ids).cumsum(0)), target)


def assert_same(fused, plain, tolerance=1e-13):
    assert fused.weight.grad.layout == torch.strided
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad, rtol=tolerance, atol=tolerance)


def on_both(modules, run):
    for module in modules:
        run(module)
    assert_same(*modules)


@pytest.mark.parametrize("shape", [(N,), (4, 5), (1,), (0,), ()])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "embed_scale": 2.0}], ids=str)
def test_it_is_the_gradient_of_both_ends(shape, options):
    ids, target = torch.randint(V, shape), torch.randint(V, shape)
    weight = torch.rand(shape, dtype=torch.float64)

    def run(module):
        module.loss(torch.tanh(module(ids)), target, token_weight=weight, reduction="sum").backward()

    on_both(pair(**options), run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_summed_in_float32_whatever_the_dtype(dtype):
    """A thousand times one token: in bfloat16 the sum itself would stop growing at 256."""
    module = TiedEmbedding(V, H, fused_accumulate=True, dtype=dtype)
    module(torch.full((1000,), 4)).sum().backward()
    expected = torch.zeros(V, H)
    expected[4] = 1000
    assert torch.equal(module.weight.grad.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_each_time(dtype):
    module = TiedEmbedding(V, H, fused_accumulate=True, dtype=dtype)
    ids, target = batch(2000)
    gradients = []
    for _ in range(3):
        module.zero_grad()
        loss_of(module, ids, target).backward()
        gradients.append(module.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


class Product(Function):
    """As the loss does: its gradient of the matrix is memory of its own."""

    made = 0

    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return h @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        h, weight = ctx.saved_tensors
        of_weight = gradient.T @ h
        Product.made = of_weight.data_ptr()
        return gradient @ weight, of_weight


def test_the_gradient_of_the_lookup_is_added_into_that_of_the_output():
    """In its memory, which then is the parameter's gradient."""
    weight = nn.Parameter(torch.randn(V, H))
    ids, target = batch()
    ends = Ends()
    h = ends.lookup(ids, weight, None)
    cross_entropy(Product.apply(torch.tanh(h), ends.output(weight)), target).backward()
    assert weight.grad.data_ptr() == Product.made
    fused, weight.grad = weight.grad, None
    cross_entropy(torch.tanh(nn.functional.embedding(ids, weight)) @ weight.T, target).backward()
    torch.testing.assert_close(fused, weight.grad)


@pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_lookup_is_added_into_that_of_the_loss(dtype):
    """As it comes from the op's kernel."""
    ids, target = batch()
    fused, _ = pair(dtype)
    h, made = torch.tanh(fused(ids)), []
    fused._ends.output(fused.weight).register_hook(lambda g: made.append(g.data_ptr()))
    fused.loss(h, target).backward()
    assert made == [fused.weight.grad.data_ptr()]


def test_one_end_without_the_other():
    ids, target = batch()
    h = torch.randn(N, H, dtype=torch.float64)
    on_both(pair(), lambda module: module(ids).square().sum().backward())
    on_both(pair(), lambda module: module.loss(h, target).backward())
    on_both(pair(), lambda module: module.loss(module(ids).detach(), target).backward())


def test_the_order_of_the_ends_is_of_no_matter():
    ids, target = batch()
    h = torch.randn(N, H, dtype=torch.float64)

    def loss_first(module):
        loss = module.loss(h, target)
        (loss + module(ids).square().sum()).backward()

    def lookup_of_the_loss(module):
        """In backward the lookup comes before the loss that its input was made by."""
        losses = module.loss(h, target, reduction="none")
        (losses[:, None] * module(ids)).sum().backward()

    def several(module):
        source, other = module(ids[:10]), module(ids[10:])
        loss = module.loss(torch.tanh(source), target[:10]) + module.loss(other, target[10:])
        (loss + module.logits(source).square().mean()).backward()

    for run in (loss_first, lookup_of_the_loss, several):
        on_both(pair(), run)


def test_batches_accumulate():
    batches = [batch() for _ in range(3)]

    def one_by_one(module):
        for ids, target in batches:
            loss_of(module, ids, target).backward()

    def at_the_end(module):
        """With all graphs alive at once."""
        losses = [loss_of(module, *each) for each in batches]
        for loss in losses:
            loss.backward()

    def together(module):
        torch.stack([loss_of(module, *each) for each in batches]).sum().backward()

    def twice(module):
        loss = loss_of(module, *batches[0])
        loss.backward(retain_graph=True)
        loss.backward()

    for run in (one_by_one, at_the_end, together, twice):
        on_both(pair(), run)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_of_an_optimizer(set_to_none):
    """Which write to the matrix while the graph of the loss before still lives."""
    batches = [batch() for _ in range(5)]

    def run(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for each in batches:
            optimizer.zero_grad(set_to_none)
            loss = loss_of(module, *each)  # that of the step before is alive until here
            loss.backward()
            optimizer.step()

    modules = pair()
    on_both(modules, run)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=1e-11, atol=1e-11)


def test_a_matrix_whose_data_is_replaced():
    """By which its version does not change, while the graph of the loss before still lives."""
    each = batch()

    def run(module):
        losses = []
        for _ in range(4):
            loss = loss_of(module, *each)
            module.zero_grad()
            loss.backward()
            for p in module.parameters():
                p.data = p.data - 5 * p.grad
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
        return losses

    modules = pair()
    assert run(modules[0]) == pytest.approx(run(modules[1]), rel=1e-10)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_matrix_of_another_dtype_than_in_the_graph_before(dtype):
    ids, target = batch()
    fused, plain = pair()
    before = loss_of(fused, ids, target)
    for module in (fused, plain):
        module.to(dtype)
        assert module(ids).dtype == dtype
        loss_of(module, ids, target).backward()
    assert before.dtype == torch.float64 and fused.weight.grad.dtype == dtype
    eps = torch.finfo(dtype).eps  # the two ends are rounded before they are added, and their sum after
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad, rtol=4 * eps, atol=4 * eps)


def test_hooks_see_the_gradient_of_both_ends():
    ids, target = batch()
    seen = []

    def run(module):
        module.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
        module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss_of(module, ids, target).backward()

    modules = pair()
    on_both(modules, run)
    for fused, plain in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(seen[1], 2 * seen[0], rtol=0, atol=0)


def test_gradients_that_are_asked_for():
    """Of the matrix, of others, and by ``inputs=``: nothing is left in ``.grad`` that was not asked for."""
    ids, target = batch()
    fused, plain = pair()
    found = []
    for module in (fused, plain):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = module.loss(scale * torch.tanh(module(ids)), target)
        found.append(torch.autograd.grad(loss, [module.weight, scale], retain_graph=True))
        assert module.weight.grad is None and scale.grad is None
        loss.backward(inputs=[scale], retain_graph=True)
        assert module.weight.grad is None
        loss.backward(inputs=[module.weight])
    for mine, autograds in zip(*found, strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-13, atol=1e-13)
    assert_same(fused, plain)


def test_second_derivatives():
    ids, target = batch()

    def run(module):
        (g,) = torch.autograd.grad(loss_of(module, ids, target), module.weight, create_graph=True)
        g.square().sum().backward()

    module = TiedEmbedding(V, H, fused_accumulate=True).double()
    try:
        run(TiedEmbedding(V, H).double())
    except RuntimeError:  # the loss says that it has none
        with pytest.raises(RuntimeError, match="linear_cross_entropy"):
            run(module)
    else:
        on_both(pair(), run)
    # That of the lookup alone, to which the loss has no part.
    weight = module.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: Ends().lookup(ids[:5], w, None).sin(), weight)


def test_a_matrix_that_is_frozen_or_replaced():
    ids, target = batch()
    modules = pair()

    def replaced(module):
        old, loss = module.weight, loss_of(module, ids, target)
        module.weight = nn.Parameter(2 * old.detach())
        with torch.no_grad():
            while module.weight._version < old._version:  # by which alone it would not be told apart
                module.weight.mul_(1)
        (loss + loss_of(module, ids, target)).backward()
        new, module.weight = module.weight, old
        assert new.grad.layout == torch.strided
        gradients.append(new.grad)

    gradients = []
    on_both(modules, replaced)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
    fused, _ = modules
    fused.requires_grad_(False)
    h = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    fused.weight.grad = None
    fused.loss(h + fused(ids), target).backward()
    assert fused.weight.grad is None and h.grad.any()
    fused.requires_grad_(True)
    with torch.no_grad():
        assert not fused(ids).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids, target = batch()
    h = torch.randn(N, H, dtype=torch.float64, requires_grad=True)

    def run(module):
        def step(h):
            return module.loss(torch.tanh(h + module(ids)), target)

        loss = checkpoint(step, h + module(ids), use_reentrant=reentrant)
        loss.backward()

    on_both(pair(), run)


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.tied = tied

    def forward(self, ids, target):
        return loss_of(self.tied, ids, target)


@pytest.fixture
def one_process():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    """Whose buckets take the gradient from autograd."""
    ids, target = batch()
    on_both(pair(), lambda module: nn.parallel.DistributedDataParallel(Model(module))(ids, target).backward())


@pytest.mark.parametrize("apart", [False, True])
def test_fsdp2(one_process, apart):
    """Which gathers the matrix for the forward of the model, or of the module and methods that it is told."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    ids, target = batch()
    fused, plain = pair()
    model, mesh = Model(fused), torch.distributed.init_device_mesh("cpu", (1,))
    if apart:
        fully_shard(fused, mesh=mesh)
        for name in ("embed", "loss"):
            register_fsdp_forward_method(fused, name)
    fully_shard(model, mesh=mesh)
    if not apart:
        with pytest.raises(TypeError, match="weight is a DTensor, as FSDP2 leaves it outside of forward"):
            fused.loss(torch.randn(N, H, dtype=torch.float64), target)
    model(ids, target).backward()
    loss_of(plain, ids, target).backward()
    gradient = fused.weight.grad.full_tensor()
    torch.testing.assert_close(gradient, plain.weight.grad, rtol=1e-13, atol=1e-13)
