"""What a run leaves: table on screen, pictures, summary.json, and all of it in MLflow."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from rich.console import Console

from raydistill.driver.run_record import RunRecord
from raydistill.evaluation.evaluator import FixedPrompts
from raydistill.evaluation.summary import markdown, table, write_summary
from raydistill.export.pipeline import HOW_TO_DRAW
from raydistill.pictures.files import load_pictures
from raydistill.pictures.grids import before_after
from raydistill.storage.atomic import move_folder, replacing
from raydistill.storage.place import Place
from raydistill.tracking.store import ui_command
from raydistill.tracking.tracker import Tracker

CONTROLS = {"no_vsd": "control: VSD off", "shared_space": "control: shared space"}
Results = dict[str, Any]  # stage -> its result, and "teacher" -> its table


def summarise(record: RunRecord, results: Results) -> dict[str, Any]:
    """Write pictures, export and summary.json, log them, and show the table; returns the summary."""
    sheet, summary = _pictures(record), _summary(record, results)
    rows = {"student before": summary["student_before"], "student after": summary["student_after"]}
    rows |= {CONTROLS[name]: table for name, table in summary["controls"].items()}
    rows["teacher"] = summary["teacher"]
    _log(record, summary, sheet, markdown(rows))
    stage = record.run.path / "distill"
    if (stage / "export").is_dir():
        move_folder(stage / "export", record.run.path / "export")
    write_summary(record.run.path / "summary.json", summary)
    _show(record, results, summary, rows)
    return summary


def _pictures(record: RunRecord) -> Image.Image:
    """Before, after and teacher on the same held-out prompts and noise, also as `grids/before_after.png`."""
    run, evaluation = record.run, record.config.evaluation
    rows = kept_pictures(run.path)
    sheet = before_after(*rows, FixedPrompts(record.inputs.held_out, len(rows[0]), evaluation.seed).captions)
    with replacing(run.path / "grids" / "before_after.png") as file:
        sheet.save(file)
    return sheet


def kept_pictures(folder: Place) -> list[torch.Tensor]:
    """What a run's folder keeps of before, after and the teacher, each [N, 3, S, S].

    N is what all three have: `evaluation.grid` may have changed between a run's parts.
    """
    files = (folder / "distill" / "before.safetensors", folder / "distill" / "after.safetensors")
    rows = [load_pictures(file) for file in (*files, folder / "teacher.safetensors")]
    return [row[: min(map(len, rows))] for row in rows]


def _summary(record: RunRecord, results: Results) -> dict[str, Any]:
    main = results["distill"]
    stopped = {name: results[name]["stopped"] for name in ("distill", *CONTROLS) if name in results}
    return {
        "student_before": main["before"],
        "student_after": main["after"],
        "teacher": results["teacher"],
        "controls": {name: results[name]["after"] for name in CONTROLS if name in results},
        "stages": {name: round(seconds, 1) for name, seconds in record.seconds.items()},
        "steps": main["steps"],
        "best_step": main["best_step"],
        "stopped": {name: reason for name, reason in stopped.items() if reason},
        "mlflow_run_id": record.parent,
    }


def _log(record: RunRecord, summary: dict[str, Any], sheet: Image.Image, note: str) -> None:
    tracker = Tracker(record.uri, record.parent)
    tables = {who: summary[who] for who in ("student_before", "student_after", "teacher")}
    values = {f"{who}/{key}": value for who, table in tables.items() for key, value in table.items()}
    tracker.metrics(values, step=summary["steps"])
    tracker.image(sheet, "before_after", summary["steps"])
    tracker.note(note)
    tracker.artifact(record.run.path / "config.yaml")
    tracker.close()


def _show(record: RunRecord, results: Results, summary: dict[str, Any], rows: dict[str, dict[str, float]]) -> None:
    run, console = record.run, Console()
    console.print(table(rows, title=f"{run.name}: attribute accuracy on held-out prompts"))
    console.print("stages: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record.seconds.items()))
    for name, reason in summary["stopped"].items():
        steps, best = (results[name][key] for key in ("steps", "best_step"))
        print(
            f"stopped   {name} after {steps} of {record.config.distill.steps} updates ({reason}); "
            f"its best is of update {best}"
        )
    print(f"pictures  {run.path / 'grids' / 'before_after.png'}")
    print(f"pipeline  {run.path / 'export'}")
    print(f"draw it   {HOW_TO_DRAW}")
    print(f"MLflow    {ui_command(record.uri)}")
