"""Views of a group's images."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bpo.config.loss import ViewConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data import views as views_module
from bpo.data.encode import EncodedPrompt, Encoder, EncodingError, load_encoder
from bpo.data.noise import alpha_bar_S
from bpo.data.views import Views, check_views, register_view, without_images
from bpo.formats.images import ImageError
from bpo.records import PreferenceGroup
from tests.conftest import ROOT
from tests.sample_groups import encoder_of, group, three_groups, turn

VIEWS = {
    "noised": ViewConfig(type="noise", space="pixel"),
    "diffused": ViewConfig(type="noise", space="normalised"),
    "cropped": ViewConfig(type="crop"),
    "masked": ViewConfig(type="mask"),
    "other": ViewConfig(type="other"),
    "blind": ViewConfig(type="none"),
}
RANDOM = ("noised", "diffused", "cropped", "masked")
GROUP = replace(group("a", "a cat", "a dog"), other_images=("tall.png",))
INVERTED = """
from PIL import ImageOps
from bpo.data.views import register_view

register_view("inverted")(lambda picture, view, generator: ImageOps.invert(picture))
"""
# Run in another process: the views of argv[1], and their digests.
IN_ANOTHER_PROCESS = f"""
import pickle, sys
from tests.data.test_views import digest, seen
views, group = pickle.load(open(sys.argv[1], "rb"))
try:
    seen(views, "inverted", group)
except RuntimeError as error:
    print(error, file=sys.stderr)
{INVERTED}
print(*(digest(seen(views, name, group)) for name in [{", ".join(map(repr, VIEWS))}, "inverted"]))
"""


@pytest.fixture(autouse=True)
def own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "_PLUGIN_VIEWS", {})


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def encoder(request: pytest.FixtureRequest, family_dir: Callable[[str], Path], photo_root: Path) -> Encoder:
    return encoder_of(family_dir(request.param), photo_root)


@pytest.fixture
def views(encoder: Encoder) -> Views:
    return Views(encoder, VIEWS, seed=3)


def seen(views: Views, name: str, group: PreferenceGroup = GROUP, *, with_prompt: bool = True) -> EncodedPrompt:
    pictures = views.encoder.open_pictures(group.images)
    clean = views.encoder.encode_pictures(pictures, group.images)
    prompt = views.encoder.encode_prompt(group.id, clean, group.prompt)
    return views.prompt(name, group, pictures, clean, prompt if with_prompt else None)


def pixels(prompt: EncodedPrompt) -> torch.Tensor:
    return prompt.image_inputs["pixel_values"]


def digest(prompt: EncodedPrompt) -> str:
    parts = [repr(prompt.prefix_ids).encode(), *(value.numpy().tobytes() for value in prompt.image_inputs.values())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_another_process_rank_and_hash_seed_see_the_same_views(views: Views, tmp_path: Path) -> None:
    """With plug-ins' types, which each process looks up by name."""
    register_view("inverted")(lambda picture, view, generator: ImageOps.invert(picture))
    views = Views(views.encoder, {**VIEWS, "inverted": ViewConfig(type="inverted")}, seed=3)
    (tmp_path / "views").write_bytes(pickle.dumps((views, GROUP)))
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "views")]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [digest(seen(views, name)) for name in [*VIEWS, "inverted"]]
    assert "loss.views.inverted: type 'inverted' is not registered in this process" in done.stderr


@pytest.mark.parametrize("name", RANDOM)
def test_draws_follow_the_seed_the_record_and_the_options_but_not_the_name(encoder: Encoder, name: str) -> None:
    options = {"noise": {"step": 400}, "crop": {"min_area": 0.02}, "mask": {"share": 0.4}}[VIEWS[name].type]
    known = {name: VIEWS[name], "again": VIEWS[name], "changed": replace(VIEWS[name], **options)}
    views = Views(encoder, known, seed=3)
    first = digest(seen(views, name))
    assert first == digest(seen(views, name)) == digest(seen(views, "again"))
    different = [
        seen(views, "changed"),
        seen(views, name, replace(GROUP, id="b")),
        seen(Views(encoder, known, seed=4), name),
        views.encoder.encode_prompt("a", GROUP.images, GROUP.prompt),
    ]
    assert len({first, *map(digest, different)}) == 5


def test_images_of_one_record_differ_in_their_draws(encoder: Encoder) -> None:
    twice = replace(GROUP, images=("square.png",) * 2, prompt=(turn(None, None, "What?"),))
    for name in RANDOM:
        first, second = pixels(seen(Views(encoder, VIEWS, 3), name, twice)).chunk(2)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("record", [GROUP, three_groups()[1]], ids=["one image", "two images"])
