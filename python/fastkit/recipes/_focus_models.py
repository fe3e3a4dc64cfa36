"""The models of ``run focus``: Focus with adaptive or constant filters, and attention in chunks alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastkit._command import Refusal
from fastkit.nn.adaptive_iir import Parameterization
from fastkit.recipes._experiment import read_model, write_checkpoint

ArmName = Literal["focus", "constant", "transformer", "full"]
ARMS: tuple[ArmName, ...] = ("focus", "constant", "transformer")  # full: of a LanguageModel alone
POOL = 8  # cells of a bin


class ChunkedTransformer(nn.Module):
    """A transformer that sees nothing beyond a chunk: PyTorch's encoder layers, causal, and a norm.

    Args:
        hidden_size: C, the width of x; with 4 heads, or fewer where 4 does not divide it.
        intermediate_size: width of the feed-forward layers.
        layers: how many.
        attn_chunk: tokens of a chunk, each with a learned position.
    """

    later: Tensor  # of a chunk's pairs, those whose key comes after the query

    def __init__(self, hidden_size: int, *, intermediate_size: int, layers: int, attn_chunk: int) -> None:
        super().__init__()
        self.attn_chunk = attn_chunk
        self.positions: nn.Parameter = nn.Parameter(torch.randn(attn_chunk, hidden_size))
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size,
                math.gcd(4, hidden_size),
                intermediate_size,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(hidden_size)
        later = torch.ones(attn_chunk, attn_chunk, dtype=torch.bool).triu(1)
        self.register_buffer("later", later, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        M = min(self.attn_chunk, T)
        # What a short last chunk is filled up with comes after its tokens: none of them sees it.
        h = pad(x, (0, 0, 0, -T % M)).unflatten(1, (-1, M)) + self.positions[:M]
        h = h.flatten(0, 1)  # (B chunks, M, C)
        for layer in self.layers:
            h = layer(h, src_mask=self.later[:M, :M], is_causal=True)
        return self.norm(h.unflatten(0, (B, -1)).flatten(1, 2)[:, :T])


class SeriesClassifier(nn.Module):
    """Classifies series by the mean of what an arm makes of their samples.

    ::

        h = Linear(the last kernel samples);  logits = Linear(mean of body(h))

    The mean is over each series' own length. Everything before it is causal, so that what stands behind the
    end of a series, NaN included, changes nothing.

    Args:
        inputs: channels of a series.
        classes: how many.
        arm: ``"focus"`` or ``"constant"``: a ``FocusForSequenceClassification`` with adaptive coefficients,
            or with constant ones and so without the global convolution; ``"transformer"``: a
            ``ChunkedTransformer``.
        kernel: samples that the first layer sees at once.
        hidden_size, intermediate_size, layers, attn_chunk: of all arms.
        bin_length, kernel_length, parameterization: of ``FocusConfig``, where the last is ``param``.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        arm: ArmName,
        kernel: int,
        hidden_size: int,
        intermediate_size: int,
        layers: int,
        attn_chunk: int,
        bin_length: int,
        kernel_length: int,
        parameterization: Parameterization = "sigmoid",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "inputs": inputs, "classes": classes, "arm": arm, "kernel": kernel, "hidden_size": hidden_size,
            "intermediate_size": intermediate_size, "layers": layers, "attn_chunk": attn_chunk,
            "bin_length": bin_length, "kernel_length": kernel_length, "parameterization": parameterization,
        }  # fmt: skip
        if arm not in ARMS:
            raise ValueError(f"SeriesClassifier: arm must be one of {', '.join(ARMS)}, got {arm!r}")
        self.kernel = kernel
        self.embedding: nn.Linear = nn.Linear(inputs * kernel, hidden_size)
        self.body: nn.Module
        self.score: nn.Linear | None = None  # else the body's
        if arm == "transformer":
            self.body = ChunkedTransformer(
                hidden_size, intermediate_size=intermediate_size, layers=layers, attn_chunk=attn_chunk
            )
            self.score = nn.Linear(hidden_size, classes)
        else:
            from fastkit.methods.focus import FocusForSequenceClassification

            self.body = FocusForSequenceClassification(
                _focus_config(self.config, vocab_size=1, num_labels=classes)
            )
            self.body.get_input_embeddings().requires_grad_(False)  # series are no tokens: nothing reads them

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, T, C), (B,) -> (B, classes)
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = x.masked_fill(~inside.unsqueeze(-1), 0)
        windows = pad(x, (0, 0, self.kernel - 1, 0)).unfold(1, self.kernel, 1)  # (B, T, C, kernel)
        h = self.embedding(windows.flatten(2))
        if self.score is None:
            return self.body(inputs_embeds=h, attention_mask=inside).logits
        mean = (self.body(h) * inside.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
        return self.score(mean)


class LanguageModel(nn.Module):
    """Logits of the next token, from an arm's layers; its embeddings are those of the tokens to come, too.

    Args:
        vocabulary: how many tokens there are.
        arm: ``"focus"`` or ``"constant"``: a ``FocusForCausalLM`` with adaptive coefficients, or with
            constant ones and so without the global convolution; ``"transformer"``: a ``ChunkedTransformer``;
            ``"full"``: one whose only chunk is ``longest``.
        longest: tokens of the longest row.
        hidden_size, intermediate_size, layers, attn_chunk: of all arms.
        bin_length, kernel_length, parameterization: of ``FocusConfig``, where the last is ``param``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        arm: ArmName,
        longest: int,
        hidden_size: int,
        intermediate_size: int,
        layers: int,
        attn_chunk: int,
        bin_length: int,
        kernel_length: int,
        parameterization: Parameterization = "sigmoid",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "vocabulary": vocabulary, "arm": arm, "longest": longest, "hidden_size": hidden_size,
            "intermediate_size": intermediate_size, "layers": layers, "attn_chunk": attn_chunk,
            "bin_length": bin_length, "kernel_length": kernel_length, "parameterization": parameterization,
        }  # fmt: skip
        self.embedding: nn.Embedding | None = None  # else the body's
        self.body: nn.Module
        if arm in ("focus", "constant"):
            from fastkit.methods.focus import FocusForCausalLM

            self.body = FocusForCausalLM(_focus_config(self.config, vocab_size=vocabulary))
        else:
            self.embedding = nn.Embedding(vocabulary, hidden_size)
            self.body = ChunkedTransformer(
                hidden_size,
                intermediate_size=intermediate_size,
                layers=layers,
                attn_chunk=longest if arm == "full" else attn_chunk,
            )
            for table in (self.embedding.weight, self.body.positions):  # neither drowns the other
                nn.init.normal_(table, std=0.02)  # as of FocusConfig

    def forward(self, tokens: Tensor, last: int = 0) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        """Of the last so many tokens; 0: of all."""
        if self.embedding is None:
            return self.body(tokens, logits_to_keep=last).logits
        return self.body(self.embedding(tokens))[:, -last:] @ self.embedding.weight.T


def save_language_model(path: Path, model: LanguageModel) -> None:
    """What ``load_language_model`` reads back."""
    write_checkpoint(path, {"config": model.config, "state_dict": model.state_dict()})


def load_language_model(path: Path) -> LanguageModel:
    """A model from the folder ``models`` of a run."""

    def build(state: dict[str, Any]) -> LanguageModel:
        model = LanguageModel(**state["config"])
        model.load_state_dict(state["state_dict"])
        return model.eval()

    return read_model(path, "focus", build)


def _focus_config(config: Mapping[str, Any], **more: Any) -> Any:
    from fastkit.methods.focus import FocusConfig

    return FocusConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["layers"],
        qk_size=-(-config["hidden_size"] // 2),
        attn_chunk=config["attn_chunk"],
        bin_length=config["bin_length"],
        pool=POOL,
        kernel_length=config["kernel_length"],
        coefficients="adaptive" if config["arm"] == "focus" else "constant",
        param=config["parameterization"],
        use_cache=False,  # nothing is generated here
        **more,
    )


def parameters(model: nn.Module) -> int:
    """How many are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def matched(model: type[SeriesClassifier | LanguageModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and the feed-forward width that gives its arm about as many parameters as ``focus`` has.

    Those have twice the width of the model.

    Raises:
        Refusal: even a width of 1 would be too much.
    """

    def count(arm: ArmName, width: int) -> int:
        with torch.device("meta"):
            return parameters(model(**{**config, "arm": arm, "intermediate_size": width}))

    arm, width = config["arm"], 2 * config["hidden_size"]
    one, two = count(arm, 1), count(arm, 2)
    size = 1 + round((count("focus", width) - one) / (two - one))
    if size < 1:
        raise Refusal(
            f"--attn-chunk must leave arm {arm} no more parameters than focus has, got a chunk whose"
            " positions are more; take a smaller one, or a larger --kernel-length"
        )
    return {**config, "intermediate_size": size}
