"""PRILoRAConfig: what it refuses, which steps are events, and that it survives JSON."""

import dataclasses
import json
import math
import re

import pytest

from fastkit.methods.prilora import PRILoRAConfig

pytestmark = pytest.mark.native


def test_defaults():
    config = PRILoRAConfig()
    assert (config.rank_start, config.rank_final, config.mean_rank) == (4, 12, 8)
    assert (config.ratio, config.interval, config.mode, config.group) == (0.5, 40, "soft", "row")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [40, 80, 120]),
        ({"start": 50}, [80, 120]),
        ({"start": 1}, [40, 80, 120]),
        ({"stop": 119}, [40, 80]),
        ({"interval": 60}, [60, 120]),
        ({"ratio": 0}, []),
    ],
)
def test_events(options, expected):
    config = PRILoRAConfig(**options)
    assert [step for step in range(1, 121) if config.is_event(step)] == expected


def test_the_last_event():
    assert PRILoRAConfig().last_event is None
    assert PRILoRAConfig(stop=119).last_event == 80
    assert PRILoRAConfig(stop=80).last_event == 80


@pytest.mark.parametrize(
    ("scaling", "scales"), [("lora", [4, 2]), ("constant", [2, 2]), ("rslora", [8, 4 * math.sqrt(2)])]
)
def test_scales(scaling, scales):
    config = PRILoRAConfig(scaling=scaling, alpha=16)
    found = [config.alpha_of(rank) / rank for rank in (4, 8)]
    assert found == pytest.approx(scales, rel=1e-15)


@pytest.mark.parametrize(
    "config",
    [
        PRILoRAConfig(),
        PRILoRAConfig(target_modules=("query", "value"), ranks={"query": 3}, modules_to_save=["classifier"]),
        PRILoRAConfig(
            target_modules=r".*\.query", mode="final", stop=80, reset_state="mv", scaling="constant"
        ),
    ],
)
def test_it_survives_json(config):
    assert PRILoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_option_is_refused_by_name():
    message = "got prune_ratio, step; is it of a later version?"
    with pytest.raises(ValueError, match=re.escape(message)):
        PRILoRAConfig.from_dict({"ratio": 0.3, "prune_ratio": 0.5, "step": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_start": 0}, "rank_start must be at least 1, got 0"),
        ({"rank_final": -1}, "rank_final must be at least 1, got -1"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"start": 0}, "start must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": math.inf}, "alpha must be positive and finite, got inf"),
        ({"ratio": 1.0}, "ratio must be in [0, 1), got 1.0"),
        ({"ratio": math.nan}, "ratio must be in [0, 1), got nan"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"beta": 1}, "beta must be in [0, 1), got 1"),
        ({"rounding": "up"}, "rounding must be one of 'nearest', 'floor', 'budget', got 'up'"),
        ({"scaling": "dora"}, "scaling must be one of 'lora', 'constant', 'rslora', got 'dora'"),
        ({"mode": "firm"}, "mode must be one of 'soft', 'hard', 'final', got 'firm'"),
        ({"group": "n:m"}, "group must be one of 'row', 'matrix', got 'n:m'"),
        ({"importance": "sum"}, "importance must be one of 'input', 'magnitude', 'random', got 'sum'"),
        ({"reset_state": "v"}, "reset_state must be one of None, 'm', 'mv', got 'v'"),
        ({"ranks": {"query": 0}}, "ranks['query'] must be at least 1, got 0"),
        (
            {"target_modules": "(query"},
            "target_modules must be a regular expression or a list of names, got '(query' (missing ),"
            " unterminated subpattern at position 0); pass a list for names",
        ),
        (
            {"stop": 39},
            "stop must leave an event, got stop=39 with start=40 and interval=40; raise it, or pass ratio=0",
        ),
        (
            {"mode": "final"},
            'stop must be given with mode="final", which keeps what the last event zeroed at zero; pass the'
            " number of steps up to which there are events",
        ),
    ],
)
def test_values_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'PRILoRAConfig: {message}')}$"):
        PRILoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_start": 4.0}, "rank_start must be an integer, got 4.0"),
        ({"interval": True}, "interval must be an integer, got True"),
        ({"ratio": "0.5"}, "ratio must be a number, got '0.5'"),
        ({"ranks": [4]}, "ranks must be a mapping of names to ranks, got list"),
        ({"ranks": {3: 4}}, "ranks must have names of modules as keys, got int"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names, got a str; pass"),
        ({"target_modules": [1]}, "target_modules must be a list of names, got [1]"),
    ],
)
def test_types_refused(options, message):
    with pytest.raises(TypeError, match=f"^{re.escape(f'PRILoRAConfig: {message}')}"):
        PRILoRAConfig(**options)
