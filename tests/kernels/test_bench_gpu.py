"""benchmarks/gpu.py as far as a CPU goes: refusal, deadlines, verdicts, and the whole script over tiny shapes.

pytest tests/kernels/test_bench_gpu.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bpo_kernels.bench_measure import Result

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def line(provider: str, median_ms: float, operation: str = "linear_logprob", **others) -> Result:
    variant = {"linear_logprob": "frozen", "linear_preference_loss": "live-frozen"}.get(operation, "gradient")
    labels = {"variant": variant, "shape": "llava-1.5-7b", "num_rows": 2048, "logits": "peaked", "status": "ok"}
    return Result(operation=operation, provider=provider, median_ms=median_ms, **(labels | others))


def verdict_of(gpu, results: list[Result], words: str):
    (verdict,) = (verdict for verdict in gpu.judge(results) if words in verdict.target)
    return verdict


def test_without_a_gpu_it_says_so_and_exits_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run_part", lambda *_, **__: pytest.fail("something was run"))
    assert gpu.main([]) == 2 and gpu.main(["--check"]) == 2
    assert "no CUDA GPU here: nothing was run" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--device", "cpu"], ["--device", "cpu", "--quick"], ["--seconds", "0"]])
def test_a_rehearsal_needs_a_place_of_its_own(gpu, argv):
    with pytest.raises(SystemExit):
        gpu.main(argv)


@pytest.mark.parametrize(
    ("words", "ours", "other", "met"),
    [
        (">= 8x Liger", ("bpo", 1.0), ("liger-dpo", 8.1), True),
        (">= 8x Liger", ("bpo", 1.0), ("liger-dpo", 7.9), False),
        (">= 1.6x cce", ("bpo", 1.0), ("cce", 1.7), True),
        (">= 1.6x cce", ("bpo", 1.0), ("cce", 1.5), False),
        ("within 5 % of quack", ("bpo", 1.04), ("quack", 1.0), True),
        ("within 5 % of quack", ("bpo", 1.06), ("quack", 1.0), False),
        ("nothing slower", ("bpo", 1.0), ("eager", 1.1), True),
        ("nothing slower", ("bpo", 1.0), ("eager", 0.9), False),
    ],
)
def test_speed_targets_are_judged(gpu, words, ours, other, met):
    operation = "linear_preference_loss" if "Liger" in words else "linear_logprob"
    where = "llava" if "nothing" not in words else ""
    results = [line(*ours, operation=operation), line(*other, operation=operation)]
    (verdict,) = (v for v in gpu.judge(results) if words in v.target and where in v.target)
    assert verdict.met is met


def test_shares_are_judged_at_their_worst_case(gpu):
    good, bad = line("bpo", 1.0, gemm_share=0.9), line("bpo", 1.0, gemm_share=0.8, logits="random")
    words = "llava-1.5-7b, N=2048: >= 85 %"
    assert verdict_of(gpu, [good], words).met is True
    assert verdict_of(gpu, [good, bad], words).met is False
    assert verdict_of(gpu, [good, bad], words).measured == "80.0%"
    # Only the largest number of rows says something of bandwidth.
    small = line("bpo", 1.0, "logprob_gather", num_rows=1, copy_share=0.1)
    large = line("bpo", 1.0, "logprob_gather", num_rows=8192, copy_share=0.93)
    assert verdict_of(gpu, [small, large], "logprob_gather").met is True


def test_what_was_not_measured_is_neither_met_nor_missed(gpu):
    assert {(verdict.measured, verdict.met) for verdict in gpu.judge([])} == {("not measured", None)}
    # A provider without a time, another case, and one of our modes in place of the default say nothing.
    results = [line("bpo-store", 1.0), line("cce", 9.0), line("bpo", 1.0, num_rows=128)]
    assert all(verdict.met is None for verdict in gpu.judge(results))
    without_agreement = [line("bpo", 1.0), line("quack", 2.0, status="disagrees")]
    assert verdict_of(gpu, without_agreement, "llava-1.5-7b, N=2048: within 5 % of quack").met is None


def test_a_part_that_overruns_is_ended_with_its_children(gpu, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('under way', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    outcome = gpu.run_part("slow", [sys.executable, "-c", code], 3.0)
    assert outcome.status == "stopped" and time.monotonic() - begin < 10
    assert "under way" in outcome.output_tail
    deadline = time.monotonic() + 5
    while is_running(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(child.read_text()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_end_as_their_process_does(gpu):
    assert gpu.run_part("good", [sys.executable, "-c", "print(1)"], 60.0).status == "passed"
    assert gpu.run_part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60.0).status == "failed"
    assert gpu.run_part("late", ["/does/not/exist"], -1.0).status == "not run"


def test_every_operation_row_and_shape_is_asked_for(gpu):
    asked = {(part.arguments[0], word) for part in gpu.benchmark_parts(quick=False) for word in part.arguments[1:]}
    for operation in ("linear_logprob", "linear_preference_loss", "logprob_gather"):
        for word in ("llava-1.5-7b", "qwen2.5-vl-7b", "llama-3-8b", "1", "128", "2048", "8192"):
            assert (operation, word) in asked, (operation, word)
    assert ("preference_loss", "2048") in asked


def test_red_tests_stop_everything(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: gpu.Outcome(name, "failed", 1.0, "1 failed"))
    monkeypatch.setattr(gpu, "run_benchmarks", lambda *_: pytest.fail("benchmarks were run"))
    monkeypatch.setattr(gpu, "run_step", lambda *_: pytest.fail("the step was run"))
    monkeypatch.setattr(gpu, "run_attention", lambda *_: pytest.fail("attention was run"))
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "nothing is reported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_whole_script_over_tiny_shapes_on_a_cpu(gpu, monkeypatch, tmp_path, capsys):
    """Two of the parts, and a third for which no time is left."""
    every_part = gpu.benchmark_parts(quick=True)
    monkeypatch.setattr(gpu, "benchmark_parts", lambda quick: [every_part[0], every_part[3]])
    run_part = gpu.run_part
    tests = gpu.Outcome("pytest -m gpu", "passed", 1.0, "7 skipped")
    skipped = gpu.Outcome(gpu.STEP_NAME, "not run", 0.0, "no trl"), None, []
    monkeypatch.setattr(gpu, "run_step", lambda *_: skipped)
    monkeypatch.setattr(gpu, "run_part", lambda name, *rest: tests if "pytest" in name else run_part(name, *rest))
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu-cpu-") and path.suffix == ".json"
    report = json.loads(path.read_text())
    assert set(report) == {"date", "machine", "parts", "not_run", "targets", "results", "step", "attention", "memory"}
    assert [part["status"] for part in report["parts"]] == ["passed", "not run", "passed", "passed", "passed", "passed"]
    attention = {line["provider"]: line for line in report["attention"]["results"]}
    assert attention["sdpa"]["median_ms"] > 0 and attention["separate"]["median_ms"] > 0
    for name in ("flash", "flex"):  # with the reason
        assert attention[name]["status"] == "skipped" and f"model.attention is {name}, but" in attention[name]["note"]
    assert [abs(one["error"]) < 0.1 for one in report["memory"]["outcomes"]] == [True]
    assert f"{gpu.STEP_NAME}: not run" in report["not_run"]
    assert {result["operation"] for result in report["results"]} == {"linear_logprob", "preference_loss"}
    assert all(result["median_ms"] > 0 for result in report["results"] if result["status"] == "ok")
    # One row makes no pair, and a CPU meets no target of a GPU.
    assert [line for line in report["not_run"] if "preference_loss gradient N=1" in line]
    assert {target["met"] for target in report["targets"]} == {None}
    output = capsys.readouterr().out
    assert "| target | measured (worst case) | met |" in output and "| linear_logprob frozen | tiny | 32 |" in output


def test_parts_without_time_are_listed_as_not_run(gpu):
    parts = gpu.benchmark_parts(quick=True)[:2]
    outcomes, results, not_run = gpu.run_benchmarks(parts, "cpu", True, lambda: -1.0)
    assert [outcome.status for outcome in outcomes] == ["not run", "not run"]
    assert results == [] and not_run == [f"{part.name}: not run, no case was reached" for part in parts]


def test_the_step_is_skipped_with_a_reason_where_trl_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "run_part", lambda *_, **__: pytest.fail("it was run"))
    outcome, report, verdicts = gpu.run_step(True, 100.0)
    assert outcome.status == "not run" and "trl is not installed: pip install" in outcome.output_tail
    assert report is None and verdicts == []


def test_the_steps_report_and_verdicts_are_kept_when_it_is_stopped(gpu, monkeypatch):
    """Its folder, where a killed benchmark leaves its model, is gone afterwards."""
    places = []

    def stopped(name, command, seconds, **environment):
        places.append(Path(environment["TMPDIR"]))
        (places[0] / "model").write_text("14 GB")
        target = {"target": "2 completions: FLOPs", "measured": "0.377", "met": True}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"cases": [{"targets": [target]}]}))
        return gpu.Outcome(name, "stopped", seconds)

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu, "run_part", stopped)
    outcome, report, verdicts = gpu.run_step(False, 100.0)
    assert outcome.status == "stopped" and len(report["cases"]) == 1
    assert [(one.measured, one.met) for one in verdicts] == [("0.377", True)]
    assert not places[0].exists()


def test_cases_before_the_kill_are_kept_and_the_rest_is_listed(tmp_path):
    """The report is written after every case, so a process that is killed leaves what it had."""
    report = tmp_path / "report.json"
    command = [sys.executable, "kernels/bench.py", "preference_loss", "--rows", "64", "128", "--device", "cpu"]
    command += ["--providers", "eager", "--sample-seconds", "0", "--without-tests", "--json", str(report)]
    code = (
        "import sys; sys.argv = sys.argv[1:]\n"
        "from bpo_kernels import bench, bench_measure\n"
        "measure = bench_measure.measure\n"
        "def killed(case, **options):\n"
        "    if case.num_rows == 128: import os; os._exit(9)\n"
        "    return measure(case, **options)\n"
        "bench_measure.measure = killed\n"
        "bench.main(sys.argv[1:])"
    )
    outcome = subprocess.run([sys.executable, "-c", code, *command[1:]], cwd=SCRIPT.parent.parent, env=os.environ)
    assert outcome.returncode == 9
    content = json.loads(report.read_text())
    assert [result["num_rows"] for result in content["results"]] == [64]
    assert content["not_run"] == ["preference_loss gradient N=128 random: not reached"]
