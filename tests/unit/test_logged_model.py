"""The student in MLflow: a logged model that draws by itself, versions of it, and the best one by name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator

import mlflow
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from raydistill.config.reading import load
from raydistill.driver.logged_model import log_if_refused, log_of_run, log_student
from raydistill.driver.run_folder import RunFolder
from raydistill.errors import InputError
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import find_export
from raydistill.spaces import load_space
from raydistill.tracking.store import client_of, newest_model, open_run

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def export(sd_folder, tmp_path_factory):
    space = load_space(sd_folder)
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_student(space, space.load_network(), 999, folder, card)
    return folder


@contextlib.contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """The store of the user's own calls, for the length of the block."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", uri)
        yield


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uri(storage):
    return f"sqlite:///{storage}/mlflow.db"


def logged(
    uri, storage, export, score: float | None, register: str | None, run: str | None = None, metric: str = "mean"
) -> str:
    run = run or open_run(uri, "models", "a run", storage=storage, params={"seed": 3}, tags={})
    if score is not None:
        client_of(uri).log_metric(run, f"student_after/{metric}", score, step=7)
    assert log_student(uri, run, export, f"student_after/{metric}" if score is not None else None, register)
    return run


def test_the_logged_model_draws_what_the_export_draws_and_is_found_by_its_run(uri, storage, export, tmp_path):
    run = logged(uri, storage, export, None, None)
    found = find_export(run, tmp_path, uri)
    assert (found.folder / "unet" / "config.json").read_bytes() == (export / "unet" / "config.json").read_bytes()
    with mlflow_at(uri):
        model = mlflow.pyfunc.load_model(f"runs:/{run}/student", dst_path=str(tmp_path))
    pipeline = StableDiffusionPipeline.from_pretrained(export)
    noise = [torch.Generator().manual_seed(number) for number in range(2)]
    wanted = pipeline(PROMPTS, num_inference_steps=1, guidance_scale=0, generator=noise).images
    for drawn, picture in zip(model.predict(PROMPTS), wanted, strict=True):
        assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_the_champion_is_the_best_version(uri, storage, export, capsys):
    for score in (0.5, 0.9, 0.7):
        logged(uri, storage, export, score, "painter")
    assert find_export("models:/painter@champion", storage).name == "painter 2"
    assert find_export("models:/painter/3", storage).name == "painter 3"
    said = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "model     models:/painter/1, now models:/painter@champion",
        "model     models:/painter/2, now models:/painter@champion",
        "model     models:/painter/3",
    ]


@pytest.mark.parametrize("name", ["models:/painter@none", "models:/nobody/1", "models:/painter"])
def test_a_model_that_is_not_there_is_one_line(uri, storage, name):
    with pytest.raises(InputError, match=f"^{name}: sqlite:.*mlflow.db: "):
        find_export(name, storage, uri)


@pytest.mark.full
def test_a_store_that_refuses_the_model_loses_nothing(storage, export, capsys):
    assert not log_student(f"sqlite:///{storage}/other.db", "0" * 32, export, None, None)
    assert f"it is in {export}" in capsys.readouterr().out


def test_the_model_has_the_run_s_metrics_and_is_its_output(uri, storage, export):
    run = logged(uri, storage, export, 0.25, None)
    client = client_of(uri)
    client.log_metric(run, "loss/vsd", 1.0, step=7)
    model = newest_model(client, client.get_run(run).info.experiment_id, run)
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("student_after/mean", 0.25, 7)]
    assert (model.name, model.params) == ("student", {"seed": "3"})
    assert [(out.model_id, out.step) for out in client.get_run(run).outputs.model_outputs] == [(model.model_id, 7)]
    assert [m.value for m in client.get_metric_history(run, "student_after/mean")] == [0.25]


