"""MTAdam on losses and gradients that are not finite, on terms that fall silent, and under a GradScaler."""

import math
import re

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

TERMS = ["left", "right", "size"]
STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}
BAD = [math.nan, math.inf, -math.inf]


# Losses


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("way", ["step", "backward_term"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_loss_leaves_everything_as_it_is(
    make_net, losses, train, everything, assert_same, value, way, at
):
    """Even where its gradients are finite; and what comes then is as if it had not been."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), lr=1e-2, terms=TERMS, amsgrad=True) for n in (net, other))
    train(net, optimizer, range(at))
    train(other, reference, range(at))
    given = losses(net, 9)
    given["right"] = given["right"] + value
    if way == "step":
        assert not optimizer.step(given)["right"].isfinite()
    else:
        for name, loss in given.items():
            optimizer.backward_term(name, loss)
        optimizer.step()
    if at:
        assert_same(everything(net, optimizer), everything(other, reference))
    train(net, optimizer, range(3))
    train(other, reference, range(3))
    assert_same(everything(net, optimizer), everything(other, reference))


def test_one_bad_part_of_an_accumulated_term_is_enough(make_net, losses, everything, assert_same):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS)
    optimizer.step(losses(net))
    before = everything(net, optimizer)
    for number, factor in ((0, 1.0), (1, math.nan), (2, 1.0)):
        for name, loss in losses(net, number).items():
            optimizer.backward_term(name, factor * loss if name == "left" else loss)
    optimizer.step()
    assert_same(before, everything(net, optimizer))


def test_a_bad_loss_that_was_forgotten_does_not_count(make_net, losses):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS)
    optimizer.backward_term("left", math.nan * losses(net)["left"])
    optimizer.zero_grad()
    optimizer.step(losses(net))
    assert optimizer.state[net.trunk.weight]["step"] == 1


@pytest.mark.parametrize("on_nonfinite", ["skip_term", "propagate"])
def test_a_bad_loss_with_good_gradients_is_for_skip_step_alone(make_net, losses, on_nonfinite):
    net, other = make_net(), make_net()
    optimizer, reference = MTAdam(net.parameters(), on_nonfinite=on_nonfinite), MTAdam(other.parameters())
    given = losses(net)
    optimizer.step({**given, "left": given["left"] + math.nan})
    reference.step(losses(other))
    assert all(map(torch.equal, net.parameters(), other.parameters()))


# Gradients


def gradients(params, bad=None, value=math.nan):
    """Two terms; ``bad`` is a term and a parameter, of whose gradient one entry is not finite."""
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(2)]
    if bad is not None:
        grads[bad[0]][bad[1]].view(-1)[-1] = value
    return grads


def made(**options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 5), (3,), ())]
    optimizer = MTAdam(params, lr=1e-2, terms=2, **options)
    optimizer.step_from_grads(gradients(params))
    return params, optimizer


def state_of(params, optimizer):
    return [[p.detach().clone(), *(e.clone() for e in optimizer.state[p].values())] for p in params]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_a_bad_gradient_leaves_its_tensor_as_it_is(value, term, of):
    params, optimizer = made()
    before = state_of(params, optimizer)
    good, reference = made()
    optimizer.step_from_grads(gradients(params, (term, of), value))
    reference.step_from_grads(gradients(good))
    after, expected = state_of(params, optimizer), state_of(good, reference)
    for i in range(3):
        assert same(after[i], before[i] if i == of else expected[i]) and not same(expected[i], before[i])


@pytest.mark.parametrize("options", [{"on_nonfinite": "skip_term"}, STREAMING], ids=["batched", "streaming"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("term", [0, 1])
def test_skip_term_takes_a_bad_gradient_as_zeros(options, value, term):
    params, optimizer = made(**options)
    others, reference = made(**options)
    optimizer.step_from_grads(gradients(params, (term, 0), value))
    grads = gradients(others)
    grads[term][0].zero_()
    reference.step_from_grads(grads)
    for a, b in zip(state_of(params, optimizer), state_of(others, reference), strict=True):
        assert same(a, b)
    assert all(torch.isfinite(entry).all() for entry in optimizer.state[params[0]].values())
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("mode", ["batched", "streaming"])
def test_propagate_goes_on(mode):
    params, optimizer = made(mode=mode, on_nonfinite="propagate")
    others, reference = made(mode=mode, on_nonfinite="propagate")
    optimizer.step_from_grads(gradients(params, (1, 0)))
    reference.step_from_grads(gradients(others))
    assert params[0][-1, -1].isnan() and optimizer.state[params[0]]["grad_norm.1"].isnan()
    for i in (1, 2):
        assert same(state_of(params, optimizer)[i], state_of(others, reference)[i])


def test_streaming_a_nan_loss_skips_its_terms(make_net, losses, everything, assert_same):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), lr=1e-2, **STREAMING) for n in (net, other))
    for run, of_run in ((net, optimizer), (other, reference)):
        of_run.step(losses(run))
    given = losses(net, 1)
    optimizer.step({**given, "left": given["left"] * math.nan})
    given = losses(other, 1)
    reference.step({**given, "left": given["left"] * 0})
    assert_same(everything(net, optimizer), everything(other, reference))


def test_large_and_small_gradients_have_norms():
    """Whose squares are no float32 numbers but the sum's, or none at all in half precision."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = MTAdam([w], lr=0.125)
    optimizer.step_from_grads([[torch.full((4,), 6e4, dtype=torch.float16)], [torch.full((4,), 6e-8).half()]])
    norms = [norm.item() for norm in optimizer.grad_norms(w).values()]
    assert norms == pytest.approx([2 * 6e4, 2 * 6e-8], rel=1e-2)
    torch.testing.assert_close(w.detach(), torch.full((4,), -0.25).half())


# Silence


@pytest.mark.parametrize("options", [{}, STREAMING], ids=["batched", "streaming"])
@pytest.mark.parametrize("silent", [5, 100, 400])
def test_a_term_that_wakes_up_is_bounded(options, silent):
    """By 1 / (1 - b3) of the anchor's norm; after 218 steps from 1 it is dead, and begins anew."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = MTAdam([w], terms=["a", "b"], betas=(0.0, 0.999, 0.9), **options)
    optimizer.step({"a": w[0], "b": w[1]})
    for _ in range(silent):
        optimizer.step({"a": w[0], "b": None})
    optimizer.step({"a": w[0], "b": 1e6 * w[1]})
    first, second = optimizer.state[w]["exp_avg"].tolist()
    assert first == pytest.approx(1)
    expected = 1e6 / (0.9 ** (silent + 1) + 0.1e6) if silent < 218 else 1.0
    assert second == pytest.approx(expected, rel=1e-6) and second <= 10 + 1e-9
    assert w.abs().max() < 1


# GradScaler


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, **options})


def scaled_step(optimizer, scaler, given, unscales=False):
    for name, loss in given.items():
        optimizer.backward_term(name, loss, scaler=scaler)
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_scaled_training_is_unscaled_training(
    make_net, losses, train, everything, assert_same, factor, unscales
):
    """At whatever stage the scaler is, under scales that change; to the bit where they are powers of 2."""
    net, other = make_net(), make_net()
    optimizer, reference = (
        MTAdam(n.parameters(), lr=1e-2, terms=TERMS, weight_decay=0.1) for n in (net, other)
    )
    scaler = scaler_of(growth_factor=factor, growth_interval=2)
    for number in range(8):
        scaled_step(optimizer, scaler, losses(net, number), unscales)
    assert scaler.get_scale() == 2**10 * factor**4
    train(other, reference, range(8))
    found, expected = everything(net, optimizer), everything(other, reference)
    assert_same(found, expected, None if factor == 2 else 1e-5)


def test_a_scale_that_changes_within_an_accumulated_step(make_net, losses, everything, assert_same):
    """The gradients of a term have one scale: that of its first part."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS) for n in (net, other))
    scaler = scaler_of()
    for number in range(2):
        for name, loss in losses(net, number).items():
            optimizer.backward_term(name, loss, scaler=scaler)
        for name, loss in losses(other, number).items():
            reference.backward_term(name, loss)
        scaler.update(2.0**14)
    scaler.step(optimizer)
    reference.step()
    assert_same(everything(net, optimizer), everything(other, reference))


def test_p_grad_is_the_scaled_sum_until_the_step(make_net, losses):
    net, other = make_net(torch.float64), make_net(torch.float64)
    optimizer, scaler = MTAdam(net.parameters(), terms=TERMS), scaler_of()
    net.trunk.bias.grad = torch.ones(8).double()  # of before, which is not added to
    unused = net.left.bias.requires_grad_(False)
    for name, loss in losses(net).items():
        optimizer.backward_term(name, loss, scaler=scaler)
    other.left.bias.requires_grad_(False)
    (2**10 * sum(losses(other).values())).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    scaler.step(optimizer)
    assert all(p.grad is None for p in net.parameters()) and unused.grad is None


def test_p_grad_of_before_is_not_added_to_after_a_term_without_loss(make_net, losses):
    net = make_net()
    optimizer, scaler = MTAdam(net.parameters(), terms=TERMS), scaler_of()
    net.trunk.weight.grad = torch.full((8, 6), 7.0)
    optimizer.backward_term("left", None, scaler=scaler)
    optimizer.backward_term("size", losses(net)["size"], scaler=scaler)
    assert torch.equal(net.trunk.weight.grad, 2**11 * net.trunk.weight.detach())


def test_clipping_what_was_unscaled_changes_nothing(make_net, losses):
    runs = []
    for clips in (False, True):
        net = make_net()
        optimizer, scaler = MTAdam(net.parameters(), terms=TERMS), scaler_of()
        for name, loss in losses(net).items():
            optimizer.backward_term(name, loss, scaler=scaler)
        scaler.unscale_(optimizer)
        if clips:
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        scaler.step(optimizer)
        runs.append(net)
    assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))


