"""The paper's tables on the shapes world: which runs they take, and what comes out of them.

table1: for each student its start, one student distilled from each teacher, their mean (merged), and as the baseline a
student distilled in its own space from its own multi-step model (plain DMD2). table3: a one-step start against the raw
multi-step model as the start. Every cell is an ordinary run of `distil`, nested in the table's MLflow run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydistill.config.reading import CONFIGS, changed, read_yaml, validate
from raydistill.config.schema import Config
from raydistill.distillation.networks import load_unet
from raydistill.driver.binding import bind, keep
from raydistill.driver.pipeline import distil, shared_space
from raydistill.driver.preflight import Inputs, check_inputs
from raydistill.driver.run_folder import RunFolder, create_run_folder, open_run_folder
from raydistill.driver.run_record import RunRecord, open_record
from raydistill.driver.table_names import result_name
from raydistill.errors import StageFailed
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.evaluation.summary import write_summary
from raydistill.export.merge import merge_students, open_sources, shares_of
from raydistill.export.source import find_export
from raydistill.pictures.files import save_pictures
from raydistill.pictures.grids import grid
from raydistill.storage.resolve import require_folder
from raydistill.tracking.screen import screen
from raydistill.tracking.store import tracking_uri
from raydistill.tracking.tracker import Tracker

STUDENTS, TEACHERS = ("sd15", "sd21"), ("flux", "sd3", "sdxl")
QUICK_STEPS = 60
MERGED, SHARED, START, ONE_STEP, RAW = "merged", "shared space", "start", "one-step start", "raw start"
PAPER = {  # HPSv3 of arXiv 2606.32020; our three teachers stand for FLUX.2 [klein], SD 3.5 Medium and SDXL
    ("sd15", START): 5.37, ("sd15", "flux"): 9.49, ("sd15", "sd3"): 9.42, ("sd15", "sdxl"): 9.04, ("sd15", MERGED): 10.53,
    ("sd21", START): 6.42, ("sd21", MERGED): 9.75,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One distillation of a table."""

    student: str
    row: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        assert self.config.run.name is not None
        return self.config.run.name


def cells(table: str, config: Config, storage: Path, seeds: int, quick: bool) -> list[Cell]:
    """The runs of a table, under `<storage>/<run.name>/`.

    Args:
        config: settings of every run, but for student, teacher, Bridge and seed; its run.name is the table's.
        storage: the table's.
    """
    if quick:
        config = changed(config, {"distill": {"steps": QUICK_STEPS}})
    uri = tracking_uri(config, storage)
    found = []
    for seed in range(config.run.seed, config.run.seed + seeds):
        for student in STUDENTS:
            pairs = {teacher: _pair(config, student, teacher) for teacher in TEACHERS}
            if table == "table1":
                rows = pairs | {SHARED: shared_space(pairs["flux"])}
            else:  # the first is table1's own run
                raw = changed(pairs["flux"], {"student": {"unet": None, "start_timestep": 999}})
                rows = {ONE_STEP: pairs["flux"], RAW: raw}
            for row, settings in rows.items():
                name = f"{student}-{'flux' if row == ONE_STEP else row.replace(' ', '-')}-seed{seed}"
                own = {"run": {"name": name, "seed": seed}, "tracking": {"uri": uri}}
                folder = str(storage / str(config.run.name))
                tree = changed(settings, own).model_dump() | {"storage": folder, "controls": []}
                found.append(Cell(student, row, seed, validate(tree)))
    return found


def _pair(config: Config, student: str, teacher: str) -> Config:
    """`config` with one student and one teacher of the miniature world."""
    trees = [read_yaml(CONFIGS / "shapes" / f"{name}.yaml")[0] for name in (student, teacher)]
    return changed(config, {section: values for tree in trees for section, values in tree.items()})


def check(table: str, seeds: int, quick: bool, config: Config, run: RunFolder) -> None:
    """Raises ValueError for any cell that could not start."""
    require_folder(run.storage, "jobs/reproduce.py")
    for cell in cells(table, config, run.storage, seeds, quick):
        check_inputs(cell.config)


