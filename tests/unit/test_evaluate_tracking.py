"""Where an evaluation is logged: under the run that made the model, else by itself, and the same run again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raydistill.data.prompts import PromptSet
from raydistill.evaluation.evaluate import Plan, Resources, finish, log_results
from raydistill.evaluation.promptsets import CategorisedPrompts
from raydistill.evaluation.results import mean_table
from raydistill.evaluation.subject import Subject, save_picture
from raydistill.runs import client_of, prepare
from raydistill.tracking import open_run

CATEGORIES = {1: "Food & Beverage", 2: "Animals"}


@pytest.fixture
def plan(tmp_path) -> Plan:
    """A finished evaluation of two pictures."""
    prompts = CategorisedPrompts("parti", PromptSet(["a cake", "a fox"]), CATEGORIES)
    items = prompts.items(None, 4)
    (tmp_path / "e" / "pictures").mkdir(parents=True)
    for item in items:
        save_picture(tmp_path / "e" / "pictures" / item.file_name, torch.zeros(3, 8, 8), item, "mine")
    subject = Subject("mine", "/models/mine", None, 999, 1, 1.0)
    return Plan(subject, prompts, items, [], None, tmp_path / "e", {"seed": 4, "metrics": {}}, Resources())


def log(plan: Plan, tmp_path, scores: list[float]):
    columns = {"clipscore": scores}
    table = mean_table(plan.items, columns)
    finish(plan, table, columns)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return log_results(plan, table, uri, "evaluations", tmp_path)


def test_results_are_logged_under_the_run_that_made_the_model(plan, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = open_run(uri, "shapes", "mine", storage=tmp_path, params={}, tags={"stage": "pipeline"})
    plan = dataclasses.replace(plan, subject=dataclasses.replace(plan.subject, run_id=parent))
    run_id, above = log(plan, tmp_path, [20.0, 30.0])
    assert above == parent
    client = client_of(uri)
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.experiment_id == client.get_run(parent).info.experiment_id
    value = [20.0, 30.0][[item.prompt_id for item in plan.items].index(1)]
    assert run.data.metrics["eval/clipscore"] == 25.0
    assert run.data.metrics["eval/Food _ Beverage/clipscore"] == value  # MLflow takes no &
    assert run.data.params["prompts"] == "parti"
    assert run.data.params["seed"] == "4"
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"scores.parquet", "results.json", "grid.png"} <= names
    assert log(plan, tmp_path, [20.0, 30.0]) == (run_id, parent)  # no second run, no second value
    assert [entry.step for entry in client.get_metric_history(run_id, "eval/clipscore")] == [0]
    log(plan, tmp_path, [20.0, 40.0])  # a metric that was computed anew
    assert client.get_run(run_id).data.metrics["eval/clipscore"] == 30.0


def test_a_model_that_no_run_of_this_store_made_is_logged_by_itself(plan, tmp_path):
    prepare(f"sqlite:///{tmp_path}/mlflow.db")
    stranger = dataclasses.replace(plan, subject=dataclasses.replace(plan.subject, run_id="f" * 32))
    run_id, above = log(stranger, tmp_path, [1.0, 2.0])
    assert above is None
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert "mlflow.parentRunId" not in client.get_run(run_id).data.tags
    assert client.get_experiment_by_name("evaluations").experiment_id == client.get_run(run_id).info.experiment_id
