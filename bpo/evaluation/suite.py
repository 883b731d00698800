"""A suite: the benchmarks of one evaluation, read from a YAML file or from flags, and the images they ask about."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bpo.config.entry import nearest, read_entry
from bpo.config.evaluation import EvaluationConfig
from bpo.config.io import read_yaml
from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions
from bpo.evaluation.benchmarks.registry import BENCHMARKS
from bpo.evaluation.image_sets import listed_images, sampled_images
from bpo.formats.bad_records import BadRecords
from bpo.formats.images import ImageError, load_image
from bpo.formats.problems import Problem

logger = logging.getLogger(__name__)

_COMMON = tuple(option.name for option in fields(BenchmarkOptions))
# Texts that never name a file.
_NOT_PATHS = {"type", "name", "prompt", "suffix"}


@dataclass(frozen=True, slots=True)
class Suite:
    """Benchmarks that are answered together; their names are unique."""

    name: str
    benchmarks: tuple[Benchmark, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Every image once, in the order of the questions."""
        return tuple(dict.fromkeys(image for benchmark in self.benchmarks for image in benchmark.images))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A benchmark as written.

    Attributes:
        tree: Its options.
        where: Where it is written, for messages.
        folder: Folder of relative paths that the current directory lacks.
        lines: Where each option is written, for messages.
    """

    tree: Mapping[str, Any]
    where: str
    folder: Path | None = None
    lines: Mapping[str, str] = field(default_factory=dict)


def read_suite(options: EvaluationConfig) -> Suite:
    """Reads the benchmarks of `evaluation.suite`, or of the options that name files of single benchmarks.

    `evaluation.images`, or else `evaluation.sample`, applies to benchmarks that have neither of their own.

    Raises:
        ValueError: Nothing is configured, an option is unknown or has the wrong type, two benchmarks have the same
            name, or a file has the wrong format.
    """
    name = "evaluation"
    if options.suite:
        name, entries = _read_file(Path(options.suite))
    else:
        entries = _from_flags(options)
    benchmarks = [_restricted(_build(entry), options) for entry in entries]
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := [entry for n, entry in enumerate(entries) if names[n] in names[:n]]:
        raise ValueError(f"{repeated[0].where}: another benchmark has the same name; give one a different `name`")
    return Suite(name, tuple(benchmarks))


def make_benchmark(tree: Mapping[str, Any], where: str = "suite") -> Benchmark:
    """Reads a benchmark from its `type` and options, as written in a suite; raises as `read_suite` does."""
    return _build(_Entry(tree, where))


def _from_flags(options: EvaluationConfig) -> list[_Entry]:
    if bool(options.questions) != bool(options.format):
        raise ValueError("evaluation.questions and evaluation.format belong together; set both, or use a suite")
    of_coco = {"instances": options.chair_instances, "captions": options.chair_captions, "synonyms": options.synonyms}
    if options.questions:
        return [_Entry(_of_questions(options, of_coco), "evaluation.format")]
    common = {"max_new_tokens": options.max_new_tokens}
    entries = []
    if options.chair_instances:
        chair = {"type": "chair", **of_coco, "prompt": options.chair_prompt, **common}
        entries.append(_Entry(chair, "evaluation.chair_instances"))
    elif options.chair_captions:
        raise ValueError("evaluation.chair_captions is set without chair_instances; CHAIR needs instances")
    if options.pope_questions:
        entries.append(
            _Entry({"type": "pope", "questions": options.pope_questions, **common}, "evaluation.pope_questions")
        )
    if not entries:
        raise ValueError(
            "nothing to measure: set evaluation.suite, evaluation.chair_instances or evaluation.pope_questions"
        )
    return entries


def _of_questions(options: EvaluationConfig, of_coco: Mapping[str, str]) -> dict[str, Any]:
    """`evaluation.questions` as the option `questions` of its format, or else its first; with the files about COCO."""
    tree: dict[str, Any] = {"type": options.format}
    if options.format in BENCHMARKS:
        own = {option.name: option for option in fields(BENCHMARKS[options.format].Options)}
        own = {name: option for name, option in own.items() if name not in _COMMON}
        tree |= {name: path for name, path in of_coco.items() if path and name in own}
        name = "questions" if "questions" in own else next(iter(own))
        is_list = own[name].default_factory is list
        tree[name] = [options.questions] if is_list else options.questions
    return tree


def _read_file(path: Path) -> tuple[str, list[_Entry]]:
    tree = read_yaml(path, "evaluation.suite")
    lines = _lines(path)
    for key in tree:
        if key not in ("name", "defaults", "benchmarks"):
            raise ValueError(f"{path}: unknown key `{key}`{nearest(key, ('name', 'defaults', 'benchmarks'))}")
    defaults, listed, name = tree.get("defaults", {}), tree.get("benchmarks"), tree.get("name", path.stem)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: `name` is {name!r}; it must be text")
    if not isinstance(defaults, dict) or not set(defaults) <= {*_COMMON} - {"type", "name"}:
        allowed = ", ".join(option for option in _COMMON if option not in ("type", "name"))
        raise ValueError(f"{path}: `defaults` is {defaults!r}; it may set {allowed}")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: `benchmarks` is {listed!r}; it must be a list such as `- type: pope`")
    entries = []
    for number, entry in enumerate(listed):
        where = f"{path}, line {lines[number]['']}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: a benchmark is {entry!r}; write a mapping with `type` and its options")
        of_options = {key: f"{path}, line {line}" for key, line in lines[number].items()}
        entries.append(_Entry({**defaults, **entry}, where, path.parent, of_options))
    return name, entries


def _lines(path: Path) -> list[dict[str, int]]:
    """For each entry of `benchmarks`, the line of each of its options, and under "" its own."""
    import yaml

    root = yaml.compose(path.read_text(encoding="utf-8"))
    assert isinstance(root, yaml.MappingNode), "read_yaml gave a mapping"
    found = [node for key, node in root.value if key.value == "benchmarks" and isinstance(node, yaml.SequenceNode)]
    lines = []
    for entry in found[0].value if found else ():
        options = entry.value if isinstance(entry, yaml.MappingNode) else ()
        by_option = {str(key.value): key.start_mark.line + 1 for key, _ in options}
        lines.append({"": entry.start_mark.line + 1, **by_option})
    return lines


def _build(entry: _Entry) -> Benchmark:
    name = entry.tree.get("type")
    if not isinstance(name, str) or name not in BENCHMARKS:
        raise ValueError(f"{entry.where}: unknown type {name!r}{nearest(str(name), tuple(BENCHMARKS))}")
    kind = BENCHMARKS[name]
    tree = {key: _resolved(key, value, entry.folder) for key, value in entry.tree.items()}
    options = read_entry(kind.Options, tree, name, lambda key: entry.lines.get(key, entry.where))
    try:
        benchmark = kind.read(options)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from error
    if not benchmark.questions:
        raise ValueError(f"{entry.where}: {benchmark.name} has no questions; check its files")
    return benchmark


def _resolved(key: str, value: Any, folder: Path | None) -> Any:
    """Files that are not in the current directory but beside the suite are named by their path there."""
    if isinstance(value, list):
        return [_resolved(key, item, folder) for item in value]
    if folder is None or key in _NOT_PATHS or not isinstance(value, str) or not value or Path(value).exists():
        return value
    return str(folder / value) if (folder / value).exists() else value


def _restricted(benchmark: Benchmark, options: EvaluationConfig) -> Benchmark:
    """The benchmark with the images of its list or sample, or of the evaluation's."""
    own = benchmark.options
    is_own = bool(own.images or own.sample)
    file, size, seed = own.images, own.sample, own.seed
    if not is_own:
        file, size, seed = options.images, options.sample, options.sample_seed
    images = benchmark.images
    if file:
        images = listed_images(Path(file), images, benchmark.name, complete=is_own)
    if size:
        images = sampled_images(images, size, seed)
    return benchmark if images == benchmark.images else benchmark.restricted(images)


def with_usable_images(suite: Suite, image_root: Path, bad: BadRecords) -> Suite:
    """The suite without unusable images; decodes every image before anything is generated.

    Scores over fewer images are not comparable: unusable ones are logged and listed in the results.

    Raises:
        RecordError: `bad.on_bad` is error, and an image is unusable.
        ValueError: No image of a benchmark is usable.
        TooManyBadRecords: More images are unusable than `bad.max_bad_share` allows.
    """
    images, unusable = suite.images, set()
    for image in images:
        try:
            load_image(image_root, image)
        except ImageError as error:
            bad.report(Problem(error.code, str(image_root), image, str(error)))
            unusable.add(image)
    bad.check_share(len(images), "the benchmarks' images")
    if not unusable:
        return suite
    logger.warning("%d of %d images are unusable: scores cover the other images only", len(unusable), len(images))
    kept = [image for image in images if image not in unusable]
    benchmarks = tuple(benchmark.restricted(kept) for benchmark in suite.benchmarks)
    if empty := [benchmark.name for benchmark in benchmarks if not benchmark.questions]:
        raise ValueError(f"{image_root}: no image of {empty[0]} is usable; check data.image_root")
    return replace(suite, benchmarks=benchmarks)
