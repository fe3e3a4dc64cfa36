"""MTAdam on a network of two heads over written characters: one names the alphabet, one the character."""

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

ALPHABETS, CHARACTERS = 3, 5  # of each alphabet
DRAWERS, TESTED = 12, 4  # who drew each character, and how many of them are for the test
SIDE = 28
ORDER = ("trunk", "alphabet", "character")


def drawn(strokes):
    """Images (N, 28, 28) uint8 of N characters of S Bezier curves (N, S, 3, 2), of three points each."""
    t = torch.linspace(0, 1, 24)[:, None]
    parts = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    points = torch.einsum("tp,nspd->nstd", parts, strokes).flatten(1, 2)  # (N, S * 24, 2), from 0 to 1
    cells = (torch.arange(SIDE) + 0.5) / SIDE
    grid = torch.cartesian_prod(cells, cells)
    near = torch.cdist(grid.expand(len(points), -1, -1), points).amin(2)
    ink = (255 * (1.6 - near * SIDE).clamp(0, 1)).to(torch.uint8)
    return ink.view(-1, SIDE, SIDE)


@pytest.fixture(scope="module")
def characters():
    """In the manner of Omniglot: images, alphabets and characters, of who is trained on and of who is not.

    The alphabets differ in how many strokes they have, and how round these are; who draws moves all points a
    little, and the whole.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    images, labels = [], []
    for alphabet in range(ALPHABETS):
        strokes = 2 + alphabet
        ends = 0.2 + 0.6 * torch.rand(CHARACTERS, strokes, 2, 2, generator=generator)
        middle = ends.mean(2, keepdim=True) + 0.15 * alphabet * noise(CHARACTERS, strokes, 1, 2)
        curves = torch.cat([ends[:, :, :1], middle, ends[:, :, 1:]], 2)
        of_drawers = (
            curves + 0.02 * noise(DRAWERS, *curves.shape) + 0.03 * noise(DRAWERS, CHARACTERS, 1, 1, 2)
        )
        images.append(drawn(of_drawers.flatten(0, 1)).view(DRAWERS, CHARACTERS, SIDE, SIDE))
        number = torch.arange(CHARACTERS) + alphabet * CHARACTERS
        labels.append(torch.stack([torch.full_like(number, alphabet), number], 1).expand(DRAWERS, -1, -1))
    x, y = torch.cat(images, 1), torch.cat(labels, 1)
    return [(x[part].flatten(0, 1), y[part].flatten(0, 1)) for part in (slice(TESTED, None), slice(TESTED))]


class TwoHeads(nn.Module):
    """A trunk, and a head for each of two tasks; in which order it lists its parameters is chosen."""

    def __init__(self, order, alphabets, characters):
        super().__init__()
        made = {
            "trunk": nn.Sequential(
                nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
                nn.Flatten(), nn.LazyLinear(48), nn.ReLU(),
            ),
            "alphabet": nn.Linear(48, alphabets),
            "character": nn.Linear(48, characters),
        }  # fmt: skip
        made["trunk"](torch.zeros(1, 1, SIDE, SIDE))
        for name in order:
            setattr(self, name, made[name])

    def forward(self, x):
        h = self.trunk(x[:, None].float() / 255)
        return self.alphabet(h), self.character(h)


def train(net, x, y, weights, steps, batch=40, lr=2e-3):
    optimizer = MTAdam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        logits = net(x[rows])
        losses = [nn.functional.cross_entropy(z, y[rows, k]) for k, z in enumerate(logits)]
        optimizer.step({"alphabet": weights[0] * losses[0], "character": weights[1] * losses[1]})


def accuracy(net, x, y):
    """Of each head."""
    with torch.no_grad():
        return [(logits.argmax(1) == y[:, k]).double().mean().item() for k, logits in enumerate(net(x))]


@pytest.fixture(scope="module")
def learned(characters):
    """The network after a training, made once for the tests of this file."""
    (x, y), _ = characters
    nets = {}

    def learned(order=ORDER, weights=(1.0, 1000.0)):
        if (order, weights) not in nets:
            torch.manual_seed(0)
            net = TwoHeads(order, ALPHABETS, ALPHABETS * CHARACTERS)
            train(net, x, y, weights, steps=90)
            nets[order, weights] = net
        return nets[order, weights]

    return learned


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1000.0), (1000.0, 1.0)])
def test_both_heads_learn_whatever_the_weights(characters, learned, weights):
    """Drawings of others; by chance a third and a fifteenth would be right."""
    _, test = characters
    alphabet, character = accuracy(learned(weights=weights), *test)
    assert alphabet > 0.85 and character > 0.8


@pytest.mark.parametrize("order", [("alphabet", "character", "trunk"), ("character", "trunk", "alphabet")])
def test_both_heads_learn_the_same_whatever_the_order_of_parameters(learned, order):
    expected = dict(learned().named_parameters())
    net = learned(order)
    assert next(net.named_parameters())[0].split(".")[0] == order[0]
    for name, param in net.named_parameters():
        assert torch.equal(param, expected[name]), name
