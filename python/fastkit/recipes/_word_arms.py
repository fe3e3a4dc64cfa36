"""The arms of ``run word_translation``: how a translator is made, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Arm(NamedTuple):
    """Options of ``WordTranslator``; supervised: it is given the pairs of the training dictionary."""

    summary: str
    options: Mapping[str, Any] = {}
    supervised: bool = False


ARMS: Mapping[str, Arm] = {
    "robust": Arm("the default"),
    "no_refinement": Arm("the best trial's map: three rounds on 5000 words", {"refine": "none"}),
    "restarts_only": Arm(
        "Procrustes on the mutual pairs of the best restart", {"refine": "none", "trial_rounds": 0}
    ),
    "skewness_only": Arm("restart 0 alone, whose signs are those of skewness", {"restarts": 1}),
    "no_halving": Arm("no restart is dropped", {"halvings": ()}),
    "mutual": Arm("dictionaries of mutual pairs", {"dictionary": "mutual"}),
    "no_preprocessing": Arm("tables as they are", {"preprocess": ()}),
    "reciprocal_icp": Arm("ICP on mutual pairs instead of Procrustes", {"refine": "reciprocal_icp"}),
    "release": Arm("the published method with the options of its code", {"preset": "release"}),
    "release_procrustes": Arm(
        "the same, then rounds of Procrustes", {"preset": "release", "refine": "procrustes_csls"}
    ),
    "supervised": Arm("Procrustes on the training dictionary", supervised=True),
    "supervised_refined": Arm(
        "the same, then rounds of Procrustes", {"refine": "procrustes_csls"}, supervised=True
    ),
}
