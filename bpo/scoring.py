"""Per-token log-probs of a trained model and of its reference, for `bpo view --scores`.

    bpo score groups.jsonl --policy MODEL --reference BASE --image-root IMAGES --out scores.jsonl [--limit 500]

One process, one model in memory at a time, groups in micro-batches, through the code that training runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bpo.config import Config, DataConfig, ModelConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import Dropped, EncodedGroup, Encoder, EncodingError, load_encoder
from bpo.data.formats import read_groups
from bpo.data.images import ImageError
from bpo.launch import pick_device
from bpo.model.attention import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import PreferenceGroup


@torch.inference_mode()
def score_groups(
    config: Config, groups: Sequence[PreferenceGroup], max_tokens: int
) -> Iterator[tuple[PreferenceGroup, EncodedGroup, list[list[float]]]]:
    """(group, its tokens, log-probs of each distinct completion's tokens) of every group that can be encoded."""
    encoder = load_encoder(config)
    device = pick_device()
    policy = PolicyModel(load_model(config.model, device, for_training=True)).to(device).eval()
    for batch in _batches(encoder, groups, max_tokens):
        encoded = [one for _, one in batch]
        packed = collate_groups(encoded, encoder.family)
        with packed_layout(packed.layout):
            logp_N = policy(**model_inputs(packed, device, policy.model.dtype)).cpu()
        first = 0
        for group, one in batch:
            values = []
            for ids in one.completion_ids:
                values.append(logp_N[first : first + len(ids)].tolist())
                first += len(ids)
            yield group, one, values


def _batches(
    encoder: Encoder, groups: Sequence[PreferenceGroup], max_tokens: int
) -> Iterator[list[tuple[PreferenceGroup, EncodedGroup]]]:
    """Groups in the file's order, as many together as fit; what cannot be encoded is named and left out."""
    batch: list[tuple[PreferenceGroup, EncodedGroup]] = []
    tokens = 0
    for group in tqdm(groups, desc="scoring", unit="group"):
        try:
            encoded = encoder.encode_group(group)
        except (ImageError, EncodingError) as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        if isinstance(encoded, Dropped):
            tqdm.write(f"left out: {group.id}: {encoded.detail}", file=sys.stderr)
            continue
        if batch and tokens + encoded.num_tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append((group, encoded))
        tokens += encoded.num_tokens
    if batch:
        yield batch


def write_scores(chosen: argparse.Namespace) -> int:
    """Writes one JSON line a group: `id` and, a completion, `response`, `tokens`, `policy`, `reference`.

    Returns:
        The number of groups written.
    """
    groups = list(read_groups(chosen.data))
    if chosen.limit and chosen.limit < len(groups):
        groups = [groups[at] for at in sorted(random.Random(0).sample(range(len(groups)), chosen.limit))]
    data = DataConfig(image_root=str(chosen.image_root), max_length_tokens=chosen.max_length_tokens)
    sides = {
        name: Config(model=ModelConfig(path=str(path), dtype=chosen.dtype, attention="auto"), data=data)
        for name, path in (("reference", chosen.reference), ("policy", chosen.policy))
    }
    reference = {
        group.id: values for group, _, values in score_groups(sides["reference"], groups, chosen.max_micro_batch_tokens)
    }
    encoder = load_encoder(sides["policy"])
    written = 0
    with chosen.out.open("w", encoding="utf-8") as file:
        for group, encoded, values in score_groups(sides["policy"], groups, chosen.max_micro_batch_tokens):
            line = _line(encoder, group, encoded, values, reference[group.id])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
    return written


def _line(
    encoder: Encoder,
    group: PreferenceGroup,
    encoded: EncodedGroup,
    policy: list[list[float]],
    reference: list[list[float]],
) -> dict[str, object]:
    at = {ids: index for index, ids in enumerate(encoded.completion_ids)}
    room = encoder.max_length_tokens - len(encoded.prompt.prefix_ids)
    completions = []
    for completion in group.completions:
        ids = encoder.encode_completion(completion.response)[:room]
        completions.append(
            {
                "response": completion.response,
                "tokens": token_texts(encoder, ids),
                "policy": policy[at[ids]],
                "reference": reference[at[ids]],
            }
        )
    return {"id": group.id, "completions": completions}


def token_texts(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a token inside a character adds nothing, its last one the character."""
    texts: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = encoder.tokenizer.decode(list(ids[:end]))
        if text.endswith("\ufffd"):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
    return texts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bpo score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="groups.jsonl")
    parser.add_argument("--policy", required=True, help="the trained model, as `bpo export` wrote it (merged)")
    parser.add_argument("--reference", required=True, help="the model before training")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder that image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--limit", type=int, default=0, help="a random sample of so many groups; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--max-length-tokens", type=int, default=2048, help="as in training (default: %(default)s)")
    parser.add_argument("--max-micro-batch-tokens", type=int, default=8192, help="(default: %(default)s)")
    chosen = parser.parse_args(argv)
    try:
        print(f"{write_scores(chosen)} groups: {chosen.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
