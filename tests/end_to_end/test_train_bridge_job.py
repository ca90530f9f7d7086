"""jobs/train_bridge.py --ablate as a user starts it: two-step trainings in the embedded world."""

import json

import pytest
import torch
from jobs_started import TEST_S, command, whole

from raydistill.data.pairs import write_pairs
from raydistill.driver.bridge_ablation import TABLES, VARIANTS

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]


@pytest.fixture
def pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z_student = torch.randn(24, 4, 8, 8, generator=generator)
    z_teacher = torch.nn.functional.interpolate(z_student.repeat(1, 2, 1, 1), scale_factor=2, mode="nearest")
    write_pairs(
        tmp_path / "pairs",
        0,
        prompts=[f"a red circle {i}" for i in range(24)],
        prompt_ids=range(24),
        seeds=range(24),
        z_teacher=z_teacher,
        z_student=z_student,
    )
    return tmp_path / "pairs"


def ablate(storage, pairs):
    """(exit code, what it printed)"""
    settings = (
        f"storage={storage}", "run.name=ablation", f"bridge.pairs={pairs}", "bridge.steps=2", "bridge.ablation_seeds=1",
        "bridge.batch_size=4", "bridge.embed_dim=16", "bridge.depths=[2]", "distill.cpus_per_worker=1",
    )  # fmt: skip
    return whole(storage, command("train_bridge", "--ablate", *settings))


def without_seconds(rows: dict[str, dict]) -> dict[str, dict]:
    """All that a second training of the same cell must repeat."""
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in rows.items()}


def test_an_ablation_trains_every_variant_and_goes_on_with_what_is_missing(tmp_path, pairs):
    import mlflow

    code, text = ablate(tmp_path, pairs)
    assert code == 0, text
    file = tmp_path / "ablation" / "ablation.json"
    first = json.loads(file.read_text())
    assert first["rows"].keys() == {variant.name for variant in VARIANTS}
    assert all(f"| {table} |" in text for table in TABLES)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = client.get_run(first["mlflow_run_id"])
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in nested} == {f"ablation/{variant.name}-seed0" for variant in VARIANTS}
    assert {run.info.status for run in (parent, *nested)} == {"FINISHED"}
    assert "| components |" in parent.data.tags["mlflow.note.content"]

    cells = {path.name: path.read_bytes() for path in (tmp_path / "ablation" / "ablation").glob("*.json")}
    file.unlink()
    (tmp_path / "ablation" / "ablation" / "full-seed0.json").unlink()
    code, text = ablate(tmp_path, pairs)
    assert code == 0, text
    assert text.count("-seed0: eval/psnr") == 1
    second = json.loads(file.read_text())
    assert without_seconds(second["rows"]) == without_seconds(first["rows"])
    others = {path.name: path.read_bytes() for path in (tmp_path / "ablation" / "ablation").glob("*.json")}
    assert {name for name in cells if cells[name] != others[name]} <= {"full-seed0.json"}  # its seconds
