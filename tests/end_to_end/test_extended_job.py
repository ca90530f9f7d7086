"""A finished run is extended by a larger distill.steps: it ends with the bits of one that was as long from the start."""

import json

import pytest
from jobs_started import TEST_S, exported, history, job_of, mlflow_runs, same_weights

pytestmark = [pytest.mark.full, pytest.mark.timeout(TEST_S)]


def test_an_extended_run_ends_as_one_that_was_as_long_from_the_start(tmp_path):
    """Both evaluate after every update, so that they keep the best of the same students."""
    code, text = job_of(tmp_path, "run.name=extended")
    assert code == 0, text
    first = mlflow_runs(tmp_path, "extended")[0].info.run_id
    code, text = job_of(tmp_path, "run.name=extended", "distill.steps=4", "controls=no_vsd")
    assert code == 0, text
    assert "distill: resumes at update 2 of 4" in text
    assert "no_vsd: resumes" not in text
    assert "run extended was finished, and is extended: distill.steps 2 -> 4, control no_vsd" in text
    code, text = job_of(tmp_path, "run.name=straight", "distill.steps=4")
    assert code == 0, text

    folders = [tmp_path / name for name in ("extended", "straight")]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert same_weights(*map(exported, folders))
    for key in ("student_before", "student_after", "teacher", "steps", "best_step"):
        assert summaries[0][key] == summaries[1][key], key
    assert list(summaries[0]["controls"]) == ["no_vsd"]
    parent, stages = mlflow_runs(tmp_path, "extended")
    assert parent.info.run_id == first
    assert list(history(tmp_path, stages["distill"], "loss/vsd")) == [1, 2, 3, 4]
    _, text = job_of(tmp_path, "run.name=extended", "distill.steps=4", "controls=no_vsd")
    assert "run extended is finished" in text
