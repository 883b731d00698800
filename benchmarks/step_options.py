"""Comparison of the options of a training step: python -m benchmarks.step_options [--json FILE] [--quick]

Recomputation: bytes held for the backward pass, FLOPs and seconds. Worker processes that prepare images: seconds per
micro-batch and the share spent waiting for it. ZeRO stage and offload on one rank: seconds per step. All on this
machine's CPU; alternatives are interleaved, so ratios are more reliable than seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic import (
    config_for,
    interleaved_seconds,
    machine_of_run,
    policy_of,
    random_batch,
    small_llava,
    trainer_of,
)
from bpo import engine
from bpo.config.training import Config, DataConfig
from bpo.data.encode import load_encoder
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import resolve_model
from bpo.model.policy import model_inputs
from bpo.tools.plan.live_bytes import LiveBytes
from bpo.training.batches import training_batches
from bpo.training.measure import measure_groups
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from bpo.training.step import run_step
from tests.tiny import tiny_llava

CPU = torch.device("cpu")
HIDDEN, LAYERS = 256, 4


def recomputation(folder: Path, quick: bool) -> dict[str, Any]:
    """Each mode of model.gradient_checkpointing: forward and backward of one micro-batch, in fp32."""
    model = small_llava(folder / "recomputation", hidden=HIDDEN, layers=LAYERS)
    results: dict[str, Any] = {"hidden": HIDDEN, "layers": LAYERS}
    for language in ("full", "lora"):
        cases: dict[str, Callable[[], Any]] = {}
        rows: dict[str, dict[str, float]] = {}
        for mode in ("none", "selective", "full"):
            # Without DeepSpeed, whose buckets would be counted too.
            policy = policy_of(config_for(model, folder, language=language, gradient_checkpointing=mode))
            batch = random_batch(policy, 2 if quick else 8, 256, 128)
            inputs = model_inputs(batch.to(CPU, torch.float32))

            def both(policy: Any = policy, batch: Any = batch, inputs: Any = inputs) -> None:
                with packed_layout(batch.layout):
                    policy(**inputs).sum().backward()

            with packed_layout(batch.layout), LiveBytes(policy.parameters()) as live:
                loss = policy(**inputs).sum()
                held = live.now
                live.reset_peak()
                loss.backward()
            with FlopCounterMode(display=False) as counter:
                both()
            rows[mode] = {"held_bytes": held, "peak_bytes": live.peak, "flops": counter.get_total_flops()}
            cases[mode] = both
        for mode, seconds in interleaved_seconds(cases, 1 if quick else 9).items():
            rows[mode] |= {"seconds": statistics.median(seconds), "least_seconds": min(seconds)}
        results[language] = {"tokens": batch.input_ids_T.numel(), "modes": rows}
    return results


def _photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Pictures with structure at every scale, so that JPEG decoding takes as long as for photographs."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def workers(folder: Path, quick: bool) -> dict[str, Any]:
    """data.num_workers: training steps over 1.2-megapixel JPEG files, about four per micro-batch; best of 3 runs."""
    count = 8 if quick else 32
    _photos(folder / "photos", count, (1280, 960))
    with (folder / "groups.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            answers = [
                {"response": f"{w} {number} " * 12, "score": s, "type": "gt"} for s, w in enumerate(("no", "yes"))
            ]
            record = {"id": f"g{number}", "images": [f"{number}.jpg"], "prompt": "What?", "completions": answers}
            file.write(json.dumps(record) + "\n")
    base = config_for(tiny_llava(folder / "tiny", num_layers=6), folder)
    results: dict[str, Any] = {"images": count, "pixels": [1280, 960], "rows": {}}
    trainer = trainer_of(base)
    rounds: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
    for num_workers in [*rounds] * (1 if quick else 3):
        data = DataConfig(
            groups=str(folder / "groups.jsonl"), image_root=str(folder / "photos"), num_workers=num_workers
        )
        train = replace(base.train, groups_per_step=count, epochs=2 if quick else 4, max_micro_batch_tokens=1200)
        rounds[num_workers].append(_epochs(replace(base, data=data, train=train), trainer))
    for num_workers, rows in rounds.items():
        results["rows"][str(num_workers)] = min(rows, key=lambda row: row["micro_batch_seconds"])
    return results


def _epochs(config: Config, trainer: engine.TrainingEngine) -> dict[str, float]:
    measured = measure_groups(config, load_encoder(config), Ranks(), collectives.gather_from_ranks)
    steps = plan_training(config.train, measured, Ranks())
    resolved = resolve_model(config.model, trainer.device, for_training=True)
    store = fill_reference_store(config, resolved, trainer, measured)
    waited = computed = 0.0
    num_micro_batches = 0
    for step, batches in zip(steps, training_batches(config.data, measured, steps, store, trainer), strict=True):
        source = iter(batches)
        for _ in range(len(batches)):
            started = time.perf_counter()
            batch = next(source)
            got = time.perf_counter()
            run_step(trainer, [batch], config, measured.num_pairs(step.groups), step=1)
            if step.index:  # skip the first step, which starts the processes
                waited += got - started
                computed += time.perf_counter() - got
                num_micro_batches += 1
        trainer.step(1.0)
    return {
        "micro_batch_seconds": (waited + computed) / num_micro_batches,
        "waiting_seconds": waited / num_micro_batches,
        "waiting_share": waited / (waited + computed),
    }


def zero(folder: Path, quick: bool) -> dict[str, Any]:
    """ZeRO stages and offload, one rank, full fine-tuning: forward, backward and optimizer step."""
    model = small_llava(folder / "zero", hidden=HIDDEN, layers=LAYERS)
    files = {name: f"ds_configs/{name}.json" for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")}
    for key, value in (("overlap_comm", False), ("pin_memory", False)):
        settings = json.loads(engine.find_ds_config(files["zero2_offload"]).read_text(encoding="utf-8"))
        section = settings["zero_optimization"]
        (section if key in section else section["offload_optimizer"])[key] = value
        path = folder / f"zero2_offload_{key}.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        files[f"zero2_offload, {key} off"] = str(path)
    cases: dict[str, Callable[[], Any]] = {}
    for name, ds_config in files.items():
        config = config_for(model, folder, ds_config=ds_config)
        trainer = trainer_of(config)
        batch = random_batch(trainer.policy, 2, 256, 128).to(trainer.device, trainer.dtype)

        def step(trainer: Any = trainer, batch: Any = batch, config: Any = config) -> None:
            run_step(trainer, [batch], config, len(batch.loss_inputs.pairs_P2), step=1)
            trainer.step(1.0)

        cases[name] = step
    seconds = interleaved_seconds(cases, 1 if quick else 9)
    return {
        "tokens": 1024,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "least_seconds": {name: min(values) for name, values in seconds.items()},
    }


NOT_MEASURED = {
    "pinned memory and the asynchronous copy (bpo/data/transfer.py)": "needs a GPU",
    "overlap_comm with NCCL on several GPUs": "needs GPUs",
    "pin_memory of offload": "needs a GPU: without one nothing is pinned",
    "offload_optimizer.ratio, ZeRO-3 only": "needs a GPU: part of the optimizer states stays on it",
    "offload_optimizer.super_offload, ZeRO-3 only": "needs a CUDA GPU: DeepSpeed supports no other device",
    "zenflow": "needs a GPU; it also updates with gradients of earlier steps, which changes the training",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to try the script")
    arguments = parser.parse_args()
    engine.init_distributed(Ranks())
    results: dict[str, Any] = {"machine": machine_of_run()}
    with tempfile.TemporaryDirectory() as name:
        for part in (recomputation, workers, zero):
            folder = Path(name) / part.__name__
            folder.mkdir()
            results[part.__name__] = part(folder, arguments.quick)
    results["not_measured"] = NOT_MEASURED
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
