"""Calls of every CPU kernel, large enough for four threads, which test_threads.py and its scripts run."""

import os
import signal
import threading
import time
import traceback
from typing import NamedTuple

import torch

from fastkit import ops
from fastkit.methods.word_translation.vector_lines import format_rows, parse_lines
from fastkit.ops.lora_linear import low_rank
from fastkit.testing import (
    LinearSize,
    Size,
    icp,
    iir_scan,
    linear_cross_entropy,
    lora_linear,
    moments,
    mtadam,
    multihead_loss,
    phrase_scores,
)
from fastkit.testing.procrustes import log_spaced, with_spectrum
from fastkit.testing.topk_similarity import make_tables


class Call(NamedTuple):
    """``run(*make(seed))`` is a dict of tensors; it writes to none of its arguments.

    ``sums`` are the results that another number of threads may round otherwise, and for these
    ``expected(*make(seed))`` has values and budgets.
    """

    make: object
    run: object
    sums: tuple = ()
    expected: object = None


def scan(size, *, filters=None, radius=0.9, dtype=torch.float32, lengths=None, channels_last=False):
    """Results and gradients of a scan from a state; with lengths, of packed sequences."""

    def make(seed):
        options = {"filters": filters, "radius": radius, "dtype": dtype, "seed": seed}
        if lengths is None:
            x, a, b, gy, offsets = *iir_scan.make_inputs(size, **options), None
        else:
            x, a, b, gy, offsets = iir_scan.make_packed_inputs(lengths, size.C, size.chunk, **options)
        state, gend = (iir_scan.make_state(x, a, offsets, seed=seed + i) for i in (1, 2))
        if channels_last:
            x, gy = x.mT.contiguous().mT, gy.mT.contiguous().mT
        return x, a, b, *state, gy, *gend, offsets

    def run(x, a, b, state_y, state_x, gy, gend_y, gend_x, offsets):
        leaves = [t.detach().requires_grad_() for t in (x, a, b, state_y, state_x)]
        state = ops.IIRState(*leaves[3:])
        y, end = ops.iir_scan_with_state(*leaves[:3], state, chunk=size.chunk, cu_seqlens=offsets, impl="cpu")
        gradients = torch.autograd.grad((y, *end), leaves, (gy, gend_y, gend_x))
        names = "y", "end_y", "end_x", "gx", "ga", "gb", "gstate_y", "gstate_x"
        return dict(zip(names, (y.detach(), *(t.detach() for t in end), *gradients), strict=True))

    return Call(make, run)


def make_cascade(seed):
    generator = torch.Generator().manual_seed(seed)
    sos = [[0.5, 0.2, 0.1, 1, -0.3, 0.2], [0.3, 0.1, 0, 1, 0.4, 0.1], [1, 0, 0, 1, 0.1, 0]]
    return torch.randn(2, 17, 4000, generator=generator), torch.tensor(sos)


def run_cascade(x, sos):
    x = x.detach().requires_grad_()
    y = ops.sosfilt(x, sos, impl="cpu")
    return {"y": y.detach(), "gx": torch.autograd.grad(y, x, y.detach())[0]}


def make_step(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(300, 500, *taps, generator=generator) for taps in ((), (2,), (3,), (2,), (2,))]


def run_step(x, a, b, state_y, state_x):
    y, end = ops.iir_step(x, a, b, ops.IIRState(state_y, state_x), impl="cpu")
    return {"y": y, **end._asdict()}


LINEAR = LinearSize(2001, 100, 97, 9)


def make_addition(seed):
    inputs = lora_linear.make_inputs(LINEAR, bias=False, seed=seed)
    return inputs._replace(weight=torch.zeros_like(inputs.weight))


def run_addition(x, weight, bias, a, b, mask, lora_x, gy):
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y, square_sum = low_rank(*leaves, lora_linear.SCALE, mask=mask, stats=True)
    gradients = torch.autograd.grad(y, leaves, gy)
    named = zip(("gx", "glora_a", "glora_b"), gradients, strict=True)
    return {"y": y.detach(), "square_sum": square_sum, **dict(named)}


def run_linear(x, weight, bias, a, b, mask, lora_x, gy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, a, b)]
    y, square_sum = ops.lora_linear_with_stats(*leaves, lora_linear.SCALE, mask=mask, impl="cpu")
    gradients = torch.autograd.grad(y, leaves, gy)
    named = zip(("gx", "gweight", "gbias", "glora_a", "glora_b"), gradients, strict=True)
    return {"y": y.detach(), "square_sum": square_sum, **dict(named)}


def expected_linear(*inputs):
    return lora_linear.expected_results(lora_linear.Inputs(*inputs))


