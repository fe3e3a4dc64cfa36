"""What users write down and store: signatures, fields of results, keys of state_dicts.

``python tests/test_public_api.py`` writes what there is now into this file, between the quotes of ``API``.
"""

import difflib
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest
import torch

from fastkit import info, nn, ops, optim, reference
from fastkit._dispatch import Impl
from fastkit.methods import prilora, word_translation
from fastkit.methods.prilora import config as prilora_config
from fastkit.methods.word_translation import settings as word_translation_settings
from fastkit.methods.word_translation import vectors as word_vectors
from fastkit.nn.adaptive_iir import Parameterization
from fastkit.ops.mtadam import NonFinite
from fastkit.ops.topk_similarity import Metric
from fastkit.optim.mtadam import OnNonFinite

pytestmark = pytest.mark.native

API = """
fastkit.info.available(
    stem: str,
) -> dict[str, bool | str]

Impl: reference, cpu, cuda, triton

Parameterization: sigmoid, triangle, polar, l1, raw

NonFinite: skip, skip_term, propagate

OnNonFinite: skip_step, skip_term, propagate

Metric: dot, cosine, l2

Rounding: nearest, floor, budget

Scaling: lora, constant, rslora

Mode: soft, hard, final

Group: row, matrix

Importance: input, magnitude, random

ResetState: m, mv

Preset: robust, release, paper

Step: unit, center

Transfer: procrustes, icp

Refine: none, reciprocal_icp, procrustes, procrustes_csls

Retrieval: csls, isf, nn

Dictionary: s2t, mutual

BadLines: error, skip

Duplicates: first, error

Zeros: error, drop, eps, keep

Errors: strict, ignore, replace

fastkit.nn.AdaptiveIIR(
    channels: int,
    *,
    chunk: int = 128,
    filters: int = 1,
    pool: int = 8,
    hidden: int = 32,
    parameterization: Parameterization = 'sigmoid',
    adaptive: bool = True,
    carry: bool = False,
)

fastkit.nn.AdaptiveIIR.coefficients(
    x: Tensor,
) -> Tensor

fastkit.nn.AdaptiveIIR.forward(
    x: Tensor,
) -> Tensor

fastkit.nn.AdaptiveIIR.reset_parameters(
) -> None

fastkit.nn.PRILoRALinear(
    base_layer: nn.Module,
    rank: int,
    *,
    alpha: float = 16.0,
    dropout: float = 0.0,
    beta: float = 0.9,
    statistic: bool = True,
)

properties of fastkit.nn.PRILoRALinear: bias, input_norm, merged, scale, weight

fastkit.nn.PRILoRALinear.delta_weight(
) -> Tensor

fastkit.nn.PRILoRALinear.fold_(
) -> None

fastkit.nn.PRILoRALinear.forward(
    input: Tensor,
) -> Tensor

fastkit.nn.PRILoRALinear.merge(
    *,
    reversible: bool = True,
) -> Self

fastkit.nn.PRILoRALinear.prune_(
    ratio: float,
    *,
    hard: bool = False,
) -> Tensor

fastkit.nn.PRILoRALinear.reset_parameters(
) -> None

fastkit.nn.PRILoRALinear.unmerge(
) -> Self

fastkit.ops.ICPEpoch(
    w_xy: Tensor,
    w_yx: Tensor,
    nearest_target: Tensor,
    nearest_source: Tensor,
    cost: Tensor,
    mutual: Tensor,
) is a tuple (w_xy, w_yx, nearest_target, nearest_source, cost, mutual)

fastkit.ops.IIRState(
    y: Tensor,
    x: Tensor,
) is a tuple (y, x)

fastkit.ops.LinearWithStats(
    y: Tensor,
    square_sum: Tensor,
) is a tuple (y, square_sum)

fastkit.ops.Moments(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
) is a tuple (count, mean, scatter)

fastkit.ops.TopK(
    values: Tensor,
    indices: Tensor,
) is a tuple (values, indices)

fastkit.ops.column_norms(
    x: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.csls_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    sources: Tensor | None = None,
    neighbors: int = 10,
    impl: Impl | None = None,
) -> TopK

fastkit.ops.icp_epoch(
    source: Tensor,
    target: Tensor,
    w_xy: Tensor,
    w_yx: Tensor,
    seeds: Tensor,
    *,
    epoch: int,
    batch_size: int = 128,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-08,
    cycle_weight: float = 0.01,
    pairs: tuple[Tensor, Tensor] | None = None,
    mutual_only: bool = False,
    impl: Impl | None = None,
) -> ICPEpoch

fastkit.ops.iir_scan(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
    check_stable: bool = False,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.iir_scan_with_state(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    state: IIRState | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
    check_stable: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, IIRState]

fastkit.ops.iir_step(
    x_t: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    state: IIRState | None = None,
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, IIRState]

fastkit.ops.lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.lora_linear_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
    impl: Impl | None = None,
) -> LinearWithStats

fastkit.ops.merge_moments(
    a: Moments,
    b: Moments,
    *,
    impl: Impl | None = None,
) -> Moments

fastkit.ops.moments(
    x: Tensor,
    *,
    weights: Tensor | None = None,
    impl: Impl | None = None,
) -> Moments

fastkit.ops.mtadam_square_sums(
    grads: Sequence[Tensor | None],
    n: int,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.mtadam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_norms: Tensor,
    steps: Tensor,
    *,
    square_sums: Tensor | None = None,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ranks: Sequence[float] | None = None,
    anchor: int = 0,
    alive_eps: float = 1e-10,
    max_scale: float | None = None,
    nonfinite: NonFinite = 'skip',
    grad_scales: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Impl | None = None,
) -> None

fastkit.ops.polar(
    m: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.procrustes(
    source: Tensor,
    target: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.prune_rows_(
    lora_a: Tensor,
    input_norm: Tensor,
    ratio: float,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.prune_rows_grouped_(
    lora_as: Sequence[Tensor],
    input_norms: Sequence[Tensor],
    ratio: float,
    *,
    impl: Impl | None = None,
) -> list[Tensor]

fastkit.ops.sosfilt(
    x: Tensor,
    sos: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor

fastkit.ops.topk_similarity(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: Metric = 'dot',
    key_bias: Tensor | None = None,
    impl: Impl | None = None,
) -> TopK

fastkit.optim.MTAdam(
    params: Any,
    lr: float | Tensor = 0.001,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    *,
    terms: int | Sequence[str] | None = None,
    ranks: Sequence[float] | None = None,
    decoupled_weight_decay: bool = False,
    anchor: int | str = 0,
    alive_eps: float = 1e-10,
    max_scale: float | None = None,
    mode: Literal['batched', 'streaming'] = 'batched',
    on_nonfinite: OnNonFinite = 'skip_step',
    process_group: Group | Literal['default'] | None = 'default',
)

properties of fastkit.optim.MTAdam: process_group, terms

fastkit.optim.MTAdam.add_param_group(
    param_group: dict[str, Any],
) -> None

fastkit.optim.MTAdam.add_term(
    name: str,
) -> None

fastkit.optim.MTAdam.backward_term(
    term: str | int,
    loss: Tensor | None,
    scaler: Any = None,
    *,
    retain_graph: bool | None = None,
) -> None

fastkit.optim.MTAdam.drop_term(
    name: str,
) -> None

fastkit.optim.MTAdam.effective_weights(
    param: Tensor,
) -> dict[str, Tensor]

fastkit.optim.MTAdam.grad_norms(
    param: Tensor,
) -> dict[str, Tensor]

fastkit.optim.MTAdam.load_state_dict(
    state_dict: dict[str, Any],
) -> None

fastkit.optim.MTAdam.state_dict(
) -> dict[str, Any]

fastkit.optim.MTAdam.step(
    losses: Losses | Callable[[], Losses] | None = None,
    ranks: Sequence[float] | None = None,
    *,
    closure: Callable[[], Losses] | None = None,
) -> Losses | None

fastkit.optim.MTAdam.step_from_grads(
    grads: Sequence[Sequence[Tensor | None]] | Mapping[str, Sequence[Tensor | None]],
    ranks: Sequence[float] | None = None,
) -> None

fastkit.optim.MTAdam.zero_grad(
    set_to_none: bool = True,
) -> None

fastkit.reference.ICPEpoch(
    w_xy: Tensor,
    w_yx: Tensor,
    nearest_target: Tensor,
    nearest_source: Tensor,
    cost: Tensor,
    mutual: Tensor,
) is a tuple (w_xy, w_yx, nearest_target, nearest_source, cost, mutual)

fastkit.reference.IIRState(
    y: Tensor,
    x: Tensor,
) is a tuple (y, x)

fastkit.reference.LinearWithStats(
    y: Tensor,
    square_sum: Tensor,
) is a tuple (y, square_sum)

fastkit.reference.Moments(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
) is a tuple (count, mean, scatter)

fastkit.reference.TopK(
    values: Tensor,
    indices: Tensor,
) is a tuple (values, indices)

fastkit.reference.column_norms(
    x: Tensor,
) -> Tensor

fastkit.reference.csls_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    sources: Tensor | None = None,
    neighbors: int = 10,
) -> TopK

fastkit.reference.icp_epoch(
    source: Tensor,
    target: Tensor,
    w_xy: Tensor,
    w_yx: Tensor,
    seeds: Tensor,
    *,
    epoch: int,
    batch_size: int = 128,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-08,
    cycle_weight: float = 0.01,
    pairs: tuple[Tensor, Tensor] | None = None,
    mutual_only: bool = False,
) -> ICPEpoch

fastkit.reference.iir_scan(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor

fastkit.reference.iir_scan_with_state(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    state: IIRState | None = None,
    *,
    chunk: int | None = None,
    carry: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, IIRState]

fastkit.reference.iir_step(
    x_t: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: IIRState,
) -> tuple[Tensor, IIRState]

fastkit.reference.lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
) -> Tensor

fastkit.reference.lora_linear_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lora_x: Tensor | None = None,
) -> LinearWithStats

fastkit.reference.merge_moments(
    a: Moments,
    b: Moments,
) -> Moments

fastkit.reference.moments(
    x: Tensor,
    *,
    weights: Tensor | None = None,
) -> Moments

fastkit.reference.mtadam_square_sums(
    grads: Sequence[Tensor | None],
    n: int,
) -> Tensor

fastkit.reference.mtadam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_norms: Tensor,
    steps: Tensor,
    *,
    square_sums: Tensor | None = None,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ranks: Sequence[float] | None = None,
    anchor: int = 0,
    alive_eps: float = 1e-10,
    max_scale: float | None = None,
    nonfinite: str = 'skip',
    grad_scales: Tensor | None = None,
    found_inf: Tensor | None = None,
    first: int = 0,
    applies: bool = True,
) -> None

fastkit.reference.polar(
    m: Tensor,
) -> Tensor

fastkit.reference.procrustes(
    source: Tensor,
    target: Tensor,
) -> Tensor

fastkit.reference.prune_rows_(
    lora_a: Tensor,
    input_norm: Tensor,
    ratio: float,
) -> Tensor

fastkit.reference.prune_rows_grouped_(
    lora_as: Sequence[Tensor],
    input_norms: Sequence[Tensor],
    ratio: float,
) -> list[Tensor]

fastkit.reference.sosfilt(
    x: Tensor,
    sos: Tensor,
) -> Tensor

fastkit.reference.topk_similarity(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = 'dot',
    key_bias: Tensor | None = None,
) -> TopK

fastkit.methods.prilora.AttachedPRILoRA(
    model: nn.Module,
    config: PRILoRAConfig,
    modules: Mapping[str, Any],
    adapter: str,
    lora: LoraConfig,
    ranks: Mapping[str, int],
    *,
    automatic: bool = True,
)

properties of fastkit.methods.prilora.AttachedPRILoRA: automatic, counts, owners, steps

fastkit.methods.prilora.AttachedPRILoRA.close(
) -> None

fastkit.methods.prilora.AttachedPRILoRA.finalize(
) -> None

fastkit.methods.prilora.AttachedPRILoRA.load_state_dict(
    state: Mapping[str, Any],
) -> None

fastkit.methods.prilora.AttachedPRILoRA.parameters(
) -> Iterator[nn.Parameter]

fastkit.methods.prilora.AttachedPRILoRA.state_dict(
) -> dict[str, Any]

fastkit.methods.prilora.AttachedPRILoRA.step(
    optimizer: Optimizer | None = None,
) -> None

fastkit.methods.prilora.AttachedPRILoRA.undo(
) -> nn.Module

fastkit.methods.prilora.PRILoRA(
    model: nn.Module,
    config: PRILoRAConfig,
    ranks: Mapping[str, int],
    modules_to_save: list[str],
    *,
    automatic: bool = True,
)

properties of fastkit.methods.prilora.PRILoRA: automatic, counts, owners, steps

fastkit.methods.prilora.PRILoRA.close(
) -> None

fastkit.methods.prilora.PRILoRA.finalize(
) -> None

fastkit.methods.prilora.PRILoRA.load_state_dict(
    state: Mapping[str, Any],
) -> None

fastkit.methods.prilora.PRILoRA.merge(
    *,
    reversible: bool = True,
) -> PRILoRA

fastkit.methods.prilora.PRILoRA.parameters(
) -> Iterator[nn.Parameter]

fastkit.methods.prilora.PRILoRA.save_pretrained(
    folder: str | Path,
    *,
    uniform: bool = False,
) -> None

fastkit.methods.prilora.PRILoRA.state_dict(
) -> dict[str, Any]

fastkit.methods.prilora.PRILoRA.step(
    optimizer: Optimizer | None = None,
) -> None

fastkit.methods.prilora.PRILoRA.undo(
) -> nn.Module

fastkit.methods.prilora.PRILoRA.unmerge(
) -> PRILoRA

fastkit.methods.prilora.PRILoRAConfig(
    *,
    rank_start: int = 4,
    rank_final: int = 12,
    rounding: Rounding = 'nearest',
    alpha: float = 16.0,
    scaling: Scaling = 'lora',
    dropout: float = 0.0,
    beta: float = 0.9,
    target_modules: str | Sequence[str] | None = None,
    ranks: Mapping[str, int] = <factory>,
    modules_to_save: Sequence[str] | None = None,
    ratio: float = 0.5,
    interval: int = 40,
    start: int | None = None,
    stop: int | None = None,
    mode: Mode = 'soft',
    group: Group = 'row',
    importance: Importance = 'input',
    seed: int = 0,
    reset_state: ResetState | None = None,
)

properties of fastkit.methods.prilora.PRILoRAConfig: first_step, last_event, mean_rank

fastkit.methods.prilora.PRILoRAConfig.alpha_of(
    rank: int,
) -> float

fastkit.methods.prilora.PRILoRAConfig.from_dict(
    values: Mapping[str, Any],
) -> PRILoRAConfig

fastkit.methods.prilora.PRILoRAConfig.is_event(
    step: int,
) -> bool

fastkit.methods.prilora.PRILoRAConfig.to_dict(
) -> dict[str, Any]

fastkit.methods.prilora.apply_prilora(
    model: nn.Module,
    config: PRILoRAConfig | None = None,
    *,
    automatic: bool = True,
) -> PRILoRA

fastkit.methods.prilora.attach_prilora(
    peft_model: nn.Module,
    config: PRILoRAConfig | None = None,
    *,
    automatic: bool = True,
) -> AttachedPRILoRA

fastkit.methods.prilora.load_prilora(
    model: nn.Module,
    folder: str | Path,
    *,
    config: PRILoRAConfig | None = None,
    automatic: bool = True,
) -> PRILoRA

fastkit.methods.word_translation.RowPairs(
    pairs: Tensor,
    coverage: float,
    found: int,
    words: int,
) is a tuple (pairs, coverage, found, words)

fastkit.methods.word_translation.Vectors(
    words: list[str] | None,
    vectors: Tensor,
    dropped: dict[str, int] = <factory>,
)

fastkit.methods.word_translation.Vectors.index(
    word: str,
) -> int

fastkit.methods.word_translation.WordTranslator(
    preset: Preset = 'robust',
    *,
    words: int | None = None,
    components: int | None = None,
    restarts: int | None = None,
    epochs: int | None = None,
    halvings: Sequence[int] | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    cycle_weight: float | None = None,
    candidates: int | None = None,
    controls: int | None = None,
    trial_words: int | None = None,
    trial_rounds: int | None = None,
    transfer: Transfer | None = None,
    transfer_words: int | None = None,
    transfer_epochs: int | None = None,
    refine: Refine | None = None,
    refine_words: int | None = None,
    refine_epochs: int | None = None,
    refine_rounds: int | None = None,
    dictionary: Dictionary | None = None,
    criterion_words: int | None = None,
    retrieval: Retrieval = 'csls',
    neighbors: int = 10,
    isf_beta: float = 30.0,
    preprocess: Sequence[Step] | None = None,
    seed: int = 0,
    allow_rect: bool = False,
    progress: bool | None = None,
)

fastkit.methods.word_translation.WordTranslator.fit(
    X: Tensor | np.ndarray[Any, Any],
    Y: Tensor | np.ndarray[Any, Any],
    *,
    pairs: Tensor | np.ndarray[Any, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Self

fastkit.methods.word_translation.WordTranslator.get_params(
    deep: bool = True,
) -> dict[str, Any]

fastkit.methods.word_translation.WordTranslator.inverse(
    Y: Tensor | np.ndarray[Any, Any],
) -> Tensor

fastkit.methods.word_translation.WordTranslator.load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = 'cpu',
) -> Self

fastkit.methods.word_translation.WordTranslator.save(
    path: str | os.PathLike[str],
    *,
    tables: bool = True,
) -> None

fastkit.methods.word_translation.WordTranslator.score(
    pairs: Tensor | np.ndarray[Any, Any],
    ks: Sequence[int] = (1, 5, 10),
    *,
    retrieval: Retrieval | None = None,
) -> Score

fastkit.methods.word_translation.WordTranslator.set_params(
    **params: Any,
) -> Self

fastkit.methods.word_translation.WordTranslator.transform(
    X: Tensor | np.ndarray[Any, Any],
) -> Tensor

fastkit.methods.word_translation.WordTranslator.transform_target(
    Y: Tensor | np.ndarray[Any, Any],
) -> Tensor

fastkit.methods.word_translation.WordTranslator.translate(
    vectors: Tensor | np.ndarray[Any, Any],
    k: int = 10,
    *,
    retrieval: Retrieval | None = None,
) -> Translations

fastkit.methods.word_translation.load_vectors(
    path: str | os.PathLike[str],
    *,
    max_words: int | None = None,
    header: Header = 'auto',
    lowercase: bool = False,
    duplicates: Duplicates = 'first',
    zeros: Zeros = 'error',
    bad_lines: BadLines = 'error',
    errors: Errors = 'strict',
    words: Words | None = None,
) -> Vectors

fastkit.methods.word_translation.row_pairs(
    dictionary: Iterable[tuple[str, str]],
    source_words: Sequence[str],
    target_words: Sequence[str],
) -> RowPairs

fastkit.methods.word_translation.save_vectors(
    path: str | os.PathLike[str],
    words: Sequence[str] | None,
    vectors: Tensor,
) -> None

state_dict of fastkit.nn.AdaptiveIIR(6):
    mlp.0.weight (32, 8)
    mlp.0.bias (32,)
    mlp.2.weight (2, 32)
    mlp.2.bias (2,)

state_dict of fastkit.nn.AdaptiveIIR(6, filters=2, pool=4, hidden=5):
    mlp.0.weight (5, 4)
    mlp.0.bias (5,)
    mlp.2.weight (4, 5)
    mlp.2.bias (4,)

state_dict of fastkit.nn.AdaptiveIIR(6, adaptive=False):
    logits (6, 1, 2)

state_dict of fastkit.nn.AdaptiveIIR(6, adaptive=False, filters=2):
    logits (6, 2, 2)

state_dict of fastkit.nn.PRILoRALinear(torch.nn.Linear(6, 4), 2):
    lora_a (2, 6)
    lora_b (4, 2)
    mask (2, 6)
    input_square (6,)
    folds ()
    base_layer.weight (4, 6)
    base_layer.bias (4,)
"""