def test_a_changed_image_has_the_clean_ones_tokens(views: Views, name: str, record: PreferenceGroup) -> None:
    clean = views.encoder.encode_prompt(record.id, record.images, record.prompt)
    for with_prompt in (True, False):
        view = seen(views, name, record, with_prompt=with_prompt)
        assert view.prefix_ids == clean.prefix_ids and view.record_id == record.id
        assert view.image_inputs.keys() == clean.image_inputs.keys()
        assert pixels(view).shape == pixels(clean).shape


def test_normalised_noise_at_step_500(views: Views) -> None:
    clean, noised = (
        pixels(views.encoder.encode_prompt("a", GROUP.images, GROUP.prompt)),
        pixels(seen(views, "diffused")),
    )
    noise = (noised - 0.863017 * clean) / 0.505175
    assert noise.mean().item() == pytest.approx(0, abs=0.06)
    assert noise.std().item() == pytest.approx(1, abs=0.04)
    assert np.corrcoef(noise.flatten(), clean.flatten())[0, 1] == pytest.approx(0, abs=0.06)


def test_pixel_noise_is_within_the_range_of_pictures_and_covers_the_padding(
    tiny_llava_dir: Path, photo_root: Path
) -> None:
    data = DataConfig(image_root=str(photo_root), image_aspect="pad")
    encoder = load_encoder(Config(model=ModelConfig(path=str(tiny_llava_dir)), data=data))
    views = Views(
        encoder,
        {"noised": ViewConfig(type="noise", step=999, space="pixel"), "masked": ViewConfig(type="mask", share=1)},
        0,
    )
    processor = encoder.processor.image_processor
    values = pixels(seen(views, "noised"))[0]
    shown = (
        values * torch.tensor(processor.image_std)[:, None, None] + torch.tensor(processor.image_mean)[:, None, None]
    )
    assert shown.min() >= -1e-4 and shown.max() <= 1 + 1e-4
    assert values[:, :4].std() > 0.1  # 90 x 60 pixels: the first and last sixth of the square are padding
    masked = pixels(seen(views, "masked"))[0]
    assert masked[:, :4].std() < 0.1  # masks, as crops, change the picture alone


def test_a_step_near_zero_is_almost_the_clean_image(encoder: Encoder) -> None:
    options = {"pixel": ViewConfig(step=0, space="pixel"), "normalised": ViewConfig(step=0)}
    views = Views(encoder, options, 0)
    clean = pixels(encoder.encode_prompt("a", GROUP.images, GROUP.prompt))
    assert 1 - alpha_bar_S()[0] < 1e-4
    for space in options:
        assert (pixels(seen(views, space)) - clean).abs().max() < 0.1


def test_the_prompt_without_an_image_has_no_image_token(views: Views) -> None:
    for record in [GROUP, *three_groups()]:
        blind = seen(views, "blind", record)
        assert views.encoder.image_token_id not in blind.prefix_ids
        assert blind.image_inputs == {}
        texts = [part.text for each in record.prompt for part in each.content if part.type == "text"]
        decoded = views.encoder.decode(blind.prefix_ids)
        assert all(text.strip() in decoded for text in texts)


def test_a_turn_of_images_alone_keeps_an_empty_text(views: Views) -> None:
    prompt = (turn(None), turn("A cat.", role="assistant"), turn("Sure?", None))
    assert without_images(prompt) == (turn(""), turn("A cat.", role="assistant"), turn("Sure?"))
    assert seen(views, "blind", replace(GROUP, images=("wide.png", "tall.png"), prompt=prompt)).prefix_ids


def test_other_images_take_the_place_of_the_images(views: Views) -> None:
    expected = views.encoder.encode_prompt("a", ("tall.png",), GROUP.prompt)
    for with_prompt in (True, False):
        other = seen(views, "other", with_prompt=with_prompt)
        assert other.prefix_ids == expected.prefix_ids and digest(other) == digest(expected)
    assert [name for name in VIEWS if views.needs_other_images(name)] == ["other"]


@pytest.mark.parametrize("others", [(), ("tall.png", "square.png")])
def test_a_record_without_as_many_other_images_is_an_error(views: Views, others: tuple[str, ...]) -> None:
    with pytest.raises(EncodingError, match=rf"'a'.*{len(others)} other_images for 1 images.*'other'.*correct"):
        seen(views, "other", replace(GROUP, other_images=others))


def test_an_unreadable_other_image_is_an_error(views: Views) -> None:
    with pytest.raises(ImageError, match=r"gone\.png"):
        seen(views, "other", replace(GROUP, other_images=("gone.png",)))


