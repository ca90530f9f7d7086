"""The story of one run, told by the driver: teachers, Bridge, distillation, controls, summary."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raydistill.background import in_background
from raydistill.config.reading import changed, flatten, needs_pairs, trains_bridge
from raydistill.config.schema import Config
from raydistill.errors import InputError, StageFailed
from raydistill.storage.resolve import resolve

if TYPE_CHECKING:
    import torch

    from raydistill.data.synthesis import Recipe
    from raydistill.driver.preflight import Inputs
    from raydistill.driver.run_folder import RunFolder
    from raydistill.storage.place import Place

PAIRS_FOLDER = "pairs"  # of a run


class Pipeline:
    """State of the driver: where the run keeps things, its MLflow runs, how long its stages took."""

    def __init__(self, config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> None:
        from raydistill.tracking.store import open_run, run_tags, tracking_uri

        self.config, self.run, self.inputs = config, run, inputs
        self.uri = tracking_uri(config, run.storage)
        self.seconds: dict[str, float] = run.recall().get("seconds", {})
        self._open = lambda config, name, stage, **more: open_run(
            self.uri,
            config.tracking.experiment,
            name,
            storage=run.storage,
            params=flatten(config),
            tags=run_tags(config, stage),
            **more,
        )
        self._alone = threading.Lock()  # of stages that go on beside each other
        self.open: list[str] = []  # MLflow runs that have not ended, the parent first
        self.parent = self._mlflow_run(config, run.name, "pipeline", parent)

    def _mlflow_run(self, config: Config, name: str, stage: str, parent: str | None) -> str:
        """Open a run, or the same one again on a resume."""
        known = self.run.recall().get("mlflow", {}).get(stage)
        run_id = self._patiently(config, name, stage, parent_run_id=parent, resume_run_id=known)
        with self._alone:
            self.run.remember(mlflow=self.run.recall().get("mlflow", {}) | {stage: run_id})
        self.open.append(run_id)
        return run_id

    def stage_run(self, config: Config, stage: str, name: str | None = None) -> str:
        """`name`: what the UI shows after the run's own name; the stage where None."""
        return self._mlflow_run(config, f"{self.run.name}/{name or stage}", stage, self.parent)

    def _patiently(self, *arguments: Any, **keywords: Any) -> str:
        """Open a run; a store that is away is waited for, as training before and after would not need it."""
        from raydistill.tracking.store import TrackingAway

        deadline, told = time.monotonic() + self.config.tracking.retry_for_s, float("-inf")
        while True:
            try:
                return self._open(*arguments, **keywords)
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
        """Measure a stage; a resumed stage adds to what it took before."""
        print(f"— {stage}", flush=True)
        started = time.monotonic()
        try:
            yield
        finally:
            with self._alone:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
                self.run.remember(seconds=self.seconds)

    def finish(self, run_id: str, status: str = "FINISHED", within_s: float = 60.0) -> None:
        from raydistill.tracking.tracker import Tracker

        Tracker(self.uri, run_id).finish(status, within_s)
        self.open.remove(run_id)

    def give_up(self, status: str, within_s: float = 60.0) -> None:
        """End every run that is still open, stages before their parent; a store that is away is waited for once."""
        deadline = time.monotonic() + within_s
        for run_id in reversed(list(self.open)):
            self.finish(run_id, status, max(0.0, deadline - time.monotonic()))


