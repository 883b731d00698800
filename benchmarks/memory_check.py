"""Validates the memory model of `bpo plan`: trains small models, counts all live bytes, and compares.

    python benchmarks/memory_check.py [--json FILE] [--only NAME ...]          one rank
    deepspeed --num_accelerators 2 benchmarks/memory_check.py [--json FILE]    two ranks

On a CPU the measurement is exact: `LiveBytes` sums the storages of all live tensors, from before the model is loaded
until after two optimizer steps; memory inside an operator is not visible. On a GPU it is
`torch.cuda.max_memory_allocated`. Compares the peaks of the forward pass, backward pass and update of the second step,
when the optimizer state exists, and the largest of them. Exit status 1 if that differs by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bpo import engine  # noqa: E402
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig, TrainConfig  # noqa: E402
from bpo.data.collate import collate_groups  # noqa: E402
from bpo.data.encode import EncodedGroup, EncodedPrompt  # noqa: E402
from bpo.data.families import family_of  # noqa: E402
from bpo.data.transfer import on_device  # noqa: E402
from bpo.job import collectives  # noqa: E402
from bpo.job.launch import Ranks, ranks_from_environment  # noqa: E402
from bpo.model.load import load_model  # noqa: E402
from bpo.model.policy import PolicyModel  # noqa: E402
from bpo.model.trainable import prepare_trainable  # noqa: E402
from bpo.records import GroupBatch  # noqa: E402
from bpo.tools.plan.activations import activation_costs  # noqa: E402
from bpo.tools.plan.live_bytes import LiveBytes  # noqa: E402
from bpo.tools.plan.memory import Load, Zero, rank_memory  # noqa: E402
from bpo.tools.plan.shape import shape_of  # noqa: E402
from bpo.training.batches import StepBatches  # noqa: E402
from bpo.training.lost import LostGroups  # noqa: E402
from bpo.training.step import run_step  # noqa: E402
from bpo_kernels.provenance import source_commit  # noqa: E402

TOLERANCE = 0.10
IMAGE_TOKEN = 1000
TEXT = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        "image_token_id": IMAGE_TOKEN,
    },
    "qwen": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        "image_token_id": IMAGE_TOKEN,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Case:
    """One small training run; `bucket` replaces every size in the DeepSpeed file, None keeps the file's sizes."""

    name: str
    model: str = "llava"
    ds_config: str = "zero2"
    dtype: str = "float32"
    language: str = "lora"
    vision: str = "frozen"
    checkpointing: str = "none"
    bucket: int | None = 100_000


CASES = (
    Case("llava-lora-zero2"),
    Case("llava-full-zero1", ds_config="zero1", language="full"),
    Case("llava-full-vision-zero2", language="full", vision="full"),
    Case("llava-lora-zero3-full-checkpointing", ds_config="zero3", checkpointing="full"),
    Case("llava-lora-selective", checkpointing="selective"),
    Case("llava-full-zero3-full-checkpointing", ds_config="zero3", language="full", checkpointing="full"),
    Case("llava-lora-bf16-zero2", dtype="bfloat16"),
    Case("llava-full-bf16-zero1", ds_config="zero1", dtype="bfloat16", language="full"),
    Case("llava-full-bf16-zero3", ds_config="zero3", dtype="bfloat16", language="full", checkpointing="full"),
    Case("qwen-lora-zero2", model="qwen"),
    Case("qwen-full-vision-zero3", model="qwen", ds_config="zero3", language="full", vision="full"),
    Case("qwen-lora-bf16-zero3", model="qwen", ds_config="zero3", dtype="bfloat16"),
    Case("qwen-full-bf16-checkpointing", model="qwen", dtype="bfloat16", language="full", checkpointing="full"),
    Case("llava-full-zero2-shipped-buckets", language="full", bucket=None),
)


@dataclass(frozen=True)
class Outcome:
    """Bytes of each phase of the second step on rank 0; `error` is that of the largest."""

    case: Case
    measured: dict[str, float]
    predicted: dict[str, float]
    error: float


