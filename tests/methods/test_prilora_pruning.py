"""Which steps of which optimizers are counted, and what an event does."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from fastkit import ops
from fastkit.methods.prilora import PRILoRAConfig, apply_prilora


def adamw(parameters, lr=0.01, **options):
    return torch.optim.AdamW(parameters, lr=lr, **options)


@pytest.fixture
def made(make_bert):
    """A model of two blocks, adapted in query, key and intermediate."""

    def made(automatic=True, **options):
        config = PRILoRAConfig(
            **{"interval": 3, "target_modules": ["query", "intermediate.dense"], **options}
        )
        prilora = apply_prilora(make_bert(), config, automatic=automatic)
        return prilora, adamw(prilora.parameters())

    return made


def zeros(prilora):
    return [int((layer.lora_a == 0).sum()) for layer in prilora.layers.values()]


def dropped(prilora, ratio=0.5):
    """How many entries an event zeroes."""
    return [layer.rank * math.floor(ratio * layer.in_features) for layer in prilora.layers.values()]


# Steps


def test_events_come_by_themselves(made, train):
    prilora, optimizer = made()
    found = []
    for number in range(7):
        train(prilora.model, optimizer, [number])
        found.append(zeros(prilora) == dropped(prilora))
    assert found == [False, False, True, False, False, True, False]
    assert (prilora.steps, prilora.events, prilora.automatic) == (7, [3, 6], True)


def test_start_and_stop(made, train):
    prilora, optimizer = made(interval=2, start=3, stop=7)
    train(prilora.model, optimizer, range(10))
    assert prilora.events == [4, 6]


def test_optimizers_that_hold_no_adapter_do_not_count(made, train):
    prilora, optimizer = made()
    head = adamw(prilora.model.classifier.parameters())
    other = adamw(nn.Linear(3, 3).parameters())
    train(prilora.model, optimizer, range(2), step=lambda: (head.step(), other.step(), optimizer.step()))
    assert prilora.steps == 2


def test_of_two_optimizers_each_prunes_its_own_and_a_step_of_both_is_one(made, train):
    together, optimizer = made()
    apart, _ = made()
    train(together.model, optimizer, range(4))
    layers = list(apart.layers.values())
    adapters = [
        [p for layer in half for p in (layer.lora_a, layer.lora_b)] for half in (layers[:1], layers[1:])
    ]
    heads = [p for name in apart.modules_to_save for p in apart.model.get_submodule(name).parameters()]
    optimizers = adamw([*adapters[0], *heads]), adamw(adapters[1])
    train(apart.model, optimizer, range(4), step=lambda: [each.step() for each in optimizers])
    assert (apart.steps, apart.events) == (4, [3])
    for a, b in zip(together.layers.values(), layers, strict=True):
        assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.input_square, b.input_square)


def test_a_new_optimizer_goes_on_counting(made, train):
    prilora, optimizer = made()
    train(prilora.model, optimizer, range(2))
    train(prilora.model, adamw(prilora.parameters()), range(1))
    assert prilora.events == [3]


def test_where_a_is_frozen_the_optimizer_of_b_counts(made, train):
    prilora, _ = made()
    for layer in prilora.layers.values():
        layer.lora_a.requires_grad_(False)
    train(prilora.model, adamw(p for p in prilora.parameters() if p.requires_grad), range(3))
    assert prilora.events == [3] and zeros(prilora) == dropped(prilora)


def test_gradient_accumulation_is_one_step(made):
    whole, cut = made(interval=2), made(interval=2)
    for prilora, optimizer in (whole, cut):
        for number in range(2):
            ids = torch.randint(40, (6, 5), generator=torch.Generator().manual_seed(number))
            labels = torch.tensor([0, 1, 0, 1, 1, 0])
            optimizer.zero_grad()
            pieces = 3 if prilora is cut[0] else 1
            for some, of_some in zip(ids.chunk(pieces), labels.chunk(pieces), strict=True):
                (prilora.model(input_ids=some, labels=of_some).loss / pieces).backward()
            optimizer.step()
    assert whole[0].events == cut[0].events == [2]
    for a, b in zip(whole[0].layers.values(), cut[0].layers.values(), strict=True):
        torch.testing.assert_close(a.input_square, b.input_square)
        assert torch.equal(a.lora_a == 0, b.lora_a == 0)


def spoiled(prilora, optimizer, scaler, steps):
    """A step by the scaler, which sees an inf at the steps of these numbers."""
    numbers = itertools.count()

    def step():
        if next(numbers) in steps:
            next(iter(prilora.layers.values())).lora_a.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()

    return step


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_found_inf_is_none(made, train, fused):
    """A fused optimizer is called, and skips by itself; another is not called at all."""
    prilora, _ = made(interval=1, mode="hard")
    optimizer = adamw(prilora.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step = spoiled(prilora, optimizer, scaler, [1])
    train(prilora.model, optimizer, [0], step=step, scale=scaler.scale)
    assert (prilora.steps, prilora.events) == (1, [1])
    before = prilora.state_dict()["tensors"]
    train(prilora.model, optimizer, [1], step=step, scale=scaler.scale)
    assert (prilora.steps, prilora.events) == (1, [1])
    assert all(torch.equal(v, before[key]) for key, v in prilora.state_dict()["tensors"].items())
    train(prilora.model, optimizer, [2], step=step, scale=scaler.scale)
    assert (prilora.steps, prilora.events) == (2, [1, 2])


def test_skipped_steps_are_alike_for_both_kinds_of_optimizer(made, train):
    found = []
    for fused in (True, False):
        prilora, _ = made(interval=2)
        optimizer = adamw(prilora.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        step = spoiled(prilora, optimizer, scaler, [1])
        train(prilora.model, optimizer, range(3), step=step, scale=scaler.scale)
        assert (prilora.steps, prilora.events) == (2, [2])
        found.append([layer.input_square.clone() for layer in prilora.layers.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Asked(torch.Tensor):
    """A tensor that says when its value is waited for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.tolist):
            raise AssertionError("waited")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_nothing_is_waited_for_without_found_inf(made, train):
    prilora, optimizer = made()
    train(prilora.model, optimizer, range(1))
    for layer in prilora.layers.values():
        layer.folds = layer.folds.as_subclass(Asked)
        layer.square_sum = layer.square_sum.as_subclass(Asked)
        layer.input_square = layer.input_square.as_subclass(Asked)
    train(prilora.model, optimizer, range(1, 2))
    assert prilora.steps == 2
    with pytest.raises(AssertionError, match="waited"):
        train(prilora.model, optimizer, range(2, 3))  # an event asks which layers have a statistic


