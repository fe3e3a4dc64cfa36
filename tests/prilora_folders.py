"""Small models of transformers, their training with PRILoRA and with PEFT, and what is in a saved folder."""

import json

import pytest
import torch
from torch import nn

from fastkit.methods.prilora import PRILoRAConfig, apply_prilora

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, STATE = "prilora.json", "prilora_state.safetensors"
RAMP = {"rank_start": 2, "rank_final": 5, "interval": 2, "mode": "hard"}


def bert(**options):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=40,
            max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, n_positions=12, vocab_size=40, bos_token_id=0, eos_token_id=0
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=40
        )
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=40, max_position_embeddings=12,
        )
    )  # fmt: skip


MODELS = {"bert": bert, "gpt2": gpt2, "t5": t5, "llama": llama}


def fresh(make=bert, **options):
    torch.manual_seed(0)
    return make(**options).eval()


def trained(make=bert, *, model=None, seed=0, **options):
    """A handle whose parameters are all as after some training, masks and statistics included."""
    prilora = apply_prilora(model or fresh(make), PRILoRAConfig(**{**RAMP, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in prilora.layers.values():
            layer.lora_b.normal_(std=0.03)
            layer.input_square.uniform_()
            layer.mask.copy_(torch.rand(layer.mask.shape) < 0.7)
        for name in prilora.modules_to_save:
            for parameter in prilora.model.get_submodule(name).parameters():
                parameter.normal_(std=0.5)
    return prilora


@torch.no_grad()
def logits(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (3, 7), generator=generator)
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **decoder).logits


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def in_peft(folder, make=bert, **options):
    return peft.PeftModel.from_pretrained(fresh(make, **options), folder)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def tensors_of(folder):
    return safetensors_torch.load_file(folder / TENSORS)


class Net(nn.Module):
    """Names that end as others do, and that regular expressions read otherwise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "x(fc": nn.Linear(8, 8)}) for _ in "ab"
        )
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "ab")}
        )
        self.head = nn.Linear(8, 3)
        self.arrowhead = nn.Linear(3, 3)

    def forward(self, x):
        for block in [*self.layers, *self.decoder["layers"]]:
            for layer in block.values():
                x = layer(x).relu()
        return self.arrowhead(self.head(x))


def training(prilora):
    parameters = [p for p in prilora.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.01)


def run(prilora, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        ids = torch.randint(1, 40, (4, 6))
        optimizer.zero_grad()
        prilora.model.train()(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()


def made_by_peft(folder, make=bert, *, task="SEQ_CLS", **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type=task, **options)
    model = peft.get_peft_model(fresh(make), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model