def make_batch(case: Case, family: Any, num_groups: int = 6) -> GroupBatch:
    """Groups with an image of 16 tokens, a prompt of 40 to 90 tokens and two completions of 30 to 60 tokens."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(10, 900, (count,), generator=generator).tolist()

    groups = []
    for k in range(num_groups):
        if case.model == "llava":
            images = {"pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}
        else:
            pixels = torch.randn(64, 3 * 2 * 14 * 14, generator=generator)
            images = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}
        prefix = (*words(3), *[IMAGE_TOKEN] * 16, *words(40 + 10 * k))
        completions = (tuple(words(60 - 6 * k)), tuple(words(30 + 6 * k)))
        groups.append(EncodedGroup(EncodedPrompt(f"g{k}", prefix, images), completions, (1.0, 0.0)))
    return collate_groups(groups, family)


def make_config(case: Case, directory: Path, work: Path) -> Config:
    settings = json.loads(engine.find_ds_config(f"ds_configs/{case.ds_config}.json").read_text())
    zero = settings["zero_optimization"]
    if case.bucket is not None:
        zero |= {k: case.bucket for k, v in zero.items() if type(v) is int and k != "stage"}
    path = work / f"{case.name}.json"
    path.write_text(json.dumps(settings))
    return Config(
        model=ModelConfig(path=str(directory), dtype=case.dtype, gradient_checkpointing=case.checkpointing),
        trainable=TrainableConfig(language=case.language, vision=case.vision),
        lora=LoraConfig(r=8),
        train=TrainConfig(ds_config=str(path)),
    )


class _Meter:
    """Measures live bytes and their peak on the training device."""

    def __init__(self, device: torch.device, host_batch: GroupBatch | None):
        self.cuda = device.type == "cuda"
        known = [] if host_batch is None else host_batch.tensors()
        self.live = LiveBytes(known, device="cpu")
        self.before = torch.cuda.memory_allocated() if self.cuda else 0  # left over from an earlier case

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats() if self.cuda else self.live.reset_peak()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated() - self.before if self.cuda else self.live.peak)


def measure(case: Case, config: Config, dtype: torch.dtype, ranks: Ranks) -> tuple[dict[str, float], GroupBatch]:
    """Peaks of the phases of the second optimizer step, and the micro-batch of both steps."""
    from transformers import AutoConfig

    gc.collect()
    settings = engine.deepspeed_config(config.train, dtype, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(case, family_of(AutoConfig.from_pretrained(config.model.path)))
    meter, peaks = _Meter(device, None if dtype == torch.float32 else batch), {}
    with meter.live:
        with engine.partitioned_loading(settings):
            model = load_model(config.model, for_training=True)
        family = family_of(model.config)
        prepare_trainable(model, family, config)
        trainer = engine.TrainingEngine(PolicyModel(model), family, config, settings, ranks)
        meter.live.follow(getattr(p, "ds_tensor", p) for p in model.parameters())
        if dtype == torch.float32:
            meter.live.follow(batch.tensors())  # in half precision only the step's copy counts, not the host's
        logp_N = trainer.reference_logp(batch.to(trainer.device, trainer.dtype)).logp_N
        batch = batch.with_reference(logp_N.cpu())  # in host memory, as from the store
        backward = trainer.backward

        def timed_backward(loss: torch.Tensor, *, is_last: bool, **options: bool) -> None:
            peaks["forward"] = meter.peak()
            meter.reset()
            backward(loss, is_last=is_last, **options)
            peaks["backward"] = meter.peak()

        trainer.backward = timed_backward  # type: ignore[method-assign]
        for step in range(2):
            gc.collect()
            meter.reset()
            num_pairs = int(batch.loss_inputs.pair_weight_P.sum())
            batches = StepBatches(1, on_device([batch], trainer.device, trainer.dtype), num_pairs, LostGroups())
            run_step(trainer, batches, config, num_pairs, step)
            meter.reset()
            trainer.step(1.0)
            peaks["step"] = meter.peak()
    trainer.deepspeed.destroy()
    return peaks, batch


def compare(case: Case, directory: Path, work: Path, ranks: Ranks) -> Outcome:
    """Measures one case and computes the same figures with the model of bpo/tools/plan."""
    config = make_config(case, directory, work)
    dtype = getattr(torch, case.dtype)
    linear = torch.nn.functional.linear
    measured, batch = measure(case, config, dtype, ranks)
    torch.nn.functional.linear = linear  # ZeRO-3 replaces it permanently, which would affect later cases
    shape = shape_of(str(directory), config)
    settings = engine.with_fitting_buckets(json.loads(Path(config.train.ds_config).read_text()), shape.num_trained)
    work = batch.useful_work
    load = Load(work.tokens, work.responses, work.image_tokens, work.patches)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    zero = Zero.from_settings(settings)
    predicted = rank_memory(
        shape,
        activation_costs(shape, case.checkpointing, gathers=zero.stage == 3, device=device),
        zero,
        load,
        ranks.world_size,
        dtype,
        device,
        accumulates=False,
    )
    # On a GPU the context is not counted by PyTorch's allocator.
    error = max(predicted.phases.values()) / max(measured.values()) - 1
    return Outcome(case, measured, predicted.phases, error)


def run(names: list[str], ranks: Ranks, work: Path) -> list[Outcome]:
    """Runs the selected cases; all ranks take part, and each returns its own outcomes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if ranks.is_main:
        for name, arguments in MODELS.items():
            torch.manual_seed(0)
            config = AutoConfig.for_model(**arguments)
            AutoModelForImageTextToText.from_config(config).save_pretrained(work / name)
    collectives.barrier()
    chosen = [case for case in CASES if not names or case.name in names]
    if chosen and torch.cuda.is_available():
        # Warm-up: the first products of the forward and of the backward pass allocate persistent cuBLAS workspaces,
        # which are as large as the peak of such a small model.
        compare(chosen[0], work / chosen[0].model, work, ranks)
    outcomes = []
    for case in chosen:
        outcomes.append(compare(case, work / case.model, work, ranks))
        if ranks.is_main:
            print(line(outcomes[-1]), flush=True)
    return outcomes


