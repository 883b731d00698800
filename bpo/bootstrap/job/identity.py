"""Everything that the outcomes of each source depend on: outcomes of different options are kept apart."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpo.bootstrap.completion_types import source_of
from bpo.bootstrap.inject import Mode, prompt_text
from bpo.bootstrap.job.outcomes import OutcomeReader
from bpo.config.bootstrap import CANDIDATE_SOURCES, SOURCES
from bpo.config.training import Config
from bpo.formats.importers.registry import open_source
from bpo.job.durable import write_durably
from bpo.job.plugins import load_plugin_file
from bpo.model.weights import weights_digest

logger = logging.getLogger(__name__)

# Options that affect speed or location, not results: they may change between starts (prompt_dir: its content counts).
_DECIDED_AT_MERGE = ("refuse_duplicates", "only_missing")
_NOT_DECIDING = ("prompt_dir", "server", "count")
# They decide which annotations are used at all.
_COMMON = ("data.annotations (content)", "data.max_completion_words")
_PLUGIN = "bootstrap.plugin (content)"
# Options outside of a source's own section that concern only some sources.
_NOISE = ("weaken", "regenerate")
_ONLY_FOR = {
    "bootstrap.weaken.noise_step": _NOISE,
    "bootstrap.weaken.noise_steps": _NOISE,
    "bootstrap.weaken.space": _NOISE,
    "bootstrap.weaken.pixel_side": _NOISE,
    "bootstrap.weaken.crop_share": ("crop",),
    "bootstrap.weaken.mask_share": ("mask",),
    "bootstrap.validate.max_changed_share": ("inject",),
    "bootstrap.sample.temperature": ("sample",),
    "bootstrap.sample.top_p": ("sample",),
    "bootstrap.limit": ("edit",),  # words and images are those of the annotations in use
    "data.part": ("edit",),
}
_OWN_SECTION = {
    "inject": ("inject",),
    "regenerate": ("regenerate",),
    "edit": ("edit",),
    "sample": CANDIDATE_SOURCES,
    "segment": ("segment",),
}
# Of all rules, those that candidates of a judge must keep.
_RULES_OF_CANDIDATES = ("max_repeats", "min_distinct_share")
# Values with which outcomes are as in versions that did not have the option: stored as None.
_WITHOUT = {
    "data.min_pixels": 0,
    "data.max_pixels": 0,
    "data.image_aspect": "processor",
    "data.system_prompt": "",
    "data.part": "",
    "bootstrap.validate.same_form": False,
}


def source_options(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Those of the `job_options` that affect the outcomes of a source."""
    left_out = (*_COMMON, "bootstrap.sources")  # the latter in files of earlier versions
    names = (name for name, value in options.items() if value is not None and name not in left_out)
    own_llm = not (options.get("bootstrap.inject.llm") or options.get("bootstrap.inject.server.model"))
    return {name: options[name] for name in names if _concerns(name, source, own_llm)}


def _concerns(name: str, source: str, own_llm: bool) -> bool:
    if name in _ONLY_FOR:
        return source in _ONLY_FOR[name]
    section, _, option = name.removeprefix("bootstrap.").partition(".")
    if section in _OWN_SECTION:
        return source in _OWN_SECTION[section]
    if name == _PLUGIN:
        return source not in SOURCES
    if section == "weaken" and source in (*CANDIDATE_SOURCES, "segment"):
        return False
    if section == "validate" and source in CANDIDATE_SOURCES:
        return option in _RULES_OF_CANDIDATES
    if source == "inject" and section not in ("seed", "validate"):
        # The multimodal model and its prompts, if it rewrites the annotations too; no images.
        return own_llm and section != "weaken" and option not in ("min_pixels", "max_pixels", "image_aspect")
    if source == "edit":
        return section not in ("weaken", "vision", "validate") or option.startswith("lexicon")
    return True


