"""Where an evaluation is logged: under the run that made the model, else by itself, and the same run again."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from raydistill.benchmark.world import MlflowServer
from raydistill.commands import evaluate
from raydistill.config.reading import load, to_yaml
from raydistill.data.prompts import PromptSet
from raydistill.errors import InputError
from raydistill.evaluation.evaluation import Evaluation, Resources
from raydistill.evaluation.mlflow_log import log_results, store_of
from raydistill.evaluation.promptsets import CategorisedPrompts
from raydistill.evaluation.results import finish, mean_table
from raydistill.evaluation.subject import Subject, find_subject
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.pictures.files import save_png
from raydistill.pictures.grids import to_pil
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.published_students import load_student
from raydistill.tracking.store import TrackingError, client_of, open_run, prepare

CATEGORIES = {1: "Food & Beverage", 2: "Animals"}


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """An export of a one-step student."""
    space = load_space(WEIGHTS / "sd15")
    student = load_student(space, WEIGHTS / "sd15-onestep")
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    return export_student(space, student, 999, tmp_path_factory.mktemp("one-step") / "export", card)


@pytest.fixture
def plan(tmp_path) -> Evaluation:
    """A finished evaluation of two pictures."""
    prompts = CategorisedPrompts("parti", PromptSet(["a cake", "a fox"]), CATEGORIES)
    items = prompts.pictures(None, 4)
    (tmp_path / "e" / "pictures").mkdir(parents=True)
    for item in items:
        save_png(tmp_path / "e" / "pictures" / item.file_name, to_pil(torch.zeros(3, 8, 8)), item.facts)
    return Evaluation(
        subject=Subject(name="mine", folder="/models/mine", start_timestep=999),
        prompts=prompts,
        pictures=items,
        metrics=[],
        reference=None,
        resources=Resources(),
        folder=tmp_path / "e",
        settings={"seed": 4, "metrics": {}},
    )


def log(plan: Evaluation, tmp_path, scores: list[float]):
    columns = {"clipscore": scores}
    table = mean_table(plan.pictures, columns)
    finish(plan, table, columns)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return log_results(plan, table, uri, "evaluations", tmp_path)


def test_results_are_logged_under_the_run_that_made_the_model(plan, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tags = {"stage": "pipeline", "teacher": "shapes:flux", "student": "shapes:sd15"}
    parent = open_run(uri, "shapes", "mine", storage=tmp_path, params={}, tags=tags)
    plan = dataclasses.replace(plan, subject=dataclasses.replace(plan.subject, run_id=parent))
    run_id, above = log(plan, tmp_path, [20.0, 30.0])
    assert above == parent
    client = client_of(uri)
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert [run.data.tags[key] for key in ("teacher", "student", "stage")] == [
        "shapes:flux",
        "shapes:sd15",
        "evaluation",
    ]
    assert "| all prompts | 25.000 |" in run.data.tags["mlflow.note.content"]
    assert run.info.experiment_id == client.get_run(parent).info.experiment_id
    value = [20.0, 30.0][[item.prompt_id for item in plan.pictures].index(1)]
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


@pytest.mark.full
def test_the_command_ends_with_the_page_of_its_run(plan, tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logged = log(plan, tmp_path, [20.0, 30.0])
    monkeypatch.setattr("sys.argv", ["evaluate", "mine"])
    monkeypatch.setattr(evaluate, "prepare_evaluation", lambda arguments: (plan, uri))
    monkeypatch.setattr(evaluate, "carry_out_evaluation", lambda *_: ({"all prompts": {"clipscore": 25.0}}, *logged))
    assert evaluate.main() == 0
    experiment = client_of(uri).get_run(logged[0]).info.experiment_id
    said = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]  # after the time: this is a log
    assert said[-3:] == [
        f"run       {logged[0]}",
        f"MLflow    mlflow ui --backend-store-uri {uri}",
        f"          http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning",
    ]


@pytest.mark.full
def test_a_model_that_no_run_of_this_store_made_is_logged_by_itself(plan, tmp_path):
    prepare(f"sqlite:///{tmp_path}/mlflow.db")
    stranger = dataclasses.replace(plan, subject=dataclasses.replace(plan.subject, run_id="f" * 32))
    run_id, above = log(stranger, tmp_path, [1.0, 2.0])
    assert above is None
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert "mlflow.parentRunId" not in client.get_run(run_id).data.tags
    assert client.get_experiment_by_name("evaluations").experiment_id == client.get_run(run_id).info.experiment_id


def test_what_could_not_be_logged_is_an_error(plan, tmp_path):
    finish(plan, {"all prompts": {}}, {})
    (plan.folder / "scores.parquet").unlink()
    with pytest.raises(TrackingError, match="1 entries of run .* could not be logged"):
        log_results(plan, {"all prompts": {}}, f"sqlite:///{tmp_path}/mlflow.db", "evaluations", tmp_path)


def test_an_evaluation_goes_to_the_store_of_the_run_that_made_the_model(one_step, tmp_path, monkeypatch):
    run = tmp_path / "mine"
    shutil.copytree(one_step, run / "export")
    (run / "run.json").write_text('{"mlflow": {"pipeline": "' + "a" * 32 + '"}}')

    def store(uri, named=None):
        overrides = [] if uri is None else [f"tracking.uri={uri}"]
        (run / "config.yaml").write_text(to_yaml(load(overrides=overrides)))
        return store_of(named, find_subject("mine", tmp_path), tmp_path)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://everybody:5000")
    assert store("http://server:5000") == "http://server:5000"
    assert store("http://server:5000", "http://named:5000") == "http://named:5000"
    assert store(None) == store("sqlite:////moved/away/mlflow.db") == "http://everybody:5000"
    assert store("http://***@server:5000") == "http://everybody:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store(None) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InputError, match=r"mine: its run is logged to http://\*\*\*@server:5000, and the secret"):
        store("http://***@server:5000")
    assert find_subject("mine", tmp_path).run_id == "a" * 32
    other = find_subject("mine", tmp_path, unet="shapes:sd15-onestep", start_timestep=999)
    assert other.run_id is None  # that run did not make these weights


@pytest.fixture
def server(tmp_path, monkeypatch):
    """URI of an MLflow server with a store of artifacts of its own."""
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # eight processes that nothing here needs
    (tmp_path / "server").mkdir()
    process = MlflowServer(tmp_path / "server")
    process.start()
    yield process.uri
    process.kill()


@pytest.mark.full
def test_a_run_of_a_server_is_fetched_once_and_goes_on_in_one_place(one_step, server, tmp_path):
    run_id = open_run(server, "shapes", "mine", storage=tmp_path, params={}, tags={})
    client_of(server).log_artifacts(run_id, str(one_step), "export")
    first = find_subject(run_id, tmp_path / "storage", server)
    file = tmp_path / "storage" / "downloads" / run_id / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    assert first.folder == str(file.parents[1])
    assert first.start_timestep == 999
    written = file.stat().st_mtime_ns
    assert find_subject(run_id, tmp_path / "storage", server) == first  # the settings that decide the folder, too
    assert file.stat().st_mtime_ns == written
    assert [entry.name for entry in (tmp_path / "storage" / "downloads").iterdir()] == [run_id]