def of_loss(N, V, D, reduction, **options):
    """A loss and its gradients, formed in forward where it is one number; and lse."""
    flags = dict.fromkeys(("linear_bias", "weight", "token_weight", "ignored"), bool(options))
    options["reduction"] = reduction

    def make(seed):
        return linear_cross_entropy.make_inputs(N, V, D, reduction=reduction, seed=seed, **flags)

    def run(x, linear_weight, target, linear_bias, weight, token_weight, g_loss, g_lse):
        leaves = [t.detach().requires_grad_() for t in (x, linear_weight, linear_bias) if t is not None]
        call = {"linear_bias": leaves[2] if len(leaves) > 2 else None, "weight": weight, "impl": "cpu"}
        call |= {"token_weight": token_weight, **options}
        loss = ops.linear_cross_entropy(*leaves[:2], target, **call)
        gradients = torch.autograd.grad(loss, leaves, g_loss)
        lse = ops.linear_cross_entropy_with_lse(x, linear_weight, target, **call).lse
        named = zip(("ginput", "glinear_weight", "glinear_bias"), gradients, strict=False)
        return {"loss": loss.detach(), "lse": lse.detach(), **dict(named)}

    names = "loss", "lse", "ginput", "glinear_weight", *(["glinear_bias"] if flags["linear_bias"] else [])

    def expected(*inputs):
        inputs = linear_cross_entropy.Inputs(*inputs)
        return linear_cross_entropy.expected_results(inputs, options, with_lse=False)

    return Call(make, run, names, expected)  # with products of PyTorch


def of_heads(B, H, C, D, problem, **options):
    """The losses of many heads and their gradients, of which some heads and rows are left out."""
    options |= {"problem": problem}
    flags = {"inactive": True, "ignored": problem == "single_label", "class_weight": problem != "regression"}

    def run(x, weight, bias, target, active, class_weight, g_loss):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        found = ops.multihead_loss(
            *leaves, target, active=active, class_weight=class_weight, impl="cpu", **options
        )
        named = zip(("gx", "gweight", "gbias"), torch.autograd.grad(found.loss, leaves, g_loss), strict=True)
        return {**{name: t.detach() for name, t in found._asdict().items()}, **dict(named)}

    return Call(
        lambda seed: multihead_loss.make_inputs(B, H, C, D, problem=problem, seed=seed, **flags),
        run,
        ("loss", "correct", "gx", "gweight", "gbias"),  # with products of PyTorch
        lambda *inputs: multihead_loss.expected_results(multihead_loss.Inputs(*inputs), options),
    )


def of_pairs(H, C, D, **options):
    """The penalty of all pairs of heads, and its gradient."""

    def run(weight, active, g):
        weight = weight.detach().requires_grad_()
        penalty = ops.orthogonality_penalty(weight, active=active, impl="cpu", **options)
        return {"penalty": penalty.detach(), "gweight": torch.autograd.grad(penalty, weight, g)[0]}

    return Call(
        lambda seed: multihead_loss.make_heads(H, C, D, inactive=True, seed=seed),
        run,
        ("penalty", "gweight"),  # with products of PyTorch
        lambda *heads: multihead_loss.expected_penalty(multihead_loss.Heads(*heads), options)[0],
    )


def make_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(R, 1024, generator=generator) for R in (64, 3, 130)]
    return matrices, [torch.rand(1024, generator=generator) for _ in matrices]


def run_pruning(matrices, norms):
    pruned = [t.clone() for t in matrices]
    masks = ops.prune_rows_grouped_(pruned, norms, 0.3, impl="cpu")
    return {f"{i}": t for i, t in enumerate((*pruned, *masks))}


def noise(*shape):
    return lambda seed: [torch.randn(shape, generator=torch.Generator().manual_seed(seed))]


def of_moments(rows, columns):
    size = moments.RowsSize(rows, columns)

    def run(x, weights, *_):
        return ops.moments(x, weights=weights, impl="cpu")._asdict()

    return Call(
        lambda seed: moments.make_inputs(size, weights="some", seed=seed),
        run,
        ("count", "mean", "scatter"),
        lambda *inputs: moments.expected_results(moments.Inputs(*inputs)),
    )


def nearest(n, m, D, *metrics):
    def run(queries, keys, bias):
        results = {}
        for metric in metrics:
            found = ops.topk_similarity(
                queries, keys, 7, metric=metric, key_bias=bias if metric == "dot" else None, impl="cpu"
            )
            results |= {f"{metric} {name}": t for name, t in found._asdict().items()}
        return results

    return Call(lambda seed: make_tables(n, m, D, repeated=True, seed=seed), run)


def run_csls(queries, keys, bias):
    return ops.csls_topk(queries, keys, 7, impl="cpu")._asdict()


def image_sets(G, m, D, S):
    """In turn, each by all threads, or where there are enough of them, each by one."""
    options = {"prior": True, "repeated": True}

    def make(seed):
        sets = [phrase_scores.make_image_set(m, D, S, seed=seed + i, **options) for i in range(G)]
        return phrase_scores.stacked(sets)

    return make


def run_scores(candidates, centroid, scatter, chosen, prior):
    found = ops.phrase_scores(candidates, centroid, scatter, chosen, prior=prior, impl="cpu")
    return found._asdict()


def run_selections(candidates, centroid, scatter, chosen, prior):
    results = {}
    for kind in ("penalty", "deflate"):
        found = ops.select_phrases(
            candidates, scatter, 5, centroid=centroid, prior=prior, orthogonality=kind, impl="cpu"
        )
        results |= {f"{kind} {name}": t for name, t in found._asdict().items()}
    return results


