"""topk_similarity and csls_topk of generated arguments: a right answer, or a refusal in words."""

import pytest
import torch
from generated import (
    FLOATS,
    OF_CALLS,
    SIZES,
    SIZES_AND_NONE,
    assert_gradients_near,
    check_generated,
    check_raw,
    drawn,
    in_float64,
    kinds_of,
    made_in,
    plain_values,
    raw_verdict,
    spoiled,
    verdict,
)

from fastkit._dispatch import unavailable
from fastkit.ops.topk_similarity import KERNELS, csls_topk, topk_similarity
from fastkit.reference import TopK
from fastkit.testing.topk_similarity import assert_chosen, expected_csls, expected_scores

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(unavailable("cpu", KERNELS) is not None, reason="there is no CPU kernel"),
]

METRICS = "dot", "dot", "cosine", "l2"


def topk_call(choose):
    dtype, n, m, D = choose(OF_CALLS), choose(SIZES_AND_NONE), choose(SIZES), choose(SIZES)
    call = {
        "queries": drawn(choose, n, D, dtype=dtype),
        "keys": drawn(choose, m, D, dtype=dtype),
        "k": choose(range(1, m + 1)),
        "metric": choose(METRICS),
        "key_bias": None,
    }
    if call["metric"] != "l2" and choose((False, True)):
        call["key_bias"] = drawn(choose, m, dtype=choose((dtype, arithmetic(dtype))))
    return topk_similarity, spoiled(choose, call)


def csls_call(choose):
    dtype, n, m, D, s = choose(OF_CALLS), choose(SIZES), choose(SIZES), choose(SIZES), choose(SIZES)
    sources = choose((False, True))
    call = {
        "queries": drawn(choose, n, D, dtype=dtype),
        "keys": drawn(choose, m, D, dtype=dtype),
        "k": choose(range(1, m + 1)),
        "sources": drawn(choose, s, D, dtype=dtype) if sources else None,
        "neighbors": choose(range(1, min(m, s if sources else n) + 1)),
    }
    return csls_topk, spoiled(choose, call)


def any_call(choose):
    return choose((topk_call, topk_call, csls_call))(choose)


def arithmetic(dtype):
    return torch.float32 if dtype.itemsize == 2 else dtype


def judge(op_and_call):
    op, call = op_and_call
    return verdict(op, call, check, also=("topk_similarity",))


def check(call, found, plain):
    arguments = plain_values(found.arguments, None)
    kinds, csls = kinds_of(call), "neighbors" in call
    assert_ordered(found.results, arguments, csls)
    if kinds & {"huge", "subnormal"}:
        return  # what overflows, and what is taken as zero before it is normalised
    tables = arguments["queries"], arguments["keys"]
    if csls:
        if kinds & {"nan", "inf"}:
            assert torch.equal(found.results["indices"] < 0, plain.results["indices"] < 0)
        else:
            expected = expected_csls(*tables, sources=arguments["sources"], neighbors=call["neighbors"])
            assert_chosen(TopK(**found.results), expected, call["k"], rounded=True)
    else:
        options = {"metric": call["metric"], "key_bias": arguments["key_bias"]}
        expected = expected_scores(*tables, **options)
        for answer in (found, plain):
            assert_chosen(TopK(**answer.results), expected, call["k"], least=call["metric"] == "l2")
    if found.gradients and kinds <= {"normal", "integers"}:
        exact = in_float64(csls_topk if csls else topk_similarity, found)
        tied = csls and (
            "integers" in kinds or {made.layout for made in made_in(call)} & {"expanded", "repeated"}
        )
        if torch.equal(exact.results["indices"], found.results["indices"]) and not tied:
            rows = torch.cat(tables).double().norm(dim=1)  # a cosine's gradient may be a small difference
            size = found.cotangents["values"].abs().sum() / rows.masked_fill(rows == 0, torch.inf).amin()
            assert_gradients_near(
                found, exact.gradients, float(size) if csls or call["metric"] == "cosine" else 0.0
            )


def assert_ordered(results, arguments, csls):
    """Whatever the numbers: the best first, each key once, NaN and -1 at the end."""
    values, indices = results["values"].detach(), results["indices"]
    if not values.numel():
        return
    assert torch.equal(values.isnan(), indices < 0)
    assert (indices >= -1).all() and (indices < len(arguments["keys"])).all()
    ordered = indices.sort(dim=1).values
    assert ((ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)).all()
    later, earlier = values[:, 1:], values[:, :-1]
    best_first = later >= earlier if arguments.get("metric") == "l2" else later <= earlier
    assert (best_first | later.isnan()).all()


def test_generated_calls():
    check_generated(any_call, judge, 100)


@pytest.mark.slow
def test_many_generated_calls():
    check_generated(any_call, judge, 10_000)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2, 3)])
    with pytest.raises(TypeError, match=r"^topk_similarity: keys must be dense, got a nested tensor"):
        topk_similarity(torch.ones(2, 3), nested, 1)


# The raw ops


def raw_call(choose):
    dtype, n, m, D = choose(FLOATS), choose(SIZES_AND_NONE), choose(SIZES), choose(SIZES)
    queries, keys = (drawn(choose, rows, D, dtype=dtype) for rows in (n, m))
    name = choose(("topk_similarity_fwd", "topk_similarity_fwd", "topk_similarity_both_fwd", "unit_rows"))
    if name == "unit_rows":
        call = {"x": queries}
    elif name == "topk_similarity_both_fwd":
        call = {"queries": queries, "keys": keys, "k": choose(range(1, max(1, min(n, m)) + 1))}
    else:
        bias = drawn(choose, m, dtype=dtype) if choose((False, True)) else None
        l2 = bias is None and choose((False, True))
        call = {"queries": queries, "keys": keys, "bias": bias, "k": choose(range(1, m + 1)), "l2": l2}
    call = spoiled(choose, call, faults=(0, 0, 1, 1, 2))
    call.pop("impl", None)
    return name, list(call.values())


@pytest.mark.native
def test_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 100)


@pytest.mark.native
@pytest.mark.slow
def test_many_raw_calls():
    check_raw(raw_call, lambda call: raw_verdict(*call), 2000)
