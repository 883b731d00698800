"""Answers to weakened images."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.bootstrap.engines.vision import ChatVisionGenerator, TransformersVisionGenerator, VisionRequest
from bpo.bootstrap.sources import ImageAnswers
from bpo.bootstrap.weaken import PictureWeakener, Weakening, choose_weakening, weaken_images
from bpo.config.bootstrap import BootstrapConfig, WeakenConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.data.noise import diffuse
from bpo.data.pictures import MASK_CELLS
from bpo.formats.files import read_annotations
from bpo.model.load import load_model
from bpo.records import ContentPart, Turn
from tests.bootstrap.replies import replies_of

OPTIONS = WeakenConfig(temperature=0.5, max_new_tokens=10)


@pytest.fixture(params=["tiny_llava_dir", "tiny_qwen_dir"])
def setting(request: pytest.FixtureRequest, photos: Path):
    """(model as a vision generator, three annotations, their encoded images)"""
    path = str(request.getfixturevalue(request.param))
    config = Config(
        model=ModelConfig(path=path, dtype="float32"),
        data=DataConfig(image_root=str(photos)),
        bootstrap=BootstrapConfig(weaken=OPTIONS),
    )
    encoder, model = load_encoder(config), load_model(config.model, torch.device("cpu"))
    annotations = read_annotations(photos / "annotations.json").annotations[:3]
    images = [encoder.encode_images(a.images) for a in annotations]
    return TransformersVisionGenerator(model, encoder, config), annotations, images


def answers(setting, kind: str, **weakening: object) -> list[str]:
    vision, annotations, _ = setting
    requests = [
        VisionRequest(a.id, a.images, a.prompt, Weakening(kind, seed, **weakening))  # type: ignore[arg-type]
        for seed, a in enumerate(annotations)
    ]
    return [reply.text for reply in replies_of(vision, requests)]


def noised(setting, step: int, space: str = "normalised") -> list[str]:
    return answers(setting, "noise", noise_step=step, space=space)


def test_pixels_are_noised_by_the_schedule_with_noise_of_the_seed(setting) -> None:
    vision, _, (images, *_) = setting
    clean = images.inputs["pixel_values"]
    first, again, other = (
        weaken_images(images, vision.encoder.family, 900, seed).inputs["pixel_values"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    epsilon = (first - diffuse(clean, 900, torch.zeros_like(clean))) / 0.931051
    assert epsilon.mean().item() == pytest.approx(0, abs=0.1)
    assert epsilon.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(images.inputs["pixel_values"], clean)


def test_without_noise_the_clean_image_is_answered(setting) -> None:
    assert weaken_images(setting[2][0], setting[0].encoder.family, -1, 5) is setting[2][0]
    assert answers(setting, "none") != noised(setting, 999)


def test_a_model_that_ignores_images_answers_alike_at_every_step(setting) -> None:
    """Weakening changes only the image: with a zero projector, the same seed gives the same answer."""
    vision, _, _ = setting
    projector = vision.model.get_submodule(vision.encoder.family.projector_modules[0])
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    clean = answers(setting, "none")
    assert all(noised(setting, step) == clean for step in (0, 500, 999))
    if vision.encoder.family.config.model_type == "llava":  # elsewhere the number of tokens depends on the size
        for kind in ("crop", "mask"):
            assert answers(setting, kind) == clean
        assert noised(setting, 900, "pixel") == clean


def test_the_clean_image_never_reaches_the_model(setting) -> None:
    """Contrastive decoding would pass both images to the model; here each call gets only the noised one."""
    vision, _, images = setting
    seen: list[torch.Tensor] = []
    generate = vision.model.generate
    vision.model.generate = lambda **kwargs: seen.append(kwargs["pixel_values"]) or generate(**kwargs)
    noised(setting, 900)
    weakened = [weaken_images(clean, vision.encoder.family, 900, seed) for seed, clean in enumerate(images)]
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat([encoded.inputs["pixel_values"] for encoded in weakened]))


def test_no_image_reaches_the_model_for_a_text_only_answer(setting) -> None:
    vision, _, _ = setting
    generate = vision.model.generate

    def spy(**kwargs: object) -> object:
        assert "pixel_values" not in kwargs
        assert not (kwargs["input_ids"] == vision.encoder.image_token_id).any()
        return generate(**kwargs)

    vision.model.generate = spy
    assert len(answers(setting, "no-image")) == 3


def test_a_system_prompt_goes_through_the_model_once(setting) -> None:
    """Except in Qwen-VL: see `Family.begins_from_cache`."""
    vision, annotations, _ = setting
    system = Turn("system", (ContentPart("text", "You are a careful assistant who answers every question in verse."),))
    requests = [
        VisionRequest(a.id, a.images, (system, *a.prompt), Weakening("none", seed))
        for seed, a in enumerate(annotations)
    ]
    held: list[int] = []
    generate = vision.model.generate

    def spy(**kwargs: object) -> object:
        held.append(kwargs["past_key_values"].get_seq_length())
        return generate(**kwargs)

    vision.model.generate = spy
    together = replies_of(vision, requests)
    assert replies_of(vision, requests) == together
    if vision.encoder.family.begins_from_cache:
        assert held[0] == 0 and len(held) == 3 and held[1] == held[2] > 40  # the prompt, then two batches after it
    else:
        assert held == [0, 0]
    assert [replies_of(vision, [request])[0] for request in requests] == together


def test_an_answer_goes_on_from_its_beginning(setting) -> None:
    vision, annotations, _ = setting
    requests = [
        VisionRequest(a.id, a.images, a.prompt, Weakening("none", seed), beginning)
        for seed, (a, beginning) in enumerate(zip(annotations, ["A cat,", "", "Two dogs <image>"], strict=True))
    ]
    replies = replies_of(vision, requests)
    assert replies[0].text.startswith("A cat,") and len(replies[0].text) > len("A cat,")
    assert replies[2].text.startswith("Two dogs <image>")
    assert [replies_of(vision, [request])[0] for request in requests] == replies


def test_an_unreadable_image_is_a_broken_record_and_the_others_are_answered(setting, photos: Path) -> None:
    (photos / "1.png").write_bytes(b"no picture")
    vision, annotations, _ = setting
    source = ImageAnswers("unweakened", vision.config, vision)
    found = list(source.outcomes(annotations, [source.prepare(annotation) for annotation in annotations]))
    assert {o.record_id: o.status == "broken" for o in found} == {"photo-0": False, "photo-1": True, "photo-2": False}
    assert "1.png" in next(o.reason for o in found if o.status == "broken")


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def weakener(kind: str = "noise", seed: int = 3, step: int | None = 900, **options: object) -> PictureWeakener:
    space = "pixel" if kind == "noise" else None
    return PictureWeakener(Weakening(kind, seed, step, space), replace(OPTIONS, **options), MEAN, STD)  # type: ignore[arg-type]


def grey_picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(100, 150, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_noise_in_either_space_is_the_same_where_nothing_is_clipped(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """At the processor's own size and with little noise, both give the same pixels up to rounding to 1/255."""
    config = Config(model=ModelConfig(path=str(tiny_llava_dir)), data=DataConfig(image_root=str(tmp_path)))
    encoder = load_encoder(config)
    side = encoder.processor.image_processor.crop_size["height"]
    grey_picture(side, side).save(tmp_path / "p.png")
    clean = encoder.encode_images(["p.png"])
    normalised = weaken_images(clean, encoder.family, 300, 3).inputs["pixel_values"]
    mean, std = encoder.processor.image_processor.image_mean, encoder.processor.image_processor.image_std
    change = PictureWeakener(Weakening("noise", 3, 300, "pixel"), replace(OPTIONS, pixel_side=0), mean, std)
    pixel = encoder.encode_images(["p.png"], change).inputs["pixel_values"]
    lowest, highest = ((limit - torch.tensor(mean)) / torch.tensor(std) for limit in (0.0, 1.0))
    inside = (normalised > lowest.reshape(3, 1, 1)) & (normalised < highest.reshape(3, 1, 1))
    assert inside.float().mean() > 0.8
    assert (pixel - normalised)[inside].abs().max() <= 0.51 / 255 / min(std)
    assert (pixel != clean.inputs["pixel_values"]).float().mean() > 0.8


