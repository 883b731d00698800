"""Experiment trackers behind one interface, each by its own library: TensorBoard, Weights & Biases, MLflow, trackio.

Keys and addresses come from the environment and files of each library; bpo neither reads nor writes them. metrics.jsonl
always has all metrics, so a tracker that fails in the middle of a run is closed and the run continues.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bpo.config.io import flat_tree, to_tree
from bpo.config.tracking import TrackingConfig
from bpo.config.training import Config
from bpo.job.durable import write_durably

logger = logging.getLogger(__name__)

# Run ids of trackers, so that a resumed run continues its curves.
RUN_IDS = "tracking.json"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
# How long the end of a run waits for trackers.
CLOSE_TIMEOUT_S = 120.0
_MLFLOW_PARAMS_PER_REQUEST, _MLFLOW_PARAM_CHARACTERS = 100, 500


class Tracker(Protocol):
    """Receives the metrics of each logged step on rank 0."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard; steps after `start_step` of an earlier start are hidden."""

    def __init__(self, output_dir: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline, files in OUTPUT_DIR/wandb for `wandb sync`.

    A resumed run repeats steps with the same values; the library ignores those it already has.
    """

    def __init__(
        self, options: TrackingConfig, output_dir: Path, name: str, run_id: str | None, settings: dict[str, Any]
    ):
        wandb = importlib.import_module("wandb")
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=options.project,
            name=name,
            id=self.run_id,
            resume="allow",
            mode="offline" if options.offline else None,
            dir=str(output_dir),
            config=settings,
            # No copies of the console, the environment's packages or the user's source.
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI; offline, in OUTPUT_DIR/mlflow.db."""

    def __init__(
        self, options: TrackingConfig, output_dir: Path, name: str, run_id: str | None, settings: dict[str, Any]
    ):
        if options.offline:
            os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the library is imported
        self._mlflow = importlib.import_module("mlflow")
        uri = f"sqlite:///{(output_dir / 'mlflow.db').resolve()}" if options.offline else None
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)
        if run_id is None:
            experiment = self._client.get_experiment_by_name(options.project)
            artifacts = (output_dir / "mlflow").resolve().as_uri() if options.offline else None
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(options.project, artifact_location=artifacts)
            )
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            self._log_settings(str(run_id), settings)
        else:
            self._client.set_terminated(run_id, "RUNNING")
        self.run_id = str(run_id)

    def _log_settings(self, run_id: str, settings: dict[str, Any]) -> None:
        param = self._mlflow.entities.Param
        params = [param(key, str(value)[:_MLFLOW_PARAM_CHARACTERS]) for key, value in settings.items()]
        for start in range(0, len(params), _MLFLOW_PARAMS_PER_REQUEST):
            self._client.log_batch(run_id, params=params[start : start + _MLFLOW_PARAMS_PER_REQUEST])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        entries = [metric(re.sub(r"[^\w\-. /]", "_", name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=entries)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class Trackio:
    """A run of trackio; offline, in OUTPUT_DIR/trackio."""

    def __init__(
        self, options: TrackingConfig, output_dir: Path, name: str, run_id: str | None, settings: dict[str, Any]
    ):
        if options.offline:
            os.environ["TRACKIO_DIR"] = str((output_dir / "trackio").resolve())  # read when the library is imported
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(variable, None)
        trackio = importlib.import_module("trackio")
        self.run_id = run_id or name  # trackio continues a run of the same name
        self._run = trackio.init(
            project=options.project, name=self.run_id, config=settings, resume="allow", embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_LIBRARIES: dict[str, Callable[..., Any]] = {"wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}


class Trackers:
    """All trackers of a run, in a thread of their own; does nothing without any, as on ranks other than 0.

    A server that does not answer would otherwise hold up all ranks at the next step. A tracker that fails is closed,
    and the run continues without it.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None):
        self._trackers = dict(trackers or {})
        self._entries: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="experiment trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the metrics of a step."""
        if self._trackers:
            self._entries.put((step, dict(metrics)))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits until all trackers have their metrics, or for `timeout_s` seconds."""
        if not self._thread.is_alive():
            return
        self._entries.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error(
                "%s did not accept all metrics within %.0f s; metrics.jsonl has all of them",
                " or ".join(self._trackers),
                timeout_s,
            )

    def _work(self) -> None:
        while (entry := self._entries.get()) is not None:
            self._pass_on(*entry)
        self._each("could not be closed", lambda tracker: tracker.close())

    def _pass_on(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(f"failed at step {step}", lambda tracker: tracker.log(step, metrics))

    def _each(self, fault: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # of any library: an outage of a tracker must not end a run
                del self._trackers[name]
                reason = without_secrets(f"{type(error).__name__}: {error}")
                logger.error("%s %s and gets no more metrics (metrics.jsonl has all): %s", name, fault, reason)


def open_trackers(config: Config, *, enabled: bool, start_step: int) -> Trackers:
    """Opens the trackers of `tracking.to` and TensorBoard.

    Args:
        enabled: False on ranks other than 0.
        start_step: Steps finished by earlier starts of this run.

    Raises:
        ValueError: A library is missing or refuses to start; names the extra to install, never a key.
    """
    if not enabled:
        return Trackers()
    output_dir, options = Path(config.train.output_dir), config.tracking
    trackers: dict[str, Tracker] = {}
    if config.train.tensorboard:
        trackers["TensorBoard"] = TensorBoard(output_dir, start_step)
    if not options.to:
        return Trackers(trackers)
    path = output_dir / RUN_IDS
    run_ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() and config.train.resume else {}
    settings = {key: value for key, value in flat_tree(to_tree(config)).items() if value not in ("", [], None)}
    name = options.run_name or output_dir.resolve().name
    for kind in dict.fromkeys(options.to):
        try:
            tracker = _LIBRARIES[kind](options, output_dir, name, run_ids.get(kind), settings)
        except ImportError as error:
            raise ValueError(f"tracking.to has {kind}, which needs `pip install 'bpo[{kind}]'`: {error}") from error
        except Exception as error:  # of any library: no network, no key, a run that was deleted
            reason = without_secrets(f"{type(error).__name__}: {error}")
            raise ValueError(
                f"tracking.to: {kind} does not start: {reason}. Log in with its own command, or set tracking.offline"
            ) from None
        trackers[kind] = tracker
        run_ids[kind] = tracker.run_id
    write_durably(path, json.dumps(run_ids) + "\n")
    return Trackers(trackers)


def without_secrets(text: str) -> str:
    """`text` without the values of environment variables whose name says that they are secret."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return text
