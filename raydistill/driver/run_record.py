"""What the driver keeps of a run: its MLflow runs, and how long its stages took."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from raydistill.config.reading import flatten
from raydistill.config.schema import Config
from raydistill.driver.binding import kept_binding
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder
from raydistill.errors import InputError, RunLost, StageFailed
from raydistill.teachers.request import TeacherError
from raydistill.tracking.store import TrackingAway, TrackingError, open_run, run_tags, tracking_uri
from raydistill.tracking.tracker import Tracker
from raydistill.workers.stop_signal import TRACKING_WITHIN_S, Stopped


class RunRecord:
    """Where the run keeps things, its MLflow runs, how long its stages took.

    Attributes:
        seconds: by stage; a resumed stage adds to what it took before.
        open: MLflow runs that have not ended, the parent first.
        runs: ids that the run's checkpoints bear.
    """

    def __init__(self, config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> None:
        self.config, self.run, self.inputs = config, run, inputs
        self.uri = tracking_uri(config, run.storage)
        self.seconds: dict[str, float] = run.recall().get("seconds", {})
        self._lock = threading.Lock()  # of stages that go on at the same time
        self.open: list[str] = []
        binding = kept_binding(run)
        self.runs = binding.runs if binding else ()
        self.parent = self._mlflow_run(config, run.name, "pipeline", parent)

    def _mlflow_run(self, config: Config, name: str, stage: str, parent: str | None) -> str:
        """Open a run, or the same one again on a resume."""
        known = self.run.recall().get("mlflow", {}).get(stage)
        run_id = self._wait_for_store(
            functools.partial(
                open_run,
                self.uri,
                config.tracking.experiment,
                name,
                storage=self.run.storage,
                params=flatten(config),
                tags=run_tags(config, stage),
                parent_run_id=parent,
                resume_run_id=known,
            )
        )
        with self._lock:
            self.run.remember(mlflow=self.run.recall().get("mlflow", {}) | {stage: run_id})
        self.open.append(run_id)
        return run_id

    def stage_run(self, config: Config, stage: str, name: str | None = None) -> str:
        """`name`: what the UI shows after the run's own name; the stage where None."""
        return self._mlflow_run(config, f"{self.run.name}/{name or stage}", stage, self.parent)

    def _wait_for_store(self, open_it: Callable[[], str]) -> str:
        """Open a run; a store that is away is waited for, since training before and after does not need it."""
        deadline, told = time.monotonic() + self.config.tracking.retry_for_s, float("-inf")
        while True:
            try:
                return open_it()
            except TrackingAway as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    print(f"waiting for MLflow, up to {left:.0f} s more (tracking.retry_for_s): {error}", flush=True)
                time.sleep(min(5.0, left))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Name a stage on the screen, and measure it."""
        print(f"— {stage}", flush=True)
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
                self.run.remember(seconds=self.seconds)

    def finish(self, run_id: str, status: str = "FINISHED", within_s: float = 60.0) -> None:
        """End one MLflow run with its status."""
        Tracker(self.uri, run_id).finish(status, within_s)
        self.open.remove(run_id)

    def give_up(self, status: str, within_s: float = 60.0) -> None:
        """End every run that is still open, stages before their parent; a store that is away is waited for once."""
        deadline = time.monotonic() + within_s
        for run_id in reversed(list(self.open)):
            self.finish(run_id, status, max(0.0, deadline - time.monotonic()))


@contextmanager
def open_record(config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> Iterator[RunRecord]:
    """Open the run's MLflow parent and close it with the status that the block deserves."""
    try:
        record = RunRecord(config, run, inputs, parent)
    except (TrackingError, InputError) as error:
        raise StageFailed(str(error)) from error
    images = [] if inputs.images is None else [f"images: {inputs.images}"]
    for line in (f"run {run.name} in {run.path}", f"prompts: {inputs.prompts.report}", *images, *inputs.notes):
        print(line, flush=True)
    try:
        yield record
    except (StageFailed, InputError) as error:
        record.give_up("FAILED")
        raise StageFailed(str(error)) from error
    except (TeacherError, TrackingError, ValueError, OSError, RayError) as error:
        record.give_up("FAILED")
        raise StageFailed(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        record.give_up("KILLED")
        raise StageFailed("interrupted") from None
    except Stopped:
        record.give_up("KILLED", TRACKING_WITHIN_S)
        raise
    except RunLost:  # whose MLflow runs are the other job's now
        raise
    except BaseException:
        record.give_up("FAILED")
        raise
    record.finish(record.parent)
