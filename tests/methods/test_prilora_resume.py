"""Training that goes on from a saved state, to the same bits; and states that do not fit."""

import copy
import io
import re

import pytest
import torch

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora

OPTIONS = [
    {"mode": "soft"},
    {"mode": "hard", "group": "matrix", "dropout": 0.1},
    {"mode": "final", "stop": 7, "reset_state": "mv"},
    {"importance": "random", "mode": "hard", "seed": 3},
]


def made(make_bert, **options):
    prilora = apply_prilora(make_bert(), PRILoRAConfig(**{"interval": 3, **options}))
    return prilora, torch.optim.AdamW(prilora.parameters(), lr=0.01)


def saved(*objects):
    """Through a file, as weights_only reads it."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go(train, prilora, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)  # of dropout
        train(prilora.model, optimizer, [number])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("at", [2, 3, 4])
def test_resumed_across_an_event_it_has_the_same_bits(make_bert, train, options, at):
    straight, optimizer = made(make_bert, **options)
    go(train, straight, optimizer, range(8))
    first, optimizer = made(make_bert, **options)
    go(train, first, optimizer, range(at))
    state, of_optimizer = saved(first.state_dict(), optimizer.state_dict())
    torch.manual_seed(9)
    resumed, optimizer = made(make_bert, **options)
    for parameter in resumed.parameters():
        torch.nn.init.normal_(parameter)
    resumed.load_state_dict(state)
    assert resumed.owners == first.owners and resumed.counts == first.counts
    assert [layer.statistic for layer in resumed.layers.values()] == [
        layer.statistic for layer in first.layers.values()
    ]
    optimizer.load_state_dict(of_optimizer)
    go(train, resumed, optimizer, range(at, 8))
    assert (resumed.steps, resumed.events) == (8, [3, 6]) == (straight.steps, straight.events)
    assert resumed.counts == straight.counts and resumed.owners == straight.owners
    tensors = resumed.state_dict()["tensors"]
    for name, tensor in straight.state_dict()["tensors"].items():
        assert torch.equal(tensor, tensors[name]), name


def test_what_the_model_saves_goes_on_too(make_bert, train):
    """With the state of the handle for its counts; tensors are in both."""
    first, optimizer = made(make_bert)
    go(train, first, optimizer, range(4))
    resumed, _ = made(make_bert)
    resumed.model.load_state_dict(first.model.state_dict())
    tensors = resumed.state_dict()["tensors"]
    assert all(torch.equal(t, tensors[name]) for name, t in first.state_dict()["tensors"].items())


def test_a_load_drops_what_was_summed(make_bert):
    prilora, _ = made(make_bert)
    state = prilora.state_dict()
    prilora.model(input_ids=torch.arange(6)[None])
    assert any(layer.square_sum.any() for layer in prilora.layers.values())
    prilora.load_state_dict(state)
    assert not any(layer.square_sum.any() for layer in prilora.layers.values())


def test_a_state_is_a_copy(make_bert, train):
    prilora, optimizer = made(make_bert)
    state = prilora.state_dict()
    before = copy.deepcopy(state)
    go(train, prilora, optimizer, range(3))
    assert state["counts"] == before["counts"] and state["events"] == []
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in state["tensors"].items())
    assert PRILoRAConfig.from_dict(state["config"]) == prilora.config


QUERY = "bert.encoder.layer.0.attention.self.query"


def without(state, key):
    return {**state, "tensors": {name: tensor for name, tensor in state["tensors"].items() if name != key}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "format": 9}, "format must be 1, got 9; is it of another version?"),
        (
            lambda s: {key: value for key, value in s.items() if key != "events"},
            "state must have events, got none; pass what state_dict() gave",
        ),
        (lambda s: {**s, "ranks": {}}, f"ranks must have {QUERY}, got none; is it of another model?"),
        (
            lambda s: {**s, "ranks": {**s["ranks"], QUERY: 7}},
            f"{QUERY} must have rank 4, got 7; use the config of the state",
        ),
        (
            lambda s: {**s, "scales": {**s["scales"], QUERY: 2.0}},
            f"{QUERY} must have scale 4.0, got 2.0; use the config of the state",
        ),
        (
            lambda s: without(s, f"{QUERY}.mask"),
            f"tensors must have {QUERY}.mask, got none; is it of another model?",
        ),
        (
            lambda s: {**s, "tensors": {**s["tensors"], "classifier.weight": torch.zeros(3, 16)}},
            "classifier.weight must have shape (2, 16), got (3, 16); is it of another model?",
        ),
        (
            lambda s: {**s, "tensors": {**s["tensors"], "extra": torch.zeros(1)}},
            "tensors must be of this model, got extra; is it of another model?",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(make_bert, train, change, message):
    prilora, optimizer = made(make_bert)
    state = prilora.state_dict()
    go(train, prilora, optimizer, range(3))
    before = prilora.state_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(f'PRILoRA: load_state_dict: {message}')}$"):
        prilora.load_state_dict(change(state))
    after = prilora.state_dict()
    assert after["counts"] == before["counts"] and after["events"] == [3]
    assert all(torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items())
