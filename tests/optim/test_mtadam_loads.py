"""What MTAdam loads: whose terms are whose, and states that are refused, before anything has changed."""

import copy
import pickle
import re

import pytest
import torch

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

TERMS = ["left", "right", "size"]
STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}


def made(make_net, **options):
    net = make_net()
    return net, MTAdam(net.parameters(), **{"lr": 1e-2, **options})


def test_terms_that_are_not_known_are_those_of_the_state(make_net, losses, train, everything, assert_same):
    net, optimizer = made(make_net)
    train(net, optimizer, range(2))
    other, adopts = made(make_net)
    other.load_state_dict(net.state_dict())
    assert adopts.terms is None
    adopts.load_state_dict(optimizer.state_dict())
    assert adopts.terms == tuple(TERMS)
    for name, loss in losses(other, 3).items():
        adopts.backward_term(name, loss)
    adopts.step()
    optimizer.step(losses(net, 3))
    assert_same(everything(net, optimizer), everything(other, adopts))


def test_a_state_before_any_step_leaves_the_terms_there_are(make_net):
    """Of an optimizer whose terms were not known."""
    _, fresh = made(make_net)
    _, optimizer = made(make_net, terms=TERMS)
    optimizer.load_state_dict(fresh.state_dict())
    assert optimizer.terms == tuple(TERMS)


def test_add_term_and_drop_term_make_states_alike(make_net, losses, train, everything, assert_same):
    net, optimizer = made(make_net)
    train(net, optimizer, range(2))
    optimizer.drop_term("size")
    optimizer.add_term("new")
    other, fresh = made(make_net, terms=["left", "right", "new"])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())
    for run, of_run in ((net, optimizer), (other, fresh)):
        given = losses(run, 4)
        of_run.step({"left": given["left"], "right": given["right"], "new": given["size"]})
    assert_same(everything(net, optimizer), everything(other, fresh))


def other_terms(make_net, losses):
    net, optimizer = made(make_net)
    optimizer.step({name: loss for name, loss in losses(net).items() if name != "size"})
    return optimizer.state_dict()


def other_shapes(make_net, losses):
    net, optimizer = made(make_net)
    optimizer.step(losses(net))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3]["exp_avg_sq.right"] = torch.zeros(4)
    return state


def without_a_norm(make_net, losses):
    net, optimizer = made(make_net)
    optimizer.step(losses(net))
    state = optimizer.state_dict()
    del state["state"][0]["grad_norm.size"]
    return state


def of_adam(make_net, losses):
    net = make_net()
    adam = torch.optim.Adam(net.parameters())
    sum(losses(net).values()).backward()
    adam.step()
    return adam.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            other_terms,
            "the terms must be those of this optimizer, ['left', 'right', 'size'], got ['left', 'right'];"
            " add_term or drop_term makes them alike",
        ),
        (other_shapes, "'exp_avg_sq.right' of parameter 3 must have shape (3,), got (4,)"),
        (without_a_norm, "'grad_norm.size' of parameter 0 must have shape (), got NoneType"),
        (
            of_adam,
            "param_groups have no alive_eps, anchor, max_scale, ranks, terms; the state must be that of an"
            " MTAdam",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    make_net, losses, train, everything, assert_same, make, message
):
    net, optimizer = made(make_net, terms=TERMS)
    train(net, optimizer, range(2))
    before, groups = everything(net, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=f"^{re.escape(f'MTAdam.load_state_dict: {message}')}$"):
        optimizer.load_state_dict(make(make_net, losses))
    assert_same(before, everything(net, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.step(losses(net))
    assert optimizer.state[net.trunk.weight]["step"] == 3


def test_an_anchor_that_streaming_cannot_have_is_not_loaded(make_net, train):
    """Its steps would go on by the first term."""
    net, optimizer = made(make_net, anchor=1)
    train(net, optimizer, range(2))
    _, streaming = made(make_net, terms=TERMS, **STREAMING)
    with pytest.raises(ValueError, match="streaming mode takes the first term as the anchor, got 1"):
        streaming.load_state_dict(optimizer.state_dict())
    assert streaming.param_groups[0]["anchor"] == 0 and not streaming.state


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict", "pickle"])
def test_between_the_terms_of_a_step_there_is_no_state(make_net, losses, what):
    net, optimizer = made(make_net, terms=TERMS)
    state = optimizer.state_dict()
    optimizer.backward_term("left", losses(net)["left"])
    calls = {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "pickle": lambda: pickle.dumps(optimizer),
    }
    name = "__getstate__" if what == "pickle" else what
    message = f"MTAdam.{name}: terms left have been given and wait for step(); call step() first"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        calls[what]()
    optimizer.step()
    calls[what]()
