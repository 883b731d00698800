"""Compares what a step depends on across the ranks of a job, before anything long.

Ranks are separate processes, often on separate machines: another command line, another copy of the code, a file that is
old on one node. Gradients are summed over them regardless, so a rank that differs spoils the run without an error.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import bpo
from bpo.config.io import flat_tree, to_tree
from bpo.config.training import Config
from bpo.data.encode import Encoder
from bpo.data.lengths import encoder_parts
from bpo.data.schedule import PlannedStep
from bpo.engine import deepspeed_config
from bpo.evaluation.benchmark import Benchmark
from bpo.job.collectives import Collectives
from bpo.job.durable import file_digest
from bpo.job.exits import JobError
from bpo.job.run_record import version_of, versions
from bpo.losses.plugin import load_plugin
from bpo.model.load import ResolvedModel
from bpo_kernels import dispatch

# May be local to a node (the content at the paths is compared), or do not affect a step.
_LOCAL = {"model.path", "data.image_root", "data.num_workers", "data.prefetch_factor"}
_PACKAGES = ("numpy", "pillow", "safetensors", "tokenizers", "triton")
_NAMED_FIELDS, _NAMED_RANKS = 10, 4


class RanksDifferError(JobError):
    """The ranks of a job do not run the same thing; names each field, its values, ranks and hosts."""


def check_agreement(facts: Mapping[str, Any], job: Collectives) -> None:
    """Raises RanksDifferError on every rank unless all have the same `facts`.

    One digest per rank is exchanged; the facts themselves only if the digests differ.
    """
    own = {name: str(value) for name, value in facts.items()}
    if len(set(job.gather(_digest(f"{name}={own[name]}" for name in sorted(own))))) == 1:
        return
    everyone = [(host, dict(theirs)) for host, theirs in job.gather((socket.gethostname(), own))]
    names = sorted({name for _, theirs in everyone for name in theirs})
    differing = [name for name in names if len({theirs.get(name) for _, theirs in everyone}) > 1]
    lines = [f"  {name}: {_by_value(name, everyone)}" for name in differing[:_NAMED_FIELDS]]
    if len(differing) > _NAMED_FIELDS:
        lines.append(f"  and {len(differing) - _NAMED_FIELDS} more")
    raise RanksDifferError(
        "the ranks of this job differ:\n"
        + "\n".join(lines)
        + "\nStart every rank with the same arguments, files, code and packages"
    )


def _by_value(name: str, everyone: list[tuple[str, dict[str, str]]]) -> str:
    holders: dict[str, list[str]] = {}
    for rank, (host, theirs) in enumerate(everyone):
        holders.setdefault(theirs.get(name, "absent"), []).append(f"rank {rank} ({host})")
    return "; ".join(
        f"{value} on {', '.join(ranks[:_NAMED_RANKS])}"
        + (f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else "")
        for value, ranks in holders.items()
    )


def facts_of_start(config: Config, resolved: ResolvedModel, encoder: Encoder) -> dict[str, str]:
    """What each rank must have in common before groups are measured: options, code, packages, model files, data."""
    options = {
        f"option {name}": repr(value) for name, value in flat_tree(to_tree(config)).items() if name not in _LOCAL
    }
    packages = versions() | {name: version_of(name) for name in _PACKAGES} | {"python": platform.python_version()}
    parts = encoder_parts(encoder)
    parts["config"] = {key: value for key, value in json.loads(parts["config"]).items() if key != "_name_or_path"}
    return {
        **options,
        **{f"version of {name}": value for name, value in packages.items()},
        **{f"model's {name}": _short(part) for name, part in parts.items()},
        "code of bpo": _digest_of_sources(bpo.__file__),
        "code of the kernels": _digest_of_sources(dispatch.__file__),
        "content of train.ds_config": _short(deepspeed_config(config.train, resolved.dtype, 1)),
        **{
            f"content of data.{name}": _digest_of_data(Path(getattr(config.data, name)))
            for name in (["annotations"] if config.online.source else []) + (["groups"] if config.data.groups else [])
        },
        "content of loss.plugin": load_plugin(config.loss.plugin),
        "model's dtype": str(resolved.dtype),
        "attention backend": resolved.attention.backend if resolved.attention else "transformers' own",
        "kernels": dispatch.chosen_implementation(torch.empty(0, device=resolved.device)),
    }


def facts_of_plan(steps: Iterable[PlannedStep]) -> dict[str, str]:
    """The plan of the steps, which every rank computes for itself."""
    return {"plan of the steps": _digest(f"{s.epoch} {s.groups} {s.micro_batches} {s.is_filler}" for s in steps)}


def facts_of_questions(benchmarks: Iterable[Benchmark]) -> dict[str, str]:
    """The questions of evaluations during training, from files that every rank reads for itself."""
    return {f"questions of {b.name}": _digest(f"{q.image} {q.text}" for q in b.questions) for b in benchmarks}


def _digest_of_sources(module: str) -> str:
    root = Path(module).parent
    return _digest(f"{file.relative_to(root)} {file_digest(file)}" for file in sorted(root.rglob("*.py")))


def _digest_of_data(path: Path) -> str:
    """Of a file its content; of a folder, which may hold the images too, its names and sizes."""
    if path.is_file():
        return file_digest(path)[:16]
    if not path.exists():
        return "missing"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _digest(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)


def _short(value: Any) -> str:
    return _digest([repr(value)])


def _digest(lines: Iterable[str]) -> str:
    """16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
