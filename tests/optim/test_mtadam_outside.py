"""MTAdam and what is around it: changes from outside, parts that share memory, hooks, errors in between."""

import copy
import re

import pytest
import torch
from torch import nn

from fastkit import _native
from fastkit.ops import mtadam as op
from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}
MODES = [pytest.param({}, id="batched"), pytest.param(STREAMING, id="streaming")]


def made(make_net, **options):
    net = make_net()
    return net, MTAdam(net.parameters(), lr=1e-2, terms=["left", "right", "size"], **options)


def refused(error, message, call, *args, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(*args, **options)


# From outside


def test_a_parameter_that_takes_anothers_place_with_its_state(make_net, losses):
    net, optimizer = made(make_net)
    optimizer.step(losses(net))
    old = net.trunk.weight
    new = net.trunk.weight = nn.Parameter(old.detach().clone())
    optimizer.state[new] = optimizer.state.pop(old)
    params = optimizer.param_groups[0]["params"]
    params[:] = [new if p is old else p for p in params]
    before = old.detach().clone()
    optimizer.step(losses(net, 1))
    assert torch.equal(old, before) and not torch.equal(new, before)


def test_state_whose_data_are_replaced_is_what_is_saved(make_net, losses, train):
    net, optimizer = made(make_net)
    train(net, optimizer, range(3))
    for entries in optimizer.state.values():
        for entry in entries.values():
            entry.data = entry.data.clone()  # as to another device and back
    train(net, optimizer, range(3, 6))
    assert {float(entries["step"]) for entries in optimizer.state_dict()["state"].values()} == {6.0}
    norms = optimizer.grad_norms(net.trunk.weight)
    assert torch.equal(norms["size"], optimizer.state_dict()["state"][0]["grad_norm.size"])


def test_an_anchor_that_is_changed_in_training(make_net, losses, train, everything):
    net, optimizer = made(make_net, **STREAMING)
    train(net, optimizer, range(2))
    optimizer.param_groups[0]["anchor"] = 1
    before = everything(net, optimizer)
    text = "MTAdam: streaming mode takes the first term as the anchor, got another in param_groups"
    refused(ValueError, text, optimizer.step, losses(net))
    assert all(torch.equal(t, before[name]) for name, t in everything(net, optimizer).items())
    optimizer.param_groups[0]["anchor"] = 0
    train(net, optimizer, range(2))


def test_defaults_make_another_optimizer_after_a_new_term(make_net):
    net, optimizer = made(make_net, ranks=[1.0, 2.0, 3.0])
    optimizer.add_term("more")
    optimizer.drop_term("right")
    again = MTAdam(net.parameters(), **optimizer.defaults)
    assert again.terms == optimizer.terms == ("left", "size", "more")
    assert again.param_groups[0]["ranks"] == optimizer.param_groups[0]["ranks"] == [1.0, 3.0, 1.0]


def test_a_group_may_count_the_terms(make_net):
    net = make_net()
    optimizer = MTAdam([{"params": net.trunk.parameters(), "terms": 2}])
    assert optimizer.terms == ("0", "1")
    optimizer.add_param_group({"params": net.left.parameters(), "terms": ("0", "1")})
    text = "MTAdam: terms must be how many there are or a list of their names, got 'ab'"
    refused(ValueError, text, optimizer.add_param_group, {"params": net.right.parameters(), "terms": "ab"})


def test_a_state_that_lacks_an_option_is_refused(make_net, losses, train):
    net, optimizer = made(make_net)
    train(net, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["max_scale"], state["param_groups"][0]["anchor"]
    text = (
        "MTAdam.load_state_dict: param_groups have no anchor, max_scale; the state must be that of an MTAdam"
    )
    refused(ValueError, text, optimizer.load_state_dict, state)


# Parts


@pytest.mark.parametrize("kind", ["shared", "expanded"])
def test_parts_whose_gradients_are_not_their_own_memory(kind):
    """Two parts that reach one parameter, then two that reach two others, whose gradients are one tensor."""
    a, b, c = (nn.Parameter(torch.randn(3, 4)) for _ in range(3))
    w = torch.randn(3, 4)
    optimizer = MTAdam([a, b, c], terms=1)
    expected = {p: torch.zeros_like(p) for p in (a, b, c)}
    for part in range(5):
        if part < 2:
            loss = a.square().sum()
        else:
            loss = ((b + c) * w).square().sum() if kind == "shared" else b.sum() + c.sum()
        found = torch.autograd.grad(loss, (a, b, c), allow_unused=True, retain_graph=True)
        for p, g in zip(expected, found, strict=True):
            expected[p] += 0 if g is None else g
        optimizer.backward_term(0, loss)
    optimizer.step()
    for p, total in expected.items():
        torch.testing.assert_close(optimizer.grad_norms(p)["0"], total.norm())


# A step, to others


@pytest.mark.parametrize("options", MODES)
def test_a_step_from_gradients_is_a_step_to_schedulers_and_hooks(make_net, options):
    net, optimizer = made(make_net, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    grads = [torch.randn_like(p) for p in net.parameters()]
    optimizer.step_from_grads([grads, None, grads])
    scheduler.step()  # which warns where no step has come before
    assert steps == [1]
    assert optimizer.grad_norms(net.trunk.weight)["right"] == 0


@pytest.mark.parametrize("options", MODES)
def test_the_calls_of_a_step(make_net, losses, monkeypatch, options):
    """One for all parameters; in streaming mode as many as terms, by which parameters they reach, and one."""
    if _native.REASON is not None:
        pytest.skip(_native.REASON)
    net, optimizer = made(make_net, **options)
    optimizer.step(losses(net))
    calls = []
    native = op._update_

    def counted(*args):
        calls.append(len(args[0]))
        return native(*args)

    monkeypatch.setattr(op, "_update_", counted)
    optimizer.step_from_grads([[torch.randn_like(p) for p in net.parameters()]] * 3)
    assert calls == ([6] if not options else [6, 6, 6, 6])


# Errors in between


def test_a_scaler_without_terms_does_not_stay(make_net, losses, train):
    net, optimizer = made(make_net)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    text = "MTAdam.step: no term has been given; call backward_term(term, loss, scaler=scaler) for each first"
    refused(RuntimeError, text, scaler.step, optimizer)
    train(net, optimizer, range(1))
    assert optimizer.state[net.trunk.weight]["step"] == 1


def test_closures(make_net, losses):
    net, optimizer = made(make_net)
    refused(
        ValueError,
        "MTAdam.step: losses and closure give the same; pass one of them",
        optimizer.step,
        lambda: losses(net),
        closure=lambda: losses(net),
    )
    text = "MTAdam.step: the closure must return the losses, got None"
    refused(ValueError, text, optimizer.step, lambda: None)
    assert not optimizer.state


def test_all_frozen(make_net, losses):
    net, optimizer = made(make_net)
    given = losses(net)
    net.requires_grad_(False)
    text = "MTAdam.step: all parameters are frozen; let one at least require a gradient"
    refused(ValueError, text, optimizer.step, given)


def test_a_fold_that_stops_between_groups_is_remembered(make_net, losses, everything, assert_same):
    """It is not folded again: ``step()`` ends the step, by the terms and groups that are folded."""
    runs = []
    for stops in (True, False):
        net = make_net()
        groups = [{"params": net.trunk.parameters()}, {"params": net.right.parameters()}]
        optimizer = MTAdam(groups, lr=1e-2, terms=["left", "right"], **STREAMING)
        for number in range(2):
            terms = losses(net, number)
            optimizer.backward_term("left", terms["left"])
            state = optimizer.state[net.right.weight]
            if number == 0 or not stops:
                optimizer.backward_term("right", terms["right"])
            else:
                moment, state["exp_avg"] = state["exp_avg"], torch.zeros(3)
                with pytest.raises(RuntimeError, match=r"exp_avgs\[0\] must be"):
                    optimizer.backward_term("right", terms["right"])
                state["exp_avg"] = moment
            optimizer.step()
        runs.append(everything(net, optimizer))
    of_trunk = [{name: t for name, t in run.items() if name.startswith("trunk")} for run in runs]
    assert_same(*of_trunk)
    assert runs[0]["right.weight: step"] == 1 and runs[1]["right.weight: step"] == 2
