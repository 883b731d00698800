"""Configuration options, files and flags."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpo.config import bootstrap as config_bootstrap_module
from bpo.config import training as config_module
from bpo.config.io import all_keys, load_config, to_tree
from bpo.config.training import Config, DataConfig, LoraConfig, LossConfig, TrainConfig
from bpo.job.run_record import save_config


def sections(node: type = Config) -> Iterator[type]:
    yield node
    for entry in fields(node):
        if callable(entry.default_factory) and is_dataclass(entry.default_factory):
            yield from sections(entry.default_factory)  # type: ignore[arg-type]


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_option_is_documented(section: type) -> None:
    attributes = inspect.getdoc(section).split("Attributes:\n")[1]  # type: ignore[union-attr]
    documented = re.findall(r"^    (\w+): \S.*", attributes, flags=re.MULTILINE)
    assert documented == [entry.name for entry in fields(section)]


def test_every_section_of_the_module_is_in_the_tree() -> None:
    modules = (config_module, config_bootstrap_module)
    defined = {c for m in modules for c in vars(m).values() if is_dataclass(c) and c.__module__ == m.__name__}
    assert defined == set(sections())


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


def test_value_of_the_wrong_type_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--train.epochs", "many"], ["--train.lr_schedule", "square"], ["--trainable.vision", "half"]):
        with pytest.raises(SystemExit) as error:
            load_config(argv)
        assert error.value.code == 2
        assert argv[0][2:] in capsys.readouterr().err


def test_missing_file_and_file_that_is_not_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping of sections, found list"):
        load_config(["--config", str(tmp_path / "list.yaml")])
    (tmp_path / "empty_section.yaml").write_text("train:\n# lr: 1e-5\n")
    with pytest.raises(ValueError, match=r"section\.yaml: section `train` is None, not a mapping of keys"):
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
