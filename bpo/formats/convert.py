"""`bpo convert IN OUT`: lossless conversion of annotations or preference groups between formats."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords, share
from bpo.formats.exporters import trl_pairs, write_jsonl, write_paper, write_trl_jsonl, write_trl_parquet
from bpo.formats.image_folder import ImageFolder
from bpo.formats.images import read_image_file, relative_image_path
from bpo.formats.importers.registry import SCHEMAS, Source, open_source
from bpo.formats.problems import Problem, RecordError
from bpo.formats.reading import iterate_records
from bpo.job.terminal import printable
from bpo.records import Annotation, PreferenceGroup

Target = Literal["bpo", "trl", "paper"]
TARGET_OF_SUFFIX: dict[str, Target] = {".jsonl": "bpo", ".parquet": "trl", ".json": "paper"}


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        num_read, num_written: Records read and rows written; TRL has one row per pair of a group.
        left_out: Reason -> number of skipped records without a training signal.
        num_images: Images written to the folder.
        bad: The bad records.
    """

    schema: str = ""
    num_read: int = 0
    num_written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    num_images: int = 0
    bad: BadRecords = field(default_factory=BadRecords)


def convert(
    source_path: Path,
    output: Path,
    *,
    schema: str = "",
    target: Target | None = None,
    image_root: Path | None = None,
    images: ImageFolder | None = None,
    bad: BadRecords | None = None,
    progress: bool = False,
) -> Conversion:
    """Converts `source_path` to `output`, which is written atomically.

    Args:
        schema: Name of the record schema; detected if empty.
        target: Output format (default: derived from the suffix of `output`).
        image_root: Folder of the images to embed in parquet; absolute paths below it become relative. By default
            the folder of `images`, or the current one, and only parquet's paths become relative.
        images: Folder that receives embedded images.

    Raises:
        ValueError: The format is unknown, the target cannot hold such records, or a record is bad (see `BadRecords`).
    """
    target = target or TARGET_OF_SUFFIX.get(output.suffix)
    if target is None:
        raise ValueError(f"{output}: use a suffix among {', '.join(TARGET_OF_SUFFIX)}, or set the format with --to")
    if output.exists() and source_path.exists() and output.samefile(source_path):
        raise ValueError(f"{output} is the input file; choose another output file")
    source = open_source(source_path, schema)
    if source.schema is None:
        raise ValueError(f"{source_path}: the file contains no records")
    if source.schema.gives == "annotations" and target != "bpo":
        raise ValueError(
            f"{source_path} contains annotations ({source.schema.name}), but {target} holds preference groups; write "
            ".jsonl, or run bpo bootstrap first"
        )
    result = Conversion(source.schema.name, bad=bad or BadRecords())
    images = images or ImageFolder(None)
    root = image_root or images.root or Path(".")
    embeds = target == "trl" and output.suffix == ".parquet"
    records = _records(source, result, images, progress)
    if embeds or image_root is not None:
        records = (_with_relative_paths(record, root) for record in records)
    records = _fitting(records, source, result, target, root if embeds else None)
    _write(records, output, target, root, result)
    result.num_images = images.num_written
    return result


def _with_relative_paths(record: Annotation | PreferenceGroup, root: Path) -> Annotation | PreferenceGroup:
    images = tuple(relative_image_path(root, image) for image in record.images)
    if isinstance(record, Annotation):
        return replace(record, images=images)
    other_images = tuple(relative_image_path(root, image) for image in record.other_images)
    return replace(record, images=images, other_images=other_images)


def _records(
    source: Source, result: Conversion, images: ImageFolder, progress: bool
) -> Iterator[Annotation | PreferenceGroup]:
    def left_out(reason: str, record_id: str) -> None:
        result.left_out[reason] += 1

    with tqdm(unit="record", unit_scale=True, desc="converting", disable=not progress) as bar:
        yield from iterate_records(
            source,
            result.bad,
            left_out=left_out,
            take_images=images.take,
            seen_piece=lambda piece: bar.update(),
        )


