"""Options of `bpo evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bpo.config.decoding import CalibrationConfig, ContrastConfig, Decoding, GridConfig, SamplingConfig
from bpo.config.options import NUM_SEEDS, Section, check, number, seconds


@dataclass(kw_only=True)
class EvaluationConfig(Section):
    """Benchmarks of `bpo evaluate`, and how answers are decoded.

    Attributes:
        output: JSON file for the results.
        suite: YAML file with the list `benchmarks` (docs/evaluation.md); replaces the options below that name files.
        answers: File with answers that something else gave, to be scored instead of generating any.
        questions: Question file of a judged benchmark, with `format`; writes its official answer file.
        format: Name of a benchmark for `questions`, such as mmhal.
        chair_instances: COCO instances JSON (`images`, `annotations`, `categories`); empty skips CHAIR.
        chair_captions: COCO captions JSON; objects mentioned in captions also count as present.
        synonyms: File with one object per line, its canonical name followed by synonyms; empty uses the category names.
        chair_prompt: Prompt that asks for a description.
        pope_questions: POPE files (JSONL: question_id, image, text, label); the split is taken from the file name.
        images: File with one image path per line; restricts benchmarks without a list or sample of their own.
        sample: Number of images to draw for each such benchmark, from the list if there is one; 0 takes all.
        sample_seed: Seed of the draw.
        max_new_tokens: Maximum number of tokens per answer, without a suite; a suite's benchmarks have their own.
        batch_size: Number of answers generated per batch.
        decoding: `plain`; `vdd` and `vcd` contrast with biased views of the image; `calibration` corrects the
            probabilities of yes and no, other questions are answered plainly; `grid` tries sampling settings.
        sampling: Temperature, nucleus, beams.
        contrast: Biased views and strength, for vdd, vcd and calibration.
        calibration: Form of the calibration.
        grid: Settings of the grid.
        num_shards: Number of jobs that share the questions and the output, such as array tasks; shard 0 scores.
        shard_index: Index of this job, starting from 0.
        max_idle_restarts: Maximum SLURM restarts without a new answer before the job fails; 0 means no limit.
        stall_timeout_s: Seconds without a batch answered by any rank after which rank 0 stops waiting for the others.
    """

    where = "evaluation"

    output: str = ""
    suite: str = ""
    answers: str = ""
    questions: str = ""
    format: str = ""
    chair_instances: str = ""
    chair_captions: str = ""
    synonyms: str = ""
    chair_prompt: str = "Please describe this image in detail."
    pope_questions: list[str] = field(default_factory=list)
    images: str = ""
    sample: int = number(0, at_least=0, zero="all")
    sample_seed: int = number(0, at_least=0, below=NUM_SEEDS)
    max_new_tokens: int = number(512, at_least=1)
    batch_size: int = number(16, at_least=1)
    decoding: Decoding = "plain"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    num_shards: int = number(1, at_least=1)
    shard_index: int = number(0, at_least=0)
    max_idle_restarts: int = number(3, at_least=0, zero="no limit")
    stall_timeout_s: float = seconds(3600.0, at_least=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.sampling.num_beams == 1 or self.decoding not in ("vdd", "vcd"),
            f"evaluation.decoding={self.decoding} has no beam search; set evaluation.sampling.num_beams to 1",
        )
        check(
            self.shard_index < self.num_shards,
            f"evaluation.shard_index is {self.shard_index}; it must be below num_shards {self.num_shards}",
        )
