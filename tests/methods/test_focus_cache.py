"""methods.focus, token by token: FocusCache, generate() with it, and what it refuses."""

import statistics
import time
from dataclasses import fields

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastkit.methods.focus import FocusCache, FocusConfig, FocusForCausalLM, FocusModel  # noqa: E402

OPTIONS = [
    {},
    {"coefficients": "constant"},
    {"share_global_conv": False},
    {"kernel_length": None},
    {"num_attention_heads": 2, "position": "rotary", "num_filters": 2},
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def language_model(**changed):
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "qk_size": 8,
        "attn_chunk": 8, "bin_length": 12, "pool": 4, "filter_hidden": 5, "kernel_length": 20,
        "pad_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    return FocusForCausalLM(FocusConfig(**{**sizes, **changed})).eval()


def prompts(*lengths, left=True):
    """Rows of tokens, padded at one side to the longest; and their mask."""
    longest = max(lengths)
    tokens, mask = torch.randint(1, 20, (len(lengths), longest)), torch.zeros(len(lengths), longest).long()
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length :] = 1
    if not left:
        mask = mask.flip(1)
    return tokens * mask, mask


@pytest.mark.parametrize("first", [1, 8, 12, 29])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_logits_are_those_of_the_whole(options, first):
    """At every place: the first tokens in parallel, then one, some, and one by one."""
    model, tokens = language_model(**options), torch.randint(0, 20, (2, 50))
    expected = model(tokens, use_cache=False).logits
    cache, found = None, []
    for piece in tokens.split([first, 1, 5, *[1] * (44 - first)], 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_padded_rows_go_on_as_each_does_alone(options, left):
    model = language_model(**options)
    tokens, mask = prompts(30, 17, 1, 24, left=left)
    more = torch.randint(1, 20, (4, 26))
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    found = [model(token[:, None], past_key_values=cache).logits for token in more.unbind(1)]
    for row, (prompt, kept) in enumerate(zip(tokens, mask.bool(), strict=True)):
        alone = model(torch.cat([prompt[kept], more[row]])[None]).logits[0, -26:]
        torch.testing.assert_close(torch.cat(found, 1)[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.5},
    ],
)
def test_generate_gives_the_same_as_without(options, how):
    model = language_model(**options)
    tokens, mask = prompts(11, 4, 1)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        more = {"max_new_tokens": 30, "use_cache": use_cache, **how}
        found.append(model.generate(tokens, attention_mask=mask, **more))
    assert torch.equal(*found)
    assert len(found[0][:, 11:].unique()) > 3  # it is not one token again and again


def test_generate_computes_each_token_once(monkeypatch):
    model, widths = language_model(), []
    forward = FocusModel.forward

    def counted(self, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(FocusModel, "forward", counted)
    model.generate(torch.randint(1, 20, (2, 9)), max_new_tokens=6)
    assert widths == [9, 1, 1, 1, 1, 1]


def test_generate_goes_on_from_a_prompt_that_is_cached():
    model, tokens = language_model(), torch.randint(1, 20, (1, 40))
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        cache = model(tokens[:, :25], use_cache=True).past_key_values
    found = model.generate(tokens, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)


def elements(cache):
    tensors = [getattr(state, field.name) for state in cache.states for field in fields(state)]
    return sum(t.numel() for t in [*tensors, cache.history] if t is not None)


@pytest.mark.parametrize("tokens", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_memory_and_time_do_not_grow(tokens):
    model = language_model()
    cache = model(torch.randint(0, 20, (1, 1)), use_cache=True).past_key_values
    before, seconds = elements(cache), []
    for token in torch.randint(0, 20, (tokens, 1, 1)):
        start = time.perf_counter()
        model(token, past_key_values=cache)
        seconds.append(time.perf_counter() - start)
    assert elements(cache) == before
    assert cache.get_seq_length() == tokens + 1
    if tokens == 10_000:
        assert statistics.median(seconds[-1000:]) < 1.5 * statistics.median(seconds[100:1100])


@torch.no_grad()
def test_places_are_counted_in_half_precision_too():
    model, tokens = language_model().to(torch.bfloat16), torch.randint(0, 20, (1, 301))
    cache = model(tokens, use_cache=True).past_key_values
    assert cache.places.tolist() == [301]
    logits = model(tokens[:, :1], past_key_values=cache).logits
    expected = model(torch.cat([tokens, tokens[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@torch.no_grad()
def test_rows_are_moved():
    model, tokens = language_model(), torch.randint(0, 20, (3, 20))
    more = torch.randint(0, 20, (3, 14))

    def after(move, rows):
        cache = model(tokens, use_cache=True).past_key_values
        move(cache)
        logits = model(more[rows], past_key_values=cache).logits
        expected = model(torch.cat([tokens[rows], more[rows]], 1), use_cache=False).logits[:, 20:]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


@torch.no_grad()
def test_a_cache_that_is_reset_begins_anew():
    model, tokens = language_model(), torch.randint(0, 20, (2, 20))
    cache = FocusCache()
    assert cache.get_seq_length() == 0
    first = model(tokens, past_key_values=cache, use_cache=True)
    assert first.past_key_values is cache
    model(tokens[:, :3], past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(tokens, past_key_values=cache, use_cache=True)
    assert torch.equal(again.logits, first.logits)
    mine = FocusCache()
    model.train()(tokens, past_key_values=mine)  # one that is given is filled
    assert mine.get_seq_length() == 20


def test_it_is_made_where_it_is_of_use():
    model, tokens = language_model(), torch.randint(0, 20, (2, 20))
    assert isinstance(model(tokens).past_key_values, FocusCache)
    assert model(tokens, use_cache=False).past_key_values is None
    assert language_model(use_cache=False)(tokens).past_key_values is None
    assert model.train()(tokens).past_key_values is None
    paper = language_model(filtering="paper")
    assert paper(tokens).past_key_values is None
    packed = model.eval()(tokens[:1], position_ids=torch.arange(20)[None] % 10)
    assert packed.past_key_values is None


def test_it_refuses_what_it_cannot_do():
    model, tokens = language_model(), torch.randint(0, 20, (2, 20))
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match=r"^FocusCache: crop must be by 0 tokens, got 1; what came before"):
        cache.crop(1)
    cache.crop(0)
    mask = torch.ones(2, 23).long()
    mask[1, -1] = 0
    with pytest.raises(ValueError, match=r"^FocusModel: attention_mask must be 1 for tokens that go on from"):
        model(tokens[:, :3], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^FocusModel: the rows must be as many as the cache has, 2, got 3"):
        model(torch.zeros(3, 1).long(), past_key_values=cache)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens[:1], assistant_model=language_model(), max_new_tokens=2)
    with pytest.raises(
        TypeError, match=r"^FocusModel: past_key_values must be a FocusCache, got DynamicCache"
    ):
        model(tokens, past_key_values=transformers.DynamicCache())
