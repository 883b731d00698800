"""The demo's base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from bpo.bootstrap.inject import build_request
from bpo.records import Annotation, ContentPart, Turn
from bpo.tools.demo.base import IGNORED, BaseConfig, _attend_to_equal_tokens, _batches, _llava_config, build_base_model
from bpo.tools.demo.rewriting import prompt_dir, rewriting_request
from bpo.tools.demo.sprites import NUM_OBJECTS
from bpo.tools.demo.tower import noised, objects_of, pixels_of, train_tower
from bpo.tools.demo.vocabulary import IMAGE, build_processor, build_tokenizer
from bpo.tools.demo.world import DESCRIBE, WorldConfig, draw_scene, iter_scenes, question_about, sample_scene

WORLD = WorldConfig(seed=1)
TINY = BaseConfig(tower_steps=2, tower_batch=4, steps=4, batch=4, text_width=32, text_layers=1, tower_width=16)


def _user(question: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    build_base_model(directory, WORLD, TINY, progress=False)
    return directory


def test_it_loads_by_the_auto_classes_and_answers_a_chat(base_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base_dir)
    processor = AutoProcessor.from_pretrained(base_dir)
    prompt = processor.apply_chat_template([_user(DESCRIBE)], add_generation_prompt=True)
    image = draw_scene(WORLD, next(iter_scenes(WORLD, "evaluation", 1)))
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_same_seed_trains_the_same_model(base_dir: Path, tmp_path: Path) -> None:
    build_base_model(tmp_path, WORLD, TINY, progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == (base_dir / "model.safetensors").read_bytes()


def test_building_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_base_model(tmp_path, WORLD, TINY, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_every_sentence_of_the_world_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for scene in iter_scenes(WORLD, "annotations", 50):
        for text in (DESCRIBE, scene.caption, *map(question_about, scene.names)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_an_image_place_adds_no_word_of_its_own() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(f"USER: {IMAGE} {DESCRIBE}", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁USER", ":", IMAGE, "▁Describe", "▁the", "▁image", "."]


def test_training_pixels_are_those_of_the_processor() -> None:
    scenes = list(iter_scenes(WORLD, "annotations", 3))
    processor = build_processor(WORLD.image_px, TINY.patch_px)
    images = [draw_scene(WORLD, scene) for scene in scenes]
    expected_BCHW = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels_of(WORLD, scenes), expected_BCHW, atol=1e-5, rtol=0)


def test_training_prompts_are_those_of_inference_and_only_answers_are_learnt() -> None:
    processor = build_processor(WORLD.image_px, TINY.patch_px)
    tokenizer = processor.tokenizer
    batches = _batches(processor, WORLD, TINY)
    questions, caption, later_questions, _, rewriting = (next(batches) for _ in range(5))
    image = draw_scene(WORLD, next(iter_scenes(WORLD, "base", 1)))
    prompt = processor.apply_chat_template([_user(DESCRIBE)], add_generation_prompt=True)
    prefix_S = processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"][0]
    assert torch.equal(caption["input_ids"][0, : len(prefix_S)], prefix_S)
    learnt = caption["labels"][0]
    spoken = tokenizer.decode(learnt[learnt != IGNORED])
    scene = sample_scene(WORLD, "base", TINY.batch)
    assert spoken == f"{scene.caption}{tokenizer.eos_token}"
    for batch in (questions, later_questions):
        assert (batch["labels"] == tokenizer.eos_token_id).sum() == TINY.batch * TINY.questions_per_scene
    assert "pixel_values" not in rewriting and (rewriting["input_ids"] != processor.image_token_id).all()


def test_bootstrapping_asks_for_errors_in_the_words_the_model_was_taught() -> None:
    caption = "a photo with a cup."
    turn = Turn("user", (ContentPart("text", DESCRIBE),))
    annotation = Annotation(id="0", images=("0.png",), prompt=(turn,), response=caption)
    request = build_request(annotation, "description", 40, 0, prompt_dir())
    assert [message.content for message in request.messages] == [rewriting_request(caption)]


def test_noise_spares_the_share_it_should() -> None:
    pixels_BCHW = torch.zeros(400, 1, 2, 2)
    noisy_BCHW = noised(pixels_BCHW, 0.25, torch.Generator().manual_seed(0))
    assert 0.15 < (noisy_BCHW != 0).flatten(1).any(1).float().mean() < 0.35
    assert torch.equal(noised(pixels_BCHW, 0.0, torch.Generator()), pixels_BCHW)


def test_the_tower_learns_to_see_and_projects_patches_to_the_names_of_objects() -> None:
    processor = build_processor(WORLD.image_px, 12)
    torch.manual_seed(0)
    tower, projector = (
        CLIPVisionModel(_llava_config(WORLD, BaseConfig(), processor).vision_config),
        torch.nn.Linear(64, 32),
    )
    names_KT = torch.nn.functional.normalize(torch.randn(NUM_OBJECTS, 32), dim=-1)
    train_tower(
        tower,
        projector,
        names_KT,
        WORLD,
        num_steps=80,
        batch_size=32,
        learning_rate=3e-3,
        noised_fraction=0.0,
        progress=False,
    )
    assert not any(p.requires_grad for p in tower.parameters())
    scenes = list(iter_scenes(WORLD, "probe", 400, biased_fraction=0.0))
    with torch.no_grad():
        feature_BD = tower(pixels_of(WORLD, scenes)).last_hidden_state[:, 1:].amax(1)
    feature_BD = torch.cat([feature_BD, torch.ones(len(feature_BD), 1)], dim=1)
    solution_DK = torch.linalg.lstsq(feature_BD[:200], objects_of(scenes[:200])).solution
    correct = ((feature_BD[200:] @ solution_DK > 0.5) == objects_of(scenes[200:]).bool()).float().mean()
    # Saying "absent" of everything is right for 13 of 16 objects.
    assert correct > 0.87
    with torch.no_grad():
        patch_BPT = torch.nn.functional.normalize(
            projector(tower(pixels_of(WORLD, scenes)).last_hidden_state[:, 1:]), dim=-1
        )
    cosine_BK = (patch_BPT @ names_KT.T).amax(1)
    present_BK = objects_of(scenes).bool()
    assert cosine_BK[present_BK].mean() > cosine_BK[~present_BK].mean() + 0.1


def test_a_new_model_attends_to_an_earlier_mention_of_an_object() -> None:
    processor = build_processor(WORLD.image_px, 12)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(_llava_config(WORLD, BaseConfig(), processor))
    model.set_attn_implementation("eager")
    _attend_to_equal_tokens(model)
    words_S = torch.tensor(processor.tokenizer("cup fork tree car bus plate leaf").input_ids)
    ids_BS = torch.cat([words_S.repeat(len(words_S), 1), words_S.unsqueeze(1)], dim=1)
    weight_BHSS = model.model.language_model(input_ids=ids_BS, output_attentions=True).attentions[0]
    assert torch.equal(weight_BHSS.mean(1)[:, -1, :-1].argmax(1), torch.arange(len(words_S)))


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("noised_fraction", 1.5), ("question_fraction", -0.1), ("patch_px", 0)]
)
def test_bad_sizes_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        BaseConfig(**{field: value})  # type: ignore[arg-type]


def test_a_patch_that_does_not_divide_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patch_px=7"):
        build_base_model(tmp_path, WORLD, BaseConfig(patch_px=7), progress=False)
