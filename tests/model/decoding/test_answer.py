"""Answers decoded in each way by tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpo.config.decoding import CalibrationConfig, ContrastConfig, SamplingConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.model.decoding.answer import answer_prompts
from bpo.model.decoding.cost import DecodingCost
from tests.model.test_generate import Loaded

YES_NO = ("Yes", "No")


# One with a fixed image, tiles of several images, rotary positions in three channels, token types, grouped tiles.
@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen2_5_vl", "gemma3", "idefics3"])
def loaded(
    request: pytest.FixtureRequest, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    return Loaded(family_dir(request.param), tmp_path_factory.mktemp("decoding"))


@pytest.fixture(scope="module")
def llava(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(tiny_llava_dir, tmp_path_factory.mktemp("decoding"))


def answers(
    loaded: Loaded, rows: list[int], *, labels: tuple[str, ...] = (), cost: DecodingCost | None = None, **options: Any
) -> list[str]:
    """Answers to the prompts `rows`, the last of which (3) has no image."""
    return answer_prompts(
        loaded.model,
        loaded.encoder,
        [loaded.prompts[row] for row in rows],
        labels=[labels] * len(rows),
        options=EvaluationConfig(**options),
        max_new_tokens=6,
        seeds=[100 + row for row in rows],
        cost=cost,
    )


def test_without_contrast_and_cut_it_is_plain_decoding(loaded: Loaded) -> None:
    off = ContrastConfig(alpha=0, beta=0)
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)):
        plain = answers(loaded, [0, 1, 2, 3], sampling=sampling)
        assert answers(loaded, [0, 1, 2, 3], sampling=sampling, decoding="vdd", contrast=off) == plain


def test_a_contrasted_answer_does_not_depend_on_its_batch(loaded: Loaded) -> None:
    contrast = ContrastConfig(views=["none", "noise"], alpha=2.0)
    together = answers(loaded, [0, 1, 2, 3], decoding="vdd", contrast=contrast)
    assert [answers(loaded, [row], decoding="vdd", contrast=contrast)[0] for row in range(4)] == together
    assert together[:3] != answers(loaded, [0, 1, 2])


def test_the_most_probable_token_alone_is_greedy(llava: Loaded) -> None:
    one = SamplingConfig(temperature=1.5, top_k=1)
    assert answers(llava, [0, 1], sampling=one) == answers(llava, [0, 1])
    assert answers(llava, [0, 1], decoding="vcd", sampling=one) == answers(llava, [0, 1], decoding="vcd")
    assert answers(llava, [0, 1], sampling=SamplingConfig(temperature=1.5)) != answers(llava, [0, 1])


def test_each_beam_sees_the_images_of_its_record(loaded: Loaded) -> None:
    beams = SamplingConfig(num_beams=3)
    together = answers(loaded, [0, 1, 2, 3], sampling=beams)
    assert [answers(loaded, [row], sampling=beams)[0] for row in range(4)] == together


def test_without_an_image_only_the_cut_is_left(llava: Loaded) -> None:
    """With an equal biased view the contrast vanishes; the cut cannot exclude the most probable token."""
    assert answers(llava, [3], decoding="vdd") == answers(llava, [3])
    everything_but_the_best = ContrastConfig(alpha=0, beta=1.0)
    sampling = SamplingConfig(temperature=1.5)
    assert answers(llava, [0], decoding="vdd", contrast=everything_but_the_best, sampling=sampling) == answers(
        llava, [0]
    )


def test_calibration_answers_with_a_label_and_says_what_it_left_alone(loaded: Loaded) -> None:
    cost = DecodingCost()
    found = answers(loaded, [0, 1, 2, 3], labels=YES_NO, cost=cost, decoding="calibration")
    assert set(found[:3]) <= set(YES_NO)
    assert found[3:] == answers(loaded, [3])  # no image: nothing to calibrate by
    assert str(cost).endswith("; 3 answers calibrated, 1 decoded plainly")
    assert answers(loaded, [1], labels=YES_NO, decoding="calibration") == found[1:2]
    without_labels = DecodingCost()
    assert answers(loaded, [0, 1], cost=without_labels, decoding="calibration") == answers(loaded, [0, 1])
    assert (without_labels.calibrated, without_labels.uncalibrated) == (0, 2)


def test_priors_of_the_data_set_decide(llava: Loaded) -> None:
    for form, tiny in (("scale", 1e-6), ("shift", -9.0)):
        for label, priors in (("Yes", (tiny, 1.0)), ("No", (1.0, tiny))):
            found = answer_prompts(
                llava.model,
                llava.encoder,
                llava.prompts[:2],
                labels=[YES_NO] * 2,
                options=EvaluationConfig(
                    decoding="calibration",
                    calibration=CalibrationConfig(form=form, over="dataset"),  # type: ignore[arg-type]
                ),
                max_new_tokens=3,
                seeds=[0, 1],
                priors={YES_NO: priors},
            )
            assert found == [label] * 2


def test_labels_must_begin_with_different_tokens(llava: Loaded) -> None:
    with pytest.raises(ValueError, match=r"labels No, Nothing, and two are equal .*; use another decoding"):
        answers(llava, [0], labels=("No", "Nothing"), decoding="calibration")


def test_costs_are_relative_to_the_passes_on_the_image(llava: Loaded) -> None:
    plain, one, two, labels, beams = (DecodingCost() for _ in range(5))
    answers(llava, [0, 1], cost=plain)
    answers(llava, [0, 1], cost=one, decoding="vdd", contrast=ContrastConfig(alpha=0, beta=0))
    answers(llava, [0, 1], cost=two, decoding="vdd", contrast=ContrastConfig(views=["none", "noise"]))
    answers(llava, [0, 1], labels=YES_NO, cost=labels, decoding="calibration")
    answers(llava, [0, 1], cost=beams, sampling=SamplingConfig(num_beams=3))
    assert [str(cost) for cost in (plain, one, two)] == [f"x{n}.0 forward passes" for n in (1, 2, 3)]
    assert one.branches["image"] == plain.branches["image"]
    assert one.branches["none"].passes == plain.branches["image"].passes
    assert one.branches["none"].tokens < plain.branches["image"].tokens  # no image tokens
    assert (labels.branches["image"].passes, labels.branches["none"].passes) == (2, 2)
    assert beams.branches["image"].prefills == 3 * plain.branches["image"].prefills
    assert str(DecodingCost()) == "no forward passes"
    tree = two.to_json()
    assert tree["relative_forward_passes"] == 3.0
    assert tree["branches"]["noise"]["prefills"] == 2


def test_beams_neither_sample_nor_contrast() -> None:
    with pytest.raises(ValueError, match="num_beams=3 does not sample; set temperature to 0, not 0.5"):
        SamplingConfig(num_beams=3, temperature=0.5)
    with pytest.raises(ValueError, match="decoding=vdd has no beam search; set evaluation.sampling.num_beams to 1"):
        EvaluationConfig(decoding="vdd", sampling=SamplingConfig(num_beams=3))
