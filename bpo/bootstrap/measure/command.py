"""`bpo measure GROUPS`: measures preference groups in any format and writes GROUPS.measures.json.

    bpo measure groups.jsonl                               # texts alone: under a minute
    bpo measure groups.jsonl --model MODEL --image-root IMAGES   # also what the model finds plausible without the image
    bpo measure pairs.parquet --annotations captions.json  # also whether the groups are a fair sample of these
    bpo measure pairs.jsonl --balance weights --out groups.jsonl    # also writes them with weights of the pairs

The measures of the texts are computed at every start; those of the model continue where they were interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from bpo.bootstrap.job.merge import sibling_path
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.measure.report import model_table, table
from bpo.bootstrap.measure.text import TextMeasures, TypeMeasures, all_warnings, measures_to_json, refused_shares
from bpo.bootstrap.select.groups import balance_groups
from bpo.config.training import Config
from bpo.formats.bad_records import BadRecords
from bpo.formats.embedded import name_embedded
from bpo.formats.files import iterate_annotations, iterate_groups
from bpo.job.durable import write_durably
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.job.terminal import printable
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

SHORT_FLAGS = {
    "--annotations": "--data.annotations",
    "--balance": "--bootstrap.select.balance",
    "--image-root": "--data.image_root",
    "--model": "--model.path",
    "--out": "--measure.out",
}


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with the positional GROUPS and the short flags as options of the configuration.

    Raises:
        ValueError: There are several positional arguments.
    """
    expanded: list[str] = []
    positional: list[str] = []
    takes_value = False
    for argument in argv:
        if takes_value or argument.startswith("-"):
            name, *value = argument.split("=", 1) if not takes_value else [argument]
            expanded.append("=".join([SHORT_FLAGS.get(name, name), *value]))
            takes_value = not takes_value and not value and name not in ("-h", "--help")
        else:
            positional.append(argument)
    if len(positional) > 1:
        raise ValueError(f"bpo measure takes one file of groups, not {len(positional)}: {' '.join(positional)}")
    return [*expanded, *(f"--data.groups={path}" for path in positional)]


def run_measure(
    config: Config,
    *,
    truth: ObjectTruth | None = None,
    ranks: Ranks | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Measures `data.groups` and writes GROUPS.measures.json.

    Args:
        truth: Objects in the images (`evaluation.chair_instances`), to find rejected answers that are true.

    Returns:
        The content of the file; None on ranks other than 0.

    Raises:
        ValueError: The file of groups has no pair, or no group belongs to an annotation; see also `measure_with_model`.
        Interrupted: `stop` was received; finished records of the model's measures are kept.
    """
    ranks = ranks or Ranks()
    path = Path(config.data.groups)
    found = _measure_texts(config, truth) if ranks.is_main else {}
    if ranks.is_main:
        print(printable(table(found)))
    model = _measure_with_model(config, ranks, stop) if config.model.path else None
    if not ranks.is_main:
        return None
    if model:
        print("", printable(model_table(model["types"])), sep="\n")
    warnings = [*all_warnings(found.values()), *(model or {}).get("warnings", ())]
    tree = {
        "groups": str(path),
        "annotations": config.data.annotations,
        "options": asdict(config.measure),
        "measures": measures_to_json(found),
        "model": model,
        "warnings": warnings,
    }
    write_durably(sibling_path(path, "measures.json"), json.dumps(tree, indent=1) + "\n")
    return tree


def write_balanced(config: Config) -> Iterator[str]:
    """Writes `measure.out`, balanced by `bootstrap.select`; yields a line per type on what that achieved."""
    bad = BadRecords.from_config(config.data)
    paths, options = (Path(config.data.groups), Path(config.measure.out)), config.bootstrap.select
    reports = balance_groups(*paths, options, seed=config.bootstrap.seed, measure=config.measure, bad=bad)
    for kind, report in reports.items():
        accuracy = report.get("accuracy", {})
        what = f"; accuracy of the text {accuracy['before']:.2f} -> {accuracy['after']:.2f}" if accuracy else ""
        size = f"; effective sample size {report['effective_share']:.0%}" if "effective_share" in report else ""
        yield f"{kind}: {report['pairs']} pairs by {options.balance}{what}{size}"


def _measure_texts(config: Config, truth: ObjectTruth | None) -> dict[str, TypeMeasures]:
    measures = TextMeasures(config.measure, lexicon=config.bootstrap.validate.lexicon, truth=truth)
    if config.data.annotations:
        _add_annotations(config, measures)
    num_known = num_strange = 0
    first_strange = ""
    for group in _groups(config):
        if not config.data.annotations:
            measures.add_alone(group)
            continue
        measures.add_group(group)
        has_annotation = measures.add_kept(group)
        num_known += has_annotation is True
        num_strange += has_annotation is False
        first_strange = first_strange or (group.id if has_annotation is False else "")
    if num_strange > num_known:
        raise ValueError(
            f"{config.data.annotations} lacks the ids of {num_strange} of {num_strange + num_known} groups in the "
            f"sample, such as {first_strange!r}; give the annotations from which {config.data.groups} was made, or "
            "none (--annotations=)"
        )
    found = measures.measure(read_refused_shares(Path(config.data.groups)))
    if not any(of_type.num_pairs for of_type in found.values()):
        raise ValueError(
            f"{config.data.groups}: no group has answers with different scores; there is nothing to measure"
        )
    return found


def _groups(config: Config) -> Iterator[PreferenceGroup]:
    """All groups; images embedded in the file are not extracted."""
    bad = BadRecords.from_config(config.data)
    yield from iterate_groups(Path(config.data.groups), bad, take_images=name_embedded)
    if bad.problems:
        logger.warning("%d records cannot be read and are not measured; bpo check lists them", len(bad.problems))


def _add_annotations(config: Config, measures: TextMeasures) -> None:
    annotations = iterate_annotations(Path(config.data.annotations), BadRecords.from_config(config.data), {})
    for annotation in islice(annotations, config.bootstrap.limit or None):
        measures.add_annotation(annotation.id, annotation.response)


def read_refused_shares(groups: Path) -> dict[str, float]:
    """Type -> refused share by GROUPS.summary.json; empty if there is none.

    Raises:
        ValueError: The file has an unexpected format.
    """
    path = sibling_path(groups, "summary.json")
    if not path.exists():
        return {}
    try:
        tree: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return refused_shares(tree["kept"], tree["refused"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error!r}; recreate it with bpo bootstrap, or move it away") from error


def _measure_with_model(config: Config, ranks: Ranks, stop: StopRequest | None) -> dict[str, Any] | None:
    from bpo.bootstrap.measure.blind import measure_with_model  # imports torch

    bad = BadRecords.from_config(config.data)
    groups = iterate_groups(Path(config.data.groups), bad)
    found = measure_with_model(config, groups, bad, ranks=ranks, stop=stop)
    return found.to_json() if found else None
