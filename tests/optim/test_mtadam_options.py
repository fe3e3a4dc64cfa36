"""MTAdam's options: groups, learning rates, ranks, anchors, limits, terms that come and go, dtypes."""

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

TERMS = ["left", "right", "size"]
MODES = {"batched": {}, "streaming": {"mode": "streaming", "on_nonfinite": "skip_term"}}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def weights(optimizer, param):
    return [round(weight.item(), 5) for weight in optimizer.effective_weights(param).values()]


# Groups and learning rates


def test_each_group_trains_as_an_optimizer_of_its_own(make_net, losses, mode):
    net, other = make_net(), make_net()
    options = [
        {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 3e-3, "betas": (0.5, 0.9, 0.0), "eps": 1e-4, "ranks": [0.5, 2.0, 1.0]},
        {"lr": 2e-2, "weight_decay": 0.3, "decoupled_weight_decay": True, "max_scale": 0.5},
    ]
    parts = ("trunk", "left", "right")
    one = MTAdam(
        [
            {"params": getattr(net, part).parameters(), **of_group}
            for part, of_group in zip(parts, options, strict=True)
        ],
        terms=TERMS,
        **mode,
    )
    several = [
        MTAdam(getattr(other, part).parameters(), terms=TERMS, **mode, **of_group)
        for part, of_group in zip(parts, options, strict=True)
    ]
    for number in range(10):
        one.step(losses(net, number))
        given = losses(other, number)
        grads = {
            part: [
                torch.autograd.grad(
                    loss, list(getattr(other, part).parameters()), retain_graph=True, allow_unused=True
                )
                for loss in given.values()
            ]
            for part in parts
        }
        for part, optimizer in zip(parts, several, strict=True):
            optimizer.step_from_grads(grads[part])
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "max_exp_avg_sq" in one.state[net.trunk.weight]
    assert "max_exp_avg_sq" not in one.state[net.left.weight]


def test_a_group_that_is_added_has_the_terms_there_are(make_net, losses, mode):
    net = make_net()
    optimizer = MTAdam(net.trunk.parameters(), lr=1e-2, **mode)
    optimizer.step(losses(net))
    before = net.left.weight.detach().clone()
    optimizer.add_param_group({"params": net.left.parameters(), "lr": 0.125})
    assert optimizer.param_groups[1]["terms"] == TERMS
    optimizer.step(losses(net))
    # The first step of Adam, under one term, is the learning rate.
    torch.testing.assert_close((net.left.weight - before).abs(), torch.full((3, 8), 0.125), rtol=1e-3, atol=0)
    assert optimizer.state[net.trunk.weight]["step"] == 2 and optimizer.state[net.left.weight]["step"] == 1


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10, cycle_momentum=False),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_the_learning_rate(make_net, losses, mode, name, as_tensor):
    """As the same rates written by hand; a scheduler fills a tensor in place."""
    net, other = make_net(), make_net()
    lr = torch.tensor(0.02, dtype=torch.float64) if as_tensor else 0.02
    optimizer, reference = MTAdam(net.parameters(), lr=lr, **mode), MTAdam(other.parameters(), **mode)
    scheduler = SCHEDULERS[name](optimizer)
    rates = set()
    for number in range(8):
        rate = float(optimizer.param_groups[0]["lr"])
        rates.add(rate)
        optimizer.step(losses(net, number))
        scheduler.step()
        reference.param_groups[0]["lr"] = rate
        reference.step(losses(other, number))
    assert len(rates) == 8 and isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == as_tensor
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_changed_in_place_is_read_at_the_step(mode, dtype, shape):
    w = nn.Parameter(torch.zeros(3))
    lr = torch.full(shape, 0.5, dtype=dtype)
    optimizer = MTAdam([w], lr=lr, eps=0.0, **mode)
    optimizer.step([w.sum()])
    torch.testing.assert_close(w.detach(), torch.full((3,), -0.5))
    lr.fill_(0.125)
    optimizer.step([w.sum()])
    torch.testing.assert_close(w.detach(), torch.full((3,), -0.625))
    assert lr.item() == 0.125


# Balance: ranks, anchors, limits


def test_norms_and_weights_can_be_read():
    w, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w, unused], ranks=[1.0, 0.5, 3.0])
    assert optimizer.grad_norms(w) == {} == optimizer.effective_weights(w)
    g = torch.tensor([3.0, 4.0])
    optimizer.step({"a": (w * g).sum(), "b": (w * 10 * g).sum(), "none": None})
    norms, factors = optimizer.grad_norms(w), optimizer.effective_weights(w)
    assert {k: v.item() for k, v in norms.items()} == {"a": 5, "b": 50, "none": 0}
    assert {k: round(v.item(), 6) for k, v in factors.items()} == {"a": 1, "b": 0.05, "none": 1}
    optimizer.step({"a": (w * g).sum(), "b": None, "none": (w * 7 * g).sum()})
    assert weights(optimizer, w) == [1, round(0.5 * 5 / 45, 5), round(3 * 5 / 35, 5)]
    assert norms["b"] == 50  # a copy
    norms["a"].fill_(9)
    assert optimizer.grad_norms(w)["a"] == 5
    assert optimizer.grad_norms(unused) == {}


