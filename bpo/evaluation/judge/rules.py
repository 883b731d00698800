"""The rules by type of benchmark."""

from __future__ import annotations

from bpo.evaluation.judge.ratings import LlavaBenchRule, MMHalRule, MMVetRule
from bpo.evaluation.judge.readings import HallusionRule, ObjectHalRule
from bpo.evaluation.judge.rule import Rule
from bpo.evaluation.judge.sentences import ShrRule

RULES: dict[str, type[Rule]] = {
    "hallusion": HallusionRule,
    "llava_bench": LlavaBenchRule,
    "mmhal": MMHalRule,
    "mmvet": MMVetRule,
    "objhal": ObjectHalRule,
    "shr": ShrRule,
}
