"""Measures by the texts alone: collecting records, JSON, warnings."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from bpo.bootstrap.measure.pairs import TextPair
from bpo.bootstrap.measure.text import TextMeasures, TypeMeasures, measures_to_json, refused_shares
from bpo.config.measure import MeasureConfig
from bpo.records import Completion, ContentPart, PreferenceGroup, Turn
from tests.bootstrap.measure.worlds import independent, swapped, telling

PROMPT = (Turn("user", (ContentPart("image"), ContentPart("text", "Describe."))),)


def groups_of(**pairs_of_type: list[TextPair]) -> list[PreferenceGroup]:
    """One group per record; pairs of the same record must have the same preferred answer."""
    groups: dict[str, PreferenceGroup] = {}
    for kind, pairs in pairs_of_type.items():
        for pair in pairs:
            gt = (Completion(pair.preferred, 1.0, "gt"),)
            group = groups.get(pair.record_id) or PreferenceGroup(pair.record_id, ("1.png",), PROMPT, gt)
            completions = (*group.completions, Completion(pair.rejected, 0.0, kind.replace("_", "-")))
            groups[pair.record_id] = replace(group, completions=completions)
    return list(groups.values())


def measured(groups: list[PreferenceGroup], **options: int) -> dict[str, TypeMeasures]:
    measures = TextMeasures(MeasureConfig(**options))  # type: ignore[arg-type]
    for group in groups:
        measures.add_alone(group)
    return measures.measure()


def test_each_type_is_measured_apart_and_warned_about() -> None:
    balanced = swapped(400)
    bad = [replace(pair, rejected=f"{pair.rejected} Perhaps") for pair in balanced]
    found = measured(groups_of(swap=balanced, llm_hal=bad))
    assert list(found) == ["llm-hal", "swap"] and found["swap"].warnings == []
    (warning,) = found["llm-hal"].warnings
    assert warning.startswith("llm-hal: the text alone tells") and "1.00" in warning and "perhaps" in warning
    assert "bootstrap.inject.prompt_dir" in warning and "swap" in warning and "longer in 100%" in warning


def test_measures_do_not_depend_on_the_order_of_the_records() -> None:
    groups = groups_of(swap=swapped(300), llm_hal=telling(300, 0.5))
    first = measures_to_json(measured(groups, pairs=200, quick_pairs=200, annotations=100, diffs=50))
    random.Random(1).shuffle(groups)
    assert measures_to_json(measured(groups, pairs=200, quick_pairs=200, annotations=100, diffs=50)) == first
    assert first["swap"]["num_pairs"] == 300 and first["swap"]["text"]["num_pairs"] == 200
    assert first["swap"]["hardness"]["num_diffs"] == 50 and first["swap"]["drift"]["num_all"] == 100
    assert json.loads(json.dumps(first)) == first


def test_a_type_with_few_pairs_is_not_tested() -> None:
    found = measured(groups_of(swap=swapped(12)))["swap"]
    assert found.text is None and found.by_change == {} and found.hardness.num_diffs == 12
    assert found.to_json()["text"] is None


def test_a_type_that_lacks_one_object_is_reported() -> None:
    pairs = independent(2000)
    all_records = groups_of(full=pairs, part=[pair for pair in pairs if " dog " not in pair.preferred])
    found = measured(all_records)
    assert found["full"].drift.shifts == ()
    (warning,) = found["part"].warnings
    assert "not a fair sample" in warning and "object 'dog'" in warning and "-> 0.0%" in warning


def test_kept_groups_are_compared_with_all_annotations() -> None:
    pairs = independent(1500)
    measures = TextMeasures(MeasureConfig(annotations=1000))
    for pair in pairs:
        measures.add_annotation(pair.record_id, pair.preferred)
    groups = groups_of(llm_hal=[pair for pair in pairs if " dog " not in pair.preferred])
    known = [measures.add_kept(group) for group in groups]
    for group in groups:
        measures.add_group(group)
    assert set(known) == {True, None}
    assert measures.add_kept(replace(groups[0], id="stranger")) in (None, False)
    drift = measures.measure()["llm-hal"].drift
    assert drift.num_all == 1000 and drift.num_kept == sum(answer is True for answer in known)
    assert {shift.name for shift in drift.shifts} >= {"dog"}


def test_warnings_about_dominating_texts_and_true_negatives() -> None:
    pairs = [
        replace(
            pair, rejected="No." if i % 10 == 0 else f"A {pair.preferred.split()[2]}." if i % 4 == 1 else pair.rejected
        )
        for i, pair in enumerate(independent(400))
    ]
    warnings = measured(groups_of(llm_hal=pairs))["llm-hal"].warnings
    assert any("one text is 10% of the rejected answers: 'no.'" in warning for warning in warnings)
    assert any(
        "25% of the rejected answers say nothing" in warning and "such as records r" in warning for warning in warnings
    )


def test_warnings_about_refusals() -> None:
    shares = refused_shares(
        {"inject": 0, "weaken": 400, "crop": 10, "mask": 0},
        {"inject": {"unchanged": 7}, "weaken": {"surplus": 50}, "crop": {"empty": 30, "surplus": 9}},
    )
    assert shares == {"llm-hal": 1.0, "mllm-hal": 0.0, "mllm-crop": 30 / 49}
    measures = TextMeasures(MeasureConfig())
    for group in groups_of(mllm_hal=independent(400), swap=independent(400)):
        measures.add_alone(group)
    found = measures.measure({"mllm-hal": 0.0, "llm-hal": 1.0, "swap": 0.0})
    assert ["100% of the source's answers were refused" in w for w in found["llm-hal"].warnings] == [True]
    assert ["nearly no answer of the source was refused" in w for w in found["mllm-hal"].warnings] == [True]
    assert found["swap"].warnings == []


@pytest.mark.parametrize("quick", [False, True])
def test_quick_measures_use_smaller_samples(quick: bool) -> None:
    measures = TextMeasures(MeasureConfig(pairs=300, quick_pairs=100), quick=quick)
    for group in groups_of(swap=swapped(400)):
        measures.add_alone(group)
    found = measures.measure()["swap"]
    assert found.text is not None and found.text.num_pairs == (100 if quick else 300)
    assert found.hardness.num_diffs == (25 if quick else 300) and found.drift.num_all == 400
