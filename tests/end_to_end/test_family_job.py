"""A family from outside the package in every process of a run: synthesis, Bridge and distillation as a user starts them."""

import os
from pathlib import Path

import pytest
from jobs_started import SMALL, TEST_S, command, whole
from pair_sets import load_pairs
from tiny_aura_flow import install, save_aura_flow

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]
TESTS = Path(__file__).parents[1]


def test_an_installed_family_is_known_to_all_processes_of_a_run(tmp_path, sd_folder, monkeypatch):
    """Encoders, teacher ranks, synthesis actors and both kinds of trainers open its folder; none of them registers it."""
    folder, site = save_aura_flow(tmp_path / "model"), install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(TESTS), str(TESTS.parent)]))
    settings = [
        f"storage={tmp_path}", "run.name=outside", f"teacher.model={folder}", f"student.model={sd_folder}",
        "student.unet=null", "bridge.checkpoint=null", "discriminator.weight=0", "discriminator.real_data=null",
        "evaluation.judge=null", "synthesis.count=16", "bridge.steps=2", "bridge.batch_size=4", "bridge.embed_dim=16",
        "bridge.depths=[1]", "bridge.heads=2", "bridge.attention.weight=1", "fake_score.rank=2",
    ]  # fmt: skip
    code, text = whole(tmp_path, command("distill", *SMALL, *settings))
    assert code == 0, text
    assert len(load_pairs(tmp_path / "outside" / "pairs")) == 16
    card = (tmp_path / "outside" / "export" / "README.md").read_text()
    assert "With the same pipeline: fal/AuraFlow (Apache License 2.0)" in card
