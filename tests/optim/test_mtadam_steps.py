"""MTAdam: the ways to give terms, accumulation, whose graphs and gradients it touches, and what it holds."""

import gc
import re
import sys

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


# Ways to give terms


def by_dict(net, optimizer, losses):
    given = losses(net)
    returned = optimizer.step(given)
    assert list(returned) == TERMS and all(torch.equal(returned[name], given[name]) for name in TERMS)
    assert not any(loss.requires_grad for loss in returned.values())


def by_shuffled_dict(net, optimizer, losses):
    optimizer.step(dict(reversed(losses(net).items())))


def by_list(net, optimizer, losses):
    given = list(losses(net).values())
    returned = optimizer.step(given)
    assert isinstance(returned, list) and all(map(torch.equal, returned, given))
    assert not any(loss.requires_grad for loss in returned)


def by_closure(net, optimizer, losses):
    with torch.no_grad():  # the optimizer enables gradients
        assert list(optimizer.step(closure=lambda: losses(net))) == TERMS


def by_callable(net, optimizer, losses):
    assert list(optimizer.step(lambda: losses(net))) == TERMS


def by_term(net, optimizer, losses):
    for name, loss in losses(net).items():
        optimizer.backward_term(name, loss)
    assert optimizer.step() is None


def by_index_and_own_graphs(net, optimizer, losses):
    for index, name in enumerate(TERMS):
        optimizer.backward_term(index, losses(net)[name])
    optimizer.step()


def by_term_and_an_empty_closure(net, optimizer, losses):
    """As Lightning steps in manual optimization."""
    for name, loss in losses(net).items():
        optimizer.backward_term(name, loss)
    optimizer.step(closure=lambda: None)


def by_gradients(net, optimizer, losses):
    params = list(net.parameters())
    grads = {
        name: torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for name, loss in losses(net).items()
    }
    before = [[None if g is None else g.clone() for g in of_term] for of_term in grads.values()]
    assert optimizer.step_from_grads(grads) is None
    for of_term, copies in zip(grads.values(), before, strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(of_term, copies, strict=True))


def by_list_of_gradients(net, optimizer, losses):
    params = list(net.parameters())
    optimizer.step_from_grads(
        [
            torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
            for loss in losses(net).values()
        ]
    )


WAYS = [by_dict, by_shuffled_dict, by_list, by_closure, by_callable]
WAYS += [by_term, by_index_and_own_graphs, by_term_and_an_empty_closure, by_gradients, by_list_of_gradients]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_all_ways_give_the_same_bits(make_net, losses, train, everything, assert_same, mode, way):
    net, other = make_net(), make_net()
    optimizer = MTAdam(net.parameters(), lr=1e-2, terms=TERMS, **mode)
    reference = MTAdam(other.parameters(), lr=1e-2, terms=TERMS, **mode)
    for number in range(4):
        way(net, optimizer, lambda net, number=number: losses(net, number))
    train(other, reference, range(4))
    assert_same(everything(net, optimizer), everything(other, reference))


def test_terms_are_what_the_first_step_is_given(make_net, losses):
    net = make_net()
    optimizer = MTAdam(net.parameters())
    assert optimizer.terms is None
    optimizer.step(list(losses(net).values())[:2])
    assert optimizer.terms == ("0", "1")
    optimizer = MTAdam(net.parameters())
    optimizer.step(losses(net))
    assert optimizer.terms == tuple(TERMS)
    assert MTAdam(net.parameters(), terms=2).terms == ("0", "1")


