"""MTAdam's state: its keys and dtypes, and training that goes on from a saved one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

TERMS = ["left", "right", "size"]
OPTIONS = {
    "batched": {"weight_decay": 0.1, "amsgrad": True},
    "streaming": {"mode": "streaming", "on_nonfinite": "skip_term"},
    "options": {"ranks": [1.0, 0.5, 2.0], "anchor": "right", "max_scale": 3.0, "on_nonfinite": "propagate"},
}


def made(make_net, name="batched", dtype=torch.float32, **options):
    net = make_net(dtype)
    return net, MTAdam(net.parameters(), **{"lr": 1e-2, **OPTIONS[name], **options})


def saved(*objects):
    """Through a file, as weights_only reads it."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What there is


@pytest.mark.native
@pytest.mark.parametrize(
    ("dtype", "of_state"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_keys_shapes_and_dtypes_also_after_a_load(make_net, losses, dtype, of_state, amsgrad):
    net, optimizer = made(make_net, dtype=dtype, amsgrad=amsgrad)
    optimizer.step(losses(net))
    other, loaded = made(make_net, dtype=dtype, amsgrad=amsgrad)
    loaded.load_state_dict(saved(optimizer.state_dict())[0])
    for param, of in [*optimizer.state.items(), *loaded.state.items()]:
        names = [*(f"exp_avg_sq.{t}" for t in TERMS), *(f"grad_norm.{t}" for t in TERMS)]
        names += ["max_exp_avg_sq"] * amsgrad
        assert sorted(of) == sorted(["step", "exp_avg", *names])
        for key, entry in of.items():
            assert entry.dtype == of_state and not entry.requires_grad
            assert entry.shape == (() if key == "step" or key.startswith("grad_norm") else param.shape)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        for key, entry in optimizer.state[a].items():
            assert torch.equal(entry, loaded.state[b][key]), key


# Going on


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("through", ["file", "dict", "pickle", "deepcopy"])
def test_resumed_it_has_the_same_bits(make_net, losses, train, everything, assert_same, through, name, dtype):
    straight, reference = made(make_net, name, dtype)
    train(straight, reference, range(9))
    net, optimizer = made(make_net, name, dtype)
    train(net, optimizer, range(5))
    if through in ("file", "dict"):
        states = net.state_dict(), optimizer.state_dict()
        weights, state = saved(*states) if through == "file" else copy.deepcopy(states)
        resumed, of_resumed = made(make_net, name, dtype, lr=0.5)
        resumed.load_state_dict(weights)
        of_resumed.load_state_dict(state)
    elif through == "pickle":
        resumed, of_resumed = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        resumed, of_resumed = copy.deepcopy((net, optimizer))
    assert (of_resumed.mode, of_resumed.on_nonfinite, of_resumed.terms) == (
        reference.mode,
        reference.on_nonfinite,
        tuple(TERMS),
    )
    before = everything(net, optimizer)
    train(resumed, of_resumed, range(5, 9))
    assert_same(everything(resumed, of_resumed), everything(straight, reference))
    assert_same(before, everything(net, optimizer))  # nothing is shared with what was copied


def flat_tensors(net, optimizer):
    """Contiguous, by name, as for a file of safetensors."""
    tensors = {f"model.{name}": param for name, param in net.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": entry for key, entry in entries.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_flat_tensors(tensors, net, optimizer):
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    of_model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    net.load_state_dict(of_model)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Convolutions(nn.Module):
    def __init__(self, make_net):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 2).to(memory_format=torch.channels_last)
        self.net = make_net()

    def losses(self, losses, number):
        generator = torch.Generator().manual_seed(number)
        images = self.conv(torch.randn(3, 2, 4, 4, generator=generator))
        left, _ = self.net(images.flatten(2).mean(-1))
        return {**losses(self.net, number), "left": left.square().sum()}


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_resumed_from_safetensors_it_has_the_same_bits(
    make_net, losses, everything, assert_same, tmp_path, layout
):
    files = pytest.importorskip("safetensors.torch")

    def made():
        torch.manual_seed(0)
        net = make_net() if layout == "dense" else Convolutions(make_net)
        return net, MTAdam(net.parameters(), lr=1e-2, terms=TERMS)

    def go(net, optimizer, numbers):
        for number in numbers:
            optimizer.step(losses(net, number) if layout == "dense" else net.losses(losses, number))

    straight, reference = made()
    go(straight, reference, range(8))
    net, optimizer = made()
    go(net, optimizer, range(4))
    files.save_file(flat_tensors(net, optimizer), tmp_path / "state.safetensors")
    resumed, of_resumed = made()
    from_flat_tensors(files.load_file(tmp_path / "state.safetensors"), resumed, of_resumed)
    if layout == "channels_last":
        weight = resumed.conv.weight
        assert of_resumed.state[weight]["exp_avg"].stride() == weight.stride() != (8, 4, 2, 1)
    go(resumed, of_resumed, range(4, 8))
    assert_same(everything(resumed, of_resumed), everything(straight, reference))


KILLED = """
import os, signal
import torch
import torch._dynamo  # which optimizers import: here once, and not in each process
from torch import nn
from fastkit.optim import MTAdam


def run(path, steps, at=None, there=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = MTAdam(net.parameters(), lr=1e-2, terms=["a", "b"], weight_decay=0.1)
    step = 0
    if os.path.exists(path):
        step, weights, state = torch.load(path, weights_only=True)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    while step < steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        y = net(x)
        optimizer.step({{"a": y[:, 0].square().mean(), "b": 100 * (y - x[:, :2]).abs().mean()}})
        step += 1
        torch.save((step, net.state_dict(), optimizer.state_dict()), path + ".new")
        os.replace(path + ".new", path)
        if step == at:
            os.write(there, b"!")
            signal.pause()


torch.set_num_threads(1)
seen, there = os.pipe()
child = os.fork()
if child == 0:
    run({folder!r} + "/killed", 12, 6, there)
    os._exit(1)
os.close(there)
os.read(seen, 1)
os.kill(child, signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
assert torch.load({folder!r} + "/killed", weights_only=True)[0] == 6
for name in ("killed", "straight"):
    run({folder!r} + "/" + name, 12)
"""


@pytest.mark.native
def test_a_process_that_is_killed_goes_on_with_the_same_bits(tmp_path, run_script):
    done = run_script(KILLED.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    killed, straight = (torch.load(tmp_path / name, weights_only=True) for name in ("killed", "straight"))
    assert killed[0] == straight[0] == 12
    assert all(torch.equal(value, straight[1][name]) for name, value in killed[1].items())
    for index, entries in straight[2]["state"].items():
        assert all(torch.equal(value, killed[2]["state"][index][key]) for key, value in entries.items())


@pytest.mark.native
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled.*:UserWarning")
@pytest.mark.parametrize("name", ["batched", "streaming"])
@pytest.mark.parametrize("flat", [False, True])
def test_through_torch_distributed_checkpoint(
    make_net, losses, train, everything, assert_same, tmp_path, name, flat
):
    """Into an optimizer that has not taken a step, whose terms are known."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, reference = made(make_net, name, terms=TERMS)
    train(straight, reference, range(6))
    net, optimizer = made(make_net, name, terms=TERMS)
    train(net, optimizer, range(3))
    weights, state = get_state_dict(net, optimizer, options=options)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    resumed, of_resumed = made(make_net, name, terms=TERMS)
    with torch.no_grad():
        for param in resumed.parameters():
            param.zero_()
    weights, state = get_state_dict(resumed, of_resumed, options=options)
    into = {"model": weights, "optimizer": state}
    checkpoint.load(into, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_state_dict(
        resumed,
        of_resumed,
        model_state_dict=into["model"],
        optim_state_dict=into["optimizer"],
        options=options,
    )
    assert_same(everything(resumed, of_resumed), everything(net, optimizer))
    assert of_resumed.param_groups[0]["lr"] == 1e-2
    train(resumed, of_resumed, range(3, 6))
    assert_same(everything(resumed, of_resumed), everything(straight, reference))


@pytest.mark.native
def test_the_step_that_makes_state_changes_no_parameter(make_net):
    net, optimizer = made(make_net, terms=TERMS)
    net.left.bias.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    assert all((p in optimizer.state) == p.requires_grad for p in net.parameters())
    assert not any(entry.any() for of in optimizer.state.values() for entry in of.values())


# What is whose


@pytest.mark.native
def test_numbers_of_a_state_dict_do_not_change_with_training(make_net, train):
    net, optimizer = made(make_net)
    train(net, optimizer, range(2))
    state = optimizer.state_dict()["state"]
    before = copy.deepcopy(state)
    train(net, optimizer, range(3))
    for index, entries in state.items():
        for key, entry in entries.items():
            if entry.dim() == 0 and not key.startswith(("exp", "max")):
                assert torch.equal(entry, before[index][key]), key
                assert entry.untyped_storage().nbytes() == 4  # not a view of what is packed
    assert before[0]["step"] == 2 and optimizer.state_dict()["state"][0]["step"] == 5


@pytest.mark.native
def test_what_is_loaded_is_copied(make_net, train):
    net, optimizer = made(make_net)
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(3))
    for index, entries in before["state"].items():
        assert all(torch.equal(entry, state["state"][index][key]) for key, entry in entries.items())
    assert state["param_groups"] == before["param_groups"]


@pytest.mark.native
@pytest.mark.parametrize("change", ["moments", "numbers", "all", "cleared", "moved"])
def test_state_that_is_replaced_from_outside_is_honoured(
    make_net, losses, train, everything, assert_same, change
):
    """As a load into a new optimizer of what is then there."""
    net, optimizer = made(make_net)
    train(net, optimizer, range(3))
    state = optimizer.state
    if change == "moments":
        state[net.trunk.weight]["exp_avg"] = torch.randn(8, 6)
        state[net.left.bias]["exp_avg_sq.left"] = torch.rand(3)
    elif change == "numbers":
        state[net.trunk.weight]["step"] = torch.tensor(40.0)
        state[net.trunk.weight]["grad_norm.right"] = torch.tensor(0.25)
        state[net.left.weight]["step"].fill_(50)  # in place
    elif change == "all":
        for param in net.parameters():
            state[param] = {key: 2 * entry for key, entry in state[param].items()}
    elif change == "cleared":
        state.clear()
    else:  # as to another device and back
        for entries in state.values():
            for key, entry in entries.items():
                entries[key] = entry.double().to(entry.dtype)
    other, fresh = made(make_net)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert_same(everything(net, optimizer), everything(other, fresh))


@pytest.mark.native
def test_moments_of_other_strides_than_their_parameter():
    """As from outside, into channels_last."""
    conv, other = (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    other.load_state_dict(conv.state_dict())
    optimizer, reference = (MTAdam(c.parameters(), terms=2) for c in (conv, other))
    grads = [[torch.randn_like(p) for p in conv.parameters()] for _ in range(2)]
    optimizer.step_from_grads(grads)
    reference.step_from_grads(grads)
    state = optimizer.state[conv.weight]
    for key in ("exp_avg", "exp_avg_sq.0", "exp_avg_sq.1"):
        state[key] = state[key].contiguous()
    optimizer.step_from_grads(grads)
    reference.step_from_grads(grads)
    torch.testing.assert_close(conv.weight, other.weight, rtol=0, atol=1e-7)
