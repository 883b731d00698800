"""The plan of benchmarks/gpu.py: which parts run, in which order, what holds them up, and how a run goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_set import recorder, results, session
from benchmarks.gpu_set.parts import Part, Place, Setting, build_parts, why_no_interpreter
from benchmarks.gpu_set.process import Caches
from benchmarks.gpu_set.session import Clock, run_parts, unmet, why_not
from bpo_kernels.bench.cases import OPERATIONS, TEST_FILES

CUDA, REHEARSAL = Setting("cuda", False), Setting("cpu", True)
TARGET_PARTS = ("head", "head-loss", "gather", "pair-loss", "attention", "levers", "step")


def part(name: str, code: str = "", **fields: Any) -> Part:
    """A part that runs `code` with the path of its report as its argument."""

    def command(setting: Setting, place: Place) -> list[str]:
        return [sys.executable, "-c", code, str(place.report)]

    return Part(name, f"the part {name}", command, **{"estimate_s": 1.0, "limit_s": 60.0} | fields)


def record_of_tests(**failed: int) -> dict[str, Any]:
    """`failed`: how many tests fail by the stem of their file."""
    names = [name for names in TEST_FILES.values() for name in names]
    files = {f"tests/kernels/{name}": {"failed": failed.get(name.removesuffix(".py"), 0)} for name in names}
    return {"status": "failed" if failed else "passed", "report": files}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs parts into a report, within `total_s`; returns the report and how often it was saved."""

    def start(
        parts: list[Part], total_s: float = 60.0, records: dict | None = None, **options: Any
    ) -> tuple[dict, list]:
        report: dict[str, Any] = {"parts": records or {}}
        saved: list[list[str]] = []
        caches = Caches(tmp_path / "extensions", tmp_path / "inductor")
        clock = Clock(time.monotonic(), total_s)
        save = lambda: saved.append(list(report["parts"]))  # noqa: E731
        setting = options.pop("setting", REHEARSAL)
        run_parts(parts, setting, report, clock, caches, tmp_path, save, **options)
        return report["parts"], saved

    return start


def test_parts_are_in_the_order_of_their_worth_and_the_targets_fit_the_time() -> None:
    parts = build_parts(CUDA)
    names = [part.name for part in parts]
    assert names[:10] == ["smoke", "operation-tests", "gpu-tests", *TARGET_PARTS] and len(set(names)) == len(names)
    first = sum(part.estimate_s for part in parts[:10])
    assert first <= gpu.TOTAL_SECONDS["cuda"] - session.RESERVE_SECONDS
    assert all(part.estimate_s < part.limit_s for part in parts)
    known = set(names)
    assert {need.partition(":")[0] for part in parts for need in part.needs} <= known


def test_the_parts_ask_for_every_operation_shape_and_provider_of_the_targets(tmp_path: Path) -> None:
    place = Place(tmp_path / "r.json", tmp_path, 100.0)
    commands = {part.name: part.command(CUDA, place) for part in build_parts(CUDA)}
    for name, words in {
        "head": "linear_logprob llava-1.5-7b qwen2.5-vl-7b 2048 bpo eager cce trl-chunked liger bpo-fused frozen",
        "head-loss": "linear_preference_loss llava-1.5-7b qwen2.5-vl-7b 2048 bpo eager trl-chunked",
        "gather": "logprob_gather 8192 bpo eager",
        "pair-loss": f"preference_loss {4 << 20} bpo eager",
        "step": "llava-1.5-7b bpo full",
        "levers": "--levers llava-1.5-7b-4l 18 144 none",
        "levers-qwen": "--levers qwen2.5-vl-7b-4l none",
        "levers-7b": "--levers llava-1.5-7b full auto all",
        "quack": "linear_logprob bpo quack",
        "head-llama": "llama-3-8b",
    }.items():
        assert set(words.split()) <= set(commands[name]), name
    # Both kinds of logits, so that the worst case is known.
    assert "--logits" not in commands["head"] and commands["head"][commands["head"].index("--seconds") + 1] == "85.0"
    environment = dict(next(part for part in build_parts(CUDA) if part.name == "operation-tests").environment)
    assert environment == {"KERNEL_TEST_DEVICE": "cuda", "BPO_KERNELS": "triton"}