def factors(count, size, dtype):
    def make(seed):
        spectra = [log_spaced(size, 100.0)] * count
        return [torch.stack([with_spectrum(s, dtype=dtype, seed=seed + i) for i, s in enumerate(spectra)])]

    return Call(make, lambda m: {"factor": ops.polar(m, impl="cpu")})


def epoch(restarts):
    def run(*inputs):
        return ops.icp_epoch(*inputs, epoch=1, batch_size=40, impl="cpu")._asdict()

    return Call(lambda seed: icp.make_inputs(300, 280, 20, restarts=restarts, seed=seed), run)


def make_parameters(seed):
    shapes = [(5,)] * 9 + [(30_000,), (3000,), (9000,), (3, 2051)]
    return [mtadam.make_inputs(shapes, 3, steps=1, amsgrad=True, seed=seed)]


def run_step_of_adam(inputs):
    inputs = mtadam.cloned(inputs)
    *tensors, maxima = inputs
    sums = ops.mtadam_square_sums(inputs.grads, len(inputs.params), impl="cpu")
    ops.mtadam_update_(*tensors, max_exp_avg_sqs=maxima, lr=0.1, impl="cpu")
    return {"square_sums": sums, **inputs.results()}


def run_text(table):
    text = b"".join(b"w %b\n" % row for row in format_rows(table))
    rows = torch.zeros_like(table)
    return {"lines": parse_lines(bytearray(text), 0, len(text), rows), "rows": rows}


CALLS = {
    "scan of rows": scan(Size(4, 33, 1000, 128)),
    "scan of channels": scan(Size(4, 33, 1000, 128), channels_last=True),
    "scan along time": scan(Size(1, 2, 70_000, None)),
    "scan of short chunks": scan(Size(2, 17, 4000, 4)),
    "scan of samples": scan(Size(1, 33, 4000, 1), radius=0.3),  # changing poles: larger ones grow
    "scan of a bank": scan(Size(2, 17, 2000, 128), filters=3),
    "scan of packed sequences": scan(Size(1, 50, 2636, 128), lengths=[1500, 0, 7, 1000, 129]),
    "scan in bfloat16": scan(Size(4, 33, 1000, None), dtype=torch.bfloat16),
    "sosfilt": Call(make_cascade, run_cascade),
    "iir_step": Call(make_step, run_step),
    "low_rank": Call(make_addition, run_addition, ("square_sum", "glora_a", "glora_b"), expected_linear),
    "lora_linear": Call(
        lambda seed: lora_linear.make_inputs(LINEAR, seed=seed),
        run_linear,
        ("y", "square_sum", "gx", "gweight", "gbias", "glora_a", "glora_b"),  # with products of PyTorch
        expected_linear,
    ),
    "linear_cross_entropy": of_loss(300, 1500, 40, "mean"),
    "linear_cross_entropy of each token": of_loss(
        400, 900, 30, "none", label_smoothing=0.1, softcap=5.0, z_loss=0.01
    ),
    "multihead_loss": of_heads(64, 90, 17, 40, "single_label", label_smoothing=0.1),
    "multihead_loss of several labels": of_heads(40, 120, 5, 30, "multi_label"),
    "orthogonality_penalty": of_pairs(300, 3, 40, kind="cos_abs", center_classes=True),
    "prune_rows_": Call(make_matrices, run_pruning),
    "column_norms": Call(noise(1500, 90), lambda x: {"norms": ops.column_norms(x, impl="cpu")}),
    "moments of many rows": of_moments(3000, 40),
    "moments of few rows": of_moments(100, 300),
    "topk_similarity": nearest(300, 200, 20, "dot", "l2"),
    "topk_similarity of few queries": nearest(5, 6600, 40, "cosine"),
    "csls_topk": Call(lambda seed: make_tables(300, 250, 20, repeated=True, seed=seed), run_csls),
    "phrase_scores of one set": Call(image_sets(1, 1200, 70, 6), run_scores),
    "phrase_scores of many sets": Call(image_sets(6, 150, 40, 3), run_scores),
    "select_phrases": Call(image_sets(1, 1100, 50, None), run_selections),
    "select_phrases of many sets": Call(image_sets(6, 120, 30, None), run_selections),
    "polar of one": factors(1, 90, torch.float32),
    "polar of many": factors(8, 20, torch.float64),
    "icp_epoch of one": epoch(1),
    "icp_epoch of many": epoch(5),
    "mtadam_update_": Call(make_parameters, run_step_of_adam),
    "text of vectors": Call(noise(400, 50), run_text),
}


def assert_same(found, expected, what=""):
    assert found.keys() == expected.keys(), what
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), f"{what}: {name}"


# Threads and processes


def at_once(*functions):
    """Runs each on a thread of its own, which all begin together; the first error is raised."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(function):
        try:
            barrier.wait(60)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def forked(function):
    """The id of a child that calls it, and exits with 0 unless it raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child, seconds):
    """The exit code of a child; None if it has not ended after so long, and then it is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
