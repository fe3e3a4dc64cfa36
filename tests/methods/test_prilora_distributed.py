"""Two processes with half a batch each, against one with all of it."""

import pytest
import torch
from torch import distributed as dist
from two_processes import results_of

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]

SCRIPT = """
import torch._dynamo  # which optimizers import: here once, and not in each process
from contextlib import nullcontext
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastkit.methods.prilora import PRILoRAConfig, apply_prilora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return x + self.out(torch.tanh(self.query(x)) * self.key(x) + self.value(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def run(rank, ranks, options, pieces):
    torch.manual_seed(0)
    prilora = apply_prilora(Net(), PRILoRAConfig(**options))
    torch.manual_seed(5 + rank)  # what follows is a rank's own
    net = DistributedDataParallel(prilora.model) if ranks > 1 else prilora.model
    optimizer = torch.optim.SGD(prilora.parameters(), lr=0.01, momentum=0.9)
    masks, counted = [], []
    for number in range(7):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 3, 16, generator=generator) * torch.logspace(-1, 0.3, 16)
        target = torch.randn(8, 3, 16, generator=generator)
        halves = list(zip(x.chunk(ranks)[rank].chunk(pieces), target.chunk(ranks)[rank].chunk(pieces)))
        optimizer.zero_grad()
        for i, (some, of_some) in enumerate(halves):
            last = ranks == 1 or i == pieces - 1
            with nullcontext() if last else net.no_sync():
                ((net(some) - of_some).square().mean() / pieces).backward()
        del calls[:]
        optimizer.step()
        counted.append(list(calls))
        masks.append([layer.lora_a != 0 for layer in prilora.layers.values()])
    prilora.close()
    return prilora.state_dict(), masks, counted


def found(rank, ranks):
    return [run(rank, ranks, options, pieces) for options, pieces in cases]
"""

CASES = [
    ({"interval": 2, "mode": "hard"}, 1),
    ({"interval": 3, "mode": "soft", "reset_state": "m"}, 2),
    ({"interval": 2, "importance": "random"}, 1),
]


@pytest.fixture(scope="module")
def results(run_script, tmp_path_factory):
    return results_of(run_script, SCRIPT, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_masks_are_those_of_the_joint_batch_on_every_rank(results, case):
    options = CASES[case][0]
    (joint, joint_masks, _), (first, first_masks, counted), (second, second_masks, also) = (
        of_rank[case] for of_rank in results
    )
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name
    for of_joint, of_first, of_second in zip(joint_masks, first_masks, second_masks, strict=True):
        for a, b, c in zip(of_joint, of_first, of_second, strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
    for name, tensor in joint["tensors"].items():
        torch.testing.assert_close(first["tensors"][name], tensor, rtol=1e-4, atol=1e-5)
    events = [step for step in range(1, 8) if step % options["interval"] == 0]
    assert joint["events"] == first["events"] == second["events"] == events
    assert joint["owners"] == first["owners"] == second["owners"]
    assert counted == also
    if options.get("importance") == "random":
        assert counted == [[]] * 7
    else:  # what is decided, once; then one collective a step, of query and out of three layers
        assert counted[0][-1] == counted[1][0] == 3 * 2 * 16
        assert [len(calls) for calls in counted] == [3, 1, 1, 1, 1, 1, 1]
