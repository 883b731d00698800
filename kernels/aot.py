"""Compiles every Triton kernel for GPUs that are not here, and reads registers, spills and shared memory.

    python kernels/aot.py [--arch 80 90 100]          prints the table of kernels/README.md

Each case gives the types of one real launch; pointers and sizes that are multiples of 16 are declared so, as they
are for LLaVA's vocabulary of 32,064 tokens, and once more without, as for a vocabulary of 31.
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

from bpo_kernels import linear_logprob, logprob_gather, preference_loss

# Shared memory that one block may use, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Sizes and strides of one row: declared as multiples of 16 in the aligned cases.
_SIZES = ("V", "stride_n")


@dataclass(frozen=True)
class Case:
    """One kernel with the argument types and constants of one launch."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: bool = True


@dataclass(frozen=True)
class Usage:
    """What the compiler reports for one case on one architecture."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    ptx: str = field(repr=False, default="")

    @property
    def spills(self) -> bool:
        """Registers that did not fit live in the stack or in local memory."""
        return self.stack_bytes > 0 or self.local_bytes > 0


def _logprob_gather_cases() -> list[Case]:
    cases = []
    for logits in ("bf16", "fp16", "fp32"):
        for vocab, aligned in ((32064, True), (31, False)):
            constants = {"stride_v": 1, "BLOCK_V": logprob_gather.block_v(vocab)}
            rows = {"target_ptr": "*i64", "max_ptr": "*fp32", "log_sum_ptr": "*fp32", "V": "i32", "stride_n": "i32"}
            forward = rows | {"logits_ptr": f"*{logits}", "logp_ptr": "*fp32"}
            backward = rows | {
                "logits_ptr": f"*{logits}",
                "grad_logits_ptr": f"*{logits}",
                "grad_logp_ptr": "*fp32",
            }
            label, warps = f"{logits} V={vocab}", logprob_gather.NUM_WARPS
            for direction, kernel, signature in (
                ("fwd", logprob_gather.logprob_gather_fwd_kernel, forward),
                ("bwd", logprob_gather.logprob_gather_bwd_kernel, backward),
            ):
                cases.append(Case(f"logprob_gather_{direction} {label}", kernel, signature, constants, warps, aligned))
    return cases


def _linear_logprob_cases() -> list[Case]:
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for with_dlogits, capped, vocab in ((True, False, 32064), (False, False, 32064), (True, True, 31)):
            signature = {
                "logits_ptr": "*fp32",
                "target_ptr": "*i64",
                "logp_ptr": "*fp32",
                "dlogits_ptr": f"*{dtype}",
                "V": "i32",
                "softcap": "fp32",
                "scale": "fp32",
            }
            constants: dict[str, Any] = {
                "HAS_BIAS": capped,
                "HAS_SOFTCAP": capped,
                "WITH_DLOGITS": with_dlogits,
                "BLOCK_V": logprob_gather.block_v(vocab),
            }
            if capped:
                signature["bias_ptr"] = f"*{dtype}"
            else:
                constants["bias_ptr"] = None
            label = f"logprob_rows {dtype} V={vocab}{' +D' if with_dlogits else ''}{' +bias+cap' if capped else ''}"
            kernel, warps = linear_logprob.logprob_rows_kernel, logprob_gather.NUM_WARPS
            cases.append(Case(label, kernel, signature, constants, warps, aligned=vocab % 16 == 0))
    return cases


def _preference_loss_cases() -> list[Case]:
    cases = []
    common = {"completion_ptr": "*i64", "pairs_ptr": "*i64", "N": "i32"}
    for has_weight in (True, False):
        weight_type = {"weight_ptr": "*fp32"} if has_weight else {}
        weight_constant: dict[str, Any] = {"HAS_WEIGHT": has_weight} | ({} if has_weight else {"weight_ptr": None})
        label = "+weight" if has_weight else ""
        outputs = ("policy_ptr", "reference_ptr", "loss_ptr", "chosen_ptr", "rejected_ptr", "derivative_ptr")
        for loss_type in ("sigmoid", "hinge", "ipo"):
            signature = common | weight_type | dict.fromkeys(outputs, "*fp32") | {"beta": "fp32", "slope": "fp32"}
            constants = weight_constant | {"LOSS_TYPE": loss_type, "BLOCK_N": preference_loss.BLOCK_N}
            name = f"preference_loss_fwd {loss_type} {label}".strip()
            kernel = preference_loss.preference_loss_fwd_kernel
            cases.append(Case(name, kernel, signature, constants, preference_loss.NUM_WARPS))
        signature = common | weight_type | {"P": "i32"}
        signature |= dict.fromkeys(("grad_loss_ptr", "derivative_ptr", "grad_policy_ptr"), "*fp32")
        blocks = {"BLOCK_N": preference_loss.BACKWARD_BLOCK_N, "BLOCK_P": preference_loss.BACKWARD_BLOCK_P}
        kernel = preference_loss.preference_loss_bwd_kernel
        name = f"preference_loss_bwd {label}".strip()
        cases.append(Case(name, kernel, signature, weight_constant | blocks, preference_loss.NUM_WARPS))
    return cases


def all_cases() -> list[Case]:
    """Every kernel in every configuration that the host wrappers launch."""
    return _logprob_gather_cases() + _linear_logprob_cases() + _preference_loss_cases()


def compile_case(case: Case, arch: int, max_registers: int | None = None) -> Usage:
    """Compiles `case` for compute capability `arch` (80, 90, 100) and reads the compiler's report.

    `max_registers` per thread (None: the compiler's choice) shows what a tighter limit would cost.

    Raises:
        RuntimeError: TRITON_INTERPRET is set (nothing can be compiled then), or the report cannot be read.
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
            if signature[name].startswith("*") or name in _SIZES and signature[name] != "constexpr"
        }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "maxnreg": max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _resource_usage(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"])


def _resource_usage(cubin: bytes, shared_bytes: int, ptx: str) -> Usage:
    """Reads `cuobjdump --dump-resource-usage` from Triton's own wheel; dynamic shared memory is Triton's figure."""
    cuobjdump = Path(nvidia_backend).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    if not {"REG", "STACK", "LOCAL", "SHARED"} <= figures.keys():
        raise RuntimeError(f"cuobjdump gave no resource usage: {report!r}")
    shared = max(shared_bytes, figures["SHARED"])
    return Usage(figures["REG"], figures["STACK"], figures["LOCAL"], shared, ptx)


def main(argv: list[str] | None = None) -> int:
    """Prints one Markdown row per kernel and architecture; returns 1 where one spills or exceeds shared memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT_BYTES))
    architectures = parser.parse_args(argv).arch
    print("Triton", triton.__version__, "- registers per thread / spilled bytes / shared bytes\n")
    print("| kernel | warps |" + "".join(f" sm_{arch} |" for arch in architectures))
    print("|---|---|" + "---|" * len(architectures))
    failed = False
    for case in all_cases():
        cells = []
        for arch in architectures:
            usage = compile_case(case, arch)
            failed |= usage.spills or usage.shared_bytes > SHARED_LIMIT_BYTES[arch]
            cells.append(f" {usage.registers} / {usage.stack_bytes + usage.local_bytes} / {usage.shared_bytes} |")
        print(f"| {case.name} | {case.num_warps} |" + "".join(cells), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
