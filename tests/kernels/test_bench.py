"""The benchmark: agreement before times, no report if tests fail, skipped providers, reports."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from bpo_kernels import dispatch
from bpo_kernels.bench import cases as bench_cases
from bpo_kernels.bench import command as bench
from bpo_kernels.bench import measure as bench_measure
from bpo_kernels.bench import providers as bench_providers
from bpo_kernels.bench.cases import Case, make_inputs

CPU = torch.device("cpu")
measure = functools.partial(bench_measure.measure, sample_seconds=0.0)


def tiny_case(operation: str, variant: str, logits: str = "peaked", num_rows: int = 32) -> Case:
    return Case(operation, variant, "tiny", num_rows, logits, torch.float32, CPU)


@pytest.mark.parametrize(
    ("operation", "variant"),
    [
        ("linear_logprob", "forward"),
        ("linear_logprob", "frozen"),
        ("linear_logprob", "trained"),
        ("linear_logprob", "statistics"),
        ("logprob_gather", "gradient"),
        ("preference_loss", "gradient"),
        ("preference_loss", "terms"),
        ("second_target_logprob", "frozen"),
        ("second_target_logprob", "trained"),
        ("linear_preference_loss", "live-frozen"),
        ("linear_preference_loss", "live-trained"),
        ("linear_preference_loss", "stored-frozen"),
    ],
)
def test_every_provider_that_runs_on_a_cpu_agrees_with_fp32_and_is_timed(operation, variant):
    providers = [name for name in bench_providers.PROVIDERS[operation] if name != "compile"]
    # Two pairs: with one, any order of its sequences would look correct.
    case = tiny_case(operation, variant, num_rows=512)
    results = {result.provider: result for result in measure(case, providers)}
    assert set(results) == set(providers)
    assert {result.status for result in results.values()} <= {"ok", "skipped"}, results
    ran = [result for result in results.values() if result.status == "ok"]
    assert "eager" in {result.provider for result in ran}
    assert all(0 < result.p20_ms <= result.median_ms <= result.p80_ms for result in ran)
    assert all(result.copy_share > 0 and result.peak_bytes >= 0 for result in ran)
    assert all((result.gemm_share is not None) == operation.startswith("linear_") for result in ran)


def test_a_provider_that_is_wrong_gets_a_line_and_no_time(monkeypatch):
    right = dispatch.linear_logprob
    monkeypatch.setattr(dispatch, "linear_logprob", lambda *args, **options: right(*args, **options) + 0.01)
    wrong, eager = measure(tiny_case("linear_logprob", "forward"), ["bpo", "eager"])
    assert (wrong.provider, wrong.status, wrong.median_ms) == ("bpo", "disagrees", None)
    assert "off by 0.01 nat (allowed 0.001)" in wrong.note
    assert eager.status == "ok"


def test_a_wrong_gradient_is_found_too(monkeypatch):
    right = dispatch.linear_logprob

    def half_gradient(*args, **options):
        logp_N = right(*args, **options)
        return logp_N.detach() + 0.5 * (logp_N - logp_N.detach())

    monkeypatch.setattr(dispatch, "linear_logprob", half_gradient)
    (wrong,) = measure(tiny_case("linear_logprob", "frozen"), ["bpo"])
    assert wrong.status == "disagrees" and wrong.gradient_error == pytest.approx(0.5, abs=1e-3)


def test_a_result_that_is_not_finite_disagrees():
    case = tiny_case("linear_logprob", "forward")
    truth = [torch.zeros(32)]
    assert bench_measure.disagreement(case, [torch.full((32,), float("nan"))], truth)[0] == float("inf")
    assert bench_measure.disagreement(case, [torch.tensor(float("nan"))], truth)[0] == float("inf")


def test_a_library_that_fails_gets_a_line_and_ours_raises(monkeypatch):
    def broken(case, inputs):
        raise AssertionError("tile_n must divide V\nand more")

    table = {"bpo": bench_providers.PROVIDERS["linear_logprob"]["bpo"], "quack": broken}
    monkeypatch.setitem(bench_providers.PROVIDERS, "linear_logprob", table)
    ours, quack = measure(tiny_case("linear_logprob", "frozen"), ["bpo", "quack"])
    assert ours.status == "ok"
    assert (quack.status, quack.note) == ("failed", "AssertionError: tile_n must divide V")
    monkeypatch.setitem(table, "bpo", broken)
    with pytest.raises(AssertionError, match="tile_n"):
        measure(tiny_case("linear_logprob", "frozen"), ["bpo"])


def fake_quack(monkeypatch, *, need_dw: bool, calls: list):
    """Calls of QuACK: its chunked function computes both gradients before 0.6.2, where `need_dw` is missing."""

    def chunked_fwd(x, weight, target, **options): ...

    def newer_fwd(x, weight, target, need_dx=True, need_dw=True, **options): ...

    def loss(name):
        def run(x, weight, *rest, reduction, **options):
            calls.append((name, options))
            target = rest[-1]
            return torch.nn.functional.cross_entropy(x.float() @ weight.float().t(), target, reduction=reduction)

        return run

    module = SimpleNamespace(
        chunked_linear_cross_entropy_fwd=newer_fwd if need_dw else chunked_fwd,
        chunked_linear_cross_entropy=loss("chunked"),
        linear_cross_entropy_func=loss("whole"),
    )
    monkeypatch.setattr(bench_providers, "_module", lambda name, provider: module)
    monkeypatch.setattr(bench_providers, "_need_cuda", lambda case, capability: None)


@pytest.mark.parametrize(
    ("need_dw", "variant", "called"),
    [
        (True, "frozen", "chunked"),
        (True, "trained", "chunked"),
        (False, "frozen", "whole"),
        (False, "trained", "chunked"),
    ],
)
def test_quack_computes_no_gradient_of_a_frozen_head_in_any_version(monkeypatch, need_dw, variant, called):
    calls = []
    fake_quack(monkeypatch, need_dw=need_dw, calls=calls)
    monkeypatch.setitem(bench_cases.SHAPES, "tiny", bench_cases.Shape(64, 1032, 24))
    case = Case("linear_logprob", variant, "tiny", 32, "peaked", torch.bfloat16, CPU)
    (result,) = measure(case, ["quack"])
    assert result.status == "ok", result.note
    assert {name for name, _ in calls} == {called}
    assert ("inplace_backward" in calls[0][1]) == (called == "whole")


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: pip install 'bpo[bench]'")
@pytest.mark.parametrize(
    ("operation", "variant"),
    [
        *(("linear_logprob", variant) for variant in ("forward", "frozen", "trained")),
        *(("linear_preference_loss", variant) for variant in ("live-frozen", "live-trained", "stored-frozen")),
    ],
)
def test_trls_chunked_log_prob_runs_on_a_cpu_and_agrees(operation, variant):
    (result,) = measure(tiny_case(operation, variant, num_rows=512), ["trl-chunked"])
    assert (result.status, result.note) == ("ok", "")
    assert result.value_error < 1e-4 and result.gradient_error < 1e-4


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: pip install 'bpo[bench]'")
def test_trls_chunked_log_prob_needs_neither_pandas_nor_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)  # its import fails, as without pandas
    (result,) = measure(tiny_case("linear_logprob", "trained"), ["trl-chunked"])
    assert (result.status, result.note) == ("ok", "")
    assert not hasattr(sys.modules["trl.trainer.utils"], "add_fused_lm_head"), "the module itself was imported"


def test_the_device_idles_as_long_as_the_host_queues():
    assert bench_measure.sleep_ms(0.0) == 0.5
    assert bench_measure.sleep_ms(4.0) == 6.0
    assert bench_measure.sleep_ms(1e3) == 20.0, "a step that waits for the device cannot be hidden"
    assert bench_measure.sleep_cycles(lambda: pytest.fail("a CPU queues nothing"), CPU) == 0


def test_only_the_variants_asked_for_are_run(tmp_path):
    report = tmp_path / "report.json"
    command = ["linear_logprob", "--shapes", "tiny", "--rows", "8", "--variants", "frozen", "--logits", "peaked"]
    command += ["--providers", "eager", "--sample-seconds", "0", "--without-tests", "--device", "cpu"]
    assert bench.main([*command, "--json", str(report)]) == 0
    assert [result["variant"] for result in json.loads(report.read_text())["results"]] == ["frozen"]


@pytest.mark.parametrize("provider", ["liger", "cce", "quack"])
def test_libraries_for_cuda_are_skipped_on_a_cpu(provider):
    (result,) = measure(tiny_case("linear_logprob", "frozen"), [provider])
    assert (result.status, result.note) == ("skipped", "needs CUDA")


def test_a_missing_library_names_the_extra(monkeypatch):
    def not_installed(distribution):
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(bench_providers.importlib.metadata, "version", not_installed)
    with pytest.raises(
        bench_providers.Unavailable, match=r"quack-kernels is not installed: pip install 'bpo\[bench\]'"
    ):
        bench_providers._module("a_package_that_nobody_has", "quack")


def test_a_library_that_lacks_a_dependency_says_which(monkeypatch):
    monkeypatch.setattr(bench_providers.importlib.metadata, "version", lambda distribution: "0.6.5")
    with pytest.raises(
        bench_providers.Unavailable, match="quack-kernels 0.6.5 cannot be imported: No module named 'a_pa"
    ):
        bench_providers._module("a_package_that_nobody_has", "quack")


def test_peaked_targets_are_as_likely_as_promised():
    for operation in ("linear_logprob", "logprob_gather"):
        for logits, low, high in (("peaked", 0.38, 0.52), ("random", 0.0, 0.01)):
            case = tiny_case(operation, "forward", logits, num_rows=2000)
            inputs = make_inputs(case)
            logits_NV = inputs.logits_NV if inputs.logits_NV is not None else inputs.hidden_NH @ inputs.weight_VH.t()
            probability_N = torch.softmax(logits_NV.detach(), -1).gather(1, inputs.target_N[:, None])
            assert low < probability_N.mean().item() < high, (operation, logits)


def test_red_tests_report_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "test_preference_loss.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    report = tmp_path / "report.json"
    assert bench.main(["preference_loss", "--json", str(report)]) == 1
    output = capsys.readouterr()
    assert " ms " not in output.out and not report.exists()
    assert "the tests of preference_loss fail: nothing is reported" in output.err


def test_json_says_where_the_figures_come_from(tmp_path):
    report = tmp_path / "results" / "report.json"
    command = ["preference_loss", "--rows", "512", "--providers", "bpo", "eager", "--json", str(report)]
    assert bench.main([*command, "--without-tests", "--device", "cpu"]) == 0
    content = json.loads(report.read_text())
    assert {"device", "torch", "commit", "implementation", "dtype", "quack-kernels"} <= content.keys()
    assert content["tests"] == "not run here" and content["not_run"] == []
    assert {result["provider"] for result in content["results"]} == {"bpo", "eager"}
    assert all(result["median_ms"] > 0 for result in content["results"])


def test_what_does_not_fit_the_time_or_the_pairs_is_listed(tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["preference_loss", "--rows", "300", "512", "--device", "cpu", "--json", str(report)]
    assert bench.main([*command, "--without-tests", "--seconds", "-1"]) == 0
    odd, late = json.loads(report.read_text())["not_run"]
    assert "300 rows are not whole pairs" in odd and "had passed" in late
    assert "not run: preference_loss" in capsys.readouterr().out


def test_a_trace_is_written_for_each_provider(tmp_path):
    measure(tiny_case("logprob_gather", "gradient"), ["bpo", "eager"], tmp_path / "traces")
    names = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert names == [f"logprob_gather-gradient-tiny-N=32-peaked-{provider}.json" for provider in ("bpo", "eager")]
    events = json.loads((tmp_path / "traces" / names[0]).read_text())["traceEvents"]
    assert sum(event.get("name") == "logprob_gather gradient tiny N=32 peaked bpo" for event in events) >= 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["logprob"], "unknown operation 'logprob': use linear_logprob"),
        (["--rows", "0"], "--rows 0: use at least 1"),
        (["--budget-mib", "0"], "--budget-mib 0: use at least 1"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert message in capsys.readouterr().err


def test_cases_before_the_kill_are_kept_and_the_rest_is_listed(tmp_path):
    """The report is written after every case, so a killed process leaves its results."""
    report = tmp_path / "report.json"
    command = [sys.executable, "kernels/bench.py", "preference_loss", "--rows", "64", "128", "--device", "cpu"]
    command += ["--providers", "eager", "--sample-seconds", "0", "--without-tests", "--json", str(report)]
    code = (
        "import sys; sys.argv = sys.argv[1:]\n"
        "from bpo_kernels.bench import command as bench, measure as bench_measure\n"
        "measure = bench_measure.measure\n"
        "def killed(case, **options):\n"
        "    if case.num_rows == 128: import os; os._exit(9)\n"
        "    return measure(case, **options)\n"
        "bench_measure.measure = killed\n"
        "bench.main(sys.argv[1:])"
    )
    outcome = subprocess.run([sys.executable, "-c", code, *command[1:]], cwd=bench.ROOT, env=os.environ)
    assert outcome.returncode == 9
    content = json.loads(report.read_text())
    assert [result["num_rows"] for result in content["results"]] == [64]
    assert content["not_run"] == ["preference_loss gradient N=128 random: not reached"]
