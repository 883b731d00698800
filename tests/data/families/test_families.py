"""Model family specifics.

Compared with each family's processor and model in transformers. Processors with a video processor require torchvision;
here they are built without it, which suffices for images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import Dropped, Encoder, load_encoder
from bpo.data.families import FAMILIES, family_of
from bpo.data.lengths import encoder_fingerprint
from bpo.model.load import load_model
from tests.sample_groups import encode_all, encoder_of, group, three_groups, turn
from tests.tiny_families import TILE, tiny_gemma3

# Wide, tall, square, tiny, off by one pixel from a multiple of the tile size, and one whose canvas is downscaled.
SIZES = {
    "wide": (90, 31),
    "tall": (30, 100),
    "square": (56, 56),
    "tiny": (28, 29),
    "odd": (57, 83),
    "large": (200, 190),
}
PROCESSORS: dict[str, tuple[type, dict[str, Any]]] = {
    "gemma3": (Gemma3Processor, {"image_seq_length": 4}),
    "idefics3": (Idefics3Processor, {"image_seq_len": 4}),
    "internvl": (InternVLProcessor, {"image_seq_length": 4}),
    "llava": (LlavaProcessor, {"patch_size": 14, "num_additional_image_tokens": 1}),
    "llava_next": (LlavaNextProcessor, {"patch_size": 7, "num_additional_image_tokens": 1}),
    "llava_onevision": (LlavaOnevisionProcessor, {"num_image_tokens": 16, "vision_aspect_ratio": "anyres_max_4"}),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, {}),
    "qwen2_vl": (Qwen2VLProcessor, {}),
    "qwen3_vl": (Qwen3VLProcessor, {}),
    "qwen3_vl_moe": (Qwen3VLProcessor, {}),
    "smolvlm": (SmolVLMProcessor, {"image_seq_len": 4}),
}


@pytest.fixture(scope="module")
def sizes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sizes")
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(name: str, family_dir: Callable[[str], Path], sizes_root: Path) -> Encoder:
    return encoder_of(family_dir(name), sizes_root)


@pytest.fixture(scope="module")
def model(name: str, family_dir: Callable[[str], Path]) -> Any:
    return load_model(ModelConfig(path=str(family_dir(name)), dtype="float32"))


@pytest.fixture
def without_video(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, part: type(part))
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # used only for numbers of frames
    yield


def own_processor(name: str, encoder: Encoder) -> Any:
    kind, options = PROCESSORS[name]
    if "Llava" in kind.__name__:
        options = {**options, "vision_feature_select_strategy": encoder.family.config.vision_feature_select_strategy}
    parts = [encoder.processor.image_processor, encoder.tokenizer]
    if "video_processor" in kind.__init__.__code__.co_varnames:
        options = {**options, "video_processor": None}
    return kind(*parts, chat_template=encoder.processor.chat_template, **options)


def content(*parts: str | None) -> list[dict[str, Any]]:
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


@pytest.mark.parametrize("images", [*([size] for size in SIZES), ["wide", "tall"]], ids="+".join)
def test_ids_and_pixels_match_the_models_processor(
    name: str, encoder: Encoder, sizes_root: Path, images: list[str], without_video: None
) -> None:
    """The prompt has newlines around the image, which some tokenizers merge with those of the image's text."""
    parts = ["First\n", None, "\nand" if len(images) == 1 else "\n", *([None] if len(images) == 2 else []), "What?"]
    ours = encoder.encode_prompt("r", [f"{image}.png" for image in images], [turn(*parts)])
    processor = own_processor(name, encoder)
    messages = [{"role": "user", "content": content(*parts)}]
    text = encoder.processor.apply_chat_template(messages)
    pictures = [[Image.open(sizes_root / f"{image}.png") for image in images]]
    theirs = processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)
    assert list(ours.prefix_ids) == theirs["input_ids"][0].tolist()
    assert torch.equal(_pixels(name, ours.image_inputs), _pixels(name, theirs))


def _pixels(name: str, inputs: Any) -> torch.Tensor:
    """Returns the pixels without the tiles that LLaVA-NeXT's processor adds as padding."""
    pixels = inputs["pixel_values"]
    if name.startswith("llava_") and pixels.dim() == 5:
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    return pixels


@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_match_the_models_features(name: str, encoder: Encoder, model: Any, size: str) -> None:
    prompt = encoder.encode_prompt("r", [f"{size}.png"], [turn(None, "What?")])
    with torch.no_grad():
        features = model.model.get_image_features(**prompt.image_inputs).pooler_output
    assert prompt.prefix_ids.count(encoder.image_token_id) == sum(f.flatten(0, -2).shape[0] for f in features)


