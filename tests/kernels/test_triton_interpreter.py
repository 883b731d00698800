"""The operation tests once more, on the Triton kernels, in Triton's interpreter.

    TRITON_INTERPRET=1 BPO_KERNELS=triton pytest tests/kernels/test_linear_logprob.py      (one file, with a debugger)

In a process of its own: Triton decides when it is imported whether it interprets or compiles.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton
from packaging.version import Version

HERE = Path(__file__).parent
FILES = (
    "test_logprob_gather.py",
    "test_linear_logprob.py",
    "test_logprob_rows.py",
    "test_lora.py",
    "test_preference_loss.py",
    "test_preference_sizes.py",
    "test_linear_preference_loss.py",
    "test_second_target_logprob.py",
)


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="Triton's interpreter before 3.7 converts arrays of one element by int(), which NumPy 2.4 and later refuses",
)
@pytest.mark.skipif(os.environ.get("BPO_KERNELS") == "triton", reason="these tests run on Triton already")
def test_operation_tests_pass_on_triton_in_the_interpreter():
    files = [str(HERE / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "BPO_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 200, result.stdout[-2000:]
