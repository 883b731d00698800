"""Comparisons: refused for unlike settings, paired otherwise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bpo.cli import main
from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.compare import UnlikeResults, compare
from bpo.evaluation.results import score_benchmark
from bpo.evaluation.suite import make_benchmark, read_suite
from tests.evaluation.suites import write_files

BASE = (["A dog.", "A cat.", "A cat."], ["Yes", "Yes", "Yes"] * 2)
TRAINED = (["A dog.", "A dog and a cat.", "Nothing."], ["Yes", "No", "No"] * 2)


def results(folder: Path, answers: tuple[list[str], list[str]] = BASE, **options: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    suite = read_suite(EvaluationConfig(suite=str(write_files(folder)), **options))
    scored = [score_benchmark(benchmark, given) for benchmark, given in zip(suite.benchmarks, answers, strict=True)]
    return {
        "model": {"path": str(folder)},
        "dtype": "bfloat16",
        "image_options": {"image_aspect": "pad", "max_pixels": 0},
        "system_prompt": "",
        "decoding": {"method": "plain", "sampling": {"temperature": 0.0}},
        "versions": {"bpo": "1.0"},
        "benchmarks": [result.to_json() for result in scored],
    }


def test_differences_are_those_of_the_metrics_wherever_the_files_are(tmp_path: Path) -> None:
    first, second = results(tmp_path / "one"), results(tmp_path / "two", TRAINED)
    found = compare(first, second)
    assert found["notes"] == [] and list(found["benchmarks"]) == ["chair", "pope"]
    chair_i = found["benchmarks"]["chair"]["chair_i"]
    assert (chair_i["first"], chair_i["second"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    accuracy = found["benchmarks"]["pope"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(2 / 3) and accuracy["low"] <= 2 / 3 <= accuracy["high"]


def test_a_result_does_not_differ_from_itself(tmp_path: Path) -> None:
    first = results(tmp_path)
    for metrics in compare(first, copy.deepcopy(first))["benchmarks"].values():
        assert {(at["difference"], at["low"], at["high"]) for at in metrics.values()} == {(0, 0, 0)}


def changed(tree: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    at = tree
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("dtype",), "float32", 'dtype: "bfloat16" / "float32"'),
        (("image_options", "image_aspect"), "processor", 'image_options.image_aspect: "pad" / "processor"'),
        (("system_prompt",), "Be brief.", 'system_prompt: "" / "Be brief."'),
        (("decoding", "sampling", "temperature"), 1.0, "decoding.sampling.temperature: 0.0 / 1.0"),
        (("benchmarks", 0, "settings", "options", "prompt"), "Hi", 'chair, prompt: "" / "Hi"'),
        (("benchmarks", 1, "settings", "options", "suffix"), "Hi", 'pope, suffix: "" / "Hi"'),
        (("benchmarks", 1, "settings", "max_new_tokens"), 9, "pope, max_new_tokens: 3 / 9"),
        (("benchmarks", 0, "settings", "images_sha256"), "0", "chair, images_sha256: .* / .0."),
        (("benchmarks", 0, "name"), "chair (lg)", r'chair, name: "chair" / "chair \(lg\)"'),
    ],
)
def test_unlike_settings_are_refused_with_both_values(tmp_path: Path, path: Any, value: Any, message: str) -> None:
    first = results(tmp_path)
    with pytest.raises(UnlikeResults, match=message):
        compare(first, changed(first, *path, value=value))


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    first = results(tmp_path)
    (tmp_path / "two").mkdir()
    second = changed(results(tmp_path / "two", (BASE[0][:1], BASE[1][:2]), sample=1), "dtype", value="float32")
    with pytest.raises(UnlikeResults) as refusal:
        compare(first, second)
    text = str(refusal.value)
    assert "dtype:" in text and "chair, num_images: 3 / 1" in text and "pope, questions_sha256" in text


def test_other_ground_truth_is_refused_and_other_model_accepted(tmp_path: Path) -> None:
    first = results(tmp_path)
    compare(first, changed(first, "model", "path", value="other"))
    path = tmp_path / "instances.json"
    second = copy.deepcopy(first)
    files = second["benchmarks"][0]["settings"]["files_sha256"]
    files[str(path)] = "0" * 64
    with pytest.raises(UnlikeResults, match=r"chair, files: \[.*instances.json.* / .*0000"):
        compare(first, second)


def test_decoding_may_differ_if_asked(tmp_path: Path) -> None:
    first = results(tmp_path)
    assert compare(first, changed(first, "decoding", "method", value="vdd"), any_decoding=True)["notes"] == []


def test_notes_say_what_is_not_compared_or_not_known(tmp_path: Path) -> None:
    first = results(tmp_path)
    second = changed(first, "benchmarks", value=first["benchmarks"][1:])
    second = {name: value for name, value in second.items() if name not in ("dtype", "decoding", "image_options")}
    notes = compare(first, {**second, "answers": "a.jsonl", "versions": {"bpo": "2.0"}})["notes"]
    assert [note.split(":")[0] for note in notes] == [
        "only in the first result",
        "the second result's answers came from a file",
        "scored by different versions",
    ]
    with pytest.raises(UnlikeResults, match="no benchmark is in both results: chair and pope"):
        compare(changed(first, "benchmarks", value=first["benchmarks"][:1]), second)


def test_the_command_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = results(tmp_path)
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, tree in zip(paths, (first, results(tmp_path, TRAINED)), strict=True):
        path.write_text(json.dumps(tree))
    command = ["evaluate", "--compare", *map(str, paths)]
    assert main([*command, "--json", str(tmp_path / "d.json")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["unreadable"])
    assert line.split()[1:5] == ["0.0", "0.0", "0.0", "[0.0,"] and line.endswith("lower is better")
    assert json.loads((tmp_path / "d.json").read_text())["benchmarks"]["pope"]["accuracy"]["second"] == 1
    paths[1].write_text(json.dumps(changed(first, "dtype", value="float32")))
    assert main(command) == 2 and "not comparable" in capsys.readouterr().err
    paths[1].write_text("{}")
    assert main(command) == 1 and "b.json is not a results file" in capsys.readouterr().err


def test_verdicts_about_two_models_are_compared(tmp_path: Path) -> None:
    """Their files differ, as the answers do."""
    trees = []
    for name, label in (("base", 1), ("trained", 0)):
        path = tmp_path / f"{name}.jsonl"
        sentences = [{"sentence": f"A dog of {name}.", "label": label, "category": "object"}]
        path.write_text(json.dumps({"id": "1", "image": "a.jpg", "sentences": sentences}) + "\n")
        benchmark = make_benchmark({"type": "verifier", "verdicts": str(path)})
        tree = results(tmp_path / name)
        trees.append({**tree, "benchmarks": [score_benchmark(benchmark, [f"A dog of {name}."]).to_json()]})
    found = compare(*trees)["benchmarks"]["verifier"]
    assert found["hallucinated_sentences"]["difference"] == -1 and "category/object" not in found
