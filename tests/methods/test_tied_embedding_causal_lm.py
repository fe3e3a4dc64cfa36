"""patch_causal_lm: losses and gradients of transformers' models, without their logits; what it refuses."""

import copy
import importlib
import inspect
import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from fastkit import _native  # noqa: E402
from fastkit.methods.focus import FocusConfig, FocusForCausalLM  # noqa: E402
from fastkit.methods.tied_embedding import assert_tied, patch_causal_lm, unpatch_causal_lm  # noqa: E402

# By PEFT.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

V, H = 40, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # so that logits are no small numbers
}
GPT2 = {"n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": V, "initializer_range": 0.3}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPTIONS = {
    "GPT2": GPT2,
    "Llama": SIZES,
    "Gemma2": {**SIZES, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "Qwen2": SIZES,
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": H, "init_std": 0.3},
    "Phi": SIZES,  # whose head has a bias
    "Mixtral": {**SIZES, "num_local_experts": 2},
    "RecurrentGemma": {**{k: v for k, v in SIZES.items() if k not in ("head_dim", "max_position_embeddings")},
                       "num_hidden_layers": 3, "lru_width": H, "attention_window_size": 16,
                       "logits_soft_cap": 1.5},
    "Cohere": SIZES,
    "Granite": {**SIZES, "logits_scaling": 8.0},
}  # fmt: skip


def make(name="GPT2", **options):
    torch.manual_seed(0)
    if name == "Focus":
        sizes = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "kernel_length": 8}
        return FocusForCausalLM(FocusConfig(**sizes, attn_chunk=4, bin_length=8, qk_size=8))
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**{**OPTIONS[name], **options})
    return getattr(transformers, kind)(config)


def batch(number=0, rows=3, length=9):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(f'patch_causal_lm: {message}')}$")


# What it computes


@pytest.mark.parametrize(
    "name", ["GPT2", "Llama", "Gemma2", "RecurrentGemma", "Qwen2", "OPT", "Phi", "Mixtral", "Focus"]
)
def test_loss_gradients_and_the_rest_of_the_output(name):
    model = make(name).eval()
    own = make(name).eval()
    assert patch_causal_lm(model) is model
    options = {"output_hidden_states": True, "num_items_in_batch": torch.tensor(11)}
    for more in ({}, options, {"num_items_in_batch": 11}):
        found, expected = model(**batch(), **more), own(**batch(), **more)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        assert type(found) is type(expected) and found.logits is None
        assert set(found) == set(expected) - {"logits"}
        if more is options:
            for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(mine, theirs)
        model.zero_grad()
        own.zero_grad()
        found.loss.backward()
        expected.loss.backward()
        largest = max(p.grad.abs().max() for p in own.parameters() if p.grad is not None)
        for (key, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * largest.item(), msg=key)


def test_without_labels_it_is_the_models_own():
    model, own = patch_causal_lm(make()).eval(), make().eval()
    ids = batch()["input_ids"]
    assert torch.equal(model(ids).logits, own(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), own.generate(ids, **options))
    kept = model(ids, labels=ids, logits_to_keep=torch.arange(9))
    torch.testing.assert_close(kept.loss, model(ids, labels=ids).loss)
    assert kept.logits.shape == (3, 9, V)


def test_arguments_as_transformers_takes_them():
    model, own = patch_causal_lm(make()).eval(), make().eval()
    given = batch()
    ids, labels = given["input_ids"], given["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    calls = [
        lambda m: m(**given, return_dict=False),
        lambda m: m(ids, None, torch.ones_like(ids), labels=labels),  # by position
        lambda m: m(ids, labels=labels, shift_labels=shifted),
        lambda m: m(ids, labels=labels, shift_labels=shifted.flatten()),
        lambda m: m(ids, labels=labels.clamp(min=0), ignore_index=0),
        lambda m: m(inputs_embeds=m.transformer.wte(ids), labels=labels.int().long(), use_cache=False),
    ]
    for call in calls:
        found, expected = call(model), call(own)
        assert type(found) is type(expected)
        torch.testing.assert_close(found[0], expected[0])
    own.config.return_dict = model.config.return_dict = False
    assert isinstance(model(**given), tuple)
    with pytest.raises(
        ValueError, match=r"forward: labels must be a token for each of \(3, 9\), got \(3, 8\)"
    ):
        model(ids, labels=labels, shift_labels=shifted[:, 1:])