def job_options(config: Config) -> dict[str, Any]:
    """Dotted option -> value for everything that affects an outcome; batch size, limits and ranks do not."""
    options = config.bootstrap
    identity: dict[str, Any] = {
        "data.annotations (content)": _content_digest(Path(config.data.annotations)),
        "data.max_completion_words": config.data.max_completion_words,
        "data.max_length_tokens": config.data.max_length_tokens,
        "data.min_pixels": config.data.min_pixels,
        "data.max_pixels": config.data.max_pixels,
        "data.image_aspect": config.data.image_aspect,
        "data.system_prompt": config.data.system_prompt,
        "model.path": config.model.path,
        "model.path (weights)": weights_digest(config.model.path),
        "model.dtype": config.model.dtype,
        "bootstrap.seed": options.seed,
    }
    validate = {name: value for name, value in asdict(options.validate).items() if name not in _DECIDED_AT_MERGE}
    identity |= {f"bootstrap.validate.{name}": value for name, value in validate.items()}
    lexicon = options.validate.lexicon
    identity["bootstrap.validate.lexicon (content)"] = _digest(Path(lexicon).read_bytes()) if lexicon else None
    if set(options.generated_sources) - {"inject"}:
        identity |= {f"bootstrap.weaken.{name}": value for name, value in asdict(options.weaken).items()}
        identity["bootstrap.vision.engine"] = options.vision.engine
        identity["bootstrap.vision.server.model"] = options.vision.server.model
    if "regenerate" in options.sources:
        identity |= {f"bootstrap.regenerate.{name}": value for name, value in asdict(options.regenerate).items()}
    if set(CANDIDATE_SOURCES) & set(options.sources):
        sample = {name: value for name, value in asdict(options.sample).items() if name not in _NOT_DECIDING}
        identity |= {f"bootstrap.sample.{name}": value for name, value in sample.items()}
    if "segment" in options.sources:
        identity |= {f"bootstrap.segment.{name}": value for name, value in asdict(options.segment).items()}
    if set(options.sources) - set(SOURCES):
        identity[_PLUGIN] = load_plugin_file(options.plugin, "bootstrap.plugin")
    if "inject" in options.sources:
        inject = {name: value for name, value in asdict(options.inject).items() if name not in _NOT_DECIDING}
        identity |= {f"bootstrap.inject.{name}": value for name, value in inject.items()}
        identity["bootstrap.inject.server.model"] = options.inject.server.model if options.inject.server.url else ""
        identity["bootstrap.inject.llm (weights)"] = weights_digest(options.inject.llm)
        identity["bootstrap.inject.prompt_dir (content)"] = _prompts_digest(
            options.inject.mode, options.inject.prompt_dir
        )
    if "edit" in options.queued_sources:
        edit = {name: value for name, value in asdict(options.edit).items() if name not in _DECIDED_AT_MERGE}
        identity |= {f"bootstrap.edit.{name}": value for name, value in edit.items()}
        identity |= {"bootstrap.limit": options.limit, "data.part": config.data.part}
    return {name: None if value == _WITHOUT.get(name) else value for name, value in identity.items()}


@dataclass(frozen=True)
class SourceIdentities:
    """Which outcomes in a folder were generated with the options of this job.

    Attributes:
        current: Source -> digest of its options, with which its outcomes are marked.
        unmarked: Source -> digest of the options of its outcomes without a mark, which earlier versions wrote.
    """

    current: dict[str, str]
    unmarked: dict[str, str] = field(default_factory=dict)

    def mark(self, key: str) -> str:
        """The mark of new outcomes of a source or candidate."""
        return self.current[source_of(key)]

    def accepts(self, key: str, mark: str) -> bool:
        """Whether outcomes of a source or candidate with this mark are used."""
        source = source_of(key)
        return source in self.current and (mark or self.unmarked.get(source)) == self.current[source]


