"""The frame around a run: however its block ends, its MLflow runs end with the status that it deserves."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import pytest
from pair_sets import write_upscaled
from PIL import Image
from ray.exceptions import ActorUnavailableError

from raydistill.config.reading import changed, load
from raydistill.data.images import open_images
from raydistill.data.pairs import fingerprint
from raydistill.data.prompts import PromptSet
from raydistill.driver import pipeline, stages
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder, create_run_folder
from raydistill.driver.run_record import open_record
from raydistill.errors import InputError, NonFiniteError, StageFailed
from raydistill.teachers.request import TeacherStartError, TeacherUnavailable
from raydistill.workers import stop_signal


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(autouse=True)
def _own_tracking(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(storage):
    return mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")


@pytest.fixture
def run(storage, request):
    """(arguments of `_pipeline`) of a run of its own in one store."""
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    config = load(overrides=[f"storage={storage}", f"run.name={name}", "tracking.experiment=frame"])
    folder = RunFolder(storage, name)
    create_run_folder(folder, config)
    prompts = PromptSet(["a small red circle at the left on a white background"])
    return config, folder, Inputs(None, None, prompts, prompts)


def status(client, run_id: str) -> str:
    return client.get_run(run_id).info.status


@pytest.fixture
def fail(run):
    """Break a run by an error while a stage is open; the pipeline and that stage are kept as attributes."""

    def fail(error: BaseException) -> None:
        with open_record(*run) as fail.pipeline:
            fail.finished = fail.pipeline.stage_run(run[0], "bridge")
            fail.pipeline.finish(fail.finished)
            fail.stage = fail.pipeline.stage_run(run[0], "distill")
            raise error

    return fail


class Unforeseen(Exception):
    """An error that nobody expects."""


EXPECTED = [
    ValueError("bad value"),
    OSError(28, "No space left on device"),
    StageFailed("distill: worker 0 failed"),
    InputError("pairs: another space"),
    TeacherUnavailable("teacher-x did not answer"),
    ActorUnavailableError("the Serve controller is being replaced", None),
]


def statuses(client, fail) -> list[str]:
    """Of the parent, of the stage that was over, and of the one that was open."""
    ids = (fail.pipeline.parent, fail.finished, fail.stage)
    return [client.get_run(run_id).info.status for run_id in ids]


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_an_expected_failure_ends_parent_and_open_stages_as_failed(fail, client, error):
    with pytest.raises(StageFailed) as failed:
        fail(error)
    assert failed.value.__cause__ is error
    own = isinstance(error, StageFailed | InputError)  # whose messages say all
    assert str(failed.value) == (str(error) if own else f"{type(error).__name__}: {error}")
    assert statuses(client, fail) == ["FAILED", "FINISHED", "FAILED"]
    assert client.get_run(fail.stage).data.tags["mlflow.parentRunId"] == fail.pipeline.parent


@pytest.mark.parametrize("error", [Unforeseen("?"), ZeroDivisionError(), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_an_unknown_failure_ends_them_as_failed_and_is_not_dressed_up(fail, client, error):
    with pytest.raises(type(error)) as failed:
        fail(error)
    assert failed.value is error
    assert statuses(client, fail) == ["FAILED", "FINISHED", "FAILED"]


def test_an_interrupt_ends_them_as_killed(fail, client):
    with pytest.raises(StageFailed, match="interrupted"):
        fail(KeyboardInterrupt())
    assert statuses(client, fail) == ["KILLED", "FINISHED", "KILLED"]


@pytest.mark.full
def test_leaving_waits_once_for_a_store_that_is_away_however_many_runs_are_open(run, monkeypatch):
    monkeypatch.setattr(stop_signal, "TRACKING_WITHIN_S", 1.0)
    started = []

    def leave(port: int) -> None:
        with open_record(*run) as pipeline:
            for stage in ("bridge", "distill"):
                pipeline.stage_run(run[0], stage)
            pipeline.uri = f"http://127.0.0.1:{port}"
            started.append(time.monotonic())
            raise stop_signal.Stopped

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(stop_signal.Stopped):
        leave(silent.getsockname()[1])  # takes connections and says nothing
    assert time.monotonic() - started[0] < 30


def test_a_run_that_ends_well_is_finished(run, client):
    with open_record(*run) as pipeline:
        assert status(client, pipeline.parent) == "RUNNING"
    assert status(client, pipeline.parent) == "FINISHED"


def test_a_failed_run_goes_on_under_the_same_ids(fail, run, client):
    with pytest.raises(StageFailed):
        fail(ValueError())
    with open_record(*run) as again:
        assert (again.parent, again.stage_run(run[0], "distill")) == (fail.pipeline.parent, fail.stage)
        assert statuses(client, fail) == ["RUNNING", "FINISHED", "RUNNING"]
        again.finish(fail.stage)
    assert statuses(client, fail) == ["FINISHED", "FINISHED", "FINISHED"]


def test_a_failed_run_s_reason_does_not_stay_once_it_goes_on(fail, run, client):
    with pytest.raises(StageFailed):
        fail(ValueError("bad value"))
    told = client.get_run(fail.stage).data.tags
    assert "bad value" in told["failure"]
    assert "bad value" in told["mlflow.note.content"]
    with open_record(*run) as again:
        again.finish(again.stage_run(run[0], "distill"))
    for id in (fail.stage, fail.pipeline.parent):
        assert not {"failure", "mlflow.note.content"} & client.get_run(id).data.tags.keys()


def test_a_deleted_experiment_fails_the_run_with_its_name(run, client):
    config, folder, inputs = run
    gone = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": "gone"})})
    with open_record(gone, folder, inputs) as pipeline:
        pass
    client.delete_experiment(client.get_run(pipeline.parent).info.experiment_id)
    (folder.path / "run.json").unlink()
    with pytest.raises(StageFailed, match="experiment 'gone' was deleted"), open_record(gone, folder, inputs):
        pytest.fail("there is nothing to log to")


def test_the_time_of_a_stage_that_fails_is_kept_and_added_to(run):
    with pytest.raises(StageFailed), open_record(*run) as first, first.timed("bridge"):
        raise ValueError
    with open_record(*run) as second, second.timed("bridge"):
        pass
    assert second.seconds["bridge"] >= first.seconds["bridge"] > 0


@pytest.mark.parametrize(
    ("ending", "in_vain", "told"),
    [
        (stop_signal.Stopped("asked to leave"), False, "stopped after 0 s"),
        (TeacherStartError("not needed any more"), True, "no longer needed, after 0 s"),
        (TeacherStartError("no room"), False, "failed after 0 s"),
    ],
    ids=["left", "vain", "failed"],
)
def test_a_stage_that_was_asked_to_leave_or_is_in_vain_has_not_failed(run, capsys, ending, in_vain, told):
    with (
        pytest.raises((StageFailed, stop_signal.Stopped)),
        open_record(*run) as record,
        record.timed("start", lambda: in_vain),
    ):
        raise ending
    assert f"start: {told}" in capsys.readouterr().out


def test_a_damaged_note_of_the_run_fails_it_in_its_own_words(run):
    (run[1].path / "run.json").write_text("")
    with pytest.raises(StageFailed, match=r"run\.json is damaged .*restore it, or remove it"), open_record(*run):
        pytest.fail("it cannot be opened")


def test_a_run_says_its_recipe_what_differs_from_it_and_what_to_type(run, client, storage):
    config = load("sdxl_sd15", [f"storage={storage}", "run.name=facts", "plan.trainer_gpu=A100"])
    with pytest.raises(StageFailed), open_record(config, RunFolder(storage, "facts"), run[2]) as record:
        raise ValueError
    data = client.get_run(record.parent).data
    assert data.tags["recipe"] == "sdxl_sd15"
    assert data.params["plan.trainer_gpu"] == "A100"
    assert "plan.teacher_gpu" not in data.params
    assert f"`raydistill.distill('sdxl_sd15', 'storage={storage}'" in data.tags["mlflow.note.content"]


def test_a_run_names_the_images_and_pairs_that_it_is_made_of(run, client, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / f"{name}.png")
    config, folder, inputs = run
    with open_record(config, folder, replace(inputs, images=open_images(tmp_path / "photos"))) as record:
        record.describe_pairs(write_upscaled(tmp_path / "pairs", 24))
    sets = {
        given.tags[0].value: (given.dataset, json.loads(given.dataset.profile)["num_rows"])
        for given in client.get_run(record.parent).inputs.dataset_inputs
    }
    assert sets["synthesis.images"][1] == 2
    assert sets["pairs"][1] == 24
    assert sets["pairs"][0].digest == fingerprint(tmp_path / "pairs")


def test_a_teacher_s_row_that_fails_ends_no_distillation(run, monkeypatch, capsys):
    """It is said at once, and the summary goes without; what the teachers themselves fail of is theirs to say."""
    started = Future()
    started.set_result(None)

    def fails(*_):
        raise NonFiniteError("all pictures are not finite")

    def distillation(record, name, config, *, needs, **_):
        wait(needs)
        assert [need.exception() for need in needs] == [None]
        return {"steps": 1}

    @contextmanager
    def service(*_):
        yield started

    for name, stand_in in (
        ("draw_teacher_pictures", fails), ("distillation", distillation), ("teacher_service", service),
        ("make_sets", lambda *_: (None, None)), ("TeacherClient", lambda *_: None),
    ):  # fmt: skip
        monkeypatch.setattr(pipeline, name, stand_in)
    record = SimpleNamespace(
        config=run[0].model_copy(update={"controls": []}),
        run=run[1],
        scorers=lambda _: SimpleNamespace(start=lambda: None, close=lambda: None),
    )
    assert pipeline._with_teacher(record) == {"distill": {"steps": 1}, "teacher": {}}
    said = capsys.readouterr().out
    assert "its row of the table failed, and the run goes on without it: NonFiniteError: all pictures" in said
    started = Future()
    started.set_exception(TeacherStartError("no room"))
    assert pipeline._teacher_row(record, "teacher", started, None) == {}
    assert capsys.readouterr().out == ""


def test_the_ranks_of_a_teacher_meet_on_the_interface_that_is_named(run, monkeypatch):
    asked = {}
    monkeypatch.setattr(stages.registry, "start", lambda *_, **given: asked.update(given))
    monkeypatch.setattr(stages.registry, "release", lambda _: None)
    config = changed(run[0], {"distill": {"network_interface": "eth0"}})
    record = SimpleNamespace(run=run[1], timed=lambda *_: nullcontext())
    with stages.teacher_service(record, config, "teacher") as ready:
        ready.result()
    assert asked == {"network": {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}}