@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("on_nonfinite", ["skip_step", "skip_term", "propagate"])
def test_inf_skips_the_step_and_halves_the_scale(
    make_net, losses, train, everything, assert_same, on_nonfinite, unscales
):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS, on_nonfinite=on_nonfinite)
    scaler = scaler_of()
    scaled_step(optimizer, scaler, losses(net))
    before = everything(net, optimizer)
    scaler.update(2.0**120)  # the gradients of the losses overflow
    scaled_step(optimizer, scaler, losses(net, weights=(2.0**20, 1.0, 1.0)), unscales)
    assert_same(before, everything(net, optimizer))
    assert scaler.get_scale() == 2.0**119
    scaler.update(2.0**10)
    scaled_step(optimizer, scaler, losses(net))
    assert optimizer.state[net.trunk.weight]["step"] == 2


def test_terms_without_loss_under_a_scaler(make_net, losses, everything, assert_same):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS) for n in (net, other))
    scaler = scaler_of()
    for number in range(2):
        scaled_step(optimizer, scaler, {**losses(net, number), "right": None})
        reference.step({**losses(other, number), "right": None})
    assert_same(everything(net, optimizer), everything(other, reference))


def test_a_step_of_the_optimizer_itself_unscales_too(make_net, losses, everything, assert_same):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS) for n in (net, other))
    for name, loss in losses(net).items():
        optimizer.backward_term(name, loss, scaler=scaler_of(init_scale=2.0 ** TERMS.index(name)))
    optimizer.step()
    reference.step(losses(other))
    assert_same(everything(net, optimizer), everything(other, reference))


