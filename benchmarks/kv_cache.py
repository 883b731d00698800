"""Comparison of the caches of `bootstrap.cache` where they matter: long prompts, several records, many layers.

    python -m benchmarks.kv_cache [--json benchmarks/results/kv-cache-cpu.json]

A random LLaMA of 8 layers, 512 wide (fp32, one thread), 64 new tokens after prompts as long as a question with one or
two images of LLaVA-1.5. The kinds are interleaved; their answers must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bpo.config.bootstrap import CacheKind
from bpo.model.generate import generate_ids
from bpo_kernels.bench.measure import machine

NEW_TOKENS = 64


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).eval()


def measure(model: LlamaForCausalLM, num_records: int, prompt_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each kind, interleaved, and its median speedup over `dynamic` across rounds."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, 32_000, (num_records, prompt_tokens), generator=generator).tolist()
    seconds: dict[str, list[float]] = {kind: [] for kind in get_args(CacheKind)}
    answers: dict[str, Any] = {}
    for _ in range(rounds):
        for kind in get_args(CacheKind):
            started = time.perf_counter()
            answers[kind] = generate_ids(
                model,
                prompts,
                pad_token_id=0,
                eos_token_ids=[1],
                suppressed_token_ids=[1, 2],  # every record generates the maximum number of tokens
                max_new_tokens=[NEW_TOKENS] * num_records,
                temperature=0,
                top_p=1.0,
                seeds=[0] * num_records,
                cache=kind,
            )
            seconds[kind].append(time.perf_counter() - started)
            assert answers[kind] == answers["reserved"], kind
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds["dynamic"], values, strict=True))
        for kind, values in seconds.items()
    }
    return {"records": num_records, "prompt_tokens": prompt_tokens, "seconds": seconds, "times_faster": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = small_llama()
    rows = []
    for num_records, prompt_tokens in ((1, 640), (4, 640), (16, 640), (16, 1280)):
        rows.append(measure(model, num_records, prompt_tokens, options.rounds))
        cells = (f"{kind} {ratio:.2f}" for kind, ratio in rows[-1]["times_faster"].items())
        print(f"{num_records} records of {prompt_tokens} tokens, times faster than dynamic:", *cells, flush=True)
    if options.json:
        command = " ".join(["python -m benchmarks.kv_cache", *sys.argv[1:]])
        tree = {"command": command, "machine": machine(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