def test_a_term_that_is_none_or_not_given_is_a_gradient_of_zeros(
    make_net, losses, everything, assert_same, mode
):
    runs = []
    for way in range(4):
        net = make_net()
        optimizer = MTAdam(net.parameters(), lr=1e-2, terms=TERMS, **mode)
        for number in range(4):
            given = {**losses(net, number), TERMS[number % 3]: None}
            if way == 0:
                returned = optimizer.step(given)
                assert returned[TERMS[number % 3]] is None
                continue
            if way == 1:
                optimizer.step(list(given.values()))
                continue
            for name, loss in given.items():
                if way == 2 or loss is not None:
                    optimizer.backward_term(name, loss)
            optimizer.step()
        runs.append(everything(net, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_expanded_gradients_and_those_that_share_memory_are_taken(mode):
    """As autograd gives for a sum: strides of 0, and the same tensor twice."""
    a, b = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    MTAdam([a, b], lr=0.25, **mode).step([(a + b).sum(), 5 * (a - b).sum()])
    torch.testing.assert_close(a.detach(), torch.full((4, 3), 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(b.detach(), torch.ones(4, 3), rtol=1e-6, atol=0)


# Accumulation


@pytest.mark.parametrize("order", ["abab", "aabb", "baab"])
def test_two_half_batches_are_the_whole(make_net, losses, everything, assert_same, order):
    whole, halves = make_net(torch.float64), make_net(torch.float64)
    optimizers = [MTAdam(net.parameters(), lr=1e-2, terms=["a", "b"]) for net in (whole, halves)]
    for number in range(5):
        given = losses(whole, number)
        optimizers[0].step({"a": given["left"], "b": given["right"]})
        parts = [losses(halves, number, rows=slice(*rows)) for rows in ((0, 4), (4, 8))]
        seen = {"a": 0, "b": 0}
        for term in order:
            optimizers[1].backward_term(term, parts[seen[term]][{"a": "left", "b": "right"}[term]])
            seen[term] += 1
        optimizers[1].step()
    first, second = (everything(n, o) for n, o in zip((whole, halves), optimizers, strict=True))
    assert_same(first, second, 1e-12)


def test_the_norm_is_that_of_the_sum():
    """Of gradients that cancel out there is none."""
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = MTAdam([w], terms=1)
    for direction in ([3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]):
        optimizer.backward_term(0, (w * torch.tensor(direction)).sum())
    optimizer.step()
    assert optimizer.grad_norms(w)["0"] == 4


def test_accumulation_of_parts_that_reach_different_parameters(make_net, losses, everything, assert_same):
    net, other = make_net(torch.float64), make_net(torch.float64)
    optimizer, reference = (MTAdam(n.parameters(), terms=["all"]) for n in (net, other))
    for number in range(3):
        for loss in losses(net, number).values():
            optimizer.backward_term("all", loss, retain_graph=True)
        optimizer.backward_term("all", None)
        optimizer.step()
        reference.step([sum(losses(other, number).values())])
    assert_same(everything(net, optimizer), everything(other, reference), 1e-12)


def test_gradients_of_autograd_are_not_added_to():
    """They may be memory of others: here the weight of the loss itself."""
    w, direction = nn.Parameter(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])
    optimizer = MTAdam([w], terms=1)
    for _ in range(3):
        optimizer.backward_term(0, torch.dot(w, direction))
    optimizer.step()
    assert torch.equal(direction, torch.tensor([1.0, 2.0, 3.0]))


# p.grad, and terms that wait


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_p_grad_is_left_as_it_is(make_net, losses, way):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS)
    marks = {name: torch.full_like(p, 7.0) for name, p in net.named_parameters() if "trunk" in name}
    for name, param in net.named_parameters():
        param.grad = marks.get(name)
    way(net, optimizer, losses)
    for name, param in net.named_parameters():
        assert param.grad is marks.get(name)
        assert name not in marks or bool((param.grad == 7).all())


def test_clipping_p_grad_changes_nothing(make_net, losses, everything, assert_same):
    runs = []
    for clips in (False, True):
        net = make_net()
        optimizer = MTAdam(net.parameters(), lr=1e-2, terms=TERMS)
        for number in range(3):
            sum(losses(net, number).values()).backward()
            for name, loss in losses(net, number).items():
                optimizer.backward_term(name, loss)
            if clips:
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in net.parameters())
        runs.append(everything(net, optimizer))
    assert_same(*runs)


def test_zero_grad_forgets_the_terms_that_wait(make_net, losses, everything, assert_same):
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), terms=TERMS) for n in (net, other))
    optimizer.backward_term("left", losses(net, 5)["left"])
    optimizer.zero_grad()
    optimizer.step(losses(net))
    reference.step(losses(other))
    assert_same(everything(net, optimizer), everything(other, reference))


