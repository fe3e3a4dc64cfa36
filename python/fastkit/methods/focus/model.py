"""Focus models as transformers has models: FocusModel, FocusForCausalLM, FocusForSequenceClassification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from fastkit.methods.focus.cache import FocusCache
from fastkit.methods.focus.config import FocusConfig
from fastkit.nn import AdaptiveIIR, FocusLayer, GlobalConv
from fastkit.nn.focus_state import FocusState, put_, ring, unrolled
from fastkit.nn.row_alignment import RowAlignment


class FocusBlock(GradientCheckpointingLayer):
    """A Focus layer and a feed-forward layer, each behind a norm; the layer's gate lets its input past."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm: nn.LayerNorm = nn.LayerNorm(C, eps)
        self.layer: FocusLayer = FocusLayer(
            C,
            qk_size=config.qk_size,
            num_heads=config.num_attention_heads,
            attn_chunk=config.attn_chunk,
            bin_length=config.bin_length,
            pool=config.pool,
            hidden=config.filter_hidden,
            num_filters=config.num_filters,
            parameterization=config.param,  # pyright: ignore[reportArgumentType]
            first=config.first,  # pyright: ignore[reportArgumentType]
            coefficients=config.coefficients,  # pyright: ignore[reportArgumentType]
            kernel_length=None if config.share_global_conv else config.kernel_length,
            conv_glu=config.conv_glu,
            causal=config.causal,
            position=config.position,  # pyright: ignore[reportArgumentType]
            filtering=config.filtering,  # pyright: ignore[reportArgumentType]
        )
        self.mlp_norm: nn.LayerNorm = nn.LayerNorm(C, eps)
        self.mlp: nn.Sequential = nn.Sequential(
            nn.Linear(C, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, C),
            nn.Dropout(config.hidden_dropout),
        )

    def forward(self, hidden_states: Tensor, maxima: Tensor | None) -> Tensor:  # (B, T, C)
        h = self.layer(self.layer_norm(hidden_states), maxima=maxima, residual=hidden_states)
        return h + self.mlp(self.mlp_norm(h))

    def forward_with_state(
        self, hidden_states: Tensor, lengths: Tensor, maxima: Tensor | None, last_maxima: Tensor | None
    ) -> tuple[Tensor, FocusState]:
        h, state = self.layer.forward_with_state(
            self.layer_norm(hidden_states),
            lengths,
            maxima=maxima,
            last_maxima=last_maxima,
            residual=hidden_states,
        )
        return h + self.mlp(self.mlp_norm(h)), state

    def step(self, h: Tensor, state: FocusState, places: Tensor, maxima: Tensor | None) -> Tensor:  # (B, C)
        h = self.layer.step(self.layer_norm(h), state, places, maxima=maxima, residual=h)
        return h + self.mlp(self.mlp_norm(h))


class FocusPreTrainedModel(PreTrainedModel):
    config: FocusConfig
    config_class: type[PreTrainedConfig] | None = FocusConfig
    base_model_prefix: str = "model"
    supports_gradient_checkpointing: bool = True
    _is_stateful: bool = True  # a cache does not go back to where it was
    _no_split_modules = ["FocusBlock"]  # noqa: RUF012  (so PreTrainedModel declares it)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (AdaptiveIIR, FocusLayer, GlobalConv)):
            module.reset_parameters()  # its linear layers, which transformers visits first, included
        else:
            super()._init_weights(module)


