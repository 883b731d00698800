"""Process setup of the demo: silences third-party logging, limits threads, collects versions for the report."""

from __future__ import annotations

import os
import platform

from bpo.job.run_record import version_of, versions


def quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo needs no downloads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def use_one_thread() -> None:
    """Limits PyTorch to one thread.

    For models this small, a second thread is not faster (measured) and busy-waits. One thread also makes the figures
    independent of the number of cores.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the training processes
    torch.set_num_threads(1)


def tested_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions(), "triton": version_of("triton")}
