"""A storage folder that was moved or copied: runs write their artifacts where it is, and never to where it was."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking._tracking_service import utils

from raydistill.config.reading import validate
from raydistill.storage.lease import LEASE_FILE, Lease, holding
from raydistill.tracking.store import open_run, prepare, tracking_uri


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def begin(storage: Path, **arguments) -> tuple[mlflow.MlflowClient, str]:
    """A run with one more artifact, as a job begins it or goes on with it."""
    utils._artifact_repos_cache.clear()  # a job is a process of its own
    uri = arguments.pop("uri", tracking_uri(validate({}), storage))
    run = open_run(uri, arguments.pop("experiment", "e"), "r", storage=storage, params={}, tags={}, **arguments)
    client = mlflow.MlflowClient(uri)
    client.log_text(run, "curve", f"{len(client.list_artifacts(run))}.txt")
    return client, run


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A database that nobody has used; making one takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    prepare(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def old(tmp_path, empty) -> Path:
    (folder := tmp_path / "old place" / "outputs").mkdir(parents=True)
    shutil.copy(empty, folder)
    return folder


@pytest.fixture
def first(old) -> str:
    client, run = begin(old)
    model = client.create_logged_model(client.get_run(run).info.experiment_id, "student", run)
    client.create_registered_model("student")
    client.create_model_version("student", f"{model.artifact_location}", run)
    return run


@pytest.mark.parametrize("take", [shutil.copytree, shutil.move])
def test_a_run_in_a_folder_that_was_taken_elsewhere_writes_there_and_finds_what_was_taken(
    old, first, tmp_path, take, capsys
):
    begin(old, experiment="another")
    new = tmp_path / "new" / "outputs"
    take(old, new) if take is shutil.copytree else (new.parent.mkdir(), take(old, new))
    before = files(tmp_path / "old place")
    capsys.readouterr()
    client, run = begin(new)
    said = capsys.readouterr().out
    assert f"{new} was moved or copied from {old}: MLflow's artifacts now go to {new / 'mlartifacts'}\n" in said
    begin(new, experiment="another")
    begin(new, resume_run_id=first)
    assert capsys.readouterr().out == "", "said once"
    assert files(tmp_path / "old place") == before
    for id in (run, first):
        assert client.get_run(id).info.artifact_uri == (new / "mlartifacts" / id / "artifacts").as_uri()
    assert {entry.path for entry in client.list_artifacts(first)} == {"0.txt", "1.txt"}
    (model,) = client.search_logged_models([client.get_run(first).info.experiment_id])
    assert model.artifact_location.startswith((new / "mlartifacts").as_uri())
    assert client.get_model_version("student", "1").source == model.artifact_location


def test_artifacts_that_were_left_behind_are_found_there_and_new_ones_come_beside_the_database(
    old, first, tmp_path, capsys
):
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(old / "mlflow.db", new)
    before = files(old)
    client, run = begin(new)
    assert f"1 places that are in {old / 'mlartifacts'} alone stay there" in capsys.readouterr().out
    assert {entry.path for entry in client.list_artifacts(first)} == {"0.txt"}
    assert (new / "mlartifacts" / run / "artifacts" / "0.txt").is_file()
    assert files(old) == before


@pytest.mark.parametrize("state", ["held", "left", "dead", "ours"])
def test_a_folder_that_another_job_sees_under_its_old_path_is_not_changed_under_it(old, first, tmp_path, state, capsys):
    """Two machines may mount one folder at two places."""
    shutil.copytree(old, new := tmp_path / "mounted here")
    (run := new / "theirs").mkdir()
    (run / LEASE_FILE).write_text("" if state == "left" else '{"host": "other", "pid": 1, "token": "t"}')
    if state == "dead":
        os.utime(run / LEASE_FILE, (time.time() - 60,) * 2)
    capsys.readouterr()
    with holding(Lease(run, "t") if state == "ours" else None):
        client, _ = begin(new, experiment="another")
    place = old if state == "held" else new
    assert client.get_run(first).info.artifact_uri.startswith((place / "mlartifacts").as_uri())
    assert ("once no other job has a run in it, as theirs now" in capsys.readouterr().out) == (state == "held")


def test_a_link_to_the_folder_is_no_move(old, first, tmp_path, capsys):
    (tmp_path / "link").symlink_to(old)
    capsys.readouterr()
    begin(tmp_path / "link")
    assert "moved" not in capsys.readouterr().out


def test_a_store_elsewhere_says_that_its_experiment_keeps_artifacts_in_another_folder(tmp_path, empty, capsys):
    """It may serve several folders, so nothing is changed."""
    (tmp_path / "team").mkdir()
    shutil.copy(empty, tmp_path / "team")
    uri = f"sqlite:///{tmp_path}/team/mlflow.db"
    begin(tmp_path / "a", uri=uri)
    assert "MLflow keeps" not in capsys.readouterr().out
    client, run = begin(tmp_path / "b", uri=uri)
    a, b = tmp_path / "a" / "mlartifacts", tmp_path / "b" / "mlartifacts"
    assert (
        f"MLflow keeps the artifacts of experiment e in {a}, where it was begun, and not in {b}; "
        "with another tracking.experiment they go there"
    ) in capsys.readouterr().out
    assert client.get_run(run).info.artifact_uri.startswith(a.as_uri())
    client, run = begin(tmp_path / "b", uri=uri, experiment="own")
    assert client.get_run(run).info.artifact_uri.startswith(b.as_uri())
    assert "MLflow keeps" not in capsys.readouterr().out