class FocusModel(FocusPreTrainedModel):
    """Embeddings, the global convolution that layers share, blocks and a norm."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__(config)
        C = config.hidden_size
        shares = config.share_global_conv and config.coefficients == "adaptive"
        self.embed_tokens: nn.Embedding = nn.Embedding(config.vocab_size, C, config.pad_token_id)
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout)
        self.conv_norm: nn.LayerNorm | None = None
        self.global_conv: GlobalConv | None = None
        if shares and config.kernel_length is not None:
            self.conv_norm = nn.LayerNorm(C, config.layer_norm_eps)
            self.global_conv = GlobalConv(
                C, config.kernel_length, block=config.bin_length, glu=config.conv_glu
            )
        self.layers: nn.ModuleList = nn.ModuleList(
            FocusBlock(config) for _ in range(config.num_hidden_layers)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(C, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T): one run of ones in each row
        position_ids: Tensor | None = None,  # (1, T) of packed sequences: each begins at 0
        inputs_embeds: Tensor | None = None,  # (B, T, C)
        past_key_values: FocusCache | None = None,  # goes on in place with these tokens
        use_cache: bool | None = None,  # default: config.use_cache, in eval
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("FocusModel: there must be either input_ids or inputs_embeds; give one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_compiling()
        if past_key_values is not None and not isinstance(past_key_values, FocusCache):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"FocusModel: past_key_values must be a FocusCache, got {type(past_key_values).__name__};"
                " give none, and the model makes its own"
            )
        if past_key_values is not None and past_key_values.seen:
            return self._go_on(x, past_key_values, attention_mask, output_hidden_states)
        if attention_mask is not None and _masks_nothing(attention_mask, position_ids, kwargs):
            attention_mask = None
        if attention_mask is not None:
            position_ids = None  # of a padded row they say where it begins, as the mask does
        offsets = _offsets(x, position_ids, kwargs)
        rows = RowAlignment.of("FocusModel", x, attention_mask, offsets)
        h = self.dropout(rows.align(x))
        cache = None
        goes_on = self.config.causal and self.config.filtering == "recurrence" and offsets is None
        if goes_on and (use_cache or past_key_values is not None):
            cache = FocusCache() if past_key_values is None else past_key_values
            cache.reset()
            tokens = torch.ones(x.shape[:2], device=x.device) if attention_mask is None else attention_mask
            cache.places = (tokens != 0).sum(1)
        maxima, last_maxima = self._maxima(h, cache)
        states: tuple[Tensor, ...] = ()
        for block in self.layers:
            if output_hidden_states:
                states = *states, rows.restore(h)
            if cache is None:
                h = block(h, maxima)
            else:
                assert isinstance(block, FocusBlock)
                h, state = block.forward_with_state(h, cache.places, maxima, last_maxima)
                cache.states.append(state)
        h = rows.restore(self.norm(h))
        if cache is not None:
            cache.seen = x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*states, h) if output_hidden_states else None,
        )

    def _maxima(self, h: Tensor, cache: FocusCache | None) -> tuple[Tensor | None, Tensor | None]:
        """Those of the convolution that layers share; and of each row's last bin, for the cache."""
        if self.global_conv is None or self.conv_norm is None:
            return None, None
        x = self.conv_norm(h)
        maxima = self.global_conv.maxima(x, self.config.pool)
        if cache is None:
            return maxima, None
        with torch.no_grad():
            cache.history = ring(x, cache.places, self.global_conv.length - 1 + self.global_conv.block)
            return maxima, self._last_maxima(self.global_conv, cache.history, cache.places)

    def _last_maxima(self, conv: GlobalConv, history: Tensor, places: Tensor) -> Tensor | None:
        """Of the bin that ends before these places, if any does."""
        if not bool((places % conv.block == 0).any()):
            return None
        return conv.last_maxima(unrolled(history, places), self.config.pool)

    def _go_on(
        self, x: Tensor, cache: FocusCache, attention_mask: Tensor | None, output_hidden_states: bool | None
    ) -> BaseModelOutputWithPast:
        """Token by token."""
        if len(x) != len(cache.places):
            raise ValueError(
                f"FocusModel: the rows must be as many as the cache has, {len(cache.places)}, got {len(x)}"
            )
        if (
            attention_mask is not None
            and x.shape[1] > 1
            and not bool((attention_mask[:, -x.shape[1] :] != 0).all())
        ):
            raise ValueError(
                "FocusModel: attention_mask must be 1 for tokens that go on from a cache, got padding; give"
                " rows that are as long"
            )
        hidden: list[list[Tensor]] = []
        for x_t in x.unbind(1):
            hidden.append(self._step(self.dropout(x_t), cache))
        by_layer = [torch.stack(h, 1) for h in zip(*hidden, strict=True)]
        return BaseModelOutputWithPast(
            last_hidden_state=by_layer[-1],
            past_key_values=cache,
            hidden_states=tuple(by_layer) if output_hidden_states else None,
        )

    def _step(self, h: Tensor, cache: FocusCache) -> list[Tensor]:  # (B, C)
        """What goes into each layer, and what comes out at the end."""
        maxima = None
        conv, places = self.global_conv, cache.places
        if conv is not None and self.conv_norm is not None and cache.history is not None:
            put_(cache.history, self.conv_norm(h), places)
            maxima = self._last_maxima(conv, cache.history, places + 1)
        states = []
        for block, state in zip(self.layers, cache.states, strict=True):
            assert isinstance(block, FocusBlock)
            states.append(h)
            h = block.step(h, state, places, maxima)
        cache.places, cache.seen = places + 1, cache.seen + 1
        return [*states, self.norm(h)]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # pyright: ignore[reportAttributeAccessIssue]


