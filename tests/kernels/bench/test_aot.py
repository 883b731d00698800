"""Every kernel compiles without a GPU for four architectures, fits, and moves memory in wide accesses."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from dataclasses import fields

import pytest

import bpo_kernels

aot = pytest.importorskip("bpo_kernels.bench.aot")
NVIDIA = (80, 90, 100)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, tuple | None], object]:
    return {(case.name, case.archs): case for case in aot.all_cases()}


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else [pytest.mark.slow]) for arch in aot.ARCHITECTURES]
)
def test_no_kernel_spills_or_exceeds_shared_memory(cases, arch):
    for (name, only), case in cases.items():
        if (only is not None and arch not in only) or ("fp16" in name and arch != 90):  # fp16 has the tiles of bf16
            continue
        usage = aot.compile_case(case, arch)
        assert 0 < usage.registers <= case.max_registers, (name, usage)
        assert usage.spilled_bytes == 0, (name, usage)
        assert usage.shared_bytes <= aot.SHARED_LIMIT_BYTES[arch], (name, usage)


def test_every_kernel_of_the_package_has_a_case(cases):
    from triton.runtime import JITFunction

    modules = [
        importlib.import_module(f"bpo_kernels.{module.name}") for module in pkgutil.iter_modules(bpo_kernels.__path__)
    ]
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {case.kernel.__name__ for case in cases.values()}


def test_no_argument_has_a_name_that_the_launcher_takes_for_itself(cases):
    """A kernel with an argument `stream` compiles, but cannot be launched with it by name."""
    from triton.backends.nvidia.compiler import CUDAOptions

    reserved = {"grid", "warmup", "stream", "device", "device_type", *(field.name for field in fields(CUDAOptions))}
    taken = {case.kernel.__name__: reserved & set(case.kernel.arg_names) for case in cases.values()}
    assert {kernel: names for kernel, names in taken.items() if names} == {}


@pytest.mark.parametrize(
    ("name", "archs"),
    [
        ("logprob_gather_fwd bf16 V=32064", None),
        ("logprob_gather_bwd bf16 V=32064", None),
        ("logprob_rows bf16 V=152064 +D", NVIDIA),
    ],
)
def test_aligned_rows_are_read_sixteen_bytes_at_a_time(cases, name, archs):
    ptx = aot.compile_case(cases[name, archs], 90).assembly
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx), "no 16-byte load"


@pytest.fixture(scope="module")
def row_in_registers(cases):
    return cases["logprob_row bf16 V=32064 +D", NVIDIA]


def test_a_row_in_registers_is_read_sixteen_bytes_at_a_time_and_once(row_in_registers):
    ptx = aot.compile_case(row_in_registers, 90).assembly
    # 32,768 entries by 512 threads, four at a time; what is not among them is target and target logit.
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 32768 // 512 // 4


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_targets_entry_of_d_is_stored_after_a_barrier(row_in_registers, arch):
    """Another thread has stored something else there before."""
    found = re.findall(r"st\.global\.(\w+)|(bar\.sync)", aot.compile_case(row_in_registers, arch).assembly)
    order = [store or barrier for store, barrier in found]
    assert order[-3:] == ["v4", "bar.sync", "b16"]


def test_the_report_sees_a_spill(row_in_registers):
    """The check is not blind: a row of 64 entries per thread does not fit 64 registers."""
    usage = aot.compile_case(row_in_registers, 90, max_registers=64)
    assert usage.spilled_bytes > 0


@pytest.mark.parametrize(
    ("arch", "instructions"),
    [
        (80, ["mma.sync", "cp.async.cg"]),
        (90, ["wgmma.mma_async", "cp.async.bulk.tensor"]),
        (100, ["tcgen05.mma", "cp.async.bulk.tensor"]),
        ("gfx942", ["v_mfma_f32"]),
    ],
)
def test_the_fused_gemms_run_on_tensor_cores_fed_by_asynchronous_copies(cases, arch, instructions):
    prefixes = ("fused_logprob bf16 N=2048", "lora_fused bf16 1 members")
    found = [
        case
        for (name, only), case in cases.items()
        if only == (arch,) and name.startswith(prefixes) and "+" not in name
    ]
    assert len(found) == 2
    for case in found:
        assembly = aot.compile_case(case, arch).assembly
        assert [one for one in instructions if one not in assembly] == [], case.name
