"""Exports a checkpoint as a merged model directory or a PEFT adapter."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bpo.checkpoint.files import MANIFEST, CheckpointError, verify_checkpoint
from bpo.checkpoint.shards import ShardSet
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import Family, family_of
from bpo.model.load import load_model
from bpo.model.trainable import lora_config

logger = logging.getLogger(__name__)

# All other files of a model directory belong to the processor or the generation settings.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


def find_checkpoint(path: Path) -> Path:
    """Returns `path` if it is a checkpoint, else the latest checkpoint of that output directory.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    pointer = path / "checkpoints" / "latest"
    if not pointer.is_file():
        raise ValueError(f"export.checkpoint {path}: neither a checkpoint nor a run directory with checkpoints/latest")
    newest = pointer.with_name(pointer.read_text(encoding="utf-8").strip())
    if not (newest / MANIFEST).is_file():
        raise ValueError(f"export.checkpoint {path}: its latest checkpoint {newest} does not exist; choose another one")
    return newest


def _section(cls: type, tree: dict[str, Any]) -> Any:
    """A configuration section from a manifest, without keys that newer versions dropped."""
    known = {entry.name for entry in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in tree.items() if key in known})


def run_export(config: Config) -> Path:
    """Writes `export.output` from `export.checkpoint` and the base model of the run.

    `model.path`, if given, replaces the path stored in the checkpoint, for model directories that moved.

    Raises:
        ValueError: a path is missing, or an adapter is requested but more than LoRA and projector was trained.
    """
    if not config.export.checkpoint or not config.export.output:
        raise ValueError("export.checkpoint and export.output must both be given")
    checkpoint = find_checkpoint(Path(config.export.checkpoint))
    try:
        manifest = verify_checkpoint(checkpoint)
    except CheckpointError as error:
        raise ValueError(f"export.checkpoint: {error}; export another checkpoint") from error
    tree = manifest["config"]
    model_config: ModelConfig = _section(ModelConfig, tree["model"])
    if config.model.path:
        model_config = dataclasses.replace(model_config, path=config.model.path)
    trainable: TrainableConfig = _section(TrainableConfig, tree["trainable"])
    adapter: LoraConfig = _section(LoraConfig, tree["lora"])
    state = dict(
        ShardSet(checkpoint, [name for name in manifest["files"] if name.endswith(".safetensors")]).parameters()
    )
    output = Path(config.export.output)
    if config.export.form == "adapter":
        _write_adapter(output, state, model_config, trainable, adapter)
    else:
        _write_merged(output, state, model_config, trainable, adapter)
    logger.info("exported step %d of %s to %s", manifest["step"], checkpoint, output)
    return output


def _write_merged(
    output: Path, state: dict[str, torch.Tensor], config: ModelConfig, trainable: TrainableConfig, lora: LoraConfig
) -> None:
    model = load_model(config)
    family = family_of(model.config)
    if trainable.language == "lora":
        import peft

        adapted = peft.LoraModel(model, lora_config(model, family, lora, config.path), "default")
        _load_exactly(adapted.model, state)
        model = adapted.merge_and_unload()
    else:
        _load_exactly(model, state)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    copy_processor(Path(config.path), output)


def _load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Loads trained parameters; each must exist in the model (tied names count once), and every adapter must be set."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(
            f"the checkpoint has parameters the model lacks: {', '.join(unexpected[:5])}; wrong base model?"
        )
    missing = [name for name, _ in model.named_parameters() if "lora_" in name and name not in state]
    if missing:
        raise ValueError(f"the checkpoint lacks parameters that were trained: {', '.join(missing[:5])}")


def _write_adapter(
    output: Path, state: dict[str, torch.Tensor], config: ModelConfig, trainable: TrainableConfig, lora: LoraConfig
) -> None:
    if trainable.language != "lora" or trainable.vision != "frozen":
        raise ValueError(
            f"export.form=adapter needs trainable.language=lora and a frozen vision tower; this run had "
            f"language={trainable.language}, vision={trainable.vision}. Use export.form=merged"
        )
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    family = family_of(model_config)
    with torch.device("meta"):  # only names are needed
        model = AutoModelForImageTextToText.from_config(model_config)
    settings = lora_config(model, family, lora, config.path)
    settings.inference_mode = True
    if trainable.projector == "full":
        if family.projector_parameters:
            raise ValueError(
                f"export.form=adapter cannot hold {', '.join(family.projector_parameters)}, which the projector of "
                f"`{model_config.model_type}` trains in addition to its modules; use export.form=merged"
            )
        settings.modules_to_save = list(_saved_modules(model, family))
    output.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(output))
    # PEFT's names: no adapter name, and a prefix for its two wrappers.
    renamed = {f"base_model.model.{name.replace('.default.', '.')}": value for name, value in state.items()}
    save_file(renamed, output / "adapter_model.safetensors", metadata={"format": "pt"})
    copy_processor(Path(config.path), output, skip={"config.json", "generation_config.json"})


def _saved_modules(model: torch.nn.Module, family: Family) -> Iterator[str]:
    """Projector names for PEFT, which matches the end of module names and takes members of a list, not the list."""
    for name in family.projector_modules:
        module = model.get_submodule(name)
        members = [f"{name}.{child}" for child, _ in module.named_children()]
        yield from members if isinstance(module, torch.nn.ModuleList) else [name.rsplit(".", 1)[-1]]


def copy_processor(source: Path, output: Path, skip: set[str] | None = None) -> None:
    """Copies tokenizer, image processor and chat template files unchanged; a hub id is read from the cache."""
    if not source.is_dir():
        from transformers.utils import cached_file

        source = Path(str(cached_file(str(source), "config.json"))).parent
    for file in sorted(source.iterdir()):
        is_weight = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weight and file.name not in (skip or set()) and not (output / file.name).exists():
            shutil.copy2(file, output / file.name)
