"""A cap on restarts without progress.

OUTPUT/restarts.json     starts since the newest checkpoint
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from bpo.job.durable import write_durably
from bpo.job.exits import EXIT_NO_PROGRESS, JobError

logger = logging.getLogger(__name__)


class NoProgressError(JobError):
    """The job restarts repeatedly without reaching a new checkpoint."""

    exit_code = EXIT_NO_PROGRESS


class RestartCount:
    """Counts starts since the last progress, so that a job that dies before every new checkpoint stops being requeued.

    Args:
        directory: Directory of the file `name`, which holds the count.
        progress: Description of the progress made so far, with a placeholder for its number.
        option: The option that sets the limit.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "restarts.json",
        *,
        progress: str = "the checkpoint of step {}",
        option: str = "train.max_idle_restarts",
    ):
        self.path = directory / name
        self._progress, self._option = progress, option
        self._before: bytes | None = None

    def start(self, step: int, limit: int) -> int:
        """Counts a restart from `step` (0: the beginning); returns the number of restarts without progress.

        Raises:
            NoProgressError: `limit` restarts (0: no limit) have not gone past `step`.
        """
        before = {"step": -1, "restarts": 0}
        self._before = self.path.read_bytes() if self.path.is_file() else None
        if self._before is not None:
            try:
                content = json.loads(self._before)
                before = {name: int(content[name]) for name in before}
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is damaged; the count restarts at 0", self.path)
        restarts = before["restarts"] + 1 if before["step"] == step else 1
        if limit and restarts > limit:
            raise NoProgressError(
                f"{limit} restarts since {self._progress.format(step)} have made no progress; check the logs of these "
                f"starts. To try again anyway, remove {self.path} ({self._option} is {limit})"
            )
        write_durably(self.path, json.dumps({"step": step, "restarts": restarts}), sync=False)
        return restarts

    def undo(self) -> None:
        """Takes the last `start` back: it was refused, not killed."""
        if self._before is None:
            self.clear()
        else:
            write_durably(self.path, self._before, sync=False)

    def clear(self) -> None:
        """Resets the count after progress or a clean exit."""
        self.path.unlink(missing_ok=True)