def _fitting(
    records: Iterator[Annotation | PreferenceGroup],
    source: Source,
    result: Conversion,
    target: Target,
    image_root: Path | None,
) -> Iterator[Annotation | PreferenceGroup]:
    """Yields and counts the records that the target can hold; reports the others as bad."""
    for record in records:
        try:
            _check_target(record, target, image_root)
        except RecordError as error:
            where = str(source.container.paths[0])
            result.bad.report(Problem(error.code, where, record.id, f"{where} (id {record.id!r}): {error}"))
            continue
        result.num_read += 1
        yield record


def _check_target(record: Annotation | PreferenceGroup, target: Target, image_root: Path | None) -> None:
    """Raises `RecordError` if the target cannot hold the record or an image to embed cannot be read."""
    if image_root is not None:
        for image in (*record.images, *(record.other_images if isinstance(record, PreferenceGroup) else ())):
            read_image_file(image_root, image)
    if target == "trl" and isinstance(record, PreferenceGroup):
        trl_pairs(record)


def _write(
    records: Iterator[Annotation | PreferenceGroup], output: Path, target: Target, image_root: Path, result: Conversion
) -> None:
    if target == "bpo":
        result.num_written = write_jsonl(records, output)
        return
    groups = (record for record in records if isinstance(record, PreferenceGroup))
    if target == "paper":
        result.num_written = write_paper(groups, output)
    elif output.suffix == ".parquet":
        result.num_written = write_trl_parquet(groups, output, image_root)
    else:
        result.num_written = write_trl_jsonl(groups, output, image_root)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    names = ", ".join(schema.name for schema in SCHEMAS)
    parser = argparse.ArgumentParser(prog="bpo convert", description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="a file, or a folder of parquet files or tar shards")
    parser.add_argument("output", type=Path, metavar="OUT", help=".jsonl (bpo), .json (paper) or .parquet (TRL)")
    parser.add_argument("--from", dest="schema", default="", help=f"record schema (default: detected), one of {names}")
    parser.add_argument("--to", choices=["bpo", "trl", "paper"], help="output format (default: from the suffix)")
    root_help = "base folder of relative image paths; absolute paths below it become relative"
    parser.add_argument("--image-root", type=Path, help=root_help)
    parser.add_argument("--images", type=Path, help="folder for embedded images")
    parser.add_argument("--fetch-urls", action="store_true", help="download images given as URLs into --images")
    parser.add_argument(
        "--on-bad", choices=["quarantine", "error"], default="error", help="handling of bad records (default: error)"
    )
    ceiling = DataConfig.max_bad_share
    share_help = f"largest fraction of bad records to quarantine (default: {ceiling})"
    parser.add_argument("--max-bad-share", type=share, default=ceiling, help=share_help)
    args = parser.parse_args(argv)
    if args.fetch_urls and args.images is None:
        raise ValueError("--fetch-urls requires --images, the folder for the downloads")
    result = convert(
        args.input,
        args.output,
        schema=args.schema,
        target=args.to,
        image_root=args.image_root,
        images=ImageFolder(args.images, args.fetch_urls),
        bad=BadRecords(args.on_bad, args.max_bad_share),
        progress=True,
    )
    lines = [f"{args.output}: {result.num_written:,} rows from {result.num_read:,} records ({result.schema})"]
    lines += [f"  left out: {count:,} ({reason})" for reason, count in result.left_out.most_common()]
    if result.num_images:
        lines.append(f"  {result.num_images:,} images written to {args.images}")
    if result.bad.problems:
        quarantine = args.output.with_name(f"{args.output.name}.quarantine.jsonl")
        bad_lines = [json.dumps(problem.to_json()) + "\n" for problem in result.bad.problems]
        quarantine.write_text("".join(bad_lines), encoding="ascii")
        lines.append(f"  bad: {len(bad_lines):,}, listed in {quarantine}")
    print(printable("\n".join(lines)))
    return 0
