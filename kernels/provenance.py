"""The source commit recorded in reports, with or without git.

BPO_COMMIT, if set, is used verbatim, for machines without git or without the clone's history. Otherwise git is queried.
The result is "unknown" if git is not installed, the sources are not a clone, or git rejects the directory because it
belongs to another user.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
GIT_TIMEOUT_S = 10.0


def source_commit(*folders: str, root: Path = ROOT) -> str:
    """Returns the commit of `root`, with "+changes" appended if tracked or new files differ from it.

    Args:
        folders: Folders to check for changes, relative to `root`, such as "bpo" and "kernels"; all if none is given.
        root: The directory that contains `.git`. A copy installed inside another repository has none, and that
            repository's commit is not that of these sources.
    """
    if commit := os.environ.get("BPO_COMMIT", "").strip():
        return commit
    if not (root / ".git").exists():
        return UNKNOWN
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return UNKNOWN
    return commit + ("+changes" if _git(root, "status", "--porcelain", "--", *folders) else "")


def _git(root: Path, *words: str) -> str:
    """The output of `git`; an empty string if it fails, is not installed or times out."""
    command = ["git", "-C", str(root), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
