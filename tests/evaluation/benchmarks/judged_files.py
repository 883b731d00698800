"""Question files of judged benchmarks in their official forms, with contents of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, tree: Any) -> str:
    """JSON, or JSONL for a list in a file of that name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in tree))
    else:
        path.write_text(json.dumps(tree))
    return str(path)


def mmhal(folder: Path, count: int = 16) -> str:
    records = [
        {
            "question_type": f"kind {number % 8}",
            "image_src": f"https://host/path/{number:02}.jpg",
            "image_content": ["dog", "ball"],
            "question": f"What is at {number}?",
            "gt_answer": f"A dog at {number}.",
            "model_answer": "",
        }
        for number in range(count)
    ]
    return write(folder / "response_template.json", records)


def mmvet(folder: Path) -> str:
    tree = {
        "v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["math", "ocr"]},
        "v1_1": {"imagename": "v1_1.jpg", "question": "Who?", "answer": "a cat<OR>a dog", "capability": ["rec"]},
        "v1_2": {"imagename": "v1_2.jpg", "question": "Where?", "answer": "left", "capability": ["rec", "ocr"]},
    }
    return write(folder / "mm-vet.json", tree)


def llava_bench(folder: Path) -> dict[str, str]:
    """The options that name its files."""
    questions = [
        {"question_id": number, "image": f"{number // 2:03}.jpg", "text": f"Question {number}", "category": category}
        for number, category in enumerate(["conv", "detail", "complex", "conv"])
    ]
    context = [{"image": f"{number:03}.jpg", "caption": ["A dog.", f"Number {number}."]} for number in range(2)]
    rules = {f"llava_bench_{name}": {"role": "Writer", "prompt": f"Rate {name}."} for name in ("conv", "detail")}
    rules["llava_bench_complex"] = {"role": "Thinker", "prompt": "Rate thought."}
    return {
        "questions": write(folder / "questions.jsonl", questions),
        "context": write(folder / "context.jsonl", context),
        "references": write(
            folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}"} for n in range(4)]
        ),
        "rules": write(folder / "rule.json", rules),
    }


def shr(folder: Path) -> dict[str, Any]:
    """The options that name its files."""
    write(
        folder / "image_data.json",
        [{"image_id": n, "url": f"https://host/VG/VG_100K/{n}.jpg", "width": 200, "height": 100} for n in (1, 2, 3)],
    )
    region = {"x": 20, "y": 10, "width": 100, "height": 45, "phrase": "a brown dog"}
    write(
        folder / "region_descriptions.json",
        [{"id": n, "regions": [{**region, "image_id": n}, {**region, "image_id": n, "phrase": ""}]} for n in (1, 2, 3)],
    )
    return {
        "questions": write(folder / "val_images_final.json", [{"image_id": 3}, {"image_id": 1}]),
        "visual_genome": str(folder),
        "facts": [write(folder / "facts.jsonl", [{"3": ["The dog is brown.", "It is day."]}])],
    }
