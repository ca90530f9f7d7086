"""The stages of a run, each as one call of the driver. A stage that was done before is read, not done again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from raydistill.background import in_background
from raydistill.config.schema import Config
from raydistill.data.synthesis import Recipe
from raydistill.data.synthesis_stream import SynthesisLog, synthesise_on_ray
from raydistill.distillation.networks import guidance_scale
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_record import RunRecord
from raydistill.evaluation.evaluator import FixedPrompts, draw_teacher
from raydistill.pictures.files import save_pictures
from raydistill.storage.atomic import read_json, replace_text
from raydistill.storage.resolve import resolve
from raydistill.teachers import registry
from raydistill.teachers.client import TeacherClient
from raydistill.tracking.progress import ProgressWatcher
from raydistill.tracking.screen import screen
from raydistill.tracking.tracker import Tracker
from raydistill.workers.bridge import train_bridge
from raydistill.workers.distill import launch
from raydistill.workers.stage import Stage

PAIRS_FOLDER = "pairs"  # of a run


# -- teachers ---------------------------------------------------------------------------------------------


@contextmanager
def teacher_service(record: RunRecord, config: Config, name: str) -> Iterator[Future[None]]:
    """The teacher service for the length of the block, which begins at once: what is yielded is done when they are ready.

    Its failure is a TeacherStartError; a block that needs teachers, or waits for what does, must look at it.
    """
    given_up, begun = threading.Event(), threading.Event()

    def start() -> None:
        how = registry.attach if name == config.teachers.service else registry.start
        with record.timed("start " + name.replace(f"teacher-{record.run.name}", "teacher")):
            # leaves nothing behind if it fails
            how(str(resolve(config.teacher.model)), config.teachers, name, given_up)
        begun.set()
        if config.teachers.quantize != "none":
            record.describe_teachers(TeacherClient(name, config.teachers).describe())

    teachers = in_background(start)
    try:
        yield teachers
    finally:
        given_up.set()
        wait([teachers])
        if begun.is_set():
            registry.release(name)


def draw_teacher_pictures(record: RunRecord, service: str, teachers: Future[None]) -> dict[str, float]:
    """The teacher's row of the table; drawn once a run, when its teachers are ready."""
    config, folder = record.config, record.run.path
    if (folder / "teacher.json").is_file():
        return read_json(folder / "teacher.json", "remove it, and the teacher is drawn again")
    teachers.result()
    with record.timed("teacher evaluation"):
        space = record.inputs.teacher
        fixed = FixedPrompts(record.inputs.held_out, config.evaluation.count, config.evaluation.seed)
        client = TeacherClient(service, config.teachers)
        pictures, table = draw_teacher(client.generate, space, fixed, config, guidance_scale(config, space))
        save_pictures(folder / "teacher.safetensors", pictures[: config.evaluation.grid])
        replace_text(folder / "teacher.json", json.dumps(table))
    return table


# -- pairs and Bridge -------------------------------------------------------------------------------------


def make_pairs_alone(record: RunRecord) -> str:
    """Pairs for stages that need no teachers themselves; real images, and pairs that are there, need none either."""
    config, service = record.config, record.config.teachers.service or f"teacher-{record.run.name}"
    if config.bridge.pairs is not None or config.synthesis.images is not None:
        return make_pairs(record, None)
    with teacher_service(record, config, service) as teachers:
        teachers.result()
        return make_pairs(record, service)


def make_pairs(record: RunRecord, service: str | None) -> str:
    """Pairs for the Bridge and the discriminator, of teacher samples or real images; goes on where it stopped."""
    config, run = record.config, record.run
    if config.bridge.pairs is not None:
        return str(resolve(config.bridge.pairs))
    folder, progress = run.path / PAIRS_FOLDER, run.path / "synthesis-progress.json"
    recipe = recipe_of(config, record.inputs)
    client = TeacherClient(service, config.teachers) if recipe.samples else None
    with record.timed("synthesis"):
        run_id = record.stage_run(config, "synthesis")
        tracker = Tracker(record.uri, run_id)
        log = SynthesisLog(tracker, progress, config.evaluation.grid)
        try:
            with ProgressWatcher(progress, "synthesis", "row"):
                synthesise_on_ray(recipe, folder, config.synthesis, client, log)
            log.finish(folder, recipe.count)
        finally:
            tracker.close()
        record.finish(run_id)
        record.describe_pairs(folder)
    return str(folder)


def recipe_of(config: Config, inputs: Inputs) -> Recipe:
    """What decides the rows of the run's pairs."""
    synthesis = config.synthesis
    return Recipe(
        teacher=inputs.teacher,
        student=inputs.student,
        source=inputs.prompts if inputs.images is None else inputs.images,
        count=synthesis.count if inputs.images is None else len(inputs.images),
        batch_size=synthesis.batch_size,
        shard_size=synthesis.shard_size,
        seed=config.run.seed,
        posterior=synthesis.posterior,
        steps=config.teacher.sampling_steps,
        guidance_scale=guidance_scale(config, inputs.teacher),
        text_dtype=config.prompts.encoder_dtype,
    )


def train_bridge_on(record: RunRecord, pairs: str) -> str:
    """Train the Bridge on a set of pairs; returns its folder."""
    config = record.config
    with record.timed("bridge"):
        run_id = record.stage_run(config, "bridge")
        trained = train_bridge(config, record.run.path, pairs, record.uri, run_id, record.runs)
        record.finish(run_id)
    screen.say("Bridge: " + ", ".join(f"{key} {value:.3f}" for key, value in trained.metrics.items()))
    return str(trained.folder)


# -- distillation -----------------------------------------------------------------------------------------


def distillation(
    record: RunRecord,
    name: str,
    config: Config,
    *,
    needs: Sequence[Future[Any]] = (),
    **inputs: str | None,
) -> dict[str, Any]:
    """Run one distillation to its end: the main one, or a control, which is the same code with another configuration.

    Args:
        needs: what runs at the same time, and without which it is in vain.
        inputs: bridge, real, pairs and service, as in `Stage`.

    Returns:
        The stage's result: before, after, steps, best_step, stopped.
    """
    with record.timed(name), record.distillation_run(config, name) as run_id:
        stage = Stage(
            name=name,
            config=config.model_dump(),
            folder=str(record.run.path / name),
            **inputs,
            mlflow_uri=record.uri,
            mlflow_run=run_id,
            runs=record.runs,
        )
        return launch(stage, needs)
