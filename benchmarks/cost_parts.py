"""Parts of a run whose cost grows with the number of groups; each runs at one size in a fresh process."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

WORDS = "red blue green dog cat tree car one two three left right near under a the".split()
# Tokens per group: about 700, for 576 image tokens, a prompt and two answers.
TOKENS = (620, 900)
RESPONSE_TOKENS = (60, 340)
WORLD_SIZE = 8


def private_bytes() -> int:
    """Private memory of this process, excluding mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> tuple[float, object]:
    started = clock()
    result = run()
    return clock() - started, result


def groups_part(num_groups: int, folder: Path) -> dict[str, float]:
    """Reads groups.jsonl with two completions of about 20 words per group."""
    from bpo.formats.files import read_groups

    rng = random.Random(0)
    path = folder / "groups.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            answers = [" ".join(rng.choices(WORDS, k=20)) for _ in range(2)]
            completions = [{"response": answers[0], "score": 1, "type": "gt"}]
            completions.append({"response": answers[1], "score": 0, "type": "mllm-hal"})
            record = {"id": f"g{number}", "images": [f"{number}.jpg"], "prompt": "Describe the image."}
            file.write(json.dumps({**record, "completions": completions}) + "\n")
    before = private_bytes()
    seconds, groups = timed(lambda: read_groups(path))
    gc.collect()
    assert len(groups) == num_groups  # type: ignore[arg-type]
    return {"read_s": seconds, "bytes": private_bytes() - before}


def plan_part(num_groups: int, folder: Path) -> dict[str, float]:
    """Plans one epoch in steps of 128 groups on eight ranks, and divides a reference pass among them; CPU seconds."""
    from bpo.data.schedule import plan_balance, plan_steps, split_into_micro_batches

    rng = random.Random(0)
    num_tokens = [rng.randint(*TOKENS) for _ in range(num_groups)]
    before = private_bytes()
    plan_s, steps = timed(
        lambda: plan_steps(num_tokens, groups_per_step=128, epochs=1, seed=0, world_size=WORLD_SIZE, max_tokens=8192),
        time.process_time,
    )
    plan_bytes = private_bytes() - before
    divide_s, bins = timed(
        lambda: split_into_micro_batches(range(num_groups), num_tokens, WORLD_SIZE, 4 * 8192, level=False),
        time.process_time,
    )
    balance = plan_balance(steps, num_tokens)  # type: ignore[arg-type]
    return {
        "plan_s": plan_s,
        "divide_s": divide_s,
        "plan_bytes": plan_bytes,
        "both_bytes": private_bytes() - before,
        "busiest_rank": balance.step_mean,
        "micro_batches_of_the_pass": len(bins[0]),  # type: ignore[index]
    }


def store_part(num_groups: int, folder: Path) -> dict[str, float]:
    """Writes, opens, reads and verifies the log-probs of every group, without the model's forward pass."""
    import torch

    from bpo.model.reference.store import ReferenceStore
    from bpo.tools.refs import find_damage

    rng = random.Random(0)
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(num_groups)]
    values = torch.randn(RESPONSE_TOKENS[1])
    lengths = [rng.randint(*RESPONSE_TOKENS) for _ in keys]
    before = private_bytes()
    largest = 0

    def write() -> None:
        nonlocal largest
        store = ReferenceStore(folder / "store", {"dtype": "float32"})
        for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            store.put(key, values[:length])
            if number % 10_000 == 0:
                largest = max(largest, private_bytes() - before)
        store.close()

    write_s, _ = timed(write)
    open_s, store = timed(lambda: ReferenceStore(folder / "store", {"dtype": "float32"}))
    has_s, there = timed(lambda: store.has(keys).all())  # type: ignore[attr-defined]
    order = list(keys)
    rng.shuffle(order)
    read_s, _ = timed(lambda: [store.gather(order[k : k + 12]) for k in range(0, num_groups, 12)])  # type: ignore[attr-defined]
    read_bytes = private_bytes() - before
    verify_s, damage = timed(lambda: find_damage(folder / "store"))
    assert there and not damage
    return {
        "write_s": write_s,
        "open_s": open_s,
        "has_s": has_s,
        "read_s": read_s,
        "verify_s": verify_s,
        "write_bytes": largest,
        "read_bytes": read_bytes,
        "file_bytes": sum(file.stat().st_size for file in (folder / "store").iterdir()),
    }


PARTS: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "groups": groups_part,
    "plan": plan_part,
    "store": store_part,
}
