"""MTAdam with what trains beside it: torch.compile, torch.func, accelerate, transformers."""

import pytest
import torch
from torch import nn

from fastkit.optim import MTAdam

TERMS = ["left", "right", "size"]


# accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")

    def accelerator(**options):
        for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
            state._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    return accelerator


@pytest.mark.parametrize("way", ["losses", "closure", "terms"])
def test_the_optimizer_of_accelerate(make_net, losses, train, everything, assert_same, accelerator, way):
    """Whose step takes one argument; the terms that are given before are those of the optimizer within."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), lr=1e-2, terms=TERMS) for n in (net, other))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    of_reference = torch.optim.lr_scheduler.StepLR(reference, 2, gamma=0.5)
    prepared, wrapped, scheduler = accelerator().prepare(net, optimizer, scheduler)
    for number in range(5):
        given = losses(prepared, number)
        if way == "losses":
            wrapped.step(given)
        elif way == "closure":
            wrapped.step(lambda given=given: given)
        else:
            for name, loss in given.items():
                wrapped.optimizer.backward_term(name, loss)
            wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        train(other, reference, [number])
        of_reference.step()
    assert wrapped.param_groups[0]["lr"] == 1e-2 / 4
    assert_same(everything(net, optimizer), everything(other, reference))


def test_accumulation_of_accelerate(make_net, losses, everything, assert_same, accelerator):
    """Its step and zero_grad do nothing until the last part."""
    net, other = make_net(), make_net()
    optimizer, reference = (MTAdam(n.parameters(), lr=1e-2, terms=TERMS) for n in (net, other))
    accelerate = accelerator(gradient_accumulation_steps=3)
    prepared, wrapped = accelerate.prepare(net, optimizer)
    for number in range(9):
        with accelerate.accumulate(prepared):
            for name, loss in losses(prepared, number).items():
                wrapped.optimizer.backward_term(name, loss)
            wrapped.step()
            wrapped.zero_grad()
        for name, loss in losses(other, number).items():
            reference.backward_term(name, loss)
        if number % 3 == 2:
            reference.step()
    assert optimizer.state[net.trunk.weight]["step"] == 3
    assert_same(everything(net, optimizer), everything(other, reference))


def test_a_checkpoint_of_accelerate(make_net, losses, train, everything, assert_same, accelerator, tmp_path):
    accelerate = accelerator()
    net, other = make_net(), make_net()
    optimizer, resumed = (MTAdam(n.parameters(), lr=1e-2, terms=TERMS) for n in (net, other))
    accelerate.prepare(net, optimizer)
    train(net, optimizer, range(3))
    accelerate.save_state(str(tmp_path / "state"))
    accelerate = accelerator()
    accelerate.prepare(other, resumed)
    accelerate.load_state(str(tmp_path / "state"))
    for run, of_run in ((net, optimizer), (other, resumed)):
        train(run, of_run, range(3, 5))
    assert_same(everything(net, optimizer), everything(other, resumed))


# torch.compile and torch.func


class Together(nn.Module):
    """The three terms of a network in one graph."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        left, right = self.net(x)
        size = self.net.trunk.weight.square().sum()
        return (left - y[:, :3]).square().sum(), (right - y[:, 3:]).abs().sum(), size


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo and inductor, about what they import
@pytest.mark.parametrize(("backend", "mode"), [("aot_eager", "streaming"), ("inductor", "batched")])
def test_a_compiled_model_under_three_terms(make_net, everything, assert_same, backend, mode):
    """Whose one backward graph runs three times over the buffers of one forward."""
    net, other = make_net(), make_net()
    torch._dynamo.reset()
    compiled = torch.compile(Together(net), backend=backend)
    options = {"mode": mode, "on_nonfinite": "skip_term", "lr": 1e-2, "terms": TERMS}
    optimizer, reference = (MTAdam(n.parameters(), **options) for n in (net, other))
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)
        optimizer.step(list(compiled(x, y)))
        reference.step(list(Together(other)(x, y)))
    assert_same(everything(net, optimizer), everything(other, reference), 1e-5)


def test_gradients_of_torch_func(make_net, losses, train, everything, assert_same):
    """All terms at once, by the Jacobian of their vector: zeros where a term does not reach a head."""
    net, other = make_net(torch.float64), make_net(torch.float64)
    optimizer, reference = MTAdam(net.parameters(), lr=1e-2), MTAdam(other.parameters(), lr=1e-2)
    together = Together(net)
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)
        x, y = x.double(), y.double()

        def terms(params, x=x, y=y):
            return torch.stack(torch.func.functional_call(together, params, (x, y)))

        params = {name: param.detach() for name, param in together.named_parameters()}
        jacobian = torch.func.jacrev(terms)(params)
        grads = {term: [of_term[k] for of_term in jacobian.values()] for k, term in enumerate(TERMS)}
        optimizer.step_from_grads(grads)
        train(other, reference, [number])
    assert_same(everything(net, optimizer), everything(other, reference), 1e-12)


# transformers


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_bert_with_two_heads_and_a_schedule_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertModel(config)
    heads = nn.ModuleDict({"sentence": nn.Linear(16, 2), "word": nn.Linear(16, 40)})
    decayed = [p for p in (*bert.parameters(), *heads.parameters()) if p.dim() > 1]
    rest = [p for p in (*bert.parameters(), *heads.parameters()) if p.dim() == 1]
    optimizer = MTAdam(
        [{"params": decayed, "weight_decay": 0.01, "decoupled_weight_decay": True}, {"params": rest}],
        lr=1e-2,
    )
    make = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }[name]
    schedule = make(optimizer, num_warmup_steps=2, num_training_steps=12)
    ids = torch.randint(40, (6, 8))
    history, rates = [], []
    for _ in range(12):
        out = bert(input_ids=ids)
        given = {
            "sentence": nn.functional.cross_entropy(heads["sentence"](out.pooler_output), ids[:, 0] % 2),
            "word": 1000 * nn.functional.cross_entropy(heads["word"](out.last_hidden_state[:, 1]), ids[:, 1]),
        }
        optimizer.step(given)
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        history.append([loss.item() for loss in given.values()])
    assert all(last < 0.5 * first for first, last in zip(history[0], history[-1], strict=True))
    assert rates[:3] == [0.0, 5e-3, 1e-2] and rates[-1] < 2e-3
    trunk = optimizer.effective_weights(bert.encoder.layer[0].output.dense.weight)
    assert trunk["sentence"] == 1 and 0 < trunk["word"] < 0.05
    assert optimizer.grad_norms(heads["word"].weight)["sentence"] == 0