def reproduce(table: str, seeds: int, quick: bool, config: Config, run: RunFolder, inputs: Inputs) -> dict[str, Any]:
    """Every cell that is not done yet, then the table; returns and writes it as `<run>/<table>.json`.

    Raises StageFailed: a cell failed; those that are done are kept.
    """
    with open_record(config, run, inputs) as record:
        results: list[dict[str, Any]] = []
        planned = cells(table, config, run.storage, seeds, quick)
        for number, cell in enumerate(planned, 1):
            screen.say(f"== {number}/{len(planned)} {cell.name}")
            results.append(_run_cell(cell, record, planned))
        if table == "table1":
            for seed in dict.fromkeys(cell.seed for cell in planned):
                for student in STUDENTS:
                    members = [c for c in planned if (c.student, c.seed) == (student, seed) and c.row in TEACHERS]
                    results.append(merge(student, seed, members, record))
        summary = {
            "table": table,
            "seeds": seeds,
            "steps": planned[0].config.distill.steps,
            "pictures": config.evaluation.count,
            "rows": summarise(results),
            "cells": results,
            "stages": {name: round(seconds, 1) for name, seconds in record.seconds.items()},
            "mlflow_run_id": record.parent,
        }
        text = markdown(summary)
        tracker = Tracker(record.uri, record.parent)
        tracker.text(text, f"{table}.md")
        tracker.note(text)
        tracker.close()
        write_summary(run.path / result_name(table, seeds), summary)
        screen.say(text)
        for line in verdicts(summary):
            screen.say(line)
        screen.say(f"results   {run.path / result_name(table, seeds)}")
        screen.say("\n".join(record.ui))
    return summary


def _run_cell(cell: Cell, record: RunRecord, planned: Sequence[Cell]) -> dict[str, Any]:
    """Run one cell, or read what it has written."""
    folder = open_run_folder(cell.config)
    file = folder.path / "summary.json"
    if not file.is_file():
        inputs = check_inputs(cell.config)
        binding = bind(cell.config, folder, inputs)
        create_run_folder(folder, cell.config)
        keep(binding, folder)
        _take_teacher(cell, folder, planned)
        with record.timed(cell.name):
            distil(cell.config, folder, inputs, parent=record.parent)
    about = json.loads(file.read_text())
    _same_length(cell.name, about["steps"], cell.config)
    return {
        "student": cell.student, "row": cell.row, "seed": cell.seed, "before": about["student_before"],
        "after": about["student_after"], "teacher": about.get("teacher", {}), "mlflow_run_id": about["mlflow_run_id"],
    }  # fmt: skip


def _same_length(name: str, steps: int, config: Config) -> None:
    """Raises StageFailed for a finished cell of another length: a table compares equal ones."""
    if steps != config.distill.steps:
        raise StageFailed(
            f"{name} ended after {steps} updates, and this table is of {config.distill.steps}: use another run.name"
        )


def _take_teacher(cell: Cell, folder: RunFolder, planned: Sequence[Cell]) -> None:
    """The same teacher draws the same held-out pictures for every student and seed: take another cell's."""
    if (folder.path / "teacher.json").is_file():  # a cell that goes on
        return
    for other in planned:
        if other.config.teacher == cell.config.teacher and other.config.evaluation == cell.config.evaluation:
            source = Path(other.config.storage, other.name)
            if (source / "teacher.json").is_file():
                for name in ("teacher.safetensors", "teacher.json"):  # the one that says it is done comes last
                    shutil.copyfile(source / name, folder.path / name)
                return


def merge(student: str, seed: int, members: Sequence[Cell], record: RunRecord) -> dict[str, Any]:
    """The mean of one student's distillations from all teachers, judged as they were."""
    config, inputs = members[0].config, record.inputs
    name = f"{student}-{MERGED}-seed{seed}"
    folder = record.run.path / name
    if not (folder / "summary.json").is_file():
        with record.timed(name):
            exports = [find_export(member.name, Path(config.storage)) for member in members]
            with contextlib.suppress(FileNotFoundError):  # an earlier try
                shutil.rmtree(folder)
            folder.mkdir()
            merge_students(open_sources(exports), shares_of(None, len(exports)), folder / "export", lambda _: None)
            space = check_inputs(config).student
            evaluation = config.evaluation
            fixed = FixedPrompts(inputs.held_out, evaluation.count, evaluation.seed)
            scorers = record.scorers(name, torch.device("cpu"))
            evaluator = StudentEvaluator(space, fixed, evaluation, "cpu", scorers)
            pictures = evaluator.draw(
                load_unet(space, str(folder / "export")), config.student.start_timestep, config.student.steps
            )
            accuracy = evaluator.accuracy(pictures)
            scorers.close()
            save_pictures(folder / "after.safetensors", pictures[: evaluation.grid])
            run_id = record.stage_run(config, name)
            tracker = Tracker(record.uri, run_id)
            tracker.metrics({f"student_after/{key}": value for key, value in accuracy.items()}, config.distill.steps)
            shown = evaluation.grid
            tracker.image(grid(pictures[:shown], fixed.captions[:shown]), "samples", config.distill.steps)
            tracker.artifact(folder / "export")
            tracker.close()
            record.finish(run_id)
            about = {"student_after": accuracy, "steps": config.distill.steps, "mlflow_run_id": run_id}
            write_summary(folder / "summary.json", about)
    about = json.loads((folder / "summary.json").read_text())
    _same_length(name, about["steps"], config)
    return {
        "student": student, "row": MERGED, "seed": seed, "after": about["student_after"],
        "mlflow_run_id": about["mlflow_run_id"],
    }  # fmt: skip


