"""Plans all stages of all rounds, with the configuration of each: paths are known before anything has run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bpo.config.entry import read_entry
from bpo.config.io import check_keys, flat_tree, read_yaml, to_tree
from bpo.config.options import NUM_SEEDS, check
from bpo.config.rounds import RoundConfig
from bpo.config.training import Config
from bpo.rounds.stages import Stage

# Set for each stage; a value of a round would be overwritten.
_OWNED = frozenset(
    "model.path data.groups data.part rank.candidates rank.output select.candidates select.judgements select.policy "
    "train.output_dir train.reference_dir train.reference_model train.reference_only train.resume export.checkpoint "
    "export.output export.form evaluation.output".split()
)
# They affect speed, logging or recovery, and may differ from those of a finished stage.
_NOT_DECIDING = (
    "data.num_workers", "data.prefetch_factor", "data.keep_lengths", "bootstrap.batch_size", "bootstrap.num_workers",
    "bootstrap.cache", "bootstrap.num_shards", "bootstrap.shard_index", "bootstrap.accept_changes",
    "bootstrap.max_idle_restarts", "bootstrap.stall_timeout_s", "bootstrap.claim_timeout_s", "rank.batch_size",
    "rank.num_shards", "rank.shard_index", "rank.claim_timeout_s", "rank.stall_timeout_s", "train.log_every_steps",
    "train.tensorboard", "train.hang_timeout_seconds", "train.max_idle_restarts", "train.save_every_steps",
    "train.save_in_background", "train.keep_last", "train.keep_every", "train.accept_changes", "train.peak_tflops",
    "train.rehash_weights", "evaluation.batch_size", "evaluation.num_shards", "evaluation.shard_index",
)  # fmt: skip


def plan_rounds(config: Config) -> list[Stage]:
    """Every stage of every round, in the order in which they run.

    Raises:
        ValueError: A round's options are unknown or set by the rounds themselves, or a combination cannot work.
    """
    rounds = config.rounds
    check(bool(rounds.each), "rounds.each is empty; list at least one round, such as `rounds: {each: [{}, {}]}`")
    check(bool(config.model.path), "model.path is empty; name the model of the first round")
    listed = [_read_round(tree, number) for number, tree in enumerate(rounds.each, 1)]
    check(not listed[0].replay, f"rounds.each[0].replay is {listed[0].replay:g}, but there is no earlier round")
    stages = []
    annotations = config.data.annotations
    if rounds.image_command:
        images = _images_stage(config)
        annotations = str(images.result)
        stages.append(images)
    for number in range(1, len(listed) + 1):
        stages += _Round(config, number, listed, annotations).stages()
    return stages


def _read_round(tree: Mapping[str, Any], number: int) -> RoundConfig:
    place = f"rounds.each[{number - 1}]"
    return read_entry(RoundConfig, tree, "a round", lambda key: f"{place}.{key}" if key else place)


def _images_stage(config: Config) -> Stage:
    root = Path(config.rounds.output_dir)
    tree = _base_tree(config)
    tree["rank"] |= {
        "judge": "command",
        "options": {"command": config.rounds.image_command},
        "output": str(root / "annotations.jsonl"),
    }
    return Stage(0, "images", root, tree)


def _base_tree(config: Config) -> dict[str, Any]:
    tree = copy.deepcopy(to_tree(config))
    del tree["rounds"]
    return tree


class _Round:
    """Makes the stages of one round."""

    def __init__(self, config: Config, number: int, listed: Sequence[RoundConfig], annotations: str):
        self.config, self.number, self.own, self.earlier = config, number, listed[number - 1], listed[: number - 1]
        self.where = f"rounds.each[{number - 1}]"
        self.folder = round_folder(config, number)
        self.policy = config.model.path if number == 1 else str(round_folder(config, number - 1) / "policy")
        self.tree = _base_tree(config)
        for section in ("bootstrap", "train", "select"):  # each round draws again
            self.tree[section]["seed"] = (self.tree[section]["seed"] + number - 1) % NUM_SEEDS
        self._take_options()
        self.tree["model"]["path"] = self.policy
        self.tree["data"] |= {"annotations": annotations, "part": self.own.part or config.data.part}
        self.tree["data"]["groups"] = self.own.groups or str(self.folder / "groups.jsonl")

    def _take_options(self) -> None:
        where = f"{self.where}.options"
        check_keys(self.own.options, where)
        owned = sorted(flat_tree(self.own.options).keys() & _OWNED)
        check(not owned, f"{where}: {', '.join(owned)} is set by the rounds; remove it")
        _merge(self.tree, self.own.options)

    def stages(self) -> list[Stage]:
        online = bool(self.tree["online"]["source"])
        given = bool(self.own.groups)
        check(not (online and given), f"{self.where}.groups: online.source makes its own groups; remove one of the two")
        check(
            not (self.own.replay and (online or given)),
            f"{self.where}.replay: the round selects no groups of its own; remove it",
        )
        stages = [] if online or given else self._data()
        if self.config.rounds.reference == "first" and self.number > 1:
            stages.append(self._reference())
        stages += [self._train(), self._export()]
        if self.config.rounds.evaluate:
            stages.append(self._evaluate())
        return stages

    def _data(self) -> list[Stage]:
        self._check_server()
        candidates = str(self.folder / "candidates.jsonl")
        stages = [self._stage("generate", data={"groups": candidates})]
        judgements = ""
        if self.tree["rank"]["judge"]:
            judgements = str(self.folder / "judgements")
            options = dict(self.tree["rank"]["options"])
            if self.tree["rank"]["judge"] == "implicit":
                options.setdefault("reference", self.config.model.path)
            rank = {"candidates": candidates, "output": judgements, "options": options}
            stages.append(self._stage("judge", rank=rank))
        mixture = [*self.tree["select"]["mixture"], *self._replayed()]
        select = {"candidates": candidates, "judgements": judgements, "policy": self.policy, "mixture": mixture}
        stages.append(self._stage("select", select=select))
        return stages

    def _replayed(self) -> list[dict[str, Any]]:
        """Earlier rounds' groups, an equal share of each."""
        if not self.own.replay:
            return []
        own = (str(round_folder(self.config, number) / "groups.jsonl") for number in range(1, self.number))
        files = [one.groups or path for one, path in zip(self.earlier, own, strict=True)]
        return [{"groups": file, "share": self.own.replay / len(files)} for file in files]

    def _check_server(self) -> None:
        """Refuses a server that would go on answering with the first round's policy."""
        if self.number == 1 or self.tree["bootstrap"]["vision"]["engine"] != "server" or self.hands_adapter(1):
            return
        model = flat_tree(self.own.options).get("bootstrap.vision.server.model")
        check(
            bool(model),
            f"{self.where}: the server must answer with the policy of round {self.number - 1}; serve {self.policy} "
            "under a name of its own and write it into the round's options as bootstrap.vision.server.model, or let "
            "the server load an adapter (rounds.handover)",
        )

    def _reference(self) -> Stage:
        first = self.config.model.path
        train = {"output_dir": str(self.folder / "reference"), "reference_only": True, **self._reference_dir()}
        return self._stage("reference", model={"path": first}, train=train)

    def _reference_dir(self) -> dict[str, Any]:
        return {"reference_dir": str(self.folder / "reference" / "store")}

    def _train(self) -> Stage:
        train: dict[str, Any] = {"output_dir": str(self.folder / "run"), "resume": True}
        if self.config.rounds.reference == "first" and self.number > 1:
            train |= {"reference_model": self.config.model.path, **self._reference_dir()}
        return self._stage("train", train=train)

    def hands_adapter(self, number: int) -> bool:
        """Whether a round hands its policy over as an adapter."""
        handover, trainable = self.config.rounds.handover, self.tree["trainable"]
        fits = trainable["language"] == "lora" and trainable["vision"] == "frozen"
        check(
            handover != "adapter" or fits,
            "rounds.handover is adapter, but more than LoRA and projector is trained; set trainable.language to lora "
            "and trainable.vision to frozen, or hand over merged weights",
        )
        takes = self.tree["bootstrap"]["vision"]["engine"] == "transformers" or trainable["projector"] == "frozen"
        check(
            handover != "adapter" or takes,
            "rounds.handover is adapter, but vLLM loads no adapter with a trained projector; set trainable.projector "
            "to frozen, or hand over merged weights",
        )
        return handover == "adapter" or (handover == "auto" and fits and takes)

    def _export(self) -> Stage:
        export = {"checkpoint": str(self.folder / "run"), "output": str(self.folder / "policy")}
        form = "adapter" if self.hands_adapter(self.number) else "merged"
        adapter = {"dtype": "", "rounding": "nearest"} if form == "adapter" else {}
        # Online training has no groups file; the export is then compared on the last groups that it drew.
        groups = {"groups": ""} if self.tree["online"]["source"] else {}
        return self._stage("export", export={**export, "form": form, **adapter}, data=groups)

    def _evaluate(self) -> Stage:
        output = str(self.folder / "results.json")
        model = {"path": str(self.folder / "policy")}
        return self._stage("evaluate", model=model, evaluation={"output": output})

    def _stage(self, name: str, **sections: Mapping[str, Any]) -> Stage:
        tree = copy.deepcopy(self.tree)
        for section, options in sections.items():
            tree[section] |= options
        return Stage(self.number, name, self.folder, tree)


def round_folder(config: Config, number: int) -> Path:
    return Path(config.rounds.output_dir) / f"round-{number}"


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replaces values of nested sections. Mappings that are values, such as loss.options, are replaced as a whole."""
    sections = to_tree(Config())
    _merge_sections(tree, changes, sections)


def _merge_sections(tree: dict[str, Any], changes: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and known.get(key) and isinstance(known[key], Mapping):
            _merge_sections(tree[key], value, known[key])
        else:
            tree[key] = value


def check_unchanged(stage: Stage) -> None:
    """Refuses options with which a finished stage would have had another result.

    Raises:
        ValueError: Lists them with both values.
    """
    if not stage.config_file.exists():
        return
    before, now = (
        {
            name: value
            for section in stage.kind.decided_by
            for name, value in flat_tree({section: tree.get(section, {})}).items()
            if name not in _NOT_DECIDING
        }
        for tree in (read_yaml(stage.config_file), stage.options)
    )
    changed = [
        f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if changed:
        raise ValueError(
            f"{stage.label} is finished, with other options: {'; '.join(changed)}. Restore them, give another "
            f"rounds.output_dir, or remove {stage.config_file} to keep the result"
        )
