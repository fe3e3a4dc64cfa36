"""Processes that do not all do the same: what MTAdam makes of it, and what it tells."""

import pytest
from torch import distributed as dist

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]

SCRIPT = """
import os
import sys
import torch
import torch._dynamo  # which optimizers import: here once, and not in each process
from datetime import timedelta
from torch import distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from fastkit.optim import MTAdam

folder, ranks = {folder!r}, {ranks}


def refused(call, text):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused: " + text)


def alike(*tensors):
    "On all processes, to the bit."
    for t in tensors:
        t = (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().contiguous()
        all = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(all, t)
        assert torch.equal(all[0], t), (all[0], t)


def two_terms(net, x):
    out = net(x)
    return {{"a": out.square().sum(), "b": 100 * out.abs().sum()}}


def without_a_term_in_a_step(rank):
    net = nn.Linear(2, 3)
    optimizer = MTAdam(net.parameters(), terms=["a", "b"])
    for number in range(3):
        if number != 1 or rank == 0:  # in the second step the others have no rows
            for term, loss in two_terms(net, torch.ones(1, 2) * (rank + 1)).items():
                optimizer.backward_term(term, loss)
        optimizer.step()
    assert optimizer.state[net.weight]["step"] == 3
    alike(net.weight, optimizer.state[net.weight]["exp_avg"])


def without_losses_in_a_step(rank):
    net = nn.Linear(2, 3)
    optimizer = MTAdam(net.parameters(), terms=["a", "b"])
    for number in range(3):
        given = two_terms(net, torch.ones(1, 2) * (rank + 1))
        optimizer.step(dict.fromkeys(given) if number == 0 and rank == 1 else given)
    alike(net.weight)


def streaming_under_ddp_with_buffers(rank):
    net = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    optimizer = MTAdam(net.parameters(), terms=["a", "b"], mode="streaming", on_nonfinite="skip_term")
    for number in range(3):
        for term in optimizer.terms:  # a forward for each, which broadcasts buffers
            loss = two_terms(net, torch.randn(4, 2))[term]
            optimizer.backward_term(term, None if (rank, number, term) == (1, 1, "a") else loss)
        optimizer.step()
    alike(*net.parameters())


def a_scaler_where_one_has_no_term(rank):
    net = nn.Linear(2, 3)
    optimizer = MTAdam(net.parameters(), terms=["a", "b"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number in range(3):
        for term, loss in two_terms(net, torch.ones(1, 2) * (rank + 1)).items():
            optimizer.backward_term(term, None if (rank, number) == (1, 1) else loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert all(p.grad is None for p in net.parameters())
    alike(net.weight, optimizer.state[net.weight]["grad_norm.b"])


def small_gradients_in_half_precision(rank):
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = MTAdam([p], lr=0.0625, eps=1e-15, terms=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (16 + rank))
    optimizer.backward_term(0, p.float().sum() * 1e-8, scaler=scaler)
    scaler.step(optimizer)
    assert torch.equal(p, torch.full_like(p, 0.9375))
    torch.testing.assert_close(optimizer.state[p]["grad_norm.0"], torch.tensor(2e-8), rtol=1e-2, atol=0)


def a_loss_that_is_not_finite_in_a_group_of_parts(rank):
    net = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = MTAdam(net.parameters(), terms=["a", "b"], process_group=None)
    for number in range(3):
        given = two_terms(net, torch.ones(1, 2))
        if (rank, number) == (1, 1):
            given["a"] = given["a"] + float("inf")  # of which the gradient is finite
        optimizer.step(given)
    assert optimizer.state[net.weight]["step"] == 2
    alike(net.weight)


def other_networks_and_inputs(rank):
    net = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (ranks,)))
    other, x = nn.Linear(3, 1), torch.ones(1, 2, requires_grad=True)
    other.weight.grad = kept = torch.ones(1, 3)
    MTAdam(net.parameters(), terms=1).step([other(net(x)).sum()])
    assert other.weight.grad is kept and kept.eq(1).all() and other.bias.grad is None and x.grad is None


def gradients_with_a_graph(rank):
    net = nn.Linear(2, 3)
    losses = two_terms(net, torch.ones(1, 2)).values()
    grads = [torch.autograd.grad(loss, list(net.parameters()), create_graph=True) for loss in losses]
    before = [g.detach().clone() for of_term in grads for g in of_term]
    MTAdam(net.parameters(), terms=2).step_from_grads(grads)
    assert all(map(torch.equal, before, [g for of_term in grads for g in of_term]))
    alike(net.weight)


def terms_that_became_others(rank):
    net = nn.Linear(2, 3)
    optimizer = MTAdam(net.parameters(), terms=["a", "b", "c"])
    x = torch.ones(1, 2)
    optimizer.step({{**two_terms(net, x), "c": net(x).sum()}})
    optimizer.drop_term("bc"[rank])
    text = "all processes must have the same terms and the same parameters"
    refused(lambda: optimizer.step([net(x).sum(), net(x).square().sum()]), text)


def memory_formats_that_differ(rank):
    conv = nn.Conv2d(2, 3, 2)
    if rank:
        conv = conv.to(memory_format=torch.channels_last)
    optimizer = MTAdam(conv.parameters(), terms=1)
    refused(lambda: optimizer.step([conv(torch.ones(1, 2, 2, 2)).sum()]), "the same parameters")


def scales_that_differ_where_parameters_are_sharded(rank):
    net = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = MTAdam(net.parameters(), terms=1)
    scaler = torch.amp.GradScaler("cpu", 2.0 ** (4 + rank))
    optimizer.backward_term(0, net(torch.ones(1, 2)).sum(), scaler=scaler)
    refused(lambda: optimizer._finish(None), "the same scale where parameters are sharded")


def state_that_is_not_sharded(rank):
    plain = nn.Linear(2, 3)
    saved = MTAdam(plain.parameters(), terms=1, process_group=None)
    saved.step([plain(torch.ones(1, 2)).sum()])
    net = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = MTAdam(net.parameters(), lr=0.5, terms=1)
    refused(lambda: optimizer.load_state_dict(saved.state_dict()), "must be a DTensor where the parameter is")
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state


def parts_of_parts(rank):
    "FSDP2 over tensor parallel layers; one process has the joint batch."
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({{"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)}})

    def run(net, x):
        optimizer = MTAdam(net.parameters(), lr=0.01, terms=["a", "b"], **own)
        for number in range(4):
            out = net["b"](torch.tanh(net["a"](x)))
            optimizer.step([out.square().mean(), 100 * (out - 1).abs().mean()])
        return optimizer

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    own = {{"process_group": None}}
    joint = network()
    expected = run(joint, x)
    own = {{}}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = network()
    parallelize_module(net, mesh["tp"], {{"a": ColwiseParallel(), "b": RowwiseParallel()}})
    for part in net.values():
        fully_shard(part, mesh=mesh["dp"])
    optimizer = run(net, x.chunk(2)[rank // 2])
    for p, q in zip(net.parameters(), joint.parameters()):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-6)
        for term in "ab":
            norms = [state[f"grad_norm.{{term}}"] for state in (optimizer.state[p], expected.state[q])]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=1e-6)


def a_mesh_that_lacks_some(rank):
    from torch.distributed.tensor import distribute_tensor, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh["tp"], [Shard(0)]))
    optimizer = MTAdam([weight], terms=1)
    refused(lambda: optimizer.step([(weight * weight).sum()]), "must be laid out over all processes")


def parts_of_other_strides(rank):
    from torch.distributed.tensor import distribute_tensor, Shard

    mesh = init_device_mesh("cpu", (ranks,))
    weight = nn.Parameter(distribute_tensor(torch.arange(10.0).view(2, 5), mesh, [Shard(1)]))
    plain = nn.Parameter(torch.arange(10.0).view(2, 5))
    for p, own in ((weight, {{}}), (plain, {{"process_group": None}})):
        MTAdam([p], **own).step([(p * p).sum(), p.sum()])
    assert torch.equal(weight.full_tensor(), plain)


def meet(rank):
    torch.set_num_threads(1)
    meeting = f"file://{{folder}}/meet"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    for case in {cases!r}:
        torch.manual_seed(0)
        print(case, file=sys.stderr, flush=True)
        globals()[case](rank)
    dist.barrier()
    dist.destroy_process_group()


children = []
for rank in range(1, ranks):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            meet(rank)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
meet(0)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
"""

OF_TWO = [
    "without_a_term_in_a_step",
    "without_losses_in_a_step",
    "streaming_under_ddp_with_buffers",
    "a_scaler_where_one_has_no_term",
    "small_gradients_in_half_precision",
    "a_loss_that_is_not_finite_in_a_group_of_parts",
    "other_networks_and_inputs",
    "gradients_with_a_graph",
    "terms_that_became_others",
    "memory_formats_that_differ",
    "scales_that_differ_where_parameters_are_sharded",
    "state_that_is_not_sharded",
    "parts_of_other_strides",
]
OF_FOUR = ["parts_of_parts", "a_mesh_that_lacks_some"]


@pytest.mark.parametrize("ranks, cases", [(2, OF_TWO), (4, OF_FOUR)], ids=["two", "four"])
def test_processes(run_script, tmp_path, ranks, cases):
    """To start processes takes longer than all cases do; the last name on stderr is the one that failed."""
    script = SCRIPT.format(folder=str(tmp_path), ranks=ranks, cases=cases)
    done = run_script(script, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
