"""The tasks and arms of run mtadam: terms are what they are said to be, and so are steps."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fastkit.optim import MTAdam
from fastkit.recipes import mtadam
from fastkit.recipes._experiment import seeded
from fastkit.recipes._mtadam_arms import ARMS, Stepper, equal_norm
from fastkit.recipes._mtadam_models import MODELS, Classifier
from fastkit.recipes.mtadam import draw_weights


@pytest.fixture(autouse=True)
def seed(one_thread):
    torch.manual_seed(0)


def images(count, classes, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, size, size, generator=generator)
    return x, torch.arange(count) % classes


# Terms and weights


def test_the_terms_of_all_classes_add_up_to_the_mean_loss():
    model = Classifier(8, 8, 4)
    x, y = images(30, 3)
    losses = model.losses(x, y)
    assert list(losses) == ["class_0", "class_1", "class_2", "class_3"]
    assert losses["class_3"] is None  # there is none in the batch
    total = sum(loss for loss in losses.values() if loss is not None)
    torch.testing.assert_close(total, cross_entropy(model.layers(x.flatten(1)), y))
    alone = cross_entropy(model.layers(x[y == 1].flatten(1)), y[y == 1], reduction="sum") / 30
    torch.testing.assert_close(losses["class_1"], alone)


def test_figures_of_the_classes():
    model = Classifier(8, 8, 3)
    x, y = images(30, 3)
    with torch.no_grad():
        model.layers[-1].weight.zero_()
        model.layers[-1].bias.copy_(torch.tensor([1.0, 0, 0]))
        figures = model.judged(x, y)
    assert figures["accuracy"] == pytest.approx(1 / 3) and figures["worst_class"] == 0
    assert figures["loss"] == pytest.approx(np.log(np.e + 2) - 1 / 3)


def test_halves_have_their_own_errors():
    model = MODELS["ratio"](5, 4, 3)
    x, y = torch.rand(6, 5, 4), torch.zeros(6, dtype=torch.int64)
    error = (model.decoder(model.encoder(x.flatten(1))).view(6, 5, 4) - x).square()
    losses = model.losses(x, y)
    torch.testing.assert_close(losses["upper"], error[:, :2].mean())
    torch.testing.assert_close(losses["lower"], error[:, 2:].mean())


def test_of_the_mixed_terms_only_classification_reaches_the_head_and_activity_neither():
    model = MODELS["mixed"](8, 8, 3)
    losses = model.losses(*images(12, 3))
    reached = {
        term: {
            name.partition(".")[0]
            for (name, p) in model.named_parameters()
            if torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0] is not None
        }
        for term, loss in losses.items()
    }
    assert reached == {
        "classification": {"encoder", "head"},
        "reconstruction": {"encoder", "decoder"},
        "activity": {"encoder"},
    }
    code = model.encoder(images(12, 3)[0].flatten(1))
    torch.testing.assert_close(losses["activity"], code.abs().mean())


@pytest.mark.parametrize("task", MODELS)
def test_weights_are_redrawn_from_each_seed(task):
    terms = MODELS[task](8, 8, 10).terms
    drawn = []
    for number in range(200):
        with seeded(number):
            drawn.append(list(draw_weights(task, terms, -3).values()))
    drawn = torch.tensor(drawn, dtype=torch.float64)
    assert (drawn[:, 0] == 1).all()
    others = drawn[:, 1:]
    if task == "ratio":
        assert (others == 1e-3).all()
        return
    assert len(others.unique(dim=0)) == 200
    if task == "classes":
        assert others.min() >= 0 and others.max() < 1000 and 450 < others.mean() < 550
    else:
        powers = others.log10()
        assert powers.min() >= -4 and powers.max() < 4 and powers.mean().abs() < 0.5 and powers.std() > 2


# Arms


def stepped(arm, weights, batches, *, ranks=None, lr=1e-2, classes=4):
    """A model after a step on each batch."""
    torch.manual_seed(0)
    model = Classifier(8, 8, classes)
    stepper = Stepper(ARMS[arm], model, dict(zip(model.terms, weights, strict=True)), lr=lr, ranks=ranks)
    for x, y in batches:
        stepper.step(model.losses(x, y))
    return model


def batches(count=6, classes=4):
    x, y = images(20 * count, classes)
    return list(zip(x.split(20), y.split(20), strict=True))


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


WEIGHTS = [1.0, 500.0, 3.0, 0.25]


@pytest.mark.parametrize(
    "arm", ["adam_unbalanced", "adam_balanced", "adam_unbalanced_xL", "adam_balanced_xL"]
)
def test_adam_takes_the_weighted_sum(arm):
    torch.manual_seed(0)
    model = Classifier(8, 8, 4)
    weights = torch.tensor(WEIGHTS if "unbalanced" in arm else [1.0] * 4)
    optimizer = torch.optim.Adam(model.parameters(), 4e-2 if arm.endswith("xL") else 1e-2)
    for x, y in batches():
        loss = cross_entropy(model.layers(x.flatten(1)), y, reduction="none")
        optimizer.zero_grad()
        ((loss * weights[y]).sum() / len(y)).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(stepped(arm, WEIGHTS, batches())), parameters(model))


@pytest.mark.parametrize("arm, lr", [("mtadam", 1e-2), ("mtadam_xL", 4e-2), ("mtadam_byL", 2.5e-3)])
@pytest.mark.parametrize("ranks", [None, [1.0, 2.0, 0.5, 1.0]])
def test_mtadam_takes_each_term(arm, lr, ranks):
    torch.manual_seed(0)
    model = Classifier(8, 8, 4)
    optimizer = MTAdam(model.parameters(), lr, ranks=ranks)
    for x, y in batches():
        losses = model.losses(x, y).values()
        optimizer.step([w * loss for w, loss in zip(WEIGHTS, losses, strict=True)])
    assert torch.equal(parameters(stepped(arm, WEIGHTS, batches(), ranks=ranks)), parameters(model))


@pytest.mark.parametrize("arm", ["mtadam", "equal_norm"])
def test_the_weights_do_not_matter(arm):
    """Powers of 2, which round alike: not by a bit, but for eps and the factors; Adam's do matter."""
    weights = [1.0, 2.0**9, 2.0**-9, 2.0**3]
    ones = parameters(stepped(arm, [1.0] * 4, batches()))
    torch.testing.assert_close(parameters(stepped(arm, weights, batches())), ones, atol=1e-5, rtol=1e-4)
    adam = [parameters(stepped("adam_unbalanced", w, batches())) for w in (weights, [1.0] * 4)]
    assert (adam[0] - adam[1]).abs().max() > 1e-2


