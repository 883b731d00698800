"""The arms of the comparison and their options: what is rejected, and the grid that every arm is tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from benchmarks.grounding.base import language_model
from benchmarks.grounding.world import COLOURS, THINGS
from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.config.bootstrap import BootstrapConfig, InjectConfig, Source, ValidateConfig, WeakenConfig
from bpo.config.negatives import EditConfig, SwapConfig
from bpo.config.training import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    TrainableConfig,
    TrainConfig,
)

# Records per seed that have a negative of every source, and of them the groups of one step.
NUM_RECORDS, NUM_RECORDS_OF_INJECTION = 320, 160
GROUPS_PER_STEP = 8
REPEATED: tuple[Source, ...] = ("weaken", "swap")
ONLY_FIRST: tuple[Source, ...] = ("edit", "unweakened")
INJECTION: tuple[Source, ...] = ("weaken", "inject")
# Seeds from here on are of records with injected errors: most injections are refused, and which records keep theirs is
# no fair sample, so they have annotations, and a control, of their own.
FIRST_INJECTION_SEED = 100


@dataclass(frozen=True)
class Arm:
    """One way to train: rejected answers of these sources; none trains on the chosen answers alone."""

    name: str
    what: str
    sources: tuple[Source, ...]


ARMS = (
    Arm("sft", "fine-tuning on the chosen answers (control)", ()),
    Arm("weaken", "answers to noised images", ("weaken",)),
    Arm("unweakened", "answers to the clean images", ("unweakened",)),
    Arm("swap", "annotations of other images, exactly balanced", ("swap",)),
    Arm("edit", "one word exchanged, exactly balanced", ("edit",)),
    Arm("swap+edit", "both balanced sources", ("swap", "edit")),
    Arm("swap+weaken", "balanced texts and answers to noised images", ("swap", "weaken")),
    Arm("inject", "annotations into which SmolLM2 injected errors", ("inject",)),
    Arm("weaken+inject", "both of the paper's sources, the default", ("weaken", "inject")),
)
ARM_OF = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True)
class Setting:
    """A point of the grid: learning rate, beta and weight of the chosen answers' likelihood."""

    lr: float
    beta: float
    chosen_weight: float

    @property
    def name(self) -> str:
        return f"lr{self.lr:g}-beta{self.beta:g}-chosen{self.chosen_weight:g}"


# Chosen by pilot runs on validation scenes (results: `tuning`): (3e-4, 0.1, 1.0) was worse than both of these for swap,
# edit and both together, and for weaken; for swap also learning rates 1e-4, 5e-4 and 1e-3.
GRID = (Setting(3e-4, 0.1, 0.3), Setting(3e-4, 0.05, 0.3))
# Fine-tuning has neither beta nor a weight; it gets the larger number of trials.
SFT_GRID = tuple(Setting(lr, 0.5, 1.0) for lr in (3e-4, 1e-4, 1e-3))


def grid_of(arm: Arm) -> tuple[Setting, ...]:
    return GRID if arm.sources else SFT_GRID


def sources_of_seed(seed: int) -> tuple[Source, ...]:
    """Sources of which every record of a seed has a negative; the first one ranks them, the others repeat the best."""
    if seed >= FIRST_INJECTION_SEED:
        return INJECTION
    return (*REPEATED, *ONLY_FIRST) if seed == 0 else REPEATED


def tuning_seed_of(arm: Arm) -> int:
    return FIRST_INJECTION_SEED if "inject" in arm.sources else 0


def seeds_of(arm: Arm, arms: Sequence[Arm], seeds: int) -> list[int]:
    """The seeds of an arm in a comparison of `arms`, of which at most two of the injection sets, if one needs them."""
    injection = FIRST_INJECTION_SEED if any("inject" in other.sources for other in arms) else 0
    some = range(injection, injection + min(seeds, 2)) if injection else ()
    return [seed for seed in (*range(seeds), *some) if set(arm.sources) <= set(sources_of_seed(seed))]


def write_lexicon(path: Path) -> Path:
    """The shipped lexicon with the things of this world that it lacks."""
    tree = yaml.safe_load(files("bpo.bootstrap").joinpath("lexicon/en.yaml").read_text(encoding="utf-8"))
    known = {name.strip() for line in tree["objects"] for name in line.split(",")}
    tree["objects"] += [thing.name for thing in THINGS if thing.name not in known]
    attributes = {word.strip() for line in tree["attributes"] for word in line.split(",")}
    tree["attributes"] += [colour for colour in COLOURS if colour not in attributes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def bootstrap_config(root: Path, seed: int, batch_size: int = 32) -> Config:
    """All sources in one job; equal negatives of two sources are not duplicates, since arms take different sources."""
    folder = root / f"seed-{seed}"
    llm, gguf_file = language_model()
    return Config(
        model=ModelConfig(path=str(root / "base"), dtype="bfloat16"),
        data=DataConfig(
            annotations=str(folder / "annotations.json"),
            groups=str(folder / "all.jsonl"),
            image_root=str(folder / "images"),
            num_workers=0,
        ),
        bootstrap=BootstrapConfig(
            sources=list(sources_of_seed(seed)),
            weaken=WeakenConfig(max_new_tokens=64),
            inject=InjectConfig(llm=str(llm), gguf_file=gguf_file, mode="auto", max_new_tokens=96, dtype="bfloat16"),
            swap=SwapConfig(unit="answer"),
            edit=EditConfig(),
            validate=ValidateConfig(refuse_duplicates=False, lexicon=str(root / "lexicon.yaml")),
            batch_size=batch_size,
            num_workers=0,
            seed=seed,
        ),
    )


def training_config(root: Path, arm: Arm, setting: Setting, seed: int, output: Path) -> Config:
    folder = root / f"seed-{seed}"
    # Fine-tuning reads the chosen answers of the same records; any source selects them.
    sources = arm.sources or sources_of_seed(seed)[:1]
    return Config(
        model=ModelConfig(path=str(root / "base"), dtype="bfloat16"),
        data=DataConfig(groups=str(folder / "groups.jsonl"), image_root=str(folder / "images"), num_workers=0),
        lora=LoraConfig(r=32, alpha=64, dropout=0.0),
        trainable=TrainableConfig(language="lora", projector="full"),
        loss=LossConfig(
            type="sigmoid" if arm.sources else "sft",
            beta=setting.beta,
            chosen_nll_weight=setting.chosen_weight if arm.sources else 0.0,
        ),
        train=TrainConfig(
            output_dir=str(output),
            ds_config="ds_configs/zero2.json",
            epochs=1,
            groups_per_step=GROUPS_PER_STEP,
            max_micro_batch_tokens=1024,
            completion_types=[COMPLETION_TYPES[source] for source in sources],
            lr=setting.lr,
            warmup_ratio=0.1,
            seed=seed,
            tensorboard=False,
            reference_dir=str(folder / "reference" / arm.name),
            reference_micro_batch_tokens=2048,
        ),
    )
