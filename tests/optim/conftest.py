"""A network with two heads under three terms, its training, and comparisons of all there is of a run."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def small(one_thread):
    torch.manual_seed(0)


class Net(nn.Module):
    """A trunk and two heads; in which order it lists its parameters is chosen."""

    def __init__(self, order):
        super().__init__()
        made = {"trunk": nn.Linear(6, 8), "left": nn.Linear(8, 3), "right": nn.Linear(8, 1)}
        for name in order:
            setattr(self, name, made[name])

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.left(h), self.right(h)


@pytest.fixture
def make_net():
    """The same weights each time."""

    def make(dtype=torch.float32, order=("trunk", "left", "right")):
        torch.manual_seed(0)
        return Net(order).to(dtype)

    return make


@pytest.fixture
def losses():
    """Three terms on the batch of a number: of the left head, of the right one, of the trunk alone."""

    def losses(net, number=0, weights=(1.0, 1.0, 1.0), rows=slice(None)):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)
        dtype = net.trunk.weight.dtype
        x, y = x[rows].to(dtype), y[rows].to(dtype)
        left, right = net(x)
        terms = (
            (left - y[:, :3]).square().sum(),
            (right - y[:, 3:]).abs().sum(),
            net.trunk.weight.square().sum(),
        )
        return dict(
            zip(("left", "right", "size"), [w * t for w, t in zip(weights, terms, strict=True)], strict=True)
        )

    return losses


@pytest.fixture
def train(losses):
    """Steps of an optimizer on batches of their numbers."""

    def train(net, optimizer, numbers, **options):
        for number in numbers:
            optimizer.step(losses(net, number, **options))

    return train


@pytest.fixture
def everything():
    """Copies of the parameters and of the state."""

    def everything(net, optimizer):
        found = {}
        for name, param in net.named_parameters():
            found[name] = param.detach().clone()
            for key, entry in optimizer.state.get(param, {}).items():
                found[f"{name}: {key}"] = entry.clone()
        return found

    return everything


@pytest.fixture
def assert_same():
    """To the bit, or within a tolerance."""

    def assert_same(a, b, tolerance=None):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value.dtype == b[key].dtype, key
            if tolerance is None:
                assert torch.equal(value, b[key]), key
            else:
                torch.testing.assert_close(
                    value, b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
                )

    return assert_same
