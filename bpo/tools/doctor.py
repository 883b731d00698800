"""Environment check, `bpo doctor`: what each finding means for a run, and how to fix it.

The facts come from `torch.utils.collect_env` and DeepSpeed's `env_report`. A finding is `missing` if a run cannot start
without the component or is blocked by it, such as a stale compile lock, and `warn` if a run is slower or limited.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "missing"]

MIN_DISK_GIB = 20.0
MIN_SHARED_MEMORY_GIB = 1.0
MIN_RAM_GIB = 8.0
REPORT_TIMEOUT_S = 30.0
GIB = 1024**3

# Runs in a subprocess: importing DeepSpeed configures logging and selects an accelerator.
DEEPSPEED_REPORT = """
from deepspeed import env_report
env_report.op_report(verbose=False)
print("accelerator", env_report.get_accelerator().device_name())
"""
OPERATIONS = ("cpu_adam", "fused_adam", "deepspeed_shm_comm", "async_io")


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check: versions, sizes and paths in `detail`; the effect on a run and the fix in `consequence`."""

    name: str
    status: Status
    detail: str
    consequence: str


def version_of(distribution: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_python() -> Finding:
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding("Python", "ok", detail, "supported")
    return Finding("Python", "missing", detail, "bpo needs Python 3.10 to 3.13: create an environment with one of them")


def check_torch() -> Finding:
    version = version_of("torch") or "not installed"
    try:
        import torch
        from torch.utils import collect_env
    except (ImportError, OSError) as error:
        return Finding("PyTorch", "missing", f"{version}; import fails: {error}", "bpo cannot run: reinstall PyTorch")
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if not (torch.version.hip or torch.version.cuda):
        consequence = "runs on CPU; for GPUs, install another build of the same version"
        return Finding("PyTorch", "ok", f"{version}, CPU only", consequence)
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    detail = f"{version}, {toolkit}" + (f", NVIDIA driver {driver}" if driver else "")
    return Finding("PyTorch", "ok", detail, "runs on GPU and CPU")


def check_gpus() -> list[Finding]:
    import torch

    if not has_gpu():
        consequence = "training runs on CPU over gloo: use tiny models (`make demo`, CPU recipes)"
        if shutil.which("nvidia-smi"):
            consequence = "nvidia-smi is installed: PyTorch's build does not match the driver, see `torch.version.cuda`"
        return [Finding("GPU", "warn", "none available to PyTorch", consequence)]
    findings = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        finding = Finding(f"GPU {index}", "ok", detail, "runs bf16 and the Triton kernels natively")
        if gpu.major < 8 and not torch.version.hip:
            consequence = "no native bf16 below compute capability 8.0: the recipes use bf16 and will be slow or fail"
            finding = Finding(f"GPU {index}", "warn", detail, consequence)
        findings.append(finding)
    return findings


def check_bf16() -> Finding:
    import torch
    from torch.utils import collect_env

    if has_gpu():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("bf16", "ok", "native on this GPU", "the recipes use it")
        return Finding(
            "bf16", "warn", "not native on this GPU", "train in fp32, or use compute capability 8.0 or above"
        )
    flags = set((collect_env.get_cpu_info(collect_env.run) or "").split())
    native = ", ".join(sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}))
    if native:
        return Finding("bf16", "ok", f"native on this CPU ({native})", "also works on CPU")
    return Finding("bf16", "warn", "emulated on this CPU", "correct but slower than fp32; use fp32 for tiny runs")


def check_compiler() -> Finding:
    wanted = os.environ.get("CXX") or "c++"
    path = shutil.which(wanted) or shutil.which("g++")
    if path is None:
        consequence = "DeepSpeed and Triton compile code at first use: install g++"
        return Finding("C++ compiler", "missing", f"neither {wanted} nor g++ on PATH", consequence)
    version = (run_command([path, "--version"]) or "version unknown").splitlines()[0]
    return Finding("C++ compiler", "ok", f"{path}: {version}", "DeepSpeed and Triton can compile at first use")


def check_python_headers() -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Finding("Python headers", "ok", str(header), "DeepSpeed and Triton can compile at first use")
    package = f"python3.{sys.version_info.minor}-dev"
    consequence = f"compiling at first use fails: install them (Debian and Ubuntu: apt install {package})"
    return Finding("Python headers", "missing", f"no {header}", consequence)