def test_the_stand_in_is_a_small_image(name: str, encoder: Encoder, model: Any) -> None:
    stand_in = encoder.stand_in()
    assert set(stand_in.prefix_ids) == {encoder.image_token_id}
    with torch.no_grad():
        features = model.model.get_image_features(**stand_in.image_inputs).pooler_output
    assert len(stand_in.prefix_ids) == sum(f.flatten(0, -2).shape[0] for f in features)
    # A single tile of 4 tokens if the family supports it; otherwise the smallest canvas.
    assert len(stand_in.prefix_ids) == (88 if name in ("llava_next", "llava_onevision") else 4)


def limited(directory: Path, image_root: Path, **data: int | str) -> Encoder:
    model, files = ModelConfig(path=str(directory)), {"image_root": str(image_root)}
    return load_encoder(Config(model=model, data=DataConfig(**files, **data)))  # type: ignore[arg-type]


def test_pixel_limits_apply_or_are_refused_by_name(
    name: str, encoder: Encoder, family_dir: Callable[[str], Path], sizes_root: Path
) -> None:
    def image_tokens(limited_encoder: Encoder, size: str) -> int:
        return limited_encoder.encode_prompt("r", [f"{size}.png"], [turn(None)]).prefix_ids.count(
            encoder.image_token_id
        )

    if not name.startswith("qwen"):
        with pytest.raises(ValueError, match=f"data.max_pixels .*`{name}` does not: remove them"):
            limited(family_dir(name), sizes_root, max_pixels=3136)
        return
    capped = limited(family_dir(name), sizes_root, max_pixels=4 * 784)
    assert (image_tokens(encoder, "large"), image_tokens(capped, "large")) == (12, 2)
    raised = limited(family_dir(name), sizes_root, min_pixels=8 * 784)
    assert image_tokens(encoder, "tiny") == 1 and image_tokens(raised, "tiny") >= 8
    prints = {encoder_fingerprint(e, 350) for e in (limited(family_dir(name), sizes_root), capped, raised)}
    assert len(prints) == 3  # cached lengths are not mixed
    with pytest.raises(ValueError, match=r"max_pixels=700 is less than .* 784 pixels of one image token"):
        limited(family_dir(name), sizes_root, max_pixels=700)


def test_only_llava_takes_padded_images(name: str, family_dir: Callable[[str], Path], sizes_root: Path) -> None:
    if name == "llava":
        assert limited(family_dir(name), sizes_root, image_aspect="pad").padding == (122, 116, 104)
        return
    with pytest.raises(ValueError, match=f"data.image_aspect: pad is for LLaVA-1.5.*`{name}`.*remove it"):
        limited(family_dir(name), sizes_root, image_aspect="pad")


def test_a_prompt_that_is_too_long_names_the_options_that_shorten_it(tiny_qwen_dir: Path, sizes_root: Path) -> None:
    encoder = limited(tiny_qwen_dir, sizes_root, max_length_tokens=20)
    dropped = encoder.encode_group(group("g", "a", "b", image="large.png"))
    assert isinstance(dropped, Dropped) and dropped.reason == "prompt-too-long"
    assert "of 20 tokens, 12 of them for images; raise data.max_length_tokens=20, or lower data.max_pixels=12544" in (
        dropped.detail
    )


def test_named_parts_exist_in_the_model(encoder: Encoder, model: Any) -> None:
    family = encoder.family
    for module in (family.vision_module, family.language_module, *family.projector_modules):
        assert list(model.get_submodule(module).parameters())
    for parameter in family.projector_parameters:
        assert model.get_parameter(parameter).requires_grad
    named = (family.vision_module, family.language_module, *family.projector_modules, *family.projector_parameters)
    left = [n for n, _ in model.named_parameters() if not n.startswith(named) and not n.startswith("lm_head")]
    assert not left  # every parameter belongs to a part that can be trained or frozen


def test_positions_match_the_model(name: str, encoder: Encoder, model: Any, photo_root: Path) -> None:
    encoder = Encoder(encoder.processor, encoder.family.config, photo_root, 4096)
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: Any, options: dict[str, Any]) -> None:
        seen["positions"] = options["position_ids"] if options.get("position_ids") is not None else args[1]

    rotary = next(m for n, m in model.get_submodule(encoder.family.language_module).named_modules() if "rotary" in n)
    handle = rotary.register_forward_pre_hook(keep, with_kwargs=True)
    for encoded in encode_all(encoder, [*three_groups(), group("d", "x", "y", prompt=turn(None, "What?"))]):
        prompt, completion_ids = encoded.prompt, encoded.completion_ids[0]
        ids_1T = torch.tensor([[*prompt.prefix_ids, *completion_ids]])
        with torch.no_grad():
            model(input_ids=ids_1T, **prompt.image_inputs, **encoder.family.generation_inputs(ids_1T))
        prefix_XT = encoder.family.prefix_positions(torch.tensor(prompt.prefix_ids), prompt.image_inputs)
        after = torch.arange(len(completion_ids)) + int(prefix_XT.max()) + 1
        ours_XT = torch.cat([prefix_XT, after.expand(len(prefix_XT), -1)], dim=1)
        theirs_XT = seen["positions"].reshape(-1, ids_1T.shape[1])[-3:]
        assert torch.equal(ours_XT, theirs_XT[: len(ours_XT)])
    handle.remove()
    assert len(ours_XT) == (3 if name.startswith("qwen") else 1)


