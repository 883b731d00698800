"""Per-token log-probs of a trained model and its reference, for `bpo view --scores`.

    bpo score groups.jsonl --policy MODEL --reference BASE --image-root IMAGES --out scores.jsonl [--limit 500]

Uses one process, one model in memory at a time, and the forward pass of training on micro-batches of groups.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import Dropped, EncodedGroup, Encoder, EncodingError, load_encoder
from bpo.formats.bad_records import BadRecords
from bpo.formats.problems import Problem, RecordError
from bpo.job.compile_locks import named_compile_locks
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.launch import pick_device
from bpo.job.terminal import printable
from bpo.model.group_scores import GroupScorer, completion_places
from bpo.model.load import resolve_model
from bpo.records import PreferenceGroup
from bpo.tools.groups import add_bad_record_options, bad_records_from, iterate_groups, sample, write_bad_records


def score_groups(
    config: Config, groups: Sequence[PreferenceGroup], max_tokens: int, bad: BadRecords
) -> Iterator[tuple[PreferenceGroup, EncodedGroup, list[list[float]]]]:
    """Yields (group, encoded group, token log-probs of each distinct completion) for every group that can be encoded.

    Args:
        bad: Collects groups whose images cannot be used.

    Raises:
        ValueError: Too many groups are bad.
    """
    model = resolve_model(config.model, pick_device(), for_training=True)
    scorer = GroupScorer(model, load_encoder(config))
    for group, encoded, logp in scorer.score(_encoded(scorer.encoder, groups, bad), max_tokens):
        yield group, encoded, [values_N.tolist() for values_N in logp]


def _encoded(
    encoder: Encoder, groups: Sequence[PreferenceGroup], bad: BadRecords
) -> Iterator[tuple[PreferenceGroup, EncodedGroup]]:
    """Groups in file order; those without a pair or too long are skipped and logged."""
    for group in tqdm(groups, desc="scoring", unit="group"):
        try:
            encoded = encoder.encode_group(group)
        except (RecordError, EncodingError) as error:
            code = error.code if isinstance(error, RecordError) else "image-parts"
            bad.report(Problem(code, group.id, group.id, str(error)))
            bad.check_share(len(groups), "the groups to score", advice="is it the right --image-root?")
            continue
        if isinstance(encoded, Dropped):
            tqdm.write(printable(f"skipped {group.id}: {encoded.detail}"), file=sys.stderr)
            continue
        yield group, encoded


@named_compile_locks()
def write_scores(options: argparse.Namespace) -> int:
    """Writes one JSON line per group: `id`, and per completion `response`, `tokens`, `policy`, `reference`.

    Bad records are listed in `OUT.quarantine.jsonl`.

    Returns:
        The number of groups written.

    Raises:
        ValueError: Too many records are bad, or the two models tokenize differently.
    """
    unread, unseen = bad_records_from(options), bad_records_from(options)
    groups = list(sample(iterate_groups(options.data, unread), options.limit))
    data = DataConfig(
        image_root=str(options.image_root),
        max_length_tokens=options.max_length_tokens,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        image_aspect=options.image_aspect,
        system_prompt=options.system_prompt,
    )
    sides = {
        name: Config(model=ModelConfig(path=str(path), dtype=options.dtype, attention="auto"), data=data)
        for name, path in (("reference", options.reference), ("policy", options.policy))
    }
    max_tokens = options.max_micro_batch_tokens
    reference = {
        group.id: (encoded.completion_ids, values)
        for group, encoded, values in score_groups(sides["reference"], groups, max_tokens, unseen)
    }
    listed = BadRecords("quarantine", 1.0, [*unread.problems, *unseen.problems])
    write_bad_records(options.out.with_name(f"{options.out.name}.quarantine.jsonl"), listed)
    encoder = load_encoder(sides["policy"])
    usable = [group for group in groups if group.id in reference]
    written = 0
    with replacing(options.out) as file:
        for group, encoded, values in score_groups(sides["policy"], usable, max_tokens, unseen):
            ids, before = reference[group.id]
            if ids != encoded.completion_ids:
                raise ValueError(
                    f"{options.policy} and {options.reference} tokenize group {group.id!r} differently; give the model "
                    "that the policy was trained from as --reference"
                )
            file.write(to_line(_line(encoder, group, encoded, values, before), ensure_ascii=False))
            written += 1
    if listed.problems:
        text = f"skipped {len(listed.problems):,} bad records, listed in {options.out}.quarantine.jsonl"
        print(printable(text), file=sys.stderr)
    return written


def _line(
    encoder: Encoder,
    group: PreferenceGroup,
    encoded: EncodedGroup,
    policy: list[list[float]],
    reference: list[list[float]],
) -> dict[str, object]:
    completions = []
    for completion, place in zip(group.completions, completion_places(encoder, group, encoded), strict=True):
        completions.append(
            {
                "response": completion.response,
                "tokens": token_texts(encoder, encoded.completion_ids[place]),
                "policy": policy[place],
                "reference": reference[place],
            }
        )
    return {"id": group.id, "completions": completions}


def token_texts(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; of a character split over several tokens, the last one adds the character."""
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
    parser.add_argument("--policy", required=True, help="trained model, merged by `bpo export`")
    parser.add_argument("--reference", required=True, help="model before training")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder that image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--limit", type=int, default=0, help="number of groups, drawn at random; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--max-length-tokens", type=int, default=2048, help="as in training (default: %(default)s)")
    for limit in ("min", "max"):
        parser.add_argument(f"--{limit}-pixels", type=int, default=0, help=f"data.{limit}_pixels of the training")
    aspects = ["processor", "pad"]
    parser.add_argument(
        "--image-aspect", default="processor", choices=aspects, help="data.image_aspect of the training"
    )
    parser.add_argument("--system-prompt", default="", help="data.system_prompt of the training")
    parser.add_argument("--max-micro-batch-tokens", type=int, default=8192, help="(default: %(default)s)")
    add_bad_record_options(parser)
    options = parser.parse_args(argv)
    try:
        print(printable(f"{write_scores(options)} groups: {options.out}"))
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0