def check_ninja() -> Finding:
    path = shutil.which("ninja")
    if path:
        return Finding("ninja", "ok", path, "DeepSpeed can build its operations")
    local = Path(sys.executable).parent / "ninja"
    if local.exists():
        consequence = f'DeepSpeed searches PATH: export PATH="{local.parent}:$PATH", or start with make or slurm/'
        return Finding("ninja", "warn", f"{local}, not on PATH", consequence)
    return Finding("ninja", "missing", "not found", "DeepSpeed cannot build its operations: pip install ninja")


def check_flash_attn() -> Finding:
    import torch

    from bpo.model.attention.choice import Needs, choose_backend

    versions = [version for version in (version_of("flash-attn"), version_of("flash_attn_3")) if version is not None]
    choice = choose_backend("auto", Needs(torch.device("cuda" if has_gpu() else "cpu"), torch.bfloat16))
    towers = {"flash": "flash_attention_2", "flash3": "flash_attention_3"}.get(choice.backend)
    consequence = f"packed groups attend by {choice.backend}: {choice.reason}"
    consequence += f"; vision tower: model.vision_attention={towers}" if towers else ""
    return Finding("flash-attn", "ok", ", ".join(versions) or "not installed", consequence)


def check_triton() -> Finding:
    import torch

    from bpo_kernels.dispatch import chosen_implementation

    version = version_of("triton")
    device = "cuda" if has_gpu() else "cpu"
    try:
        choice = chosen_implementation(torch.empty(0, device=device))
    except ValueError as error:
        return Finding("Triton", "missing", version or "not installed", str(error))
    if choice == "triton" and version is None:
        consequence = "the kernels selected for this GPU need it: pip install triton, or set BPO_KERNELS=plain"
        return Finding("Triton", "missing", "not installed", consequence)
    kernels = "the Triton kernels" if choice == "triton" else "plain PyTorch (same results, more memory)"
    return Finding("Triton", "ok", version or "not installed", f"log-probs and losses on {device} use {kernels}")


def check_deepspeed() -> Finding:
    version = version_of("deepspeed")
    if version is None:
        return Finding("DeepSpeed", "missing", "not installed", "training cannot start: pip install deepspeed")
    report = run_command([sys.executable, "-c", DEEPSPEED_REPORT])
    if report is None:
        detail = f"{version}; its report fails or takes over {REPORT_TIMEOUT_S:.0f} s"
        return Finding("DeepSpeed", "missing", detail, "training cannot start until `ds_report` works")
    states = operation_states(report)
    detail = f"{version} on {report.split()[-1]}; {', '.join(f'{name} {state}' for name, state in states.items())}"
    if states.get("cpu_adam") == "built":
        return Finding("DeepSpeed", "ok", detail, "runs start without compiling")
    if states.get("cpu_adam") == "can be built":
        return Finding(
            "DeepSpeed", "ok", detail, "the first run compiles the operations it needs (minutes, then cached)"
        )
    return Finding("DeepSpeed", "warn", detail, "no CPU Adam: offload and CPU training cannot start")


def operation_states(report: str) -> dict[str, str]:
    """`built` (installed or in the cache of torch extensions), `can be built` or `cannot be built`, by operation."""
    from bpo.job.compile_locks import extensions_root

    cached = {path.stem for path in extensions_root().rglob("*.so")}
    states = {}
    for name, installed, compatible in re.findall(r"^(\w+) [ .]*\[(YES|NO)\][ .]*\[(OKAY|NO)\]", report, re.MULTILINE):
        if name in OPERATIONS:
            can_build = "can be built" if compatible == "OKAY" else "cannot be built"
            states[name] = "built" if installed == "YES" or name in cached else can_build
    return states


def check_compile_locks() -> list[Finding]:
    """Locks left by killed compilations; every process that needs the operation would wait forever."""
    from bpo.job.compile_locks import extensions_root, find_locks

    locks, root = find_locks(extensions_root()), extensions_root()
    statuses: dict[str, Status] = {"held": "ok", "possible": "warn", "stale": "missing"}
    if not locks:
        return [Finding("Compile lock", "ok", f"none in {root}", "no compilation is running or was interrupted")]
    return [Finding("Compile lock", statuses[lock.state], str(lock.path), lock.describe()) for lock in locks]


