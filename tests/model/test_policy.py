"""Packed shared-prefix batches against separate sequences.

The truth is the plain transformers model, loaded for generation, on each [prompt | completion] alone.
Shape letters: N response tokens, T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, Encoder
from bpo.data.families import FAMILIES
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import GroupBatch
from tests.sample_groups import encode_all, encoder_of, three_groups

TOLERANCE = {"logp": 2e-5, "gradient": 1e-4}
CPU = torch.device("cpu")


# Every family by default, and some whose prefixes could be shared on separate sequences: one per way to repeat
# images (features, features of tiles, pixels, tiles of one prompt).
CASES = [(name, "auto") for name in FAMILIES]
CASES += [(name, "never") for name in ("llava", "llava_onevision", "qwen3_vl", "smolvlm")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, family_dir: Callable[[str], Path]) -> tuple[Path, str]:
    name, share_prefix = request.param
    return family_dir(name), share_prefix


@pytest.fixture(scope="module")
def directory(case: tuple[Path, str]) -> Path:
    return case[0]


@pytest.fixture(scope="module")
def encoder(case: tuple[Path, str], photo_root: Path) -> Encoder:
    directory, share_prefix = case
    return encoder_of(directory, photo_root, share_prefix=share_prefix)


@pytest.fixture(scope="module")
def encoded(encoder: Encoder) -> list[EncodedGroup]:
    return encode_all(encoder, three_groups())


@pytest.fixture(scope="module")
def make_policy(case: tuple[Path, str]) -> Callable[..., PolicyModel]:
    def make(**options: Any) -> PolicyModel:
        directory, share_prefix = case
        config = ModelConfig(path=str(directory), dtype="float32", share_prefix=share_prefix, **options)
        return PolicyModel(load_model(config, for_training=True))

    return make


def packed_logp(policy: PolicyModel, batch: GroupBatch) -> torch.Tensor:
    with packed_layout(batch.layout):
        return policy(**model_inputs(batch.to(CPU, torch.float32)))


def separate_logp(model: Any, encoder: Encoder, groups: list[EncodedGroup]) -> torch.Tensor:
    """[N] log-probs of all completions in order: one ordinary forward pass each."""
    pieces = []
    for group in groups:
        for completion in group.completion_ids:
            ids_1T = torch.tensor([*group.prompt.prefix_ids, *completion])[None]
            images = group.prompt.image_inputs
            logits_TV = model(input_ids=ids_1T, **images, **encoder.family.generation_inputs(ids_1T)).logits[0]
            logp_TV = logits_TV.float().log_softmax(-1)
            rows = slice(len(group.prompt.prefix_ids) - 1, -1)
            pieces.append(logp_TV[rows].gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(pieces)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def weight_N(encoded: list[EncodedGroup]) -> torch.Tensor:
    """Different for every token, so that rows are not interchangeable."""
    count = sum(len(ids) for group in encoded for ids in group.completion_ids)
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def truth(
    directory: Path, encoder: Encoder, encoded: list[EncodedGroup], weight_N: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = load_model(ModelConfig(path=str(directory), dtype="float32"))
    logp_N = separate_logp(model, encoder, encoded)
    (logp_N * weight_N).sum().backward()
    return logp_N.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_groups_equal_separate_sequences(
    make_policy: Callable[..., PolicyModel],
    encoder: Encoder,
    encoded: list[EncodedGroup],
    weight_N: torch.Tensor,
    truth: tuple[torch.Tensor, dict[str, torch.Tensor]],
    checkpointing: bool,
) -> None:
    policy = make_policy(gradient_checkpointing=checkpointing).train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in policy.modules()) == checkpointing
    batch = collate_groups(encoded, encoder.family)
    assert [len(spans) for spans in batch.layout.completion_spans] == [3, 2, 2]
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch.to(CPU, torch.float32)))
        (logp_N * weight_N).sum().backward()
    expected_N, expected = truth
    assert logp_N.dtype == torch.float32
    torch.testing.assert_close(logp_N.detach(), expected_N, atol=TOLERANCE["logp"], rtol=0)
    actual = gradients(policy.model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, atol=TOLERANCE["gradient"] * scale, rtol=0, msg=name)


def test_the_batch_reaches_every_part_of_the_model(
    encoder: Encoder, truth: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    """The comparison above is meaningful: log-probs and gradients of images, text and head are not all 0."""
    logp_N, gradient = truth
    family = encoder.family
    assert float(logp_N.std()) > 0.1
    parts = [family.vision_module, f"{family.language_module}.layers.0.", *family.projector_modules]
    for part in (*parts, *family.projector_parameters):
        assert any(float(value.abs().max()) > 1e-3 for name, value in gradient.items() if name.startswith(part)), part


def test_a_completion_sees_no_sibling(
    make_policy: Callable[..., PolicyModel], encoder: Encoder, encoded: list[EncodedGroup]
) -> None:
    policy = make_policy().eval()
    first = encoded[0]
    changed = tuple((t + 1) % 200 for t in first.completion_ids[1])
    other = replace(first, completion_ids=(first.completion_ids[0], changed, first.completion_ids[2]))
    batch, altered = (collate_groups([group, *encoded[1:]], encoder.family) for group in (first, other))
    with torch.no_grad():
        before_N, after_N = packed_logp(policy, batch), packed_logp(policy, altered)
    is_changed_N = batch.loss_inputs.completion_of_token_N == 1
    assert torch.equal(before_N[~is_changed_N], after_N[~is_changed_N])
    assert not torch.allclose(before_N[is_changed_N], after_N[is_changed_N])


def test_a_completion_sees_its_prefix_image_and_own_past_only(
    make_policy: Callable[..., PolicyModel], encoder: Encoder, encoded: list[EncodedGroup]
) -> None:
    policy = make_policy().eval()
    batch = collate_groups(encoded, encoder.family)
    own = [i for i, c in enumerate(batch.loss_inputs.completion_of_token_N.tolist()) if c == 0]
    with torch.no_grad():
        before_N = packed_logp(policy, batch)
        # Its penultimate token affects only the prediction of the last.
        ids_T = batch.input_ids_T.clone()
        ids_T[batch.layout.completion_spans[0][0][1] - 2] += 1
        differs_N = packed_logp(policy, replace(batch, input_ids_T=ids_T)) != before_N
        assert differs_N.nonzero().flatten().tolist() == [own[-1]]
        prompt = encoded[0].prompt
        negative = {**prompt.image_inputs, "pixel_values": -prompt.image_inputs["pixel_values"]}
        other = replace(encoded[0], prompt=replace(prompt, image_inputs=negative))
        differs_N = packed_logp(policy, collate_groups([other, *encoded[1:]], encoder.family)) != before_N
        of_group_N = batch.loss_inputs.completion_of_token_N <= 2
        assert differs_N[of_group_N].all()
        assert not differs_N[~of_group_N].any()  # the other groups have their own images


def test_packing_does_not_change_a_group(
    make_policy: Callable[..., PolicyModel], encoder: Encoder, encoded: list[EncodedGroup]
) -> None:
    policy = make_policy().eval()
    with torch.no_grad():
        together_N = packed_logp(policy, collate_groups(encoded[::-1], encoder.family))
        alone = [packed_logp(policy, collate_groups([group], encoder.family)) for group in encoded[::-1]]
    torch.testing.assert_close(together_N, torch.cat(alone), atol=TOLERANCE["logp"], rtol=0)


def test_without_a_layout_the_training_model_generates_like_the_plain_one(
    directory: Path, make_policy: Callable[..., PolicyModel], encoder: Encoder, encoded: list[EncodedGroup]
) -> None:
    prompt = encoded[1].prompt
    ids_1T = torch.tensor(prompt.prefix_ids)[None]
    inputs = {**prompt.image_inputs, **encoder.family.generation_inputs(ids_1T)}
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": encoder.pad_token_id}
    answers = [
        model.generate(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **inputs, **options)[0].tolist()
        for model in (
            load_model(ModelConfig(path=str(directory), dtype="float32")),
            make_policy().eval().model,
        )
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) > ids_1T.shape[1] + 2


def test_model_inputs_take_the_models_dtype_for_pixels_only(encoder: Encoder, encoded: list[EncodedGroup]) -> None:
    inputs = model_inputs(collate_groups(encoded, encoder.family).to(CPU, torch.bfloat16))
    assert inputs["image_inputs"]["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids_T"].dtype == torch.long
    assert all(v.dtype == torch.long for k, v in inputs["image_inputs"].items() if k != "pixel_values")
