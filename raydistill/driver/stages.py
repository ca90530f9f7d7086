"""The stages of a run, each as one call of the driver. A stage that was done before is read, not done again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from raydistill.background import in_background
from raydistill.config.reading import drawing_config, draws_samples, needs_pairs, other_drawer, streams_bridge
from raydistill.config.schema import Config
from raydistill.data.ordered_shards import fewer_than_asked
from raydistill.data.pairs import covered_rows
from raydistill.data.pictures import Filters, Pictures
from raydistill.data.synthesis import Recipe
from raydistill.data.synthesis_stream import SynthesisLog, synthesise_on_ray
from raydistill.driver.preflight import Inputs, open_drawer
from raydistill.driver.run_record import RunRecord
from raydistill.evaluation.evaluator import FixedPrompts, Scorers, draw_teacher
from raydistill.pictures.files import save_pictures
from raydistill.spaces.distilled import drawing, teacher_sampling
from raydistill.storage.atomic import read_json, replace_text
from raydistill.storage.resolve import input_place, resolve
from raydistill.teachers import registry
from raydistill.teachers.client import TeacherClient
from raydistill.tracking.progress import ProgressWatcher
from raydistill.tracking.screen import screen
from raydistill.tracking.tracker import Tracker
from raydistill.workers.bridge import train_bridge
from raydistill.workers.distill import launch
from raydistill.workers.ray_train import network_variables
from raydistill.workers.stage import Stage

PAIRS_FOLDER = "pairs"  # of a run
SAMPLES_FOLDER = "samples"  # of a run, with pictures that are drawn for the discriminator alone


# -- teachers ---------------------------------------------------------------------------------------------


@contextmanager
def teacher_service(record: RunRecord, config: Config, name: str) -> Iterator[Future[None]]:
    """The teacher service for the length of the block, which begins at once: what is yielded is done when they are ready.

    Its failure is a TeacherStartError; a block that needs teachers, or waits for what does, must look at it.
    """
    given_up, begun = threading.Event(), threading.Event()

    def start() -> None:
        how = registry.attach
        if name != config.teachers.service:
            how = partial(registry.start, network=network_variables(config))
        with record.timed("start " + name.replace(f"teacher-{record.run.name}", "teacher"), given_up.is_set):
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


def draw_teacher_pictures(
    record: RunRecord, service: str, teachers: Future[None], scorers: Scorers | None = None
) -> dict[str, float]:
    """The teacher's row of the table; drawn once a run, when its teachers are ready. `scorers`: as in `draw_teacher`."""
    config, folder = record.config, record.run.path
    if (folder / "teacher.json").is_file():
        return read_json(folder / "teacher.json", "remove it, and the teacher is drawn again")
    teachers.result()
    with record.timed("teacher evaluation"):
        space = record.inputs.teacher
        fixed = FixedPrompts(record.inputs.held_out, config.evaluation.count, config.evaluation.seed)
        client = TeacherClient(service, config.teachers)
        steps, guidance = teacher_sampling(config, space)
        pictures, table = draw_teacher(client.generate, space, fixed, config, guidance, scorers, steps)
        save_pictures(folder / "teacher.safetensors", pictures[: config.evaluation.grid])
        replace_text(folder / "teacher.json", json.dumps(table))
    return table


# -- pairs and Bridge -------------------------------------------------------------------------------------


def service_of(config: Config, run: str) -> str:
    """Name of the service that scores: the run's own, or the one that it attaches to."""
    return config.teachers.service or f"teacher-{run}"


@contextmanager
def _drawing(record: RunRecord) -> Iterator[TeacherClient]:
    """The service that draws pictures, for the length of the block."""
    config, run = drawing_config(record.config), record.run.name
    name = f"teacher-{run}-draws" if other_drawer(record.config) else service_of(config, run)
    with teacher_service(record, config, name) as ready:
        ready.result()
        yield TeacherClient(name, config.teachers)


def make_pairs_alone(record: RunRecord) -> str:
    """Pairs for stages that need no teachers themselves; real images, and pairs that are there, need none either."""
    config = record.config
    if config.bridge.pairs is not None:
        return str(input_place(config.bridge.pairs))
    return _made(record, "synthesis", PAIRS_FOLDER, recipe_of(config, record.inputs))


