"""The story of one run, told by the driver: teachers, Bridge, distillation, controls, summary."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import Any

from raydistill.background import in_background
from raydistill.config.reading import changed, draws, other_drawer, trains_bridge
from raydistill.config.schema import Config
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder
from raydistill.driver.run_record import RunRecord, open_record
from raydistill.driver.stages import (
    distillation,
    draw_teacher_pictures,
    make_sets,
    service_of,
    teacher_service,
    train_bridge_on,
)
from raydistill.driver.summary import summarise
from raydistill.evaluation.evaluator import Scorers
from raydistill.storage.resolve import resolve
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import one_line
from raydistill.tracking.screen import screen


def distil(config: Config, run: RunFolder, inputs: Inputs, parent: str | None = None) -> dict[str, Any]:
    """Everything from the first teacher rank to the summary, which is returned.

    Args:
        parent: MLflow run that this one is nested in.

    Raises:
        StageFailed: with the reason; the run can be continued.
    """
    with open_record(config, run, inputs, parent) as record:
        results = _with_teacher(record)
        if "shared_space" in config.controls:
            results["shared_space"] = _in_shared_space(record)
        return summarise(record, results)


def _with_teacher(record: RunRecord) -> dict[str, Any]:
    """Every stage that the teacher serves, by name; and its own row of the table."""
    config = record.config
    service = service_of(config, record.run.name)
    results: dict[str, Any] = {}
    bridge, sets = config.bridge.checkpoint, None
    if trains_bridge(config) or not draws(config) or other_drawer(config):  # the teachers are not held meanwhile
        sets = make_sets(record)
        bridge = train_bridge_on(record, sets[0]) if trains_bridge(config) else bridge
    scorers = record.scorers("the teacher's pictures")
    # teachers start while the trainers do
    with contextlib.closing(scorers), teacher_service(record, config, service) as ready:
        scorers.start()
        pictures = in_background(lambda: _teacher_row(record, service, ready, scorers))
        if sets is None:
            ready.result()
            sets = make_sets(record, TeacherClient(service, config.teachers))
        pairs, real = sets
        inputs = {"bridge": str(resolve(bridge)) if bridge else None, "real": real, "pairs": pairs}
        scoring = service if config.vsd.weight > 0 else None
        results["distill"] = distillation(record, "distill", config, **inputs, service=scoring, needs=[ready])
        if "no_vsd" in config.controls:
            control = changed(config, {"vsd": {"weight": 0.0}})
            results["no_vsd"] = distillation(record, "no_vsd", control, **inputs)
        results["teacher"] = pictures.result()
    return results


def _teacher_row(record: RunRecord, service: str, ready: Future[None], scorers: Scorers) -> dict[str, float]:
    """The teacher's row of the table. What fails there is said, and costs no more than the row: the student learns."""
    try:
        return draw_teacher_pictures(record, service, ready, scorers)
    except Exception as error:  # noqa: BLE001 (whatever it is, weeks of training are worth more)
        if not (ready.done() and ready.exception()):  # which ends the run by itself
            screen.say(f"teacher   its row of the table failed, and the run goes on without it: {one_line(error)}")
        return {}


def _in_shared_space(record: RunRecord) -> dict[str, Any]:
    """The control in the student's own space, with its own service."""
    control, service = shared_space(record.config), f"teacher-{record.run.name}-shared"
    with teacher_service(record, control, service) as ready:
        return distillation(record, "shared_space", control, service=service, needs=[ready])


def shared_space(config: Config) -> Config:
    """Plain DMD2 from the student's own multi-step model: identity Bridge, VSD only, the family's default guidance."""
    return changed(
        config,
        {
            "teacher": {"model": config.student.model, "guidance_scale": None},
            "bridge": {"checkpoint": None, "projector": "identity", "trainable": False},
            "discriminator": {"weight": 0.0, "real_data": None},
            "vsd": {"shift": None},
            "reward": {"weight": 0.0},
            "teachers": {  # chosen for another network
                "compile": False,
                "channels_last": False,
                "attention": "auto",
                "quantize": "none",
            },
        },
    )