def check_identity(config: Config, folder: Path, *, reads_only: bool = False) -> SourceIdentities:
    """Compares the options with those in `folder/job.json`, which lists all with which a source has been started.

    A source that was started with these options before goes on from those outcomes. A new source is added.

    Args:
        reads_only: Leave the file as it is.

    Raises:
        ValueError: The annotations differ, or the options of a source do and `bootstrap.accept_changes` does not name
            it; lists each option with its old and new value.
    """
    options = json.loads(json.dumps(job_options(config)))
    common = {name: options[name] for name in _COMMON}
    path = folder / "job.json"
    stored = _read(path) if path.exists() else {"common": common, "sources": {}, "unmarked": {}}
    if changes := _differences(stored["common"], common):
        raise ValueError(
            f"{folder} contains the results of a job with other options: {_listed(changes)}. "
            f"Restore them, set data.groups to another file, or remove {folder} to start over"
        )
    known: dict[str, dict[str, dict[str, Any]]] = stored["sources"]
    current: dict[str, str] = {}
    changed: dict[str, list[tuple[str, Any, Any]]] = {}
    for source in config.bootstrap.queued_sources:
        own = source_options(options, source)
        current[source] = _options_digest(own)
        if known.get(source) and current[source] not in known[source]:
            changed[source] = min((_differences(earlier, own) for earlier in known[source].values()), key=len)
        elif known and source not in known:
            logger.info("%s: source `%s` is added; the outcomes of the others are kept", folder, source)
        known.setdefault(source, {})[current[source]] = own
    for dropped in known.keys() - current.keys():
        logger.info("%s: the outcomes of `%s`, which is not in bootstrap.sources, are kept, not used", folder, dropped)
    _check_accepted(changed, config.bootstrap.accept_changes, folder)
    content = json.dumps(stored, indent=2) + "\n"
    if not reads_only and not (path.exists() and path.read_text(encoding="utf-8") == content):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)  # racing ranks write the same bytes
    return SourceIdentities(current, stored["unmarked"])


def _check_accepted(changed: Mapping[str, list[tuple[str, Any, Any]]], accepted: Sequence[str], folder: Path) -> None:
    for source in changed.keys() & set(accepted):
        logger.warning("%s: source `%s` is generated again: %s (accepted)", folder, source, _listed(changed[source]))
    refused = [source for source in changed if source not in accepted]
    if not refused:
        return
    reader = OutcomeReader(folder, lambda key, mark: source_of(key) in refused)
    reader.poll()
    by_change: dict[str, list[str]] = {}
    for source in refused:
        for change in changed[source]:
            by_change.setdefault(_listed([change]), []).append(source)
    changes = "; ".join(f"{change} ({', '.join(sources)})" for change, sources in by_change.items())
    flag = json.dumps([*accepted, *refused])
    raise ValueError(
        f"{folder} contains {len(reader)} outcomes with other options: {changes}. Restore the options, or accept that "
        f"these sources are generated again: --bootstrap.accept_changes '{flag}' (the finished outcomes are kept, and "
        "used again when the options are restored), or set data.groups to another file"
    )


def _read(path: Path) -> dict[str, Any]:
    """The content of `job.json`; in that of earlier versions, all sources have one identity."""
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
        if "bootstrap.sources" not in stored:
            return {name: dict(stored[name]) for name in ("common", "sources", "unmarked")}
        sources = {source: source_options(stored, source) for source in stored["bootstrap.sources"]}
        return {
            "common": {name: stored[name] for name in _COMMON},
            "sources": {source: {_options_digest(own): own} for source, own in sources.items()},
            "unmarked": {source: _options_digest(own) for source, own in sources.items()},
        }
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), so nothing tells whether its results are of these options; restore it, or "
            f"remove {path.parent} to start over"
        ) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def _listed(changes: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in changes)


def _options_digest(options: Mapping[str, Any]) -> str:
    return _digest(json.dumps(options, sort_keys=True).encode("utf-8"))[:12]


def _prompts_digest(configured: Literal["description", "qa", "auto"], prompt_dir: str) -> str:
    modes: tuple[Mode, ...] = ("description", "qa") if configured == "auto" else (configured,)
    return _digest("".join(prompt_text(mode, prompt_dir) for mode in modes).encode("utf-8"))


def _content_digest(annotations: Path) -> str:
    """SHA-256 of the bytes of all annotation files, such as a folder of shards, in order.

    For a dataset on the hub, of its name.
    """
    digest = hashlib.sha256()
    for part in open_source(annotations).container.paths:
        files = [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file())
        if not files:
            digest.update(str(part).encode("utf-8"))
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