def check_slurm() -> Finding:
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        consequence = "start runs with `deepspeed bpo/train.py`; slurm/*.sh need a cluster's login node"
        return Finding("Slurm", "ok", f"not on PATH: {', '.join(missing)}", consequence)
    version = (run_command(["sbatch", "--version"]) or "version unknown").strip()
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return Finding("Slurm", "ok", version + job, "start runs with sbatch slurm/train.sh --config FILE")


def cgroup_memory_bytes() -> int | None:
    """The memory limit of the container or job (cgroup v2, then v1); None if there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def check_host() -> Finding:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory_gib = min(total_bytes, cgroup_memory_bytes() or total_bytes) / GIB
    detail = f"{num_cores} cores, {memory_gib:.0f} GiB of memory"
    if memory_gib < MIN_RAM_GIB:
        return Finding("Host", "warn", detail, f"the demo needs {MIN_RAM_GIB:.0f} GiB")
    offload_billion = memory_gib * 0.8 * GIB / 16 / 1e9
    consequence = f"ZeRO-3 offload fits about {offload_billion:.1f} B trained parameters (16 bytes each)"
    return Finding("Host", "ok", detail, consequence)


def check_disk() -> list[Finding]:
    free_gib = shutil.disk_usage(".").free / GIB
    detail = f"{free_gib:.0f} GiB free in {Path.cwd()}"
    billion = free_gib * GIB / 14 / 1e9
    consequence = f"fits a checkpoint of up to {billion:.0f} B trained parameters (14 bytes each, full fine-tuning)"
    findings = [Finding("Disk", "ok", detail, consequence)]
    if free_gib < MIN_DISK_GIB:
        consequence = "checkpoints of a 7B LoRA run may not fit: set train.output_dir to a larger disk"
        findings = [Finding("Disk", "warn", detail, consequence)]
    if Path("/dev/shm").exists() and (free_gib := shutil.disk_usage("/dev/shm").free / GIB) < MIN_SHARED_MEMORY_GIB:
        consequence = "data-loader workers and NCCL share tensors there and may crash: docker run --shm-size=16g"
        findings.append(Finding("/dev/shm", "warn", f"{free_gib:.2f} GiB free", consequence))
    return findings


def run_command(words: list[str]) -> str | None:
    """Standard output without colours; None if the command fails, prints nothing or times out."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=REPORT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return re.sub(r"\033\[\d+m", "", result.stdout) or None


CHECKS: dict[str, Callable[[], Finding | list[Finding]]] = {
    "Python": check_python,
    "PyTorch": check_torch,
    "GPU": check_gpus,
    "bf16": check_bf16,
    "C++ compiler": check_compiler,
    "Python headers": check_python_headers,
    "ninja": check_ninja,
    "flash-attn": check_flash_attn,
    "Triton": check_triton,
    "DeepSpeed": check_deepspeed,
    "Compile lock": check_compile_locks,
    "Slurm": check_slurm,
    "Host": check_host,
    "Disk": check_disk,
}


def diagnose() -> list[Finding]:
    """Runs all checks; takes a few seconds and changes nothing."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            found = check()
        except (ImportError, OSError) as error:  # a broken torch, for example
            found = Finding(name, "warn", "not checked", f"the check failed: {error}")
        findings += found if isinstance(found, list) else [found]
    return findings


def render(findings: list[Finding], width: int = 100) -> str:
    """A table of `width` columns: name, status and detail, with the consequence below."""
    first = max(len(finding.name) for finding in findings)
    indent = first + 2 + len("missing") + 2
    lines = []
    for finding in findings:
        head = f"{finding.name:<{first}}  {finding.status:<7}  "
        for text, start in ((finding.detail, head), (f"-> {finding.consequence}", " " * indent)):
            wrapped = textwrap.wrap(text, max(width - indent, 30), break_long_words=False) or [""]
            lines += [start + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(lines)


def main() -> int:
    """Prints the table. Returns 1 if any finding is `missing`, else 0."""
    findings = diagnose()
    print(render(findings, min(shutil.get_terminal_size((100, 24)).columns, 120)))
    blockers = [finding.name for finding in findings if finding.status == "missing"]
    print(f"\nFix before starting a run: {', '.join(blockers)}." if blockers else "\nNo problems that block a run.")
    print("All versions, for a bug report: python -m torch.utils.collect_env; ds_report")
    return 1 if blockers else 0


if __name__ == "__main__":
    raise SystemExit(main())
