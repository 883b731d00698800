"""Versions for the report, and libraries kept from talking over the demo's own lines."""

from __future__ import annotations

import os
import platform

from bpo.job.run_record import version_of, versions


def quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything the demo reads is on this machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def use_one_thread() -> None:
    """The models are so small that a second thread gains nothing (measured), and spins where the machine is busy.

    It also makes the figures the same on machines with another number of cores.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks of the trainings, its children
    torch.set_num_threads(1)


def tested_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions(), "triton": version_of("triton")}