def make_sets(record: RunRecord, client: TeacherClient | None = None) -> tuple[str | None, str | None]:
    """(pairs, teacher samples) for the Bridge and the discriminator: the run's own, those that are there, or none.

    Args:
        client: of a service that draws with the teacher and is ready; None: one is started for as long as pictures are drawn.
    """
    config, pairs, real = record.config, None, record.config.discriminator.real_data
    if needs_pairs(config):
        recipe = recipe_of(config, record.inputs)
        named = config.bridge.pairs
        pairs = str(input_place(named)) if named else _made(record, "synthesis", PAIRS_FOLDER, recipe, client)
    if real is not None:
        return pairs, str(input_place(real))
    if draws_samples(config):
        recipe = recipe_of(config, record.inputs, drawn=True)
        return pairs, _made(record, "samples", SAMPLES_FOLDER, recipe, client)
    return pairs, pairs


def _made(record: RunRecord, stage: str, name: str, recipe: Recipe, client: TeacherClient | None = None) -> str:
    """A set of the run's own, in its folder `name`; goes on where it stopped, and starts no service for a whole one."""
    config, run = record.config, record.run
    folder, progress = run.path / name, run.path / f"{stage}-progress.json"
    if recipe.samples and client is None and not recipe.writer(folder, config.synthesis.max_failed_rows).complete:
        with _drawing(record) as own:
            return _made(record, stage, name, recipe, own)
    with record.timed(stage):
        run_id = record.stage_run(config, stage)
        tracker = Tracker(record.uri, run_id)
        log = SynthesisLog(tracker, progress, config.evaluation.grid)
        try:
            with ProgressWatcher(progress, stage, "row"):
                synthesise_on_ray(recipe, folder, config.synthesis, client if recipe.samples else None, log)
            log.finish(folder, covered_rows(folder))
            if not recipe.samples and (fewer := fewer_than_asked(folder, recipe.count)) is not None:
                screen.say(f"{stage}: {fewer}")
        finally:
            tracker.close()
        record.finish(run_id)
        record.describe_pairs(folder, name)
    return str(folder)


def recipe_of(config: Config, inputs: Inputs, drawn: bool = False) -> Recipe:
    """What decides the rows of the run's pairs; `drawn`: of pictures that are drawn though the pairs are of real images.

    Raises InputError: as `spaces.distilled.drawing`, and `preflight.open_drawer`.
    """
    synthesis, images = config.synthesis, None if drawn else inputs.images
    shared = {
        "teacher": inputs.teacher,
        "student": inputs.student,
        "batch_size": synthesis.batch_size,
        "shard_size": synthesis.shard_size,
        "seed": config.run.seed,
        "posterior": synthesis.posterior,
        "text_dtype": config.prompts.encoder_dtype,
        "dtype": synthesis.dtype,
        "augment_share": 0.0 if drawn else synthesis.augment_share,  # drawn ones are the discriminator's alone
    }
    if isinstance(images, Pictures):
        filters = Filters(min_pixels=synthesis.min_pixels, captions=inputs.held_out.prompts)
        count = synthesis.image_count
        return Recipe(source=images, count=count, filters=filters, licence=synthesis.licence, **shared)
    if images is not None:
        return Recipe(source=images, count=len(images), licence=synthesis.licence, **shared)
    drawer = inputs.drawer or open_drawer(config, inputs.teacher)
    steps, scale = drawing(config, drawer or inputs.teacher)
    return Recipe(
        source=inputs.prompts, count=synthesis.count, steps=steps, guidance_scale=scale, drawer=drawer, **shared
    )


def train_bridge_on(record: RunRecord, pairs: str | None) -> str:
    """Train the Bridge on a set of pairs, or on a stream of pictures; returns its folder."""
    config = record.config
    with record.timed("bridge"):
        run_id = record.stage_run(config, "bridge")
        source: dict[str, Any] = {"pairs_folder": pairs}
        if streams_bridge(config):
            source = {"pictures": record.inputs.images, "held_out": record.inputs.held_out.prompts}
        trained = train_bridge(
            config, record.run.path, tracking_uri=record.uri, tracking_run=run_id, runs=record.runs, **source
        )
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
