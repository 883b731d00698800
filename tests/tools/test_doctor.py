"""`bpo doctor`: what it finds, and what it tells the user to do. Run: python -m pytest tests/tools/test_doctor.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpo.model.attention import choice as attention_choice
from bpo.tools import doctor
from bpo.tools.doctor import Finding


def test_table_names_every_part_of_the_machine_and_says_what_it_means() -> None:
    result = subprocess.run([sys.executable, "-m", "bpo.tools.doctor"], capture_output=True, text=True, timeout=60)
    for name in ("Python", "PyTorch", "GPU", "bf16", "C++ compiler", "ninja", "flash-attn", "Triton", "DeepSpeed"):
        assert f"\n{name}" in f"\n{result.stdout}", result.stdout + result.stderr
    for name in ("Slurm", "Host", "Disk"):
        assert f"\n{name}" in result.stdout
    assert result.stdout.count("->") >= 12
    assert (result.returncode == 0) == ("Nothing that a run needs is missing." in result.stdout)


def test_doctor_itself_does_not_import_deepspeed() -> None:
    code = "import sys; from bpo.tools.doctor import diagnose; diagnose(); print('deepspeed' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("missing", 1)])
def test_exit_code_is_one_only_if_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: doctor.Status, code: int
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Finding("part", status, "detail", "consequence"),))
    assert doctor.main() == code
    assert ("Missing or in the way: part." in capsys.readouterr().out) == bool(code)


def test_no_compiler_is_missing_and_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.check_compiler()
    assert finding.status == "missing" and "install g++" in finding.consequence


def test_ninja_beside_python_but_not_on_path_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ninja").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = doctor.check_ninja()
    assert finding.status == "warn" and f'export PATH="{tmp_path}:$PATH"' in finding.consequence


def test_python_headers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    finding = doctor.check_python_headers()
    assert finding.status == "missing" and "-dev" in finding.consequence


def test_broken_torch_is_reported_and_every_other_check_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_error", lambda: "libcudart.so.13: cannot open shared object file")
    finding = doctor.check_torch()
    assert finding.status == "missing" and "libcudart.so.13" in finding.detail
    assert {found.name for found in doctor.diagnose()} >= {"GPU", "Triton", "DeepSpeed", "Disk"}


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


def test_no_gpu_says_what_training_on_cpu_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    [finding] = doctor.check_gpus()
    assert finding.status == "warn" and "gloo" in finding.consequence and "tiny models" in finding.consequence


def test_flash_attn_is_said_to_serve_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
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


def deepspeed_answers(monkeypatch: pytest.MonkeyPatch, compatible: list[str], built: list[str]) -> Finding:
    answer = {
        "version": "0.19.8",
        "accelerator": "cpu",
        "compatible": compatible,
        "built": built,
        "names": ["cpu_adam"],
    }
    monkeypatch.setattr(doctor, "run_command", lambda *_, **__: "PROBE" + json.dumps(answer))
    return doctor.check_deepspeed()


def test_deepspeed_operations_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = deepspeed_answers(monkeypatch, compatible=["cpu_adam"], built=["cpu_adam"])
    assert finding.status == "ok" and "cpu_adam built" in finding.detail and "starts at once" in finding.consequence
    finding = deepspeed_answers(monkeypatch, compatible=["cpu_adam"], built=[])
    assert finding.status == "ok" and "compiles it" in finding.consequence
    finding = deepspeed_answers(monkeypatch, compatible=[], built=[])
    assert finding.status == "warn" and "no CPU Adam" in finding.consequence


def test_deepspeed_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEEPSPEED_PROBE", "raise ImportError")
    assert doctor.check_deepspeed().status == "missing"


def test_long_text_wraps_under_its_own_column() -> None:
    lines = doctor.render([Finding("part", "ok", "word " * 40, "short")], width=60).splitlines()
    column = lines[0].index("word")
    assert len(lines) > 3 and all(len(line) <= 60 and line[:column].strip() in ("part  ok", "") for line in lines)
