"""Two processes with half a batch each, plain, under DDP and under FSDP2, against one with all of it."""

import pytest
import torch
from torch import distributed as dist

from fastkit.optim import MTAdam

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]

SCRIPT = """
import copy
import os
import sys
import warnings
import torch
from contextlib import nullcontext
from torch import distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from fastkit.optim import MTAdam

warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # of torch 2.10's own modules
folder, cases = {folder!r}, {cases!r}
TERMS = ["left", "right", "size"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.trunk = nn.Linear(16, 7)
        self.left, self.right, self.unused = nn.Linear(7, 3), nn.Linear(7, 1), nn.Linear(7, 2)
        self.unused.bias.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.trunk(torch.tanh(self.conv(x)).flatten(1)))
        return self.left(h), self.right(h)


def batch(number, rank, ranks, pieces):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 2, 3, 3, generator=generator), torch.randn(8, 4, generator=generator)
    return zip(*(t.chunk(ranks)[rank].chunk(pieces) for t in (x, y)))


def losses(net, x, y, ranks, rank, case, last=True):
    "Whose means over the processes are the losses of all rows; right has nothing to do with the last half."
    left, right = net(x)
    share = ranks / 8
    found = {{"left": (left - y[:, :3]).square().sum() * share}}
    first = ranks == 1 or rank == 0
    if first and (ranks == 2 or case["pieces"] == 1 or not last):
        rows = slice(4) if ranks == 1 else slice(None)
        found["right"] = 100 * (right - y[:, 3:])[rows].abs().sum() * share
    else:
        found["right"] = 0 * right.sum() if case["shards"] else None
    found["size"] = sum(p.square().sum() for name, p in net.named_parameters() if "trunk" in name)
    return found


def steps(case, rank, ranks, net, own, optimizer, scaler, numbers):
    pieces = case["pieces"]
    for number in numbers:
        parts = list(batch(number, rank, ranks, pieces))
        for i, (x, y) in enumerate(parts):
            quiet = case["wrap"] == "ddp" and ranks > 1 and i < pieces - 1
            with net.no_sync() if quiet else nullcontext():
                given = losses(net, x, y, ranks, rank, case, i == pieces - 1)
                if number == 2 and case["nan"] and rank == ranks - 1:
                    given["left"] = given["left"] * float("nan")
                if case["how"] == "step":
                    optimizer.step(given)
                elif case["how"] == "grads":
                    params = list(own.parameters())
                    on = [p for p in params if p.requires_grad]
                    grads = []
                    for loss in given.values():
                        if loss is None:
                            grads.append(None)
                            continue
                        found = iter(torch.autograd.grad(loss, on, retain_graph=True, allow_unused=True))
                        grads.append([next(found) if p.requires_grad else None for p in params])
                    optimizer.step_from_grads(grads)
                else:
                    for term, loss in given.items():
                        if case["how"] == "silent" and loss is None:
                            continue  # a term of which this process says nothing
                        if pieces > 1 and term == "size":
                            loss = loss / pieces
                        optimizer.backward_term(term, loss, scaler=scaler, retain_graph=True)
        if case["how"] in ("terms", "silent"):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone()


def options_of(case):
    own = {{"process_group": dist.new_group([0, 1])}} if case["group"] and dist.is_initialized() else {{}}
    return {{**case["options"], **own}}


def run(rank, ranks, case):
    torch.manual_seed(0)
    own = net = Net()
    if not case["shards"]:  # which FSDP2 refuses
        own.conv.weight.data = own.conv.weight.data.contiguous(memory_format=torch.channels_last)
    if case["saved"]:  # DCP asks for the state of all parameters, and of these there would be none
        own.unused.requires_grad_(False)
    if ranks > 1 and case["wrap"] == "ddp":
        net = DistributedDataParallel(own)
    if ranks > 1 and case["shards"]:
        mesh = init_device_mesh("cpu", (2,))
        for part in (own.conv, own.trunk):
            fully_shard(part, mesh=mesh)
        fully_shard(own, mesh=mesh)
    torch.manual_seed(5 + rank)
    kept = None if case["saved"] else torch.zeros_like(own.trunk.bias)  # somebody else's
    own.trunk.bias.grad = kept
    optimizer = MTAdam(own.parameters(), lr=0.01, terms=TERMS, **options_of(case))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + rank)) if case["scaler"] else None
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **kw: (calls.append(tensor.numel()), reduce(tensor, *a, **kw))
    try:
        steps(case, rank, ranks, net, own, optimizer, scaler, range(6))
        if case["saved"] and ranks > 1:
            optimizer = saved_and_loaded(own, optimizer, case)
        steps(case, rank, ranks, net, own, optimizer, scaler, range(6, 8))
    finally:
        dist.all_reduce = reduce
    found = {{name: full(p) for name, p in own.named_parameters()}}
    for name, p in own.named_parameters():
        for key, entry in optimizer.state.get(p, {{}}).items():
            found[f"{{name}}: {{key}}"] = full(entry)
            if entry.dim() and hasattr(p, "placements"):
                assert entry.placements == p.placements, key
    if scaler is None:
        assert own.trunk.bias.grad is kept and (kept is None or not full(kept).any())
        assert all(p is own.trunk.bias or p.grad is None for p in own.parameters())
    return found, calls


def saved_and_loaded(net, optimizer, case):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    fresh = MTAdam(net.parameters(), lr=0.01, terms=TERMS, **options_of(case))
    saved = {{"optimizer": get_optimizer_state_dict(net, optimizer)}}
    path = f"{{folder}}/dcp-{{case['name']}}"
    dcp.save(saved, checkpoint_id=path)
    expected = optimizer.state
    loaded = {{"optimizer": get_optimizer_state_dict(net, fresh)}}
    dcp.load(loaded, checkpoint_id=path)
    set_optimizer_state_dict(net, fresh, loaded["optimizer"])
    for p in net.parameters():
        assert fresh.state.get(p, {{}}).keys() == expected.get(p, {{}}).keys()
        for key, entry in expected.get(p, {{}}).items():
            assert torch.equal(full(entry), full(fresh.state[p][key])), key
    return fresh


def refused(rank):
    "What each process is told where they do not fit each other, and of terms that FSDP2 would mix."
    texts = []
    net = nn.Linear(2, 1 + rank)
    optimizer = MTAdam(net.parameters(), terms=2)
    try:
        optimizer.step([net(torch.ones(1, 2)).sum(), net.weight.sum()])
    except RuntimeError as error:
        texts.append(str(error))
    alone = MTAdam(net.parameters(), terms=2, process_group=None)
    alone.step([net(torch.ones(1, 2)).sum(), net.weight.sum()])  # by itself: nothing is compared
    net = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (2,)))
    optimizer = MTAdam(net.parameters(), terms=2)
    net.set_requires_gradient_sync(False)
    try:
        optimizer.backward_term(0, net(torch.ones(1, 2)).sum())
    except ValueError as error:
        texts.append(str(error))
    try:
        MTAdam(net.parameters(), terms=1).step_from_grads([[torch.zeros(3, 2), None]])
    except TypeError as error:
        texts.append(str(error))
    partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()]).requires_grad_()
    try:
        MTAdam([partial])
    except TypeError as error:
        texts.append(str(error))
    try:
        copy.copy(MTAdam(nn.Linear(2, 2).parameters(), process_group=dist.new_group([0, 1])))
    except RuntimeError as error:
        texts.append(str(error))
    return texts


def meet(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
    results = [run(rank, 2, case) for case in cases]
    texts = refused(rank)
    torch.save((results, texts), f"{{folder}}/2-{{rank}}.pt")
    dist.barrier()
    dist.destroy_process_group()


child = os.fork()
if child == 0:
    code = 1
    try:
        meet(1)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)
meet(0)
torch.save(([run(0, 1, case) for case in cases], []), f"{{folder}}/1-0.pt")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def case(
    name, wrap="ddp", *, how="step", pieces=1, nan=False, scaler=False, saved=False, group=False, **options
):
    return {
        "name": name,
        "wrap": wrap,
        "shards": wrap == "fsdp",
        "how": how,
        "pieces": pieces,
        "nan": nan,
        "scaler": scaler,
        "saved": saved,
        "group": group,
        "options": options,
    }


STREAMING = {"mode": "streaming", "on_nonfinite": "skip_term"}
CASES = [
    case("DDP"),
    case("plain", "none", amsgrad=True, weight_decay=0.1, decoupled_weight_decay=True),
    case("DDP, accumulated", how="terms", pieces=2),
    case("DDP, a NaN loss of one process", nan=True),
    case("DDP, streaming", **STREAMING),
    case("plain, streaming, a term that one process leaves out", "none", how="silent", **STREAMING),
    case("plain, gradients at hand", "none", how="grads"),
    case("plain, GradScaler", "none", how="terms", scaler=True),
    case("DDP, checkpoint", saved=True),
    case("plain, a group of its own", "none", group=True),
    case("FSDP2", "fsdp"),
    case("FSDP2, amsgrad", "fsdp", amsgrad=True, max_scale=3.0, anchor="right"),
    case("FSDP2, accumulated", "fsdp", how="terms", pieces=2),
    case("FSDP2, streaming", "fsdp", **STREAMING),
    case("FSDP2, checkpoint", "fsdp", saved=True),
    case("FSDP2, a NaN loss of one process", "fsdp", nan=True),
]


@pytest.fixture(scope="module")
def results(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = run_script(SCRIPT.format(folder=str(folder), cases=CASES), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case["name"] for case in CASES])
def test_a_run_is_that_of_the_joint_batch_on_every_process(results, number):
    (joint, _), (first, calls), (second, also) = (of_rank[0][number] for of_rank in results)
    assert joint.keys() == first.keys() == second.keys()
    for key, value in joint.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    skipped = CASES[number]["nan"]
    assert float(joint["trunk.weight: step"]) == (7 if skipped else 8)
    assert not any(key.startswith("unused") and ":" in key for key in joint)  # which nothing reaches
    assert calls == also
    if CASES[number]["shards"] or CASES[number]["saved"]:
        return  # parts are reduced too, and a new optimizer compares anew
    flags, numbers = 10, 461  # parameters; elements of the gradients that there are
    each = [flags + 3, None] * 3 if "streaming" in CASES[number]["name"] else [3 * flags + 7, numbers]
    assert calls[0] == 2  # are all alike?
    assert [None if want is None else got for got, want in zip(calls[1:], each * 8, strict=True)] == each * 8


def test_what_is_told_on_each_process(results):
    texts = [
        "MTAdam.step: all processes must have the same terms and the same parameters in the same order, got"
        " others here; pass process_group=, the group of those that train one model, or None",
        "MTAdam.backward_term: the loss of term '0' reaches none of the parameters; pass None for a term that"
        " has no gradient in this step; under FSDP2 leave set_requires_gradient_sync(True), and compute"
        " penalties of parameters before the forward",
        "MTAdam.step_from_grads: the gradient of parameter 0 under term '0' must be laid out over processes"
        " as it is, a DTensor with the placements (Shard(dim=0),), got a plain tensor; redistribute it",
        "MTAdam: parameter 0 of the group must be sharded or replicated, got the placements (Partial(sum),);"
        " redistribute it",
        "MTAdam: an optimizer with a process_group of its own cannot be copied or pickled; make a new one,"
        " and load this one's state_dict",
    ]
    assert [of_rank[1] for of_rank in results] == [[], texts, texts]


def test_a_group_that_is_none():
    text = "MTAdam: process_group must be a torch.distributed.ProcessGroup, 'default' or None, got str"
    with pytest.raises(TypeError, match=f"^{text}$"):
        MTAdam([torch.ones(2, requires_grad=True)], process_group="world")
