"""Savings of each optimisation, counted: FLOPs per preference group and bytes per packed token, at real shapes.

    python -m benchmarks.levers [--json FILE] [--model llava-1.5-7b] [--prefix 640] [--response 150]

Nothing is executed: weights are on the meta device. FLOPs are those of `bpo.training.flops`, which
tests/training/test_flops.py compares with PyTorch's counter, and bytes those of `bpo.tools.plan.activations`. The image
takes 576 tokens of the prefix.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpo.config.training import Config, TrainableConfig
from bpo.data.useful_work import attended_pairs
from bpo.records import UsefulWork
from bpo.tools.plan.activations import activation_costs
from bpo.tools.plan.shape import shape_of
from bpo.training.flops import ModelFlops

IMAGE_TOKENS = 576
PATCHES = IMAGE_TOKENS + 1


def group_work(prefix: int, completions: list[int]) -> UsefulWork:
    """One image, one prefix and its completions, packed."""
    return UsefulWork(
        tokens=prefix + sum(completions),
        responses=sum(completions),
        image_tokens=IMAGE_TOKENS,
        pairs=attended_pairs(prefix, completions),
        patches=PATCHES,
        patch_pairs=PATCHES**2,
    )


def separate_work(prefix: int, completions: list[int], *, whole_head: bool) -> UsefulWork:
    """Each completion with its own image and prefix; `whole_head`: every row reaches the LM head."""
    total = UsefulWork()
    for length in completions:
        work = group_work(prefix, [length])
        total += replace(work, responses=work.tokens) if whole_head else work
    return total


def levers(flops: ModelFlops, prefix: int, completions: list[int]) -> list[dict[str, Any]]:
    """FLOPs to train one group; each row adds one optimisation to the row before."""
    plain = separate_work(prefix, completions, whole_head=True)
    rows_of_responses = separate_work(prefix, completions, whole_head=False)
    shared = group_work(prefix, completions)
    recomputed = flops.forward_macs(shared)
    layers = 2 * (recomputed["language"] + recomputed["attention"])
    cases = {
        "separate sequences, every row to the head, live reference": flops.step(plain) + flops.forward(plain),
        "only response rows reach the head": flops.step(rows_of_responses) + flops.forward(rows_of_responses),
        "image and prompt once per group": flops.step(shared) + flops.forward(shared),
        "reference from the store": flops.step(shared),
        "the same with gradient_checkpointing=full": flops.step(shared) + layers,
    }
    first = next(iter(cases.values()))
    return [{"lever": name, "tflop": value / 1e12, "share": value / first} for name, value in cases.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--model", default="llava-1.5-7b", help="a built-in LLaVA shape; see `bpo plan --help`")
    parser.add_argument("--prefix", type=int, default=640, help="tokens of image and prompt")
    parser.add_argument("--response", type=int, default=150, help="tokens of each completion")
    arguments = parser.parse_args()
    from benchmarks.synthetic import machine_of_run

    results: dict[str, Any] = {"machine": machine_of_run(), "model": arguments.model}
    results |= {"prefix": arguments.prefix, "response": arguments.response}
    for language in ("full", "lora"):
        shape = shape_of(arguments.model, Config(trainable=TrainableConfig(language=language)))  # type: ignore[arg-type]
        results[language] = {
            f"{count} completions": levers(shape.flops, arguments.prefix, [arguments.response] * count)
            for count in (2, 3)
        }
        results[language]["kept_bytes_per_token"] = {
            mode: activation_costs(shape, mode).language.kept.per_row for mode in ("none", "selective", "full")
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