def test_text_only_positions_advance_in_all_channels(tiny_qwen_dir: Path) -> None:
    family = family_of(AutoConfig.from_pretrained(tiny_qwen_dir))
    assert family.prefix_positions(torch.tensor([1, 2, 3]), {}).tolist() == [[0, 1, 2]] * 3


def test_noise_is_standard_normal_and_repeats_with_its_generator(name: str, encoder: Encoder) -> None:
    pixels = encoder.encode_images(["odd.png"]).inputs["pixel_values"]
    noise, again = (encoder.family.noise_like(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert noise.shape == pixels.shape and noise.dtype == torch.float32
    assert torch.equal(noise, again)
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    if name.startswith("qwen"):
        # The processor fills both frames of a still image equally; the noise must keep them equal.
        for tensor in (pixels, noise):
            frames = tensor.reshape(-1, 3, 2, 14, 14)  # (patch, channel, frame, height, width)
            assert torch.equal(frames[:, :, 0], frames[:, :, 1])
            assert not torch.equal(frames[:, 0], frames[:, 1])


def test_answers_end_with_the_chat_templates_end_token(name: str, encoder: Encoder) -> None:
    expected = {"gemma3": "<end_of_turn>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}
    end = expected.get(name, encoder.tokenizer.eos_token)
    assert encoder.encode_completion("a")[-1] == encoder.tokenizer.convert_tokens_to_ids(end)
    assert set(encoder.end_token_ids) == {encoder.eos_token_id, encoder.tokenizer.eos_token_id}
    assert not set(encoder.end_token_ids) & set(encoder.suppressed_token_ids)
    assert encoder.family.control_token_ids() <= set(encoder.suppressed_token_ids)


def test_pan_and_scan_adds_tokens_for_every_crop(tmp_path: Path, sizes_root: Path, without_video: None) -> None:
    options = {"pan_and_scan_min_crop_size": 14, "pan_and_scan_max_num_crops": 4}
    directory = tiny_gemma3(tmp_path / "gemma", do_pan_and_scan=True, pan_and_scan_min_ratio_to_activate=1.2, **options)
    encoder = encoder_of(directory, sizes_root)
    ours = encoder.encode_prompt("r", ["wide.png"], [turn("See\n", None, "What?")])
    processor = own_processor("gemma3", encoder)
    text = encoder.processor.apply_chat_template([{"role": "user", "content": content("See\n", None, "What?")}])
    images_options = {"do_pan_and_scan": True, "pan_and_scan_min_ratio_to_activate": 1.2, **options}
    picture = Image.open(sizes_root / "wide.png")
    theirs = processor(
        text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False, images_kwargs=images_options
    )
    assert list(ours.prefix_ids) == theirs["input_ids"][0].tolist()
    assert ours.image_inputs["pixel_values"].shape == (4, 3, TILE, TILE)  # the whole image and three crops
    assert ours.prefix_ids.count(encoder.image_token_id) == 16
    assert len(encoder.stand_in().prefix_ids) == 4


def test_class_tokens_count_if_the_tower_has_one(tiny_llava_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    pixels = {"pixel_values": torch.zeros(2, 3, 28, 28)}
    assert family_of(config).num_image_tokens(pixels) == [4, 4]
    config.vision_feature_select_strategy = "full"
    assert family_of(config).num_image_tokens(pixels) == [5, 5]
    config.vision_config = SiglipVisionConfig(image_size=28, patch_size=14)
    assert family_of(config).num_image_tokens(pixels) == [4, 4]


def test_unsupported_model_type_lists_supported_ones() -> None:
    with pytest.raises(ValueError, match="`llama` is not supported; supported: gemma3, .*llava_next, .*smolvlm"):
        family_of(LlamaConfig())
    with pytest.raises(ValueError, match="Pixtral tower is not supported"):
        family_of(LlavaConfig(vision_config=PixtralVisionConfig(), text_config=LlamaConfig()))
