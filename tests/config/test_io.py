"""Configuration options, files and flags."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import bpo.config
from bpo.config.foreign import FOREIGN
from bpo.config.io import all_keys, load_config, to_tree
from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.options import Section
from bpo.config.rounds import RoundConfig
from bpo.config.selection import MixtureConfig
from bpo.config.training import Config, DataConfig, LoraConfig, TrainConfig
from bpo.job.run_record import save_config


def sections(node: type = Config) -> Iterator[type]:
    yield node
    for entry in fields(node):
        if callable(entry.default_factory) and is_dataclass(entry.default_factory):
            yield from sections(entry.default_factory)  # type: ignore[arg-type]


# Items of lists and of loss.views.
ITEMS = (TermConfig, ViewConfig, MixtureConfig, RoundConfig)


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_value_may_end_like_the_name_of_a_section() -> None:
    """`rslora` without its first two letters is the section `lora`."""
    assert load_config(["--lora.variant", "rslora"], "test", "").lora.variant == "rslora"


@pytest.mark.parametrize(
    "section", [*sections(), TermConfig, ViewConfig, MixtureConfig, RoundConfig], ids=lambda section: section.__name__
)
def test_every_option_is_documented(section: type) -> None:
    attributes = inspect.getdoc(section).split("Attributes:\n")[1]  # type: ignore[union-attr]
    documented = re.findall(r"^    (\w+): \S.*", attributes, flags=re.MULTILINE)
    assert documented == [entry.name for entry in fields(section)]


def test_every_section_of_the_module_is_in_the_tree() -> None:
    modules = [import_module(f"bpo.config.{module.name}") for module in pkgutil.iter_modules(bpo.config.__path__)]
    classes = [c for m in modules for c in vars(m).values() if is_dataclass(c) and c.__module__ == m.__name__]
    assert {c for c in classes if issubclass(c, Section | Config) and c is not Section} == set(sections()) | set(ITEMS)


def test_no_arguments_give_the_defaults() -> None:
    assert load_config([]) == Config()


def test_flags_override_files_and_later_files_override_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path / "1.yaml", {"train": {"lr": 1e-3, "seed": 5, "epochs": 7}, "loss": {"beta": 0.2}})
    second = write(tmp_path / "2.yaml", {"train": {"seed": 6, "epochs": 8}})
    config = load_config(["--config", first, f"--config={second}", "--train.epochs", "9", "--data.groups=g.jsonl"])
    assert (config.loss.beta, config.train.lr, config.train.seed, config.train.epochs) == (0.2, 1e-3, 6, 9)
    assert config.data.groups == "g.jsonl"
    assert config.train.groups_per_step == TrainConfig().groups_per_step


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train:\n  lr: 1e-5\n  adam_eps: 1e-7\n")
    config = load_config(["--config", str(tmp_path / "c.yaml"), "--loss.beta", "5e-1"])
    assert (config.train.lr, config.train.adam_eps, config.loss.beta) == (1e-5, 1e-7, 0.5)


@pytest.mark.parametrize(
    ("tree", "key", "nearest"),
    [
        ({"train": {"learning_rate": 1}}, "train.learning_rate", None),
        ({"train": {"epoch": 1}}, "train.epoch", "train.epochs"),
        ({"trian": {"lr": 1}}, "trian", "train"),
        ({"lr": 1}, "lr", "train.lr"),
        ({"bootstrap": {"weaken": {"noise_stp": 3}}}, "bootstrap.weaken.noise_stp", "bootstrap.weaken.noise_step"),
        ({"train": {"beta": 0.1}}, "train.beta", "loss.beta"),
    ],
)
def test_unknown_key_in_a_file_names_the_nearest(
    tmp_path: Path, tree: dict[str, Any], key: str, nearest: str | None
) -> None:
    path = write(tmp_path / "c.yaml", tree)
    with pytest.raises(ValueError, match=rf"c\.yaml: unknown key `{re.escape(key)}`") as error:
        load_config(["--config", path])
    if nearest:
        assert f"did you mean `{nearest}`?" in str(error.value)


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown flag `--train.lrr`; did you mean `train.lr`"):
        load_config(["--train.lrr", "1"])
    with pytest.raises(ValueError, match="unknown flag `--zzz`; `--help` lists every key"):
        load_config(["--zzz=1"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train.lr", "0"),
        ("train.epochs", "0"),
        ("train.warmup_ratio", "1"),
        ("train.max_grad_norm", "-1"),
        ("data.max_length_tokens", "0"),
        ("bootstrap.weaken.noise_step", "1000"),
        ("bootstrap.weaken.top_p", "0"),
        ("lora.r", "0"),
        ("lora.dropout", "1"),
        ("loss.beta", "0"),
        ("loss.label_smoothing", "0.5"),
        ("evaluation.batch_size", "0"),
        ("evaluation.shard_index", "1"),
    ],
)
def test_value_out_of_range_names_option_and_value(flag: str, value: str, tmp_path: Path) -> None:
    *path, leaf = flag.split(".")
    tree: dict[str, Any] = {leaf: float(value) if "." in value else int(value)}
    for name in reversed(path):
        tree = {name: tree}
    for argv in ([f"--{flag}", value], ["--config", write(tmp_path / "c.yaml", tree)]):
        with pytest.raises(ValueError, match=rf"{leaf}( is -?{value}|.* must)"):
            load_config(argv)


def test_value_of_the_wrong_type_names_the_option() -> None:
    for argv in (["--train.epochs", "many"], ["--train.lr_schedule", "square"], ["--trainable.vision", "half"]):
        with pytest.raises(ValueError, match=f"^[^\n]*{argv[0][2:]}[^\n]*$"):
            load_config(argv)


NUMBERS = [
    (f"{section.where}.{entry.name}", section, entry)
    for section in sections()
    if section is not Config
    for entry in fields(section)
    if entry.type in ("int", "float", "int | None", "list[int]", "dict[str, float]")
]


@pytest.mark.parametrize(("name", "section", "entry"), NUMBERS, ids=[name for name, *_ in NUMBERS])
def test_every_number_has_limits_and_is_finite(name: str, section: type, entry: Field[Any]) -> None:
    """A new option without declared limits fails here."""
    limits = entry.metadata["range"]
    outside = (
        [-2, float("nan"), float("inf"), 2**70] if "int" in str(entry.type) else [-2.0, float("nan"), float("inf")]
    )
    for value in outside:
        assert value not in limits or value == float("inf") or value == 2**70
        wrap = {"list[int]": [value], "dict[str, float]": {"inject": value}}.get(str(entry.type), value)
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}\S* is {value}; it must be [^\n]+$"):
            section(**{entry.name: wrap})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--train.lr=.inf", "train.lr is inf; it must be a finite number"),
        ("--loss.beta=.nan", "loss.beta is nan; it must be a finite number"),
        ("--lora.alpha=0", "lora.alpha is 0.0; it must be positive"),
        ("--train.output_dir= ", "train.output_dir is ' '; it must not be empty"),
        ("--lora.target=['']", r"lora.target\[0\] is ''; it must not be empty"),
        ("--train.hang_timeout_seconds=0.001", r"is 0.001; it must be 0 \(off\) or at least 5"),
        ("--train.max_steps=-1", r"is -1; it must be 0 \(all epochs\) or more"),
        ("--data.max_bad_share=2", r"is 2.0; it must be in \[0, 1\]"),
    ],
)
def test_value_that_no_run_can_use_is_refused_by_name(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([flag])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train:\n\tlr: 1\n", "c.yaml: line 2: a tab; indent with spaces"),
        (b"train:\n  lr: 1\n  epochs: 3\n  lr: 2\n", "c.yaml: line 4: `lr` occurs twice"),
        (b"train: {lr: 1}\ntrain: {lr: 2}\n", "c.yaml: line 2: `train` occurs twice"),
        (b"train: [1\n", "c.yaml: line 2: expected ',' or ']'"),
        (b"train:\n  lr:\n", "train.lr is None; give it a value, or remove the line"),
        (b"train:\n  output_dir: ~\n", "train.output_dir is None; give it a value"),
        (b"train: {lr: \xff}\n", "c.yaml: not readable as YAML: 'utf-8' codec"),
        (b"train: !!python/object:os.system {}\n", "c.yaml: line 1: could not determine a constructor"),
    ],
)
def test_file_with_a_mistake_names_line_or_option(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_config(["--config", str(tmp_path / "c.yaml")])


def test_all_options_of_another_trainer_are_translated_at_once(tmp_path: Path) -> None:
    known = {"learning_rate": 1e-6, "per_device_train_batch_size": 2, "freeze_vit": True, "train": {"pref-beta": 0.1}}
    with pytest.raises(ValueError) as error:
        load_config(["--config", write(tmp_path / "c.yaml", known)])
    for name, meaning in (
        ("learning_rate", "`train.lr`"),
        ("per_device_train_batch_size", "`train.max_micro_batch_tokens`"),
        ("freeze_vit", "`trainable.vision`: frozen or full"),
        ("train.pref-beta", "`loss.beta`"),
    ):
        assert f"unknown key `{name}`; here it is {meaning}" in str(error.value)
    with pytest.raises(ValueError, match="unknown flag `--model_name_or_path`; here it is `model.path`"):
        load_config(["--model_name_or_path", "llava"])
    with pytest.raises(ValueError, match="`--model` is a section of options such as `model.path`"):
        load_config(["--model", "llava"])


def test_foreign_names_lead_to_options_and_are_not_ours() -> None:
    ours = {key.rsplit(".", 1)[-1] for key in all_keys()}
    assert ours & FOREIGN.keys() == set()
    named = {key for m in FOREIGN.values() for key in (re.findall(r"`([^`]+)`", m) if " " in m else [m])}
    assert named <= set(all_keys())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "model.path and data.groups must be set, .*--model.path PATH --data.groups PATH"),
        (["--model.path=/no/where", "--data.groups=g"], "model.path is '/no/where': no such directory"),
        (["--model.path=.", "--data.groups=g"], "model.path is '.': the directory has no config.json"),
        (["--model.path=a/b", "--data.groups=/no/where"], "data.groups is '/no/where': no such file"),
    ],
)
def test_inputs_of_a_command_exist(argv: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_config(argv, reads=("model.path", "data.groups"))


def test_missing_file_and_file_that_is_not_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping of sections, found list"):
        load_config(["--config", str(tmp_path / "list.yaml")])
    (tmp_path / "empty_section.yaml").write_text("train:\n# lr: 1e-5\n")
    with pytest.raises(
        ValueError,
        match=r"section\.yaml: section `train` is None, .* such as `train.output_dir`",
    ):
        load_config(["--config", str(tmp_path / "empty_section.yaml")])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match="expected a mapping of sections, found NoneType"):
        load_config(["--config", str(tmp_path / "empty.yaml")])


def test_save_and_load_give_the_same_configuration(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(groups="a b.jsonl", num_workers=0),
        lora=LoraConfig(target=["q_proj", "v_proj"], alpha=1e-3),
        loss=LossConfig(type="ipo", label_smoothing=0.0),
        train=TrainConfig(lr=2e-6, completion_types=["llm-hal"], adam_eps=1e-12),
    )
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(["--config", str(tmp_path / "new" / "config.yaml")]) == config
    assert to_tree(config)["lora"]["target"] == ["q_proj", "v_proj"]


def test_bad_record_options_have_short_names() -> None:
    data = load_config(["--on-bad", "error", "--max-bad-share=0.25"]).data
    assert (data.on_bad, data.max_bad_share) == ("error", 0.25)
    with pytest.raises(ValueError, match="data.max_bad_share is 2"):
        load_config(["--max-bad-share", "2"])


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        load_config(["--help"], prog="bpo train")
    assert error.value.code == 0
    text = capsys.readouterr().out
    leaves = [key for key in all_keys() if not any(other.startswith(f"{key}.") for other in all_keys())]
    assert len(leaves) > 70
    assert [key for key in leaves if f"--{key} " not in text] == []
    assert "Peak learning rate of the projector" in text
