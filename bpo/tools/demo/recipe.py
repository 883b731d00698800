"""All hyperparameters of the demo; docs/log.md documents how each was chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bpo.config.bootstrap import BootstrapConfig, InjectConfig, ValidateConfig, WeakenConfig
from bpo.config.measure import MeasureConfig
from bpo.config.training import (
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    TrainableConfig,
    TrainConfig,
)
from bpo.tools.demo.base import BaseConfig
from bpo.tools.demo.files import MAX_DESCRIPTION_TOKENS, World
from bpo.tools.demo.rewriting import prompt_dir
from bpo.tools.demo.world import DESCRIBE, WorldConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One trained model of the report: its negatives and its loss."""

    name: str
    label: str
    description: str
    completion_types: tuple[str, ...]
    loss: str = "sigmoid"


BASE = Variant(name="base", label="Base", description="before any preference training", completion_types=())
VARIANTS = (
    Variant(
        name="sft",
        label="SFT on chosen",
        description="control: only the chosen answers, same groups and steps",
        completion_types=("mllm-hal", "llm-hal"),
        loss="sft",
    ),
    Variant(
        name="bpo",
        label="BPO",
        description="weakened images and injected errors as rejected answers",
        completion_types=("mllm-hal", "llm-hal"),
    ),
    Variant(
        name="bpo_weaken_only",
        label="BPO, weakened only",
        description="only answers to the weakened image",
        completion_types=("mllm-hal",),
    ),
    Variant(
        name="bpo_inject_only",
        label="BPO, injected only",
        description="only annotations with injected errors",
        completion_types=("llm-hal",),
    ),
    Variant(
        name="bpo_swap",
        label="BPO, swap only",
        description="only annotations of other images, each as often rejected as chosen",
        completion_types=("swap",),
    ),
    Variant(
        name="bpo_unweakened",
        label="BPO, unweakened",
        description="control: the model's answers to the clean image",
        completion_types=("mllm-self",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and hyperparameters of the demo."""

    num_annotations: int = 1000
    num_evaluation_scenes: int = 400
    noise_step: int = 900
    max_new_tokens: int = MAX_DESCRIPTION_TOKENS
    steps: int = 93
    groups_per_step: int = 32
    lr: float = 5e-4
    beta: float = 0.5
    chosen_nll_weight: float = 1.0
    batch_size: int = 128
    measured_records: int = 200
    num_ranks: int = 2

    def world(self, seed: int) -> WorldConfig:
        return WorldConfig(
            seed=seed, num_annotations=self.num_annotations, num_evaluation_scenes=self.num_evaluation_scenes
        )

    def base(self, seed: int) -> BaseConfig:
        return BaseConfig(seed=seed)

    def bootstrap(self, root: Path, world: World, seed: int) -> Config:
        """All negatives in one file; each training selects types. The model's own language model injects the errors.

        Some records have a negative from `swap` only. Training drops groups without a selected type before it plans the
        steps, so the other variants do not depend on `swap`.
        """
        return Config(
            model=ModelConfig(path=str(root / "base"), dtype="float32"),
            data=DataConfig(
                annotations=str(world.annotations),
                groups=str(root / "groups.jsonl"),
                image_root=str(world.images),
                num_workers=0,
            ),
            bootstrap=BootstrapConfig(
                sources=["weaken", "unweakened", "inject", "swap"],
                weaken=WeakenConfig(noise_step=self.noise_step, max_new_tokens=self.max_new_tokens),
                inject=InjectConfig(mode="description", prompt_dir=prompt_dir(), max_new_tokens=self.max_new_tokens),
                # Variants train on different sources, so equal negatives of two sources are not duplicates.
                validate=ValidateConfig(refuse_duplicates=False),
                batch_size=self.batch_size,
                seed=seed,
            ),
        )

    def measure(self, root: Path, world: World, seed: int) -> Config:
        """Measures of all negatives, those of the base model on a sample."""
        options = MeasureConfig(records=self.measured_records, seed=seed)
        return replace(self.bootstrap(root, world, seed), measure=options)

    def training(self, root: Path, world: World, variant: Variant, seed: int) -> Config:
        return Config(
            model=ModelConfig(path=str(root / "base"), dtype="float32"),
            data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(world.images), num_workers=0),
            trainable=TrainableConfig(language="full"),
            loss=LossConfig(
                type=variant.loss,
                beta=self.beta,
                chosen_nll_weight=0.0 if variant.loss == "sft" else self.chosen_nll_weight,
            ),
            train=TrainConfig(
                output_dir=str(root / variant.name),
                ds_config="ds_configs/zero3.json",
                epochs=1000,  # max_steps ends the run, so that all variants take the same number of steps
                max_steps=self.steps,
                groups_per_step=self.groups_per_step,
                completion_types=list(variant.completion_types),
                lr=self.lr,
                seed=seed,
            ),
        )

    def evaluation(self, world: World) -> EvaluationConfig:
        return EvaluationConfig(
            chair_instances=str(world.instances),
            chair_captions=str(world.captions),
            synonyms=str(world.synonyms),
            chair_prompt=DESCRIBE,
            pope_questions=[str(path) for path in world.pope.values()],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
