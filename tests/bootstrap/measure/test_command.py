"""`bpo measure` on files that people bring, and what `bpo check` shows of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.measure.command import expand
from bpo.bootstrap.measure.pairs import TextPair
from bpo.cli import main
from bpo.formats.files import group_to_json, read_groups
from bpo.job.journal import to_line
from tests.bootstrap.measure.test_text import groups_of
from tests.bootstrap.measure.worlds import independent, swapped, telling


def write_groups(path: Path, **pairs_of_type: list[TextPair]) -> Path:
    path.write_bytes(b"".join(to_line(group_to_json(group)) for group in groups_of(**pairs_of_type)))
    return path


def write_annotations(path: Path, pairs: list[TextPair]) -> Path:
    turns = [
        [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": pair.preferred}] for pair in pairs
    ]
    records = [
        {"id": pair.record_id, "image": "1.png", "conversations": conversation}
        for pair, conversation in zip(pairs, turns, strict=True)
    ]
    path.write_text(json.dumps(records))
    return path


def measures_of(groups: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(groups.with_name(f"{groups.name}.measures.json").read_text())
    return tree


def test_arguments_become_options() -> None:
    assert expand(["g.jsonl"]) == ["--data.groups=g.jsonl"]
    assert expand(["--model", "M", "g.jsonl", "--measure.pairs=20", "--annotations=a.json", "--image-root", "I"]) == [
        "--model.path", "M", "--measure.pairs=20", "--data.annotations=a.json", "--data.image_root", "I",
        "--data.groups=g.jsonl",
    ]  # fmt: skip
    assert expand(["--config", "c.yaml"]) == ["--config", "c.yaml"]
    assert expand(["g.jsonl", "--help"]) == ["--help", "--data.groups=g.jsonl"]
    with pytest.raises(ValueError, match="one file of groups, not 2: a b"):
        expand(["a", "b"])


def test_the_command_prints_a_table_and_warnings_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = write_groups(tmp_path / "g.jsonl", swap=swapped(200), llm_hal=telling(200, 1.0))
    (tmp_path / "g.jsonl.summary.json").write_text(
        json.dumps({"kept": {"inject": 200, "swap": 200}, "refused": {"inject": {"empty": 50}}})
    )
    assert main(["measure", str(groups)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:5] == ["llm-hal", "200", "1.00", "+-", "0.00"] and lines[1][-1] == "20.0%"
    assert lines[2][:2] == ["swap", "200"]
    assert "warning: llm-hal: the text alone tells" in out and "warning: swap" not in out
    tree = measures_of(groups)
    assert tree["measures"]["llm-hal"]["text"]["accuracy"] == 1 and tree["model"] is None
    assert tree["warnings"] == tree["measures"]["llm-hal"]["warnings"] and len(tree["warnings"]) == 1
    assert sum(tree["measures"]["swap"]["text"]["histogram"].values()) == 200
    first = (tmp_path / "g.jsonl.measures.json").read_bytes()
    assert main(["measure", "--data.groups", str(groups), "--measure.seed", "0"]) == 0
    assert (tmp_path / "g.jsonl.measures.json").read_bytes() == first


@pytest.mark.parametrize("form", ["trl", "rlhf-v"])
def test_preferences_of_other_trainers_are_measured(form: str, tmp_path: Path) -> None:
    rows = []
    for pair in telling(60, 1.0):
        if form == "trl":
            turns = [[{"role": "assistant", "content": text}] for text in (pair.preferred, pair.rejected)]
            prompt = [{"role": "user", "content": "<image>Describe."}]
            rows.append({"prompt": prompt, "chosen": turns[0], "rejected": turns[1], "images": ["1.png"]})
        else:
            answers = {"question": "Describe.", "chosen": pair.preferred, "rejected": pair.rejected}
            rows.append({"ds_name": "d", "image_path": "1.png", "text": json.dumps(answers)})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["measure", str(path)]) == 0
    (only,) = measures_of(path)["measures"].values()
    assert only["num_pairs"] == 60 and only["text"]["accuracy"] == 1


def test_groups_are_compared_with_the_annotations_they_were_made_from(tmp_path: Path) -> None:
    pairs = independent(800)
    annotations = write_annotations(tmp_path / "a.json", pairs)
    groups = write_groups(tmp_path / "g.jsonl", mllm_hal=[p for p in pairs if " dog " not in p.preferred])
    assert main(["measure", str(groups)]) == 0
    assert measures_of(groups)["warnings"] == []  # nothing to compare with
    assert main(["measure", str(groups), "--annotations", str(annotations)]) == 0
    (warning,) = measures_of(groups)["warnings"]
    assert "not a fair sample" in warning and "'dog'" in warning
    drift = measures_of(groups)["measures"]["mllm-hal"]["drift"]
    assert drift["num_all"] == 800 and drift["num_kept"] == len([p for p in pairs if " dog " not in p.preferred])


def test_annotations_of_another_set_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = independent(30)
    groups = write_groups(tmp_path / "g.jsonl", mllm_hal=pairs)
    others = [replace(pair, record_id=f"other-{pair.record_id}") for pair in pairs]
    assert main(["measure", str(groups), "--annotations", str(write_annotations(tmp_path / "a.json", others))]) == 1
    error = capsys.readouterr().err
    assert "a.json lacks the ids of 30 of 30 groups in the sample, such as 'r0'" in error


def test_objects_in_the_images_tell_rejected_answers_that_are_true(tmp_path: Path) -> None:
    pairs = [TextPair(f"r{i}", f"A dog {i}.", f"A cat {i}." if i % 2 else f"A bus {i}.") for i in range(60)]
    groups = write_groups(tmp_path / "g.jsonl", mllm_hal=pairs)
    instances = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("dog", "cat", "bus"))],
        "annotations": [{"image_id": 1, "category_id": n} for n in (0, 1)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    assert main(["measure", str(groups), f"--evaluation.chair_instances={tmp_path / 'instances.json'}"]) == 0
    tree = measures_of(groups)
    truth = tree["measures"]["mllm-hal"]["hardness"]["truth"]
    assert truth == {"num_pairs": 60, "objects_present": 0.5, "false_negatives": 0.5}
    assert any("50% of the rejected answers name only objects that are in the image" in w for w in tree["warnings"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kept": 3, "refused": {}}', "recreate it with bpo bootstrap"),
        ("[", "recreate it with bpo bootstrap"),
    ],
)
def test_a_broken_summary_is_an_error(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = write_groups(tmp_path / "g.jsonl", swap=swapped(30))
    (tmp_path / "g.jsonl.summary.json").write_text(content)
    assert main(["measure", str(groups)]) == 1
    error = capsys.readouterr().err
    assert message in error and "g.jsonl.summary.json" in error


def test_groups_without_a_pair_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = write_groups(tmp_path / "g.jsonl", swap=[replace(p, rejected=p.preferred) for p in swapped(30)])
    assert main(["measure", str(groups)]) == 1
    assert "there is nothing to measure" in capsys.readouterr().err


def test_the_groups_are_also_written_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups, out = write_groups(tmp_path / "g.jsonl", llm_hal=telling(400, 0.6)), tmp_path / "balanced.jsonl"
    assert main(["measure", str(groups), "--balance", "weights", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"llm-hal: \d+ pairs by weights; accuracy of the text 0\.\d+ -> 0\.\d+; effective sample", printed)
    weights = [
        completion.weight for group in read_groups(out) for completion in group.completions if not completion.score
    ]
    assert len(set(weights)) > 1 and sum(weights) / len(weights) == pytest.approx(1, abs=1e-3)
    assert main(["measure", str(groups), "--out", str(out)]) != 0
    assert "balance is none" in capsys.readouterr().err


def test_check_shows_the_measures_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = write_groups(tmp_path / "g.jsonl", swap=swapped(200), llm_hal=telling(200, 1.0))
    arguments = ["check", str(groups), "--no-images", "--workers", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "what the texts of 200 sampled groups give away" in out
    assert "warning: llm-hal: the text alone tells" in out and "warning: swap" not in out
    assert main([*arguments, "--no-measure"]) == 0
    assert "give away" not in capsys.readouterr().out


def test_check_of_annotations_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_annotations(tmp_path / "a.json", independent(30))
    assert main(["check", str(annotations), "--no-images", "--workers", "1"]) == 0
    assert "give away" not in capsys.readouterr().out
