"""phrase_scores and select_phrases of generated arguments: a right answer, or a refusal in words."""

import math
from dataclasses import dataclass

import pytest
import torch
from generated import (
    OF_CALLS,
    OWN_MEMORY,
    SIZES,
    Made,
    arithmetic_of,
    assert_gradients_near,
    assert_same_finiteness,
    assert_within,
    check_generated,
    drawn,
    in_float64,
    kinds_of,
    plain_values,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops import phrase_scores, select_phrases
from fastkit.ops.phrase_scores import KERNELS
from fastkit.reference.phrase_scores import LEAST, unit_rows
from fastkit.testing.phrase_scores import ImageSet, expected_deflated, expected_scores

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

# Of rows that have no direction one is refused, of whatever else a call is made.
OF_ROWS = *["normal"] * 24, "integers", *["small", "large", "huge"] * 2, "subnormal", "zeros", "nan", "inf"
OF_SCATTER = *["scatter"] * 12, "-scatter", "normal", "zeros", "small", "large", "huge", "subnormal", "nan"
OF_PRIOR = *["normal"] * 12, "integers", "zeros", "small", "large", "huge", "subnormal", "nan", "inf"
WEIGHTS = *[10.0] * 8, *[80.0] * 8, 1, 0, 0.0, 0.5, 1e-30, 1e-300, 1e6, 1e30, 1e300, -1.0, -0.0, math.nan
NEXT = 0.0, 1e-8, 1e-6, 1e-4, LEAST, 1.01 * LEAST, 1e-2, 0.1
NAMES = "variance_weight", "orthogonality_weight", "prior_weight"
DIMS = {"candidates": 2, "centroid": 1, "scatter": 2, "chosen": 2, "prior": 1}


@dataclass(frozen=True)
class Rows(Made):
    """Some of which are others, or next to a multiple of the centroid, or zeros."""

    centroid: Made | None = None
    others: float = 0.0  # how many of them
    near: float = 0.0
    next: float = 0.0  # how far, in lengths of the centroid
    zeros: float = 0.0

    def _numbers(self, shape):
        x = super()._numbers(shape)
        if (
            len(shape) < 2
            or 0 in shape
            or self.centroid is None
            or self.centroid.shape[-1:] != self.shape[-1:]
        ):
            return x
        generator = torch.Generator().manual_seed(self.seed + 1)

        def some(share):
            return torch.rand(*shape[:-1], 1, generator=generator) < share

        at = torch.randint(shape[-2], (shape[-2],), generator=generator)
        x = torch.where(some(self.others), x[..., at, :], x)
        centroid = self.centroid._numbers([*self.centroid.shape]).nan_to_num(0, 0, 0)[..., : shape[-1]]
        if centroid.dim() > 1:
            centroid = centroid.unsqueeze(-2) if centroid.dim() == len(shape) - 1 else centroid[0]
        if centroid.dim() > 1 and len(shape) > 2 and len(centroid) != shape[0]:
            centroid = centroid[0]
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(centroid, dim=-1, keepdim=True)
        multiple = 0.1 + 0.8 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
        x = torch.where(some(self.near), multiple * (centroid + self.next * length * noise), x)
        return x.masked_fill(some(self.zeros), 0)


def rows_of(choose, *shape, centroid, dtype):
    made = drawn(choose, *shape, dtype=dtype, kind=OF_ROWS)
    return Rows(
        **vars(made),
        centroid=centroid,
        others=choose((0.0, 0.0, 0.3)),
        near=choose((0.0, 0.0, 0.3, 1.0)),
        next=choose(NEXT),
        zeros=choose((*[0.0] * 40, 0.3)),
    )


def set_of(choose, m, D):
    """Tensors of image sets, or of one; with dtypes and shapes that fit."""
    dtype, G = choose(OF_CALLS), choose((None, None, 1, 2, 3))
    wide = arithmetic_of(dtype)

    def front():
        return () if G is None or choose((False, True)) else (G,)

    centroid = drawn(choose, *front(), D, dtype=choose((dtype, wide)), kind=OF_ROWS)
    kind = choose(OF_SCATTER)
    symmetric = kind.endswith("scatter")
    fields = {"layout": OWN_MEMORY} if symmetric else {}
    return {
        "candidates": rows_of(choose, *front(), m, D, centroid=centroid, dtype=dtype),
        "centroid": centroid,
        "scatter": drawn(choose, *front(), D, D, dtype=choose((dtype, wide)), kind=kind, **fields),
        "prior": choose((None, drawn(choose, *front(), m, dtype=choose((dtype, wide)), kind=OF_PRIOR))),
    }, front


def weights_of(choose):
    weights = {name: choose(WEIGHTS) for name in NAMES if choose((False, True))}
    return weights | ({"prior_weight": -2.5} if choose(range(8)) == 7 else {})


def scores_call(choose):
    D = choose(SIZES)
    call, front = set_of(choose, choose(SIZES), D)
    chosen = None
    if choose((False, True, True)):
        dtype = choose((call["candidates"].dtype, arithmetic_of(call["candidates"].dtype)))
        rows = front(), choose(range(10)), D
        chosen = rows_of(choose, *rows[0], *rows[1:], centroid=call["centroid"], dtype=dtype)
    return phrase_scores, spoiled(choose, call | {"chosen": chosen} | weights_of(choose))


def selection_call(choose):
    m = choose(SIZES)
    call, _ = set_of(choose, m, choose(SIZES))
    few = range(1, min(m, 6) + 1)
    k = choose((*few, m, *few, 0, m + 1)) if choose(range(4)) == 3 else choose(few)
    kind = choose(("penalty", "deflate"))
    return select_phrases, spoiled(choose, call | {"k": k, "orthogonality": kind} | weights_of(choose))


def any_call(choose):
    return choose((scores_call, selection_call))(choose)


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, check if op is phrase_scores else check_selection)


