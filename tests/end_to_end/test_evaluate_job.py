"""jobs/evaluate.py as a user starts it: killed and gone on with, in parquet, JSON and MLflow."""

import json
import sys

import pyarrow.parquet as pq
import pytest
import torch
from jobs_started import ROOT, TEST_S, command, running, whole

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]
COUNT, BATCH = 120, 2
SCORER = """
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    open(sys.argv[2], "a").write(json.dumps({"id": row["id"], "score": len(row["prompt"])}) + "\\n")
"""


@pytest.fixture
def storage(tmp_path):
    """Storage with a run « mine» as jobs/distill.py leaves it: configuration, MLflow ids and export."""
    from raydistill.config.reading import load, to_yaml
    from raydistill.export.pipeline import ModelCard, export_student
    from raydistill.shapes import WEIGHTS
    from raydistill.spaces import load_space
    from raydistill.spaces.published_students import load_student
    from raydistill.tracking.store import open_run

    folder = tmp_path / "storage"
    space = load_space(WEIGHTS / "sd15")
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    student = load_student(space, WEIGHTS / "sd15-onestep")
    export_student(space, student, 999, folder / "mine" / "export", card, torch.float32)
    uri = f"sqlite:///{folder}/mlflow.db"
    parent = open_run(uri, "shapes", "mine", storage=folder, params={}, tags={"stage": "pipeline"})
    (folder / "mine" / "config.yaml").write_text(to_yaml(load()))
    (folder / "mine" / "run.json").write_text(json.dumps({"mlflow": {"pipeline": parent}}))
    return folder


def test_a_killed_evaluation_goes_on_to_the_same_results_under_the_run_that_made_the_model(tmp_path, storage):
    (tmp_path / "score.py").write_text(SCORER)
    prompts = tmp_path / "prompts.csv"
    captions = (ROOT / "raydistill/shapes/weights/heldout.txt").read_text().splitlines()
    rows = [f"{caption},{'even' if i % 2 else 'odd'}" for i, caption in enumerate(captions)]
    prompts.write_text("\n".join(["prompt,category", *rows]) + "\n")
    scorer = f"command:length={sys.executable} {tmp_path}/score.py"
    common = ["mine", "--storage", storage, "--prompts", prompts, "--count", COUNT, "--batch-size", BATCH,
              "--metrics", "judge", scorer]  # fmt: skip
    killed, undisturbed = tmp_path / "killed", tmp_path / "whole"

    with running(tmp_path, command("evaluate", *common, "--out", killed)) as job:
        job.until(lambda: list((killed / "parts" / "judge").glob("*.json")), pause=0.01)
        job.process.kill()
        job.process.wait()
        done = {file.name: file.stat().st_mtime_ns for file in (killed / "parts" / "judge").glob("*.json")}
    assert 0 < len(done) < COUNT // BATCH
    assert not (killed / "scores.parquet").exists()

    code, text = whole(tmp_path, command("evaluate", *common, "--out", killed))
    assert code == 0, text
    again = {name: (killed / "parts" / "judge" / name).stat().st_mtime_ns for name in done}
    assert again == done  # what was there is not made again
    code, text = whole(tmp_path, command("evaluate", *common, "--out", undisturbed))
    assert code == 0, text

    first, second = (pq.read_table(folder / "scores.parquet") for folder in (killed, undisturbed))
    assert first.equals(second)
    assert len(first) == COUNT
    assert {"prompt", "prompt_id", "seed", "category", "mean", "all", "color", "relation", "length"} <= set(
        first.column_names
    )
    names = {file.name for file in (undisturbed / "pictures").iterdir()}
    assert len(names) == COUNT
    assert all((killed / "pictures" / n).read_bytes() == (undisturbed / "pictures" / n).read_bytes() for n in names)

    results = json.loads((killed / "results.json").read_text())["results"]
    assert results == json.loads((undisturbed / "results.json").read_text())["results"]
    assert set(results) == {"all prompts", "even", "odd"}
    scores = first.to_pydict()
    assert results["all prompts"]["mean"] == pytest.approx(sum(scores["mean"]) / COUNT)
    odd = [v for v, c in zip(scores["mean"], scores["category"], strict=True) if c == "odd"]
    assert results["odd"]["mean"] == pytest.approx(sum(odd) / len(odd))
    assert scores["length"] == [len(prompt) for prompt in scores["prompt"]]
    assert 0.4 < results["all prompts"]["mean"] < 0.7  # the one-step start, 0.546 in the README

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent = json.loads((storage / "mine" / "run.json").read_text())["mlflow"]["pipeline"]
    run = client.get_run(json.loads((killed / "mlflow.json").read_text())["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/mean"] == pytest.approx(results["all prompts"]["mean"])
    assert run.data.metrics["eval/odd/mean"] == pytest.approx(results["odd"]["mean"])
    logged = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"scores.parquet", "results.json", "grid.png"} <= logged
