"""Features taken out of the vision tower and put back in front of the projector, in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import Encoder
from bpo.data.families import FAMILIES
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import GroupBatch
from tests.sample_groups import encode_all, encoder_of, three_groups

# Of fp32, relative to the largest entry: another number of images in a matrix product may round differently.
TOLERANCE = 1e-5
CASES = [(name, "auto") for name in FAMILIES] + [(name, "never") for name in ("llava_onevision", "qwen3_vl")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> tuple[Path, str]:
    name, share_prefix = request.param
    return family_dir(name), share_prefix


@pytest.fixture(scope="module")
def encoder(case: tuple[Path, str], photo_root: Path) -> Encoder:
    return encoder_of(case[0], photo_root, share_prefix=case[1])


@pytest.fixture(scope="module")
def batch(encoder: Encoder) -> GroupBatch:
    made = collate_groups(encode_all(encoder, three_groups()), encoder.family)
    return replace(made, image_keys=encoder.family.entry_keys(made.image_inputs))


@pytest.fixture(scope="module")
def policy(case: tuple[Path, str], encoder: Encoder) -> PolicyModel:
    config = ModelConfig(path=str(case[0]), dtype="float32", share_prefix=case[1])
    made = PolicyModel(load_model(config, for_training=True)).train()
    made.model.get_submodule(encoder.family.vision_module).requires_grad_(False)
    for module in encoder.family.projector_modules:
        made.model.get_submodule(module).requires_grad_(True)
    return made


def results(policy: PolicyModel, batch: GroupBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradients of their weighted sum."""
    policy.zero_grad()
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch))
        weight_N = torch.linspace(-1, 1, len(logp_N))
        (logp_N * weight_N).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return logp_N.detach(), grads


def test_the_same_log_probs_and_gradients(encoder: Encoder, batch: GroupBatch, policy: PolicyModel) -> None:
    """Each image or tile encoded once and alone, in the opposite order; then all in one call."""
    names = list(policy.state_dict())
    expected_N, expected = results(policy, batch)
    entries = dict(zip(batch.image_keys, encoder.family.entries(batch.image_inputs), strict=True))
    alone = {key: policy.tower.encode([entry])[0] for key, entry in reversed(entries.items())}
    together = dict(zip(entries, policy.tower.encode(list(entries.values())), strict=True))
    for features in (alone, together):
        given = replace(batch, features=tuple(features[key] for key in batch.image_keys))
        actual_N, actual = results(policy, given)
        torch.testing.assert_close(actual_N, expected_N, atol=TOLERANCE, rtol=TOLERANCE)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            bound = TOLERANCE * float(gradient.abs().max())
            torch.testing.assert_close(actual[name], gradient, atol=bound, rtol=0, msg=name)
    assert any(name.startswith(encoder.family.projector_modules[0]) for name in expected)
    assert list(policy.state_dict()) == names


def test_the_tower_does_not_run_where_features_are_given(
    encoder: Encoder, batch: GroupBatch, policy: PolicyModel
) -> None:
    features = tuple(policy.tower.encode(encoder.family.entries(batch.image_inputs)))
    blank = {
        key: torch.full_like(value, 0.5) if key == "pixel_values" else value
        for key, value in batch.image_inputs.items()
    }
    calls: list[str] = []
    for name in encoder.family.tower_modules:
        module = policy.model.get_submodule(name)
        module = module[0] if isinstance(module, torch.nn.ModuleList) else module
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected_N, _ = results(policy, replace(batch, features=features))
    actual_N, _ = results(policy, replace(batch, features=features, image_inputs=blank))
    torch.testing.assert_close(actual_N, expected_N, atol=0, rtol=0)
    assert calls == []
    other_N, _ = results(policy, replace(batch, image_inputs=blank))
    assert set(calls) == set(encoder.family.tower_modules)
    assert (other_N - expected_N).abs().max() > 1e-3  # the model is itself again, and sees these pixels


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_needs_no_tower(family_dir: Callable[[str], Path], photo_root: Path, mode: Any) -> None:
    """The backward pass computes layers again after the tower is back in its place."""
    encoder = encoder_of(family_dir("qwen3_vl"), photo_root)
    batch = collate_groups(encode_all(encoder, three_groups()), encoder.family)
    found = []
    for checkpointing in ("none", mode):
        config = ModelConfig(path=str(family_dir("qwen3_vl")), dtype="float32", gradient_checkpointing=checkpointing)
        policy = PolicyModel(load_model(config, for_training=True)).train()
        policy.model.get_submodule("model.visual").requires_grad_(False)
        policy.model.get_submodule("model.visual.merger").requires_grad_(True)
        features = tuple(policy.tower.encode(encoder.family.entries(batch.image_inputs)))
        found.append(results(policy, replace(batch, features=features)))
    (expected_N, expected), (actual_N, actual) = found
    torch.testing.assert_close(actual_N, expected_N, atol=TOLERANCE, rtol=TOLERANCE)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = TOLERANCE * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, atol=bound, rtol=0, msg=name)
