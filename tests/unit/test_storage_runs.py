"""Runs in a bucket: step log, run folder, pairs, checkpoints, and what needs a folder."""

import json
import os
import signal
import time
import uuid

import pytest
from PIL import Image

from raydistill.config.reading import load
from raydistill.driver import run_lock
from raydistill.driver.preflight import check_inputs
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.storage.place import remote
from raydistill.storage.resolve import resolve


@pytest.fixture
def folder(bucket):
    """A prefix that no other test uses."""
    return remote(f"{bucket}/{uuid.uuid4().hex[:8]}")


# -- whole runs -------------------------------------------------------------------------------------------


def test_the_log_of_steps_loses_nothing_that_a_checkpoint_counts(folder):
    from raydistill.workers.step_log import consumed, open_log, read_lines, step_file, steps_of

    log = open_log(folder, 0)
    for step in (1, 2, 3):
        log.add(step, 1, [[2 * step, 2 * step + 1]], {"loss/vsd": 0.1 * step})
        if step == 2:
            log.keep()
    # not closed, as a killed worker would leave it: step 3 is not kept, and done again
    lines = read_lines(step_file(folder, 0))
    assert list(steps_of(lines)) == [1, 2]
    again = open_log(folder, 0)
    for step in (2, 3, 4):
        again.add(step, 1, [[2 * step, 2 * step + 1]], {"loss/vsd": 0.3 * step})
    again.close()
    lines = read_lines(step_file(folder, 0))
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4]
    assert steps_of(lines)[2]["values"] == {"loss/vsd": 0.3 * 2}
    assert consumed(lines).tolist() == list(range(2, 10))
    assert read_lines(step_file(folder, 1)) == []


def test_a_run_folder_in_a_bucket_keeps_what_it_is_told(folder):
    config = load(None, [f"storage={folder}", "run.name=mine"])
    run = open_run_folder(config)
    assert run.path == folder / "mine"
    assert run.recall() == {}
    create_run_folder(run, config)
    run.remember(mlflow={"pipeline": "a"})
    run.remember(seconds={"distill": 1.5})
    again = open_run_folder(config)
    assert again.recall() == {"mlflow": {"pipeline": "a"}, "seconds": {"distill": 1.5}}
    with pytest.raises(InputError, match="must not change them: student.lr"):
        open_run_folder(load(None, [f"storage={folder}", "run.name=mine", "student.lr=0.5"]))


def test_pairs_are_written_to_a_bucket_and_go_on_there(folder, tmp_path):
    import numpy as np
    import torch

    from raydistill.data.pairs import captioned_previews, count_rows, existing_shards, fingerprint, shard_file
    from raydistill.data.shards import FAILURES_FILE, PairWriter
    from raydistill.errors import InputError
    from raydistill.pictures.files import png_bytes

    def writer(place_, seed=0):
        names = lambda rows: (np.asarray(rows), [f"prompt {row}" for row in rows])  # noqa: E731
        return PairWriter(
            place_,
            count=5,
            shard_size=2,
            at=names,
            seed=seed,
            teacher=("flux", "1"),
            max_failed_rows=1,
            settings={"seed": seed},
        )

    def rows(*numbers):
        z = torch.arange(len(numbers) * 4, dtype=torch.float16).reshape(-1, 1, 2, 2).numpy() + numbers[0]
        preview = np.array([png_bytes(Image.new("RGB", (4, 4))) for _ in numbers], dtype=object)
        failure = np.array(["broken" if row == 2 else "" for row in numbers], dtype=object)
        return {"row": np.array(numbers), "z_T": z, "z_S": z, "preview": preview, "failure": failure}

    here, there = tmp_path / "pairs", folder / "pairs"
    for place_ in (here, there):
        first = writer(place_)
        first.add(rows(0, 1))
        first.add(rows(2))  # half a shard, which nobody completes
        second = writer(place_)
        assert [(request.first, request.kept) for request in second.requests(2)] == [(2, 2), (4, 1)]
        second.add(rows(2, 3))
        second.add(rows(4))
        second.finish()
        assert writer(place_).missing == 0
        assert existing_shards(place_) == [0, 1, 2]
        assert count_rows(place_) == 4
        assert json.loads((place_ / FAILURES_FILE).read_text())["row"] == 2
        assert captioned_previews([shard_file(place_, 0)], 2)[1] == ["prompt 0", "prompt 1"]
        with pytest.raises(InputError, match="seed was 0, now 1"):
            writer(place_, seed=1)
    assert fingerprint(here) == fingerprint(there)
    staged = resolve(str(there))
    assert {f.name: f.read_bytes() for f in staged.iterdir()} == {f.name: f.read_bytes() for f in here.iterdir()}


