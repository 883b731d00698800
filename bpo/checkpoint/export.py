"""Exports a checkpoint as a merged model directory or a PEFT adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bpo.checkpoint.compatible import WEIGHTS, base_digest, base_files
from bpo.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    checkpoint_dirs,
    follow_pointer,
    latest_valid,
    verify_checkpoint,
)
from bpo.checkpoint.shards import ShardSet
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import Family, family_of
from bpo.job.durable import file_digest, new_directory
from bpo.model.load import load_model
from bpo.model.reference.fingerprint import model_fingerprint
from bpo.model.trainable import lora_config, prepare_trainable

logger = logging.getLogger(__name__)

# Names what an export is of, so that a pipeline that is started again finds it done.
RECORD = "bpo_export.json"
# All other files of a model directory belong to the processor or the generation settings.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns `path` with its manifest if it is a checkpoint, else the latest valid checkpoint of that run directory.

    Not the one named by `checkpoints/latest`: a kill may have come between writing a checkpoint and naming it. The file
    `checkpoints/best` (or `latest`) itself gives the checkpoint that it names.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = follow_pointer(path)
    is_checkpoint = (path / MANIFEST).is_file()
    if not is_checkpoint and not checkpoint_dirs(path):
        raise ValueError(f"export.checkpoint {path}: neither a checkpoint nor a run directory with checkpoints")
    try:
        return (path, verify_checkpoint(path)) if is_checkpoint else latest_valid(path)
    except CheckpointError as error:
        raise ValueError(f"export.checkpoint: {error}; export another checkpoint") from error


def _section(cls: type, manifest: dict[str, Any], name: str) -> Any:
    """A configuration section from a manifest, without keys that newer versions dropped."""
    known = {entry.name for entry in dataclasses.fields(cls)}
    try:
        return cls(**{key: value for key, value in manifest["config"][name].items() if key in known})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"export.checkpoint: section `{name}` of its manifest is unusable: {error!r}") from error


def run_export(config: Config) -> Path:
    """Writes `export.output` from `export.checkpoint` and the base model `model.path`.

    Which model is loaded, and whether its code may run, is decided by the caller's `model.*`, never by the checkpoint,
    which may be of unknown origin. The output appears only when it is complete.

    Raises:
        ValueError: a path is missing, the output is not empty, the base model is not the one that was trained, a tensor
            is missing or not finite, or an adapter is requested but more than LoRA and projector was trained.
    """
    if not config.export.checkpoint or not config.export.output:
        raise ValueError("export.checkpoint and export.output must both be given")
    output = Path(config.export.output)
    checkpoint, manifest = find_checkpoint(Path(config.export.checkpoint))
    record = {"checkpoint": file_digest(checkpoint / MANIFEST), "step": manifest["step"], "form": config.export.form}
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if _read_record(output) == record:
            logger.info("%s already is the export of step %d of %s", output, manifest["step"], checkpoint)
            return output
        raise ValueError(f"export.output {output} is not an empty folder; give another one, or remove it first")
    trained_from = _section(ModelConfig, manifest, "model")
    if not config.model.path:
        raise ValueError(
            f"model.path is empty; pass --model.path with the base model. The checkpoint was trained from "
            f"{trained_from.path!r}, which is not loaded by itself: a checkpoint may be of unknown origin"
        )
    check_base(config, manifest)
    model_config = dataclasses.replace(config.model, dtype=trained_from.dtype)
    trainable: TrainableConfig = _section(TrainableConfig, manifest, "trainable")
    adapter: LoraConfig = _section(LoraConfig, manifest, "lora")
    state = dict(
        ShardSet(checkpoint, [name for name in manifest["files"] if name.endswith(".safetensors")]).parameters()
    )
    check_tensors(state.items(), str(checkpoint))
    check_trained(state, dataclasses.replace(config, model=model_config, trainable=trainable, lora=adapter))
    with new_directory(output) as unfinished:
        if config.export.form == "adapter":
            _write_adapter(unfinished, state, model_config, trainable, adapter)
        else:
            _write_merged(unfinished, state, model_config, trainable, adapter)
        (unfinished / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    logger.info("exported step %d of %s to %s", manifest["step"], checkpoint, output)
    return output


def _read_record(output: Path) -> Any:
    """What an export wrote about itself; None in any other folder."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((output / RECORD).read_text(encoding="utf-8"))
    return None


