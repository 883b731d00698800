"""Options of how evaluation decodes answers: sampling, contrast with a biased view, calibration of label tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.options import NUM_SEEDS, Range, Section, check, number

Decoding = Literal["plain", "vdd", "vcd", "calibration", "grid"]
BiasedView = Literal["none", "unk", "noise"]


@dataclass(kw_only=True)
class ContrastConfig(Section):
    """Contrast of the logits with those of a biased view of the image: (1 + alpha) z - alpha z_biased.

    Attributes:
        views: Biased views, whose logits are averaged: `none` has no image, `unk` the unknown token in place of image
            tokens, `noise` a noised image; empty uses the method's own: `noise` for vcd, `none` for the others.
        alpha: Weight of the contrast.
        beta: Plausibility cut: tokens below `beta` times the largest probability under the true image are excluded.
        noise_step: Diffusion step of the view `noise`; 0 uses the method's own, 500 for vcd and 999 for the others.
    """

    where = "evaluation.contrast"

    views: list[BiasedView] = field(default_factory=list)
    alpha: float = number(1.0, at_least=0)
    beta: float = number(0.1, at_least=0, at_most=1)
    noise_step: int = number(0, at_least=0, at_most=999, zero="the method's own")


@dataclass(kw_only=True)
class CalibrationConfig(Section):
    """Post-hoc calibration of the probabilities p of label tokens by those under a biased view, p_biased.

    Attributes:
        form: `scale` chooses the largest p / p_biased, `shift` the largest p - p_biased.
        over: `sample` uses the p_biased of each question, `dataset` their mean over the benchmark.
    """

    where = "evaluation.calibration"

    form: Literal["scale", "shift"] = "scale"
    over: Literal["sample", "dataset"] = "sample"


@dataclass(kw_only=True)
class GridConfig(Section):
    """Settings that `evaluation.decoding=grid` tries: each entry of each list, with the others at their defaults.

    Attributes:
        temperature: Temperatures.
        top_p: Nucleus sizes, at temperature 1.
        top_k: Numbers of most probable tokens, at temperature 1.
    """

    where = "evaluation.grid"

    temperature: list[float] = field(default_factory=lambda: [0.2, 0.6, 1.0], metadata={"range": Range(at_least=0)})
    top_p: list[float] = field(default_factory=lambda: [0.4, 0.7, 0.9], metadata={"range": Range(above=0, at_most=1)})
    top_k: list[int] = field(default_factory=lambda: [5, 50], metadata={"range": Range(at_least=1)})


@dataclass(kw_only=True)
class SamplingConfig(Section):
    """Sampling of evaluated answers; greedy by default.

    Attributes:
        temperature: 0 is greedy.
        top_p: Smallest set of tokens with this probability.
        top_k: Number of most probable tokens; 0 keeps all.
        num_beams: Beams of a beam search, with temperature 0; 1 is greedy.
        seed: With the question, the seed of its sample and of the noise of its image.
    """

    where = "evaluation.sampling"

    temperature: float = number(0.0, at_least=0)
    top_p: float = number(1.0, above=0, at_most=1)
    top_k: int = number(0, at_least=0, zero="all")
    num_beams: int = number(1, at_least=1, at_most=64)
    seed: int = number(0, at_least=0, below=NUM_SEEDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.num_beams == 1 or self.temperature == 0,
            f"evaluation.sampling: num_beams={self.num_beams} does not sample; set temperature to 0, not "
            f"{self.temperature:g}, or num_beams to 1",
        )