def _masks_nothing(mask: Tensor, position_ids: Tensor | None, more: dict[str, Any]) -> bool:
    """Looks at it only where there may be packed sequences, with which a mask does not go."""
    packs = position_ids is not None or more.get("cu_seq_lens_q") is not None
    return packs and len(mask) == 1 and bool((mask != 0).all())


def _offsets(x: Tensor, position_ids: Tensor | None, more: dict[str, Any]) -> Tensor | None:
    """Of packed sequences, as transformers' collators tell them; None, where rows are one sequence each."""
    offsets = more.get("cu_seq_lens_q")
    if offsets is not None or position_ids is None or len(x) > 1:
        return offsets
    if torch.compiler.is_compiling():
        raise ValueError("FocusModel: a compiled model cannot read position_ids; give cu_seq_lens_q instead")
    begins = (position_ids.reshape(-1) == 0).nonzero().squeeze(1)
    if len(begins) < 2:
        return None
    return torch.cat([begins, begins.new_tensor([x.shape[1]])])


class FocusForCausalLM(FocusPreTrainedModel, GenerationMixin):
    """A FocusModel, and logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FocusConfig) -> None:
        if not config.causal:
            raise ValueError(
                "FocusForCausalLM: config.causal must be True, got False; a token would see what it predicts"
            )
        super().__init__(config)
        self.model: FocusModel = FocusModel(config)
        self.lm_head: nn.Linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FocusCache | None = None,
        labels: Tensor | None = None,  # (B, T): tokens; -100 is ignored
        logits_to_keep: int | Tensor = 0,  # the last so many, or those at these places; 0: all
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() would hand one over; the model makes its own

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; ValueError for the published filter, which sees what is yet to be generated."""
        if self.config.filtering == "paper":
            raise ValueError(
                'FocusForCausalLM: generate must have config.filtering="recurrence", got "paper", in which a'
                " token sees later ones of its bin; it is for comparison only"
            )
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class FocusForSequenceClassification(FocusPreTrainedModel):
    """A FocusModel, and logits of classes, or numbers, for each row."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.model: FocusModel = FocusModel(config)
        self.score: nn.Linear = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,), or as config.problem_type says
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        of_rows = inputs_embeds if input_ids is None else input_ids
        if of_rows is not None and _offsets(of_rows, kwargs.get("position_ids"), kwargs) is not None:
            raise ValueError(
                "FocusForSequenceClassification: a row must be one sequence, got packed ones; pad them, with"
                " attention_mask"
            )
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self._pooled(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _pooled(self, h: Tensor, attention_mask: Tensor | None) -> Tensor:  # (B, T, C) -> (B, C)
        if attention_mask is None:
            return h.mean(1) if self.config.classifier_pooling == "mean" else h[:, -1]
        tokens = attention_mask != 0
        if self.config.classifier_pooling == "last":
            last = (tokens * torch.arange(h.shape[1], device=h.device)).argmax(1)
            return h[torch.arange(len(h), device=h.device), last]
        weights = tokens.to(h.dtype)
        return (weights.unsqueeze(1) @ h).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)


AutoConfig.register(FocusConfig.model_type, FocusConfig, exist_ok=True)
AutoModel.register(FocusConfig, FocusModel, exist_ok=True)
AutoModelForCausalLM.register(FocusConfig, FocusForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FocusConfig, FocusForSequenceClassification, exist_ok=True)
