"""Uploads a finished export to the Hugging Face Hub."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

logger = logging.getLogger(__name__)


def push(directory: Path, repository: str, *, private: bool, message: str) -> str:
    """Creates the repository if it does not exist, and uploads all files of `directory`.

    huggingface_hub finds endpoint and token by itself (`hf auth login`, HF_TOKEN, HF_ENDPOINT).

    Args:
        repository: OWNER/NAME.
        private: For a new repository; one that exists keeps its visibility.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the upload failed; says how to repeat it. The directory is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="bpo")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message=message)
    except Exception as error:  # the HTTP client's errors differ between versions of huggingface_hub
        reason = " ".join(str(error).split()).rstrip(".")
        words = ["hf", "upload", repository, str(directory), ".", *(["--private"] if private else [])]
        raise ValueError(
            f"{directory} is complete, but its upload to {repository} failed: {reason}. Repeat "
            f"the command, which uploads what is there, or run: {shlex.join(words)}"
        ) from error
    logger.info("uploaded %s to %s", directory, url)
    return str(url)
