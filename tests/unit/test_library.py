"""What `from raydistill import …` gives: loaded late, typed, shown in a line; its page's example runs as it stands."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from PIL import ImageChops

import raydistill
from raydistill import Bridge, Sampler, load_config, load_space
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS

PAGE = Path(raydistill.__file__).parent / "library" / "README.md"
PROMPT = "a small red circle at the left on a white background"


def examples() -> list[str]:
    """The page's code blocks: without Ray, and with it."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_names_are_loaded_when_they_are_asked_for():
    code = "import sys, raydistill; print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'ray', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PAGE.parents[2])
    assert done.stdout == "[]\n"
    assert set(raydistill.__all__) <= set(dir(raydistill))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        raydistill.nothing  # noqa: B018


def test_a_name_is_no_room_whatever_was_imported_before():
    for room in Path(raydistill.__file__).parent.glob("*/__init__.py"):
        importlib.import_module(f"raydistill.{room.parent.name}")
    assert all(not inspect.ismodule(getattr(raydistill, name)) for name in raydistill.__all__)


def test_everything_is_typed():
    assert (Path(raydistill.__file__).parent / "py.typed").is_file()
    for name in set(raydistill.__all__) - {"__version__"}:
        thing = getattr(raydistill, name)
        functions = [thing] if inspect.isfunction(thing) else [thing.__init__, getattr(thing, "load", thing.__call__)]
        for function in functions:
            bare = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is p.empty]
            assert set(bare) <= {"self"}, (name, bare)
            assert typing.get_type_hints(function)["return"] is not inspect.Parameter.empty


def test_the_page_s_first_example_runs_and_shows_each_thing_in_a_line(capsys, tmp_path):
    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path):
        exec(examples()[0], names)
    student, teacher, bridge, sampler = capsys.readouterr().out.splitlines()
    assert student == f"StableDiffusionSpace('{WEIGHTS / 'sd15'}': latents 4x8x8, 32 px)"
    assert teacher == f"FluxSpace('{WEIGHTS / 'flux'}': latents 8x16x16, 64 px)"
    assert bridge == "Bridge(sd15 -> flux: swinir of 166,136 parameters, the student decoder's first blocks as prior)"
    assert sampler == f"Sampler(sd15-onestep, one step from t = 999, 32 px, {names['before'].device})"
    assert [picture.size for picture in names["pictures"]] == [(32, 32)] * 4
    assert os.listdir(tmp_path) == []


def test_paths_names_and_spaces_are_the_same(tmp_path, monkeypatch):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    by_name = Bridge.load("shapes:bridge/sd15-flux", "shapes:sd15", "shapes:flux")
    by_path = Bridge.load(WEIGHTS / "bridge/sd15-flux", load_space(WEIGHTS / "sd15"), str(WEIGHTS / "flux"))
    assert torch.equal(by_name(z), by_path(z))
    monkeypatch.chdir(WEIGHTS)
    assert load_space("flux").latent_shape == load_space("shapes:flux").latent_shape
    with pytest.raises(InputError, match="no-such-thing: not a diffusers pipeline folder"):
        load_space("no-such-thing")


def test_a_picture_depends_on_prompt_number_and_seed_alone():
    sampler = Sampler("shapes:sd15", unet="shapes:sd15-onestep", start_timestep=999)
    again = Sampler(WEIGHTS / "sd15", unet=WEIGHTS / "sd15-onestep", start_timestep=999)
    first, second = sampler(PROMPT, seeds=3)[0], again([PROMPT, PROMPT], seeds=[3, 4], batch_size=1)
    assert ImageChops.difference(first, second[0]).getbbox() is None
    assert ImageChops.difference(second[0], second[1]).getbbox() is not None
    with pytest.raises(InputError, match="is blank"):
        sampler(" ")


def test_a_configuration_shows_what_differs_from_the_defaults():
    config = load_config("shapes", "distill.steps=7", "run.name=demo")
    assert "run=RunConfig(name='demo')" in repr(config)
    assert "steps=7" in repr(config)
    assert "max_grad_norm" not in repr(config)
    with pytest.raises(InputError, match="did you mean student.lr"):
        load_config("shapes", "lr=1")
    with pytest.raises(TypeError, match="load_config"):
        raydistill.distill(config, "distill.steps=8")
    with pytest.raises(TypeError, match="no option stepz; options are"):
        raydistill.evaluate("shapes:flux", stepz=2)


def test_a_finished_run_says_so_and_shows_its_metric_and_what_it_has(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    overrides = (f"storage={tmp_path}", "run.name=mine", "evaluation.metric=all")
    summary = {"steps": 2, "student_before": {"mean": 0.1, "all": 0.2}, "student_after": {"mean": 0.3, "all": 0.4}}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = raydistill.distill("shapes", *overrides)
    assert f"run mine is finished: {folder / 'summary.json'}" in capsys.readouterr().out
    assert repr(run) == f"Run(mine: 2 updates, before 0.200, after 0.400; {folder})"
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "controls": {}}))  # of a run without a judge
    assert repr(raydistill.distill("shapes", *overrides)) == f"Run(mine: 2 updates; {folder})"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_page_s_second_example_trains_and_scores(tmp_path):
    """In a process of its own, in an empty folder, as it stands there."""
    more = "\nagain = distill(config)\nassert again.summary == run.summary\nprint(picture.size, len(scores.table))\n"
    ours = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment = ours | {"PYTHONPATH": str(PAGE.parents[2])}
    command = [sys.executable, "-c", "\n".join(examples()) + more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout.splitlines()
    assert any(
        re.fullmatch(r"Run\(notebook: 2 updates, before 0\.\d+, after 0\.\d+, teacher 0\.\d+; .*/outputs/notebook\)", s)
        for s in shown
    )
    assert any(re.match(r"Scores\(notebook, one step from t = 999: mean 0\.\d+", s) for s in shown)
    assert "(32, 32) 1" in shown
