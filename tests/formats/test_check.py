"""`bpo check`: table, list of bad records and exit status, with one or more processes."""

from __future__ import annotations

import io
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from bpo.cli import main
from bpo.formats import check as check_module
from bpo.formats.check import check_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """50 conversations: every tenth refers to a missing image, one is damaged, two have the same id."""
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    records = []
    for number in range(50):
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": f"A bus {number}."}]
        image = "missing.png" if number % 10 == 0 else "good.png"
        records.append(json.dumps({"id": 3 if number == 7 else number, "image": image, "conversations": turns}))
    records[25] = records[25].replace("human", "hu\x1b[2Jman")
    (tmp_path / "a.json").write_text("[" + ", ".join(records) + "]")
    return tmp_path / "a.json"


def test_results_do_not_depend_on_the_number_of_processes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "BATCH_RECORDS", 7)
    found = []
    for workers in (1, 2):
        quarantine = io.BytesIO()
        result = check_data(data, image_root=data.parent, workers=workers, quarantine=quarantine)
        found.append((result.counts, result.examples, result.num_bad, result.num_records, quarantine.getvalue()))
    assert found[0] == found[1]
    counts, examples, num_bad, num_records, listed = found[0]
    assert counts == {"image-missing": 5, "not-json": 1, "repeated-id": 1} and (num_bad, num_records) == (6, 50)
    assert len(examples["image-missing"]) == 3 and len(listed.splitlines()) == 6
    assert "record 7: id '3' is already used" in examples["repeated-id"][0]


def test_the_command_prints_a_table_and_writes_the_list(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "check",
        str(data),
        "--image-root",
        str(data.parent),
        "--workers",
        "1",
        "--json",
        f"{data}.report.json",
    ]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "50 records (llava, annotations)" in lines[0] and "44 usable, 6 bad" in lines[0]
    assert (
        lines[1].split()[:3] == ["5", "bad", "image-missing:"]
        and "record 0" in lines[2]
        and "check the image" in lines[1]
    )
    assert [line.split()[2] for line in lines[1:-1] if " bad " in line[:20]] == ["image-missing:", "not-json:"]
    assert "repeated-id: " in printed and "\x1b" not in printed
    listed = [json.loads(line) for line in Path(f"{data}.quarantine.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in listed] == ["0", "10", "20", None, "30", "40"]
    report = json.loads(Path(f"{data}.report.json").read_text())
    assert report["counts"]["image-missing"] == 5 and report["num_bad"] == 6
    assert main([*arguments, "--max-bad-share", "0.12"]) == 0
    assert main([*arguments, "--no-images", "--max-bad-share", "0.02"]) == 0
    assert len(Path(f"{data}.quarantine.jsonl").read_text().splitlines()) == 1


def test_an_unreadable_file_is_a_one_line_error_without_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert main(["check", str(tmp_path / "a.json")]) == 1
    assert "bpo check: error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_dead_worker_is_a_one_line_error(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killer = threading.Thread(target=_kill_first_child, daemon=True)
    killer.start()
    assert main(["check", str(data), "--image-root", str(data.parent), "--workers", "2"]) == 1
    killer.join()
    assert "a worker process died" in capsys.readouterr().err
    assert not Path(f"{data}.quarantine.jsonl").exists()


def _kill_first_child() -> None:
    """Kills a worker, as the OOM killer would."""
    while True:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if any("spawn_main" in part for part in child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.01)


def test_the_schema_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record: dict[str, Any] = {"prompt": "What?", "chosen": "A bus.", "images": []}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    result = check_data(tmp_path / "a.json", schema="trl")
    assert result.counts == {"missing-field": 1}
    assert main(["check", str(tmp_path / "a.json"), "--from", "tlr"]) == 1
    assert "unknown format 'tlr'; supported formats: groups, paper" in capsys.readouterr().err