# -- the tables -------------------------------------------------------------------------------------------


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a student and row, the start first: `values` is metric -> [mean, standard deviation] over seeds."""
    found = []
    for student in dict.fromkeys(result["student"] for result in results):
        own = [result for result in results if result["student"] == student]
        if not any(result["row"] == RAW for result in own):  # there each row has a start of its own
            found.append(_row(student, START, [own[0]["before"]]))
        for row in dict.fromkeys(result["row"] for result in own):
            cells_ = [result for result in own if result["row"] == row]
            if row in (ONE_STEP, RAW):
                found.append(_row(student, f"{row}, before", [cells_[0]["before"]]))
            found.append(_row(student, row, [cell["after"] for cell in cells_]))
    seen = {}
    for result in results:
        if result.get("teacher") and result["row"] not in (ONE_STEP, RAW):
            who = f"{result['student']} multi-step" if result["row"] == SHARED else result["row"]
            seen.setdefault(who, result["teacher"])
    return found + [_row("teacher", who, [values]) for who, values in seen.items()]


def _row(student: str, row: str, tables: Sequence[dict[str, float]]) -> dict[str, Any]:
    values = {}
    for key in tables[0]:
        numbers = [table[key] for table in tables]
        values[key] = [statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0]
    return {"student": student, "row": row, "seeds": len(tables), "values": values}


def markdown(summary: dict[str, Any]) -> str:
    """The table with the mean over seeds (± standard deviation of the first column), the paper's HPSv3 beside it."""
    columns = sorted(summary["rows"][0]["values"], key=lambda name: name != "mean")
    paper = summary["table"] == "table1"
    lines = [
        "| | | " + " | ".join(columns) + (" | paper: HPSv3 |" if paper else " |"),
        "|---|---|" + "---|" * (len(columns) + paper),
    ]
    for row in summary["rows"]:
        entries = []
        for column in columns:
            mean, spread = row["values"][column]
            text = f"{mean:.3f}"
            entries.append(f"{text} ± {spread:.3f}" if column == columns[0] and row["seeds"] > 1 else text)
        if paper:
            figure = PAPER.get((row["student"], row["row"]))
            entries.append("" if figure is None else f"{figure:.2f}")
        lines.append(f"| {row['student']} | {row['row']} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def verdicts(summary: dict[str, Any]) -> list[str]:
    """What the paper claims, and whether this table says so."""
    rows = {(row["student"], row["row"]): {k: v[0] for k, v in row["values"].items()} for row in summary["rows"]}
    lines = []
    for student in STUDENTS:
        if summary["table"] == "table1":
            start, shared, merged = (rows[student, row] for row in (START, SHARED, MERGED))
            single = {teacher: rows[student, teacher] for teacher in TEACHERS}
            worse = [f"{t} {key}" for t, values in single.items() for key in values if values[key] < start[key]]
            best = max(single, key=lambda teacher: single[teacher]["mean"])
            weakest = min(single, key=lambda teacher: single[teacher]["mean"])
            lines += [
                f"{student}: every student beats its start on every attribute: {_yes(not worse)}"
                + (f" ({', '.join(worse)})" if worse else ""),
                f"{student}: merged {merged['mean']:.3f}, best single {best} {single[best]['mean']:.3f}: merged is at "
                f"least as good: {_yes(merged['mean'] >= single[best]['mean'])}",
                f"{student}: weakest cross-space {weakest} {single[weakest]['mean']:.3f}, shared space "
                f"{shared['mean']:.3f}: {_yes(single[weakest]['mean'] > shared['mean'])}",
            ]
        else:
            one, raw = rows[student, ONE_STEP], rows[student, RAW]
            lines.append(f"{student}: one-step start {one['mean']:.3f}, raw start {raw['mean']:.3f} after equal steps")
    return lines


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
