"""The frame of the jobs: wrong input ends with code 2 before anything starts, and a finished run says so."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from PIL import Image

from raydistill.config.reading import load
from raydistill.driver.job import Job, Prepared, carry_out
from raydistill.driver.run_folder import RunFolder
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(monkeypatch, capfd, tmp_path):
    """`job(name, *overrides)` -> (exit code, stdout, stderr), in this process."""

    def run(name: str, *overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"jobs/{name}.py", f"storage={tmp_path / 'storage'}", *overrides])
        cluster = ray.is_initialized()  # another test's
        code = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"]()
        assert ray.is_initialized() == cluster
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return folder


def test_images_that_cannot_be_used_end_with_code_two(job, images, tmp_path):
    for overrides, said in (
        (["synthesis.images=/nowhere"], "synthesis.images: /nowhere: no such file or folder"),
        ([f"synthesis.images={images / 'a.png'}"], "neither a folder nor a .parquet file"),
        ([f"synthesis.images={images}/*.tar"], f"synthesis.images: {images}/*.tar: no such files"),
        (
            ["synthesis.images=hf://org/photos"],
            "synthesis.images: hf://org/photos: not a data set of the hub, as in hf://",
        ),
    ):
        code, _, error = job("synthesize", *overrides)
        assert code == 2
        assert said in error
    held_out = "a small red circle at the center on a white background"
    (tmp_path / "heldout.txt").write_text(held_out)
    (images / "a.txt").write_text(held_out)
    code, _, error = job(
        "synthesize", f"synthesis.images={images}", f"evaluation.prompts={tmp_path / 'heldout.txt'}", "run.name=mine"
    )
    assert code == 2
    assert f"1 prompts are also in evaluation.prompts (for example '{held_out}')" in error
    assert not (tmp_path / "storage" / "mine").exists()


def test_a_set_of_other_prompts_is_refused_before_anything_starts(job, tmp_path):
    from raydistill.data.pairs import shard_file

    pairs = tmp_path / "storage" / "mine" / "pairs"
    pairs.mkdir(parents=True)
    (pairs / "synthesis.json").write_text('{"seed": 99}')
    shard_file(pairs, 0).touch()
    code, _, error = job("synthesize", "run.name=mine")
    assert code == 2
    assert "holds rows of other settings" in error
    assert "seed was 99, now 0" in error


@pytest.mark.parametrize(
    ("name", "result"),
    [("synthesize", "pairs/summary.json"), ("train_bridge", "bridge/bridge.json"), ("distill", "summary.json")],
)
def test_a_finished_run_says_so(job, tmp_path, name, result):
    file = tmp_path / "storage" / "mine" / result
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    code, out, error = job(name, "run.name=mine")
    assert (code, out.partition(" ")[2], error) == (0, f"run mine is finished: {file}\n", "")


PROGRAM = """
import sys
from raydistill.config.reading import load
from raydistill.driver.job import Job, prepare
from raydistill.tracking.screen import screen

said = []
screen.say = lambda text: said.append((text, sorted({"torch", "ray", "diffusers"} & set(sys.modules))))
config = load(overrides=[f"storage={sys.argv[1]}", "run.name=mine", "distill.workers=10000"])
try:
    prepare(Job(run="builtins:print", result="summary.json"), config)
except ValueError:  # no machine has so many
    print(said)
"""


def test_a_job_says_what_it_is_about_before_it_loads_what_takes_seconds(tmp_path):
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, env=ours, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout)[0] == ("run mine: shapes:flux → shapes:sd15", [])


def test_a_run_that_the_cluster_refuses_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        assert (tmp_path / "storage" / "mine" / "owner.json").is_file()
        raise InputError("too small")

    monkeypatch.setattr("raydistill.driver.cluster.connected", lambda dashboard: contextlib.nullcontext())
    monkeypatch.setattr("raydistill.driver.room.check_cluster", refuse)
    folder = RunFolder(tmp_path / "storage", "mine")
    prepared, unused = Prepared(load(), folder), Job(run="builtins:print", result="summary.json")
    with pytest.raises(InputError, match="too small"):
        carry_out(unused, prepared)
    assert not folder.path.exists()
    folder.path.mkdir()
    with pytest.raises(InputError, match="too small"):
        carry_out(unused, prepared)
    assert folder.path.exists()  # it was there before


def test_models_of_other_stages_need_not_fit(job, tmp_path):
    """A set can be made for a teacher for which there is no Bridge, and of prompts that the judge cannot read."""
    (tmp_path / "prompts.txt").write_text("anything at all\n")
    pairs = tmp_path / "storage" / "mine" / "pairs"
    pairs.mkdir(parents=True)
    (pairs / "synthesis.json").write_text("{}")
    (pairs / "pairs-00000.parquet").touch()
    code, _, error = job(
        "synthesize", "run.name=mine", f"prompts.path={tmp_path / 'prompts.txt'}", "bridge.checkpoint=/nowhere"
    )
    assert code == 2
    assert "holds rows of other settings" in error  # the last check of all: the others passed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.path={empty}"], "empty"),
        (["prompts.path={blank}", "prompts.on_bad_row=fail"], "2"),
        (
            ["student.model=shapes:flux"],
            "is a FluxPipeline, but a StableDiffusionPipeline or ",
        ),
        (["bridge.checkpoint={other}"], "another teacher VAE"),
        (["prompts.path=shapes:heldout.txt"], "held-out prompts must occur in no training set"),
        (["teachers.shard=3"], "did you mean teachers.shards"),
        (["run.name=../escape"], "run.name"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(run_script, overrides, message, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("a small red circle at the left on a white background\n\n")
    other = tmp_path / "other"
    other.mkdir()
    description = json.loads((WEIGHTS / "bridge" / "sd15-flux" / "bridge.json").read_text())
    description["teacher"]["vae_sha256"] = "0" * 64
    (other / "bridge.json").write_text(json.dumps(description))
    names = {"empty": tmp_path / "empty.txt", "blank": tmp_path / "blank.txt", "other": other}
    cluster = ray.is_initialized()  # another test's
    code, output, error = run_script(
        "distill", f"storage={tmp_path / 'storage'}", *[override.format(**names) for override in overrides]
    )
    assert code == 2
    assert message in error
    assert ray.is_initialized() == cluster
    assert "Traceback" not in output + error
    assert not (tmp_path / "storage").exists()
