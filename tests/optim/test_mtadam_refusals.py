"""Losses, terms and gradients that MTAdam refuses; after which nothing has changed and training goes on."""

import math
import re

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

TERMS = ["left", "right", "size"]
STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}
MODES = [pytest.param({}, id="batched"), pytest.param(STREAMING, id="streaming")]


def refused(error, message, call, *args, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(*args, **options)


# Losses


def missing(names):
    return (
        f"the terms must be left, right, size, got {names}; pass None for one that has no gradient in this"
        " step, and add_term or drop_term to change them"
    )


def count(got):
    return (
        f"there must be one for each of the 3 terms, left, right, size, got {got}; pass None for one that has"
        " no gradient in this step, and add_term or drop_term to change them"
    )


NO_GRAPH = (
    "the loss of term 'right' has no graph; compute it from the parameters with gradients enabled, or pass"
    " None for a term that has no gradient in this step"
)
LIST = "losses must be a list of scalars, or a dict of them, got"
LOSSES = {
    "fewer": (lambda g: list(g.values())[:2], ValueError, count(2)),
    "more": (lambda g: [*g.values(), g["left"]], ValueError, count(4)),
    "none": (lambda g: [], ValueError, count(0)),
    "another name": (lambda g: {**g, "new": g["left"]}, ValueError, missing("left, right, size, new")),
    "a name less": (lambda g: {"left": g["left"]}, ValueError, missing("left")),
    "no names": (lambda g: {}, ValueError, missing("none")),
    "a vector": (
        lambda g: {**g, "right": g["right"] * torch.ones(2)},
        ValueError,
        "the loss of term 'right' must be a scalar, got shape (2,); take its mean",
    ),
    "no graph": (lambda g: {**g, "right": g["right"].detach()}, ValueError, NO_GRAPH),
    "a number": (
        lambda g: {**g, "right": 0.0},
        TypeError,
        "the loss of term 'right' must be a tensor, got float",
    ),
    "of others": (
        lambda g: {**g, "right": nn.Parameter(torch.ones(())) * 2},
        ValueError,
        "the loss of term 'right' reaches none of the parameters; pass None for a term that has no gradient"
        " in this step",
    ),
    "a tensor": (lambda g: g["left"], TypeError, f"{LIST} a tensor; pass [loss] or list(losses)"),
    "a stack": (
        lambda g: torch.stack(list(g.values())),
        TypeError,
        f"{LIST} a tensor; pass [loss] or list(losses)",
    ),
    "a generator": (lambda g: (loss for loss in g.values()), TypeError, f"{LIST} generator"),
    "a text": (lambda g: "left", TypeError, f"{LIST} str"),
    "all None": (lambda g: dict.fromkeys(g), ValueError, "one loss at least must not be None"),
}


@pytest.fixture(params=MODES)
def run(request, make_net, losses):
    """After a step; with one that does what is refused, and at the end must have the same bits."""
    nets = [make_net(), make_net()]
    optimizers = [MTAdam(net.parameters(), lr=1e-2, terms=TERMS, **request.param) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        optimizer.step(losses(net))
    return nets, optimizers


@pytest.fixture
def goes_on(everything, assert_same, losses):
    def goes_on(run):
        (net, other), (optimizer, reference) = run
        assert_same(everything(net, optimizer), everything(other, reference))
        optimizer.step(losses(net, 1))
        reference.step(losses(other, 1))
        assert_same(everything(net, optimizer), everything(other, reference))

    return goes_on


@pytest.mark.parametrize("name", LOSSES)
def test_losses(run, losses, goes_on, name):
    make, error, message = LOSSES[name]
    (net, _), (optimizer, _) = run
    refused(error, f"MTAdam.step: {message}", optimizer.step, make(losses(net)))
    assert optimizer.terms == tuple(TERMS)
    if name == "of others" and optimizer.mode == "streaming":  # which is known after the first term is folded
        message = "terms left have been given and wait for step(); call step() without losses"
        refused(RuntimeError, f"MTAdam.step: {message}", optimizer.step, losses(net))
        optimizer.step()
        assert optimizer.state[net.trunk.weight]["step"] == 2
        return
    goes_on(run)


def test_no_losses_at_all(run, goes_on):
    _, (optimizer, _) = run
    message = "MTAdam.step: there is no loss; pass one for each term, or call backward_term first"
    refused(ValueError, message, optimizer.step)
    goes_on(run)


def test_no_losses_and_no_terms(make_net):
    optimizer = MTAdam(make_net().parameters())
    message = "MTAdam.step: there is no loss; pass one for each term, or call backward_term first"
    refused(ValueError, message, optimizer.step)
    assert not optimizer.state


def test_losses_and_a_closure(run, losses, goes_on):
    (net, _), (optimizer, _) = run
    message = "MTAdam.step: losses and closure give the same; pass one of them"
    refused(ValueError, message, optimizer.step, losses(net), closure=lambda: losses(net))
    goes_on(run)


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "ranks must be one for each of the 3 terms, got 2"),
        ([1.0, math.nan, 1.0], ValueError, "ranks[1] must be finite and not negative, got nan"),
        (torch.ones(3), TypeError, "ranks must be a list of numbers, got Tensor; pass ranks.tolist()"),
    ],
)
@pytest.mark.parametrize("way", ["step", "step_from_grads"])
def test_ranks(run, losses, goes_on, way, ranks, error, message):
    (net, _), (optimizer, _) = run
    if way == "step":
        refused(error, f"MTAdam.step: {message}", optimizer.step, losses(net), ranks)
    else:
        grads = [[torch.ones_like(p) for p in net.parameters()]] * 3
        refused(error, f"MTAdam.step_from_grads: {message}", optimizer.step_from_grads, grads, ranks)
    goes_on(run)


