"""A run that version 0.1 began is resumed by this version, to weights that do not change from version to version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from jobs_started import TEST_S, command, exported, whole
from safetensors.torch import load_file

RUN = Path(__file__).parents[1] / "run_of_version_0_1"

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]


def test_a_run_of_version_0_1_goes_on_to_the_same_weights(tmp_path):
    shutil.copytree(RUN / "begun", tmp_path / "begun")
    config = tmp_path / "begun" / "config.yaml"
    for source, copy in ((RUN / "run.yaml", tmp_path / "run.yaml"), (config, config)):
        copy.write_text(source.read_text().replace("MODELS", str(RUN / "models")))
    code, text = whole(
        tmp_path, command("distill", "--config", tmp_path / "run.yaml", f"storage={tmp_path}", "run.name=begun")
    )
    assert code == 0, text
    assert json.loads((tmp_path / "begun" / "summary.json").read_text())["steps"] == 4
    lines = [json.loads(line)["step"] for line in (tmp_path / "begun" / "distill" / "steps-0.jsonl").open()]
    assert lines.count(1) == 1, "it begins where it was"
    wanted, found = load_file(RUN / "whole.safetensors"), exported(tmp_path / "begun")
    newest = max((RUN / "begun" / "distill" / "checkpoints").glob("checkpoint_*/")) / "state.pt"
    before = torch.load(newest, weights_only=True)["state"]["ema"]
    assert wanted.keys() == found.keys() == before.keys()
    for name, value in wanted.items():  # bit for bit on one kind of CPU; others round otherwise
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any((before[name] - value).abs().max() > 1e-4 for name, value in wanted.items()), "the rest did count"