@pytest.mark.parametrize("absent", [0, 2])
def test_a_class_that_is_not_in_the_batch_is_a_gradient_of_zeros(absent):
    """The first term's too, and in the middle of a training."""
    there = batches()
    x, y = there[2]
    there[2] = x, torch.where(y == absent, 1, y)
    found = stepped("mtadam", WEIGHTS, there)

    torch.manual_seed(0)
    model = Classifier(8, 8, 4)
    optimizer = MTAdam(model.parameters(), 1e-2)
    for x, y in there:
        loss = cross_entropy(model.layers(x.flatten(1)), y, reduction="none")
        optimizer.step([w * (loss * (y == k)).sum() / len(y) for k, w in enumerate(WEIGHTS)])
    assert torch.equal(parameters(found), parameters(model))


def test_equal_norm_by_hand():
    torch.manual_seed(0)
    model = Classifier(8, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, y in batches():
        grads = []
        for k, weight in enumerate(WEIGHTS):
            model.zero_grad()
            loss = cross_entropy(model.layers(x.flatten(1)), y, reduction="none")
            (weight * loss[y == k].sum() / len(y)).backward()
            grads.append([p.grad for p in model.parameters()])
        for i, p in enumerate(model.parameters()):
            norm = grads[0][i].norm()
            p.grad = sum(g[i] * norm / g[i].norm() for g in grads)
        optimizer.step()
    torch.testing.assert_close(parameters(stepped("equal_norm", WEIGHTS, batches())), parameters(model))


def test_equal_norm_where_terms_miss_a_parameter():
    a, b, c, d = (torch.tensor(values, requires_grad=True) for values in ([3.0, 4], [1.0], [2.0], [5.0]))
    losses = {"first": a.square().sum() / 2, "second": 100 * a.sum() + 7 * b.sum(), "third": b.square().sum()}
    found = equal_norm(losses, [a, b, c])
    torch.testing.assert_close(found[0], torch.tensor([3.0, 4]) + 5 / 2**0.5)
    torch.testing.assert_close(found[1], torch.tensor([14.0]))  # the second term's norm is 7
    assert found[2] is None
    assert [grad.tolist() for grad in equal_norm({"first": None, "second": d.sum()}, [d])] == [[0.0]]
    assert equal_norm({"first": 0 * d.sum(), "second": d.sum()}, [d])[0].tolist() == [0.0]
    assert equal_norm({"first": d.sum(), "second": 0 * d.sum()}, [d])[0].tolist() == [1.0]


def test_the_length_of_steps_is_in_learning_rates():
    x, y = images(40, 4)
    parts = mtadam.Tensors(x, y), mtadam.Tensors(x[:12], y[:12])
    model = Classifier(8, 8, 4)
    stepper = Stepper(ARMS["adam_balanced_xL"], model, dict.fromkeys(model.terms, 1.0), lr=1e-2)
    training = mtadam.Training("classes", model, stepper, *parts, batch=40)
    before = parameters(model)
    figures = training.advance()  # one step
    change = (parameters(model) - before).square().mean().sqrt().item()
    assert figures["step_length"] == pytest.approx(change / 4e-2)
    assert 0.5 < figures["step_length"] <= 1.0001  # Adam's first step is lr wherever there is a gradient
