"""Runs can be found, resumed and compared, and a store that is away costs neither training nor curves."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from PIL import Image

from raydistill.config.reading import config_hash, flatten, validate
from raydistill.errors import mask
from raydistill.tracking.store import (
    TrackingAway,
    TrackingError,
    open_run,
    prepare,
    run_tags,
    source_version,
    tracking_uri,
    ui_command,
)
from raydistill.tracking.tracker import SystemMetrics, Tracker


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uri(storage) -> str:
    uri = tracking_uri(validate({}), storage)
    prepare(uri)
    return uri


@pytest.fixture(scope="module")
def client(uri):
    import mlflow

    return mlflow.MlflowClient(uri)


@pytest.fixture
def run_id(uri, storage) -> str:
    return open_run(uri, "tests", "a run", storage=storage, params={}, tags={})


def curve(client, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((entry.step, entry.value) for entry in client.get_metric_history(run_id, key))


# -- where ------------------------------------------------------------------------------------------------


def test_uri_comes_from_config_then_environment_then_storage(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(validate({}), Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(validate({}), Path("out")) == "http://server:5000"
    chosen = validate({"tracking": {"uri": "sqlite:///my.db"}})
    assert tracking_uri(chosen, Path("out")) == f"sqlite:///{tmp_path}/my.db"  # relative paths differ per worker


def test_ui_command_names_the_store_and_no_password():
    assert ui_command("sqlite:////a/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////a/mlflow.db"
    assert ui_command("sqlite:////a b/mlflow.db").endswith("'sqlite:////a b/mlflow.db'")
    assert "hunter2" not in ui_command("postgresql://me:hunter2@db/mlflow")
    assert "http://server:5000" in ui_command("http://server:5000")


@pytest.mark.full
def test_first_use_by_several_processes_at_once_makes_one_store(tmp_path):
    code = "import sys; from raydistill.tracking.store import open_run; from pathlib import Path; print(open_run(sys.argv[1], 'e',"
    code += " 'r', storage=Path(sys.argv[2]), params={}, tags={}))"
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    command = [sys.executable, "-c", code, uri, str(tmp_path)]
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert len({out.strip() for out, _ in results}) == 2
    assert not [err for _, err in results if "alembic" in err or "INFO" in err]


def test_unusable_store_is_an_error_before_training_without_the_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TrackingError, match="cannot be used") as caught:
        prepare(f"http://me:hunter2@127.0.0.1:{port}")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("version", ["ffffffffffff", "cfd24bdc0731"], ids=["newer", "older"])
@pytest.mark.full
def test_a_store_of_another_schema_is_refused_and_not_waited_for(uri, tmp_path, version):
    """As `TrackingAway` it would be waited for, `tracking.retry_for_s` long, where the run has begun."""
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = ?", [version])
    with pytest.raises(
        TrackingError, match=f"{tmp_path}/mlflow.db was written by a newer MLflow than this one"
    ) as caught:
        prepare(f"sqlite:///{tmp_path}/mlflow.db")
    assert not isinstance(caught.value, TrackingAway)
    assert "\n" not in str(caught.value)


# -- describing a run -------------------------------------------------------------------------------------


def test_secrets_never_reach_the_store():
    assert mask("hub.token", "hf_abc") == "***"
    assert mask("aws_secret_access", "x") == mask("db.password", 1) == mask("api_key", "x") == "***"
    assert mask("tracking.uri", "postgresql://me:p@ss@db/mlflow") == "postgresql://***@db/mlflow"
    assert mask("prompts.path", "https://h/f?sig=abc&a=1&X-Amz-Security-Token=t") == (
        "https://h/f?sig=***&a=***&X-Amz-Security-Token=***"
    )
    assert mask("student.lr", 1e-6) == "1e-06"
    assert mask("run.name", None) == "null"
    assert mask("prompts.path", "shapes:prompts.txt") == "shapes:prompts.txt"


def test_run_carries_parameters_tags_parent_and_absolute_artifacts(uri, client, storage):
    config = validate({"tracking": {"uri": "http://me:hunter2@server"}})
    parent = open_run(uri, "described", "parent", storage=storage, params={}, tags={})
    params = flatten(config) | {"long": "x" * 7000}
    tags = run_tags(config, "distill")
    run = client.get_run(
        open_run(uri, "described", "child", storage=storage, params=params, tags=tags, parent_run_id=parent)
    )
    assert run.info.run_name == "child"
    assert run.info.artifact_uri.startswith(f"file://{storage}/mlartifacts/")
    assert run.data.params["student.lr"] == "1e-06"
    assert run.data.params["tracking.uri"] == "http://***@server"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["config_hash"] == config_hash(config)
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert (run.data.tags["teacher"], run.data.tags["stage"]) == ("shapes:flux", "distill")
    assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == source_version()


def test_source_version_is_the_commit_git_reports():
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("the source tree is not a git checkout")
    assert source_version().removesuffix("-dirty") == git.stdout.strip()


def test_resume_keeps_old_parameters_and_tags_the_changed_ones(uri, client, storage):
    run = open_run(uri, "tests", "r", storage=storage, params={"steps": 10, "seed": 0}, tags={"stage": "a"})
    client.set_terminated(run, "FAILED")
    again = open_run(
        uri, "tests", "r", storage=storage, params={"steps": 20, "seed": 0, "new": 1}, tags={"stage": "b"},
        resume_run_id=run,
    )  # fmt: skip
    data, info = client.get_run(run).data, client.get_run(run).info
    assert again == run
    assert info.status == "RUNNING"
    assert data.params == {"steps": "10", "seed": "0", "new": "1"}
    assert data.tags["changed.steps"] == "20"
    assert data.tags["stage"] == "b"
    assert "changed.seed" not in data.tags


def test_a_user_without_a_name_is_a_number(uri, client, storage, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123456)  # as under `docker run -u 123456`
    run = open_run(uri, "tests", "r", storage=storage, params={}, tags={})
    assert client.get_run(run).data.tags["mlflow.user"] == "123456"


def test_missing_and_deleted_runs_are_refused(uri, client, storage, run_id):
    arguments = {"storage": storage, "params": {}, "tags": {}}
    with pytest.raises(TrackingError, match="no-such-run"):
        open_run(uri, "tests", "r", resume_run_id="no-such-run", **arguments)
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match="was deleted"):
        open_run(uri, "tests", "r", resume_run_id=run_id, **arguments)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="experiment 'gone' was deleted"):
        open_run(uri, "gone", "r", **arguments)


# -- logging ----------------------------------------------------------------------------------------------


def test_everything_logged_arrives(uri, client, run_id, tmp_path, caplog):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "weights.txt").write_text("w")
    (tmp_path / "file.txt").write_text("f")
    tracker = Tracker(uri, run_id, interval=0.05)
    tracker.note("# what came out")
    for step in range(3):
        tracker.metrics({"loss/vsd": torch.tensor(step / 2), "loss/gan": math.nan, "eval/../odd (key)": 1}, step)
    tracker.image(Image.new("RGB", (8, 8), "red"), "samples/fixed", 2)
    tracker.artifact(tmp_path / "file.txt", "notes")
    tracker.artifact(tmp_path / "export")
    tracker.text("hello", "card.md")
    tracker.tags({"alarm": "drift", "hub_token": "hf_abc"})
    assert tracker.finish() == 0
    run = client.get_run(run_id)
    assert curve(client, run_id, "loss/vsd") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert set(run.data.metrics) == {"loss/vsd", "odd _key_"}
    assert sum("loss/gan is nan" in record.message for record in caplog.records) == 1
    assert run.info.status == "FINISHED"
    assert (run.data.tags["alarm"], run.data.tags["hub_token"]) == ("drift", "***")
    assert run.data.tags["mlflow.note.content"] == "# what came out"
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    assert {p.relative_to(root).as_posix() for p in root.rglob("*.[tm]*")} == {
        "notes/file.txt", "export/weights.txt", "card.md",
    }  # fmt: skip
    picture = next(root.glob("images/samples~fixed+step+2+*.png"))
    assert Image.open(picture).getpixel((0, 0)) == (255, 0, 0)


def test_resumed_curves_continue_without_doubled_steps(uri, client, run_id):
    first = Tracker(uri, run_id, interval=0.01)
    for step in range(5):
        first.metrics({"loss/vsd": step}, step)
    first.metrics({"eval/mean": 0.5}, 0)
    first.image(Image.new("RGB", (4, 4)), "samples", 2)
    assert first.close() == 0
    second = Tracker(uri, run_id, interval=0.01)  # restarted from the checkpoint of step 2
    for step in range(3, 8):
        second.metrics({"loss/vsd": step, "loss/new": step}, step)
    second.metrics({"eval/mean": 0.6}, 4)
    second.image(Image.new("RGB", (4, 4)), "samples", 2)
    second.image(Image.new("RGB", (4, 4)), "samples", 4)
    assert second.finish() == 0
    assert curve(client, run_id, "loss/vsd") == [(step, float(step)) for step in range(8)]
    assert [step for step, _ in curve(client, run_id, "loss/new")] == [3, 4, 5, 6, 7]
    assert curve(client, run_id, "eval/mean") == [(0, 0.5), (4, 0.6)]
    names = [entry.path.split("+")[2] for entry in client.list_artifacts(run_id, "images") if "png" in entry.path]
    assert sorted(names) == ["2", "4"]


def test_values_of_earlier_steps_are_offered_whole_and_before_later_ones(uri, client, run_id, monkeypatch):
    """A store that was away for 300 steps and then lost its only sender; the successor too is lost, at its first request."""
    first = Tracker(uri, run_id, interval=0.01)
    first.metrics({"loss/vsd": 1}, 1)
    assert first.close() == 0
    lines = {step: {"loss/vsd": float(step), "loss/gan": 0.5, "loss/nan": math.nan} for step in range(1, 301)}
    sent = []
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda _, run, metrics: sent.extend(metrics) or 1 / 0)
    lost = Tracker(uri, run_id, interval=0.01)
    lost.catch_up(lines)
    lost.metrics({"loss/vsd": 301.0}, 301)
    assert lost.close(timeout=0.5) > 0
    assert 1 < max(metric.step for metric in sent) < 301
    monkeypatch.undo()
    again = Tracker(uri, run_id, interval=0.01)
    again.catch_up(lines)
    again.metrics({"loss/vsd": 301.0}, 301)
    assert again.close() == 0
    assert curve(client, run_id, "loss/vsd") == [(step, float(step)) for step in range(1, 302)]
    assert [step for step, _ in curve(client, run_id, "loss/gan")] == list(range(1, 301))
    assert "loss/nan" not in client.get_run(run_id).data.metrics


def test_failing_store_delays_nothing_and_loses_nothing(uri, client, run_id, caplog):
    tracker = Tracker(uri, run_id, interval=0.01)
    tracker.metrics({"loss": 0}, 0)
    assert tracker.flush() == 0
    database = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    database.execute("ALTER TABLE metrics RENAME TO away")  # every write fails until it is back
    try:
        start = time.monotonic()
        for step in range(1, 2001):
            tracker.metrics({"loss": step}, step)
        tracker.tags({"alarm": "late"})
        assert time.monotonic() - start < 2
        deadline = time.monotonic() + 30
        while "does not answer" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "does not answer" in caplog.text
    finally:
        database.execute("ALTER TABLE away RENAME TO metrics")
        database.close()
    assert tracker.close() == 0
    assert curve(client, run_id, "loss") == [(step, float(step)) for step in range(2001)]
    assert client.get_run(run_id).data.tags["alarm"] == "late"
    assert client.get_run(run_id).info.status == "RUNNING"


def test_store_that_stays_away_is_reported_with_the_number_of_lost_entries(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracker = Tracker(f"http://me:hunter2@127.0.0.1:{port}", "run", interval=0.01)
    for step in range(10):
        tracker.metrics({"loss": step}, step)
    assert tracker.finish("FAILED", timeout=2) == 11  # ten values and the status
    assert "11 entries" in caplog.text
    assert "hunter2" not in caplog.text


def test_memory_is_bounded_while_the_store_is_away(monkeypatch):
    monkeypatch.setattr("raydistill.tracking.sender.METRICS_KEPT", 100)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker("http://127.0.0.1:1", "run", interval=60)
    for step in range(500):
        tracker.metrics({"loss": step}, step)
    assert len(tracker._sender.metrics) <= 100
    assert tracker.close(timeout=0.1) == 500


def test_one_bad_artifact_does_not_hold_up_the_rest(uri, client, run_id, tmp_path, caplog):
    tracker = Tracker(uri, run_id, interval=0.01)
    tracker.artifact(tmp_path / "missing.txt")
    tracker.tags({"after": "yes"})
    assert tracker.finish() == 1
    assert "missing.txt" in caplog.text
    run = client.get_run(run_id)
    assert run.data.tags["after"] == "yes"
    assert run.info.status == "FINISHED"


def test_an_artifact_that_arrives_on_the_second_try_is_not_counted_as_lost(uri, client, run_id, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("f")
    log_artifact, tries = mlflow.MlflowClient.log_artifact, []

    def fail_once(self, *arguments):
        tries.append(arguments)
        if len(tries) == 1:
            raise ConnectionResetError
        log_artifact(self, *arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", fail_once)
    tracker = Tracker(uri, run_id, interval=0.01)
    tracker.artifact(tmp_path / "file.txt")
    assert tracker.finish() == 0
    assert len(tries) == 2
    assert [entry.path for entry in client.list_artifacts(run_id)] == ["file.txt"]


def test_system_metrics_are_sampled_and_continue_after_a_resume(uri, client, run_id):
    key = "system/cpu_utilization_percentage"
    for expected in (1, 2):
        monitor = SystemMetrics(uri, run_id, interval=0.1).start()
        deadline = time.monotonic() + 30
        while len(curve(client, run_id, key)) < expected and time.monotonic() < deadline:
            time.sleep(0.1)
        monitor.stop()
    steps = [step for step, _ in curve(client, run_id, key)]
    assert len(steps) >= 2
    assert steps == list(range(len(steps)))


def test_system_metrics_that_cannot_run_only_warn(uri, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, name)
    with caplog.at_level(logging.WARNING):
        SystemMetrics(uri, "run").start().stop()
    assert "system metrics are not recorded" in caplog.text
