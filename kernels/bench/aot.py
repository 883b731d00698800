"""Compiles every Triton kernel without a GPU and reports registers, spills and shared memory.

python kernels/bench/aot.py [--arch 80 90 100 gfx942]          prints the table of kernels/README.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.compiler import ASTSource

from bpo_kernels.bench.aot_cases import ARCHITECTURES, Case, all_cases

# Maximum shared memory per block, in bytes (CUDA programming guide, compute capabilities; CDNA 3 ISA guide).
SHARED_LIMIT_BYTES: dict[int | str, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
# Row sizes and strides: declared as multiples of 16 in the aligned cases.
_SIZES = ("V", "H", "stride_n", "grad_stride_n", "D", "Q", "R", "O_0", "O_1", "O_2", "end_0", "end_1")


@dataclass(frozen=True)
class Usage:
    """The compiler's report for one case on one architecture.

    spilled_bytes: registers spilled to memory. (AMD's scalar registers spill into lanes of vector registers, which do
    not count.)
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    assembly: str = field(repr=False, default="")


def compile_case(case: Case, arch: int | str, max_registers: int | None = None) -> Usage:
    """Compiles `case` for a compute capability (80, 90, 100) or gfx942 and reads the compiler's report.

    `max_registers` per thread (None: the compiler's choice) shows the cost of a tighter limit.

    Raises:
        RuntimeError: TRITON_INTERPRET is set (which disables compilation), or the report cannot be read.
    """
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: compile in a process without it")
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {}
    if case.aligned:
        attributes = {
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if signature[name].startswith("*") or (name in _SIZES and signature[name] != "constexpr")
        }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options: dict[str, Any] = {"num_warps": case.num_warps}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    if isinstance(arch, str):
        return _amd_usage(triton.compile(source, target=GPUTarget("hip", arch, 64), options=options))
    options["maxnreg"] = max_registers
    return _nvidia_usage(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _nvidia_usage(compiled: Any) -> Usage:
    """Reads `cuobjdump --dump-resource-usage` from Triton's own wheel; dynamic shared memory is Triton's value."""
    cuobjdump = Path(nvidia_backend).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    if not {"REG", "STACK", "LOCAL", "SHARED"} <= figures.keys():
        raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
    shared = max(compiled.metadata.shared, figures["SHARED"])
    return Usage(figures["REG"], figures["STACK"] + figures["LOCAL"], shared, compiled.asm["ptx"])


def _amd_usage(compiled: Any) -> Usage:
    """Reads the kernel's metadata from the assembly: vector registers, their spills, scratch memory and LDS."""
    assembly = compiled.asm["amdgcn"]
    keys = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size")
    figures = {key: re.search(rf"\.{key}:\s+(\d+)", assembly) for key in keys}
    if not all(figures.values()):
        raise RuntimeError(f"the assembly has no {', '.join(key for key, value in figures.items() if not value)}")
    registers, spills, scratch, static = (int(match[1]) for match in figures.values() if match)
    return Usage(registers, max(scratch, 4 * spills), max(static, compiled.metadata.shared), assembly)


def main(argv: list[str] | None = None) -> int:
    """Prints one Markdown row per kernel and architecture; returns 1 if one spills or exceeds shared memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=[str(a) for a in ARCHITECTURES], choices=map(str, ARCHITECTURES))
    names = parser.parse_args(argv).arch
    architectures = [arch for arch in ARCHITECTURES if str(arch) in names]
    print("Triton", triton.__version__, "- registers per thread / spilled bytes / shared bytes\n")
    titles = [arch if isinstance(arch, str) else f"sm_{arch}" for arch in architectures]
    print("| kernel | warps |" + "".join(f" {title} |" for title in titles))
    print("|---|---|" + "---|" * len(titles))
    failed = False
    for case in all_cases():
        cells = []
        for arch in architectures:
            if case.archs is not None and arch not in case.archs:
                cells.append(" |")
                continue
            usage = compile_case(case, arch)
            failed |= usage.spilled_bytes > 0 or usage.shared_bytes > SHARED_LIMIT_BYTES[arch]
            cells.append(f" {usage.registers} / {usage.spilled_bytes} / {usage.shared_bytes} |")
        if any(cell != " |" for cell in cells):
            print(f"| {case.name} | {case.num_warps} |" + "".join(cells), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
