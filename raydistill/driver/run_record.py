"""What the driver keeps of a run: its MLflow runs, and how long its stages took."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from ray.exceptions import RayError

from raydistill.config.command_line import shown_command
from raydistill.config.reading import flatten, get
from raydistill.config.schema import Config
from raydistill.data.pairs import count_rows, fingerprint
from raydistill.data.pictures import Pictures
from raydistill.driver.binding import kept_binding
from raydistill.driver.job_metadata import describe_job
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder
from raydistill.errors import InputError, RunLost, StageFailed, mask
from raydistill.storage.place import Place
from raydistill.storage.resolve import input_place
from raydistill.teachers.request import TeacherError
from raydistill.tracking.screen import screen
from raydistill.tracking.store import FAILURE, TrackingAway, TrackingError, open_run, run_tags, tracking_uri, ui_lines
from raydistill.tracking.tracker import Tracker
from raydistill.workers.scorers import RunScorers
from raydistill.workers.stop_signal import TRACKING_WITHIN_S, Stopped

T = TypeVar("T")
PARAMS = (  # by which people compare runs; what was typed comes on top, and config.yaml has them all
    "teacher.model", "teacher.guidance_scale", "student.model", "student.unet", "student.lora_start", "student.kind", "student.lr",
    "bridge.checkpoint",
    "distill.steps", "distill.batch_size", "fake_score.kind", "fake_score.updates", "vsd.weight", "discriminator.weight",
    "run.seed",
)  # fmt: skip
SCORED_WITHIN_S = 6 * 3600.0  # pictures that the driver has, for which nobody waits but the summary
DESCRIBED_WITHIN_S = 10.0  # a store that is away is told at the end


def _facts(config: Config) -> dict[str, object]:
    """Tags that say what a run is, beside `run_tags`."""
    file, teachers = config.origin.file, config.teachers
    how = {
        f"teachers.{key}": getattr(teachers, key)
        for key in ("backend", "compile", "channels_last", "attention", "quantize")
    }
    how |= {f"distill.{key}": getattr(config.distill, key) for key in ("compile", "channels_last")}
    how |= {"student.autocast": config.student.autocast}
    reward = (
        {f"reward.{key}": getattr(config.reward, key) for key in ("metric", "weight")} if config.reward.is_on else {}
    )
    return (
        {"steps": config.distill.steps, "student.kind": config.student.kind}
        | how
        | reward
        | ({} if file is None else {"recipe": Path(file).stem})
    )


class RunRecord:
    """Where the run keeps things, its MLflow runs, how long its stages took.

    Attributes:
        seconds: by stage; a resumed stage adds to what it took before.
        open: MLflow runs that have not ended, the parent first.
        ui, link: lines, and one line, that say how to look at the run in MLflow.
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
        self._fingerprints = binding.inputs if binding else {}
        self.parent = self._mlflow_run(config, run.name, "pipeline", parent)
        page = self._wait_for_store(functools.partial(ui_lines, self.uri, self.parent))
        self.link = ", then ".join(page)
        self.ui = [f"{name:<9} {line}" for name, line in zip(["MLflow", ""], page, strict=False)]

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
                params={key: value for key, value in flatten(config).items() if key in {*PARAMS, *config.origin.keys}},
                tags=run_tags(config, stage) | _facts(config),
                parent_run_id=parent,
                resume_run_id=known,
            )
        )
        with self._lock:
            self.run.remember(mlflow=self.run.recall().get("mlflow", {}) | {stage: run_id})
        self.open.append(run_id)
        return run_id

    def describe(self) -> None:
        """What the run is made of: its whole configuration, and its sets of prompts and pairs."""
        tracker, inputs, config = Tracker(self.uri, self.parent), self.inputs, self.config
        tracker.artifact(self.run.path / "config.yaml")
        sets = {"prompts.path": ("training", inputs.prompts.report.source, len(inputs.prompts))}
        sets["evaluation.prompts"] = ("evaluation", inputs.held_out.report.source, len(inputs.held_out))
        for key in ("bridge.pairs", "discriminator.real_data"):
            if (folder := get(config, key)) is not None:
                sets[key] = (key, str(folder), count_rows(input_place(folder)))
        if inputs.images is not None:
            rows = None if isinstance(inputs.images, Pictures) else len(inputs.images)
            sets["synthesis.images"] = ("synthesis.images", inputs.images.source, rows)
        for key, (context, source, rows) in sets.items():
            tracker.dataset(context, source, self._fingerprints.get(key, ""), rows)
        tracker.close(DESCRIBED_WITHIN_S)

    def describe_pairs(self, folder: Place, context: str = "pairs") -> None:
        """The set of pairs that the run itself has made, which is whole."""
        tracker = Tracker(self.uri, self.parent)
        tracker.dataset(context, str(folder), fingerprint(folder), count_rows(folder))
        tracker.close(DESCRIBED_WITHIN_S)

    def scorers(self, what: str, device: torch.device | None = None) -> RunScorers:
        """What scores pictures that the driver has; a metric that fails is said. `device`: as in `RunScorers`."""

        def failed(metric: str, reason: str) -> None:
            screen.say(f"metric    {metric} of {what} failed, and is left out: {reason}")

        scope = self.runs[0] if self.runs else ""
        return RunScorers(self.config.evaluation, device, failed, scope=scope or "", within_s=SCORED_WITHIN_S)

    def describe_teachers(self, ranks: Sequence[dict[str, Any]]) -> None:
        """How near the scores of quantised teachers are to those of whole precision, before anything uses them.

        Args:
            ranks: facts about those of a replica, see `TeacherRank.describe`.
        """
        found = [rank["quantize_cosine"] for rank in ranks if "quantize_cosine" in rank]
        if not found:
            return
        kind, limit = self.config.teachers.quantize, self.config.teachers.quantize_cosine
        screen.say(
            f"teachers  {kind}: the VSD gradient's cosine to the unquantised one is {min(found):.4f} (at least {limit:g})"
        )
        tracker = Tracker(self.uri, self.parent)
        tracker.metrics({"teachers/quantize_cosine": min(found)}, 0)
        tracker.close(DESCRIBED_WITHIN_S)

    def stage_run(self, config: Config, stage: str, name: str | None = None) -> str:
        """`name`: what the UI shows after the run's own name; the stage where None."""
        return self._mlflow_run(config, f"{self.run.name}/{name or stage}", stage, self.parent)

    @contextmanager
    def distillation_run(self, config: Config, stage: str) -> Iterator[str]:
        """The MLflow run of a distillation: the parent itself for the main one, where people look first.

        A run that an earlier version began goes on in the nested run that it has.
        """
        nested = stage != "distill" or stage in self.run.recall().get("mlflow", {})
        run_id = self.stage_run(config, stage) if nested else self.parent
        yield run_id
        if nested:
            self.finish(run_id)

    def _wait_for_store(self, open_it: Callable[[], T]) -> T:
        """Ask the store, to open a run for example; a store that is away is waited for, since training before and after does not need it."""
        deadline, said_at = time.monotonic() + self.config.tracking.retry_for_s, float("-inf")
        while True:
            try:
                return open_it()
            except TrackingAway as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                if time.monotonic() - said_at > 60:
                    said_at = time.monotonic()
                    screen.say(f"waiting for MLflow, up to {left:.0f} s more (tracking.retry_for_s): {error}")
                time.sleep(min(5.0, left))

    @contextmanager
    def timed(self, stage: str, in_vain: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Name a stage on the screen, and measure it.

        Args:
            in_vain: whether nobody needs the stage any more: one that is given up has not failed.
        """

        def words(error: BaseException) -> str:
            if isinstance(error, Stopped):
                return "stopped after"
            return "no longer needed, after" if in_vain() else "failed after"

        started = time.monotonic()
        try:
            with screen.stage(stage, words):
                yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
                self.run.remember(seconds=self.seconds)

    def finish(self, run_id: str, status: str = "FINISHED", within_s: float = 60.0, why: str | None = None) -> None:
        """End one MLflow run with its status, and say why in its description and a tag."""
        tracker = Tracker(self.uri, run_id)
        if why is not None:
            why = mask(FAILURE, why)
            tracker.tags({FAILURE: why})
            tracker.note(f"**{status.lower()}**: {why}\n\n`{shown_command(self.config)}`")
        tracker.finish(status, within_s)
        self.open.remove(run_id)

    def give_up(self, status: str, why: str, within_s: float = 60.0) -> None:
        """End every run that is still open, stages before their parent; a store that is away is waited for once."""
        deadline = time.monotonic() + within_s
        for run_id in reversed(list(self.open)):
            self.finish(run_id, status, max(0.0, deadline - time.monotonic()), why)


@contextmanager
def open_record(config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> Iterator[RunRecord]:
    """Open the run's MLflow parent and close it with the status that the block deserves."""
    try:
        record = RunRecord(config, run, inputs, parent)
    except (TrackingError, InputError) as error:
        raise StageFailed(str(error)) from error
    images = [] if inputs.images is None else [f"images    {inputs.images}"]
    for line in (f"prompts   {inputs.prompts.report}", *images, *inputs.notes, *record.ui):
        screen.say(line)
    try:
        record.describe()
        describe_job(
            {
                "job_name": run.name,
                "run": str(run.path),
                "teacher": config.teacher.model,
                "student": config.student.model,
                "mlflow": record.link,
            }
        )
        yield record
    except (StageFailed, InputError) as error:
        record.give_up("FAILED", str(error))
        raise StageFailed(str(error)) from error
    except (TeacherError, TrackingError, ValueError, OSError, RayError) as error:
        text = f"{type(error).__name__}: {error}"
        record.give_up("FAILED", text)
        raise StageFailed(text) from error
    except KeyboardInterrupt:
        record.give_up("KILLED", "interrupted")
        raise StageFailed("interrupted") from None
    except Stopped as stopped:
        record.give_up("KILLED", str(stopped), TRACKING_WITHIN_S)
        raise
    except RunLost:  # whose MLflow runs are the other job's now
        raise
    except BaseException as error:
        record.give_up("FAILED", f"{type(error).__name__}: {error}")
        raise
    record.finish(record.parent)
