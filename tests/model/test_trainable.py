"""Trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.families import FAMILIES, Family, family_of
from bpo.model.head import install_logprob_head
from bpo.model.load import load_model
from bpo.model.trainable import parameter_groups, prepare_trainable
from tests.tiny import tiny_llava


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> Path:
    return family_dir(request.param)


def config_of(directory: Path, *, dtype: Any = "float32", **sections: Any) -> Config:
    return Config(model=ModelConfig(path=str(directory), dtype=dtype), **sections)


def prepared(config: Config) -> Any:
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, family_of(model.config), config)
    return model


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def in_module(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def in_projector(name: str, family: Family) -> bool:
    return in_module(name, family.projector_modules) or name in family.projector_parameters


def test_the_papers_recipe_is_the_default() -> None:
    config = Config()
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.target) == (32, 256.0, 0.05, [])
    assert (config.trainable.language, config.trainable.projector, config.trainable.vision) == (
        "lora",
        "full",
        "frozen",
    )
    assert (config.loss.type, config.loss.beta, config.train.lr, config.train.epochs) == ("sigmoid", 0.1, 2e-6, 2)
    assert (config.train.lr_schedule, config.train.warmup_ratio, config.model.dtype) == ("cosine", 0.03, "bfloat16")


def test_adapters_on_every_linear_of_the_language_model_and_nowhere_else(directory: Path) -> None:
    plain = load_model(ModelConfig(path=str(directory), dtype="float32"))
    language = family_of(plain.config).language_module
    expected = {n for n, m in plain.named_modules() if type(m) is torch.nn.Linear and n.startswith(f"{language}.")}
    # Experts are single tensors, not linear layers: only the attention gets adapters.
    num_layers, num_linears = (
        (3 if directory.name.startswith(("gemma3", "qwen3")) else 2),
        (4 if "moe" in directory.name else 7),
    )
    assert len(expected) == num_layers * num_linears
    model = prepared(config_of(directory))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == expected
    layer = model.get_submodule(f"{language}.layers.0.self_attn.q_proj")
    assert layer.lora_A["default"].weight.shape[0] == 32
    assert layer.scaling["default"] == 256 / 32
    assert layer.lora_dropout["default"].p == 0.05
    assert type(model.lm_head) is torch.nn.Linear


def test_default_trains_adapters_and_the_whole_projector(directory: Path) -> None:
    model = prepared(config_of(directory))
    family = family_of(model.config)
    names = {name for name, _ in model.named_parameters()}
    assert trainable(model) == {n for n in names if "lora_" in n or in_projector(n, family)}
    assert any(in_projector(n, family) for n in trainable(model))


def test_the_untrained_adapter_changes_nothing_and_is_the_same_everywhere(directory: Path) -> None:
    models = [prepared(config_of(directory)) for _ in range(2)]
    for (name, one), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(one, other), name
    assert all(float(p.detach().abs().max()) == 0 for n, p in models[0].named_parameters() if "lora_B" in n)
    assert all(float(p.detach().abs().max()) > 0 for n, p in models[0].named_parameters() if "lora_A" in n)
    other_seed = prepared(config_of(directory, train=TrainConfig(seed=1)))
    first = next(n for n in trainable(other_seed) if "lora_A" in n)
    assert not torch.equal(other_seed.get_parameter(first), models[0].get_parameter(first))


def test_one_dtype_throughout(directory: Path) -> None:
    assert {p.dtype for p in prepared(config_of(directory, dtype="bfloat16")).parameters()} == {torch.bfloat16}


CHOICES: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"projector": "frozen"}, {"lora"}, {"projector", "vision", "head", "embedding", "language"}),
    ({"vision": "full"}, {"lora", "projector", "vision"}, {"head", "embedding", "language"}),
    (
        {"vision": "full", "projector": "frozen"},
        {"lora", "vision"},
        {"projector", "head", "embedding", "language"},
    ),
    ({"language": "full"}, {"language", "projector", "head", "embedding"}, {"vision"}),
    ({"language": "full", "lm_head": "frozen"}, {"language", "projector"}, {"vision", "head", "embedding"}),
    ({"language": "frozen"}, {"projector"}, {"vision", "language", "head", "embedding"}),
]


@pytest.mark.parametrize(
    ("directory", "choice", "learns", "stays"),
    [
        (family, *choice)
        for family_number, family in enumerate(FAMILIES)
        for number, choice in enumerate(CHOICES)
        # All of a model with a head of its own and of one with a tied head; a third for every other family.
        if family in ("llava", "gemma3") or number % 3 == family_number % 3
    ],
    indirect=["directory"],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_choosing_what_learns(directory: Path, choice: dict[str, Any], learns: set[str], stays: set[str]) -> None:
    model = prepared(config_of(directory, trainable=TrainableConfig(**choice)))
    family = family_of(model.config)

    def part_of(name: str) -> str:
        if "lora_" in name:
            return "lora"
        if in_projector(name, family):
            return "projector"
        if in_module(name, (family.vision_module,)):
            return "vision"
        return "head" if "lm_head" in name else "embedding" if "embed_tokens" in name else "language"

    if model.config.tie_word_embeddings:  # Gemma's head is its embedding
        learns, stays = learns - {"head"}, stays - {"head"}
    parts = {part: set() for part in learns | stays}
    for name, parameter in model.named_parameters():
        parts[part_of(name)].add(parameter.requires_grad)
    assert parts == {**{part: {True} for part in learns}, **{part: {False} for part in stays}}


def test_nothing_to_learn_is_refused_by_the_configuration() -> None:
    with pytest.raises(ValueError, match="language, projector and vision are all frozen"):
        TrainableConfig(language="frozen", projector="frozen")


def test_adapters_only_where_asked(directory: Path) -> None:
    model = prepared(config_of(directory, lora=LoraConfig(r=2, alpha=4, target=["q_proj", "o_proj"])))
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "o_proj"}


@pytest.mark.parametrize("directory", ["llava", "qwen3_vl", "idefics3"], indirect=True)
@pytest.mark.parametrize("target", ["lm_head", "q_projection", "linear_1"])
def test_wrong_target_lists_the_right_ones(directory: Path, target: str) -> None:
    with pytest.raises(ValueError, match=rf"lora.target names {target}; .*k_proj, .*q_proj"):
        prepared(config_of(directory, lora=LoraConfig(target=["q_proj", target])))


def test_projector_has_its_own_learning_rate_and_only_matrices_decay(directory: Path) -> None:
    config = config_of(directory, train=TrainConfig(lr=1e-4, projector_lr=3e-5, weight_decay=0.1))
    model = prepared(config)
    family = family_of(model.config)
    groups = parameter_groups(model, family, config)
    setting = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = 3e-5 if in_projector(name, family) else 1e-4
            assert setting.pop(id(parameter)) == (lr, 0.1 if parameter.dim() > 1 else 0.0), name
    assert not setting  # nothing frozen, no duplicates
    same_lr = parameter_groups(model, family, config_of(directory, train=TrainConfig(lr=1e-4)))
    assert {g["lr"] for g in same_lr} == {1e-4}


def test_tied_embeddings_learn_as_one_parameter(tmp_path: Path) -> None:
    config = config_of(
        tiny_llava(tmp_path / "tied", tie_word_embeddings=True), trainable=TrainableConfig(language="full")
    )
    model = prepared(config)
    install_logprob_head(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    parameters = [p for g in parameter_groups(model, family_of(model.config), config) for p in g["params"]]
    assert sum(p is model.lm_head.weight for p in parameters) == 1
    frozen = prepared(config_of(Path(config.model.path), trainable=TrainableConfig(language="full", lm_head="frozen")))
    assert not frozen.lm_head.weight.requires_grad and not frozen.get_input_embeddings().weight.requires_grad