@pytest.mark.parametrize("how", ["constructor", "group", "step", "grads", "terms"])
def test_ranks_multiply_the_balanced_gradients(how):
    w = nn.Parameter(torch.zeros(2))
    ranks = [2.0, 0.0, 0.5]
    where = {"constructor": {"ranks": ranks}}.get(how, {})
    optimizer = MTAdam([{"params": [w], **({"ranks": ranks} if how == "group" else {})}], terms=3, **where)
    of_call = ranks if how in ("step", "grads", "terms") else None
    gradients = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0]), torch.tensor([0.0, 100.0])]
    if how == "grads":
        optimizer.step_from_grads([[g] for g in gradients], of_call)
    elif how == "terms":
        for term, g in enumerate(gradients):
            optimizer.backward_term(term, torch.dot(w, g))
        optimizer.step(ranks=of_call)
    else:
        optimizer.step([torch.dot(w, g) for g in gradients], of_call)
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([0.2, 0.05]))
    assert not optimizer.state[w]["exp_avg_sq.1"].any()


def test_ranks_of_a_streaming_step():
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], mode="streaming", on_nonfinite="skip_term")
    optimizer.step([w[0], 100 * w[1]], [2.0, 0.5])
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([0.2, 0.05]))


@pytest.mark.parametrize("anchor", [1, "b"])
def test_another_anchor_gives_its_norm(anchor):
    w, head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w, head], anchor=anchor, terms=["a", "b", "c"])
    optimizer.step([4 * w.sum() + head.sum(), w.sum(), 8 * w.sum() + 2 * head.sum()])
    assert weights(optimizer, w) == [0.25, 1, 0.125]
    assert weights(optimizer, head) == [1, 1, 0.5]  # where the anchor is dead the first that is alive
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.full((2,), 0.3))


def test_the_first_term_by_name_is_an_anchor_in_streaming_mode():
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], anchor="a", terms=["a", "b"], **MODES["streaming"])
    optimizer.step([w.sum(), 4 * w.sum()])
    assert weights(optimizer, w) == [1, 0.25]


def test_max_scale_limits_how_far_a_norm_is_raised(mode):
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], max_scale=10.0, ranks=[1.0, 2.0, 1.0], **mode)
    optimizer.step([w[0], w[1] / 1000, 8 * w[1]])
    assert weights(optimizer, w) == [1, 20, 0.125]
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([0.1, 0.1 * (0.02 + 1)]))


def test_alive_eps_is_what_a_norm_must_exceed(mode):
    """A dead term is not scaled, nor multiplied by its rank."""
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], alive_eps=1e-2, ranks=[1.0, 3.0], **mode)
    optimizer.step([w[0], w[1] * 1e-3])
    assert weights(optimizer, w) == [1, 1]
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([0.1, 1e-4]))


# Terms that come and go


def test_a_new_term_begins_with_its_first_norm_that_is_alive(mode):
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], lr=1e-2, terms=["a"], ranks=[1.0], **mode)
    for _ in range(5):
        optimizer.step({"a": w[0]})
    optimizer.add_term("b")
    assert optimizer.terms == ("a", "b") and optimizer.param_groups[0]["ranks"] == [1, 1]
    optimizer.step({"a": w[0], "b": None})
    assert weights(optimizer, w) == [1, 1]
    optimizer.step({"a": w[0], "b": 500 * w[1]})
    assert optimizer.grad_norms(w)["b"] == 500 and weights(optimizer, w) == [1, 0.002]
    optimizer.step({"a": w[0], "b": 1000 * w[1]})
    assert optimizer.grad_norms(w)["b"] == 550 and optimizer.state[w]["step"] == 8


