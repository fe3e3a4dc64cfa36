"""HeadEliminator in two processes with a part of each batch, against one with all of it."""

import pytest
import torch
from torch import distributed as dist
from two_processes import results_of

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]

SCRIPT = """
from fastkit.methods.multiverse import HeadEliminator

STEPS, ROWS, HEADS = 40, 9, 6


def run(rank, ranks, case):
    group = {"process_group": dist.new_group([0, 1])} if case.pop("group", False) and ranks > 1 else {}
    eliminator = HeadEliminator(HEADS, total_steps=STEPS, interval=3, fraction=0.3, **case, **group)
    generator = torch.Generator().manual_seed(1)
    sequence, scores, counted = [], [], []
    for t in range(STEPS):
        rows = torch.rand(ROWS, HEADS, generator=generator, dtype=torch.float64) + torch.arange(HEADS) / 4
        valid = torch.rand(ROWS, generator=generator) < 0.7
        valid[4:] &= t % 4 > 0  # of some steps one rank has none, and of others nobody
        valid &= t % 7 > 0
        own = slice(None) if ranks == 1 else slice(rank, rank + 1)
        for some, counts in zip(rows.tensor_split([4])[own], valid.tensor_split([4])[own]):
            some = some[counts]
            if len(some) or t % 2:  # a mean of no rows is NaN, or nothing is added at all
                eliminator.add(some.mean(0), (some < 0.8).sum(0), counts.sum())
        if case.get("score") == "dev" and t % 3 == 1:
            eliminator.add_dev_scores(1 - rows[0])
        del calls[:]
        sequence.append(eliminator.step())
        scores.append(eliminator.scores())
        counted.append(list(calls))
    return sequence, torch.stack(scores), counted


def refused(eliminator, change=None):
    try:
        eliminator.step()
    except RuntimeError as error:
        return str(error)
    return ""


def unlike(rank):
    "Messages of steps at which ranks differ, on each rank, and in between of one at which they do not."
    def make(heads=3, **options):
        return HeadEliminator(heads, total_steps=100, **options)

    messages = []
    eliminator = make()
    eliminator.add(torch.ones(3), torch.ones(3), 1)
    messages.append(refused(eliminator))
    if rank == 1:
        state = eliminator.state_dict()
        eliminator.load_state_dict({**state, "active": torch.tensor([True, False, True])})
    messages.append(refused(eliminator))
    alone = make(process_group=None)  # which asks nobody
    alone.step()
    if rank == 1:
        alone.step()
    eliminator = make()
    eliminator.load_state_dict(alone.state_dict())
    messages.append(refused(eliminator))
    messages.append(refused(make(margin=0.1 + rank)))
    messages.append(refused(make(heads=3 + rank)))
    eliminator = make(score="dev")
    if rank == 0:
        eliminator.add_dev_scores(torch.ones(3))
    messages.append(refused(eliminator))
    eliminator.add_dev_scores(torch.ones(3) - 0.5 * rank)
    messages.append(refused(eliminator))
    eliminator.add_dev_scores(torch.ones(3))
    messages.append(refused(eliminator))
    return messages


def found(rank, ranks):
    return [run(rank, ranks, dict(case)) for case in cases], unlike(rank) if ranks > 1 else []
"""

CASES = [{}, {"score": "accuracy", "policy": "fraction", "group": True}, {"score": "dev"}]


@pytest.fixture(scope="module")
def results(run_script, tmp_path_factory):
    return results_of(run_script, SCRIPT, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_processes_drop_the_heads_of_the_joint_batch(results, case):
    (joint, joint_scores, alone), (first, scores, counted), (second, also, calls) = (
        of_rank[0][case] for of_rank in results
    )
    assert joint == first == second
    assert sum(map(len, joint)) >= 3
    assert torch.equal(scores, also)
    torch.testing.assert_close(scores, joint_scores, rtol=1e-13, atol=0)
    # One collective a step, of 2H + 1 sums and what tells whether ranks are alike; their length once.
    assert counted == calls == [[2, 2 * 6 + 1 + 8], *[[2 * 6 + 1 + 8]] * 39]
    assert alone == [[]] * 40


def test_processes_that_differ_are_refused_on_each(results):
    def text(active, heads, steps):
        return (
            "HeadEliminator: step: all processes must have the same active heads, options, steps and dev"
            f" scores, got others than here, with {active} of {heads} heads after step {steps}; load the same"
            " state on all, or pass process_group=, the group of those that train one model"
        )

    for rank in (0, 1):
        masks = text(3 - rank, 3, 1)
        heads = text(3 + rank, 3 + rank, 0)
        alike = ["", masks, text(3, 3, 1 + rank), text(3, 3, 0), heads, text(3, 3, 0), text(3, 3, 0), ""]
        assert results[1 + rank][1] == alike