# By hand


def test_step_is_refused_while_the_hook_is_on(made, train):
    prilora, optimizer = made()
    message = (
        "PRILoRA: step() must not be called while steps of optimizers are seen by themselves, for each would"
        " count twice; leave it out, or pass automatic=False, or call close() first"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        prilora.step()
    prilora.close()
    prilora.close()
    train(prilora.model, optimizer, range(1))
    assert prilora.steps == 0
    prilora.step()
    assert prilora.steps == 1


def test_the_manual_form_does_what_the_hook_does(made, train):
    (hooked, first), (manual, second) = made(mode="hard"), made(automatic=False, mode="hard")
    assert not manual.automatic
    train(hooked.model, first, range(7))
    train(manual.model, second, range(7), step=lambda: (second.step(), manual.step()))
    assert manual.events == hooked.events == [3, 6]
    tensors = manual.state_dict()["tensors"]
    assert all(torch.equal(value, tensors[key]) for key, value in hooked.state_dict()["tensors"].items())


def test_with_reset_state_the_manual_form_wants_the_optimizer(made, train):
    prilora, optimizer = made(automatic=False, reset_state="m")
    with pytest.raises(RuntimeError, match="step\\(\\) must be given the optimizer with reset_state='m'"):
        prilora.step()
    train(prilora.model, optimizer, range(3), step=lambda: (optimizer.step(), prilora.step(optimizer)))
    assert prilora.events == [3]


# Events


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("importance", ["input", "magnitude"])
def test_what_is_zeroed(made, train, group, importance):
    prilora, optimizer = made(automatic=False, group=group, importance=importance, ratio=0.3)
    train(prilora.model, optimizer, range(3), step=lambda: (optimizer.step(), prilora.step()))
    prilora, optimizer = made(automatic=False, group=group, importance=importance, ratio=0.3)
    train(prilora.model, optimizer, range(2), step=lambda: (optimizer.step(), prilora.step()))
    before = {}

    def step():
        optimizer.step()
        before.update({name: layer.lora_a.detach().clone() for name, layer in prilora.layers.items()})
        prilora.step()

    train(prilora.model, optimizer, range(2, 3), step=step)
    for name, layer in prilora.layers.items():
        a = before[name]
        norm = layer.input_norm if importance == "input" else torch.ones(a.shape[1])
        if group == "matrix":
            score = (a.abs() * norm).flatten()
            least = score.sort(stable=True).indices[: math.floor(0.3 * score.numel())]
            expected = a.flatten().index_fill(0, least, 0.0).view(a.shape)
        else:
            expected = a * ops.prune_rows_(a.clone(), norm, 0.3, impl="reference")
        assert torch.equal(layer.lora_a, expected) and (expected == 0).any()


def test_random_entries_are_the_same_for_the_same_seed_and_others_for_another(made, train):
    found = []
    for seed in (0, 0, 1):
        prilora, optimizer = made(importance="random", seed=seed)
        train(prilora.model, optimizer, range(3))
        assert zeros(prilora) == dropped(prilora)
        found.append([layer.lora_a == 0 for layer in prilora.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    first = next(iter(found[0]))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("importance", ["input", "random"])
def test_soft_grows_again_and_hard_stays(made, train, importance):
    for mode in ("soft", "hard"):
        prilora, optimizer = made(mode=mode, importance=importance)
        train(prilora.model, optimizer, range(3))
        kept = [layer.lora_a != 0 for layer in prilora.layers.values()]
        train(prilora.model, optimizer, range(3, 5))
        for layer, was in zip(prilora.layers.values(), kept, strict=True):
            grown = layer.lora_a[~was] != 0
            assert grown.all() if mode == "soft" else not grown.any()
            assert layer.mask.all() if mode == "soft" else torch.equal(layer.mask, was)
        train(prilora.model, optimizer, range(5, 6))
        assert prilora.events == [3, 6] and zeros(prilora) == dropped(prilora)
        if mode == "hard":  # what is zero is the least
            now = [layer.lora_a != 0 for layer in prilora.layers.values()]
            assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_final_is_soft_until_the_last_event(made, train):
    prilora, optimizer = made(mode="final", stop=7)
    train(prilora.model, optimizer, range(4))
    assert sum(zeros(prilora)) == 0
    train(prilora.model, optimizer, range(4, 10))
    assert prilora.events == [3, 6] and zeros(prilora) == dropped(prilora)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_finalize_prunes_once_more(made, train, mode):
    prilora, optimizer = made(mode=mode)
    train(prilora.model, optimizer, range(4))
    prilora.finalize()
    assert zeros(prilora) == dropped(prilora) and prilora.events == [3]
    assert all(layer.mask.all() == (mode == "soft") for layer in prilora.layers.values())


def test_finalize_without_a_statistic_is_refused(made):
    """Else what is saved would be dense, and nobody would know."""
    prilora, _ = made()
    with pytest.raises(RuntimeError, match=r"^PRILoRA: finalize\(\) needs a statistic, and no layer has one"):
        prilora.finalize()
    made(ratio=0)[0].finalize()
    prilora, _ = made(importance="magnitude")
    prilora.finalize()
    assert zeros(prilora) == dropped(prilora)


@pytest.mark.parametrize("reset", [None, "m", "mv"])
def test_reset_state(made, train, reset):
    prilora, _ = made(reset_state=reset)
    optimizer = adamw(prilora.parameters(), amsgrad=True)
    train(prilora.model, optimizer, range(3))
    for layer in prilora.layers.values():
        state, pruned = optimizer.state[layer.lora_a], layer.lora_a == 0
        moved = layer.lora_a.grad[pruned] != 0
        for key, is_zero in (
            ("exp_avg", reset),
            ("exp_avg_sq", reset == "mv"),
            ("max_exp_avg_sq", reset == "mv"),
        ):
            assert not state[key][pruned].any() if is_zero else state[key][pruned][moved].all()
            assert state[key][~pruned].any() and state["step"] == 3


def test_a_layer_that_has_seen_nothing_is_not_pruned(made, train):
    prilora, optimizer = made()
    layer = prilora.layers["bert.encoder.layer.1.attention.self.query"]
    layer.enabled = False
    train(prilora.model, optimizer, range(3))
    found = zeros(prilora)
    assert prilora.events == [3] and found.count(0) == 1 and (layer.lora_a != 0).all()


def test_where_nothing_is_pruned_there_is_no_event(made, train):
    """In eval a layer counts nothing, and none has a statistic."""
    prilora, optimizer = made()
    prilora.model.eval()
    train(prilora.model, optimizer, range(4))
    assert (prilora.steps, prilora.events) == (4, []) and sum(zeros(prilora)) == 0
    prilora.model.train()
    train(prilora.model, optimizer, range(4, 6))
    assert prilora.events == [6] and zeros(prilora) == dropped(prilora)


def test_autocast(made, train):
    prilora, optimizer = made()
    with torch.autocast("cpu", torch.bfloat16):
        train(prilora.model, optimizer, range(3))
    assert prilora.events == [3] and zeros(prilora) == dropped(prilora)
    assert {layer.input_square.dtype for layer in prilora.layers.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_of_the_optimizer_is_seen(made, train):
    prilora, optimizer = made(target_modules=r".*layer\.0\.attention\.self\.query")
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    train(prilora.model, optimizer, range(3))
    assert prilora.events == [3] and zeros(prilora) == dropped(prilora)