@pytest.mark.parametrize("call", ["all None", "no graph", "ranks", "grads"])
@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_that_is_refused_settles_no_terms(make_net, losses, mode, call):
    net = make_net()
    optimizer = MTAdam(net.parameters(), **mode)
    given = losses(net)
    with pytest.raises(ValueError, match=r"^MTAdam"):
        if call == "all None":
            optimizer.step([None] * 4)
        elif call == "no graph":
            optimizer.step([torch.ones(()), *given.values()])
        elif call == "ranks":
            optimizer.step([*given.values(), given["left"]], [1.0])
        else:
            optimizer.step_from_grads([[None]] * 4)
    assert optimizer.terms is None
    optimizer.step(given)
    assert optimizer.terms == tuple(TERMS)


# Terms


def test_terms_that_are_not_there(run, losses, goes_on):
    (net, _), (optimizer, _) = run
    for term, text in (("new", "'new'"), (3, "3"), (-1, "-1")):
        message = (
            f"MTAdam.backward_term: term must be one of left, right, size, or its index, got {text};"
            " add_term makes a new one"
        )
        refused(ValueError, message, optimizer.backward_term, term, losses(net)["left"])
    goes_on(run)


def test_terms_must_be_known(make_net, losses):
    net = make_net()
    optimizer = MTAdam(net.parameters())
    message = "MTAdam.backward_term: the terms must be known; pass terms= to MTAdam"
    refused(ValueError, message, optimizer.backward_term, "left", losses(net)["left"])


@pytest.mark.parametrize("name", ["a vector", "no graph", "a number", "of others"])
def test_losses_of_a_term(run, losses, goes_on, name):
    make, error, message = LOSSES[name]
    (net, _), (optimizer, _) = run
    refused(
        error,
        f"MTAdam.backward_term: {message}",
        optimizer.backward_term,
        "right",
        make(losses(net))["right"],
    )
    goes_on(run)


