"""Every kernel compiles for sm_80 and sm_90 without a GPU, fits, and moves memory in wide accesses.

pytest tests/kernels/test_aot.py
"""

from __future__ import annotations

import os
import re

import pytest

aot = pytest.importorskip("bpo_kernels.aot")

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture(scope="module")
def cases() -> dict[str, object]:
    return {case.name: case for case in aot.all_cases()}


@pytest.mark.parametrize("arch", [80, 90])
def test_no_kernel_spills_or_exceeds_shared_memory(cases, arch):
    for name, case in cases.items():
        usage = aot.compile_case(case, arch)
        assert 0 < usage.registers <= 128, (name, usage)
        assert not usage.spills, (name, usage)
        assert usage.shared_bytes <= aot.SHARED_LIMIT_BYTES[arch], (name, usage)


def test_every_kernel_of_the_package_has_a_case(cases):
    from triton.runtime import JITFunction

    from bpo_kernels import linear_logprob, logprob_gather, preference_loss

    modules = (linear_logprob, logprob_gather, preference_loss)
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {case.kernel.__name__ for case in cases.values()}


@pytest.mark.parametrize(
    "name", ["logprob_gather_fwd bf16 V=32064", "logprob_gather_bwd bf16 V=32064", "logprob_rows bf16 V=32064 +D"]
)
def test_aligned_rows_are_read_sixteen_bytes_at_a_time(cases, name):
    ptx = aot.compile_case(cases[name], 90).ptx
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx), "no 16-byte load"


def test_the_report_sees_a_spill(cases):
    """The check is not blind: a kernel limited to 24 registers must spill."""
    usage = aot.compile_case(cases["preference_loss_bwd"], 90, max_registers=24)
    assert usage.spills