def test_workers_and_driver_talk_through_a_bucket(folder, monkeypatch, capsys):
    from raydistill.tracking import progress
    from raydistill.workers import ray_train, stop_signal

    with pytest.raises(ValueError), ray_train.recording_fatal_errors(folder):
        raise ValueError("twice the same")
    assert ray_train.fatal_error(folder) == "ValueError: twice the same"
    ray_train.forget_fatal_error(folder)
    assert ray_train.fatal_error(folder) is None

    monkeypatch.setattr(stop_signal, "LOOK_EVERY_S", 0)
    assert not stop_signal.stop_requested(folder)

    def distil():
        with stop_signal.stop_on_signals(), stop_signal.draining(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_signal.stop_requested(folder)

    with pytest.raises(stop_signal.Stopped):
        distil()
    assert not stop_signal.stop_requested(folder)

    monkeypatch.setattr(progress, "BUCKET_EVERY_S", 0.1)
    with progress.ProgressWatcher(folder / "progress.json", "distill"):
        progress.write_progress(folder / "progress.json", step=2, total=2)
        deadline = time.monotonic() + 20
        shown = ""
        while "distill: step 2/2" not in shown:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            shown += capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "tracking.uri: s3://.* cannot hold MLflow's database; set tracking.uri or MLFLOW_TRACKING_URI"),
        (["tracking.uri=postgresql://u:pa55word@h/db"], "tracking.uri: .*artifacts need an MLflow server"),
        (["storage=s3://no-such-bucket-here/runs"], "storage: s3://no-such-bucket-here/runs: .*NO_SUCH_BUCKET"),
        (["storage=hdfs://host/runs"], "storage: hdfs://host/runs: unknown scheme"),
        (["storage=s3://key:pa55word@bucket/runs"], "storage: s3://.*credentials and options do not belong"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_before_anything_starts(overrides, message, folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=message) as error:
        check_inputs(load(None, [f"storage={folder}", *overrides]))
    assert "pa55word" not in str(error.value)
    assert folder.iterdir() == []


def test_what_needs_a_folder_says_so(folder):
    from raydistill.driver.single_stages import check_ablation

    config = load(None, [f"storage={folder}"])
    with pytest.raises(InputError, match="storage: s3://.*: --ablate needs a folder that every node sees"):
        check_ablation(config, open_run_folder(config), None)


def test_a_bucket_s_run_belongs_to_one_living_job_and_a_dead_one_s_can_be_taken(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_EVERY_S", 0.2)
    monkeypatch.setattr(run_lock, "WATCHED_FOR_S", 2.0)
    monkeypatch.setattr(run_lock, "READ_BACK_S", 0.1)
    with (
        run_lock.lock_run(folder),
        pytest.raises(run_lock.RunLocked, match=f"process {os.getpid()} on "),
        run_lock.lock_run(folder),
    ):
        pytest.fail("the first one lives")
    assert not (folder / run_lock.LEASE_FILE).exists()
    (folder / run_lock.LEASE_FILE).write_text('{"host": "gone", "pid": 1, "started": "once"}')
    with run_lock.lock_run(folder):
        assert "gone" not in (folder / run_lock.LEASE_FILE).read_text()
