"""The language model of the paper: LSTM layers between two embeddings, which may be one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropped

from fastkit import ops
from fastkit.methods._options import check_integer, check_number, check_one_of, check_positive
from fastkit.methods.tied_embedding.presets import PRESETS, PresetName
from fastkit.methods.tied_embedding.probe import evaluating
from fastkit.methods.tied_embedding.projection import PRNorm, Projection, checked_weight
from fastkit.methods.tied_embedding.tying import remember_tie
from fastkit.methods.tied_embedding.variational import (
    VariationalDropout,
    check_share,
    mask,
    masked_lstm,
    word_mask,
)
from fastkit.nn import TiedEmbedding
from fastkit.ops._checks import FLOATING, may_look_at
from fastkit.reference.linear_cross_entropy import Reduction

_OP = "TiedLanguageModel"


class LSTMState(NamedTuple):
    """What the layers go on from: as of ``nn.LSTM``, (L, B, H) each."""

    h: Tensor
    c: Tensor

    def detach(self) -> LSTMState:
        """The same numbers, through which no gradient goes back."""
        return LSTMState(self.h.detach(), self.c.detach())


class TiedLanguageModel(nn.Module):
    """A language model of words: an embedding, LSTM layers, and a softmax, whose matrix may be the first's.

    With S the output embedding, U the input embedding (tied: U = S), P the projection, where there is one::

        e_t = U[ids_t]
        h_t = LSTM layers(e_t)
        z_t = S (P h_t + p_b) + c
        loss = cross entropy of z_t and the next word; to it penalty() is added in training

    ``from_preset`` has the models of the paper. Long texts are trained in pieces, with the state carried from
    one to the next; ``bptt_batches`` cuts them::

        state = None
        for ids, target in bptt_batches(tokens, batch_size=20, steps=20):
            loss, state = model.loss(ids, target, state, reduction="sum")
            optimizer.zero_grad()
            (loss / len(ids) + model.penalty(len(ids))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    Args:
        vocab_size: V, the words.
        hidden_size: H, the width of the embeddings and of all layers.
        num_layers: of the LSTM.
        tie: whether the softmax has the matrix of the embedding, in a ``fastkit.nn.TiedEmbedding``.
        projection: whether there is P, a ``Projection``.
        projection_bias: whether it has p_b, as in the paper's code; its formula has none.
        pr_norm, pr_weight: of its penalty, as in ``projection_penalty``.
        dropout: a share, in three places: after the embedding, between layers, after the last one; drawn for
            each step, as in Zaremba et al. Or a ``VariationalDropout``.
        init_range: the parameters begin uniform in [-init_range, init_range], the biases of the LSTM at 0.
        device, dtype: of the parameters.

    Shape:
        ids, target ``(B, T)``, int64 or int32; h ``(B, T, H)``; logits ``(..., V)``; a state ``(L, B, H)``
        twice. Parameters: ``embedding.weight`` (V, H), ``lstm.*`` as of ``nn.LSTM``; ``embedding.bias`` (V,)
        where tied, else ``output.weight`` (V, H) and ``output.bias`` (V,); ``projection.weight`` (H, H) and
        ``projection.bias`` (H,). ``lstm.bias_hh_*`` ask for no gradient and stay 0.

    Raises:
        ValueError: a size or an option is not as above; ids or a state have another shape.
        TypeError: a size or an option is of another type; ids are no integers.
        RuntimeError: an id is not in [0, V), where values may be looked at.

    Numerics: of the loss those of ``fastkit.ops.linear_cross_entropy``. ``tie`` changes no arithmetic: its
    gradient is the sum of those of an untied model's two matrices. A state carried from piece to piece gives
    what one long run gives, to rounding; gradients end at the piece.

    Cost: with ``dropout`` a number all steps are one call of ``nn.LSTM``. A ``VariationalDropout`` is a loop
    over steps in training, for no fused kernel masks between them; in eval there is none. A tied model adds
    the gradient of the lookup into that of the softmax row by row, with ``fused_accumulate`` of
    ``TiedEmbedding``; ``model.embedding.fused_accumulate = False`` spares a GPU the wait that this costs.

    Parameters: beside the paper's count there are 4 H for each layer, since ``nn.LSTM`` has two biases where
    the paper's LSTM has one, and H for p_b, which the paper does not count. The second bias is not trained:
    by SGD the two would move twice as far as one, with which the paper's rate leaves a projected model
    hardly trained.

    Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017, and the code
    published with it; Zaremba, Sutskever, Vinyals, "Recurrent Neural Network Regularization", 2014.

    Example:
        >>> import torch
        >>> from fastkit.methods.tied_embedding import TiedLanguageModel
        >>> model = TiedLanguageModel(100, 16, tie=True, projection=True)
        >>> text = torch.randint(100, (2, 11))
        >>> loss, state = model.loss(text[:, :-1], text[:, 1:])
        >>> (loss + model.penalty(20)).backward()
        >>> model.generate(text[:, :3], 5).shape
        torch.Size([2, 8])
    """

    embedding: TiedEmbedding | nn.Embedding
    output: nn.Linear | None
    projection: Projection | None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        num_layers: int = 2,
        tie: bool = False,
        projection: bool = False,
        projection_bias: bool = True,
        pr_norm: PRNorm = "code",
        pr_weight: float | None = None,
        dropout: float | VariationalDropout = 0.0,
        init_range: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            check_integer(_OP, name, size, 1)
        for name, value in (("tie", tie), ("projection", projection), ("projection_bias", projection_bias)):
            if not isinstance(value, bool):
                raise TypeError(f"{_OP}: {name} must be True or False, got {value!r}")
        if not isinstance(dropout, VariationalDropout):
            check_share(_OP, "dropout", dropout)
        check_positive(_OP, "init_range", init_range)
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"{_OP}: dtype must be floating point and real, got {dtype}")
        self.vocab_size: int = vocab_size
        self.hidden_size: int = hidden_size
        self.num_layers: int = num_layers
        self.tie: bool = tie
        self.projection_bias: bool = projection_bias
        self.pr_norm: PRNorm = pr_norm
        self.pr_weight: float = checked_weight(_OP, pr_norm, pr_weight)
        self.dropout: float | VariationalDropout = dropout
        self.init_range: float = init_range
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        if tie:
            self.embedding = TiedEmbedding(
                vocab_size, hidden_size, bias=True, fused_accumulate=True, **placed
            )
            remember_tie(self, "embedding", "embedding")
        else:
            self.embedding = nn.Embedding(vocab_size, hidden_size, **placed)
        between = 0.0 if isinstance(dropout, VariationalDropout) or num_layers == 1 else dropout
        self.lstm: nn.LSTM = nn.LSTM(
            hidden_size, hidden_size, num_layers, dropout=between, batch_first=True, **placed
        )
        for layer in range(num_layers):
            self.lstm.get_parameter(f"bias_hh_l{layer}").requires_grad_(False)
        self.projection = None
        if projection:
            self.projection = Projection(
                hidden_size, pr_norm=pr_norm, pr_weight=pr_weight, bias=projection_bias,
                init_range=init_range, **placed,
            )  # fmt: skip
        self.output = None if tie else nn.Linear(hidden_size, vocab_size, **placed)
        self.reset_parameters()

    @classmethod
    def from_preset(
        cls,
        name: PresetName,
        *,
        vocab_size: int = 10_000,
        tie: bool = False,
        projection: bool = False,
        projection_bias: bool = True,
        pr_norm: PRNorm = "code",
        pr_weight: float | None = None,
        dropout: float | VariationalDropout | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model of the paper, for 10,000 words of the Penn Treebank.

        ``"small"`` is 200 wide without dropout, ``"medium"`` 650 with 0.5, ``"large"`` 1500 with 0.65;
        ``dropout`` replaces that. The paper's large model with Bayesian dropout is
        ``from_preset("large", dropout=VariationalDropout())``.
        """
        check_one_of(_OP, "name", name, get_args(PresetName))
        preset = PRESETS[name]
        return cls(
            vocab_size,
            preset.hidden_size,
            tie=tie,
            projection=projection,
            projection_bias=projection_bias,
            pr_norm=pr_norm,
            pr_weight=pr_weight,
            dropout=preset.dropout if dropout is None else dropout,
            init_range=preset.init_range,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str | None = None) -> Self:
        """The model that ``save_pretrained`` wrote, in eval, on ``device`` (default: the CPU).

        Raises:
            FileNotFoundError: the folder, or a file of it, is not there.
            ValueError: a file is cut off, of another format, or not of one piece with the other. Nothing of a
                file is run, nor is memory taken that its tensors do not take.
            ImportError: safetensors is not installed.
        """
        from fastkit.methods.tied_embedding.language_model_files import read

        config, tensors = read(Path(folder), set(cls._options()))
        try:
            if isinstance(config["dropout"], dict):
                config["dropout"] = VariationalDropout(**config["dropout"])
            with torch.device("meta"):
                model = cls(**config, dtype=next(iter(tensors.values())).dtype)
            model.load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{_OP}: {folder} must hold one model, got what is none ({error})") from error
        model = model.to_empty(device="cpu" if device is None else device)
        model.load_state_dict(tensors)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, which is replaced whole.

        A process that is stopped leaves the old model or the new one; other files are left alone. Under
        torch.distributed one process is to call it.

        Raises:
            ValueError: the model was made with ``tie=False`` and tied after, which the files cannot say.
            ImportError: safetensors is not installed.
        """
        from fastkit.methods.tied_embedding.language_model_files import write

        if self.output is not None and self.output.weight is self.embedding.weight:
            raise ValueError(
                f"{_OP}: a model that is saved must be tied when it is made, got one that was tied after;"
                " make it with tie=True, and load its embedding, layers and bias"
            )
        write(Path(folder), self._settings(), self.state_dict())

    def _settings(self) -> dict[str, Any]:
        """The options, as plain data."""
        options = {name: getattr(self, name) for name in self._options()}
        options["projection"] = self.projection is not None
        if isinstance(self.dropout, VariationalDropout):
            options["dropout"] = dataclasses.asdict(self.dropout)
        return options

    @staticmethod
    def _options() -> tuple[str, ...]:
        return (
            "vocab_size", "hidden_size", "num_layers", "tie", "projection", "projection_bias", "pr_norm",
            "pr_weight", "dropout", "init_range",
        )  # fmt: skip

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("lstm.bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -self.init_range, self.init_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.embedding if self.output is None else self.output

    def forward(self, ids: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """The hidden states that ``logits`` takes, (B, T, H), and the state after the last word.

        ``state`` is that of an earlier call, of the same rows; default: zeros. Gradients go back into it,
        unless it is detached, as the one of ``loss`` is.
        """
        self._check_ids(ids)
        x = self.embedding(ids)
        if state is None:
            zeros = x.new_zeros(self.num_layers, len(ids), self.hidden_size)
            state = LSTMState(zeros, zeros)
        self._check_state(state, ids)
        if isinstance(self.dropout, VariationalDropout) and self.training:
            words = word_mask(ids, x, self.dropout.word)
            h, last = masked_lstm(self.lstm, x if words is None else x * words, state, self.dropout)
            outputs = mask(x, (len(ids), 1, self.hidden_size), self.dropout.output)
            return h if outputs is None else h * outputs, LSTMState(*last)
        share = 0.0 if isinstance(self.dropout, VariationalDropout) else self.dropout
        h, last = self.lstm(dropped(x, share, self.training), state)
        return dropped(h, share, self.training), LSTMState(*last)

    def logits(self, h: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """The logits of all words, in memory. ``loss`` does not need them."""
        h = self._projected(h)
        if isinstance(self.embedding, TiedEmbedding):
            return self.embedding.logits(h)
        assert self.output is not None
        return self.output(h)

    def loss(
        self,
        ids: Tensor,  # (B, T)
        target: Tensor,  # (B, T)
        state: LSTMState | None = None,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        token_weight: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, LSTMState]:
        """The cross entropy of ``target``, the words after ``ids``, without ``penalty``; and the state.

        The state is detached: gradients end here, which is truncated backpropagation through time. The
        options are those of ``fastkit.ops.linear_cross_entropy``, and ``exp`` of a mean is a perplexity.
        """
        h, last = self(ids, state)
        h = self._projected(h)
        options: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "token_weight": token_weight,
        }
        if isinstance(self.embedding, TiedEmbedding):
            loss = self.embedding.loss(h, target, **options)
        else:
            assert self.output is not None
            loss = ops.linear_cross_entropy(
                h, self.output.weight, target, linear_bias=self.output.bias, **options
            )
        return loss, last.detach()

    def penalty(self, tokens: float = 1) -> Tensor:  # ()
        """What projection regularisation adds to the loss in training; 0 where there is no projection.

        ``tokens``: what the sum of the losses was divided by, see ``projection_penalty``: ``target.numel()``
        for a mean, the rows of the batch for the paper's loss.
        """
        if self.projection is not None:
            return self.projection.penalty(tokens)
        return self.embedding.weight.new_zeros(())

    @torch.no_grad()
    def perplexity(self, tokens: Tensor, *, batch_size: int = 1, steps: int = 256) -> float:
        """``exp`` of the mean loss of a text, (N,), in eval and without ``penalty``.

        With ``batch_size=1``, as the paper tests, all but the first word are predicted, each from all before
        it; more rows are faster, and begin without a past. ``steps`` is how many words a call takes: it does
        not change the result, but for rounding. Infinite, where ``exp`` overflows.
        """
        total, words, state = 0.0, 0, None
        with evaluating(self):
            for ids, target in bptt_batches(tokens, batch_size, steps):
                loss, state = self.loss(ids, target, state, reduction="sum")
                total, words = total + float(loss), words + target.numel()
        mean = total / words
        return math.exp(mean) if mean < 709 or math.isnan(mean) else math.inf

    @torch.no_grad()
    def generate(
        self, ids: Tensor, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:  # (B, T) -> (B, T + n)
        """``ids`` and ``n`` words after them, of the softmax of logits / temperature, without dropout.

        Args:
            ids: the beginnings, of at least one word.
            n: how many words.
            temperature: 0 takes the likeliest word each time.
            generator: of the draws, on the device of the model; the same state is the same text.
        """
        check_integer(_OP, "n", n, 0)
        if not 0 <= check_number(_OP, "temperature", temperature) < math.inf:
            raise ValueError(
                f"{_OP}: temperature must be finite and not negative, got {temperature}; 0 takes the"
                " likeliest word"
            )
        words, state, last = [ids], None, ids
        with evaluating(self):
            for _ in range(n):
                h, state = self(last, state)
                z = self.logits(h[:, -1])
                if temperature == 0:
                    last = z.argmax(-1, keepdim=True)
                else:
                    z = z.double()  # in which the likeliest stays finite at any temperature
                    shares = torch.softmax((z - z.amax(-1, keepdim=True)) / temperature, -1)
                    last = torch.multinomial(shares, 1, generator=generator)
                last = last.to(ids.dtype)
                words.append(last)
        return torch.cat(words, 1)

    def extra_repr(self) -> str:
        return f"tie={self.tie}, dropout={self.dropout}"

    def _projected(self, h: Tensor) -> Tensor:
        return h if self.projection is None else self.projection(h)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{_OP}: ids must be int64 or int32, got {ids.dtype}; they are words")
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(
                f"{_OP}: ids must have shape (B, T), with a row and a word at least, got {tuple(ids.shape)}"
            )
        if may_look_at(ids):
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise RuntimeError(
                    f"{_OP}: ids must be in [0, {self.vocab_size}), got {low if low < 0 else high}"
                )

    def _check_state(self, state: LSTMState, ids: Tensor) -> None:
        shape = (self.num_layers, len(ids), self.hidden_size)
        if len(state) != 2 or any(tuple(each.shape) != shape for each in state):
            raise ValueError(
                f"{_OP}: state must be (h, c) of shape {shape}, got"
                f" {', '.join(str(tuple(each.shape)) for each in state)}; give the one of an earlier call"
                " with as many rows"
            )


def bptt_batches(tokens: Tensor, batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A text, (N,), cut for truncated backpropagation through time, into pieces (ids, targets).

    The text is laid out in ``batch_size`` rows of N // batch_size words, what is left over is dropped, and
    the rows are cut into pieces (batch_size, steps), of which the last may be shorter. Row by row a piece
    goes on where the one before has ended, so a state may be carried. The targets are the words after the
    ids.

    Raises:
        ValueError: ``tokens`` are no text of 2 words for each row, or a size is below 1.
        TypeError: a size is no integer.
    """
    check_integer("bptt_batches", "batch_size", batch_size, 1)
    check_integer("bptt_batches", "steps", steps, 1)
    if tokens.dim() != 1 or len(tokens) < 2 * batch_size:
        raise ValueError(
            f"bptt_batches: tokens must have shape (N,) with 2 words at least for each of {batch_size} rows,"
            f" got {tuple(tokens.shape)}"
        )
    rows = tokens[: len(tokens) // batch_size * batch_size].view(batch_size, -1)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, rows.shape[1] - 1, steps):
            stop = min(start + steps, rows.shape[1] - 1)
            yield rows[:, start:stop], rows[:, start + 1 : stop + 1]

    return pieces()