def test_a_rehearsal_has_the_same_parts_with_nothing_on_cuda(tmp_path: Path) -> None:
    place = Place(tmp_path / "r.json", tmp_path, 100.0)
    assert [part.name for part in build_parts(REHEARSAL)] == [part.name for part in build_parts(CUDA)]
    for rehearsed in build_parts(REHEARSAL):
        assert "cuda" not in [*rehearsed.command(REHEARSAL, place), *dict(rehearsed.environment).values()]


def test_workers_are_as_many_as_the_cores_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path / "r.json", tmp_path, 100.0)
    tests = {part.name: part for part in build_parts(CUDA)}
    for cores, wanted in ((16, ["12", "8"]), (3, ["3", "3"]), (1, [])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: range(cores))
        commands = [tests[name].command(CUDA, place) for name in ("operation-tests", "gpu-tests")]
        found = [words[words.index("-n") + 1] for words in commands if "-n" in words]
        assert found == wanted


def test_a_red_file_holds_up_only_the_benchmarks_of_its_operation() -> None:
    records = {"operation-tests": record_of_tests(test_logprob_gather=3, test_preference_sizes=1)}
    held_up = {part.name: reason for part in build_parts(CUDA) if (reason := unmet(part, records))}
    assert set(held_up) == {"gather", "gather-rows", "pair-loss"}
    assert held_up["gather"] == "3 tests of logprob_gather fail"
    assert why_not(build_parts(CUDA)[5], CUDA, records, 500.0) == ("not run", held_up["gather"])


def test_tests_that_were_stopped_or_not_run_hold_up_nothing() -> None:
    for records in (
        {},
        {"operation-tests": {"status": "stopped", "report": {}}},
        {"operation-tests": record_of_tests()},
    ):
        assert not [part.name for part in build_parts(CUDA) if unmet(part, records)]
    assert unmet(part("b", needs=("a",)), {"a": {"status": "failed", "report": None}}) == "a failed"


def test_what_is_not_installed_is_skipped_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "trl-liger" not in build_parts(CUDA)[8].command(CUDA, Place(Path("r"), Path("t"), 1.0))
    skipped = {part.name: why_not(part, CUDA, {}, 500.0) for part in build_parts(CUDA) if part.why_skipped()}
    assert set(skipped) == {"step", "step-trl", "step-3", "quack"}
    status, reason = skipped["step"] or ("", "")
    assert status == "skipped" and reason.startswith("not installed: trl, datasets, pyarrow, pandas; pip install")


def test_the_step_is_beside_ligers_layers_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    place = Place(Path("report.json"), Path("tmp"), 1.0)
    commands = {part.name: part.command(CUDA, place) for part in build_parts(CUDA)}
    assert commands["step"][-3:] == ["--providers", "bpo", "trl-liger"]
    assert commands["step-trl"][-3:] == ["--providers", "bpo", "trl"]


def test_a_part_that_cannot_end_in_time_is_not_begun() -> None:
    late = part("late", estimate_s=100.0)
    assert why_not(late, CUDA, {}, 51.0) is None
    assert why_not(late, CUDA, {}, 49.0) == ("not run", "only 49 s left, it takes about 100")


def test_a_failed_part_stops_no_other_and_each_is_saved(run: Any) -> None:
    write = "import sys; open(sys.argv[1], 'w').write('{\"n\": 1}')"
    parts = [part("bad", "print('its error'); raise SystemExit(1)"), part("good", write), part("empty")]
    records, saved = run(parts)
    assert {name: record["status"] for name, record in records.items()} == {
        "bad": "failed",
        "good": "passed",
        "empty": "passed",
    }
    assert records["bad"]["output_tail"] == "its error\n" and records["good"]["report"] == {"n": 1}
    assert saved == [["bad"], ["bad", "good"], ["bad", "good", "empty"]]


def test_the_whole_ends_in_time_and_the_rest_is_listed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "RESERVE_SECONDS", 26.0)
    stubborn = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').write('{\"n\": 1}'); time.sleep(60)"
    )
    begin = time.monotonic()
    records, _ = run([part("long", stubborn), part("late"), part("later")], total_s=30.0)
    assert time.monotonic() - begin < 30.0
    assert [record["status"] for record in records.values()] == ["stopped", "not run", "not run"]
    assert records["long"]["report"] == {"n": 1} and "s left" in records["late"]["reason"]


def test_on_a_gpu_a_part_has_a_limit_of_its_own(run: Any) -> None:
    begin = time.monotonic()
    sleeps = part("sleeps", "import time; time.sleep(60)", limit_s=1.5)
    records, _ = run([sleeps, part("next")], total_s=200.0, setting=CUDA)
    assert time.monotonic() - begin < 50  # it would sleep for 60
    assert [record["status"] for record in records.values()] == ["stopped", "passed"]


