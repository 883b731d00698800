"""What differs between model families. Run: python -m pytest tests/data/test_families.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from bpo.config import ModelConfig
from bpo.data.families import FAMILIES, family_of
from bpo.model.load import load_model
from tests.sample_groups import encode_all, encoder_of, group, three_groups, turn


def test_unsupported_model_type_lists_those_supported() -> None:
    with pytest.raises(ValueError, match="`llama` is not supported; supported: gemma3, .*, smolvlm"):
        family_of(LlamaConfig())


@pytest.mark.parametrize("name", FAMILIES)
def test_named_modules_exist_in_the_model(name: str, tiny_llava_dir: Path, tiny_qwen_dir: Path) -> None:
    model = load_model(ModelConfig(path=str(tiny_llava_dir if name == "llava" else tiny_qwen_dir), dtype="float32"))
    family = family_of(model.config)
    for module in (family.vision_module, family.language_module, *family.projector_modules):
        assert list(model.get_submodule(module).parameters())


def test_qwen_positions_equal_get_rope_index(tiny_qwen_dir: Path, photo_root: Path) -> None:
    encoder = encoder_of(tiny_qwen_dir, photo_root)
    model = load_model(ModelConfig(path=str(tiny_qwen_dir), dtype="float32"))
    adjacent = group("d", "x", "y", prompt=turn(None, "What?"))
    for one in encode_all(encoder, [*three_groups(), adjacent]):
        ids_1T = torch.tensor(one.prompt.prefix_ids)[None]
        grid = one.prompt.image_inputs["image_grid_thw"]
        theirs, _ = model.model.get_rope_index(
            ids_1T, mm_token_type_ids=(ids_1T == encoder.image_token_id).int(), image_grid_thw=grid
        )
        ours = encoder.family.prefix_positions(ids_1T[0], one.prompt.image_inputs)
        assert torch.equal(ours, theirs[:, 0])
    assert len({tuple(g) for g in grid.tolist()}) == 1 and grid[0, 1] != grid[0, 2]  # the last is not square


def test_text_only_positions_count_on_in_all_channels(tiny_qwen_dir: Path) -> None:
    family = family_of(AutoConfig.from_pretrained(tiny_qwen_dir))
    assert family.prefix_positions(torch.tensor([1, 2, 3]), {}).tolist() == [[0, 1, 2]] * 3


def test_llava_with_its_class_token_takes_one_more(tiny_llava_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    pixels = {"pixel_values": torch.zeros(2, 3, 28, 28)}
    assert family_of(config).num_image_tokens(pixels) == [4, 4]
    config.vision_feature_select_strategy = "full"
    assert family_of(config).num_image_tokens(pixels) == [5, 5]


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_is_standard_normal_and_repeats_with_its_generator(
    name: str, tiny_llava_dir: Path, tiny_qwen_dir: Path, photo_root: Path
) -> None:
    encoder = encoder_of(tiny_llava_dir if name == "llava" else tiny_qwen_dir, photo_root)
    pixels = encoder.image_inputs(["tall.png"])["pixel_values"]
    noise, again = (encoder.family.noise_like(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert noise.shape == pixels.shape and noise.dtype == torch.float32
    assert torch.equal(noise, again)
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


def test_qwen_gives_the_copies_of_a_patch_in_time_the_same_noise(tiny_qwen_dir: Path, photo_root: Path) -> None:
    """The real processor fills both frames of a still image alike; the noise must keep them alike."""
    encoder = encoder_of(tiny_qwen_dir, photo_root)
    pixels = encoder.image_inputs(["tall.png"])["pixel_values"]
    noise = encoder.family.noise_like(pixels, torch.Generator().manual_seed(3))
    for tensor in (pixels, noise):
        frames = tensor.reshape(-1, 3, 2, 14, 14)  # (patch, channel, frame, height, width)
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])
        assert not torch.equal(frames[:, 0], frames[:, 1])