def test_a_record_without_images_has_no_views(views: Views) -> None:
    record = replace(GROUP, images=(), prompt=(turn("What?"),))
    for name in VIEWS:
        with pytest.raises(EncodingError, match=rf"'a'.*no image.*'{name}'.*data\.text_only"):
            seen(views, name, record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "blur"}, r"loss\.views\.v\.type is 'blur'; available: noise, crop, mask, other, none, tint;"),
        ({"type": "crop", "min_area": 0.3}, r"loss\.views\.v\.min_area is 0\.3, above its max_area=0\.2"),
        ({"type": "mask", "share": 0.001}, r"loss\.views\.v\.share is 0\.001, less than one"),
        ({"type": "mask", "options": {"cells": 9}}, r"loss\.views\.v\.options is for the types of plug-ins"),
        ({"type": "tint", "options": {"colours": {1, 2}}}, r"loss\.views\.v\.options cannot be written as JSON"),
    ],
)
def test_unknown_and_contradictory_options_are_refused(encoder: Encoder, options: dict[str, Any], message: str) -> None:
    register_view("tint")(lambda picture, view, generator: picture)
    with pytest.raises(ValueError, match=message):
        check_views({"v": ViewConfig(**options)})
    with pytest.raises(ValueError, match=message):
        Views(encoder, {"v": ViewConfig(**options)}, 0)
    with pytest.raises(ValueError, match="without a name"):
        check_views({" ": ViewConfig()})


def test_pixel_noise_is_refused_for_an_image_processor_of_one_channel(encoder: Encoder, monkeypatch: Any) -> None:
    monkeypatch.setattr(encoder.processor.image_processor, "image_mean", [0.5])
    with pytest.raises(ValueError, match=r"loss\.views\.noised.*three channels.*normalised"):
        Views(encoder, VIEWS, 0)
    Views(encoder, {"diffused": VIEWS["diffused"]}, 0)


def test_a_registered_view_gets_its_options_and_a_picture_of_its_own(views: Views) -> None:
    @register_view("tint")
    def tint(picture: Image.Image, view: ViewConfig, generator: torch.Generator) -> Image.Image:
        picture.paste((view.options["red"], 0, 0), (0, 0, *picture.size))
        return picture

    known = {"red": ViewConfig(type="tint", options={"red": 250}), "dark": ViewConfig(type="tint", options={"red": 20})}
    tinted = Views(views.encoder, known, 3)
    pictures = views.encoder.open_pictures(GROUP.images)
    clean = views.encoder.encode_pictures(pictures, GROUP.images)
    red, dark = (pixels(tinted.prompt(name, GROUP, pictures, clean)) for name in known)
    assert red.mean() > dark.mean()
    unchanged = views.encoder.encode_pictures(pictures, GROUP.images)
    assert torch.equal(unchanged.inputs["pixel_values"], clean.inputs["pixel_values"])
    for taken in ("tint", "noise", "none"):
        with pytest.raises(ValueError, match=f"{taken!r} is already registered"):
            register_view(taken)(tint)


def test_a_registered_view_may_change_the_number_of_image_tokens(family_dir: Any, photo_root: Path) -> None:
    register_view("half")(lambda picture, view, generator: picture.resize((56, 28)))
    encoder = encoder_of(family_dir("qwen2_5_vl"), photo_root)
    prompt = seen(Views(encoder, {"half": ViewConfig(type="half")}, 0), "half")
    assert prompt.prefix_ids.count(encoder.image_token_id) == 2


def test_a_registered_view_that_returns_no_rgb_picture_is_an_error(encoder: Encoder) -> None:
    register_view("grey")(lambda picture, view, generator: picture.convert("L"))
    with pytest.raises(TypeError, match=r"loss\.views\.v: type 'grey' must return an RGB picture, not .*mode=L"):
        seen(Views(encoder, {"v": ViewConfig(type="grey")}, 0), "v")


def test_the_identity_names_what_determines_a_view_and_nothing_else(encoder: Encoder) -> None:
    register_view("tint")(lambda picture, view, generator: picture)
    other = {"step": 7, "space": "pixel", "min_area": 0.1, "max_area": 0.5, "share": 0.6, "options": {"a": 1}}
    read = {
        "noise": {"step", "space"},
        "crop": {"min_area", "max_area"},
        "mask": {"share"},
        "other": set(),
        "none": set(),
        "tint": set(other),
    }

    def identity(seed: int = 0, **options: Any) -> str:
        return Views(encoder, {"v": ViewConfig(**options)}, seed).identity("v")

    for kind, matter in read.items():
        plain = identity(type=kind)
        applicable = other if kind == "tint" else {name: value for name, value in other.items() if name != "options"}
        changed = {name for name, value in applicable.items() if identity(type=kind, **{name: value}) != plain}
        assert changed == matter
        assert (identity(1, type=kind) != plain) == bool(matter)
    assert len({identity(type=kind) for kind in read}) == len(read)
    assert identity(type="mask") == '{"seed": 0, "share": 0.3, "type": "mask"}'
    assert identity(type="crop", max_area=1) == identity(type="crop", max_area=1.0)
