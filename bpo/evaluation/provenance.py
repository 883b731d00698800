"""What a result depends on, so that it can be repeated and compared: model, options, versions, hardware, command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.config.evaluation import EvaluationConfig
from bpo.config.io import flat_tree, to_tree
from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.job.run_record import versions
from bpo.model.reference.fingerprint import DIGESTS, DigestCache, loaded_files, model_fingerprint
from bpo_kernels.provenance import source_commit

if TYPE_CHECKING:
    from bpo.data.encode import Encoder

_WEIGHTS = (".safetensors", ".bin", ".index.json")


def model_provenance(config: Config, base: str, adapter: str, encoder: Encoder) -> dict[str, Any]:
    """Fingerprints of the model and the options under which it sees an image and answers.

    Digests of unchanged weight files are kept in digests.json beside the results, so that they are hashed once.

    Args:
        base, adapter: Paths of the model and of its PEFT adapter, which may be empty.
    """
    data, cache = config.data, Path(config.evaluation.output).parent / DIGESTS
    fingerprint = model_fingerprint(base, kept_digests=cache)
    files = {name.removeprefix("file:"): digest for name, digest in fingerprint.items() if name.startswith("file:")}
    if adapter:
        found = DigestCache(cache).digests(loaded_files(Path(adapter)))
        files |= {f"adapter/{file.name}": digest for file, digest in found.items()}
    weights = {name: digest for name, digest in files.items() if name.endswith(_WEIGHTS)}
    template = encoder.processor.chat_template
    return {
        "model": {
            "path": config.model.path,
            "base": base,
            "weights_sha256": _digest(weights),
            "processor_sha256": _digest({name: digest for name, digest in files.items() if name not in weights}),
            "chat_template_sha256": hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest(),
        },
        "dtype": config.model.dtype,
        "image_options": {
            "min_pixels": data.min_pixels,
            "max_pixels": data.max_pixels,
            "image_aspect": data.image_aspect,
        },
        "system_prompt": data.system_prompt,
        "decoding": decoding_of(config.evaluation),
    }


def decoding_of(options: EvaluationConfig) -> dict[str, Any]:
    """The options that the chosen decoding reads."""
    chosen: dict[str, Any] = {"method": options.decoding, "sampling": asdict(options.sampling)}
    if options.decoding in ("vdd", "vcd", "calibration"):
        chosen["contrast"] = asdict(options.contrast)
    if options.decoding == "calibration":
        chosen["calibration"] = asdict(options.calibration)
    if options.decoding == "grid":
        chosen["grid"] = asdict(options.grid)
    return chosen


def run_provenance(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Versions, date, hardware, and the command that repeats the run from the same folder."""
    return {
        "versions": {"commit": source_commit("bpo", "kernels"), "python": platform.python_version(), **versions()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"device": _device_name(), "ranks": ranks.world_size},
        "command": command_of(config),
    }


def command_of(config: Config) -> str:
    """`bpo evaluate` with every option that differs from its default, wherever it was set."""
    defaults = flat_tree(to_tree(Config()))
    changed = {key: value for key, value in flat_tree(to_tree(config)).items() if value != defaults.get(key)}
    flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return shlex.join(["bpo", "evaluate", *flags])


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _digest(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
