"""Micro-batches without an image, and a frozen vision tower."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, Encoder
from bpo.data.families import FAMILIES
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import Completion, GroupBatch, PreferenceGroup
from tests.sample_groups import encode_all, encoder_of, three_groups, turn

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> Path:
    return family_dir(request.param)


@pytest.fixture(scope="module")
def encoder(directory: Path, photo_root: Path) -> Encoder:
    return encoder_of(directory, photo_root)


@pytest.fixture(scope="module")
def text_only(encoder: Encoder) -> list[EncodedGroup]:
    answers = (Completion("a cat", 1.0, "gt"), Completion("two dogs", 0.0, "llm-hal"), Completion("no", 0.0, "llm-hal"))
    groups = [PreferenceGroup(name, (), (turn(f"What is {name}?"),), answers) for name in ("this", "that one")]
    return encode_all(encoder, groups)


def policy_of(directory: Path, trainable: TrainableConfig, checkpointing: Any = False) -> PolicyModel:
    options = ModelConfig(path=str(directory), dtype="float32", gradient_checkpointing=checkpointing)
    config = Config(model=options, trainable=trainable, lora=LoraConfig(r=2, alpha=4, dropout=0.0))
    model = load_model(options, for_training=True)
    prepare_trainable(model, encoder_of(directory, directory).family, config)
    return PolicyModel(model).train()


def trained(policy: PolicyModel, batch: GroupBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Log-probs [N], and the gradients of a sum in which every token has another weight."""
    policy.zero_grad()
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
        (logp_N * torch.arange(1, len(logp_N) + 1)).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    return logp_N.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_stand_in_image_runs_the_tower_and_changes_nothing(directory, encoder, text_only, checkpointing) -> None:
    """Every parameter of tower and projector gets a gradient, as ZeRO expects of all ranks, and it is exactly 0."""
    policy = policy_of(directory, TrainableConfig(language="full", vision="full"), checkpointing)
    bare = collate_groups(text_only, encoder.family)
    carrying = collate_groups(text_only, encoder.family, stand_in=encoder.stand_in())
    assert not bare.image_inputs and carrying.image_inputs
    bare_logp_N, bare_gradients = trained(policy, bare)
    logp_N, gradients = trained(policy, carrying)
    torch.testing.assert_close(logp_N, bare_logp_N, atol=1e-6, rtol=0)
    seen = [name for name, gradient in bare_gradients.items() if gradient is None]
    family = encoder.family
    for part in (family.vision_module, *family.projector_modules, *family.projector_parameters):
        assert any(name.startswith(part) for name in seen), part
    for name, gradient in gradients.items():
        expected = bare_gradients[name]
        if expected is not None:
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5, msg=name)
        elif gradient is not None:
            assert not gradient.any(), name
    # A stand-in reaches the same parameters as an image.
    _, with_images = trained(policy, collate_groups(encode_all(encoder, three_groups()), encoder.family))
    assert {n for n, g in with_images.items() if g is None} == {n for n, g in gradients.items() if g is None}


# Every combination for two families, one for the others.
FROZEN = [(name, "full", "lora") for name in FAMILIES]
FROZEN += itertools.product(["llava", "qwen2_5_vl"], ["none", "selective"], ["lora", "full"])
FROZEN += [(name, "full", "full") for name in ("llava", "qwen2_5_vl")]


@pytest.mark.parametrize(("directory", "checkpointing", "language"), FROZEN, indirect=["directory"])
def test_a_frozen_tower_builds_no_graph_and_keeps_nothing(directory, encoder, checkpointing: str, language) -> None:
    """Otherwise every activation of the tower would be saved for a backward pass that trains nothing.

    transformers' own switch for checkpointing asks the patch embedding for gradients, and would bring it about.
    """
    trainable = TrainableConfig(language=language, projector="full", vision="frozen")
    policy = policy_of(directory, trainable, checkpointing)
    tower = policy.model.get_submodule(encoder.family.vision_module)
    parts = [policy.model.get_submodule(name) for name in encoder.family.projector_modules]
    projectors = [module for part in parts for module in (part if isinstance(part, torch.nn.ModuleList) else [part])]
    learning = {module for part in parts for module in part.modules()}
    frozen = [m for m in tower.modules() if m not in learning and not any(p.requires_grad for p in m.parameters())]
    outputs: list[torch.Tensor] = []
    saved_before_projector: list[tuple[int, ...]] = []
    projected: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
        values = output if isinstance(output, tuple) else [output]
        outputs.extend(value for value in values if isinstance(value, torch.Tensor))

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if outputs and not projected:
            saved_before_projector.append(tuple(tensor.shape))
        return tensor

    handles = [module.register_forward_hook(keep) for module in frozen]
    started: list[int] = []
    for projector in projectors:
        handles.append(projector.register_forward_pre_hook(lambda *_: started.append(len(saved_before_projector))))
        handles.append(projector.register_forward_hook(lambda module, inputs, output: projected.append(output)))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        _, gradients = trained(policy, collate_groups(encode_all(encoder, three_groups()), encoder.family))
    for handle in handles:
        handle.remove()
    assert len(outputs) > 10
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
    assert started[0] == 0
    assert len(projected) == len(projectors) and all(output.requires_grad for output in projected)
    learnt = [gradient for name, gradient in gradients.items() if name.startswith(encoder.family.projector_modules)]
    assert learnt and all(gradient is not None and gradient.any() for gradient in learnt)


def test_the_tower_runs_once_a_micro_batch_and_sees_each_image_of_a_group_once(directory, encoder) -> None:
    """A group's images are encoded once for any number of completions; recomputation does not rerun the tower."""
    policy = policy_of(directory, TrainableConfig(language="lora", projector="full", vision="frozen"), "full")
    tower = policy.model.get_submodule(encoder.family.vision_module)
    seen: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        seen.append(len(inputs[0] if inputs else kwargs["pixel_values"]))

    handle = tower.register_forward_hook(count, with_kwargs=True)
    groups = encode_all(encoder, three_groups())
    trained(policy, collate_groups(groups, encoder.family))
    handle.remove()
    alone = [encoder.family.batch_image_inputs([group.prompt.image_inputs])["pixel_values"] for group in groups]
    # Entries of the tower's batch: patches for Qwen, otherwise tiles (in Idefics3 with a prompt dimension).
    entries = [pixels.flatten(0, 1) if pixels.dim() == 5 else pixels for pixels in alone]
    assert seen == [sum(map(len, entries))]
