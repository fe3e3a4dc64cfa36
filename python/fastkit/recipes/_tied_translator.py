"""The translator of ``run tied_embedding``: torch's transformer between three matrices, which may be tied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkit import ops
from fastkit.methods.tied_embedding import tie_embeddings, tie_three_way
from fastkit.recipes._experiment import read_model, write_checkpoint
from fastkit.recipes._parallel import Pairs

PAD, BEGIN, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
IGNORED = -100  # a target

# By which of the three matrices are one.
ARMS: Mapping[str, Callable[[Translator], object]] = {
    "untied": lambda model: model,
    "decoder": lambda model: tie_embeddings(model, input="target", output="scores"),
    "three_way": lambda model: tie_three_way(model, encoder="source", decoder="target", output="scores"),
}


class Translator(nn.Module):
    """Layers before which their norms are, 4 heads, learned positions, dropout of 0.1.

    The three matrices begin alike in all arms: normal, of the standard deviation 1 / sqrt(H), and embeddings
    are multiplied by sqrt(H).
    """

    def __init__(self, *, arm: str, vocabulary: int, hidden_size: int, layers: int, longest: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "arm": arm, "vocabulary": vocabulary, "hidden_size": hidden_size, "layers": layers,
            "longest": longest,
        }  # fmt: skip
        self.source: nn.Embedding = nn.Embedding(vocabulary, hidden_size)
        self.target: nn.Embedding = nn.Embedding(vocabulary, hidden_size)
        self.scores: nn.Linear = nn.Linear(hidden_size, vocabulary)
        self.source_places: nn.Embedding = nn.Embedding(longest, hidden_size)
        self.target_places: nn.Embedding = nn.Embedding(longest, hidden_size)
        options: dict[str, Any] = {
            "nhead": 4, "dim_feedforward": 2 * hidden_size, "dropout": 0.1, "batch_first": True,
            "norm_first": True,
        }  # fmt: skip
        self.encoder: nn.TransformerEncoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(hidden_size, **options),
            layers,
            nn.LayerNorm(hidden_size),
            enable_nested_tensor=False,
        )
        self.decoder: nn.TransformerDecoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(hidden_size, **options), layers, nn.LayerNorm(hidden_size)
        )
        self.dropout: nn.Dropout = nn.Dropout(0.1)
        for matrix in (self.source, self.target, self.scores):
            nn.init.normal_(matrix.weight, std=hidden_size**-0.5)
        for places in (self.source_places, self.target_places):
            nn.init.normal_(places.weight, std=0.02)  # small beside the words
        nn.init.zeros_(self.scores.bias)
        for layer in (*self.encoder.layers, *self.decoder.layers):  # which are copies of one
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        ARMS[arm](self)

    def _embedded(self, embedding: nn.Embedding, places: nn.Embedding, ids: Tensor) -> Tensor:
        scale = self.config["hidden_size"] ** 0.5
        at = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(scale * embedding(ids) + places(at))

    def encode(self, source: Tensor) -> Tensor:  # (B, S) -> (B, S, H)
        x = self._embedded(self.source, self.source_places, source)
        return self.encoder(x, src_key_padding_mask=source == PAD)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        """From what was before each place; padding is after all that counts."""
        later = torch.ones(2 * target.shape[1:], dtype=torch.bool, device=target.device).triu(1)
        y = self._embedded(self.target, self.target_places, target)
        return self.decoder(y, memory, tgt_mask=later, memory_key_padding_mask=source == PAD)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(self.encode(source), source, target)

    def loss(self, source: Tensor, target: Tensor, following: Tensor, *, reduction: Any = "mean") -> Tensor:
        """The cross entropy of ``following``, the pieces after those of ``target``; IGNORED are left out."""
        return ops.linear_cross_entropy(
            self(source, target), self.scores.weight, following, linear_bias=self.scores.bias,
            reduction=reduction, ignore_index=IGNORED,
        )  # fmt: skip

    @torch.no_grad()
    def translate(self, source: Tensor) -> Tensor:  # (B, S) -> (B, at most longest)
        """The likeliest piece each time, until </s>; after it there is padding."""
        memory = self.encode(source)
        found = torch.full((len(source), 1), BEGIN)
        ended = torch.zeros(len(source), dtype=torch.bool)
        while found.shape[1] <= self.config["longest"] and not ended.all():
            h = self.decode(memory, source, found)[:, -1]
            piece = self.scores(h).argmax(-1).masked_fill(ended, PAD)
            ended |= piece == END
            found = torch.cat([found, piece[:, None]], 1)
        return found[:, 1:]


def joint_tokenizer(pairs: Pairs, pieces: int) -> Any:
    """Byte pairs that are learnt on both languages; of tokenizers."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as Joined
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = Joined()
    trainer = BpeTrainer(vocab_size=pieces, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_translator(path: Path, model: Translator, tokenizer: Any) -> None:
    state = {"config": model.config, "tokenizer": tokenizer.to_str(), "state_dict": model.state_dict()}
    write_checkpoint(path, state)


def load_translator(path: Path) -> tuple[Translator, Any]:
    """The model of a ``models/test-ARM-SEED`` of the task ``translation``, in eval, and its tokenizer."""

    def build(state: dict[str, Any]) -> tuple[Translator, Any]:
        from tokenizers import Tokenizer

        model = Translator(**state["config"])
        model.load_state_dict(state["state_dict"])
        return model.eval(), Tokenizer.from_str(state["tokenizer"])

    return read_model(path, "tied_embedding", build)


def padded(rows: Iterable[list[int]], filling: int) -> Tensor:
    """(N, longest)."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=filling
    )