def sets_in(call, found):
    """The image sets of an answered call, one after the other."""
    arguments = plain_values(found.arguments, None)
    tensors = {name: arguments.get(name) for name in DIMS}
    sets = [t.shape[0] for name, t in tensors.items() if t is not None and t.dim() > DIMS[name]]

    def one(name, g):
        t = tensors[name]
        return t[g] if t is not None and t.dim() > DIMS[name] else t

    return [ImageSet(*(one(name, g) for name in DIMS)) for g in range(sets[0] if sets else 1)]


def is_known(inputs):
    """Whether values can be told: u' scatter u of what is symmetric, and does not overflow float64."""
    scatter = inputs.scatter.double()
    of_float64 = inputs.candidates.dtype == torch.float64
    return torch.equal(scatter, scatter.mT) and not (of_float64 and bool((scatter.abs() > 1e300).any()))


def widened(expected, inputs, weights):
    """With what is lost below the least number of the arithmetic."""
    info = torch.finfo(arithmetic_of(inputs.candidates.dtype))
    least = info.smallest_normal * info.eps
    slack = 4 * (inputs.scatter.shape[-1] + 1) ** 2 * least
    return expected | {
        "variance": expected["variance"]._replace(budget=expected["variance"].budget + slack),
        "score": expected["score"]._replace(
            budget=expected["score"].budget + weights.get("variance_weight", 10.0) * slack + 4 * least
        ),
    }


def weights_in(call):
    return {name: float(call[name]) for name in NAMES if name in call}


def fits(weights, inputs):
    """Whether the arithmetic of the candidates has the weights; 0 times one it has not may be NaN."""
    most = torch.finfo(arithmetic_of(inputs.candidates.dtype)).max
    return all(abs(weight) <= most for weight in weights.values())


def check(call, found, plain):
    sets, weights = sets_in(call, found), weights_in(call)
    for g, inputs in enumerate(sets):
        expected = widened(expected_scores(inputs, weights), inputs, weights) if is_known(inputs) else None
        for answer in (found, plain):
            for name in ("variance", "increment", "score"):
                result = answer.results[name].reshape(len(sets), -1)[g]
                if name != "score":
                    assert not (result < 0).any(), name
                if name == "score" and not fits(weights, inputs):
                    continue
                if expected is not None:
                    assert_within(result, *expected[name], name)
                elif name == "increment" or not kinds_of(call) & {"huge"}:
                    other = plain.results[name].reshape(len(sets), -1)[g]
                    assert_same_finiteness(result, other, name)
    check_gradients(call, found, plain, sets, weights)


