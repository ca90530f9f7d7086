"""What a run leaves: table on screen, pictures, summary.json, and all of it in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raydistill.config.command_line import shown_command
from raydistill.driver.logged_model import has_value, log_of_run
from raydistill.driver.run_record import RunRecord
from raydistill.evaluation.evaluator import FixedPrompts, judge_of
from raydistill.evaluation.summary import markdown, table, write_summary
from raydistill.export.pipeline import how_to_draw
from raydistill.pictures.files import load_pictures
from raydistill.pictures.grids import before_after
from raydistill.storage.atomic import move_folder, replacing
from raydistill.storage.place import Place
from raydistill.tracking.screen import duration, screen
from raydistill.tracking.tracker import Tracker

NAMES = {"no_vsd": "control: VSD off", "shared_space": "control: shared space"}  # of the controls
Results = dict[str, Any]  # stage -> its result, and "teacher" -> its table


def summarise(record: RunRecord, results: Results) -> dict[str, Any]:
    """Write pictures, export and summary.json, log them, and show the table; returns the summary."""
    summary = _summary(record, results)
    rows = {"student before": summary.get("student_before"), "student after": summary.get("student_after")}
    rows |= {NAMES[name]: table for name, table in summary["controls"].items()}
    rows["teacher"] = summary.get("teacher")
    rows = {name: table for name, table in rows.items() if table}
    sheet = _pictures(record, summary)
    _log(record, summary, sheet, rows)
    stage = record.run.path / "distill"
    if (stage / "export").is_dir():
        move_folder(stage / "export", record.run.path / "export")
    log_of_run(record.config, record.run, record.uri, record.parent, has_value(record.config, summary))
    write_summary(record.run.path / "summary.json", summary)
    _show(record, results, summary, rows)
    return summary


def _pictures(record: RunRecord, summary: dict[str, Any]) -> Place:
    """`grids/before_after.png`: all rows on the same held-out prompts and noise, marked where a judge knows."""
    run, evaluation = record.run, record.config.evaluation
    rows = kept_pictures(run.path, [name for name in NAMES if name in record.config.controls])
    captions = FixedPrompts(record.inputs.held_out, len(rows["before"]), evaluation.seed).captions
    title, right = f"{run.name}: {record.config.teacher.model} to {record.config.student.model}", None
    if (judge := judge_of(evaluation)) is not None:
        right = {label: judge.right(images, captions) for label, images in rows.items()}
    before, after = (summary.get(f"student_{when}", {}).get(evaluation.metric) for when in ("before", "after"))
    if before is not None and after is not None:
        title += f", {evaluation.metric} {before:.3f} before, {after:.3f} after, of {evaluation.count} pictures"
    sheet = before_after(rows, captions, title=title, right=right)
    with replacing(file := run.path / "grids" / "before_after.png") as fresh:
        sheet.save(fresh)
    return file


def kept_pictures(folder: Place, controls: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """What a run's folder keeps of before, after, the controls and the teacher, each [N, 3, S, S], by label.

    N is what all have: `evaluation.grid` may have changed between a run's parts.
    """
    files = {"before": folder / "distill" / "before.safetensors", "after": folder / "distill" / "after.safetensors"}
    files |= {NAMES[name].removeprefix("control: "): folder / name / "after.safetensors" for name in controls}
    if (teacher := folder / "teacher.safetensors").is_file():  # its row may have failed
        files["teacher"] = teacher
    rows = {label: load_pictures(file) for label, file in files.items()}
    count = min(map(len, rows.values()))
    return {label: row[:count] for label, row in rows.items()}


def _summary(record: RunRecord, results: Results) -> dict[str, Any]:
    """Without a metric there are no tables in it."""
    main = results["distill"]
    stopped = {name: results[name]["stopped"] for name in ("distill", *NAMES) if name in results}
    tables = {"student_before": main["before"], "student_after": main["after"], "teacher": results["teacher"]}
    controls = {name: results[name]["after"] for name in NAMES if name in results}
    return {
        **{who: table for who, table in tables.items() if table},
        "controls": {name: table for name, table in controls.items() if table},
        "stages": {name: round(seconds, 1) for name, seconds in record.seconds.items()},
        "steps": main["steps"],
        "best_step": main["best_step"],
        "stopped": {name: reason for name, reason in stopped.items() if reason},
        "mlflow_run_id": record.parent,
    }


def _log(record: RunRecord, summary: dict[str, Any], pictures: Place, rows: Mapping[str, Mapping[str, float]]) -> None:
    tracker = Tracker(record.uri, record.parent)
    tables = {who: summary.get(who, {}) for who in ("student_before", "student_after", "teacher")}
    values = {f"{who}/{key}": value for who, table in tables.items() for key, value in table.items()}
    tracker.metrics(values, step=summary["steps"])
    tracker.artifact(pictures)
    tracker.artifact(record.run.path / "config.yaml")
    shown = f"![before and after](get-artifact?path={pictures.name}&run_uuid={record.parent})"
    tracker.note(
        "\n\n".join(
            [
                shown,
                *([markdown(rows, record.config.evaluation.metric)] if rows else []),
                f"`{shown_command(record.config)}`",
            ]
        )
    )
    tracker.close()


def _show(record: RunRecord, results: Results, summary: dict[str, Any], rows: dict[str, dict[str, float]]) -> None:
    run = record.run
    if rows:
        first = record.config.evaluation.metric
        screen.show(table(rows, title=f"{run.name}: held-out prompts", first=first), width=80)
    screen.say("stages    " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in record.seconds.items()))
    for name, reason in summary["stopped"].items():
        steps, best = (results[name][key] for key in ("steps", "best_step"))
        screen.say(
            f"stopped   {name} after {steps} of {record.config.distill.steps} updates ({reason}); "
            f"its best is of update {best}"
        )
    screen.say(f"pictures  {run.path / 'grids' / 'before_after.png'}")
    screen.say(f"pipeline  {run.path / 'export'}")
    screen.say(f"draw it   {how_to_draw(run.path / 'export')}")
    screen.say("\n".join(record.ui))
