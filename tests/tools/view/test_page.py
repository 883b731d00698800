"""Contents of the files of a page, for ordinary and hostile data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bpo.tools.charts import columns, range_bars, share_bars
from bpo.tools.view.build import BATCH_RECORDS, BATCHES_AHEAD, Task, Worker, in_order
from bpo.tools.view.run import main
from tests.tools.view.sample_page import HOSTILE, entries, group, view, write_lines, write_pictures


def record(number: int, **more: Any) -> dict[str, Any]:
    completions = [{"response": "A dog.", "score": 1, "type": "gt"}, {"response": "A cat.", "score": 0, "type": "x"}]
    return {"id": f"g{number}", "images": ["0.png"], "prompt": "Describe.", "completions": completions, **more}


def test_no_text_of_the_data_is_in_the_html_and_none_ends_a_script(page: Path) -> None:
    assert "pwned" not in (page / "index.html").read_text()
    scripts = [path.read_text(encoding="ascii") for path in (page / "data").iterdir()]
    assert any("pwned" in script for script in scripts) and not any("<" in script for script in scripts)


def test_weakened_pictures_are_made_from_the_provenance(page: Path) -> None:
    names = ("0000000-0.jpg", "0000000-0-2.jpg")
    clean, weak = (np.asarray(Image.open(page / "images" / name)).astype(int) for name in names)
    assert clean.std() < 5 and weak.std() > 40
    assert clean.shape == weak.shape == (90, 120, 3)


def test_a_provenance_of_any_values_is_shown(tmp_path: Path) -> None:
    """A seed need not be a number, and a seed beyond 53 bits is shown with all digits."""
    write_pictures(tmp_path)
    kinds = [{"seed": "7", "noise_step": "x"}, {"seed": 2**60 + 1, "noise_step": 5000}, {"seed": [1], "noise_step": 3}]
    more = [{"response": "A.", "score": 0, "type": "x", "provenance": {"source": "weakened-image", **k}} for k in kinds]
    groups = [record(0, completions=[*record(0)["completions"], *more])]
    completions = entries(view(write_lines(tmp_path / "g.jsonl", groups)))[0]["completions"]
    assert [c["provenance"]["seed"] for c in completions[2:]] == ["7", str(2**60 + 1), "[1]"]


def test_every_image_of_a_record_is_shown_with_its_weakened_version(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    noise = {"source": "weakened-image", "noise_step": 900, "seed": 1}
    completions = [*record(0)["completions"], {"response": "B.", "score": 0, "type": "y", "provenance": noise}]
    groups = [
        record(0, images=["0.png", "1.png"], completions=completions),
        record(1, images=["0.png", "no.png", "../x.png"]),
    ]
    first, second = entries(view(write_lines(tmp_path / "g.jsonl", groups)))
    assert [image["path"] for image in first["images"]] == ["images/0000000-0.jpg", "images/0000000-1.jpg"]
    paths = first["weakened"]["2"]["paths"]
    one, two = (np.asarray(Image.open(tmp_path / "page" / path)).astype(int) for path in paths)
    assert np.abs(one - two).mean() > 20
    assert [bool(image["path"]) for image in second["images"]] == [True, False, False]
    assert "missing" in second["images"][1]["error"] and "leads out" in second["images"][2]["error"]


def test_unusual_groups(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    one = {"response": "A dog.", "score": 1, "type": "gt"}
    turns = [
        {"role": r, "content": t}
        for r, t in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "?"))
    ]
    groups = [
        record(0, images=[], prompt="No picture."),
        record(1, completions=[one, {**one, "response": "A hound."}]),
        record(2, completions=[one, {**one, "response": "A hound."}, {**one, "score": -2.5, "response": "A cat."}]),
        record(3, prompt=turns),
        record(4, completions=[one, *({**one, "score": -n, "response": f"{n} cats"} for n in range(1, 11))]),
        record(5, completions=[{**one, "response": "w " * 5000}, {**one, "score": 0, "response": "v " * 5000}]),
    ]
    none, equal, positives, several, many, long = entries(view(write_lines(tmp_path / "g.jsonl", groups)))
    assert none["images"] == [] and none["note"] == ""
    assert equal["note"] == "no pair: all scores are equal"
    assert [c["best"] for c in positives["completions"]] == [True, True, False]
    assert [turn["role"] for turn in several["prompt"]] == ["system", "user", "assistant", "user"]
    assert len(many["completions"]) == 11 and long["completions"][1]["words"] == 5000


FORMS: dict[str, list[Any]] = {
    "paper.json": [{"prompt": "<image>\nWhat?", "image": "0.png", "completions": record(0)["completions"]}],
    "trl.jsonl": [{"prompt": "What?", "chosen": "A dog.", "rejected": "A cat.", "images": ["0.png"]}],
    "rlhf-v.jsonl": [
        {
            "ds_name": "x",
            "image": "0.png",
            "text": json.dumps({"question": "What?", "chosen": "A dog.", "rejected": "A cat."}),
        }
    ],
    "rlaif-v.jsonl": [{"question": "What?", "chosen": "A dog.", "rejected": "A cat.", "image": "0.png"}],
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_groups_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path)
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(FORMS[name]))
    else:
        write_lines(path, FORMS[name])
    (entry,) = entries(view(path))
    assert entry["images"][0]["path"] and "What?" in entry["prompt"][0]["text"]
    assert [["x", "dog"], ["~", "cat", "cat"]] == entry["completions"][1]["segments"][1:3]


def test_annotations_are_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"id": "1", "images": ["0.png"], "prompt": "?", "response": "A dog."}])
    assert main([str(data), "--out", str(tmp_path / "page")]) == 1
    assert "with bpo bootstrap" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main([str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "page")]) == 1
    assert "has no records" in capsys.readouterr().err


# ---------------------------------------------------------------- statistics

SUMMARY = {
    "kept": {"weaken": 30, "inject": 20},
    "refused": {"inject": {"unchanged": 7, HOSTILE: 1}, "annotation": {"too-long": 2}},
    "statistics": {
        "weaken": {
            "negatives": 30,
            "words": {"p5": 4, "p50": 11, "p95": 23},
            "similarity_histogram": [0, 0, 1, 2, 3, 4, 8, 7, 5, 0],
            "kinds_of_change": {"object": 25, "count": 5},
            "objects_added": {"zebra": 9, HOSTILE: 1},
            "objects_dropped": {"dog": 8},
        },
        "inject": {"words": {"p5": None, "p50": None, "p95": None}, "objects_added": [], "similarity_histogram": "x"},
    },
}


def test_the_figures_of_each_source_are_plotted_from_the_summary(data: Path) -> None:
    (data.parent / "groups.jsonl.summary.json").write_text(json.dumps(SUMMARY))
    page = (view(data, "--no-images") / "index.html").read_text()
    blocks = {m[1]: m[2] for m in re.finditer(r'<details class="source"><summary><b>(.*?)</b>(.*?)</details>', page)}
    assert list(blocks) == ["weaken (mllm-hal)", "inject (llm-hal)", "annotation"]
    weaken = blocks["weaken (mllm-hal)"]
    assert "30 kept" in weaken and "4 / 11 / 23 (p5 / p50 / p95)" in weaken
    for title in ("Similarity to the annotation", "Negatives by kind of change", "Objects added", "Objects dropped"):
        assert f"<figcaption>{title}" in weaken
    assert "60 % or more: 8" in weaken and "object 25; count 5" in weaken and "zebra" in weaken
    assert "20 kept · 8 refused (29 %)" in blocks["inject (llm-hal)"] and "too-long 2" in blocks["annotation"]
    assert "<script>window" not in page and page.count("<script") == 3


def test_without_a_summary_the_figures_are_counted(data: Path) -> None:
    folder = view(data, "--no-images")
    figures = json.loads((folder / "statistics.json").read_text())
    assert figures["words"]["mllm-hal"] == {"p5": 2, "p50": 2, "p95": 2} and figures["completions"]["llm-hal"] == 60
    assert figures["sources"][0]["added"]["zebra"] == 59
    page = (folder / "index.html").read_text()
    blocks = {m[1]: m[2] for m in re.finditer(r'<details class="source"><summary><b>(.*?)</b>(.*?)</details>', page)}
    assert list(blocks) == ["llm-hal", "mllm-hal"]
    assert "60 kept · 1 refused" in blocks["llm-hal"] and "zebra 59" in blocks["llm-hal"]
    assert "gt 5, 5, 5; llm-hal 5, 5, 5; mllm-hal 2, 2, 2" in page  # words


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"statistics": 3, "kept": [], "refused": {"a": 1}}', '{"kept": {"weaken": -1}}']
)
def test_an_invalid_summary_is_ignored(data: Path, text: str) -> None:
    (data.parent / "groups.jsonl.summary.json").write_text(text)
    page = view(data, "--no-images")
    assert len(entries(page)) == 61 and '<details class="source"' in (page / "index.html").read_text()


def test_empty_charts_and_charts_of_hostile_names_are_well_formed() -> None:
    for chart in (
        columns("t", [], {}),
        share_bars("t", []),
        range_bars("t", []),
        range_bars("t", [(HOSTILE, (0, 0, 0))]),
    ):
        assert chart.startswith("<svg") and chart.endswith("</svg>") and "<script>" not in chart
    assert 'aria-label="t: a 1, 2, 3"' in range_bars("t", [("a", (1, 2, 3))])


# ---------------------------------------------------------------- folders, names, samples


def test_a_folder_with_other_files_is_not_touched(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data.parent / "mine").mkdir()
    (data.parent / "mine" / "thesis.txt").write_text("x")
    assert main([str(data), "--no-images", "--out", str(data.parent / "mine")]) == 1
    assert "contains files that are not a page" in capsys.readouterr().err
    assert [p.name for p in (data.parent / "mine").iterdir()] == ["thesis.txt"]


def test_a_page_may_be_made_again_and_a_sample_is_the_same_each_time(data: Path) -> None:
    ids = []
    for _ in range(2):
        page = view(data, "--no-images", "--limit", "7")
        ids.append([entry["id"] for entry in entries(page)])
    assert ids[0] == ids[1] == sorted(ids[0]) and len(ids[0]) == 7
    assert view(data, "--no-images", "--limit", "600") and len(entries(page)) == 60


def test_an_interrupted_build_leaves_no_page_and_can_be_repeated(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = view(data, "--no-images")
    with monkeypatch.context() as patch:
        patch.setattr("bpo.tools.view.page.PageWriter.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([str(data), "--no-images", "--out", str(page)]) == 130
        assert not (page / "index.html").exists()
        assert main([str(data), "--no-images", "--out", str(data.parent / "new")]) == 130
    assert main([str(data), "--no-images", "--out", str(data.parent / "new")]) == 0


@pytest.mark.parametrize("name", ["my groups é.jsonl", "{{charts}}<b>.jsonl", "a#b?c%20d.jsonl", "\udcff.jsonl"])
def test_a_file_of_any_name(data: Path, name: str) -> None:
    page = (view(data.rename(data.parent / name), "--no-images") / "index.html").read_text()
    title = re.search(r"<title>(.*?)</title>", page)
    shown = os.fsencode(name).decode("utf-8", "replace").replace("<", "&lt;").replace(">", "&gt;")
    assert title and title[1] == shown


def test_processes_give_the_same_page(data: Path) -> None:
    first = entries(view(data))
    assert (
        main([str(data), "--image-root", str(data.parent), "--out", str(data.parent / "page"), "--workers", "2"]) == 0
    )
    assert entries(data.parent / "page") == first


@pytest.mark.parametrize("num_processes", [1, 2])
def test_records_are_taken_a_few_at_a_time(tmp_path: Path, num_processes: int) -> None:
    taken = 0

    def tasks() -> Iterator[Task]:
        nonlocal taken
        for number in range(400):
            taken += 1
            yield Task(number, group(number, "A dog.", {"llm-hal": "A cat."}), [], [])

    ahead = []
    for number, entry in enumerate(in_order(Worker(None, tmp_path, ""), tasks(), num_processes)):
        assert entry["id"] == f"r{number:03}"
        ahead.append(taken - number)
    assert len(ahead) == 400 and max(ahead) <= BATCH_RECORDS * (BATCHES_AHEAD * num_processes + 1)
