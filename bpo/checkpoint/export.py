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

from bpo.checkpoint.adapter import write_adapter
from bpo.checkpoint.compatible import WEIGHTS, base_digest, base_files
from bpo.checkpoint.fidelity import (
    Change,
    Fidelity,
    NoSampleError,
    adapter_change,
    compare,
    judge,
    table,
    trained_change,
    unchanged,
)
from bpo.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    checkpoint_dirs,
    follow_pointer,
    latest_valid,
    verify_checkpoint,
)
from bpo.checkpoint.hub import push
from bpo.checkpoint.merge import merge_into
from bpo.checkpoint.model_card import CARD, model_card, read_metrics
from bpo.checkpoint.shards import ShardSet
from bpo.config.adapter import split_adapter
from bpo.config.training import Config, DataConfig, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.job.durable import file_digest, new_directory, write_durably
from bpo.model.adapter import check_vllm_format
from bpo.model.load import load_model
from bpo.model.reference.fingerprint import model_fingerprint
from bpo.model.trainable import prepare_trainable

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


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint to export.

    config: Base model in the dtype of the training, options of the training that the weights depend on, and the
        caller's `export` and `data`.
    state: Trained parameters by name.
    """

    checkpoint: Path
    manifest: dict[str, Any]
    config: Config
    state: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return f"step {self.manifest['step']} of {self.checkpoint}"


def run_export(config: Config) -> Path:
    """Writes `export.output` from `export.checkpoint` and the base model `model.path`, and compares it with them.

    If `model.path` is an adapter, whose training was continued, the export is of its base and the trained adapter.
    Which model is loaded, and whether its code may run, is decided by the caller's `model.*`, never by the checkpoint,
    which may be of unknown origin. The output appears only when it is complete. If it is there already, a model card
    with new `export.metrics` is written, and `export.push` uploads it.

    Raises:
        ValueError: a path is missing, the output is not empty, the base model is not the one that was trained, a tensor
            is missing or not finite, an adapter is requested but more than LoRA and projector was trained, the export
            is not like the trained model, or the upload failed.
    """
    if not config.export.checkpoint or not config.export.output:
        raise ValueError("export.checkpoint and export.output must both be given")
    metrics = read_metrics(config.export.metrics)
    output = Path(config.export.output)
    checkpoint, manifest = find_checkpoint(Path(config.export.checkpoint))
    key = _key(config, checkpoint, manifest)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        # Records of older versions lack the dtype, which was that of the training.
        found = {"dtype": key["dtype"], "rounding": "nearest", **(_read_record(output) or {})}
        if any(found.get(name) != value for name, value in key.items()):
            raise ValueError(f"export.output {output} is not an empty folder; give another one, or remove it first")
        logger.info("%s already is the export of step %d of %s", output, manifest["step"], checkpoint)
        if metrics and config.model.path:
            _write_card(output, config, checkpoint, manifest, found, metrics)
    else:
        trained = read_trained(_unquantized(config, manifest), checkpoint, manifest)
        with new_directory(output) as unfinished:
            record = {**key, **_write(unfinished, trained)}
            (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            _write_card(unfinished, config, checkpoint, manifest, record, metrics)
        logger.info("exported %s to %s", trained.name, output)
    if config.export.push:
        push(output, config.export.push, private=config.export.private, message=f"bpo export, step {key['step']}")
    return output


def _unquantized(config: Config, manifest: dict[str, Any]) -> Config:
    """An export is of the base as stored, which is what an adapter is served with."""
    if (value := _section(ModelConfig, manifest, "model").quantization) != "none":
        logger.warning(
            "the adapter was trained on %s weights; it is exported with, and compared on, the unquantised ones, which "
            "answer slightly differently. To run it as trained, export the adapter and load it with "
            "--model.quantization %s",
            *(value, value),
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))


def _key(config: Config, checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the weights of an export depend on."""
    options, trained_from = config.export, _section(ModelConfig, manifest, "model")
    return {
        "checkpoint": file_digest(checkpoint / MANIFEST),
        "step": manifest["step"],
        "form": options.form,
        "dtype": options.dtype or trained_from.dtype,
        "rounding": options.rounding,
    }


def read_trained(config: Config, checkpoint: Path, manifest: dict[str, Any]) -> Trained:
    """Reads a checkpoint that was trained from `model.path`.

    Raises:
        ValueError: the base model is not the one that was trained, or a tensor is missing or not finite.
    """
    trained_from = _section(ModelConfig, manifest, "model")
    if not config.model.path:
        raise ValueError(
            f"model.path is empty; pass --model.path with the base model. The checkpoint was trained from "
            f"{trained_from.path!r}, which is not loaded by itself: a checkpoint may be of unknown origin"
        )
    if config.data.groups and config.export.check_groups and not Path(config.data.groups).is_file():
        raise ValueError(f"data.groups {config.data.groups}: no such file to compare the export on; correct the path")
    check_base(config, manifest)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=trained_from.dtype),
        trainable=_section(TrainableConfig, manifest, "trainable"),
        lora=_section(LoraConfig, manifest, "lora"),
    )
    state = dict(
        ShardSet(checkpoint, [name for name in manifest["files"] if name.endswith(".safetensors")]).parameters()
    )
    check_tensors(state.items(), str(checkpoint))
    check_trained(state, config)
    return Trained(checkpoint, manifest, config, state)


