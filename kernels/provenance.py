"""The source commit that a report names, also where there is no git.

BPO_COMMIT, if set, is taken as it is: it carries the commit to machines without git or without the clone's history.
Otherwise git is asked. The answer is "unknown" where git is not installed, where the sources are not a clone, or where
git refuses the directory because it belongs to another user.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
GIT_TIMEOUT_S = 10.0


def source_commit(*folders: str, root: Path = ROOT) -> str:
    """The commit of `root`; "+changes" follows where tracked or new files differ from it.

    Args:
        folders: What a change counts in, relative to `root`, such as "bpo" and "kernels"; everywhere if none is given.
        root: The directory that holds `.git`. A copy installed inside another repository has none, and the
            commit of that repository is not the one of these sources.
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
    """What `git` prints; an empty string where it fails, is not installed or does not answer in time."""
    command = ["git", "-C", str(root), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
