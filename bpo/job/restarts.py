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
    """The job starts again and again without ever reaching a new checkpoint."""

    exit_code = EXIT_NO_PROGRESS


class RestartCount:
    """Starts since the last progress. A job that dies before every new checkpoint must not be requeued for ever.

    Args:
        directory: Where the count is kept, in the file `name`.
        progress: What a start is to get beyond, with a place for its number.
        option: Which option gives the limit.
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

    def start(self, step: int, limit: int) -> int:
        """Counts a restart from `step` (0: the beginning); returns how many there were without progress.

        Raises:
            NoProgressError: `limit` restarts (0: any number) have not got beyond `step`.
        """
        before = {"step": -1, "restarts": 0}
        if self.path.is_file():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                logger.warning("%s is damaged; counting anew", self.path)
        restarts = int(before["restarts"]) + 1 if before["step"] == step else 1
        if limit and restarts > limit:
            raise NoProgressError(
                f"{limit} restarts since {self._progress.format(step)} have not brought a new one; look at the logs of "
                f"these starts. To try again all the same, remove {self.path} ({self._option} is {limit})"
            )
        write_durably(self.path, json.dumps({"step": step, "restarts": restarts}), sync=False)
        return restarts

    def clear(self) -> None:
        """The run ended as it should."""
        self.path.unlink(missing_ok=True)