def test_a_term_that_is_dropped_was_never_there(make_net, losses, mode, everything, assert_same):
    """For the moments of the others: the first moment is a sum, of which its share fades."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), betas=(0.0, 0.9, 0.9), **mode) for n in (net, other))
    for run, of_run, names in ((net, optimizer, TERMS), (other, reference, TERMS[:2])):
        given = losses(run)
        of_run.param_groups[0]["lr"] = 0.0
        of_run.step({name: given[name] for name in names})
        of_run.param_groups[0]["lr"] = 1e-2
    optimizer.drop_term("size")
    assert optimizer.terms == ("left", "right")
    for number in range(3):
        for run, of_run in ((net, optimizer), (other, reference)):
            of_run.step({name: loss for name, loss in losses(run, number).items() if name != "size"})
    assert_same(everything(net, optimizer), everything(other, reference), 1e-6)


def test_ranks_and_a_named_anchor_stay_with_their_terms():
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], terms=["a", "b", "c"], ranks=[1.0, 2.0, 3.0], anchor="b")
    optimizer.drop_term("a")
    assert optimizer.param_groups[0]["ranks"] == [2, 3]
    optimizer.step([w.sum(), 2 * w.sum()])
    assert weights(optimizer, w) == [2, 1.5]


def test_an_anchor_by_index_stays_with_its_term():
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], terms=["a", "b", "c"], anchor=1)
    optimizer.step([4 * w.sum(), w.sum(), 8 * w.sum()])
    assert weights(optimizer, w) == [0.25, 1, 0.125]
    optimizer.drop_term("a")
    assert weights(optimizer, w) == [1, 0.125]


def test_without_the_first_term_the_next_is_the_anchor(mode):
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], terms=["a", "b", "c"], **mode)
    optimizer.step([w.sum(), 2 * w.sum(), 4 * w.sum()])
    optimizer.drop_term("a")
    optimizer.step({"b": 2 * w.sum(), "c": 4 * w.sum()})
    assert weights(optimizer, w) == [1, 0.5]


def test_ranks_of_terms_that_are_added_before_any_step():
    w = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], terms=["a"], ranks=[2.0])
    optimizer.add_term("b")
    optimizer.step([w.sum(), 2 * w.sum()])
    assert weights(optimizer, w) == [2, 0.5]


def test_a_group_that_is_added_after_a_term_has_its_rank_too():
    w, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([w], terms=["a", "b"], ranks=[2.0, 3.0])
    optimizer.add_term("c")
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[1]["ranks"] == [2, 3, 1]


# Dtypes and strides


def test_parameters_of_several_dtypes_in_one_optimizer(make_net, losses, mode):
    """Each trains as in an optimizer of its own; half precision has state in float32."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    params = [nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in dtypes]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = MTAdam(params, lr=1e-2, terms=2, **mode)
    optimizers = [MTAdam([p], lr=1e-2, terms=2, **mode) for p in alone]
    for _ in range(5):
        grads = [[torch.randn_like(p) for p in params] for _ in range(2)]
        optimizer.step_from_grads(grads)
        for i, of_one in enumerate(optimizers):
            of_one.step_from_grads([[of_term[i]] for of_term in grads])
    for a, b, dtype in zip(params, alone, dtypes, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {entry.dtype for entry in optimizer.state[a].values()} == {expected}


@pytest.mark.parametrize(("dtype", "last"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_half_precision_parameter_is_the_float32_one_rounded(dtype, last, mode):
    """Over one step: what is lost is half of the last digit."""
    p = nn.Parameter(torch.randn(64).to(dtype))
    q = nn.Parameter(p.detach().float())
    grads = [[torch.randn(64).to(dtype)] for _ in range(3)]
    MTAdam([p], lr=0.1, **mode).step_from_grads(grads)
    MTAdam([q], lr=0.1, **mode).step_from_grads([[g.float()] for [g] in grads])
    assert torch.equal(p, q.detach().to(dtype))
    torch.testing.assert_close(p.detach().float(), q.detach(), rtol=last, atol=0)


def test_a_loss_in_another_dtype_than_the_parameters(mode):
    w = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MTAdam([w], lr=0.5, **mode)
    optimizer.step([w.sum(), w.double().sum() * 3])
    assert torch.equal(w, torch.full((2,), -1.0, dtype=torch.bfloat16))


def test_channels_last_parameters_keep_their_strides(mode):
    """State has them too; what is computed is that of dense ones."""
    conv, dense = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    dense.load_state_dict(conv.state_dict())
    conv = conv.to(memory_format=torch.channels_last)
    strides = conv.weight.stride()
    assert strides != dense.weight.stride()
    x = torch.randn(2, 3, 6, 6)
    optimizers = [MTAdam(net.parameters(), lr=1e-2, amsgrad=True, **mode) for net in (conv, dense)]
    for _ in range(3):
        of_losses = dense(x).square().mean(), dense(x).abs().mean()
        grads = [torch.autograd.grad(loss, list(dense.parameters())) for loss in of_losses]
        for optimizer in optimizers:
            optimizer.step_from_grads(grads)
    optimizers[0].step(
        [conv(x).square().mean(), conv(x).abs().mean()]
    )  # and gradients as autograd gives them
    optimizers[1].step([dense(x).square().mean(), dense(x).abs().mean()])
    torch.testing.assert_close(conv.weight, dense.weight, rtol=1e-5, atol=1e-5)
    assert conv.weight.stride() == strides
    for key in ("exp_avg", "exp_avg_sq.0", "exp_avg_sq.1", "max_exp_avg_sq"):
        assert optimizers[0].state[conv.weight][key].stride() == strides
