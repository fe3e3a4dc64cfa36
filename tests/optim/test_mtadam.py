"""MTAdam's numbers: against Adam, against the formula written out, and streaming mode against batched."""

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

TERMS = ["left", "right", "size"]


# Adam


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("adam", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"eps": 1e-3, "betas": (0.8, 0.95)}),
        (torch.optim.AdamW, {"weight_decay": 0.3}),
    ],
)
@pytest.mark.parametrize("mode", ["batched", "streaming"])
def test_one_term_is_adam(make_net, losses, mode, adam, options, dtype, tolerance):
    net, other = make_net(dtype), make_net(dtype)
    reference = adam(other.parameters(), lr=1e-2, **options)
    options = {**options, "betas": (*options.get("betas", (0.9, 0.999)), 0.9)}
    options |= {"decoupled_weight_decay": adam is torch.optim.AdamW, "on_nonfinite": "skip_term"}
    optimizer = MTAdam(net.parameters(), lr=1e-2, mode=mode, **options)
    for number in range(50):
        optimizer.step([sum(losses(net, number).values())])
        reference.zero_grad()
        sum(losses(other, number).values()).backward()
        reference.step()
    for param, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=tolerance)


def test_weights_of_the_other_losses_do_not_matter(make_net, train):
    runs = []
    for weights in [(1.0, 1.0, 1.0), (1.0, 500.0, 1e-3)]:
        net = make_net()
        train(net, MTAdam(net.parameters(), lr=1e-2), range(50), weights=weights)
        runs.append(net)
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_weight_of_the_anchor_scales_all(make_net, train):
    """Which Adam does not see: without decay and eps only the signs of the moments count."""
    runs = []
    for weight in (1.0, 64.0):
        net = make_net(torch.float64)
        optimizer = MTAdam(net.parameters(), lr=1e-2, eps=0.0)
        train(net, optimizer, range(20), weights=(weight, 1.0, 1.0))
        runs.append((net, optimizer))
    (one, of_one), (many, of_many) = runs
    torch.testing.assert_close(one.trunk.weight, many.trunk.weight, rtol=0, atol=1e-12)
    state, other = of_one.state[one.trunk.weight], of_many.state[many.trunk.weight]
    torch.testing.assert_close(64 * state["exp_avg"], other["exp_avg"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_aligned_terms_step_as_far_as_there_are(count):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    MTAdam([w], lr=0.125).step([10.0**k * (w**2).sum() for k in range(count)])
    torch.testing.assert_close(
        w.detach(), torch.tensor([1 - 0.125 * count, -2 + 0.125 * count]), rtol=1e-6, atol=0
    )


# The formula


class Written:
    """In float64 and as the paper has it, a first moment for each term; each parameter has its options."""

    def __init__(self, params, options, count):
        self.params = [param.detach().double().clone() for param in params]
        self.options = options
        self.first = [torch.zeros(count, *p.shape, dtype=torch.float64) for p in self.params]
        self.second = [torch.zeros_like(first) for first in self.first]
        self.largest = [torch.zeros_like(p) for p in self.params]
        self.norms = [[0.0] * count for _ in self.params]
        self.steps = [0] * len(self.params)

    def step(self, grads):
        """``grads[k][i]`` of term k and parameter i."""
        for i, (p, o) in enumerate(zip(self.params, self.options, strict=True)):
            own = [of_term[i] for of_term in grads]
            if all(g is None for g in own):
                continue
            (b1, b2, b3), norms = o.get("betas", (0.9, 0.999, 0.9)), self.norms[i]
            own = [torch.zeros_like(p) if g is None else g.double() for g in own]
            for k, g in enumerate(own):
                raw = g.square().sum().sqrt().item()
                norms[k] = b3 * norms[k] + (1 - b3) * raw if norms[k] > 1e-10 else raw
            alive = [k for k, n in enumerate(norms) if n > 1e-10]
            anchor = o.get("anchor", 0)
            anchor = anchor if anchor in alive else alive[0] if alive else None
            decay, decoupled = o.get("weight_decay", 0.0), o.get("decoupled_weight_decay", False)
            for k, g in enumerate(own):
                factor = 1.0
                if k in alive:
                    ratio = min(norms[anchor] / norms[k], o.get("max_scale") or float("inf"))
                    factor = o.get("ranks", [1.0] * len(own))[k] * ratio
                h = factor * g + (0 if decoupled else decay * p)
                self.first[i][k] = b1 * self.first[i][k] + (1 - b1) * h
                self.second[i][k] = b2 * self.second[i][k] + (1 - b2) * h.square()
            self.steps[i] += 1
            most = self.second[i].amax(0)
            if o.get("amsgrad"):
                most = self.largest[i] = torch.maximum(self.largest[i], most)
            denominator = (most / (1 - b2 ** self.steps[i])).sqrt() + 1e-8
            if decoupled:
                p *= 1 - o["lr"] * decay
            for first in self.first[i]:
                p -= o["lr"] / (1 - b1 ** self.steps[i]) * first / denominator


OPTIONS = {
    "plain": {"lr": 1e-2},
    "decay": {"lr": 1e-2, "weight_decay": 0.1, "ranks": [1.0, 0.3, 2.5]},
    "decoupled": {"lr": 1e-2, "weight_decay": 0.2, "decoupled_weight_decay": True},
    "amsgrad": {"lr": 2e-2, "amsgrad": True, "weight_decay": 0.01},
    "betas": {"lr": 1e-2, "betas": (0.5, 0.9, 0.99), "max_scale": 0.75},
    "anchor": {"lr": 1e-2, "anchor": 1, "ranks": [2.0, 1.0, 0.0]},
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [("decay", "batched"), ("decay", "streaming"), ("decoupled", "batched"), ("anchor", "batched")],
)
def test_it_is_the_formula_over_a_training(make_net, losses, name, mode):
    options = OPTIONS[name]
    net = make_net(torch.float64)
    names = [n for n, _ in net.named_parameters()]
    written = Written(net.parameters(), [options] * len(names), 3)
    optimizer = MTAdam(net.parameters(), mode=mode, on_nonfinite="skip_term", **options)
    follower = make_net(torch.float64)
    for number in range(200):
        optimizer.step(losses(net, number))
        with torch.no_grad():
            for param, value in zip(follower.parameters(), written.params, strict=True):
                param.copy_(value)
        terms = list(losses(follower, number).values())
        written.step(
            [
                torch.autograd.grad(t, list(follower.parameters()), retain_graph=True, allow_unused=True)
                for t in terms
            ]
        )
    for i, param in enumerate(net.parameters()):
        torch.testing.assert_close(param.detach(), written.params[i], rtol=0, atol=1e-10)
        state = optimizer.state[param]
        assert state["step"] == written.steps[i] == 200
        torch.testing.assert_close(state["exp_avg"], written.first[i].sum(0), rtol=0, atol=1e-9)
        for k, term in enumerate(TERMS):
            torch.testing.assert_close(state[f"exp_avg_sq.{term}"], written.second[i][k], rtol=0, atol=1e-9)
            assert state[f"grad_norm.{term}"].item() == pytest.approx(written.norms[i][k], abs=1e-9)


@pytest.mark.parametrize("mode", ["batched", "streaming"])
def test_groups_are_each_the_formula_with_their_options(mode):
    """On gradients that are given in float32, of which the formula takes the same."""
    shapes = [(5, 7), (3,), (), (2, 3, 4), (0, 2)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    of_group = [OPTIONS["decay"], OPTIONS["betas"], OPTIONS["amsgrad"]]
    groups = [params[:2], params[2:3], params[3:]]
    optimizer = MTAdam(
        [{"params": p, **o} for p, o in zip(groups, of_group, strict=True)],
        terms=3,
        mode=mode,
        on_nonfinite="skip_term",
    )
    written = Written(params, [o for p, o in zip(groups, of_group, strict=True) for _ in p], 3)
    for number in range(200):
        grads = [[10.0**k * torch.randn_like(p) for p in params] for k in (0, -3, 2)]
        grads[number % 3][number % 2] = None
        if number % 4 == 0:
            for of_term in grads:
                of_term[2] = None
        optimizer.step_from_grads(grads)
        written.step(grads)
    for i, param in enumerate(params):
        torch.testing.assert_close(param.detach().double(), written.params[i], rtol=1e-5, atol=1e-5)
        assert optimizer.state[param]["step"] == written.steps[i] == (150 if i == 2 else 200)


# Batched and streaming


def both(make_net, **options):
    nets = [make_net(), make_net()]
    return nets, [
        MTAdam(net.parameters(), mode=mode, on_nonfinite="skip_term", terms=TERMS, **{"lr": 1e-2, **options})
        for net, mode in zip(nets, ("batched", "streaming"), strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "anchor"])
def test_streaming_is_batched(make_net, losses, everything, assert_same, name):
    """Also with terms that are left out, and None."""
    nets, optimizers = both(make_net, **OPTIONS[name])
    for number in range(30):
        for net, optimizer in zip(nets, optimizers, strict=True):
            given = losses(net, number)
            if number % 5 == 4:
                del given[TERMS[number % 3]]
                for term, loss in given.items():
                    optimizer.backward_term(term, loss)
                optimizer.step()
                continue
            if number % 5 == 2:
                given[TERMS[number % 3]] = None
            optimizer.step(given)
    first, second = (everything(net, o) for net, o in zip(nets, optimizers, strict=True))
    assert_same(first, second, 1e-6)


def test_streaming_has_the_bits_of_batched_where_sums_have_one_summand(make_net, everything, assert_same):
    nets, optimizers = both(make_net)
    grads = []
    for number in range(20):
        of_term = [[None] * 6 for _ in TERMS]
        for i, p in enumerate(nets[0].parameters()):
            of_term[(i + number) % 3][i] = torch.randn_like(p)
        grads.append(of_term)
    for optimizer in optimizers:
        for of_step in grads:
            optimizer.step_from_grads(of_step)
    assert_same(*(everything(net, o) for net, o in zip(nets, optimizers, strict=True)))


def test_norms_and_second_moments_of_a_step_have_the_same_bits(make_net, losses):
    nets, optimizers = both(make_net)
    for net, optimizer in zip(nets, optimizers, strict=True):
        optimizer.step(losses(net))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        ours, theirs = optimizers[0].state[a], optimizers[1].state[b]
        for term in TERMS:
            for key in (f"grad_norm.{term}", f"exp_avg_sq.{term}"):
                assert torch.equal(ours[key], theirs[key]), key


# Heads, and what terms do not reach


@pytest.mark.parametrize("mode", ["batched", "streaming"])
@pytest.mark.parametrize("order", [("left", "trunk", "right"), ("right", "left", "trunk")])
def test_heads_train_alike_whatever_the_order_of_parameters(make_net, losses, order, mode):
    runs = []
    for listed in (("trunk", "left", "right"), order):
        net = make_net(order=listed)
        optimizer = MTAdam(net.parameters(), lr=2e-2, mode=mode, on_nonfinite="skip_term")
        tasks = [[loss for name, loss in losses(net).items() if name != "size"]]
        for _ in range(200):
            optimizer.zero_grad()
            optimizer.step(tasks[-1])
            tasks.append([loss for name, loss in losses(net).items() if name != "size"])
        assert all(last < 0.2 * first for first, last in zip(tasks[0], tasks[-1], strict=True)), tasks[-1]
        runs.append(dict(net.named_parameters()))
    for name, param in runs[0].items():
        assert torch.equal(param, runs[1][name]), name


def test_a_head_takes_the_steps_of_adam_on_its_own_term(make_net, losses):
    """The other terms count as zeros there, and its own is the anchor."""
    net = make_net()
    head = nn.Parameter(net.left.weight.detach().clone())
    optimizer, adam = MTAdam(net.parameters(), lr=1e-2), torch.optim.Adam([head], lr=1e-2)
    for number in range(20):
        given = losses(net, number)
        [head.grad] = torch.autograd.grad(given["left"], [net.left.weight], retain_graph=True)
        optimizer.step(given)
        adam.step()
    torch.testing.assert_close(net.left.weight, head, rtol=0, atol=1e-6)
    state = optimizer.state[net.left.weight]
    assert state["grad_norm.right"] == 0 and not state["exp_avg_sq.right"].any()


@pytest.mark.parametrize("mode", ["batched", "streaming"])
def test_frozen_parameters_are_left_as_they_are(make_net, train, mode):
    net = make_net()
    net.trunk.bias.requires_grad_(False)
    net.left.weight.requires_grad_(False)
    frozen = [(p, p.detach().clone()) for p in (net.trunk.bias, net.left.weight)]
    optimizer = MTAdam(net.parameters(), lr=1e-2, weight_decay=0.1, mode=mode, on_nonfinite="skip_term")
    train(net, optimizer, range(3))
    for param, before in frozen:
        assert torch.equal(param, before) and param not in optimizer.state
    net.trunk.bias.requires_grad_(True)  # thawed: it begins now
    train(net, optimizer, range(2))
    assert not torch.equal(net.trunk.bias, frozen[0][1])
    assert optimizer.state[net.trunk.bias]["step"] == 2 and optimizer.state[net.trunk.weight]["step"] == 5
    assert torch.equal(net.left.weight, frozen[1][1])
    net.trunk.bias.requires_grad_(False)  # and frozen again it keeps its state
    before = net.trunk.bias.detach().clone()
    train(net, optimizer, range(2))
    assert torch.equal(net.trunk.bias, before) and optimizer.state[net.trunk.bias]["step"] == 2


@pytest.mark.parametrize("mode", ["batched", "streaming"])
def test_what_no_term_reaches_in_a_step_is_left_as_it_is(make_net, losses, everything, mode):
    net = make_net()
    unused = nn.Parameter(torch.ones(3))
    optimizer = MTAdam([unused, *net.parameters()], weight_decay=0.1, mode=mode, on_nonfinite="skip_term")
    optimizer.step(losses(net))
    before = everything(net, optimizer)
    optimizer.step({**losses(net, 1), "left": None})
    after = everything(net, optimizer)
    for name, _ in net.named_parameters():
        assert torch.equal(before[name], after[name]) == name.startswith("left")
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("left"))
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state