def test_a_killed_part_leaves_no_lock_for_the_next(run: Any) -> None:
    lock = "import os, pathlib, sys, time; p = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'op', 'lock')\n"
    compiles = f"{lock}p.parent.mkdir(parents=True); p.touch(); time.sleep(60)"
    sees = f"{lock}raise SystemExit(p.exists() or not p.parent.exists())"
    records, _ = run([part("compiles", compiles, limit_s=3.0), part("sees", sees)], setting=CUDA, total_s=200.0)
    assert [record["status"] for record in records.values()] == ["stopped", "passed"]


def test_passed_parts_are_kept_and_the_others_run_again(run: Any) -> None:
    fails = "raise SystemExit(1)"
    records, _ = run([part("a"), part("b", fails)])
    kept = records["a"]
    records, saved = run([part("a", fails), part("b")], records=records, skip_done=True)
    assert records["a"] is kept and records["b"]["status"] == "passed" and len(saved) == 1
    # Without --skip-done it runs again, and a failure does not take the place of what was measured.
    records, _ = run([part("a", fails)], records=records)
    assert records["a"] is kept


def test_only_a_report_of_the_same_device_and_commit_goes_on(tmp_path: Path) -> None:
    machine = {"device": "a GPU", "commit": "abc"}
    report = {"format": results.FORMAT, "date": "2026-01-02", "device": "cuda", "quick": False, "machine": machine}
    report |= {"parts": {"smoke": {"status": "passed"}}}
    assert results.earlier(report, tmp_path) is None
    path = results.path_of(report, tmp_path)
    assert path.name == "gpu-a-gpu-20260102.json"
    results.write_report(path, report, "a page")
    assert results.earlier(report, tmp_path) == (path, report)
    (tmp_path / "gpu-other-20270101.json").write_text('{"format": 1}')
    assert results.earlier(report, tmp_path) == (path, report)
    other = report | {"machine": machine | {"commit": "def"}}
    assert results.earlier(other, tmp_path) is None
    with pytest.raises(ValueError, match="cannot be merged: machine.commit is abc and def"):
        results.merge([report, other])
    second = report | {"date": "2026-01-03", "parts": {"smoke": {"status": "failed"}, "head": {"status": "passed"}}}
    merged = results.merge([report, second])
    assert {name: record["status"] for name, record in merged["parts"].items()} == {"smoke": "passed", "head": "passed"}
    assert merged["date"] == "2026-01-03" and set(report["parts"]) == {"smoke"}
    with pytest.raises(ValueError, match="is not a report of benchmarks/gpu.py"):
        results.load(tmp_path / "gpu-other-20270101.json")


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one", "xdist"])
def test_outcomes_of_tests_are_written_as_they_come(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_a.py").write_text(
        "import os, pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('its message')\ndef test_setup(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import no_such_module\n")
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_set.recorder", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    environment = os.environ | {recorder.LINES_VARIABLE: str(lines), "PYTHONPATH": str(gpu.ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    subprocess.run([*command, *workers, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True)
    with lines.open("a") as file:
        file.write('{"file": "test_c.py", "na')  # killed while writing
    found = {Path(file).name: counts for file, counts in recorder.summary(lines).items()}
    assert set(found) == {"test_a.py", "test_b.py"}
    assert [found["test_a.py"][key] for key in ("passed", "failed", "skipped")] == [1, 2, 1]
    assert found["test_a.py"]["reasons"] == ["Skipped: no GPU"] and found["test_b.py"]["failed"] >= 1
    messages = " ".join(failure["message"] for failure in found["test_a.py"]["failures"])
    assert "assert 1 == 2" in messages and "its message" in messages
    assert recorder.summary(tmp_path / "none") == {}


def test_without_a_gpu_it_says_so_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("something was run"))
    assert gpu.main([]) == 2 and gpu.main(["--check"]) == 2
    assert "no CUDA GPU here: nothing was run" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu"], "add --quick, and --out DIR"),
        (["--device", "cpu", "--quick"], "add --quick, and --out DIR"),
        (["--seconds", "0"], "--seconds 0: use a positive number"),
        (["--only", "head", "heads"], "--only head heads: no such part; the parts are smoke, ".replace("head ", "")),
    ],
)
def test_options_that_make_no_sense_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(argv)
    assert message in capsys.readouterr().err


