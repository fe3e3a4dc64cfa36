"""Options and parameters that MTAdam refuses, in words."""

import math
import re

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

pytestmark = pytest.mark.native

STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}


def refused(error, message, call, *args, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(*args, **options)


OPTIONS = [
    ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got str"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one, got shape (2,)"),
    ({"betas": (1.0, 0.9, 0.9)}, ValueError, "betas[0] must be in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1, 0.9)}, ValueError, "betas[1] must be in [0, 1), got -0.1"),
    ({"betas": (0.9, 0.9, 1.0)}, ValueError, "betas[2] must be in [0, 1), got 1.0"),
    ({"betas": (0.9, 0.9, -0.5)}, ValueError, "betas[2] must be in [0, 1), got -0.5"),
    ({"betas": (0.9, 0.9, math.nan)}, ValueError, "betas[2] must be in [0, 1), got nan"),
    (
        {"betas": (0.9, 0.999)},
        ValueError,
        "betas must be three numbers: of the two moments, and of the norms, got (0.9, 0.999)",
    ),
    ({"eps": -1e-8}, ValueError, "eps must be finite and not negative, got -1e-08"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite and not negative, got inf"),
    ({"alive_eps": -1.0}, ValueError, "alive_eps must be finite and not negative, got -1.0"),
    ({"max_scale": 0.0}, ValueError, "max_scale must be positive or None, got 0"),
    ({"max_scale": -2.0}, ValueError, "max_scale must be finite and not negative, got -2.0"),
    ({"anchor": -1}, ValueError, "anchor must be the index or the name of a term, got -1"),
    ({"anchor": 1.5}, ValueError, "anchor must be the index or the name of a term, got 1.5"),
    ({"anchor": 2, "terms": 2}, ValueError, "anchor must be one of the terms 0, 1, got 2"),
    ({"anchor": "c", "terms": ["a", "b"]}, ValueError, "anchor must be one of the terms a, b, got 'c'"),
    ({"ranks": [1.0], "terms": 2}, ValueError, "ranks must be one for each of the 2 terms, got 1"),
    ({"ranks": [1.0, -1.0], "terms": 2}, ValueError, "ranks[1] must be finite and not negative, got -1.0"),
    (
        {"ranks": torch.ones(2), "terms": 2},
        TypeError,
        "ranks must be a list of numbers, got Tensor; pass ranks.tolist()",
    ),
    ({"terms": 0}, ValueError, "terms must be how many there are or a list of their names, got 0"),
    ({"terms": "ab"}, ValueError, "terms must be how many there are or a list of their names, got 'ab'"),
    ({"terms": []}, ValueError, "terms must be one or more different names, got []"),
    ({"terms": ["a", "a"]}, ValueError, "terms must be one or more different names, got ['a', 'a']"),
    ({"terms": ["a", ""]}, ValueError, "terms must be one or more different names, got ['a', '']"),
    ({"mode": "fast"}, ValueError, "mode must be batched or streaming, got 'fast'"),
    (
        {"on_nonfinite": "skip"},
        ValueError,
        "on_nonfinite must be skip_step, skip_term or propagate, got 'skip'",
    ),
    (
        {"mode": "streaming"},
        ValueError,
        "on_nonfinite must be skip_term or propagate in streaming mode, which cannot undo the terms of a"
        " step; pass on_nonfinite='skip_term'",
    ),
    (
        {**STREAMING, "terms": 2, "anchor": 1},
        ValueError,
        "streaming mode takes the first term as the anchor, got 1; list that first",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(options, error, message):
    refused(error, f"MTAdam: {message}", MTAdam, [nn.Parameter(torch.ones(2))], **options)


PER_GROUP = [case for case in OPTIONS if not {"mode", "on_nonfinite", "terms"} & set(case[0])]


@pytest.mark.parametrize(("options", "error", "message"), PER_GROUP, ids=lambda value: str(value)[:40])
def test_options_of_a_group_that_is_added(options, error, message):
    optimizer = MTAdam([nn.Parameter(torch.ones(2))])
    group = {"params": [nn.Parameter(torch.ones(3))], **options}
    refused(error, f"MTAdam: {message}", optimizer.add_param_group, group)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": group["params"]})


def test_other_terms_in_a_group_that_is_added():
    optimizer = MTAdam([nn.Parameter(torch.ones(2))], terms=["a", "b"])
    group = {"params": [nn.Parameter(torch.ones(3))], "terms": ["a", "c"]}
    message = "MTAdam: terms must be those of the other groups, ('a', 'b'), got ['a', 'c']"
    refused(ValueError, message, optimizer.add_param_group, group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.ones(2, dtype=torch.complex64),
            "must be floating point and real, got torch.complex64",
        ),
        (
            lambda: torch.eye(2).to_sparse(),
            "must be dense, got torch.sparse_coo; of torch.nn.Embedding, leave sparse=True out",
        ),
    ],
    ids=["complex", "sparse"],
)
def test_parameters(make, message):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(make())]
    refused(TypeError, f"MTAdam: parameter 1 of the group {message}", MTAdam, params)


def test_integers_are_no_parameters():
    param = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    refused(
        TypeError,
        "MTAdam: parameter 0 of the group must be floating point and real, got torch.int64",
        MTAdam,
        [param],
    )