def _write(output: Path, trained: Trained) -> dict[str, Any]:
    """Writes weights and processor; returns the figures of the comparison for the record."""
    config, state = trained.config, trained.state
    base, _ = split_adapter(config.model)
    record: dict[str, Any] = {}
    if config.export.form == "adapter":
        write_adapter(output, _empty_model(base), state, base, config.trainable, config.lora)
        copy_processor(Path(base.path), output, skip={"config.json", "generation_config.json"})
        weights: dict[str, Any] = {}
        accepted, detail = check_vllm_format(output)
        logger.log(
            logging.INFO if accepted else logging.WARNING,
            "vLLM %s this adapter: %s",
            "can serve" if accepted else "refuses",
            detail,
        )
        record["vllm"] = {"accepted": accepted, "detail": detail}
        written = base
        exported = adapter_change(output)
    else:
        weights, dtype = _write_merged(output, trained)
        written = dataclasses.replace(config.model, path=str(output), dtype=dtype)  # type: ignore[arg-type]
        exported = unchanged
    tokens, reason = _compare(trained, exported, written)
    for line in table(weights, tokens):
        logger.info(line)
    judge(config.export, weights, tokens)
    return {
        **record,
        "weights": weights,
        "log_probs": dataclasses.asdict(tokens) if tokens else None,
        "not_compared": reason,
    }


def _compare(trained: Trained, exported: Change, written: ModelConfig) -> tuple[Fidelity | None, str]:
    """The comparison on groups, or None and the reason why there is none, which is logged as a warning."""
    config = trained.config
    then: DataConfig = _section(DataConfig, trained.manifest, "data")
    given, groups = bool(config.data.groups), config.data.groups or then.groups
    reason = ""
    if not config.export.check_groups:
        reason = "export.check_groups is 0"
    elif not groups or not Path(groups).is_file():
        reason = "data.groups is not given, and the file of the training is not here"
    else:
        image_root = config.data.image_root or then.image_root
        data = dataclasses.replace(then, groups=groups, image_root=image_root)
        try:
            change = trained_change(config, trained.state)
            return compare(dataclasses.replace(config, data=data), change, exported, written), ""
        except NoSampleError as error:
            if given:
                raise
            reason = str(error)
    logger.warning("log-probs of the exported and the trained model were NOT COMPARED: %s", reason)
    return None, reason


def _write_card(
    output: Path,
    config: Config,
    checkpoint: Path,
    manifest: dict[str, Any],
    record: dict[str, Any],
    metrics: list[tuple[str, dict[str, Any]]],
) -> None:
    """Replaces the card of the base model, which describes another model."""
    tokens = Fidelity(**record["log_probs"]) if record.get("log_probs") else None
    lines = table(record.get("weights", {}), tokens)
    if record.get("not_compared"):
        lines += ["", f"Log-probs were not compared: {record['not_compared']}."]
    name = Path(config.export.output).resolve().name
    write_durably(
        output / CARD, model_card(name, config, manifest, record, lines, metrics, _commit(checkpoint)), sync=False
    )


def _commit(checkpoint: Path) -> str:
    """The commit that trained, from the record of the run; empty if the checkpoint was moved out of it."""
    versions = checkpoint.parent.parent / "versions.txt"
    lines = versions.read_text(encoding="utf-8").splitlines() if versions.is_file() else []
    return next((line.removeprefix("commit: ") for line in lines if line.startswith("commit: ")), "")


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
    model = _empty_model(split_adapter(config.model)[0])
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


def _write_merged(output: Path, trained: Trained) -> tuple[dict[str, Any], str]:
    """Returns what rounding did to the training's change of the weights, and the dtype of the export."""
    config, lora = trained.config, trained.config.lora
    base, _ = split_adapter(config.model)
    model = load_model(base)
    dtype = getattr(torch, config.export.dtype) if config.export.dtype else model.dtype
    rounding, scale = config.export.rounding, lora.scale
    weights = merge_into(model, trained.state, scale=scale, dtype=dtype, rounding=rounding)
    model.save_pretrained(output)
    # Read back, which also covers what merging did: a sum of finite weights may overflow in half precision.
    written = check_tensors(_stored_tensors(output), base.path)
    expected = sum(parameter.numel() for parameter in model.parameters())  # tied ones once, as in the files
    if written < expected:
        raise ValueError(f"{output}: {written:,} of {expected:,} weights were written; is the disk full?")
    copy_processor(Path(base.path), output)
    return weights.to_json(), str(dtype).removeprefix("torch.")


def _stored_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118  not a dict


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