def test_twenty_steps_are_those_of_the_model_as_it_was():
    """In float32 the two round otherwise.

    A step's gradient differs by some roundings of its largest entry, here 64; what weights differ by grows by
    no more than twice in these steps: 2 * 20 steps * rate * 64 eps * the largest gradient.
    """
    rate, largest, models = 0.05, 0.0, []
    for patched in (False, True):
        model = make()
        if patched:
            patch_causal_lm(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        losses = []
        for number in range(20):
            optimizer.zero_grad()
            loss = model(**batch(number % 3)).loss
            loss.backward()
            largest = max(largest, *(p.grad.abs().max().item() for p in model.parameters()))
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        models.append(model)
    allowed = 2 * 20 * rate * 64 * torch.finfo(torch.float32).eps * largest
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).abs().max() <= allowed
    assert_tied(models[1])


def test_half_precision_is_nearer_to_the_truth_than_logits_are():
    """Of which the model's own are rounded to bfloat16 first."""
    exact = make().double()
    exact.load_state_dict({k: v.bfloat16().double() for k, v in make().state_dict().items()})
    model, given = patch_causal_lm(make().bfloat16()), batch()
    with torch.no_grad():
        hidden = model.transformer(given["input_ids"]).last_hidden_state
        z = hidden.double() @ model.lm_head.weight.double().T
        target = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:].flatten()
        truth = torch.nn.functional.cross_entropy(z.flatten(0, 1), target)
        found = model(**given).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)


def test_autocast():
    model, own = patch_causal_lm(make()), make()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(**batch()).loss, own(**batch()).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert model.lm_head.weight.grad.dtype == torch.float32


# As a patch


def test_a_copy_trains_its_own_weights():
    model = patch_causal_lm(make())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    expected = unpatch_causal_lm(copy.deepcopy(other))(**batch()).loss
    found = other(**batch()).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in model.parameters())
    assert other.lm_head.weight.grad is other.transformer.wte.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo
@pytest.mark.skipif(_native.REASON is not None, reason=str(_native.REASON))
def test_it_compiles_whole():
    model = patch_causal_lm(make("Llama"))
    expected = model(**batch(), use_cache=False).loss
    expected.backward()
    gradient, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**batch(), use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_weights_that_are_given_for_a_call():
    """As plain tensors, in the place of parameters."""
    model, given = patch_causal_lm(make()).eval(), batch()
    weights = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, weights, (), given)
    assert found.logits is None
    expected = torch.func.functional_call(make().eval(), weights, (), given).loss
    torch.testing.assert_close(found.loss, expected)


