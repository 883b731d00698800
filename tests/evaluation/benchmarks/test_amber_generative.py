"""AMBER's generative figures: by hand, by a plain definition, and by the official script where it is."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks import amber_generative
from bpo.evaluation.benchmarks.amber_generative import AmberGenerativeBenchmark, AmberGenerativeOptions
from bpo.evaluation.benchmarks.registry import BENCHMARKS
from bpo.evaluation.intervals import count_units
from bpo.evaluation.tagging import Words
from tests.evaluation.benchmarks.amber_folder import IGNORED, RELATIONS, write_folder

# Pairs of words whose vectors count as similar, in either order.
ALIKE = {("hound", "dog"), ("ship", "boat"), ("kitten", "cat"), ("kitten", "puppy"), ("screen", "sky"), ("man", "cat")}
KNOWN = {*RELATIONS, *(word for related in RELATIONS.values() for word in related)}


def similarity(first: str, second: str) -> float:
    if first == second:
        return 1.0
    return 0.9 if (first, second) in ALIKE or (second, first) in ALIKE else 0.8  # 0.8 itself is not similar


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Every word is a noun; the model is called fake-1."""
    found = Words(lambda text: re.findall(r"\w+", text), similarity)
    monkeypatch.setattr(amber_generative, "prepare_words", lambda model, tagger: ("fake-1", lambda: found))
    return found


def scores(subject: AmberGenerativeBenchmark, answers: list[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def read(folder: Path, **options: Any) -> AmberGenerativeBenchmark:
    return AmberGenerativeBenchmark.read(AmberGenerativeOptions(data=str(folder), **options))


def test_the_four_figures_by_hand(tmp_path: Path, words: Words) -> None:
    subject = read(write_folder(tmp_path / "data", {1: (["person", "dog"], ["TV", "boat"]), 2: (["sky"], ["dog"])}))
    # Image 1: man names the person; shoe is ignored but is a noun; screen and ship likely hallucinations; grass is not
    # in the vocabulary. Image 2: nothing.
    answers = ["man shoe screen ship grass", ""]
    found = scores(subject, answers)
    assert found == pytest.approx(
        {"chair": 2 / 4.001, "cover": 1 / 3.001, "hal": 1 - 1 / 2.001, "cog": 2 / 3.001}, abs=1e-12
    )
    item = subject.score(answers).items[0]
    assert item["nouns"] == [
        ["man", "present"],
        ["shoe", "ignored"],
        ["screen", "hallucinated"],
        ["ship", "hallucinated"],
    ]
    assert (item["covered"], item["cognitive"], item["hallucinated"]) == (
        ["person"],
        ["TV", "boat"],
        ["screen", "ship"],
    )
    assert subject.name == "amber_generative (fake-1)" and item["id"] == "1"


def test_a_likely_hallucination_counts_though_similarity_makes_the_noun_present(tmp_path: Path, words: Words) -> None:
    subject = read(write_folder(tmp_path / "data", {1: (["cat"], ["man"])}))
    item = subject.score(["man"]).items[0]
    assert item["nouns"] == [["man", "present"]] and item["cognitive"] == ["man"] and item["covered"] == ["cat"]


def test_an_exact_word_of_a_present_object_is_never_compared_with_hallucinations(tmp_path: Path, words: Words) -> None:
    subject = read(write_folder(tmp_path / "data", {1: (["dog"], ["dog", "cat"])}))
    assert subject.score(["puppy"]).items[0]["cognitive"] == []


def test_a_related_word_is_tried_before_the_object_itself(tmp_path: Path, words: Words) -> None:
    """`man` is related to `person`, so it covers the person and not the annotated man."""
    subject = read(write_folder(tmp_path / "data", {1: (["person", "man", "man"], [])}))
    assert subject.score(["man"]).items[0]["covered"] == ["person"]


def by_definition(
    nouns: list[str], truth: list[str], hallu: list[str], alike: Callable[[str, str], bool]
) -> tuple[int, int, int, int]:
    """(nouns, hallucinated, covered objects, likely hallucinations named) of one description."""

    def ways(objects: list[str]) -> list[tuple[str, int]]:
        by_relation = [(word, i) for i in range(len(objects)) for word in RELATIONS[objects[i]]]
        return by_relation + [(objects[i], i) for i in range(len(objects))]

    covered, likely, wrong, kept = [False] * len(truth), [False] * len(hallu), 0, 0
    for noun in nouns:
        if noun not in KNOWN:
            continue
        kept += 1
        if noun in IGNORED:
            continue
        same = [i for word, i in ways(truth) if word == noun]
        if same:
            covered[same[0]] = True
            continue
        for test in (lambda word: word == noun, lambda word: alike(noun, word)):  # noqa: B023
            hits = [i for word, i in ways(hallu) if test(word)]
            if hits:
                likely[hits[0]] = True
        near = [i for word, i in ways(truth) if alike(noun, word)]
        if near:
            covered[near[0]] = True
        else:
            wrong += 1
    return kept, wrong, sum(covered), sum(likely)


def test_generated_descriptions_agree_with_the_definition(tmp_path: Path, words: Words) -> None:
    rng = random.Random(3)
    objects = sorted(RELATIONS)
    images = {n: (rng.choices(objects, k=4), rng.sample(objects, 3)) for n in range(1, 401)}
    pool = [*sorted(KNOWN), "hound", "kitten", "grass"]
    answers = [" ".join(rng.choices(pool, k=rng.randrange(9))) for _ in images]
    each = [
        by_definition(answer.split(), *images[n], lambda first, second: similarity(first, second) > 0.8)
        for n, answer in zip(images, answers, strict=True)
    ]
    nouns, wrong, covered, likely = (sum(column) for column in zip(*each, strict=True))
    expected = {
        "chair": wrong / (nouns + 0.001),
        "cover": covered / (4 * len(images) + 0.001),
        "hal": 1 - sum(one[1] == 0 for one in each) / (len(images) + 0.001),
        "cog": likely / (3 * len(images) + 0.001),
    }
    found = scores(read(write_folder(tmp_path / "data", images)), answers)
    assert found == pytest.approx(expected, abs=1e-12) and 0.2 < found["chair"] < 0.8


def test_the_answer_file_is_what_the_official_script_reads(tmp_path: Path, words: Words) -> None:
    subject = read(write_folder(tmp_path / "data", {4: (["dog"], []), 7: (["sky"], [])}))
    suffix, content = subject.answer_file(["Ein Hünd", "b"])
    assert suffix == ".json"
    assert json.loads(content) == [{"id": 4, "response": "Ein Hünd"}, {"id": 7, "response": "b"}]


def test_questions_have_the_suffix_and_files_are_named(tmp_path: Path, words: Words) -> None:
    subject = read(write_folder(tmp_path / "data", {1: (["dog"], [])}), suffix="Be brief.")
    assert subject.questions[0].text == "Describe this image. Be brief."
    assert subject.questions[0].image == "AMBER_1.jpg"
    names = {"query_generative.json", "annotations.json", "relation.json", "safe_words.txt"}
    assert {Path(file).name for file in subject.files} == names


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("annotations.json", lambda t: t.replace('"dog"', '"unicorn"'), "'truth' has 'unicorn', which relation.json"),
        ("annotations.json", lambda t: t.replace('"truth"', '"facts"'), "field 'truth' is None; it must be a list"),
        ("annotations.json", lambda t: t.replace('"id": 1', '"id": 2'), "id 1 is not in "),
        ("relation.json", lambda t: "[]", "relation.json: not an object of word lists"),
        ("query/query_generative.json", lambda t: "[]", "the file contains no question"),
    ],
)
def test_files_of_another_form_are_refused(
    tmp_path: Path, words: Words, file: str, change: Callable[[str], str], message: str
) -> None:
    path = write_folder(tmp_path / "data", {1: (["dog"], [])}) / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "data")


