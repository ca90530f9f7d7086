"""A run that is steered by another metric than the judge's: on the screen, in summary.json, in MLflow and its registry."""

from __future__ import annotations

import json
import sys

import pytest
from jobs_started import TEST_S, job_of, mlflow_runs
from tiny_clip import write_clip

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]
SCORER = """
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    open(sys.argv[2], "a").write(json.dumps({"id": row["id"], "score": len(row["prompt"])}) + "\\n")
"""


def metrics_of(storage, name, prefix):
    parent, _ = mlflow_runs(storage, name)
    return {key.removeprefix(prefix) for key in parent.data.metrics if key.startswith(prefix)}


def test_a_run_by_clipscore_and_a_program_of_trainers_and_of_actors(tmp_path):
    """The same numbers either way; the registry's champion is compared by the chosen metric."""
    import mlflow

    (tmp_path / "clip").mkdir()
    clip = write_clip(tmp_path / "clip")
    (tmp_path / "score.py").write_text(SCORER)
    program = f"'command:length={sys.executable} {tmp_path}/score.py'"
    settings = [
        f"evaluation.metrics=[judge,clipscore,{program}]", "evaluation.metric=clipscore",
        f"evaluation.weights.clipscore={clip}", "tracking.register_as=measured",
    ]  # fmt: skip
    code, text = job_of(tmp_path, "run.name=trainers", *settings)
    assert code == 0, text
    summary = json.loads((tmp_path / "trainers" / "summary.json").read_text())
    columns = {"mean", "all", "size", "color", "shape", "position", "background", "clipscore", "length"}
    for who in ("student_before", "student_after", "teacher"):
        assert set(summary[who]) == columns
    named = [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in columns]
    assert named[0] == "clipscore", "it leads the table, whose rows are the metrics"
    assert set(named) == columns
    for prefix in ("eval/periodic_", "eval/", "student_after/"):
        assert columns <= metrics_of(tmp_path, "trainers", prefix)
    parent, _ = mlflow_runs(tmp_path, "trainers")
    assert parent.data.metrics["0-overview/score"] == parent.data.metrics["eval/periodic_clipscore"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    champion = client.get_model_version_by_alias("measured", "champion")
    assert champion.tags == {"metric": "student_after/clipscore", "score": repr(summary["student_after"]["clipscore"])}

    more = [
        "evaluation.gpus_per_scorer=0",
        "evaluation.prompts=null",
        "evaluation.holdout=0.05",
        "discriminator.weight=0",
    ]
    code, text = job_of(tmp_path, "run.name=actors", *settings, *more, "distill.steps=4", "distill.stop_on_plateau=1")
    assert code == 0, text
    assert "are held out" in text
    other = json.loads((tmp_path / "actors" / "summary.json").read_text())
    assert set(other["teacher"]) == columns
    if other["stopped"]:
        assert other["stopped"]["distill"].endswith("evaluations")
        assert "stopped   distill after" in text
    held, parent = (tmp_path / "actors" / "distill" / "before.json"), mlflow_runs(tmp_path, "actors")[0]
    assert set(json.loads(held.read_text())) == columns
    assert {entry.tags[0].value for entry in parent.inputs.dataset_inputs} >= {"training", "evaluation"}