@pytest.mark.parametrize("what", ["nan", "scaler"])
def test_what_a_refused_loss_was_does_not_stay(make_net, losses, everything, assert_same, what):
    """Neither that it was no number, nor its scale."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), lr=1e-2, terms=TERMS) for n in (net, other))
    loss = nn.Parameter(torch.tensor(math.nan if what == "nan" else 1.0)) * 2
    scaler = torch.amp.GradScaler("cpu") if what == "scaler" else None
    with pytest.raises(ValueError, match="reaches none of the parameters"):
        optimizer.backward_term("left", loss, scaler=scaler)
    optimizer.step(losses(net))
    reference.step(losses(other))
    assert_same(everything(net, optimizer), everything(other, reference))


@pytest.mark.parametrize("method", ["step", "step_from_grads", "add_term", "drop_term", "add_param_group"])
def test_what_is_not_for_the_midst_of_a_step(run, losses, goes_on, method):
    (net, other), (optimizer, reference) = run
    for one, of_one in ((net, optimizer), (other, reference)):
        of_one.backward_term("left", losses(one)["left"])
    arguments = {
        "step": losses(net),
        "step_from_grads": [[None] * 6] * 3,
        "add_term": "new",
        "drop_term": "size",
        "add_param_group": {"params": [nn.Parameter(torch.ones(2))]},
    }
    cure = "call step() without losses" if method == "step" else "call step() first"
    message = f"MTAdam.{method}: terms left have been given and wait for step(); {cure}"
    refused(RuntimeError, message, getattr(optimizer, method), arguments[method])
    optimizer.step()
    reference.step()
    goes_on(run)


@pytest.mark.parametrize("name", ["left", "", 1])
def test_names_that_are_no_new_term(run, goes_on, name):
    _, (optimizer, _) = run
    message = f"MTAdam.add_term: name must be a new one beside ['left', 'right', 'size'], got {name!r}"
    refused(ValueError, message, optimizer.add_term, name)
    goes_on(run)


def test_terms_that_cannot_be_dropped(run, goes_on, make_net):
    _, (optimizer, _) = run
    message = "MTAdam.drop_term: name must be one of several terms, ['left', 'right', 'size'], got 'new'"
    refused(ValueError, message, optimizer.drop_term, "new")
    goes_on(run)
    params = list(make_net().parameters())
    message = "MTAdam.drop_term: name must be one of several terms, ['a'], got 'a'"
    refused(ValueError, message, MTAdam(params, terms=["a"]).drop_term, "a")
    message = "MTAdam.drop_term: 'b' is the anchor; set another in param_groups first"
    refused(ValueError, message, MTAdam(params, terms=["a", "b"], anchor="b").drop_term, "b")


def test_what_streaming_has_not(make_net, losses):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS, **STREAMING)
    given = losses(net)
    optimizer.backward_term("right", given["right"])
    message = (
        "MTAdam.backward_term: streaming mode takes a term once a step, got 'right' again; add its losses up,"
        " or use mode='batched' to accumulate"
    )
    refused(RuntimeError, message, optimizer.backward_term, "right", given["right"])
    message = (
        "MTAdam.backward_term: streaming mode takes terms in their order, left, right, size, got 'left' after"
        " 'right'"
    )
    refused(RuntimeError, message, optimizer.backward_term, "left", given["left"])
    message = (
        "MTAdam.step: ranks come too late in streaming mode, whose terms are folded; pass them to MTAdam"
    )
    refused(ValueError, message, optimizer.step, ranks=[1.0, 1.0, 1.0])
    optimizer.step()
    assert optimizer.state[net.trunk.weight]["step"] == 1


# Gradients


DENSE = "must be dense, got torch.sparse_coo; of torch.nn.Embedding, leave sparse=True out"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["step", "backward_term"])
def test_gradients_of_a_sparse_embedding(mode, way):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = MTAdam([nn.Parameter(torch.ones(2)), *embedding.parameters()], terms=["a"], **mode)
    before = embedding.weight.detach().clone()
    message = f"MTAdam.{way}: the gradient of parameter 1 under term 'a' {DENSE}"
    loss = embedding(torch.tensor([1, 2])).square().sum()
    if way == "step":
        refused(TypeError, message, optimizer.step, [loss])
    else:
        refused(TypeError, message, optimizer.backward_term, "a", loss)
    assert torch.equal(embedding.weight, before) and not optimizer.state


BIAS = "the gradient of parameter 1 under term 'right'"
GRADIENTS = {
    "a shape": (torch.ones(9), ValueError, f"{BIAS} must have its shape, (8,), got (9,)"),
    "a dtype": (
        torch.ones(8, dtype=torch.float64),
        TypeError,
        f"{BIAS} must have its dtype, torch.float32, got torch.float64; cast it",
    ),
    "a complex dtype": (
        torch.ones(8, dtype=torch.complex64),
        TypeError,
        f"{BIAS} must have its dtype, torch.float32, got torch.complex64; cast it",
    ),
    "a device": (
        torch.ones(8, device="meta"),
        RuntimeError,
        f"{BIAS} must be on its device, cpu, got meta; move it",
    ),
    "a layout": (torch.ones(8).to_sparse(), TypeError, f"{BIAS} {DENSE}"),
    "a number": (0.0, TypeError, f"{BIAS} must be a tensor, got float"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_given(run, goes_on, name):
    (net, _), (optimizer, _) = run
    grad, error, message = GRADIENTS[name]
    grads = [[torch.ones_like(p) for p in net.parameters()] for _ in TERMS]
    grads[1][1] = grad
    refused(error, f"MTAdam.step_from_grads: {message}", optimizer.step_from_grads, grads)
    goes_on(run)


def test_lists_of_gradients(run, goes_on):
    (net, _), (optimizer, _) = run
    grads = [[torch.ones_like(p) for p in net.parameters()] for _ in TERMS]
    call = optimizer.step_from_grads
    refused(ValueError, f"MTAdam.step_from_grads: {count(2)}", call, grads[:2])
    refused(ValueError, f"MTAdam.step_from_grads: {missing('a')}", call, {"a": grads[0]})
    message = "grads of term 'size' must be one for each of the 6 parameters, got 5"
    refused(ValueError, f"MTAdam.step_from_grads: {message}", call, [*grads[:2], grads[2][:5]])
    for wrong, name in ((grads[0][0], "Tensor"), (iter(grads), "list_iterator"), (None, "NoneType")):
        message = f"grads must be a list of lists of tensors, got {name}"
        refused(TypeError, f"MTAdam.step_from_grads: {message}", call, wrong)
    goes_on(run)