def test_the_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [part.name for part in build_parts(CUDA)]


def test_interpreters_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton": "3.6.0", "numpy": "2.5.2"}
    monkeypatch.setattr(importlib.metadata, "version", lambda package: versions[package])
    assert "triton 3.6.0 does not run with numpy 2.5.2" in (why_no_interpreter() or "")
    (smoke, *_) = build_parts(REHEARSAL)
    assert smoke.environment == ()
    versions["triton"] = "3.7.1"
    assert why_no_interpreter() is None
    assert dict(build_parts(REHEARSAL)[0].environment)["TRITON_INTERPRET"] == "1"


def test_two_parts_on_a_cpu_and_the_same_report_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself, as from an uninstalled checkout: the smoke launches and one benchmark, then a second run."""
    argv = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert gpu.main([*argv, "--only", "smoke", "pair-loss"]) == 0
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    report = json.loads(path.read_text())
    assert {name: record["status"] for name, record in report["parts"].items()} == {
        "smoke": "passed",
        "pair-loss": "passed",
    }
    lines = report["parts"]["smoke"]["report"]["lines"]
    assert {line["operation"] for line in lines} == {*OPERATIONS, "lora_linear"}
    assert {line["status"] for line in lines} == {"ok"}
    assert all(line["median_ms"] > 0 for line in report["parts"]["pair-loss"]["report"]["results"])
    page = path.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out and "no figure below is a measurement" in page
    assert gpu.main([*argv, "--only", "smoke", "pair-loss", "--skip-done"]) == 0
    assert "smoke: skipped, it has already passed" in capsys.readouterr().out
    assert json.loads(path.read_text()) == report
    assert gpu.main(["--report", str(path)]) == 0
    assert capsys.readouterr().out == page + "\n"


def test_a_failing_launch_is_one_line_and_the_rest_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_set import smoke
    from bpo_kernels import dispatch

    right = dispatch.preference_loss

    def broken(*args: Any, **options: Any) -> Any:
        loss_type = options.get("loss_type")
        if loss_type == "hinge":
            raise RuntimeError("out of resources:\n shared memory")
        losses_P, *rewards = right(*args, **options)
        return (losses_P + (loss_type == "ipo"), *rewards)

    monkeypatch.setattr(dispatch, "preference_loss", broken)
    monkeypatch.setenv("BPO_KERNELS", "plain")
    report = tmp_path / "smoke.json"
    assert smoke.main(["--device", "cpu", "--json", str(report)]) == 1
    lines = json.loads(report.read_text())["lines"]
    failed = {line["name"]: line["note"] for line in lines if line["status"] == "failed"}
    assert failed["hinge, with offsets"] == "RuntimeError: out of resources: shared memory"
    assert failed["ipo, with offsets"] == "off by 1 (at most 0.001)" and len(failed) == 2 < len(lines) - 5


@pytest.mark.skipif(why_no_interpreter() is not None, reason=why_no_interpreter() or "")
def test_every_kernel_is_launched_by_the_smoke_part() -> None:
    code = (
        "import sys\nfrom triton.runtime.interpreter import InterpretedFunction\nlaunched = set()\n"
        "right = InterpretedFunction.__getitem__\n"
        "def recording(self, grid):\n    launched.add(self.fn.__name__)\n    return right(self, grid)\n"
        "InterpretedFunction.__getitem__ = recording\n"
        "from benchmarks.gpu_set import smoke\nstatus = smoke.main(['--device', 'cpu'])\n"
        "print('launched', *launched)\nsys.exit(status)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "BPO_KERNELS": "triton", "PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    launched = set(done.stdout.splitlines()[-1].split()[1:])
    sources = [path.read_text() for path in (gpu.ROOT / "kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert len(kernels) > 8 and kernels <= launched, f"never launched: {sorted(kernels - launched)}"


def test_parts_of_a_stopped_benchmark_keep_what_it_had(tmp_path: Path, run: Any) -> None:
    """A report of `kernels/bench.py` is written after every case."""
    code = "import sys, time; open(sys.argv[1], 'w').write('{\"results\": [1]}'); time.sleep(60)"
    records, _ = run([replace(part("slow", code), limit_s=2.0)], setting=CUDA, total_s=100.0)
    assert records["slow"]["status"] == "stopped" and records["slow"]["report"] == {"results": [1]}
