"""README.md of an export: where the model comes from, how it was trained, and what was measured.

Absolute paths are reduced to names, since the card is made to be published.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bpo.config.adapter import split_adapter
from bpo.config.io import flat_tree, to_tree
from bpo.config.training import Config

CARD = "README.md"
# Sections of the configuration on which a training depends.
_OF_TRAINING = ("model", "data", "lora", "trainable", "loss", "train", "online")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def read_metrics(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(benchmark, its metrics by name) from the results of `bpo evaluate`; empty if `path` is.

    Raises:
        ValueError: the file cannot be read, or contains no benchmark with metrics.
    """
    if not path:
        return []
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"export.metrics {path}: {error}; give the JSON file that `bpo evaluate` wrote") from error
    found = tree.get("benchmarks") if isinstance(tree, dict) else None
    results = [{"name": name, **entry} for name, entry in found.items()] if isinstance(found, dict) else found
    try:
        metrics = [(str(entry["name"]), dict(entry["metrics"])) for entry in results or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"export.metrics {path}: field `benchmarks` is not as `bpo evaluate` writes it: {error!r}"
        ) from error
    if not metrics:
        raise ValueError(
            f"export.metrics {path}: field `benchmarks` is missing or empty; give the JSON file of results"
        )
    return metrics


def hub_id(path: str) -> str:
    """The Hub id of a base model: of an id, or of a folder in the Hub's cache; empty for any other folder."""
    if cached := _HUB_CACHE.search(path):
        return "/".join(cached.groups())
    return path if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not Path(path).exists() else ""


def model_card(
    title: str,
    config: Config,
    manifest: Mapping[str, Any],
    record: Mapping[str, Any],
    fidelity: list[str],
    metrics: list[tuple[str, dict[str, Any]]],
    commit: str,
) -> str:
    """The text of the card.

    Args:
        config: The caller's: the base model and the options of the export.
        manifest: Of the checkpoint: options, versions and data of the training.
        record: Of the export.
        fidelity: Lines of the table of `fidelity.table`, or one line that says why there is none.
        metrics: See `read_metrics`.
        commit: Of the sources that trained; empty if unknown.
    """
    trained = manifest["config"]
    is_online = bool(trained.get("online", {}).get("source"))
    options, adapter = split_adapter(config.model)
    base = hub_id(options.path) or Path(options.path).name
    front = {
        **({"base_model": hub_id(options.path)} if hub_id(options.path) else {}),
        "library_name": "peft" if record["form"] == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bpo", "preference-optimization", *_losses(trained["loss"])],
    }
    sections = [
        f"---\n{_yaml(front)}---\n",
        f"# {title}\n",
        f"{'LoRA adapter for' if record['form'] == 'adapter' else 'Model trained from'} `{base}` by preference "
        f"optimization with [bpo](https://arxiv.org/abs/2403.08730), written by `bpo export`.\n",
        "## Training\n",
        "\n".join(_facts(manifest, base, commit, Path(adapter).name)) + "\n",
        "Options that differ from the defaults:\n",
        "```bash\n" + _command("train", trained, (*_OF_TRAINING, *["bootstrap"] * is_online)) + "\n```\n",
        "## Export\n",
        "```bash\n" + _command("export", to_tree(config), ("model", "export")) + "\n```\n",
        "\n".join(fidelity) + "\n",
    ]
    if metrics:
        sections += ["## Evaluation\n", "\n".join(_metric_rows(metrics)) + "\n"]
    return "\n".join(sections)


def _losses(loss: Mapping[str, Any]) -> list[str]:
    terms = [str(term.get("type", "")) for term in loss.get("terms") or () if isinstance(term, Mapping)]
    return sorted({name for name in (terms or [str(loss.get("type", ""))]) if name})


def _facts(manifest: Mapping[str, Any], base: str, commit: str, adapter: str) -> Iterator[str]:
    trained, cursor = manifest["config"], manifest.get("cursor", {})
    data = trained["data"].get("groups") or trained["data"].get("annotations", "")
    rows = {
        "base model": f"`{base}`",
        "adapter that training continued": f"`{adapter}`" if adapter else "",
        "loss": ", ".join(f"`{name}`" for name in _losses(trained["loss"])),
        "optimizer steps": f"{manifest['step']:,} of {cursor.get('steps_planned', manifest['step']):,}",
        "groups seen, with repetitions": f"{cursor['groups_done']:,}" if "groups_done" in cursor else "",
        "data": f"`{Path(data).name}`" if data else "",
        "SHA-256 of the data": manifest.get("fingerprints", {}).get("data", ""),
        "SHA-256 of the base model's files": manifest.get("fingerprints", {}).get("weights", ""),
        "ranks": str(manifest.get("world_size", "")),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items()),
        "commit of bpo": commit,
    }
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in rows.items() if value)


def _command(name: str, tree: Mapping[str, Any], sections: tuple[str, ...]) -> str:
    """`bpo NAME` with the options that differ from their defaults."""
    defaults = flat_tree(to_tree(Config()))
    options = flat_tree({section: tree[section] for section in sections if section in tree})
    changed = {key: value for key, value in options.items() if value != defaults.get(key)}
    return shlex.join(["bpo", name, *(f"--{key}={_without_folder(value)}" for key, value in changed.items())])


def _without_folder(value: Any) -> str:
    if not isinstance(value, str):
        return re.sub(r'"[/~][^"]*/', '"', json.dumps(value))
    return hub_id(value) or (Path(value).name if value.startswith(("/", "~", "..")) else value)


def _metric_rows(metrics: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Values as `bpo evaluate` wrote them; in brackets the interval, where there is one."""
    yield from ("| benchmark | metric | value | interval |", "|---|---|---|---|")
    for benchmark, values in metrics:
        for name, entry in values.items():
            numbers = entry if isinstance(entry, Mapping) else {"value": entry}
            has_interval = isinstance(numbers.get("low"), int | float) and isinstance(numbers.get("high"), int | float)
            interval = f"[{numbers['low']:.4g}, {numbers['high']:.4g}]" if has_interval else ""
            value = numbers.get("value")
            yield f"| {benchmark} | {name} | {f'{value:.4g}' if isinstance(value, int | float) else ''} | {interval} |"


def _yaml(tree: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(tree), sort_keys=False)
