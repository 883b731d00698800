"""Options of `bpo export`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bpo.config.options import Section, check, number


@dataclass(kw_only=True)
class ExportConfig(Section):
    """Options of `bpo export`.

    Attributes:
        checkpoint: Checkpoint directory, or a run's output_dir for its latest checkpoint.
        output: Output directory.
        form: `merged` writes full weights and the processor; `adapter` only the trained weights, as a PEFT adapter.
        dtype: Data type of merged weights; empty uses the one in which the model was trained.
        rounding: Rounding of merged LoRA weights to `dtype`. `nearest` drops changes below half a unit in the last
            place; `stochastic` rounds up or down at random such that the mean is exact, which keeps them, with noise.
            In bfloat16 it was measured to be better at changes of rms 3e-5 and less, and worse from 1e-4.
        check_groups: Number of preference groups on which the exported model is compared with the trained one and the
            base: from data.groups, or else from the file that was trained on. 0 compares weights only.
        check_dtype: Data type of the arithmetic of this comparison. float32 shows the effect of the exported weights
            alone; half precision needs half the memory and adds rounding of activations.
        min_survived: Smallest fraction of the training's change that the export must keep, in the weights and in the
            log-probs; below it nothing is exported. 0 accepts everything.
        max_gap: Largest mean difference between log-probs of the exported and the trained model, relative to the
            training's own change; above it nothing is exported.
        metrics: Results of `bpo evaluate` (JSON) for the model card.
        push: Repository on the Hugging Face Hub, OWNER/NAME, to which the finished directory is uploaded.
        private: Create that repository as a private one.
    """

    where = "export"

    checkpoint: str = ""
    output: str = ""
    form: Literal["merged", "adapter"] = "merged"
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    check_groups: int = number(8, at_least=0, zero="off")
    check_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    min_survived: float = number(0.5, at_least=0, at_most=1)
    max_gap: float = number(1.0, above=0)
    metrics: str = ""
    push: str = ""
    private: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.push or re.fullmatch(r"[\w.-]+/[\w.-]+", self.push) is not None,
            f"export.push is {self.push!r}; give the repository as OWNER/NAME",
        )
        changed = [name for name, default in (("dtype", ""), ("rounding", "nearest")) if getattr(self, name) != default]
        check(
            self.form == "merged" or not changed,
            f"export.{' and export.'.join(changed)} affect merged weights only; remove them, or use export.form=merged",
        )