def test_replicas_of_data_parallel_compute_with_their_own_weights(monkeypatch):
    """As nn.DataParallel makes them, with each weight scaled where it is to be copied to another GPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    replicate = module.replicate

    def scaled(tensors, devices, detach=False):
        return [[(1 + number) * t for t in tensors] for number in range(len(devices))]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", scaled)
    model, own, given = patch_causal_lm(make()).eval(), make().eval(), batch()
    for other in (model, copy.deepcopy(model)):
        for mine, theirs in zip(replicate(other, [0, 1]), replicate(own, [0, 1]), strict=True):
            found, expected = mine(**given), theirs(**given)
            assert found.logits is None
            torch.testing.assert_close(found.loss, expected.loss)
        found.loss.backward()
        own.zero_grad()
        expected.loss.backward()
        torch.testing.assert_close(other.lm_head.weight.grad, own.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
    assert replicate(unpatch_causal_lm(model), [0])[0](**given).logits is not None


def test_a_pickled_model_comes_back_unpatched_and_may_be_patched_again(tmp_path):
    torch.save(patch_causal_lm(make()), tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert model(**batch()).logits is not None
    assert patch_causal_lm(model)(**batch()).logits is None
    assert unpatch_causal_lm(model)(**batch()).logits is not None


def test_signature_state_and_the_way_back(tmp_path):
    model, own = make(), make()
    keys = list(model.state_dict())
    patch_causal_lm(model)
    assert inspect.signature(model.forward) == inspect.signature(own.forward)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded(**batch()).logits is not None and model(**batch()).logits is None
    with refused(RuntimeError, "the model is patched already; call unpatch_causal_lm(model) first"):
        patch_causal_lm(model)
    assert unpatch_causal_lm(model) is model
    assert vars(model).keys() == vars(own).keys() and model(**batch()).logits is not None
    with pytest.raises(RuntimeError, match=r"^unpatch_causal_lm: the model is not patched$"):
        unpatch_causal_lm(model)


def test_the_probe_leaves_no_trace():
    model = make(resid_pdrop=0.5)
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    patch_causal_lm(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_adapters_of_peft_below_the_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped, own = peft.get_peft_model(make(), config), peft.get_peft_model(make(), config)
    with refused(TypeError, "model must be one of transformers, got PeftModel; give model.get_base_model()"):
        patch_causal_lm(wrapped)
    patch_causal_lm(wrapped.get_base_model())
    own.load_state_dict(wrapped.state_dict())
    found, expected = wrapped(**batch()).loss, own(**batch()).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert any(p.grad.any() for p in wrapped.parameters() if p.grad is not None)


# What it refuses


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Cohere", {}, "CohereForCausalLM must have the logits of its head, got them scaled by"
         " config.logit_scale=0.0625; leave it as it is"),
        ("Granite", {}, "GraniteForCausalLM must have the logits of its head, got them scaled by"
         " config.logits_scaling=8.0; leave it as it is"),
        ("Mixtral", {"output_router_logits": True}, "MixtralForCausalLM must have no loss of its router,"
         " got output_router_logits=True, with which that is added; set it to False, or leave the model as it"
         " is"),
    ],
)  # fmt: skip
def test_models_that_do_more_are_refused_by_what_they_say(name, options, message):
    model = make(name, **options)
    with refused(ValueError, message):
        patch_causal_lm(model)
    assert "forward" not in vars(model)


def test_models_that_do_more_are_refused_by_what_they_compute():
    gpt2 = type(make())

    class Scaled(gpt2):
        def forward(self, input_ids, labels=None, **kwargs):
            made = super().forward(input_ids, **kwargs)
            made.logits = made.logits / 8
            made.loss = self.loss_function(made.logits, labels, vocab_size=V)
            return made

    class Penalised(gpt2):
        def forward(self, input_ids, labels=None, **kwargs):
            made = super().forward(input_ids, labels=labels, **kwargs)
            made.loss = made.loss + 1e-3 * self.lm_head.weight.square().sum()
            return made

    class Uncounted(gpt2):
        def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
            return super().forward(input_ids, labels=labels, **kwargs)

    class Masked(gpt2):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    kinds = ((Scaled, "logit"), (Penalised, "loss"), (Uncounted, "loss"), (Masked, "loss"))
    for kind, what in kinds:
        model = kind(make().config)
        message = rf"{kind.__name__} must compute the cross entropy of its head's logits .* got a {what} of "
        with pytest.raises(ValueError, match=message):
            patch_causal_lm(model)
        assert "forward" not in vars(model)
    sizes = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=V, is_decoder=True)
    with pytest.raises(ValueError, match=r"BertLMHeadModel must compute .* got a logit of"):  # a transform
        patch_causal_lm(transformers.BertLMHeadModel(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_other_loss(dtype):
    """However large its logits are, whose rounding is in both."""
    gpt2 = type(make())

    class Penalised(gpt2):
        def forward(self, input_ids, labels=None, **kwargs):
            made = super().forward(input_ids, labels=labels, **kwargs)
            if labels is not None:
                made.loss = made.loss + 1e-4 * made.logits.float().logsumexp(-1).square().mean()
            return made

    class Scaled(gpt2):
        def forward(self, input_ids, labels=None, **kwargs):
            made = super().forward(input_ids, **kwargs)
            made.logits = made.logits * 1.05
            made.loss = self.loss_function(made.logits, labels, vocab_size=V)
            return made

    for kind, what in ((Penalised, "loss"), (Scaled, "logit"), (gpt2, None)):
        torch.manual_seed(0)
        model = kind(make().config)
        nn.init.normal_(model.lm_head.weight, std=4)
        model.to(dtype)
        if what is None:
            assert patch_causal_lm(model)(**batch()).logits is None
            continue
        with pytest.raises(ValueError, match=rf"{kind.__name__} must compute .* got a {what} of "):
            patch_causal_lm(model)


def test_what_becomes_of_a_model_later_is_refused_in_its_calls():
    """Not passed over."""
    model = patch_causal_lm(make("Mixtral"))
    with pytest.raises(ValueError, match="MixtralForCausalLM must have no loss of its router"):
        model(**batch(), output_router_logits=True)
    model = patch_causal_lm(make())
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match="must have the loss ForCausalLMLoss, got <lambda>"):
        model(**batch())
    del model._loss_function
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="the head must have no hooks, for it is not called"):
        model(**batch())
    handle.remove()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"must be a plain nn\.Linear, got torch\.nn\.\S*Sequential; merge"):
        model(**batch())


class DTensor(torch.Tensor):
    """By its name."""


def test_heads_and_models_that_are_refused():
    with refused(TypeError, "model must be one of transformers, got Linear"):
        patch_causal_lm(nn.Linear(2, 2))
    sizes = {"d_model": H, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": V}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with refused(ValueError, "T5ForConditionalGeneration must be a causal language model, got an encoder"
                 " and a decoder"):  # fmt: skip
        patch_causal_lm(t5)
    with refused(ValueError, "GPT2Model must have a model below its head, got none"):
        patch_causal_lm(make().transformer)
    with refused(RuntimeError, "the model must be in memory, got it on the meta device; load it first"):
        patch_causal_lm(make().to("meta"))
    model = make()
    model.forward = lambda *args, **kwargs: None
    with refused(RuntimeError, "forward of the model must be that of GPT2LMHeadModel, got one that was put in"
                 " its place (by accelerate or another patch?); patch the model before"):  # fmt: skip
        patch_causal_lm(model)
    model = make()
    model.lm_head._parameters["weight"] = torch.randn(V, H).as_subclass(DTensor)
    with refused(TypeError, "the weight of the head is a DTensor; leave the head in the group of the whole"
                 " model, whose forward gathers it, or pass weight.full_tensor() to"
                 " fastkit.ops.linear_cross_entropy"):  # fmt: skip
        patch_causal_lm(model)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    model = peft.get_peft_model(make(tie_word_embeddings=False), config).get_base_model()
    with refused(TypeError, "the head must be a plain nn.Linear, got peft.tuners.lora.layer.Linear; merge or"
                 " unload the adapter, dequantise it, or call unpatch_causal_lm(model)"):  # fmt: skip
        patch_causal_lm(model)


def test_fsdp2_gathers_the_head_with_the_model():
    """And a head that is sharded by itself is refused."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        own = make()
        expected = own(**batch()).loss
        expected.backward()
        model = patch_causal_lm(make())
        fully_shard(model, mesh=mesh)
        found = model(**batch()).loss
        found.backward()
        torch.testing.assert_close(found, expected)
        gradient = model.lm_head.weight.grad.full_tensor()
        torch.testing.assert_close(gradient, own.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
        assert model.lm_head.weight is model.transformer.wte.weight
        apart = patch_causal_lm(make(tie_word_embeddings=False))
        fully_shard(apart.lm_head, mesh=mesh)
        fully_shard(apart, mesh=mesh)
        with pytest.raises(
            TypeError, match="the weight of the head is a DTensor; leave the head in the group"
        ):
            apart(**batch())
    finally:
        torch.distributed.destroy_process_group()
