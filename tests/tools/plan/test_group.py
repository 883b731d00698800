"""The average group as a loss packs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import Config, DataConfig, TrainConfig
from bpo.data.cells import CellPlan
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodedView
from bpo.losses.program import LossProgram
from bpo.records import Auxiliary, Completion, PreferenceGroup
from bpo.tools.plan.group import (
    GroupShape,
    ImageSize,
    average_group,
    groups_of_records,
    typical_group,
    typical_image,
)
from bpo.tools.plan.shape import model_config_of
from tests.sample_groups import encoder_of, group, turn

LLAVA = ImageSize(576, 577)
VIEWS = {
    "crop": ViewConfig(type="crop"),
    "noise": ViewConfig(type="noise"),
    "blind": ViewConfig(type="none"),
    "other": ViewConfig(type="other"),
}
MDPO = [
    TermConfig(),
    TermConfig(pairs="image", against="crop", name="image"),
    TermConfig(pairs="chosen", name="anchor"),
]


def plan_of(*terms: TermConfig, **options: Any) -> CellPlan:
    return LossProgram(LossConfig(terms=list(terms), views=VIEWS, **options)).plan


def sized(plan: CellPlan, image: ImageSize = LLAVA) -> GroupShape:
    """640 tokens of image and prompt, two answers of 150."""
    return average_group([typical_group(plan, image, 64, 150, 2)], plan, image)[0]


def views_of(shape: GroupShape) -> dict[str, tuple[float, float, float]]:
    """Prefix tokens, images and number of completions of each view."""
    return {view.name: (view.prefix_tokens, view.images, view.completions) for view in shape.step.views}


@pytest.mark.parametrize(
    ("terms", "views", "packed", "separate"),
    [
        ([TermConfig()], {"": (640, 1, 2)}, 940, 1580),
        (MDPO, {"": (640, 1, 2), "crop": (640, 1, 1)}, 1730, 2370),
        ([TermConfig(type="sft")], {"": (640, 1, 1)}, 790, 790),
        (
            [TermConfig(guidance=1.5, guidance_view="blind")],
            {"": (640, 1, 2), "blind": (64, 0, 2)},
            940 + 364,
            1580 + 428,
        ),
        (
            [TermConfig(), TermConfig(type="nll", pairs="auxiliary")],
            {"": (640, 1, 2), "auxiliary0": (640, 1, 1)},
            940 + 790,
            1580 + 790,
        ),
        (
            # The answer about the other image is one more, under both images.
            [TermConfig(pairs="symmetric", against="other")],
            {"": (640, 1, 2), "other": (640, 1, 2)},
            2 * 940,
            4 * 790,
        ),
        (
            [TermConfig(), TermConfig(pairs="symmetric", against="other", name="s")],
            {"": (640, 1, 3), "other": (640, 1, 2)},
            1090 + 940,
            5 * 790,
        ),
    ],
)
def test_only_what_a_term_needs_is_packed(
    terms: list[TermConfig], views: dict[str, Any], packed: int, separate: int
) -> None:
    shape = sized(plan_of(*terms))
    assert views_of(shape) == views
    assert (shape.step.tokens, shape.step.separate_tokens) == (packed, separate)


def test_the_reference_pass_packs_what_the_reference_scores() -> None:
    def reference_tokens(*terms: TermConfig) -> int | None:
        reference = sized(plan_of(*terms)).reference
        return None if reference is None else reference.tokens

    assert reference_tokens(*MDPO) == 1730
    assert reference_tokens(TermConfig(type="orpo"), TermConfig(type="nll")) is None
    assert reference_tokens(TermConfig(), TermConfig(type="nll", pairs="auxiliary")) == 940
    assert reference_tokens(TermConfig(guidance=1.5, guidance_view="blind")) == 940
    shared = TermConfig(pairs="argmax", against="noise", shared_tokens=True, name="second")
    assert sized(plan_of(TermConfig(), shared)).step.tokens == 940
    assert reference_tokens(TermConfig(), shared) == 1730


def test_second_targets_are_tokens_of_no_row_of_their_own() -> None:
    shape = sized(plan_of(TermConfig(), TermConfig(pairs="argmax", against="noise", name="second")))
    assert (shape.step.tokens, shape.step.second_targets) == (1730, 150)
    assert shape.step.load(2 * 1730).second_targets == 300
    assert sized(plan_of(*MDPO)).step.load(1730).second_targets == 0


def test_work_is_what_training_counts(tiny_llava_dir: Path, photo_root: Path) -> None:
    """A group of the same sizes, collated: every number of the useful work, images of views included."""
    encoder = encoder_of(tiny_llava_dir, photo_root)
    image = typical_image(encoder.family.config)
    assert image == ImageSize(4, 5)
    pixels = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    prompt = EncodedPrompt("a", (*[encoder.image_token_id] * 4, *range(3, 10)), pixels)
    blind = EncodedPrompt("a", tuple(range(3, 10)), {})
    plan = plan_of(*MDPO, TermConfig(guidance=1.5, guidance_view="blind", name="guided"))
    views = (EncodedView("crop", prompt), EncodedView("blind", blind))
    of_training = EncodedGroup(prompt, (tuple(range(20, 26)), tuple(range(30, 36))), (1.0, 0.0), views=views)
    expected = collate_groups([of_training] * 3, encoder.family, plan).useful_work
    shape, _ = average_group([typical_group(plan, image, 7, 6, 2)], plan, image)
    work = shape.step.work(3)
    numbers = ("tokens", "responses", "image_tokens", "pairs", "patches", "patch_pairs")
    assert {n: getattr(work, n) for n in numbers} == {n: getattr(expected, n) for n in numbers}


def answers(*of_words: tuple[int, float, str]) -> tuple[Completion, ...]:
    return tuple(
        Completion(" ".join([f"w{k}", *["word"] * (words - 1)]), score, "gt", view=view)
        for k, (words, score, view) in enumerate(of_words)
    )


def record(*of_words: tuple[int, float, str], images: tuple[str, ...] = ("a.png",), **options: Any) -> PreferenceGroup:
    prompt = (turn(*[None] * len(images), "What is it here?"),)
    return PreferenceGroup("r", images, prompt, answers(*of_words), **options)


def of_file(plan: CellPlan, *records: PreferenceGroup, config: Config | None = None) -> tuple[GroupShape, int]:
    return average_group(groups_of_records(records, config or Config(), plan, LLAVA), plan, LLAVA)


def test_groups_of_a_file_keep_their_own_answers_images_and_pairs() -> None:
    """Of a prompt of 4 words 6 tokens and 16 of the template; answers of 10, 20, 30 words have 14, 28, 42 tokens."""
    first = record((10, 1.0, ""), (20, 0.0, ""), (30, 0.0, ""))
    second = record((10, 1.0, ""), (10, 0.0, ""), images=("a.png", "b.png"))
    shape, count = of_file(plan_of(*MDPO), first, second)
    assert (count, shape.completions, shape.pairs) == (2, 2.5, 1.5)
    assert (shape.image_tokens, shape.prompt_tokens, shape.response_tokens) == (1.5 * 576, 22, 112 / 5)
    clean, crop = shape.step.views
    assert (clean.images, clean.prefix_tokens, clean.response_tokens) == (1.5, 1.5 * 576 + 22, 112 / 2)
    assert (crop.images, crop.completions, crop.response_tokens) == (1.5, 1, 14)
    one, two = 576 + 22, 2 * 576 + 22
    assert crop.separate_tokens == (one + two) / 2 + 14
    assert clean.separate_tokens == (3 * one + 2 * two + 112) / 2


def test_records_with_two_images_to_compare_and_with_other_prompts() -> None:
    compared = record((10, 1.0, ""), (10, 0.0, ""), (20, 1.0, "other"), other_images=("b.png",))
    shape, _ = of_file(plan_of(TermConfig(pairs="symmetric", against="other")), compared)
    assert {view.name: view.response_tokens for view in shape.step.views} == {"": 42, "other": 42}
    auxiliary = (Auxiliary((turn(None, "one two three four five"),), "six words are in this answer"),)
    described = record((10, 1.0, ""), (10, 0.0, ""), auxiliary=auxiliary)
    shape, _ = of_file(plan_of(TermConfig(), TermConfig(type="nll", pairs="auxiliary")), described)
    assert (shape.step.views[1].prefix_tokens, shape.step.views[1].response_tokens) == (576 + 7 + 16, 8)


def test_an_explored_answer_is_one_more_where_a_term_is_on_it() -> None:
    selm = plan_of(TermConfig(), TermConfig(type="log_ratio", pairs="explored"))
    shape = sized(selm)
    assert (views_of(shape)[""], shape.pairs, sized(plan_of(TermConfig())).step.tokens) == ((640, 1, 3), 1, 940)
    assert shape.step.tokens == shape.reference.tokens == 1090  # type: ignore[union-attr]
    paired = record((10, 1.0, ""), (20, 0.0, ""), (30, 0.0, ""))
    own = replace(paired.completions[2], paired=False, explored=True)
    paired = replace(paired, completions=(*paired.completions[:2], own))
    assert (of_file(selm, paired)[0].pairs, of_file(selm, paired)[0].step.views[0].completions) == (1, 3)
    assert of_file(plan_of(TermConfig()), paired)[0].step.views[0].completions == 2


def test_what_training_drops_is_not_counted() -> None:
    usable = record((10, 1.0, ""), (20, 0.0, ""))
    dropped = [
        record((10, 1.0, ""), (20, 1.0, "")),  # no pair
        record((10, 1.0, ""), (400, 0.0, "")),  # too many words
        record((10, 1.0, ""), (20, 0.0, ""), images=()),
        group("same", "a cat", "a cat"),
    ]
    assert of_file(plan_of(TermConfig()), usable, *dropped)[1] == 1
    keeping = Config(data=DataConfig(text_only="keep"))
    assert of_file(plan_of(TermConfig()), usable, *dropped, config=keeping)[1] == 2
    assert of_file(plan_of(*MDPO), usable, *dropped, config=keeping)[1] == 1  # without an image to crop
    other = plan_of(TermConfig(pairs="image", against="other"))
    with pytest.raises(ValueError, match="no group can be trained on"):
        of_file(other, usable)
    with pytest.raises(ValueError, match="no group can be trained on"):
        of_file(plan_of(TermConfig(type="nll", pairs="auxiliary")), usable)
    short = Config(data=DataConfig(max_length_tokens=576 + 22 + 5), train=TrainConfig(completion_types=["gt"]))
    shape, _ = of_file(plan_of(TermConfig()), usable, config=short)
    assert shape.response_tokens == 5


@pytest.mark.parametrize(
    ("name", "size"),
    [("llava-1.5-7b", LLAVA), ("qwen2.5-vl-7b", ImageSize(1024, 4096)), ("smolvlm-2b", ImageSize(81, 729))],
)
def test_images_of_built_in_shapes(name: str, size: ImageSize) -> None:
    assert typical_image(model_config_of(name)) == size