@pytest.mark.parametrize("before", [None, "sqlite:////nowhere/theirs.db"])
def test_logging_leaves_the_process_s_own_mlflow_alone(uri, storage, export, tmp_path, monkeypatch, before):
    """In a notebook a run of the user's may be under way, in another store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if before:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    set_before = mlflow.is_tracking_uri_set()
    environment = dict(os.environ)
    run = open_run(uri, "models", "a run", storage=storage, params={}, tags={})
    status = client_of(uri).get_run(run).info.status
    assert log_student(uri, run, export, None, "alone")
    assert {k: v for k, v in os.environ.items() if environment.get(k) != v and k.endswith("_URI")} == {}
    assert mlflow.is_tracking_uri_set() == set_before
    assert os.listdir(tmp_path) == []
    assert client_of(uri).get_run(run).info.status == status


@pytest.mark.full
def test_a_user_s_active_run_stays_active_and_gets_nothing(uri, storage, export, monkeypatch):
    with mlflow_at(f"sqlite:///{storage}/theirs.db"), mlflow.start_run() as theirs:
        run = logged(uri, storage, export, None, None)
        assert mlflow.active_run().info.run_id == theirs.info.run_id
        assert not mlflow.get_run(theirs.info.run_id).outputs.model_outputs
    client = client_of(uri)
    assert newest_model(client, client.get_run(run).info.experiment_id, run) is not None


def test_a_champion_keeps_its_own_score_when_its_run_is_extended(uri, storage, export):
    run = logged(uri, storage, export, 0.8, "extended")
    logged(uri, storage, export, 0.6, "extended", run)
    assert find_export("models:/extended@champion", storage, uri).name == "extended 1"
    logged(uri, storage, export, 0.7, "extended")
    assert find_export("models:/extended@champion", storage, uri).name == "extended 1"
    logged(uri, storage, export, 0.9, "extended", run)
    assert find_export("models:/extended@champion", storage, uri).name == "extended 4"


def test_what_was_not_measured_alike_does_not_become_the_champion(uri, storage, export, capsys):
    logged(uri, storage, export, 0.5, "mixed")
    logged(uri, storage, export, None, "mixed")
    logged(uri, storage, export, 31.0, "mixed", metric="clipscore")
    assert find_export("models:/mixed@champion", storage, uri).name == "mixed 1"
    assert (
        "models:/mixed/2; models:/mixed@champion stays version 1: the two have no score in common"
        in capsys.readouterr().out
    )


def test_a_champion_without_tags_is_compared_by_its_run(uri, storage, export):
    run = logged(uri, storage, export, 0.5, "older")
    client = client_of(uri)
    for tag in ("metric", "score"):
        client.delete_model_version_tag("older", "1", tag)
    logged(uri, storage, export, 0.4, "older")
    logged(uri, storage, export, 0.9, "older", run)
    assert client.get_registered_model("older").aliases == {"champion": 1}
    client.log_metric(run, "student_after/mean", 0.5, step=8)
    logged(uri, storage, export, 0.6, "older")
    assert client.get_registered_model("older").aliases == {"champion": 4}


@pytest.mark.full
def test_a_refused_student_is_logged_by_the_next_call_of_the_finished_run(uri, storage, export):
    folder = RunFolder(storage, "refused")
    shutil.copytree(export, folder.path / "export")
    (folder.path / "summary.json").write_text(json.dumps({"student_after": {"mean": 0.5}}))
    config = load(None, [f"storage={storage}", "tracking.register_as=late", f"tracking.uri={uri}"])
    run = open_run(uri, "models", "a run", storage=storage, params={}, tags={})
    client = client_of(uri)
    client.log_metric(run, "student_after/mean", 0.5)
    folder.remember(mlflow={"pipeline": run})
    log_if_refused(config, folder)  # nothing was refused
    experiment = client.get_run(run).info.experiment_id
    log_of_run(config, folder, f"sqlite:///{storage}/other.db", run, True)
    assert newest_model(client, experiment, run) is None
    log_if_refused(config, folder)
    model = newest_model(client, experiment, run)
    assert client.get_model_version_by_alias("late", "champion").tags == {
        "metric": "student_after/mean",
        "score": "0.5",
    }
    log_if_refused(config, folder)
    assert newest_model(client, experiment, run).model_id == model.model_id, "once"
