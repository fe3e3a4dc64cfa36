"""Maps between two tables of embeddings, found without a dictionary: the public class."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastkit.methods.word_translation import files
from fastkit.methods.word_translation.alignment import align_tables
from fastkit.methods.word_translation.checkpoint import Stages, digest
from fastkit.methods.word_translation.checks import as_pairs, check_tables, warn_of_few
from fastkit.methods.word_translation.retrieval import Index, Score, Translations
from fastkit.methods.word_translation.settings import (
    OP,
    OPTIONS,
    Dictionary,
    Preset,
    Refine,
    Retrieval,
    Settings,
    Step,
    Transfer,
    resolve,
)
from fastkit.methods.word_translation.tables import apply_steps, as_table, mapped, preprocessed, unit
from fastkit.methods.word_translation.trials import KEPT, Candidate, advice


class WordTranslator:
    """Maps between two tables of embeddings, found without a dictionary, and translations by them.

    ::

        scores of both tables on their leading principal axes, whose signs are unknown
        many restarts of cycle ICP between them, each from other signs; halved three times by their cost
        the pairs of the best ones -> W_xy orthogonal, all columns (Procrustes)
        rounds of: dictionary by CSLS -> Procrustes; the map of the best score, the mean cosine of its pairs

    Args:
        preset: ``"robust"`` is as above. ``"release"`` is the published method: 100 restarts of 5000 words,
            none dropped, then ICP in all columns of the tables as they are, from the pairs of the one that
            costs least, then on mutual pairs alone. ``"paper"`` is that with 50 components and 500 restarts.
            Every argument below that is None is the preset's; the values are those of robust, release.
        words: the most frequent words of each table that restarts are run on (2000, 5000).
        components: principal axes (25).
        restarts: how many (256, 100). What becomes of one depends on ``seed`` and its number alone.
        epochs: of ICP in each (60, 100).
        halvings: after these epochs, counted from 0, the costlier half is dropped ((20, 30, 40), none).
        batch_size, lr, betas, eps, cycle_weight: of ``ops.icp_epoch`` (128, 1e-2, (0.5, 0.999), 1e-8, 1e-2).
        candidates: so many of the restarts that cost least, each from a basin of its own, are tried by some
            rounds of refinement; the best score is taken (3, 1).
        controls: maps that are wrong by construction, for ``converged_`` (2).
        trial_words, trial_rounds: of a trial (5000, 3).
        transfer: to maps of all columns: ``"procrustes"``, those of the best trial, or ``"icp"``, from its
            restart's pairs (``"procrustes"``, ``"icp"``).
        transfer_words, transfer_epochs: of ``transfer="icp"`` (5000, 50).
        refine: ``"none"``; ``"procrustes"``, one map of the pairs that are mutual by CSLS;
            ``"procrustes_csls"``, rounds of it; ``"reciprocal_icp"``, ICP on mutual pairs alone
            (``"procrustes_csls"``, ``"reciprocal_icp"``). With ``pairs`` the default is ``"none"``.
        refine_words: most frequent words of it (15000; 7500 for ``"reciprocal_icp"``).
        refine_epochs, refine_rounds: of ``"reciprocal_icp"`` (50), of ``"procrustes_csls"`` (5, 10).
        dictionary: of ``"procrustes_csls"``: ``"s2t"``, each source with its translation, or ``"mutual"``,
            those that are so both ways (``"s2t"``).
        criterion_words: the sources whose mean cosine is the score (10000).
        retrieval: ``"csls"``, ``"isf"`` (inverted softmax) or ``"nn"`` (cosine).
        neighbors: of CSLS, in refinement too (10).
        isf_beta: of the inverted softmax (30).
        preprocess: what is done to both tables first, any of ``"unit"``, rows over their norm, and
            ``"center"``, less the mean of the table (("unit", "center", "unit"), nothing). Restarts take
            tables as they are, with each row standardised.
        seed: of restarts and controls.
        allow_rect: whether the tables may have different numbers of columns; W_xy is then semi-orthogonal,
            and ICP in all columns is refused.
        progress: None: bars where tqdm is installed and a terminal reads them; True: bars; False: none.

    Attributes:
        w_xy_, w_yx_: the maps, ``(E, D)`` and ``(D, E)``: ``X @ w_xy_.T`` lies next to Y.
        means_x_, means_y_: for each step of preprocess the mean that it took away, or zeros.
        converged_: whether the best score is at least 1.05 times that of what is wrong: the controls, and
            other candidates that translate less than one word in twenty alike; and the maps still translate
            a quarter of the words as the best candidate. True after ``pairs``.
        candidates_: restart, cost, mutual pairs, score of its trial and agreement with the best, of each.
        control_score_: the best score of what is wrong; nan where nothing is, as with ``pairs``.
        criterion_: the score of the maps, after refinement.
        best_restart_: its number; -1 with ``pairs``.
        restart_costs_, restart_mutual_, restart_epochs_, restart_seeds_: of each restart, the cost and the
            number of mutual pairs in its last epoch, and how many epochs it ran.
        restart_nearest_: ``(R, words)`` int32, the row of Y that each paired each word with; not saved.
        penalty_: ``(m,)``, what each target is charged with: CSLS, the mean of its ``neighbors`` greatest
            cosines; ISF, the logarithm of its sum of exp(isf_beta cosine); None for nn.
        timings_: the seconds of each stage.

    Numerics: in float32, principal axes in float64. On the CPU the maps do not depend on the number of
    threads. A word is translated with the same bits by itself and among others.

    Memory and work: restarts take 30 epochs in the mean; an epoch of one is ``2 words^2 components``
    multiply-adds, a round of CSLS ``2 words^2 D``, the penalty ``n m D``. No matrix of all scores is made.

    Source: Hoshen, Wolf, "Non-Adversarial Unsupervised Word Translation", EMNLP 2018, arXiv:1801.06126. CSLS
    and rounds of it: Conneau et al., "Word Translation Without Parallel Data", ICLR 2018, arXiv:1710.04087.
    Halving, skewness, trials, controls and the preset "robust" are our choice.

    Example:
        >>> import torch
        >>> from fastkit.methods.word_translation import WordTranslator
        >>> generator = torch.Generator().manual_seed(1)
        >>> table = torch.randn(600, 30, generator=generator).exp() * torch.linspace(3, 0.3, 30)
        >>> turn = torch.linalg.qr(torch.randn(30, 30, generator=generator))[0]
        >>> translator = WordTranslator(restarts=8).fit(table, table @ turn)
        >>> translator.translate(table[:3], k=1).indices.flatten(), translator.converged_
        (tensor([0, 1, 2]), True)
    """

    w_xy_: Tensor
    w_yx_: Tensor
    means_x_: Tensor
    means_y_: Tensor
    converged_: bool
    candidates_: list[Candidate]
    control_score_: float
    criterion_: float
    best_restart_: int
    restart_costs_: Tensor
    restart_mutual_: Tensor
    restart_epochs_: Tensor
    restart_seeds_: Tensor
    penalty_: Tensor | None
    timings_: dict[str, float]
    _fitted: Settings
    _index: Index | None

    def __init__(
        self,
        preset: Preset = "robust",
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
        retrieval: Retrieval = "csls",
        neighbors: int = 10,
        isf_beta: float = 30.0,
        preprocess: Sequence[Step] | None = None,
        seed: int = 0,
        allow_rect: bool = False,
        progress: bool | None = None,
    ) -> None:
        self.preset = preset
        self.words = words
        self.components = components
        self.restarts = restarts
        self.epochs = epochs
        self.halvings = halvings
        self.batch_size = batch_size
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.cycle_weight = cycle_weight
        self.candidates = candidates
        self.controls = controls
        self.trial_words = trial_words
        self.trial_rounds = trial_rounds
        self.transfer = transfer
        self.transfer_words = transfer_words
        self.transfer_epochs = transfer_epochs
        self.refine = refine
        self.refine_words = refine_words
        self.refine_epochs = refine_epochs
        self.refine_rounds = refine_rounds
        self.dictionary = dictionary
        self.criterion_words = criterion_words
        self.retrieval = retrieval
        self.neighbors = neighbors
        self.isf_beta = isf_beta
        self.preprocess = preprocess
        self.seed = seed
        self.allow_rect = allow_rect
        self.progress = progress

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, as they were given; ``deep`` is there for scikit-learn."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change arguments, for the next fit."""
        unknown = [name for name in params if name not in self._names()]
        if unknown:
            raise ValueError(
                f"{OP}: set_params must be given arguments of the class, got {', '.join(unknown)}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        changed = (
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value != parameters[name].default
        )
        return f"{type(self).__name__}({', '.join(changed)})"

    # Fit

    @torch.no_grad()
    def fit(
        self,
        X: Tensor | np.ndarray[Any, Any],  # (n, D)
        Y: Tensor | np.ndarray[Any, Any],  # (m, E)
        *,
        pairs: Tensor | np.ndarray[Any, Any] | None = None,  # (P, 2)
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Find the maps.

        Args:
            X, Y: the tables, floats, a row for each word, the most frequent first; on one device.
            pairs: rows of X and Y that are translations, integers: supervised, by Procrustes, and no restarts
                are run.
            checkpoint: a folder in which all that is finished is kept. A fit that was stopped goes on there
                when it is called again, and ends with the same bits.

        Raises:
            ValueError: an option or a shape is not as above; NaN, inf or zeros in a row; fewer rows than
                columns, components, ``neighbors`` or ``batch_size``; different columns without
                ``allow_rect``; ``checkpoint`` is of other data or options; no mutual pair for
                ``"reciprocal_icp"``.
            TypeError: a table is not of floats, or an option is of another type.

        Warns:
            UserWarning: nothing has converged.
        """
        settings = self._settings(supervised=pairs is not None)
        if self.progress not in (None, True, False):
            raise TypeError(f"{OP}: progress must be None, True or False, got {self.progress!r}")
        x, y = as_table("X", X), as_table("Y", Y)
        known = None if pairs is None else as_pairs(pairs, x, y)
        check_tables(x, y, settings, supervised=known is not None)
        if known is not None:
            warn_of_few(known, x, y)
        facts: dict[str, Any] = {"settings": settings.facts()}
        if checkpoint is not None:
            facts |= {"X": digest(x), "Y": digest(y), "pairs": None if known is None else digest(known)}
        stages = Stages(None if checkpoint is None else Path(checkpoint), facts, x.device, self.progress)
        with stages.timed("preprocess"):
            own_x, means_x = preprocessed("X", x, settings.preprocess)
            own_y, means_y = preprocessed("Y", y, settings.preprocess)
        alignment = align_tables(x, y, own_x, own_y, known, settings, stages)
        with stages.timed("retrieval"):
            index = Index(unit(mapped(own_x, alignment.maps.w_xy)), unit(own_y), settings)
            charged = index.penalty(settings.retrieval)
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        restarts, trials, count = alignment.restarts, alignment.trials, settings.restarts
        self.w_xy_, self.w_yx_ = alignment.maps
        self.means_x_, self.means_y_ = means_x, means_y
        self.criterion_ = alignment.score
        self.converged_ = trials is None or (trials.converged and alignment.agreement >= KEPT)
        self.candidates_ = [] if trials is None else trials.candidates
        self.control_score_ = math.nan if trials is None else trials.control_score
        self.best_restart_ = -1 if trials is None else trials.best
        self.restart_costs_ = x.new_zeros(0) if restarts is None else restarts.cost[:count]
        self.restart_mutual_ = none if restarts is None else restarts.mutual[:count]
        self.restart_epochs_ = none if restarts is None else restarts.epochs[:count]
        self.restart_seeds_ = none if restarts is None else restarts.seeds[:count]
        self.restart_nearest_: Tensor = none if restarts is None else restarts.nearest_target[:count].int()
        self.penalty_ = charged
        self.timings_ = stages.timings
        # What was fitted is used with the options of its fit, whatever set_params says later.
        self._fitted, self._index = settings, index
        if trials is not None and not self.converged_:
            # At the caller of fit, which no_grad wraps.
            warnings.warn(advice(trials, alignment.agreement, count), stacklevel=3)
        return self

    def _settings(self, *, supervised: bool) -> Settings:
        options = {name: value for name, value in self.get_params().items() if name in OPTIONS}
        if supervised and options["refine"] is None:
            options["refine"] = "none"
        return resolve(self.preset, options)

    # Use

    @torch.no_grad()
    def transform(self, X: Tensor | np.ndarray[Any, Any]) -> Tensor:  # (n, D) -> (n, E)
        """Rows of the source table, preprocessed as in the fit, in the target's space."""
        self._check_fitted("transform")
        return mapped(self._own("X", X, self.means_x_, self.w_xy_), self.w_xy_)

    @torch.no_grad()
    def transform_target(self, Y: Tensor | np.ndarray[Any, Any]) -> Tensor:  # (m, E)
        """Rows of the target table, preprocessed as in the fit: what ``transform`` maps next to."""
        self._check_fitted("transform_target")
        return self._own("Y", Y, self.means_y_, self.w_yx_)

    @torch.no_grad()
    def inverse(self, Y: Tensor | np.ndarray[Any, Any]) -> Tensor:  # (m, E) -> (m, D)
        """Rows of the target table, preprocessed as in the fit, in the source's space."""
        self._check_fitted("inverse")
        return mapped(self._own("Y", Y, self.means_y_, self.w_yx_), self.w_yx_)

    @torch.no_grad()
    def translate(
        self,
        vectors: Tensor | np.ndarray[Any, Any],  # (q, D)
        k: int = 10,
        *,
        retrieval: Retrieval | None = None,
    ) -> Translations:  # scores (q, k), indices (q, k)
        """The k best translations of each vector of the source's space, among the words of Y.

        What a target is charged with is that of the fit, over all words of X: a word has the same
        translations, bit for bit, by itself and among others. Of another ``retrieval`` than that of the class
        it is computed once, at its first use.

        Returns:
            ``Translations(scores, indices)``: descending, ties by the lower row. CSLS:
            ``2 cos - mean of the query's nearest - penalty``; ISF: the softmax over sources; NN: the cosine.
        """
        self._check_fitted("translate")
        rows = self._own("vectors", vectors, self.means_x_, self.w_xy_)
        return self._tables().search(unit(mapped(rows, self.w_xy_)), k, retrieval)

    @torch.no_grad()
    def score(
        self,
        pairs: Tensor | np.ndarray[Any, Any],  # (P, 2)
        ks: Sequence[int] = (1, 5, 10),
        *,
        retrieval: Retrieval | None = None,
    ) -> Score:
        """The part of the sources in ``pairs``, rows of X and Y, of which a target is among the first k.

        A source with several targets is one query, right if any of them is found. ``row_pairs`` makes pairs
        of rows of a dictionary of words, and has its coverage.
        """
        self._check_fitted("score")
        return self._tables().score(pairs, ks, retrieval)

    def _tables(self) -> Index:
        if self._index is None:
            raise RuntimeError(
                f"{OP}: translations must have the tables, got a file of save(tables=False); save it with"
                " them, or search by transform(X)"
            )
        return self._index

    def _own(self, name: str, value: object, means: Tensor, w: Tensor) -> Tensor:
        """Rows of one of the spaces, preprocessed."""
        table = as_table(name, value)
        if table.device != w.device:
            raise RuntimeError(
                f"{OP}: {name} must be on the device of the maps, {w.device}, got {table.device}"
            )
        if table.shape[1] != w.shape[1]:
            raise ValueError(f"{OP}: {name} must have {w.shape[1]} columns, got shape {tuple(table.shape)}")
        return apply_steps(table, self._fitted.preprocess, means)

    def _check_fitted(self, method: str) -> None:
        if not hasattr(self, "w_xy_"):
            raise RuntimeError(f"{OP}: {method} needs a fit; call fit(X, Y) first")

    # Files

    def save(self, path: str | os.PathLike[str], *, tables: bool = True) -> None:
        """Write all that was learnt into one safetensors file, which is replaced whole.

        Args:
            path: of the file.
            tables: with both tables, mapped and normalised, which translations are searched in,
                ``4 (n + m) E`` bytes; without them a file has the maps, and ``transform`` and ``inverse``.
        """
        self._check_fitted("save")
        files.save(Path(path), self, self._fitted, self._tables() if tables else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """What ``save`` wrote; a file that is cut off, or of something else, is refused."""
        translator, translator._fitted, translator._index = files.load(Path(path), cls, device)
        return translator