@pytest.mark.parametrize("options", [{}, STREAMING], ids=["batched", "streaming"])
@pytest.mark.parametrize("way", ["terms", "losses"])
def test_a_disabled_scaler_does_nothing(make_net, losses, train, everything, assert_same, options, way):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS, **options) for n in (net, other))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for number in range(3):
        if way == "terms":
            for name, loss in losses(net, number).items():
                optimizer.backward_term(name, loss, scaler=scaler)
            assert all(p.grad is None for p in net.parameters())
            scaler.step(optimizer)
        else:
            scaler.step(optimizer, losses(net, number))
        scaler.update()
    train(other, reference, range(3))
    assert_same(everything(net, optimizer), everything(other, reference))


LOSSES_REFUSED = (
    "MTAdam.step: losses cannot go through GradScaler.step, whose check for inf comes before; call"
    " backward_term(term, loss, scaler=scaler) for each, then scaler.step(optimizer)"
)


def test_losses_through_a_scaler_are_refused_and_training_goes_on(
    make_net, losses, train, everything, assert_same
):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS) for n in (net, other))
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=f"^{re.escape(LOSSES_REFUSED)}$"):
        scaler.step(optimizer, losses(net))
    assert not optimizer.state
    optimizer.step(losses(net))  # without the scaler
    train(other, reference, range(1))
    assert_same(everything(net, optimizer), everything(other, reference))


@pytest.mark.parametrize("which", [TERMS, ["left"]], ids=["all", "one"])
def test_terms_that_were_not_scaled_are_refused(make_net, losses, which):
    net = make_net()
    optimizer, scaler = MTAdam(net.parameters(), terms=TERMS), scaler_of()
    scaler.scale(torch.ones(()))
    for name, loss in losses(net).items():
        optimizer.backward_term(name, loss, scaler=None if name in which else scaler)
    message = (
        "MTAdam.step: of GradScaler.step every term must know the scale; call"
        " backward_term(term, loss, scaler=scaler)"
    )
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        scaler.step(optimizer)
    assert all(map(torch.equal, net.parameters(), before)) and not optimizer.state


@pytest.mark.parametrize("first", [False, True], ids=["unscaled first", "scaled first"])
def test_a_term_in_parts_of_which_some_are_scaled_is_refused(make_net, losses, first):
    """Else parts would be added up that have different scales."""
    net = make_net()
    optimizer, scaler = MTAdam(net.parameters(), terms=TERMS), scaler_of()
    optimizer.backward_term("left", losses(net)["left"], scaler=scaler if first else None)
    with pytest.raises(RuntimeError, match=r"^MTAdam\.backward_term: .*scale"):
        optimizer.backward_term("left", losses(net)["left"], scaler=None if first else scaler)


def test_streaming_refuses_a_scaler(make_net, losses):
    net = make_net()
    optimizer, scaler = MTAdam(net.parameters(), terms=TERMS, **STREAMING), scaler_of()
    message = "MTAdam.backward_term: streaming mode takes no GradScaler; use mode='batched'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        optimizer.backward_term("left", losses(net)["left"], scaler=scaler)
    scaler.scale(torch.ones(()))
    optimizer.backward_term("left", losses(net)["left"])
    with pytest.raises(RuntimeError, match=r"^MTAdam\.step: streaming mode takes no GradScaler"):
        scaler.step(optimizer)