def test_hooks_of_a_step_are_called(make_net, losses):
    net = make_net()
    optimizer, calls = MTAdam(net.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(losses(net))
    assert calls == ["before", "after"]


# Graphs


FREED = "Trying to backward through the graph a second time"


def test_the_graph_is_freed_after_the_last_term(make_net, losses, mode):
    net = make_net()
    optimizer = MTAdam(net.parameters(), lr=0.0, terms=TERMS, **mode)
    given = losses(net)
    optimizer.step({**given, "size": None})
    with pytest.raises(RuntimeError, match=FREED):
        given["right"].backward()
    given = losses(net)
    for name in TERMS:
        optimizer.backward_term(name, given[name])
    optimizer.step()
    with pytest.raises(RuntimeError, match=FREED):
        given["size"].backward()


def test_retain_graph_is_as_it_is_said(make_net, losses, mode):
    net = make_net()
    optimizer = MTAdam(net.parameters(), terms=TERMS, **mode)
    given = losses(net)
    optimizer.backward_term("left", given["left"], retain_graph=False)
    with pytest.raises(RuntimeError, match=FREED):
        given["left"].backward()
    given = losses(net)
    for name in TERMS[1:]:
        optimizer.backward_term(name, given[name], retain_graph=True)
    given["right"].backward()
    optimizer.step()


def test_a_graph_from_before_the_step_is_stale(make_net, losses):
    """As after any optimizer's step, PyTorch notices that parameters have changed."""
    net = make_net()
    given = losses(net)
    MTAdam(net.parameters()).step(losses(net))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        given["left"].backward()


def test_two_optimizers_do_not_touch_each_other(mode):
    """A GAN: the generator's losses go through the discriminator."""
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
    of_generator = MTAdam(generator.parameters(), lr=1e-2, **mode)
    of_discriminator = MTAdam(discriminator.parameters(), lr=1e-2, **mode)
    real, noise = torch.randn(8, 4), torch.randn(8, 4)
    before = [p.detach().clone() for p in discriminator.parameters()]
    fake = generator(noise)
    of_generator.step([-discriminator(fake).mean(), (fake - real).square().mean()])
    assert all(map(torch.equal, discriminator.parameters(), before))
    assert all(p.grad is None for p in (*generator.parameters(), *discriminator.parameters()))
    assert not of_discriminator.state
    before = [p.detach().clone() for p in generator.parameters()]
    fake = generator(noise)
    of_discriminator.step([discriminator(fake).mean(), -discriminator(real).mean()])
    assert all(map(torch.equal, generator.parameters(), before))
    assert all(p.grad is None for p in (*generator.parameters(), *discriminator.parameters()))


# Memory


@pytest.fixture
def new_objects():
    """The collector is to look at these alone, not at all that was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects")
@pytest.mark.parametrize(("name", "sets"), [("batched", 3), ("streaming", 0)])
@pytest.mark.parametrize("way", ["step", "backward_term"])
def test_gradients_of_earlier_terms_are_held_in_batched_mode_alone(name, sets, way):
    """Tensors of the parameter's size, counted where the fourth backward begins."""
    w = nn.Parameter(torch.randn(1237))
    optimizer = MTAdam([w], terms=4, **MODES[name])

    def count():
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 1237 for o in gc.get_objects())

    def terms():
        return [w.square().sum() * 2.0**k for k in range(4)]

    optimizer.step(terms())
    counts = [count()]
    given = terms()
    given[3].register_hook(lambda grad: counts.append(count()))
    if way == "step":
        optimizer.step(given)
    else:
        for k in range(4):
            optimizer.backward_term(k, given[k])
        optimizer.step()
    counts.append(count())
    assert counts == [counts[0], counts[0] + sets, counts[0]]


PEAK = """
import resource
import torch
from fastkit.optim import MTAdam

torch.set_num_threads(1)
small = torch.nn.Parameter(torch.ones(4))
MTAdam([small]).step([(k + 1) * torch.dot(small, small) for k in range(4)])  # what is loaded then counts not
w, direction = torch.nn.Parameter(torch.ones(10 << 20)), torch.ones(10 << 20)  # 40 MiB: malloc maps them
optimizer = MTAdam([w], terms=4, **{mode!r})
optimizer.step_from_grads([[None]] * 3 + [[direction]])
for moment in optimizer.state[w].values():
    moment.add_(0)  # zeros become memory when they are written
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for _ in range(2):
    optimizer.step([(k + 1) * torch.dot(w, direction) for k in range(4)])
print((peak() - before) / (40 << 10))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units there")
def test_the_peak_is_one_set_of_gradients_in_streaming_mode(run_script):
    sets = {}
    for name, options in MODES.items():
        done = run_script(PEAK.format(mode=options))
        assert done.returncode == 0, done.stderr
        sets[name] = float(re.fullmatch(r"(\S+)\n", done.stdout)[1])
    assert 0.5 < sets["streaming"] < 1.3 and 3.5 < sets["batched"] < 4.3, sets
