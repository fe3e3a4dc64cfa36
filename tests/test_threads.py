"""The number of threads of a call, calls from several threads at once, and calls in forked processes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from threaded_calls import CALLS, assert_same, at_once

from fastkit import ops
from fastkit._threads import threads
from fastkit.testing import assert_matches_reference

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("native")]

THREADS = 4  # at once
FEW, MANY = 2, 20  # rounds


# Their number


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_is_no_matter(name):
    """No bit depends on it, but of sums that are cut by it, which are within their budgets."""
    call = CALLS[name]
    given = call.make(0)
    expected = call.expected(*given) if call.sums else {}
    with threads(1):
        first = call.run(*given)
    for count in (2, 3, 4, 1):
        with threads(count):
            found = call.run(*given)
            assert torch.get_num_threads() == count
        for result in call.sums:
            assert_matches_reference(found.pop(result), *expected[result], name=result)
        assert_same(found, {result: first[result] for result in found}, f"{count} threads")


# Calls at once


@pytest.fixture(params=[1, 2], ids=["one-thread-each", "two-threads-each"])
def count(request):
    """Of the threads of a call."""
    with threads(request.param):
        yield request.param


def rounds(number, which, given, expected):
    """Calls of every op, another one first on each thread, which have the bits of ``expected``."""
    names = list(expected)
    names = names[6 * which :] + names[: 6 * which]
    for _ in range(number):
        for name in names:
            assert_same(CALLS[name].run(*given[name]), expected[name], f"thread {which}, {name}")


def made(seed):
    given = {name: call.make(seed) for name, call in CALLS.items()}
    return given, {name: CALLS[name].run(*given[name]) for name in CALLS}


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_calls_of_several_threads_at_once(count, number):
    def run(which, given, expected):
        assert torch.get_num_threads() == count
        rounds(number, which, given, expected)

    at_once(*(partial(run, which, *made(which)) for which in range(THREADS)))


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_calls_that_read_the_same_tensors_at_once(count, number):
    given, expected = made(0)
    at_once(*(partial(rounds, number, which, given, expected) for which in range(2)))


def test_errors_on_one_thread_leave_others_alone(count):
    """Of kernels and of bindings, before threads share the work and after."""
    x, weights = torch.ones(3000, 40), torch.ones(3000)
    weights[-1] = -1
    signal, filters = torch.ones(1, 50, 9), torch.zeros(1, 1, 2, 2)
    offsets = torch.tensor([0, 9, 5])
    norm = torch.full((40,), torch.nan)
    target = torch.full((3000,), 3000)
    heads = torch.ones(2, 3, 40)
    raw = torch.ops.fastkit
    refused = {
        "weights must be finite and not negative": lambda: ops.moments(x, weights=weights, impl="cpu"),
        "cu_seqlens must not decrease": lambda: ops.iir_scan(signal, filters, cu_seqlens=offsets, impl="cpu"),
        "input_norm must be finite": lambda: ops.prune_rows_(x.clone(), norm, 0.5, impl="cpu"),
        "linear_cross_entropy: target must be in": lambda: ops.linear_cross_entropy(x, x, target, impl="cpu"),
        "multihead_loss: target must be in": lambda: ops.multihead_loss(
            x, heads, heads[..., 0], target, impl="cpu"
        ),
        "k must be between 1 and": lambda: raw.topk_similarity_fwd(x, x, None, 3001, False),
        "select_phrases: k must be from 0 to": lambda: raw.select_phrases_fwd(
            heads, torch.ones(1, 40), torch.eye(40)[None], None, 4, False, 10.0, 80.0, 8.0
        ),
        "text must be on the CPU": lambda: raw.parse_vectors_(x, x),
    }

    def refuse():
        for _ in range(20):
            for words, call in refused.items():
                with pytest.raises(RuntimeError, match=words):
                    call()

    given, expected = made(0)
    at_once(refuse, refuse, *(partial(rounds, FEW, which, given, expected) for which in range(2)))


# Fresh processes


@pytest.fixture
def run_calls(run_script):
    """Runs a script that may import threaded_calls; CUDA, which nobody may use after a fork, is not there."""

    def run_calls(script):
        done = run_script(script, PYTHONPATH=str(Path(__file__).parent), CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_calls


FIRST = """if True:
    import importlib, json, threading
    from functools import partial
    import torch

    barrier, results, errors = threading.Barrier(4), [None] * 4, []

    def first(which, module):
        try:
            barrier.wait(60)
            importlib.import_module(module)
            import threaded_calls
            names = list(threaded_calls.CALLS)
            names = names[6 * which :] + names[: 6 * which]
            given = {name: threaded_calls.CALLS[name].make(0) for name in names}
            barrier.wait(60)
            results[which] = {name: threaded_calls.CALLS[name].run(*given[name]) for name in names}
        except BaseException as error:
            errors.append(repr(error))
            barrier.abort()

    modules = "fastkit.ops", "fastkit.nn", "fastkit.optim", "fastkit.methods.word_translation"
    started = [threading.Thread(target=first, args=arguments) for arguments in enumerate(modules)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not errors, errors

    from threaded_calls import CALLS, assert_same

    for name, call in CALLS.items():
        alone = call.run(*call.make(0))
        for found in results:
            assert_same(found[name], alone, name)
    print(json.dumps(len(results)))
"""


def test_the_first_calls_of_a_process_may_come_at_once(run_calls):
    """And imports before them, of which each thread begins with another module."""
    assert run_calls(FIRST) == 4


FIRST_TRITON = """if True:
    import importlib, json
    from functools import partial
    import torch
    from threaded_calls import at_once

    stems = (
        "iir_scan", "linear_cross_entropy", "lora_linear", "moments", "multihead_loss", "phrase_scores",
        "topk_similarity",
    )
    at_once(*(partial(importlib.import_module, f"fastkit.triton.{stem}") for stem in stems))
    print(json.dumps([importlib.import_module(f"fastkit.triton.{stem}").__name__ for stem in stems]))
"""


def test_the_first_kernels_of_triton_may_come_at_once(run_calls):
    """They are imported by the calls that need them."""
    pytest.importorskip("triton", reason="needs triton")
    assert len(run_calls(FIRST_TRITON)) == 7


FORKED = """if True:
    import json
    import torch
    from threaded_calls import CALLS, assert_same, ended, forked

    torch.set_num_threads(1)  # inputs are made by PyTorch's operations, which have threads too
    given = {name: call.make(0) for name, call in CALLS.items()}

    def run(count):
        torch.set_num_threads(count)
        return {name: call.run(*given[name]) for name, call in CALLS.items()}

    def same(count, expected):
        for name, found in run(count).items():
            assert_same(found, expected[name], name)
"""

ONE_THREAD = """
    alone = run(1)
    run(2)  # the child will have none of these threads
    print(json.dumps(ended(forked(lambda: same(1, alone)), 60)))
"""


def test_a_fork_with_one_thread_has_the_same_bits(run_calls):
    """Whatever its parent has done before: what worker processes of a DataLoader are."""
    assert run_calls(FORKED + ONE_THREAD) == 0


MORE_THREADS = """
    run(1)  # the parent has never had more
    torch.set_num_threads(2)
    children = [forked(lambda: run(2)) for _ in range(2)]
    codes = [ended(child, 60) for child in children]
    print(json.dumps([*codes, all(map(bool, run(2)))]))
"""


def test_a_fork_may_have_threads_where_its_parent_had_none(run_calls):
    assert run_calls(FORKED + MORE_THREADS) == [0, 0, True]


LIKE_PYTORCH = """
    x = torch.ones(1_000_000)

    def sine():
        torch.set_num_threads(2)
        x.sin()

    sine()
    run(2)
    children = [forked(sine), forked(lambda: run(2))]
    code = ended(children[0], 4)
    print(json.dumps([code, ended(children[1], 1 if code is None else 60)]))
"""


@pytest.mark.slow
def test_a_fork_may_have_threads_where_pytorch_may(run_calls):
    """With libgomp none may, once their parent has had them: both wait for ever."""
    of_pytorch, of_fastkit = run_calls(FORKED + LIKE_PYTORCH)
    assert of_pytorch in (0, None) and of_fastkit == of_pytorch


LOADER = """
    from torch.utils.data import DataLoader, Dataset

    class Results(Dataset):
        def __len__(self):
            return len(CALLS)

        def __getitem__(self, i):
            name = list(CALLS)[i]
            return CALLS[name].run(*given[name])

    alone = run(1)
    run(2)
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    found = list(DataLoader(Results(), batch_size=None, **options))
    for name, results in zip(CALLS, found, strict=True):
        assert_same(results, alone[name], name)
    print(json.dumps(len(found)))
"""


def test_workers_of_a_data_loader(run_calls):
    assert run_calls(FORKED + LOADER) == len(CALLS)
