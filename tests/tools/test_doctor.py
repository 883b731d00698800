"""`bpo doctor`: findings and their fixes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpo.model.attention import choice as attention_choice
from bpo.tools import doctor
from bpo.tools.doctor import Finding


def test_table_lists_every_check_with_its_consequence() -> None:
    code = "import sys; from bpo.tools.doctor import main; status = main(); assert 'deepspeed' not in sys.modules; "
    command = [sys.executable, "-c", code + "sys.exit(status)"]  # it asks DeepSpeed in a process of its own
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "AssertionError" not in result.stderr
    for name in ("Python", "PyTorch", "GPU", "bf16", "C++ compiler", "ninja", "flash-attn", "Triton", "DeepSpeed"):
        assert f"\n{name}" in f"\n{result.stdout}", result.stdout + result.stderr
    for name in ("Slurm", "Host", "Disk"):
        assert f"\n{name}" in result.stdout
    assert result.stdout.count("->") >= 12
    assert "cpu_adam " in result.stdout  # from DeepSpeed's report
    assert (result.returncode == 0) == ("No problems that block a run." in result.stdout)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("missing", 1)])
def test_exit_code_is_one_only_if_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: doctor.Status, code: int
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"part": lambda: Finding("part", status, "detail", "consequence")})
    assert doctor.main() == code
    assert ("Fix before starting a run: part." in capsys.readouterr().out) == bool(code)


def test_no_compiler_is_missing_and_the_fix_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.check_compiler()
    assert finding.status == "missing" and "install g++" in finding.consequence


def test_ninja_next_to_python_but_not_on_path_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ninja").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = doctor.check_ninja()
    assert finding.status == "warn" and f'export PATH="{tmp_path}:$PATH"' in finding.consequence


def test_missing_python_headers_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    finding = doctor.check_python_headers()
    assert finding.status == "missing" and "-dev" in finding.consequence


def test_broken_torch_is_reported_and_every_other_check_still_answers(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    error = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch" / "__init__.py").write_text(f"raise OSError({error!r})")
    code = "from bpo.tools.doctor import diagnose; print([(f.name, f.status, f.detail) for f in diagnose()])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    findings = {name: (status, detail) for name, status, detail in ast.literal_eval(result.stdout)}
    assert findings["PyTorch"][0] == "missing" and "libcudart.so.13" in findings["PyTorch"][1]
    assert findings["GPU"] == ("warn", "not checked") and findings["DeepSpeed"][0] == "missing"
    assert findings.keys() >= set(doctor.CHECKS)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    import torch

    gpu = SimpleNamespace(name="A GPU", total_memory=80 * 1024**3, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)


def test_gpu_line_gives_name_memory_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, major=9)
    [finding] = doctor.check_gpus()
    assert finding.status == "ok" and finding.detail == "A GPU, 80 GiB, compute capability 9.0"


def test_gpu_without_bf16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, major=7)
    [finding] = doctor.check_gpus()
    assert finding.status == "warn" and "bf16" in finding.consequence


def test_no_gpu_explains_training_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    [finding] = doctor.check_gpus()
    assert finding.status == "warn" and "gloo" in finding.consequence and "tiny models" in finding.consequence


def test_flash_attn_line_names_the_backend_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    assert "attend by sdpa" in doctor.check_flash_attn().consequence
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    versions: dict[str, str] = {}
    monkeypatch.setattr(attention_choice, "_version", versions.get)
    monkeypatch.setattr(attention_choice, "_is_installed", lambda module: module == "triton")
    assert "attend by flex" in doctor.check_flash_attn().consequence
    assert "pip install 'bpo[flash]'" in doctor.check_flash_attn().consequence
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    assert "attend by varlen" in doctor.check_flash_attn().consequence
    versions["flash-attn"] = "2.8.3"
    monkeypatch.setattr(attention_choice, "flash_attn_2", lambda: None)
    assert "attend by flash: " in doctor.check_flash_attn().consequence
    assert "model.vision_attention=flash_attention_2" in doctor.check_flash_attn().consequence


def test_triton_line_follows_the_dispatch_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    monkeypatch.setenv("BPO_KERNELS", "plain")
    assert "plain PyTorch" in doctor.check_triton().consequence
    monkeypatch.setenv("BPO_KERNELS", "no such choice")
    finding = doctor.check_triton()
    assert finding.status == "missing" and "BPO_KERNELS" in finding.consequence


def deepspeed_reports(monkeypatch: pytest.MonkeyPatch, installed: str, compatible: str) -> Finding:
    report = f"op name .... installed .. compatible\ncpu_adam ............... [{installed}] ....... [{compatible}]\n"
    monkeypatch.setattr(doctor, "run_command", lambda words: f"{report}async_io  [NO] ....... [NO]\naccelerator cpu\n")
    return doctor.check_deepspeed()


def test_deepspeed_operations_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    finding = deepspeed_reports(monkeypatch, installed="NO", compatible="NO")
    assert finding.status == "warn" and "no CPU Adam" in finding.consequence
    finding = deepspeed_reports(monkeypatch, installed="NO", compatible="OKAY")
    assert finding.status == "ok" and "compiles the operations" in finding.consequence
    assert "on cpu; cpu_adam can be built, async_io cannot be built" in finding.detail
    finding = deepspeed_reports(monkeypatch, installed="YES", compatible="OKAY")
    assert finding.status == "ok" and "cpu_adam built" in finding.detail and "without compiling" in finding.consequence
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert "cpu_adam built" in deepspeed_reports(monkeypatch, installed="NO", compatible="OKAY").detail


def test_deepspeed_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEEPSPEED_REPORT", "raise ImportError")
    assert doctor.check_deepspeed().status == "missing"


def test_long_text_wraps_within_its_column() -> None:
    lines = doctor.render([Finding("part", "ok", "word " * 40, "short")], width=60).splitlines()
    column = lines[0].index("word")
    assert len(lines) > 3 and all(len(line) <= 60 and line[:column].strip() in ("part  ok", "") for line in lines)