def test_noise_covers_the_padding_in_either_space(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """Both spaces noise the same square picture: at the processor's own size they agree up to rounding to 1/255."""
    data = DataConfig(image_root=str(tmp_path), image_aspect="pad")
    config = Config(
        model=ModelConfig(path=str(tiny_llava_dir)),
        data=data,
        bootstrap=BootstrapConfig(weaken=replace(OPTIONS, pixel_side=0)),
    )
    encoder = load_encoder(config)
    grey_picture(28, 14).save(tmp_path / "p.png")
    vision = TransformersVisionGenerator(None, encoder, config)  # type: ignore[arg-type]
    prompt = (Turn("user", (ContentPart("image"),)),)

    def pixels(weakening: Weakening) -> torch.Tensor:
        return vision.prepare(VisionRequest("r", ("p.png",), prompt, weakening)).inputs["pixel_values"][0]

    clean = pixels(Weakening("none", 3))
    assert clean[:, :7].abs().max() < 0.02 < clean[:, 7:21].abs().max()  # margins of the mean colour
    normalised, pixel = pixels(Weakening("noise", 3, 300, "normalised")), pixels(Weakening("noise", 3, 300, "pixel"))
    step = 0.51 / 255 / min(encoder.processor.image_processor.image_std)
    assert ((pixel - normalised).abs() <= step).float().mean() > 0.8
    assert (pixel - clean)[:, :7].abs().mean() > 0.1


def test_crops_and_masks_apply_to_the_picture_without_its_padding() -> None:
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    for kind in ("crop", "mask"):
        change = PictureWeakener(Weakening(kind, 3), OPTIONS, MEAN, STD, padding=(1, 2, 3))  # type: ignore[arg-type]
        assert not (np.asarray(change(picture)) == [1, 2, 3]).all(-1).any()


def test_a_chat_engine_is_sent_padded_pictures_and_the_system_prompt(tiny_llava_dir: Path, tmp_path: Path) -> None:
    grey_picture(40, 30).save(tmp_path / "photo.png")
    data = DataConfig(image_root=str(tmp_path), image_aspect="pad", system_prompt="Be kind.")
    config = Config(model=ModelConfig(path=str(tiny_llava_dir)), data=data)
    chat = ChatVisionGenerator(None, config, "big", load_encoder(config))  # type: ignore[arg-type]
    question = Turn("user", (ContentPart("image"), ContentPart("text", "What?")))

    def messages(kind: str, *prompt: Turn) -> list[dict]:
        weakening = Weakening(kind, 5, 900 if kind == "noise" else None, "pixel")  # type: ignore[arg-type]
        return chat.prepare(VisionRequest("r", ("photo.png",), prompt, weakening))["messages"]

    for kind in ("none", "noise", "crop", "mask"):
        system, user = messages(kind, question)
        assert system == {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
        url = user["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert sent.width == sent.height
        if kind == "none":
            assert np.asarray(sent)[0, 0].tolist() == [122, 116, 104]
    own = Turn("system", (ContentPart("text", "Be brief."),))
    assert [m["content"][0].get("text") for m in messages("none", own, question)] == ["Be brief.", None]
    with pytest.raises(ValueError, match="image_aspect is pad, but model.path is empty"):
        ChatVisionGenerator(None, config, "big", None)  # type: ignore[arg-type]


def test_noise_of_a_picture_follows_its_seed_and_scales_it_down_first() -> None:
    picture = grey_picture(120, 60)
    first, again, other = (np.asarray(weakener(seed=seed)(picture)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert weakener(pixel_side=40)(picture).size == (40, 20)
    assert weakener(pixel_side=0)(picture).size == weakener(pixel_side=336)(picture).size == (120, 60)


def test_a_crop_shows_its_share_of_the_area() -> None:
    picture = grey_picture(200, 100)
    part = weakener("crop", crop_share=0.25)(picture)
    assert part.size == (100, 50)
    found = [
        (x, y)
        for x in range(101)
        for y in range(51)
        if np.array_equal(np.asarray(picture.crop((x, y, x + 100, y + 50))), np.asarray(part))
    ]
    assert len(found) == 1
    assert weakener("crop", crop_share=0.01)(grey_picture(1, 1000)).size == (1, 100)


def test_a_mask_covers_its_share_of_cells() -> None:
    picture = Image.new("RGB", (140, 280), (255, 0, 0))
    covered = (np.asarray(weakener("mask", mask_share=0.8)(picture)) == 127).all(-1)
    assert covered.mean() == pytest.approx(round(0.8 * MASK_CELLS**2) / MASK_CELLS**2)
    other = (np.asarray(weakener("mask", seed=4, mask_share=0.8)(picture)) == 127).all(-1)
    assert not np.array_equal(covered, other)


def test_a_schedule_spreads_its_steps_over_the_records() -> None:
    options = replace(OPTIONS, noise_steps=[300, 600, 900])
    steps = [choose_weakening("weaken", options, seed).noise_step for seed in range(300)]
    assert all(steps.count(step) > 60 for step in (300, 600, 900))
    assert steps == [choose_weakening("weaken", options, seed).noise_step for seed in range(300)]
    assert choose_weakening("weaken", OPTIONS, 1).noise_step == 900
    assert choose_weakening("unweakened", options, 1).kind == "none"


def test_a_chat_engine_is_sent_the_weakened_picture_itself(photos: Path) -> None:
    """PNG is lossless: the transmitted pixels equal the weakener's."""
    config = Config(
        data=DataConfig(image_root=str(photos)), bootstrap=BootstrapConfig(weaken=replace(OPTIONS, space="pixel"))
    )
    chat = ChatVisionGenerator(engine=None, config=config, name="big", encoder=None)  # type: ignore[arg-type]
    (annotation, *_) = read_annotations(photos / "annotations.json").annotations
    weakening = Weakening("noise", 5, 900, "pixel")
    body = chat.prepare(VisionRequest("r", annotation.images, annotation.prompt, weakening, "It is"))
    parts = body["messages"][0]["content"]
    (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    clean = Image.open(photos / annotation.images[0]).convert("RGB")
    expected = PictureWeakener(weakening, config.bootstrap.weaken, [0.5] * 3, [0.5] * 3)(clean)
    assert np.array_equal(np.asarray(sent), np.asarray(expected))
    assert body["messages"][-1] == {"role": "assistant", "content": "It is"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert (body["seed"], body["max_tokens"]) == (5, 10)


@pytest.mark.parametrize(("limits", "size"), [({"max_pixels": 300}, (20, 15)), ({"min_pixels": 4800}, (80, 60))])
def test_pixel_limits_apply_to_pictures_for_a_chat_engine(
    photos: Path, limits: dict[str, int], size: tuple[int, int]
) -> None:
    Image.new("RGB", (40, 30)).save(photos / "photo.png")
    config = Config(data=DataConfig(image_root=str(photos), **limits))  # type: ignore[arg-type]
    chat = ChatVisionGenerator(engine=None, config=config, name="big", encoder=None)  # type: ignore[arg-type]
    prompt = (Turn("user", (ContentPart("image"),)),)
    body = chat.prepare(VisionRequest("r", ("photo.png",), prompt, Weakening("none", 5)))
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == size