def check_gradients(call, found, plain, sets, weights):
    """They are the reference's; where nothing is next to a kink, or overflows, those in float64."""
    for path, gradient in found.gradients.items():
        other = plain.gradients[path]
        assert_same_finiteness(gradient, other, f"the gradient of {path}")
        finite = other.isfinite()
        most = other.masked_fill(~finite, 0).abs().amax() if other.numel() else 0.0
        near = (gradient - other).abs() <= 8 * torch.finfo(other.dtype).eps * most
        assert (near | ~finite).all(), f"the gradient of {path} is not that of the reference"
    if not found.gradients or not kinds_of(call) <= {"normal", "scatter"}:
        return
    if not all(1e-6 < weight < 1e6 for weight in weights.values()):
        return
    size, kinked = 0.0, False
    for inputs in sets:
        one, kink = steepness(ImageSet(*(None if t is None else t.double() for t in inputs)), weights)
        size, kinked = max(size, one), kinked or kink
    if not kinked:
        total = float(sum(g.abs().sum() for g in found.cotangents.values()))
        assert_gradients_near(found, in_float64(phrase_scores, found).gradients, size * total)


def steepness(inputs, weights):
    """How much a gradient may be made of what cancels, and whether one has a kink within rounding."""
    tables = [inputs.candidates, inputs.centroid.unsqueeze(0)]
    t, a = map(unit_rows, tables)
    length = torch.linalg.vector_norm(t - a, dim=1)
    far = length > LEAST
    u = ((t - a) / length.unsqueeze(1))[far]
    norm = torch.linalg.matrix_norm(inputs.scatter, 2)
    kinked = bool(((length / LEAST - 1).abs() < 0.05).any())
    kinked |= bool(((u @ inputs.scatter) * u).sum(1).abs().min() < 1e-2 * norm) if len(u) else False
    if inputs.chosen is not None and len(inputs.chosen):
        tables.append(inputs.chosen)
        f = unit_rows(inputs.chosen)
        products = torch.cat([(t @ f.T).flatten(), (f @ f.T).flatten()])
        kinked |= bool(products.abs().min() < 1e-2)
    shortest = min(float(torch.linalg.vector_norm(rows, dim=1).amin()) for rows in tables)
    of_variance = 4 * float(norm) / float(length[far].min() if len(u) else 1.0)
    size = (1 + weights.get("variance_weight", 10.0)) * of_variance
    size += (1 + weights.get("orthogonality_weight", 80.0)) * 4
    return size / shortest, kinked


def check_selection(call, found, plain):
    sets, weights = sets_in(call, found), weights_in(call)
    for answer in (found, plain):
        assert answer.results["indices"].dtype == torch.int64
        assert not any(t.requires_grad for t in answer.results.values())
        for g, inputs in enumerate(sets):
            indices, scores, variances = (t.reshape(len(sets), -1)[g] for t in answer.results.values())
            picks, m = indices.tolist(), inputs.candidates.shape[0]
            assert len({*picks}) == len(picks) == call["k"] and all(0 <= i < m for i in picks), picks
            assert not (variances < 0).any()
            if is_known(inputs) and fits(weights, inputs):
                follow(picks, scores, variances, inputs, weights, call["orthogonality"])


def follow(picks, scores, variances, inputs, weights, kind):
    """Each pick is the best beside those before it, as far as budgets can tell."""
    norm = torch.linalg.matrix_norm(inputs.scatter.double(), 2)
    left = torch.ones(inputs.candidates.shape[0], dtype=torch.bool)
    for j, pick in enumerate(picks):
        if kind == "penalty":
            chosen = inputs.candidates[picks[:j]]
            expected = expected_scores(inputs._replace(chosen=chosen), weights)
        else:
            expected = expected_deflated(inputs, picks[:j], weights)
        decided = kind == "penalty" or bool(expected["variance"].budget[pick] < norm)
        expected = widened(expected, inputs, weights)
        for name, got in (("score", scores[j]), ("variance", variances[j])):
            value, budget = (t[pick : pick + 1] for t in expected[name])
            assert_within(got.reshape(1), value, budget, f"{name} of pick {j}")
        value, budget = expected["score"]
        least = torch.finfo(scores.dtype)
        if not (value.abs() + budget < least.max / 2).all():
            return  # what overflows is as good as what overflows more
        better = left & (value - budget > value[pick] + budget[pick])
        assert not better.any(), f"{better.nonzero().flatten().tolist()} are better than {pick}, pick {j}"
        left[pick] = False
        if not decided and norm > 0:
            return  # rounding may have taken its direction for none


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)
