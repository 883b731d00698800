"""`bpo plan`: memory and speed estimates before you request nodes. All figures are computed, not measured."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpo.config.adapter import base_of, is_adapter
from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.losses.program import LossProgram
from bpo.tools.plan import scale
from bpo.tools.plan.candidates import Candidate, Sizing, memory_gb, size_candidates, trace
from bpo.tools.plan.features import describe, feature_cost
from bpo.tools.plan.group import (
    GroupShape,
    ImageSize,
    ViewShape,
    average_group,
    groups_of_records,
    typical_group,
    typical_image,
)
from bpo.tools.plan.memory import GB
from bpo.tools.plan.shape import PARTS, model_config_of
from bpo.tools.plan.shapes import SHAPES
from bpo.tools.plan.speed import Machine
from bpo.training.hardware import ACCELERATORS, accelerator

_UNITS = {"": GB, "GB": GB, "GIB": 2.0**30, "TB": 1e12, "TIB": 2.0**40, "MB": 1e6, "MIB": 2.0**20}


def parse_bytes(text: str) -> float:
    """Bytes of `80GB`, `80GiB`, `1.5TB` or `80` (GB).

    Raises:
        ValueError: The text is not a memory size or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS or float(match.group(1)) == 0:
        raise ValueError(f"{text!r} is not a memory size; write it as 80GB, 80GiB or 1.5TB")
    return float(match.group(1)) * _UNITS[match.group(2).upper()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bpo plan", description=__doc__)
    add = parser.add_argument
    add("--model", default="", help=f"a directory, a hub id, or one of {', '.join(sorted(SHAPES))}")
    add(
        "--config",
        default="",
        metavar="FILE",
        help="the run's YAML: loss, trained parts, adapter, dtype, groups per step",
    )
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8)
    add("--gpu", default="a100-80gb", help=", ".join(known.name for known in ACCELERATORS))
    add("--gpu-memory", default="", metavar="SIZE", help="per GPU, such as 80GB (default: that of --gpu)")
    add("--host-memory", default="1000GB", metavar="SIZE", help="per node (default 1000GB)")
    add("--node-bandwidth", type=float, default=50.0, metavar="GB/S", help="network bandwidth per GPU (default 50)")
    add("--host-bandwidth", type=float, default=200.0, metavar="GB/S", help="memory bandwidth per node (default 200)")
    add("--nvme-bandwidth", type=float, default=12.0, metavar="GB/S", help="local disks per node (default 12)")
    add("--mfu", type=float, default=0.4, help="utilisation: share of peak FLOP/s in matrix products (default 0.4)")
    add("--language", choices=("lora", "full", "frozen"), help="overrides trainable.language")
    add("--groups-per-step", type=int, default=0, help="overrides train.groups_per_step raised to one per GPU")
    add(
        "--groups", type=Path, metavar="FILE", help="groups file; its usable groups and their words set the sizes below"
    )
    add("--groups-count", type=int, default=0, help="groups per epoch")
    add("--image-tokens", type=int, default=0, help="per image (default 1024 for Qwen-VL, else that of the tower)")
    add("--prompt-tokens", type=int, default=0, help="per group, without the image (default 64)")
    add("--response-tokens", type=int, default=0, help="per completion (default 150)")
    add("--completions", type=int, default=0, help="per group, one of them preferred (default 3)")
    add("--scale", action="store_true", help="also 1 to 1,024 GPUs: which file wins where, store and checkpoints")
    add("--disk-bandwidth", type=float, default=10.0, metavar="GB/S", help="shared file system, for --scale (10)")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is {options.mfu:g}; it is a share of the peak and must be in (0, 1]")
    for name in ("node_bandwidth", "host_bandwidth", "nvme_bandwidth", "disk_bandwidth"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; it must be positive")
    for name in ("groups_per_step", "groups_count", "image_tokens", "prompt_tokens", "response_tokens", "completions"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 0 (default) or more")
    if options.completions == 1:
        raise ValueError("--completions is 1; a preference needs at least 2 completions")


def _group_shape(
    options: argparse.Namespace, config: Config, program: LossProgram, model_config: Any
) -> tuple[GroupShape, int]:
    """The average group as the loss packs it and the number of groups, from the options and the file --groups."""
    image = typical_image(model_config)
    if options.image_tokens:
        image = ImageSize(options.image_tokens, round(options.image_tokens * image.patches / image.tokens))
    prompt, response, count, plan = options.prompt_tokens, options.response_tokens, 0, program.plan
    if options.groups is not None:
        records = groups_of_records(read_groups(options.groups), config, plan, image, prompt, response)
        group, count = average_group(records, plan, image)
        prompt, response = round(group.prompt_tokens), round(group.response_tokens)
    if options.groups is None or options.completions:
        typical = typical_group(plan, image, prompt or 64, response or 150, options.completions or 3)
        group, _ = average_group([typical], plan, image)
    return group, options.groups_count or count


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status, 1 if nothing fits."""
    options = _parser().parse_args(argv)
    _check(options)
    config = load_config(["--config", options.config], "bpo plan", "") if options.config else Config()
    if options.language:
        config.trainable.language = options.language
    model = options.model or config.model.path
    if not model:
        raise ValueError("--model is missing (or a --config with model.path)")
    if is_adapter(model):
        model = base_of(model)
    gpu = accelerator(options.gpu)
    gpu_memory = parse_bytes(options.gpu_memory) if options.gpu_memory else gpu.memory_gb * GB
    machine = Machine(
        gpu,
        options.nodes,
        options.gpus_per_node,
        options.node_bandwidth,
        options.host_bandwidth,
        options.mfu,
        nvme_gb_s=options.nvme_bandwidth,
    )
    program = LossProgram(config.loss, config.train.seed)
    group, count = _group_shape(options, config, program, model_config_of(model))
    host_memory = parse_bytes(options.host_memory)
    traced = trace(model, config)
    sizing = size_candidates(
        traced,
        config,
        machine,
        gpu_memory,
        host_memory,
        group,
        options.groups_per_step,
        couples_groups=program.couples_groups,
    )
    print(render(sizing, config, program, gpu_memory, host_memory, count))
    tree = report(sizing, program, count)
    if options.scale:
        per_rank = max(1, sizing.groups_per_step // machine.world_size)
        num_groups = count or scale.NUM_GROUPS
        storage = scale.Storage(options.disk_bandwidth)
        memory = gpu_memory, host_memory
        rows = scale.scale(
            traced, config, machine, memory, group, num_groups, per_rank, storage, program.couples_groups
        )
        print("\n".join(scale.render(rows, num_groups)))
        tree["scale"] = [asdict(row) for row in rows]
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0 if sizing.best is not None else 1


def report(sizing: Sizing, program: LossProgram, count: int) -> dict[str, Any]:
    """All figures as JSON."""
    return {
        "model": sizing.shape.name,
        "parameters": sizing.shape.by_part(),
        "trained": sizing.shape.by_part(trained=True),
        "machine": asdict(sizing.machine),
        "terms": list(program.names),
        "group": asdict(sizing.group),
        "packed_tokens": sizing.group.step.tokens,
        "separate_tokens": sizing.group.step.separate_tokens,
        "keeps_activations_of_whole_step": sizing.couples_groups,
        "groups_per_step": sizing.groups_per_step,
        "groups_of_an_epoch": count,
        "reference_micro_batch_tokens": sizing.reference_tokens,
        "rows": [
            {
                "ds_config": candidate.ds_config,
                "gradient_checkpointing": candidate.checkpointing,
                "micro_batch_tokens": candidate.tokens,
                "micro_batches": candidate.micro_batches,
                "fits_gpu": candidate.time is not None,
                "fits_host": candidate.fits_host,
                "gb": memory_gb(candidate),
                "step_seconds": asdict(candidate.time) if candidate.time else None,
                "mfu": candidate.time.mfu if candidate.time else None,
                "pairs_per_hour": 3600 * sizing.groups_per_second(candidate) * sizing.group.pairs,
                "recommended": k == sizing.best,
            }
            for k, candidate in enumerate(sizing.candidates)
        ],
        "note": "computed, not measured",
    }


def render(
    sizing: Sizing, config: Config, program: LossProgram, gpu_memory: float, host_memory: float, count: int
) -> str:
    """The printed output of `bpo plan`."""
    machine, shape, group = sizing.machine, sizing.shape, sizing.group
    numbers, trained = shape.by_part(), shape.by_part(trained=True)
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e9:.2f} B parameters, {shape.num_trained / 1e6:.1f} M trained "
        f"({config.trainable.language}), {config.model.dtype}; computed, not measured",
        "  millions (trained): " + ", ".join(f"{p} {numbers[p] / 1e6:.0f} ({trained[p] / 1e6:.0f})" for p in PARTS),
        f"{machine.nodes} x {machine.gpus_per_node} {machine.gpu.name} with {gpu_memory / GB:.0f} GB, "
        f"{host_memory / GB:.0f} GB per host; {machine.utilisation:.0%} of {machine.gpu.peak_tflops:g} TFLOP/s, "
        f"links {machine.gpu.link_gb_s:g} GB/s, network {machine.node_gb_s:g} GB/s, "
        f"{machine.overlap:.0%} of communication overlapped",
        f"group: {group.image_tokens:.0f} image tokens, {group.prompt_tokens:.0f} prompt tokens, "
        f"{group.completions:.3g} x {group.response_tokens:.0f} response tokens; {group.step.tokens} packed; "
        f"{sizing.groups_per_step} groups per step",
        *_loss_lines(sizing, program),
        "",
        f"{'':15s}{'recompute':>10s} {'tokens':>7s}  GB:{'weights':>8s}{'optim.':>7s}{'grads':>6s}{'comm.':>6s}"
        f"{'activ.':>7s}{'head':>6s}{'other':>6s}{'total':>7s}{'host':>6s}  s:{'comp.':>7s}{'comm.':>7s}{'offl.':>6s}"
        f"{'step':>7s}{'mfu':>5s} {'pairs/h':>9s}",
        *(_line(sizing, candidate, k == sizing.best) for k, candidate in enumerate(sizing.candidates)),
        "",
        *_recommendation(sizing, config, count),
        *describe(feature_cost(shape, machine, group.step)),
    ]
    return "\n".join(lines)


def _loss_lines(sizing: Sizing, program: LossProgram) -> list[str]:
    """What the loss packs of a group, view by view, and what it keeps."""
    packed, reference = sizing.group.step, sizing.group.reference
    views = {name: f"view {name} ({view.type})" for name, view in program.plan.views.items()}
    lines = [
        f"loss: {', '.join(program.names)}; {packed.tokens:,} tokens per group in one forward pass, "
        f"{packed.separate_tokens:,} as separate sequences ({packed.separate_tokens / packed.tokens:.2f} times)",
        *(_view_line(views.get(view.name, view.name or "clean images"), view) for view in packed.views),
    ]
    if program.plan.uses_auxiliary:
        lines.append("  (without --groups, an auxiliary prompt and its answer are as long as the group's own)")
    if packed.second_targets:
        lines.append(
            f"  {packed.second_targets:.0f} tokens scored a second time, from two rows of the head's weight each"
        )
    if reference is None:
        lines.append("  no reference pass: no term has a reference")
    elif reference.tokens != packed.tokens:
        lines.append(f"  reference pass: {reference.tokens:,} tokens per group")
    if sizing.couples_groups:
        lines.append(
            "  terms across groups: the activations of all micro-batches of a step wait for its first backward pass"
        )
    return lines


def _view_line(name: str, view: ViewShape) -> str:
    images = f"{view.images:.3g} image{'' if view.images == 1 else 's'}"
    length = view.response_tokens / view.completions
    return f"  {name}: {view.tokens:,.0f} = {view.prefix_tokens:.0f} ({images}) + {view.completions:.3g} x {length:.0f}"


def _line(sizing: Sizing, candidate: Candidate, is_best: bool) -> str:
    gb = memory_gb(candidate)
    columns = (gb["weights"], gb["optimizer"], gb["gradients"], gb["gathered"] + gb["buckets"], gb["activations"])
    widths = (8, 7, 6, 6, 7)
    text = f"{candidate.ds_config:15s}{candidate.checkpointing:>10s} {candidate.tokens or '-':>7}     "
    text += "".join(f"{value:{width}.1f}" for value, width in zip(columns, widths, strict=True))
    text += f"{gb['head']:6.1f}{gb['step'] + gb['overhead']:6.1f}{gb['peak']:7.1f}{gb['host']:6.0f}    "
    if candidate.time is None:
        at_least = "with all activations of a step" if sizing.couples_groups else "even with one group"
        return text + f"does not fit the GPU, {at_least}"
    time = candidate.time
    text += f"{time.compute:7.2f}{time.communication:7.2f}{time.offload:6.2f}{time.total:7.2f}{time.mfu:5.0%} "
    text += f"{3600 * sizing.groups_per_second(candidate) * sizing.group.pairs:9,.0f}"
    if not candidate.fits_host:
        return text + "  does not fit the host"
    if candidate.zero.param_on_nvme:
        return text + "  not recommended: see ds_configs/README.md"
    return text + ("  <-" if is_best else "")


def _recommendation(sizing: Sizing, config: Config, count: int) -> list[str]:
    if sizing.best is None:
        fewer = "lower train.groups_per_step, " if sizing.couples_groups else ""
        return [
            f"nothing fits: {fewer}partition the states over more GPUs, shrink them with trainable.language=lora, or "
            "offload them to larger hosts; one group must fit one GPU"
        ]
    best = sizing.candidates[sizing.best]
    lines = [
        "recommended:",
        f"  --train.ds_config ds_configs/{best.ds_config}.json --model.gradient_checkpointing {best.checkpointing} \\",
        f"  --train.max_micro_batch_tokens {best.tokens} --train.groups_per_step {sizing.groups_per_step}",
    ]
    if sizing.reference_tokens:
        lines[-1] += " \\"
        lines.append(f"  --train.reference_micro_batch_tokens {sizing.reference_tokens}")
    if sizing.groups_per_step != config.train.groups_per_step:
        lines.append(
            f"  (train.groups_per_step is {config.train.groups_per_step} in the configuration: the batch size changes, "
            "so the learning rate may need adjusting)"
        )
    if best.zero.offload_optimizer:
        lines.append("  (the optimizer runs on the host's CPU: see docs/sizing.md)")
    if count:
        lines.append(f"{count:,} groups: {count / sizing.groups_per_second(best) / 3600:.2f} h per epoch")
        if sizing.group.reference is not None:
            lines[-1] += f", after {sizing.reference_seconds(count) / 3600:.2f} h for the reference pass"
    return lines