def distil(config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> dict[str, Any]:
    """Everything from the first teacher rank to the summary.

    Args:
        parent: MLflow run that this one is nested in.

    Raises:
        StageFailed: with the reason; the run can be continued.
    """
    with opened(config, run, inputs, parent) as pipeline:
        return _summarise(pipeline, _stages(pipeline))


@contextmanager
def opened(config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> Iterator[Pipeline]:
    """Open the run's MLflow parent and close it with the status that the block deserves."""
    from ray.exceptions import RayError

    from raydistill.teachers.request import TeacherError
    from raydistill.tracking.store import TrackingError
    from raydistill.workers.stop_signal import TRACKING_WITHIN_S, Stopped

    try:
        pipeline = Pipeline(config, run, inputs, parent)
    except (TrackingError, InputError) as error:
        raise StageFailed(str(error)) from error
    print(f"run {run.name} in {run.path}", flush=True)
    print(f"prompts: {inputs.prompts.report}", flush=True)
    if inputs.images is not None:
        print(f"images: {inputs.images}", flush=True)
    for note in inputs.notes:
        print(note, flush=True)
    try:
        yield pipeline
    except (StageFailed, InputError) as error:
        pipeline.give_up("FAILED")
        raise StageFailed(str(error)) from error
    except (TeacherError, TrackingError, ValueError, OSError, RayError) as error:
        pipeline.give_up("FAILED")
        raise StageFailed(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        pipeline.give_up("KILLED")
        raise StageFailed("interrupted") from None
    except Stopped:
        pipeline.give_up("KILLED", TRACKING_WITHIN_S)
        raise
    except BaseException:
        pipeline.give_up("FAILED")
        raise
    pipeline.finish(pipeline.parent)


def _stages(pipeline: Pipeline) -> dict[str, Any]:
    config, run = pipeline.config, pipeline.run
    service = config.teachers.service or f"teacher-{run.name}"
    results: dict[str, Any] = {}
    with _teachers(pipeline, config, service) as teachers:  # who start while the trainers do
        pictures = in_background(lambda: _evaluate_teacher(pipeline, service, teachers))
        if needs_pairs(config):
            teachers.result()
        pairs = _synthesise(pipeline, service) if needs_pairs(config) else None
        bridge = made_bridge(pipeline, pairs) if trains_bridge(config) else config.bridge.checkpoint
        real = config.discriminator.real_data
        real_folder = str(resolve(real)) if real else pairs
        results["distill"] = _distillation(
            pipeline,
            "distill",
            config,
            str(resolve(bridge)) if bridge else None,
            real_folder,
            service if config.vsd.weight > 0 else None,
            pairs,
            [teachers, pictures],
        )
        if "no_vsd" in config.controls:
            control = changed(config, {"vsd": {"weight": 0.0}})
            results["no_vsd"] = _distillation(
                pipeline, "no_vsd", control, str(resolve(bridge)) if bridge else None, real_folder, None, pairs
            )
        results["teacher"] = pictures.result()
    if "shared_space" in config.controls:
        control = shared_space(config)
        shared = f"teacher-{run.name}-shared"
        with _teachers(pipeline, control, shared) as teachers:
            results["shared_space"] = _distillation(
                pipeline, "shared_space", control, None, None, shared, needs=[teachers]
            )
    return results


def shared_space(config: Config) -> Config:
    """Plain DMD2 from the student's own multi-step model: identity Bridge, VSD only, the family's default guidance."""
    return changed(
        config,
        {
            "teacher": {"model": config.student.model, "guidance_scale": None},
            "bridge": {"checkpoint": None, "projector": "identity", "trainable": False},
            "discriminator": {"weight": 0.0, "real_data": None},
            "vsd": {"shift": None},
        },
    )


@contextmanager
def _teachers(pipeline: Pipeline, config: Config, name: str) -> Iterator[Future[None]]:
    """The teacher service for the length of the block, which begins at once: what is yielded is done when they are ready.

    Its failure is a TeacherStartError; a block that needs teachers, or waits for what does, must look at it.
    """
    from raydistill.teachers import registry

    given_up = threading.Event()

    def start() -> None:
        how = registry.attach if name == config.teachers.service else registry.start
        with pipeline.timed("start " + name.replace(f"teacher-{pipeline.run.name}", "teacher")):
            # leaves nothing behind if it fails
            how(str(resolve(config.teacher.model)), config.teachers, name, given_up)

    teachers = in_background(start)
    try:
        yield teachers
    finally:
        given_up.set()
        wait([teachers])
        if teachers.exception() is None:
            registry.release(name)


def _evaluate_teacher(pipeline: Pipeline, service: str, teachers: Future[None]) -> dict[str, float]:
    """The teacher's row of the table; drawn once a run, when its teachers are ready."""
    import json

    from raydistill.storage.atomic import read_json

    config, folder = pipeline.config, pipeline.run.path
    if (folder / "teacher.json").is_file():
        return read_json(folder / "teacher.json", "remove it, and the teacher is drawn again")
    teachers.result()
    # not before: the driver's other threads have imported what they need by now
    from raydistill.distill.networks import guidance_scale
    from raydistill.evaluation.evaluator import FixedPrompts
    from raydistill.evaluation.teacher import draw_teacher
    from raydistill.pictures.files import save_pictures
    from raydistill.storage.atomic import replace_text
    from raydistill.teachers.client import TeacherClient

    with pipeline.timed("teacher evaluation"):
        space = pipeline.inputs.teacher
        fixed = FixedPrompts(pipeline.inputs.held_out, config.evaluation.count, config.evaluation.seed)
        client = TeacherClient(service, config.teachers)
        pictures, table = draw_teacher(client.generate, space, fixed, config, guidance_scale(config, space))
        save_pictures(folder / "teacher.safetensors", pictures[: config.evaluation.grid])
        replace_text(folder / "teacher.json", json.dumps(table))
    return table


def pairs_alone(pipeline: Pipeline) -> str:
    """Pairs for stages that need no teachers themselves; real images, and pairs that are there, need none either."""
    config, service = pipeline.config, pipeline.config.teachers.service or f"teacher-{pipeline.run.name}"
    if config.bridge.pairs is not None or config.synthesis.images is not None:
        return _synthesise(pipeline, None)
    with _teachers(pipeline, config, service) as teachers:
        teachers.result()
        return _synthesise(pipeline, service)


def _synthesise(pipeline: Pipeline, service: str | None) -> str:
    """Pairs for the Bridge and the discriminator, of teacher samples or real images; goes on where it stopped."""
    from raydistill.data.synthesis_stream import SynthesisLog, synthesise_on_ray
    from raydistill.teachers.client import TeacherClient
    from raydistill.tracking.progress import ProgressWatcher
    from raydistill.tracking.tracker import Tracker

    config, run = pipeline.config, pipeline.run
    if config.bridge.pairs is not None:
        return str(resolve(config.bridge.pairs))
    folder, progress = run.path / PAIRS_FOLDER, run.path / "synthesis-progress.json"
    recipe = recipe_of(config, pipeline.inputs)
    client = TeacherClient(service, config.teachers) if recipe.samples else None
    with pipeline.timed("synthesis"):
        run_id = pipeline.stage_run(config, "synthesis")
        tracker = Tracker(pipeline.uri, run_id)
        log = SynthesisLog(tracker, progress, config.evaluation.grid)
        try:
            with ProgressWatcher(progress, "synthesis", "row"):
                synthesise_on_ray(recipe, folder, config.synthesis, client, log)
            log.finish(folder, recipe.count)
        finally:
            tracker.close()
        pipeline.finish(run_id)
    return str(folder)


def recipe_of(config: Config, inputs: Inputs) -> Recipe:
    """What decides the rows of the run's pairs."""
    from raydistill.data.synthesis import Recipe
    from raydistill.distill.networks import guidance_scale

    synthesis = config.synthesis
    return Recipe(
        inputs.teacher,
        inputs.student,
        inputs.prompts if inputs.images is None else inputs.images,
        synthesis.count if inputs.images is None else len(inputs.images),
        synthesis.batch_size,
        synthesis.shard_size,
        config.run.seed,
        synthesis.posterior,
        config.teacher.sampling_steps,
        guidance_scale(config, inputs.teacher),
        config.prompts.encoder_dtype,
    )


def made_bridge(pipeline: Pipeline, pairs: str) -> str:
    from raydistill.workers.bridge import train_bridge

    config = pipeline.config
    with pipeline.timed("bridge"):
        run_id = pipeline.stage_run(config, "bridge")
        trained = train_bridge(config, pipeline.run.path, pairs, pipeline.uri, run_id)
        pipeline.finish(run_id)
    print("Bridge: " + ", ".join(f"{key} {value:.3f}" for key, value in trained.metrics.items()), flush=True)
    return str(trained.folder)


def _distillation(
    pipeline: Pipeline,
    name: str,
    config: Config,
    bridge: str | None,
    real: str | None,
    service: str | None,
    pairs: str | None = None,
    needs: Sequence[Future[Any]] = (),
) -> dict[str, Any]:
    """`needs`: what runs beside it, and without which it is in vain."""
    from raydistill.workers.distill import launch
    from raydistill.workers.stage import Stage

    with pipeline.timed(name):
        stage = Stage(
            name=name,
            config=config.model_dump(),
            folder=str(pipeline.run.path / name),
            bridge=bridge,
            real=real,
            pairs=pairs,
            service=service,
            mlflow_uri=pipeline.uri,
            mlflow_run=pipeline.stage_run(config, name),
        )
        result = launch(stage, needs)
        pipeline.finish(stage.mlflow_run)
    return result


# -- the end ----------------------------------------------------------------------------------------------


def kept_pictures(folder: Place) -> list[torch.Tensor]:
    """What a run's folder keeps of before, after and the teacher, each [N, 3, S, S].

    N is what all three have: `evaluation.grid` may have changed between a run's parts.
    """
    from raydistill.pictures.files import load_pictures

    files = (folder / "distill" / "before.safetensors", folder / "distill" / "after.safetensors")
    rows = [load_pictures(file) for file in (*files, folder / "teacher.safetensors")]
    return [row[: min(map(len, rows))] for row in rows]


def _summarise(pipeline: Pipeline, results: dict[str, Any]) -> dict[str, Any]:
    """Table on screen, grid, summary.json, and all of it in MLflow."""
    from rich.console import Console

    from raydistill.evaluation.evaluator import FixedPrompts
    from raydistill.evaluation.summary import markdown, table, write_summary
    from raydistill.pictures.grids import before_after
    from raydistill.storage.atomic import move_folder, replacing
    from raydistill.tracking.store import ui_command
    from raydistill.tracking.tracker import Tracker

    run, config = pipeline.run, pipeline.config
    main = results["distill"]
    rows = {"student before": main["before"], "student after": main["after"]}
    controls = {"no_vsd": "control: VSD off", "shared_space": "control: shared space"}
    rows |= {label: results[name]["after"] for name, label in controls.items() if name in results}
    rows["teacher"] = results["teacher"]

    stage, shown = run.path / "distill", kept_pictures(run.path)
    captions = FixedPrompts(pipeline.inputs.held_out, len(shown[0]), config.evaluation.seed).captions
    sheet = before_after(*shown, captions)
    with replacing(run.path / "grids" / "before_after.png") as file:
        sheet.save(file)
    if (stage / "export").is_dir():
        move_folder(stage / "export", run.path / "export")

    summary = {
        "student_before": main["before"],
        "student_after": main["after"],
        "teacher": results["teacher"],
        "controls": {name: results[name]["after"] for name in controls if name in results},
        "stages": {name: round(seconds, 1) for name, seconds in pipeline.seconds.items()},
        "steps": main["steps"],
        "best_step": main["best_step"],
        "stopped": {
            name: results[name]["stopped"] for name in ("distill", *controls) if results.get(name, {}).get("stopped")
        },
        "mlflow_run_id": pipeline.parent,
    }
    tracker = Tracker(pipeline.uri, pipeline.parent)
    tracker.metrics(
        {
            f"{who}/{key}": value
            for who in ("student_before", "student_after", "teacher")
            for key, value in summary[who].items()
        },
        step=main["steps"],
    )
    tracker.image(sheet, "before_after", main["steps"])
    tracker.note(markdown(rows))
    tracker.artifact(run.path / "config.yaml")
    tracker.close()
    write_summary(run.path / "summary.json", summary)

    console = Console()
    console.print(table(rows, title=f"{run.name}: attribute accuracy on held-out prompts"))
    console.print("stages: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in pipeline.seconds.items()))
    for name, reason in summary["stopped"].items():
        steps, best = (results[name][key] for key in ("steps", "best_step"))
        print(
            f"stopped   {name} after {steps} of {config.distill.steps} updates ({reason}); its best is of update {best}"
        )
    print(f"pictures  {run.path / 'grids' / 'before_after.png'}")
    print(f"pipeline  {run.path / 'export'}  (num_inference_steps=1, guidance_scale=0)")
    print(f"MLflow    {ui_command(pipeline.uri)}")
    return summary
