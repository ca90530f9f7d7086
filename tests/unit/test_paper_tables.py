"""The paper's tables: which runs they take, and what is read off them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlflow
import pytest
import torch

from raydistill.config.reading import changed, load, to_yaml
from raydistill.distillation.networks import load_unet
from raydistill.driver.paper_tables import (
    MERGED,
    ONE_STEP,
    RAW,
    SHARED,
    START,
    STUDENTS,
    TEACHERS,
    _take_teacher,
    cells,
    check,
    markdown,
    merge,
    summarise,
    verdicts,
)
from raydistill.driver.preflight import check_inputs
from raydistill.driver.run_folder import RunFolder, create_run_folder, open_run_folder
from raydistill.driver.run_record import open_record
from raydistill.driver.table_names import TABLES
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.export.pipeline import ModelCard, export_student

ALL = {"mean": 0.9, "size": 0.9}
WEAK = {"mean": 0.5, "size": 0.5}


@pytest.fixture
def config(tmp_path):
    return load(overrides=["run.name=paper", f"storage={tmp_path}"])


@pytest.mark.full
def test_table1_has_every_pair_and_the_shared_space_with_every_seed(config, tmp_path):
    planned = cells("table1", config, tmp_path, seeds=2, quick=False)
    expected = {(s, row, seed) for s in STUDENTS for row in (*TEACHERS, SHARED) for seed in (0, 1)}
    assert {(cell.student, cell.row, cell.seed) for cell in planned} == expected
    assert len({cell.name for cell in planned}) == len(planned) == 16
    for cell in planned:
        own = cell.config
        assert own.run.seed == cell.seed
        assert own.student.model == f"shapes:{cell.student}"
        assert own.teacher.model == (own.student.model if cell.row == SHARED else f"shapes:{cell.row}")
        assert own.storage == str(tmp_path / "paper")
        assert own.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
        assert own.controls == []
    check("table1", 1, False, config, RunFolder(tmp_path, "paper"))


def test_quick_halves_the_steps_and_nothing_else(config, tmp_path):
    full, quick = (cells("table1", config, tmp_path, 1, quick) for quick in (False, True))
    for one, other in zip(full, quick, strict=True):
        assert (one.config.distill.steps, other.config.distill.steps) == (120, 60)
        steps = other.config.distill.model_copy(update={"steps": 120})
        assert other.config.model_copy(update={"distill": steps}) == one.config


def test_table3_differs_in_the_start_alone_and_shares_its_first_row_with_table1(config, tmp_path):
    one, raw = cells("table3", config, tmp_path, 1, False)[2:]
    assert (one.row, raw.row) == (ONE_STEP, RAW)
    assert (raw.config.student.unet, raw.config.student.start_timestep) == (None, 999)
    assert raw.config.teacher == one.config.teacher
    assert one.config in [cell.config for cell in cells("table1", config, tmp_path, 1, False)]


def result(student, row, seed, after, before=None):
    return {"student": student, "row": row, "seed": seed, "before": before, "after": after, "teacher": ALL}


def table1(merged=0.95, shared=0.7):
    results = []
    for student in STUDENTS:
        for seed, mean in enumerate((0.88, 0.92)):
            results += [result(student, teacher, seed, {"mean": mean, "size": 0.9}, WEAK) for teacher in TEACHERS]
            results.append(result(student, SHARED, seed, {"mean": shared, "size": 0.6}, WEAK))
            one = result(student, MERGED, seed, {"mean": merged, "size": 0.99})
            results.append({key: value for key, value in one.items() if key not in ("before", "teacher")})
    return {"table": "table1", "rows": summarise(results)}


def test_rows_are_means_over_seeds_the_start_first_and_teachers_once():
    rows = table1()["rows"]
    assert [row["row"] for row in rows[:6]] == [START, *TEACHERS, SHARED, MERGED]
    assert rows[1]["values"]["mean"] == pytest.approx([0.9, 0.04 / 2**0.5])
    assert [row["row"] for row in rows[12:]] == [*TEACHERS, "sd15 multi-step", "sd21 multi-step"]


def test_the_verdicts_follow_the_numbers():
    assert all(line.endswith("yes") for line in verdicts(table1()))
    bad = verdicts(table1(merged=0.85, shared=0.95))
    assert [line.endswith("yes") for line in bad[:3]] == [True, False, False]


def test_the_markdown_has_the_papers_figures_beside_ours():
    lines = markdown(table1()).splitlines()
    assert lines[0] == "| | | mean | size | paper: HPSv3 |"
    assert lines[2] == "| sd15 | start | 0.500 | 0.500 | 5.37 |"
    assert lines[3] == "| sd15 | flux | 0.900 ± 0.028 | 0.900 | 9.49 |"
    assert {line.count("|") for line in lines} == {6}


def test_table3_shows_both_starts():
    results = [result("sd15", ONE_STEP, 0, ALL, WEAK), result("sd15", RAW, 0, ALL, {"mean": 0.1, "size": 0.1})]
    rows = summarise(results)
    assert [row["row"] for row in rows] == ["one-step start, before", ONE_STEP, "raw start, before", RAW]
    assert rows[2]["values"]["mean"][0] == 0.1


@pytest.mark.full
def test_the_merged_row_is_the_judged_mean_of_the_students_of_one_seed(config, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = changed(config, {"evaluation": {"count": 8, "grid": 8}})
    run, inputs = RunFolder(tmp_path, "paper"), check_inputs(config)
    create_run_folder(run, config)
    space = inputs.student
    members = [cell for cell in cells("table1", config, tmp_path, 1, False) if cell.student == "sd15"][:3]
    one_step = load_unet(space, "shapes:sd15-onestep")
    generator, mean = torch.Generator().manual_seed(0), copy.deepcopy(one_step)
    for weight in mean.parameters():
        weight.data.zero_()
    for cell in members:
        student = copy.deepcopy(one_step)
        for weight, total in zip(student.parameters(), mean.parameters(), strict=True):
            weight.data += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
            total.data += weight.data / 3
        card = ModelCard(
            teacher=cell.config.teacher.model, teacher_class="P", student=cell.config.student.unet, steps=1
        )
        export_student(space, student, 999, tmp_path / "paper" / cell.name / "export", card, torch.float32)
    with open_record(config, run, inputs) as pipeline:
        merged = merge("sd15", 0, members, pipeline)
        assert merge("sd15", 0, members, pipeline) == merged  # the second time it is read
    fixed = FixedPrompts(inputs.held_out, 8, config.evaluation.seed)
    evaluator = StudentEvaluator(space, fixed, config.evaluation, "cpu")
    assert merged["after"] == evaluator.accuracy(evaluator.draw(mean, 999))
    nested = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(merged["mlflow_run_id"])
    assert nested.data.tags["mlflow.parentRunId"] == pipeline.parent
    assert nested.data.metrics["student_after/mean"] == merged["after"]["mean"]


@pytest.mark.parametrize("table", TABLES)
def test_the_page_shows_the_table_that_was_measured(table):
    root = Path(__file__).parents[2]
    summary = json.loads((root / "raydistill" / "shapes" / "results" / f"{table}.json").read_text())
    assert summary["seeds"] >= 2
    assert summarise(summary["cells"]) == summary["rows"]
    page = (root / "raydistill" / "shapes" / "README.md").read_text()
    assert f"`{summary['command']}`" in page
    assert markdown(summary) in page


def test_the_command_reads_its_own_options_and_the_configuration_s(run_script, tmp_path):
    code, out, _ = run_script("reproduce", "--quick", "table1", "--print-config", "student.lr=3e-5")
    assert code == 0
    assert "name: paper-quick" in out
    assert "lr: 3.0e-05" in out
    code, _, error = run_script("reproduce", "table3", "student.lt=1")
    assert code == 2
    assert "unknown key student.lt; did you mean student.lr?" in error
    code, _, error = run_script("reproduce", "--seeds", "none", "table3")
    assert (code, error) == (2, "error: --seeds needs a number of at least 1\n")
    code, _, error = run_script("reproduce", "table2")
    assert (code, error) == (2, "error: name one table, table1 or table3\n")

    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "config.yaml").write_text(to_yaml(load(overrides=["run.name=paper", f"storage={tmp_path}"])))
    (tmp_path / "paper" / "table1-3-seeds.json").write_text("{}")
    for seeds in (["--seeds", "3"], ["--seeds=3"]):
        code, out, _ = run_script("reproduce", "table1", *seeds, f"storage={tmp_path}")
        assert code == 0
        assert f" run paper is finished: {tmp_path}/paper/table1-3-seeds.json" in out


def test_a_teachers_pictures_are_taken_from_another_cell_and_a_cell_that_goes_on_keeps_its_own(config, tmp_path):
    planned = cells("table1", config, tmp_path, seeds=2, quick=True)
    folders = [open_run_folder(cell.config) for cell in planned]
    for folder in folders:
        folder.path.mkdir(parents=True)
    first = folders[0].path
    (first / "teacher.json").write_text("{}")
    (first / "teacher.safetensors").write_bytes(b"pictures")
    for cell, folder in zip(planned, folders, strict=True):
        _take_teacher(cell, folder, planned)
        same_teacher = cell.config.teacher == planned[0].config.teacher
        assert (folder.path / "teacher.json").is_file() == same_teacher
        assert (folder.path / "teacher.safetensors").is_file() == same_teacher