def table(report: dict[str, Any]) -> str:
    """Renders a report as the table of docs/sizing.md."""
    outcomes = [Outcome(Case(**outcome.pop("case")), **outcome) for outcome in report["outcomes"]]
    head = "| case | forward | backward | update | error of the peak |"
    return "\n".join([head, "|---|---|---|---|---|", *map(line, outcomes)])


def line(outcome: Outcome) -> str:
    """One row of the table of docs/sizing.md: MB of each phase, measured / predicted."""
    cells = " | ".join(f"{outcome.measured[k] / 1e6:.1f} / {outcome.predicted[k] / 1e6:.1f}" for k in outcome.measured)
    return f"| {outcome.case.name} | {cells} | {outcome.error:+.1%} |"


def about(ranks: Ranks) -> dict[str, Any]:
    import deepspeed
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    python = {"python": platform.python_version()}
    commit = source_commit("bpo", "kernels", "benchmarks", "ds_configs")
    return {"device": device, "ranks": ranks.world_size, "commit": commit, **python, **versions}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print a report as Markdown")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by DeepSpeed's launcher
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    unknown = sorted(set(options.only) - {case.name for case in CASES})
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: no such case")
    ranks = ranks_from_environment()
    engine.init_distributed(ranks)
    # One folder for all ranks of this node: rank 0 creates it and broadcasts its name.
    with tempfile.TemporaryDirectory() as own:
        work = Path(collectives.from_rank_0(lambda: own))
        outcomes = run(options.only, ranks, work)
        collectives.barrier()
    if options.json and ranks.is_main:
        report = {"machine": about(ranks), "outcomes": [asdict(outcome) for outcome in outcomes]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    collectives.shut_down()
    return int(any(abs(outcome.error) > TOLERANCE for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
