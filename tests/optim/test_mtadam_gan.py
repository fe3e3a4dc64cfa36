"""MTAdam on both sides of a GAN: a generator of three losses, and a discriminator of three."""

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

MODES, RADIUS, WIDTH = 5, 2.0, 0.1
OF_GENERATOR = ["adversarial", "features", "moments"]
OF_DISCRIMINATOR = ["real", "fake", "penalty"]


def real(count, generator):
    """A mixture of normal distributions on a circle."""
    angle = 2 * torch.pi / MODES * torch.randint(MODES, (count,), generator=generator)
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + WIDTH * torch.randn(count, 2, generator=generator)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2))
        self.head = nn.Linear(48, 1)

    def forward(self, x):
        """Logits, and what feature matching compares."""
        h = self.trunk(x)
        return self.head(h)[:, 0], h


class GAN:
    """Both networks, with an MTAdam each."""

    def __init__(self, lr=2e-3, weights=(1.0, 1.0, 1.0)):
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.Linear(4, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 2)
        )
        self.discriminator = Discriminator()
        self.weights = weights
        options = {"lr": lr, "betas": (0.5, 0.99, 0.9)}
        self.of_generator = MTAdam(self.generator.parameters(), terms=OF_GENERATOR, **options)
        self.of_discriminator = MTAdam(self.discriminator.parameters(), terms=OF_DISCRIMINATOR, **options)
        self.random = torch.Generator().manual_seed(0)

    def sample(self, count):
        return self.generator(torch.randn(count, 4, generator=self.random))

    def losses_of_discriminator(self, count=64):
        x = real(count, self.random).requires_grad_()
        fake = self.sample(count)  # not detached: the optimizer keeps to its own parameters
        logits, _ = self.discriminator(x)
        [slope] = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return {
            "real": nn.functional.softplus(-logits).mean(),
            "fake": nn.functional.softplus(self.discriminator(fake)[0]).mean(),
            "penalty": slope.square().sum(1).mean(),
        }

    def losses_of_generator(self, count=64):
        x, fake = real(count, self.random), self.sample(count)
        (logits, h), (_, of_real) = self.discriminator(fake), self.discriminator(x)
        moments = (fake.mean(0) - x.mean(0)).square().sum() + (fake.T.cov() - x.T.cov()).square().sum()
        terms = nn.functional.softplus(-logits).mean(), (h.mean(0) - of_real.mean(0)).square().sum(), moments
        return {t: w * x for t, w, x in zip(OF_GENERATOR, self.weights, terms, strict=True)}

    def step(self):
        self.of_discriminator.step(self.losses_of_discriminator(), ranks=[1, 1, 0.1])
        self.of_generator.step(self.losses_of_generator(), ranks=[1, 0.3, 0.3])

    def quality(self, count=1000):
        """The share of samples that are near a mode, and the share of samples that the rarest mode has."""
        with torch.no_grad():
            x = self.sample(count)
        angle = 2 * torch.pi / MODES * torch.arange(MODES)
        near = torch.cdist(x, RADIUS * torch.stack([angle.cos(), angle.sin()], 1)).min(1)
        good = near.values < 4 * WIDTH
        counts = near.indices[good].bincount(minlength=MODES)
        return good.double().mean().item(), counts.min().item() / count


@pytest.fixture(autouse=True)
def many_rows(one_thread):
    """And small matrices."""


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 1000.0, 1e-3)])
def test_it_learns_the_mixture(weights):
    """All modes; of points over the square around the circle 7 % are near one, and at first none is."""
    gan = GAN(lr=3e-3, weights=weights)
    assert gan.quality()[0] < 0.1
    for _ in range(500):
        gan.step()
    near, rarest = gan.quality()
    assert near > 0.5
    assert rarest > 0.05


@pytest.mark.parametrize("filled", [False, True])
def test_each_leaves_the_gradients_of_the_other_as_they_are(filled):
    """And its own: those of the generator's losses go through the discriminator, and the reverse."""
    gan = GAN()
    networks = (gan.generator, gan.discriminator)
    params = [param for network in networks for param in network.parameters()]
    if filled:
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, number + 0.5)
    before = [None if param.grad is None else param.grad.clone() for param in params]
    grads = [param.grad for param in params]
    for _ in range(3):
        gan.step()
    for param, grad, old in zip(params, grads, before, strict=True):
        assert param.grad is grad
        assert grad is None or (old is not None and torch.equal(grad, old))


@pytest.mark.parametrize("turn", ["generator", "discriminator"])
def test_each_updates_its_own_parameters_alone(turn):
    """All of them, but for the bias of the logit, which real and fake pull as far each to its side."""
    gan = GAN()
    params = {name: list(getattr(gan, name).parameters()) for name in ("generator", "discriminator")}
    before = {name: [param.detach().clone() for param in of_network] for name, of_network in params.items()}
    getattr(gan, f"of_{turn}").step(getattr(gan, f"losses_of_{turn}")())
    for name, of_network in params.items():
        moved = [not torch.equal(a, b) for a, b in zip(of_network, before[name], strict=True)]
        still = 1 if name == "discriminator" else 0
        assert moved == (
            [True] * (len(moved) - still) + [False] * still if name == turn else [False] * len(moved)
        )


def test_the_trajectory_is_that_of_gradients_by_themselves():
    """Each term's from a forward pass of its own, of which the other network has no part that is trained."""
    gan, other = GAN(), GAN()
    for _ in range(5):
        gan.step()
        for turn, ranks in (("discriminator", [1, 1, 0.1]), ("generator", [1, 0.3, 0.3])):
            optimizer = getattr(other, f"of_{turn}")
            params = list(getattr(other, turn).parameters())
            frozen = other.generator if turn == "discriminator" else other.discriminator
            frozen.requires_grad_(False)
            state = other.random.get_state()
            grads = []
            for term in optimizer.terms:
                other.random.set_state(state)
                loss = getattr(other, f"losses_of_{turn}")()[term]
                grads.append(torch.autograd.grad(loss, params, allow_unused=True))
            frozen.requires_grad_(True)
            optimizer.step_from_grads(grads, ranks=ranks)
    for network in ("generator", "discriminator"):
        expected = getattr(gan, network).state_dict()
        for name, param in getattr(other, network).state_dict().items():
            assert torch.equal(param, expected[name]), name