def test_a_missing_file_or_option_is_named(tmp_path: Path, words: Words) -> None:
    (write_folder(tmp_path / "data", {1: (["dog"], [])}) / "safe_words.txt").unlink()
    with pytest.raises(ValueError, match="safe_words.txt cannot be read"):
        read(tmp_path / "data")
    with pytest.raises(ValueError, match="option 'data' is empty"):
        AmberGenerativeBenchmark.read(AmberGenerativeOptions())


# Runs the official script with the given model in place of its own, which is asked once per text.
DRIVER = """
import functools, runpy, sys, spacy
pipeline = spacy.load(sys.argv.pop(1))
spacy.load = lambda name: functools.cache(pipeline)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(
    not {"BPO_AMBER_DIR", "BPO_SPACY_MODEL"} <= os.environ.keys(),
    reason="needs AMBER's repository in BPO_AMBER_DIR, a spaCy model with vectors in BPO_SPACY_MODEL, and NLTK's data",
)
def test_the_official_script_gives_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="the official script tags with NLTK")
    amber, model = Path(os.environ["BPO_AMBER_DIR"]).resolve(), os.environ["BPO_SPACY_MODEL"]
    rng = random.Random(5)
    annotations = {entry["id"]: entry for entry in json.loads((amber / "data/annotations.json").read_text())}
    more = ["Trees", "men", "women", "TVs", "glasses", "leaves", "puppies", "sofas", "red", "lamps", "e-book"]
    entries, expected = [], {}
    for part in ("generative", "discriminative"):
        kind = BENCHMARKS[f"amber_{part}"]
        own = {"spacy_model": model, "tagger": "nltk"} if part == "generative" else {}
        subject = kind.read(kind.Options(data=str(amber / "data"), **own))
        subject = subject.restricted(subject.images[:60])
        answers = []
        for question in subject.questions:
            entry = annotations[int(question.id)]
            if part == "generative":
                pool = [*entry["truth"], *entry["hallu"], *more]
                names = [rng.choice(pool) for _ in range(rng.randrange(8))]
                answers.append(" ".join(f"The {name} is near a {rng.choice(pool)}." for name in names))
            else:
                answers.append(rng.choice(["Yes", "No", "No", "yes", "No.", ""]))
        content = subject.answer_file(answers)
        assert content is not None
        entries += json.loads(content[1])
        sums = count_units(subject.questions, answers, subject.score(answers)).sums()
        expected |= {name: round(100 * float(value), 1) for name, value in subject.metrics(sums).items()}
    (tmp_path / "answers.json").write_text(json.dumps(entries))
    command = [sys.executable, "-c", DRIVER, str(Path(model).resolve() if Path(model).is_dir() else model)]
    command += ["inference.py", "--inference_data", str(tmp_path / "answers.json"), "--evaluation_type", "a"]
    printed = subprocess.run(command, cwd=amber, capture_output=True, text=True, check=True, timeout=600).stdout
    official, group = {}, ""
    for name, value in re.findall(r"^(\w[\w ]*):\s*([\d.]*)", printed, re.MULTILINE):
        if not value:
            # "... Task", then a heading per dimension; the script misspells the first.
            group = "" if name.endswith("Task") else "existence/" if name.startswith("Ex") else f"{name}/"
        else:
            official[f"{group}{name}".lower()] = float(value)
    del expected["unreadable"]
    assert official == expected and len(official) == 32