MODULES = (nn, ops, optim, reference, prilora, word_translation)
ALIASES = {"Impl": Impl, "Parameterization": Parameterization}  # of annotations
ALIASES |= {"NonFinite": NonFinite, "OnNonFinite": OnNonFinite, "Metric": Metric}
ALIASES |= {
    name: value
    for module in (prilora_config, word_translation_settings, word_vectors)
    for name, value in vars(module).items()
    if get_origin(value) is Literal
}
STATE_DICTS = [
    "AdaptiveIIR(6)",
    "AdaptiveIIR(6, filters=2, pool=4, hidden=5)",
    "AdaptiveIIR(6, adaptive=False)",
    "AdaptiveIIR(6, adaptive=False, filters=2)",
    "PRILoRALinear(torch.nn.Linear(6, 4), 2)",
]


class Verbatim(str):
    """An annotation that a signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def public_names(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    )


def described(name: str, value: object) -> str:
    """A signature, one parameter a line; of a NamedTuple its fields are the parameters."""
    assert callable(value)
    signature = inspect.signature(value)
    lines, keyword_only = [f"{name}("], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("    *,")
            keyword_only = True
        annotation = parameter.annotation
        if not isinstance(annotation, str):  # typing.NamedTuple keeps a ForwardRef
            annotation = getattr(annotation, "__forward_arg__", annotation)
        lines.append(f"    {parameter.replace(annotation=Verbatim(annotation))},")
    result = signature.return_annotation
    fields = getattr(value, "_fields", None)
    if isinstance(value, type):
        lines.append(")" if fields is None else f") is a tuple ({', '.join(fields)})")
    else:
        lines.append(f") -> {result}")
    return "\n".join(lines)


def methods(name: str, of: type) -> list[str]:
    """Of a class, and its properties, beyond those that every module of torch has."""
    bases = [base for base in reversed(of.__mro__) if base.__module__.startswith("fastkit.")]
    own = {key: getattr(of, key) for base in bases for key in vars(base) if not key.startswith("_")}
    properties = sorted(key for key, value in own.items() if isinstance(value, property))
    functions = sorted(key for key, value in own.items() if inspect.isroutine(value))
    lines = [f"properties of {name}: {', '.join(properties)}"] if properties else []
    return lines + [described(f"{name}.{key}", own[key]) for key in functions if key != "extra_repr"]


def api() -> str:
    parts = [described("fastkit.info.available", info.available)]
    parts += [f"{alias}: {', '.join(get_args(of))}" for alias, of in ALIASES.items()]
    for module in MODULES:
        for name in public_names(module):
            value = getattr(module, name)
            parts.append(described(f"{module.__name__}.{name}", value))
            if isinstance(value, type) and not issubclass(value, tuple):
                parts += methods(f"{module.__name__}.{name}", value)
    for call in STATE_DICTS:
        state = eval(call, {**vars(nn), "torch": torch}).state_dict()
        keys = [f"    {key} {tuple(tensor.shape)}" for key, tensor in state.items()]
        parts.append("\n".join([f"state_dict of fastkit.nn.{call}:", *keys]))
    return "\n" + "\n\n".join(parts) + "\n"


def test_what_users_rely_on_is_as_it_was():
    now = api()
    difference = "\n".join(difflib.unified_diff(API.splitlines(), now.splitlines(), "was", "is", lineterm=""))
    assert now == API, (
        f"the public interface has changed:\n{difference}\n"
        f"If that is intended, run `python tests/{Path(__file__).name}`, and say in CHANGELOG.md who will"
        " notice. A state_dict that loaded before must load after."
    )


def test_ops_and_reference_share_types():
    """So that states go from the one to the other."""
    assert ops.IIRState is reference.IIRState


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_is_public_is_documented(module):
    """In a docstring of its own, and by name in the README or on a page of docs."""
    for name in public_names(module):
        assert (getattr(module, name).__doc__ or "").strip(), f"{module.__name__}.{name} has no docstring"
    root = Path(__file__).parents[1]
    if not (root / "docs").is_dir():
        pytest.skip("the tests are here without the documentation")
    pages = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").rglob("*.md")))
    named = set(re.findall(r"\b\w+\b", " ".join(re.findall(r"`[^`\n]+`", pages))))
    assert [name for name in public_names(module) if name not in named] == []


@pytest.mark.parametrize("package", ["nn", "ops", "reference", "methods.prilora", "methods.word_translation"])
def test_what_init_imports_is_what_is_public(package):
    """There is no ``__all__``: a public name is in ``__init__.py``, as ``from .. import name as name``."""
    module = importlib.import_module(f"fastkit.{package}")
    imported = re.findall(r"^from \S+ import (\w+) as \1$", inspect.getsource(module), re.MULTILINE)
    assert sorted(imported) == public_names(module)


if __name__ == "__main__":
    path = Path(__file__)
    text = path.read_text()
    path.write_text(re.sub(r'(?<=^API = """)[^"]*(?=""")', lambda _: api(), text, flags=re.MULTILINE))
