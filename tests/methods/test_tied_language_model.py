"""The paper's language models: their counts, steps, states, dropout, texts, and what they refuse."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastkit.methods.tied_embedding import (
    LSTMState,
    TiedLanguageModel,
    UntiedError,
    VariationalDropout,
    assert_tied,
    bptt_batches,
    retie,
    tie_embeddings,
    variational,
)
from fastkit.methods.tied_embedding.presets import PRESETS

pytestmark = pytest.mark.native

V, H = 11, 6
IDS = torch.tensor([[1, 5, 3, 3, 9, 0, 10], [0, 2, 7, 5, 5, 4, 1]])
NO_DROPOUT = {"word": 0.0, "input": 0.0, "hidden": 0.0, "output": 0.0}


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def made(**options):
    return TiedLanguageModel(V, H, init_range=0.5, **options).double()


def close(found, expected, bound=1e-12):
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def written_out(model, ids, state=None, masks=None):
    """The layers by their formulas, gate by gate and step by step.

    ``masks``: of each layer those of the input and the hidden state, (4, B, H) each.
    """
    x = model.embedding.weight[ids]
    last = []
    for layer in range(model.num_layers):
        of_input, of_hidden, bias, more = (
            getattr(model.lstm, f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, c = (x.new_zeros(len(ids), H),) * 2 if state is None else (each[layer] for each in state)
        outputs = []
        for t in range(ids.shape[1]):
            gates = []
            for gate in range(4):
                rows = slice(gate * H, (gate + 1) * H)
                x_t, h_t = x[:, t], h
                if masks is not None:
                    x_t, h_t = x_t * masks[layer][0][gate], h_t * masks[layer][1][gate]
                gates.append(x_t @ of_input[rows].T + h_t @ of_hidden[rows].T + (bias + more)[rows])
            i, f, g, o = gates
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        x = torch.stack(outputs, 1)
        last.append((h, c))
    return x, LSTMState(*(torch.stack(each) for each in zip(*last, strict=True)))


def untied_twin(model):
    """The same numbers in two matrices."""
    twin = made(projection=model.projection is not None)
    state = model.state_dict()
    state["output.weight"], state["output.bias"] = state["embedding.weight"], state.pop("embedding.bias")
    twin.load_state_dict(state)
    return twin


# What they are


@pytest.mark.parametrize(
    ("preset", "tie", "projection", "paper"),
    [
        ("small", False, False, 4_651_600),
        ("small", True, False, 2_651_600),
        ("small", False, True, 4_691_600),
        ("small", True, True, 2_691_600),
        ("large", False, False, 66_022_000),
        ("large", True, False, 51_022_000),
    ],
)
def test_parameters_are_the_papers_and_two_terms_more(preset, tie, projection, paper):
    with torch.device("meta"):
        model = TiedLanguageModel.from_preset(preset, tie=tie, projection=projection)
    words, size = 10_000, PRESETS[preset].hidden_size
    embeddings = words * size * (1 if tie else 2)
    lstm = 2 * 4 * (2 * size + 1) * size  # two layers, with one bias
    of_projection = size * size if projection else 0
    assert embeddings + words + lstm + of_projection == paper
    second_bias = 2 * 4 * size  # which the LSTM of torch has
    projection_bias = size if projection else 0  # p_b, which the paper does not count
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert sum(count for count, _ in counted) == paper + second_bias + projection_bias
    assert sum(count for count, trained in counted if trained) == paper + projection_bias
    with torch.device("meta"):
        formula = TiedLanguageModel.from_preset(preset, tie=tie, projection=projection, projection_bias=False)
    assert sum(each.numel() for each in formula.parameters() if each.requires_grad) == paper


def test_presets_are_those_of_the_papers_code():
    with torch.device("meta"):
        medium = TiedLanguageModel.from_preset("medium", tie=True)
        large = TiedLanguageModel.from_preset("large", vocab_size=50, dropout=VariationalDropout())
    assert (medium.hidden_size, medium.dropout, medium.lstm.dropout, medium.init_range) == (
        650,
        0.5,
        0.5,
        0.05,
    )
    assert large.dropout == VariationalDropout(word=0.3, input=0.5, hidden=0.3, output=0.5)
    assert large.embedding.weight.shape == (50, 1500) and large.lstm.dropout == 0
    rates = [PRESETS["small"].lr_of(epoch) for epoch in range(7)]
    assert rates == [1, 1, 1, 1, 1, 0.5, 0.25]  # as decay ** max(epoch - 4, 0)
    assert math.isclose(PRESETS["large"].lr_of(16), 1 / 1.15**2)


def test_initialisation_is_uniform_with_no_bias_in_the_layers():
    model = TiedLanguageModel(3000, 20, projection=True, init_range=0.2)
    for name, parameter in model.named_parameters():
        if name.startswith("lstm.bias"):
            assert not parameter.any()
        else:
            assert 0.1 < parameter.abs().max() <= 0.2, name
    entries = model.embedding.weight.detach()
    assert abs(entries.mean()) < 0.002  # 4 standard deviations of 0.2 / sqrt(3 * 60,000)
    assert math.isclose(entries.std(), 0.2 / math.sqrt(3), rel_tol=0.01)


def test_the_second_bias_of_a_layer_stays_zero():
    model = TiedLanguageModel(V, H, tie=True)
    before = model.lstm.bias_ih_l1.detach().clone()
    model.loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    for layer in range(2):
        bias = model.lstm.get_parameter(f"bias_hh_l{layer}")
        assert bias.grad is None and not bias.any()
    assert not torch.equal(model.lstm.bias_ih_l1, before)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("projection_bias", [True, False])
def test_forward_and_loss_are_the_formulas(tie, projection_bias):
    model = made(tie=tie, projection=True, projection_bias=projection_bias)
    ids, target = IDS[:, :-1], IDS[:, 1:]
    h, state = model(ids)
    expected, last = written_out(model, ids)
    close(h, expected)
    close(state.h, last.h)
    close(state.c, last.c)
    s, c = (model.get_output_embeddings().get_parameter(name) for name in ("weight", "bias"))
    projected = h @ model.projection.weight.T
    if projection_bias:
        projected = projected + model.projection.bias
    logits = projected @ s.T + c
    close(model.logits(h), logits)
    flat = logits.flatten(0, 1), target.flatten()
    for options in ({}, {"reduction": "sum"}, {"ignore_index": 5}, {"label_smoothing": 0.1}):
        close(model.loss(ids, target, **options)[0], cross_entropy(*flat, **options))
    weights = torch.rand(target.shape).double()
    each = cross_entropy(*flat, reduction="none").view_as(target)
    loss, _ = model.loss(ids, target, reduction="none", token_weight=weights)
    close(loss, each * weights)
    close(model.loss(ids.int(), target.int())[0], each.mean())


# Training


@pytest.mark.parametrize("projection", [False, True])
def test_a_tied_step_is_that_of_an_untied_twin_with_both_gradients(projection):
    model = made(tie=True, projection=projection)
    twin = untied_twin(model)
    before = model.embedding.weight.detach().clone()
    for each in (model, twin):
        loss, _ = each.loss(IDS[:, :-1], IDS[:, 1:], reduction="sum")
        (loss + each.penalty()).backward()
    halves = twin.embedding.weight.grad, twin.output.weight.grad
    assert all(half.abs().max() > 1e-3 for half in halves)
    assert not halves[0][6].any() and halves[1][6].any()  # a word that does not occur
    close(model.embedding.weight.grad, sum(halves))
    close(model.embedding.bias.grad, twin.output.bias.grad)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("embedding"):
            close(parameter.grad, twin.get_parameter(name).grad)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    close(model.embedding.weight.detach(), before - 0.1 * sum(halves))


def test_pieces_with_a_carried_state_are_one_long_run():
    model = made(tie=True)
    whole, last = model(IDS)
    losses, pieces, state = [], [], None
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        loss, after = model.loss(IDS[:, start:stop], IDS[:, start:stop], state, reduction="sum")
        h, _ = model(IDS[:, start:stop], state)
        assert not after.h.requires_grad and not after.c.requires_grad
        pieces.append(h)
        losses.append(loss)
        state = after
    close(torch.cat(pieces, 1), whole)
    close(state.h, last.h.detach())
    close(state.c, last.c.detach())
    close(sum(losses), model.loss(IDS, IDS, reduction="sum")[0])


def test_gradients_end_at_a_piece_unless_the_state_of_forward_is_given():
    model = made(tie=True)
    expected, _ = written_out(model, IDS)
    whole = torch.autograd.grad(expected[:, 3:].sum(), model.embedding.weight)[0]
    _, state = model(IDS[:, :3])
    h, _ = model(IDS[:, 3:], state)
    close(torch.autograd.grad(h.sum(), model.embedding.weight)[0], whole)
    _, state = model.loss(IDS[:, :3], IDS[:, :3])
    h, _ = model(IDS[:, 3:], state)
    truncated = torch.autograd.grad(h.sum(), model.embedding.weight)[0]
    assert not truncated[1].equal(whole[1])
    alone, _ = written_out(model, IDS[:, 3:], state)
    close(truncated, torch.autograd.grad(alone.sum(), model.embedding.weight)[0])


def test_a_text_is_cut_into_rows_and_pieces():
    pieces = list(bptt_batches(torch.arange(23), 2, 4))
    assert [tuple(ids.shape) for ids, _ in pieces] == [(2, 4), (2, 4), (2, 2)]
    ids, targets = (torch.cat(each, 1) for each in zip(*pieces, strict=True))
    assert ids.tolist() == [list(range(10)), list(range(11, 21))]
    assert torch.equal(targets, ids + 1)
    (only,) = bptt_batches(torch.arange(2), 1, 100)
    assert [each.tolist() for each in only] == [[[0]], [[1]]]


def test_perplexity_falls_and_is_that_of_the_loss():
    tokens = torch.arange(240) * 3 % V
    model = TiedLanguageModel(V, 12, tie=True, projection=True, dropout=0.1, init_range=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = model.perplexity(tokens)
    assert 0.8 * V < before < 1.3 * V
    for _ in range(12):
        state = None
        for ids, target in bptt_batches(tokens, 4, 10):
            loss, state = model.loss(ids, target, state, reduction="sum")
            optimizer.zero_grad()
            (loss / len(ids) + model.penalty(len(ids))).backward()
            optimizer.step()
    after = model.perplexity(tokens)
    assert after < before / 4  # each word tells the next
    assert model.training and model.lstm.training
    model = model.double().eval()
    expected = model.loss(tokens[None, :-1], tokens[None, 1:])[0].exp().item()
    for steps in (1, 7, 256):
        assert math.isclose(model.perplexity(tokens, steps=steps), expected, rel_tol=1e-12)
    rows = tokens.view(4, 60)
    expected = model.loss(rows[:, :-1], rows[:, 1:])[0].exp().item()
    assert math.isclose(model.perplexity(tokens, batch_size=4), expected, rel_tol=1e-12)
    with torch.no_grad():
        model.embedding.bias[1] = -1e5
    assert model.perplexity(tokens) == math.inf


# Dropout


def test_dropout_is_drawn_for_each_step_scaled_and_off_in_eval():
    model = made(dropout=0.5)
    assert model.lstm.dropout == 0.5  # between layers
    ids = torch.randint(V, (8, 50))
    one, other = model(ids)[0], model(ids)[0]
    for h in (one, other):
        zeros = h == 0
        assert 0.45 < zeros.double().mean() < 0.55  # 4.9 standard deviations of 2400 draws
        assert (zeros != zeros[:, :1]).any()  # another mask each step
    assert not torch.equal(one, other)
    model.eval()
    close(model(ids)[0], written_out(model, ids)[0])


def test_dropout_after_the_embedding_is_scaled():
    """Seen through a layer whose one step is h = sigmoid(0) tanh(sigmoid(0) tanh(x))."""
    model = made(dropout=0.5, num_layers=1)
    with torch.no_grad():
        model.embedding.weight.fill_(1)
        for parameter in model.lstm.parameters():
            parameter.zero_()
        model.lstm.weight_ih_l0[2 * H : 3 * H] = torch.eye(H)
    h = model(torch.zeros(400, 1).long())[0].flatten()
    kept = 2 * 0.5 * math.tanh(0.5 * math.tanh(2.0))  # by both places, which double it
    assert ((h == 0) | ((h - kept).abs() < 1e-12)).all()
    assert 0.2 < (h != 0).double().mean() < 0.3  # 5.6 standard deviations of 2400 draws


def recorded(monkeypatch):
    """The masks that are drawn."""
    masks, draw = [], variational.mask

    def mask(*arguments):
        masks.append(draw(*arguments))
        return masks[-1]

    monkeypatch.setattr(variational, "mask", mask)
    return masks


@pytest.mark.parametrize("per_gate", [True, False])
def test_variational_masks_stay_for_a_sequence(monkeypatch, per_gate):
    """Also on the hidden state between steps; gates have masks of their own, or one."""
    masks = recorded(monkeypatch)
    shares = {**NO_DROPOUT, "input": 0.5, "hidden": 0.3}
    model = made(dropout=VariationalDropout(**shares, per_gate=per_gate))
    start = LSTMState(*torch.randn(2, 2, 2, H).double())
    h, state = model(IDS, start)
    drawn = [each for each in masks if each is not None]
    gates = 4 if per_gate else 1
    assert [tuple(each.shape) for each in drawn] == [(gates, 2, H)] * 4
    for place, share in zip(drawn, (0.5, 0.3) * 2, strict=True):
        assert set(place.unique().tolist()) <= {0.0, 1 / (1 - share)}
    layers = [[each.expand(4, 2, H) for each in drawn[n : n + 2]] for n in (0, 2)]
    expected, last = written_out(model, IDS, start, layers)
    close(h, expected)
    close(state.h, last.h)
    close(state.c, last.c)
    h.sum().backward()
    for parameter in (each for each in model.lstm.parameters() if each.requires_grad):
        alone = torch.autograd.grad(expected.sum(), parameter, retain_graph=True)[0]
        close(parameter.grad, alone)
    first = [each.clone() for each in drawn]
    masks.clear()
    model(IDS)
    again = [each for each in masks if each is not None]
    assert not all(map(torch.equal, first, again))  # anew in each call
    model.eval()
    masks.clear()
    close(model(IDS, start)[0], written_out(model, IDS, start)[0])
    assert masks == []


def test_variational_dropout_of_nothing_is_none():
    model = made(tie=True, dropout=VariationalDropout(**NO_DROPOUT))
    loss = model.loss(IDS[:, :-1], IDS[:, 1:])[0]
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain = model.eval().loss(IDS[:, :-1], IDS[:, 1:])[0]
    plain.backward()
    close(loss, plain)
    assert all(found[name] is None for name in ("lstm.bias_hh_l0", "lstm.bias_hh_l1"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(found[name], parameter.grad)


def test_a_word_is_dropped_wherever_it_occurs_in_its_row():
    ids = torch.randint(5, (40, 30))
    words = variational.word_mask(ids, torch.zeros(1).double(), 0.4)
    assert words.shape == (40, 30, 1)
    assert set(words.unique().tolist()) == {0.0, 1 / 0.6}
    by_word = torch.stack([words[row, ids[row] == word].amax() for row in range(40) for word in range(5)])
    least = torch.stack([words[row, ids[row] == word].amin() for row in range(40) for word in range(5)])
    assert torch.equal(by_word, least)
    assert 0.45 < (by_word > 0).double().mean() < 0.75  # 4.3 standard deviations of 200 draws
    by_row = by_word.view(40, 5)
    assert (by_row != by_row[:1]).any()  # rows are apart

    model = made(dropout=VariationalDropout(**{**NO_DROPOUT, "word": 0.5}))
    with torch.no_grad():
        model.embedding.weight.fill_(1)
    first = model(torch.arange(V)[:, None])[0][:, 0]
    zeros, doubles = (written_out(shifted, torch.zeros(1, 1).long())[0][0, 0] for shifted in scaled(model))
    for row in first:
        assert torch.allclose(row, zeros, atol=1e-12) or torch.allclose(row, doubles, atol=1e-12)


def scaled(model):
    """The model with embeddings of 0, and with twice its own."""
    for factor in (0, 2):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.embedding.weight.mul_(factor)
        yield other


def test_the_output_mask_is_one_for_all_steps():
    model = made(dropout=VariationalDropout(**{**NO_DROPOUT, "output": 0.75}))
    h, state = model(IDS)
    plain, last = written_out(model, IDS)
    ratio = h / plain
    assert torch.equal(ratio.round(), ratio.round()[:, :1].expand_as(ratio))
    close(ratio, 4 * (ratio > 2).double())
    close(state.h, last.h)  # the state is whole


# Generation


def test_generation_is_drawn_from_the_softmax():
    model = made(tie=True, projection=True, dropout=0.5)
    model.lstm.eval()

    def text(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(IDS, 12, generator=generator, **options)

    one = text(0)
    assert one.shape == (2, 19) and torch.equal(one[:, :7], IDS)
    assert torch.equal(text(0), one) and not torch.equal(text(1), one)
    assert (one >= 0).all() and (one < V).all()
    assert model.training and not model.lstm.training  # as they were
    assert model.generate(IDS.int(), 2).dtype == torch.int32
    assert torch.equal(model.generate(IDS, 0), IDS)

    greedy = model.generate(IDS, 5, temperature=0)
    for temperature in (1e-6, 1e-320):
        assert torch.equal(text(3, temperature=temperature), model.generate(IDS, 12, temperature=0))
    model.eval()
    for t in range(7, 12):
        logits = model.logits(written_out(model, greedy[:, :t])[0][:, -1])
        assert torch.equal(logits.argmax(-1), greedy[:, t])

    rows = IDS[:1].expand(4000, 7)
    drawn = model.generate(rows, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, -1]
    shares = torch.softmax(model.logits(model(IDS[:1])[0][:, -1]) / 2, -1)[0].detach()
    found = torch.bincount(drawn, minlength=V) / 4000
    bound = 5 * (shares * (1 - shares) / 4000).sqrt()  # standard deviations
    assert ((found - shares).abs() < bound).all()


# Ties


def test_it_is_tied_as_it_is_made():
    model = made(tie=True)
    assert_tied(model)
    assert retie(model) is model
    assert_tied(copy.deepcopy(model))
    model.to("meta").to_empty(device="cpu")
    assert_tied(model)
    untied = made()
    with refused(UntiedError, "assert_tied: embedding and output must have one weight, got two; call"
                 " retie(model)"):  # fmt: skip
        assert_tied(untied)
    with refused(ValueError, "retie: TiedLanguageModel must have been tied before, got one that was not; call"
                 " tie_embeddings(model)"):  # fmt: skip
        retie(untied)
    assert_tied(tie_embeddings(untied))
    with refused(
        ValueError,
        "TiedLanguageModel: a model that is saved must be tied when it is made, got one that was tied after;"
        " make it with tie=True, and load its embedding, layers and bias",
    ):
        untied.save_pretrained("nowhere")


# Refusals


def test_refusals():
    op = "TiedLanguageModel"
    refusals = [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size must be an integer, got 2.0"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"tie": "yes"}, TypeError, "tie must be True or False, got 'yes'"),
        ({"projection": nn.Linear(2, 2)}, TypeError, "projection must be True or False, got"
         " Linear(in_features=2, out_features=2, bias=True)"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"init_range": 0}, ValueError, "init_range must be positive and finite, got 0"),
        ({"pr_norm": "l2"}, ValueError, "pr_norm must be one of 'code', 'paper', got 'l2'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating point and real, got torch.int8"),
    ]  # fmt: skip
    for options, error, message in refusals:
        with refused(error, f"{op}: {message}"):
            TiedLanguageModel(**{"vocab_size": V, "hidden_size": H, **options})
    with refused(ValueError, f"{op}: name must be one of 'small', 'medium', 'large', got 'huge'"):
        TiedLanguageModel.from_preset("huge")
    with refused(ValueError, "VariationalDropout: hidden must be in [0, 1), got -0.1"):
        VariationalDropout(hidden=-0.1)
    with refused(TypeError, "VariationalDropout: per_gate must be True or False, got 4"):
        VariationalDropout(per_gate=4)

    for model in (made(tie=True), made()):
        _, state = model(IDS)
        calls = [
            (IDS.double(), None, TypeError, "ids must be int64 or int32, got torch.float64; they are words"),
            (IDS[0], None, ValueError, "ids must have shape (B, T), with a row and a word at least, got"
             " (7,)"),
            (IDS[:, :0], None, ValueError, "ids must have shape (B, T), with a row and a word at least, got"
             " (2, 0)"),
            (IDS + 1, None, RuntimeError, "ids must be in [0, 11), got 11"),
            (IDS - 1, None, RuntimeError, "ids must be in [0, 11), got -1"),
            (IDS[:1], state, ValueError, "state must be (h, c) of shape (2, 1, 6), got (2, 2, 6), (2, 2, 6);"
             " give the one of an earlier call with as many rows"),
        ]  # fmt: skip
        for ids, given, error, message in calls:
            with refused(error, f"{op}: {message}"):
                model(ids, given)
        with pytest.raises(ValueError, match="linear_cross_entropy: target must"):
            model.loss(IDS, IDS[:, 1:])
        for temperature in (-1.0, math.inf, math.nan):
            message = f"temperature must be finite and not negative, got {temperature}; 0 takes the likeliest"
            with refused(ValueError, f"{op}: {message} word"):
                model.generate(IDS, 1, temperature=temperature)
        with refused(ValueError, f"{op}: n must be at least 0, got -1"):
            model.generate(IDS, -1)
        with refused(ValueError, "bptt_batches: tokens must have shape (N,) with 2 words at least for each of"
                     " 1 rows, got (1,)"):  # fmt: skip
            model.perplexity(torch.zeros(1).long())
    with refused(ValueError, "bptt_batches: steps must be at least 1, got 0"):
        bptt_batches(torch.arange(9), 1, 0)
