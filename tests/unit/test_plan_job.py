"""`jobs/plan.py` as it is called, and what it counts of a Bridge's training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_planning_schedule import BATCH

from raydistill.config.reading import CONFIGS, load
from raydistill.planning.counting import count_bridge
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.meta import open_space


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(CONFIGS.parent, "jobs", "plan.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=500)


@pytest.mark.full
def test_the_job_counts_once_and_prints_every_section_when_asked():
    settings = [f"distill.batch_size={BATCH}", "bridge.checkpoint=null"]
    done = plan(*settings)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "plan      shapes:flux teaches shapes:sd15; 120 updates of 1 x 4 samples"
    counting = [line for line in lines if line[2:3] == ":"]
    assert "counting: step 0/" in counting[0]
    assert "counted in " in counting[-1]
    assert lines[-1] == "details   --full"
    again = plan(*settings)
    assert again.stdout.splitlines() == [first, *(line for line in lines if line not in counting)]
    full = plan(*settings, "--full")
    parameters = sum(p.numel() for p in load_space(WEIGHTS / "flux").load_network().parameters())
    for title in ("PARAMETERS", "MEMORY", "TRAFFIC", "ONE STUDENT UPDATE", "THE RUN", "Modelled: seconds"):
        assert title in full.stdout
    assert re.search(rf"^  teacher +{parameters:,}$", full.stdout, re.MULTILINE)
    for phase in ("synthesis", "Bridge training", "distillation"):
        assert f"\n  {phase} " in full.stdout
    for model in ("Teacher, shapes:flux", "Student base, shapes:sd15", "Student start, shapes:sd15-onestep"):
        assert f"  {model}: the project's own licence." in full.stdout
    assert "64 GPU-hours for the Bridge, 160 for 3,000 student updates" in full.stdout


def test_the_job_names_what_it_does_not_know():
    done = plan("plan.trainer_gpu=H1000")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: plan.trainer_gpu: H1000 is not in the table (H100, H200, A100-80, L40S, 4090)"
    )


def test_bridge_training_counts_text_encoders_and_the_pictures_of_its_validation():
    """Published: T5-XXL's encoder has 4.76 B parameters, CLIP L and bigG 0.82 B; a megapixel through the VAE takes gigabytes."""
    smaller = ["bridge.depths=[1]", "bridge.attention.depth_fraction=0.1"]
    config = load(CONFIGS / "sd35_medium_sd15.yaml", smaller)
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    counted = count_bridge(config, student, teacher, 1)
    size = getattr(torch, config.prompts.encoder_dtype).itemsize
    assert counted.text == pytest.approx(5.58e9 * size, rel=0.02)
    assert counted.validation.peak > 3e9
    assert counted.peak > counted.text + 3e9
    without = load(CONFIGS / "sd35_medium_sd15.yaml", [*smaller, "bridge.attention.weight=0"])
    assert count_bridge(without, student, teacher, 1).text == 0
