"""What prune_rows_ does with any row: exactly so many of the least scores go, the first of equal ones."""

import math

import pytest
import torch

from fastkit import ops
from fastkit.ops.lora_linear import KERNELS as KERNELS  # for the fixture

hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.native

NAN, INF = float("nan"), float("inf")
VALUES = 0.0, -0.0, 1.0, -1.0, 1.5, 2.0, -3.0, 1e-42, 3e38, INF, -INF, NAN
NORMS = 0.0, 1.0, 2.0, 1e-3, 1e3, 3e38
PAIRS = strategies.lists(
    strategies.tuples(strategies.sampled_from(VALUES), strategies.sampled_from(NORMS)),
    min_size=1,
    max_size=70,
)


@hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(PAIRS, strategies.floats(0, 1, exclude_max=True))
def test_what_goes_scores_no_more_than_what_stays(native, pairs, ratio):
    entries, norm = torch.tensor(pairs).T.contiguous()
    a = entries[None].clone()
    kept = ops.prune_rows_(a, norm, ratio, impl=native)[0]
    assert int((~kept).sum()) == math.floor(ratio * len(pairs))
    assert torch.equal(a[0].view(torch.int32)[kept], entries.view(torch.int32)[kept])
    assert not a[0].view(torch.int32)[~kept].any()
    score = (entries.abs() * norm).double().clamp(max=1e300).nan_to_num(nan=INF)  # NaN above infinity
    gone, stay = score[~kept].tolist(), score[kept].tolist()
    assert max(gone, default=0.0) <= min(stay, default=INF)
    equal = kept[score == min(stay, default=INF)].tolist()
    assert equal == sorted(equal)  # the first of them went