def check_base(config: Config, manifest: dict[str, Any]) -> None:
    """Compares the files of `model.path` with those of the model that was trained, by SHA-256.

    Raises:
        ValueError: they differ, and `train.accept_changes` does not name them.
    """
    # Every file is hashed: a cache next to the checkpoint would have to be trusted.
    files = base_files(model_fingerprint(config.model.path))
    expected = manifest["fingerprints"][WEIGHTS]
    if base_digest(files) == expected:
        return
    then: dict[str, str] = manifest.get("base", {})
    differing = sorted(name for name in then.keys() | files.keys() if then.get(name) != files.get(name))
    names = f" ({', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})" if then else ""
    message = (
        f"model.path {config.model.path} is not the model that the checkpoint was trained from: files differ{names}"
    )
    if WEIGHTS not in config.train.accept_changes:
        raise ValueError(
            f"{message}. Give the original directory, or, if the change is harmless, --train.accept_changes "
            f"'[\"{WEIGHTS}\"]'"
        )
    logger.warning("%s (accepted)", message)


def check_trained(state: dict[str, torch.Tensor], config: Config) -> None:
    """Compares the parameters of a checkpoint with those that `config` trains, by name and shape.

    Raises:
        ValueError: they differ.
    """
    model = _empty_model(config.model)
    prepare_trainable(model, family_of(model.config), config)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}  # tied names once
    unexpected = [name for name in state if name not in trained or state[name].shape != trained[name]]
    if unexpected:
        raise ValueError(
            f"the checkpoint has parameters the model lacks: {', '.join(unexpected[:5])}; wrong base model?"
        )
    if missing := sorted(trained.keys() - state.keys()):
        raise ValueError(f"the checkpoint lacks parameters that were trained: {', '.join(missing[:5])}")


def _empty_model(options: ModelConfig) -> Any:
    """The model without weights, for its names and shapes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def check_tensors(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> int:
    """Returns the number of elements of all tensors.

    Raises:
        ValueError: an element is NaN or infinite; names the tensors.
    """
    total, bad = 0, []
    for name, tensor in tensors:
        total += tensor.numel()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(name)
    if bad:
        raise ValueError(
            f"{where}: {len(bad)} tensors contain NaN or infinite values, such as {', '.join(bad[:3])}; "
            "export an earlier checkpoint"
        )
    return total


def _write_merged(
    output: Path, state: dict[str, torch.Tensor], config: ModelConfig, trainable: TrainableConfig, lora: LoraConfig
) -> None:
    model = load_model(config)
    family = family_of(model.config)
    if trainable.language == "lora":
        import peft

        adapted = peft.LoraModel(model, lora_config(model, family, lora, config.path), "default")
        adapted.model.load_state_dict(state, strict=False)
        model = adapted.merge_and_unload()
    else:
        model.load_state_dict(state, strict=False)
    model.save_pretrained(output)
    # Read back, which also covers what merging did: a sum of finite weights may overflow in half precision.
    written = check_tensors(_stored_tensors(output), config.path)
    expected = sum(parameter.numel() for parameter in model.parameters())  # tied ones once, as in the files
    if written < expected:
        raise ValueError(f"{output}: {written:,} of {expected:,} weights were written; is the disk full?")
    copy_processor(Path(config.path), output)


def _stored_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118  not a dict


def _write_adapter(
    output: Path, state: dict[str, torch.Tensor], config: ModelConfig, trainable: TrainableConfig, lora: LoraConfig
) -> None:
    if trainable.language != "lora" or trainable.vision != "frozen":
        raise ValueError(
            f"export.form=adapter needs trainable.language=lora and a frozen vision tower; this run had "
            f"language={trainable.language}, vision={trainable.vision}. Use export.form=merged"
        )
    model = _empty_model(config)
    family = family_of(model.config)
    settings = lora_config(model, family, lora, config.path)
    settings.inference_mode = True
    if trainable.projector == "full":
        if family.projector_parameters:
            raise ValueError(
                f"export.form=adapter cannot hold {', '.join(family.projector_parameters)}, which the projector of "
                f"`{model.config.model_type}` trains in addition to its modules; use export.form=merged"
            )
        settings.modules_to_save = list(_saved_modules(model, family))
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
        if (
            file.is_file()
            and not is_weight
            and file.name not in {RECORD, *(skip or ())}
            and not (output / file.name).exists()
        ):
            shutil.copy2(file, output / file.name)
