"""`bpo plan`: what fits and how fast, before a machine is asked for. Everything it prints is computed, not measured."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.tools.plan.memory import GB
from bpo.tools.plan.plan import GroupShape, Plan, Row, make_plan, row_gb, typical_image
from bpo.tools.plan.shape import PARTS, model_config_of
from bpo.tools.plan.shapes import SHAPES
from bpo.tools.plan.speed import Machine
from bpo.training.hardware import ACCELERATORS, accelerator

_UNITS = {"": GB, "GB": GB, "GIB": 2.0**30, "TB": 1e12, "TIB": 2.0**40, "MB": 1e6, "MIB": 2.0**20}
# Tokens of an English word in the tokenizers of these models, roughly; for lengths that are known in words alone.
_TOKENS_A_WORD = 1.4


def parse_bytes(text: str) -> float:
    """Bytes of `80GB`, `80GiB`, `1.5TB` or `80` (GB).

    Raises:
        ValueError: it is no such size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS or float(match.group(1)) == 0:
        raise ValueError(f"{text!r} is no size of memory; write it as 80GB, 80GiB or 1.5TB")
    return float(match.group(1)) * _UNITS[match.group(2).upper()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bpo plan", description=__doc__)
    add = parser.add_argument
    add("--model", default="", help=f"a directory, a hub id, or one of {', '.join(sorted(SHAPES))}")
    add("--config", default="", metavar="FILE", help="a run's YAML: what learns, the adapter, dtype, groups a step")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8)
    add("--gpu", default="a100-80gb", help=", ".join(one.name for one in ACCELERATORS))
    add("--gpu-memory", default="", metavar="SIZE", help="of one GPU, such as 80GB; default: that of --gpu")
    add("--host-memory", default="1000GB", metavar="SIZE", help="of one node (default 1000GB)")
    add("--node-bandwidth", type=float, default=50.0, metavar="GB/S", help="network of one GPU (default 50)")
    add("--host-bandwidth", type=float, default=200.0, metavar="GB/S", help="memory of one node (default 200)")
    add("--mfu", type=float, default=0.4, help="share of the peak that matrix products reach (default 0.4)")
    add("--language", choices=("lora", "full", "frozen"), help="in place of trainable.language")
    add("--groups-per-step", type=int, default=0, help="in place of train.groups_per_step, raised to one a GPU")
    add("--groups", type=Path, metavar="FILE", help="preference groups: their number and lengths, by their words")
    add("--groups-count", type=int, default=0, help="number of groups of an epoch")
    add("--image-tokens", type=int, default=0, help="of one group; default: 1024 for Qwen-VL, else the tower's")
    add("--prompt-tokens", type=int, default=0, help="of one group, beside the image (default 64)")
    add("--response-tokens", type=int, default=0, help="of one completion (default 150)")
    add("--completions", type=int, default=0, help="of one group, of which one is preferred (default 3)")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is {options.mfu:g}; it is a share of the peak, use (0, 1]")
    for name in ("node_bandwidth", "host_bandwidth"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; it must be positive")
    for name in ("groups_per_step", "groups_count", "image_tokens", "prompt_tokens", "response_tokens", "completions"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 0 (default) or more")
    if options.completions == 1:
        raise ValueError("--completions is 1; a group needs two completions to prefer one")


def _group_shape(options: argparse.Namespace, model_config: Any) -> tuple[GroupShape, int]:
    """The average group and the number of groups, from the options and what --groups says."""
    prompt, response, completions, pairs, count = 64, 150, 3, 0.0, options.groups_count
    if options.groups is not None:
        groups = read_groups(options.groups)
        answers = [one for group in groups for one in group.completions]
        scores = [[one.score for one in group.completions] for group in groups]
        count = count or len(groups)
        prompt_words = sum(len(turn.text.split()) for group in groups for turn in group.prompt)
        prompt = round(_TOKENS_A_WORD * prompt_words / len(groups)) + 16
        response = max(1, round(_TOKENS_A_WORD * sum(len(one.response.split()) for one in answers) / len(answers)))
        completions = max(2, round(len(answers) / len(groups)))
        pairs = sum(a > b for group in scores for a in group for b in group) / len(groups)
    completions = options.completions or completions
    tokens, patches = typical_image(model_config)
    if options.image_tokens:
        tokens, patches = options.image_tokens, round(options.image_tokens * patches / tokens)
    pairs = pairs if options.groups is not None and not options.completions else completions - 1
    prompt, response = options.prompt_tokens or prompt, options.response_tokens or response
    return GroupShape(tokens, patches, prompt, response, completions, pairs), count


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status, 1 where nothing fits."""
    options = _parser().parse_args(argv)
    _check(options)
    config = load_config(["--config", options.config], "bpo plan", "") if options.config else Config()
    if options.language:
        config.trainable.language = options.language
    model = options.model or config.model.path
    if not model:
        raise ValueError("--model is missing (or a --config with model.path)")
    gpu = accelerator(options.gpu)
    gpu_memory = parse_bytes(options.gpu_memory) if options.gpu_memory else gpu.memory_gb * GB
    machine = Machine(
        gpu,
        options.nodes,
        options.gpus_per_node,
        options.node_bandwidth,
        options.host_bandwidth,
        options.mfu,
    )
    group, count = _group_shape(options, model_config_of(model))
    host_memory = parse_bytes(options.host_memory)
    plan = make_plan(model, config, machine, gpu_memory, host_memory, group, options.groups_per_step)
    print(render(plan, config, gpu_memory, host_memory, count))
    if options.json is not None:
        options.json.write_text(json.dumps(report(plan, count), indent=1) + "\n", encoding="utf-8")
    return 0 if plan.best is not None else 1


def report(plan: Plan, count: int) -> dict[str, Any]:
    """Every figure of a plan."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.by_part(),
        "trained": plan.shape.by_part(trained=True),
        "machine": asdict(plan.machine),
        "group": asdict(plan.group),
        "groups_per_step": plan.groups_per_step,
        "groups_of_an_epoch": count,
        "reference_micro_batch_tokens": plan.reference_tokens,
        "rows": [
            {
                "ds_config": row.ds_config,
                "gradient_checkpointing": row.checkpointing,
                "micro_batch_tokens": row.tokens,
                "micro_batches": row.micro_batches,
                "fits_gpu": row.time is not None,
                "fits_host": row.fits_host,
                "gb": row_gb(row),
                "step_seconds": asdict(row.time) if row.time else None,
                "mfu": row.time.mfu if row.time else None,
                "pairs_per_hour": 3600 * plan.groups_per_second(row) * plan.group.pairs,
                "recommended": k == plan.best,
            }
            for k, row in enumerate(plan.rows)
        ],
        "note": "computed, not measured",
    }


def render(plan: Plan, config: Config, gpu_memory: float, host_memory: float, count: int) -> str:
    """The text that `bpo plan` prints."""
    machine, shape, group = plan.machine, plan.shape, plan.group
    numbers, trained = shape.by_part(), shape.by_part(trained=True)
    lines = [
        f"{shape.name}: {shape.num_parameters / 1e9:.2f} B parameters, {shape.num_trained / 1e6:.1f} M of them trained "
        f"({config.trainable.language}), {config.model.dtype}; computed, not measured",
        "  millions (trained): " + ", ".join(f"{p} {numbers[p] / 1e6:.0f} ({trained[p] / 1e6:.0f})" for p in PARTS),
        f"{machine.nodes} x {machine.gpus_per_node} {machine.gpu.name} of {gpu_memory / GB:.0f} GB, "
        f"{host_memory / GB:.0f} GB a host; products at {machine.utilisation:.0%} of {machine.gpu.peak_tflops:g} "
        f"TFLOP/s, links {machine.gpu.link_gb_s:g} GB/s, network {machine.node_gb_s:g} GB/s, "
        f"{machine.overlap:.0%} of communication hidden",
        f"a group: {group.image_tokens} image tokens, {group.prompt_tokens} of prompt, {group.completions} completions "
        f"of {group.response_tokens}; {group.tokens} packed tokens; {plan.groups_per_step} groups a step",
        "",
        f"{'':15s}{'recompute':>10s} {'tokens':>7s}  GB:{'weights':>8s}{'optim.':>7s}{'grads':>6s}{'comm.':>6s}"
        f"{'activ.':>7s}{'head':>6s}{'other':>6s}{'all':>7s}{'host':>6s}  s:{'comp.':>7s}{'comm.':>7s}{'offl.':>6s}"
        f"{'step':>7s}{'mfu':>5s} {'pairs/h':>9s}",
        *(_line(plan, row, k == plan.best) for k, row in enumerate(plan.rows)),
        "",
        *_recommendation(plan, config, count),
    ]
    return "\n".join(lines)


def _line(plan: Plan, row: Row, is_best: bool) -> str:
    gb = row_gb(row)
    columns = (gb["weights"], gb["optimizer"], gb["gradients"], gb["gathered"] + gb["buckets"], gb["activations"])
    widths = (8, 7, 6, 6, 7)
    text = f"{row.ds_config:15s}{row.checkpointing:>10s} {row.tokens or '-':>7}     "
    text += "".join(f"{value:{width}.1f}" for value, width in zip(columns, widths, strict=True))
    text += f"{gb['head']:6.1f}{gb['step'] + gb['overhead']:6.1f}{gb['peak']:7.1f}{gb['host']:6.0f}    "
    if row.time is None:
        return text + "does not fit the GPU, not even one group"
    time = row.time
    text += f"{time.compute:7.2f}{time.communication:7.2f}{time.offload:6.2f}{time.total:7.2f}{time.mfu:5.0%} "
    text += f"{3600 * plan.groups_per_second(row) * plan.group.pairs:9,.0f}"
    if not row.fits_host:
        return text + "  does not fit the host"
    return text + ("  <-" if is_best else "")


def _recommendation(plan: Plan, config: Config, count: int) -> list[str]:
    if plan.best is None:
        return [
            "nothing fits: more GPUs divide the states, trainable.language=lora shrinks them, larger hosts take them; "
            "the smallest group must fit one GPU"
        ]
    row = plan.rows[plan.best]
    lines = [
        "recommended:",
        f"  --train.ds_config ds_configs/{row.ds_config}.json --model.gradient_checkpointing {row.checkpointing} \\",
        f"  --train.max_micro_batch_tokens {row.tokens} --train.groups_per_step {plan.groups_per_step} \\",
        f"  --train.reference_micro_batch_tokens {plan.reference_tokens}",
    ]
    if plan.groups_per_step != config.train.groups_per_step:
        lines.append(
            f"  (train.groups_per_step is {config.train.groups_per_step} in the configuration: what a step holds "
            "changes, and with it what the learning rate means)"
        )
    if row.zero.offload_optimizer:
        lines.append("  (the host's CPU takes part in each step: see docs/sizing.md)")
    if count:
        epoch = count / plan.groups_per_second(row)
        lines.append(
            f"{count:,} groups: {epoch / 3600:.2f} h an epoch, after {plan.reference_seconds(count) / 3600:.2f} h of "
            "reference pass"
        )
    return lines
