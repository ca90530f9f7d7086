"""One run whose Bridge learns from real pictures, and whose discriminator sees a few pictures that a sibling has drawn."""

import json

import pytest
import torch
from jobs_started import TEST_S, job_of, mlflow_runs
from PIL import Image

from raydistill.data.pairs import PairSet
from raydistill.shapes.captions import single_scenes
from raydistill.shapes.render import render

pytestmark = [pytest.mark.timeout(TEST_S), pytest.mark.full]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scenes = single_scenes(held_out=False)[:16]
    pictures = ((render(scenes, 64, seed=0) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for index, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        Image.fromarray(picture).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(scene.caption)
    return folder


def test_images_serve_the_bridge_and_a_sibling_s_samples_the_discriminator(tmp_path, photos):
    command = (
        "run.name=cheap", f"synthesis.images={photos}", "bridge.checkpoint=null", "bridge.steps=2",
        "bridge.batch_size=4", "bridge.checkpoint_every=2", "discriminator.real_data=null",
        "discriminator.real_source=samples", "synthesis.teacher=shapes:sd3", "synthesis.sampling_steps=2",
        "synthesis.shards=1", "synthesis.count=8", "synthesis.batch_size=4", "synthesis.shard_size=4",
        "distill.warmup_steps=4",
    )  # fmt: skip
    code, text = job_of(tmp_path, *command)
    assert code == 0, text
    folder = tmp_path / "cheap"
    assert (len(PairSet(folder / "pairs")), len(PairSet(folder / "samples"))) == (16, 8)
    settings = {name: json.loads((folder / name / "synthesis.json").read_text()) for name in ("pairs", "samples")}
    assert "images" in settings["pairs"]
    assert "drawer" not in settings["pairs"]
    assert settings["samples"]["drawer"][0] == "StableDiffusion3Pipeline"
    lines = text.splitlines()
    starts = [index for index, line in enumerate(lines) if "start teacher: done" in line]
    ends = [index for index, line in enumerate(lines) if "bridge: done" in line or "start teacher-draws: done" in line]
    assert (len(starts), len(ends)) == (1, 2), text
    assert max(ends) < starts[0], text  # the teacher is not held before
    parent, stages = mlflow_runs(tmp_path, "cheap")
    assert {"synthesis", "samples", "bridge", "distill"} <= stages.keys()
    assert parent.data.metrics["loss/gan"] > 0
    assert "Pictures drawn by, shapes:sd3" in (folder / "export" / "README.md").read_text()

    (folder / "summary.json").unlink()  # as if the driver had been lost at the very end
    code, text = job_of(tmp_path, *command)
    assert code == 0, text
    assert "start teacher-draws: done" not in text
    assert (folder / "summary.json").is_file()
