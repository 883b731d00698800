"""What this machine has, and what that means for a run: `bpo doctor`.

Each check returns a `Finding`. `missing` marks what a run cannot do without, or what stops it, such as a stale compile
lock; `warn` what it does slower or not at all. DeepSpeed is asked in a process of its own, because importing it
configures logging and picks an accelerator.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
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

PYTHON_RANGE = ((3, 10), (3, 14))
MIN_DISK_GIB = 20.0
MIN_SHARED_MEMORY_GIB = 1.0
MIN_RAM_GIB = 8.0
PROBE_TIMEOUT_S = 15.0
GIB = 1024**3

# Prints one JSON line: DeepSpeed's version, its accelerator, and for each operation of interest whether it can be
# compiled here and whether a compiled copy already lies in torch's cache.
DEEPSPEED_PROBE = """
import json, logging, os
logging.disable(logging.CRITICAL)
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from torch.utils.cpp_extension import get_default_build_root
root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
built = {name[:-3] for _, _, files in os.walk(root) for name in files if name.endswith(".so")}
names = [n for n in ("cpu_adam", "fused_adam", "deepspeed_shm_comm", "async_io") if n in ALL_OPS]
print("PROBE" + json.dumps({
    "version": deepspeed.__version__,
    "accelerator": get_accelerator().device_name(),
    "compatible": [n for n in names if ALL_OPS[n].is_compatible(False)],
    "built": [n for n in names if ALL_OPS[n].name in built],
    "names": names,
}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about the machine.

    Attributes:
        name: What was looked at.
        status: `ok`, `warn` (a run works, with the limits in `consequence`) or `missing` (it does not).
        detail: What was found: versions, sizes, paths.
        consequence: What it means for a run, and the way out where there is one.
    """

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


def torch_error() -> str | None:
    """Why PyTorch cannot be imported, such as a CUDA library that is not there; None where it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error)
    return None


def has_gpu() -> bool:
    if torch_error() is not None:
        return False
    import torch

    return torch.cuda.is_available()


def check_python() -> Finding:
    low, high = PYTHON_RANGE
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    if low <= sys.version_info[:2] < high:
        return Finding("Python", "ok", detail, "supported")
    return Finding(
        "Python", "missing", detail, "bpo needs Python 3.10 to 3.13: make a new environment with one of them"
    )


def check_torch() -> Finding:
    version = version_of("torch")
    if version is None:
        return Finding("PyTorch", "missing", "not installed", "nothing runs: install bpo with its requirements")
    error = torch_error()
    if error is not None:
        return Finding(
            "PyTorch", "missing", f"{version}, but importing it fails: {error}", "nothing runs: reinstall it"
        )
    import torch

    if torch.version.cuda:
        return Finding("PyTorch", "ok", f"{version}, CUDA {torch.version.cuda}", "runs on NVIDIA GPUs and on CPU")
    if torch.version.hip:
        return Finding("PyTorch", "ok", f"{version}, ROCm {torch.version.hip}", "runs on AMD GPUs and on CPU")
    return Finding(
        "PyTorch", "ok", f"{version}, CPU only", "runs on CPU; a GPU needs another build of the same version"
    )


def check_gpus() -> list[Finding]:
    if not has_gpu():
        consequence = "training runs on CPU over gloo: use tiny models (`make demo`, recipes for CPU)"
        if shutil.which("nvidia-smi"):
            consequence = "nvidia-smi is here, so torch's build or the driver does not fit: check `torch.version.cuda`"
        return [Finding("GPU", "warn", "none that PyTorch can use", consequence)]
    import torch

    findings = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        if torch.version.hip or gpu.major >= 8:
            findings.append(Finding(f"GPU {index}", "ok", detail, "bf16 and the Triton kernels run natively"))
        else:
            consequence = "no native bf16 below capability 8.0: recipes are made for bf16 and will be slow or fail here"
            findings.append(Finding(f"GPU {index}", "warn", detail, consequence))
    return findings


def cpu_flags() -> set[str]:
    """The instruction sets of /proc/cpuinfo; empty where there is no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {flag for line in lines[:40] if line.startswith(("flags", "Features")) for flag in line.split()[2:]}


def check_bf16() -> Finding:
    if has_gpu():
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("bf16", "ok", "native on this GPU", "the recipes' precision")
        return Finding("bf16", "warn", "not native on this GPU", "train in fp32, or on a GPU of capability 8.0 or more")
    native = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    if native:
        return Finding("bf16", "ok", f"native on this CPU ({', '.join(native)})", "works on CPU too")
    return Finding("bf16", "warn", "emulated on this CPU", "correct but slower than fp32 here; tiny runs use fp32")


def check_compiler() -> Finding:
    wanted = os.environ.get("CXX") or "c++"
    path = shutil.which(wanted) or shutil.which("g++")
    if path is None:
        consequence = "DeepSpeed compiles its CPU operations, and Triton its launchers, at first use: install g++"
        return Finding("C++ compiler", "missing", f"neither {wanted} nor g++ on PATH", consequence)
    version = run_command([path, "--version"]) or "version unknown"
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
    beside = Path(sys.executable).parent / "ninja"
    if beside.exists():
        consequence = f'DeepSpeed looks on PATH: export PATH="{beside.parent}:$PATH", or start through make or slurm/'
        return Finding("ninja", "warn", f"{beside}, not on PATH", consequence)
    return Finding("ninja", "missing", "not found", "DeepSpeed cannot build its operations: pip install ninja")


def check_flash_attn() -> Finding:
    versions = [version for version in (version_of("flash-attn"), version_of("flash_attn_3")) if version is not None]
    version = ", ".join(versions) or "not installed"
    if torch_error() is not None:
        return Finding("flash-attn", "warn", version, "not asked: PyTorch cannot be imported")
    import torch

    from bpo.model.attention.choice import Needs, choose_backend

    device = torch.device("cuda" if has_gpu() else "cpu")
    choice = choose_backend("auto", Needs(device, torch.bfloat16))
    towers = {"flash": "flash_attention_2", "flash3": "flash_attention_3"}.get(choice.backend)
    tower = f"; towers: model.vision_attention={towers}" if towers else ""
    return Finding("flash-attn", "ok", version, f"packed groups attend by {choice.backend}: {choice.reason}{tower}")


def check_triton() -> Finding:
    version = version_of("triton")
    if torch_error() is not None:
        return Finding("Triton", "warn", version or "not installed", "not asked: PyTorch cannot be imported")
    import torch

    from bpo_kernels.dispatch import chosen_implementation

    device = "cuda" if has_gpu() else "cpu"
    try:
        choice = chosen_implementation(torch.empty(0, device=device))
    except ValueError as error:
        return Finding("Triton", "missing", version or "not installed", str(error))
    if choice == "triton" and version is None:
        consequence = "the kernels chosen on this GPU need it: pip install triton, or BPO_KERNELS=plain"
        return Finding("Triton", "missing", "not installed", consequence)
    meaning = "the Triton kernels" if choice == "triton" else "plain PyTorch (the same results, more memory)"
    return Finding("Triton", "ok", version or "not installed", f"log-probs and losses on {device} run in {meaning}")


def check_deepspeed() -> Finding:
    version = version_of("deepspeed")
    if version is None:
        return Finding("DeepSpeed", "missing", "not installed", "training cannot start: pip install deepspeed")
    output = run_command([sys.executable, "-c", DEEPSPEED_PROBE], only_line_with="PROBE")
    if output is None:
        consequence = 'training will not start before `python -c "import deepspeed"` works'
        return Finding("DeepSpeed", "missing", f"{version}, but importing it fails", consequence)
    probe = json.loads(output.removeprefix("PROBE"))
    compatible, built = probe["compatible"], probe["built"]
    operations = [f"{name} {_operation_state(name, compatible, built)}" for name in probe["names"]]
    detail = f"{version} on {probe['accelerator']}; {', '.join(operations)}"
    if "cpu_adam" not in compatible:
        return Finding("DeepSpeed", "warn", detail, "no CPU Adam: offload and training on CPU will not start")
    if "cpu_adam" in built:
        return Finding("DeepSpeed", "ok", detail, "starts at once; operations are compiled already")
    return Finding(
        "DeepSpeed", "ok", detail, "the first run that needs an operation compiles it (minutes, then cached)"
    )


def _operation_state(name: str, compatible: list[str], built: list[str]) -> str:
    if name in built:
        return "built"
    return "can be built" if name in compatible else "cannot be built"


def check_compile_locks() -> list[Finding]:
    """Locks that a killed compilation has left: whoever needs the operation would wait for them without end."""
    name = "Compile lock"
    if torch_error() is not None:
        return [Finding(name, "warn", "not looked for", "PyTorch cannot be imported")]
    from bpo.job.compile_locks import extensions_root, find_locks

    root = extensions_root()
    found = find_locks(root)
    statuses: dict[str, Status] = {"held": "ok", "possible": "warn", "stale": "missing"}
    if not found:
        return [Finding(name, "ok", f"none in {root}", "no operation is being compiled, nor was one left half-way")]
    return [Finding(name, statuses[lock.state], str(lock.path), lock.describe()) for lock in found]


def check_slurm() -> Finding:
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        consequence = "start runs with `deepspeed bpo/train.py`; slurm/*.sh need a cluster's login node"
        return Finding("Slurm", "ok", f"not on PATH: {', '.join(missing)}", consequence)
    version = run_command(["sbatch", "--version"]) or "version unknown"
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", inside job {job}" if job else ""
    return Finding("Slurm", "ok", version + inside, "sbatch slurm/train.sh --config FILE")


def cgroup_memory_bytes() -> int | None:
    """The container's or job's memory limit (cgroup v2, then v1); None where there is none."""
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
        return Finding("Host", "warn", detail, f"the demo wants {MIN_RAM_GIB:.0f} GiB")
    offload_billion = memory_gib * 0.8 * GIB / 16 / 1e9
    consequence = f"ZeRO-3 offload can hold about {offload_billion:.1f} B trained parameters here (16 bytes each)"
    return Finding("Host", "ok", detail, consequence)


def check_disk() -> list[Finding]:
    free_gib = shutil.disk_usage(".").free / GIB
    detail = f"{free_gib:.0f} GiB free in {Path.cwd()}"
    if free_gib < MIN_DISK_GIB:
        consequence = "checkpoints of a 7B LoRA run may not fit: choose train.output_dir on a larger disk"
        findings = [Finding("Disk", "warn", detail, consequence)]
    else:
        billion = free_gib * GIB / 14 / 1e9
        consequence = f"a checkpoint of up to {billion:.0f} B fully trained parameters fits (14 bytes each)"
        findings = [Finding("Disk", "ok", detail, consequence)]
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).free / GIB < MIN_SHARED_MEMORY_GIB:
        consequence = "data-loader workers and NCCL share tensors there and may die: docker run --shm-size=16g"
        size = f"{shutil.disk_usage(shared).free / GIB:.2f} GiB free"
        findings.append(Finding("/dev/shm", "warn", size, consequence))
    return findings


def run_command(words: list[str], only_line_with: str = "") -> str | None:
    """The first line of standard output (that contains a word); None if the command fails or takes too long."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in result.stdout.splitlines() if only_line_with in line), None)


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    check_python,
    check_torch,
    check_gpus,
    check_bf16,
    check_compiler,
    check_python_headers,
    check_ninja,
    check_flash_attn,
    check_triton,
    check_deepspeed,
    check_compile_locks,
    check_slurm,
    check_host,
    check_disk,
)


def diagnose() -> list[Finding]:
    """Looks at everything a run depends on; takes a few seconds and changes nothing."""
    findings: list[Finding] = []
    for check in CHECKS:
        found = check()
        findings += found if isinstance(found, list) else [found]
    return findings


def render(findings: list[Finding], width: int = 100) -> str:
    """A table of `width` columns: name, status, what was found, and under it what that means."""
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
    """Prints the table. Returns 1 if something that every run needs is missing, else 0."""
    findings = diagnose()
    print(render(findings, min(shutil.get_terminal_size((100, 24)).columns, 120)))
    missing = [finding.name for finding in findings if finding.status == "missing"]
    print(f"\nMissing or in the way: {', '.join(missing)}." if missing else "\nNothing that a run needs is missing.")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
