"""The story of one run, told by the driver: teachers, Bridge, distillation, controls, summary."""

from __future__ import annotations

from typing import Any

from raydistill.background import in_background
from raydistill.config.reading import changed, needs_pairs, trains_bridge
from raydistill.config.schema import Config
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder
from raydistill.driver.run_record import RunRecord, open_record
from raydistill.driver.stages import (
    distillation,
    draw_teacher_pictures,
    make_pairs,
    teacher_service,
    train_bridge_on,
)
from raydistill.driver.summary import summarise
from raydistill.storage.resolve import resolve


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
    service = config.teachers.service or f"teacher-{record.run.name}"
    results: dict[str, Any] = {}
    with teacher_service(record, config, service) as ready:  # teachers start while the trainers do
        pictures = in_background(lambda: draw_teacher_pictures(record, service, ready))
        pairs = None
        if needs_pairs(config):
            ready.result()
            pairs = make_pairs(record, service)
        bridge = train_bridge_on(record, pairs) if trains_bridge(config) else config.bridge.checkpoint
        real = config.discriminator.real_data
        inputs = {
            "bridge": str(resolve(bridge)) if bridge else None,
            "real": str(resolve(real)) if real else pairs,
            "pairs": pairs,
        }
        scores = service if config.vsd.weight > 0 else None
        results["distill"] = distillation(record, "distill", config, **inputs, service=scores, needs=[ready, pictures])
        if "no_vsd" in config.controls:
            control = changed(config, {"vsd": {"weight": 0.0}})
            results["no_vsd"] = distillation(record, "no_vsd", control, **inputs)
        results["teacher"] = pictures.result()
    return results


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
            "teachers": {"compile": False, "attention": "auto", "quantize": "none"},  # chosen for another network
        },
    )
