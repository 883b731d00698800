"""Versions for the report, and libraries kept from talking over the demo's own lines."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything the demo reads is on this machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def use_all_cores() -> None:
    """Torch threads of this process; the ranks of a training, its children, have one each (OMP_NUM_THREADS)."""
    import torch

    torch.set_num_threads(min(os.cpu_count() or 1, 8))


def tested_versions() -> dict[str, str]:
    packages = ("bpo", "torch", "transformers", "deepspeed", "triton", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
