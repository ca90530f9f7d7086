"""Metrics of a run in actors: the numbers of a trainer, shared by whoever asks, and what a lost one costs."""

from __future__ import annotations

import sys

import pytest
import ray
import torch
from tiny_clip import write_clip

from raydistill.config.reading import changed, load
from raydistill.driver.metric_weights import fetch_weights
from raydistill.errors import InputError
from raydistill.shapes.captions import evaluation_captions
from raydistill.workers.scorers import RunScorers

pytestmark = pytest.mark.timeout(600)
CAPTIONS = evaluation_captions(4)
SCORER = """
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    open(sys.argv[2], "a").write(json.dumps({"id": row["id"], "score": len(row["prompt"])}) + "\\n")
"""


def scorers(device=None, *overrides, scope=""):
    failed = []
    config = load(overrides=["evaluation.metrics=[judge,clipscore]", "evaluation.metric=clipscore", *overrides])
    return RunScorers(config.evaluation, device, lambda *told: failed.append(told), scope=scope), failed


@pytest.fixture
def pictures():
    return torch.rand(len(CAPTIONS), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.full
def test_actors_give_a_trainers_numbers_and_one_that_dies_costs_an_evaluation(tmp_path, pictures):
    (tmp_path / "clip").mkdir()
    (tmp_path / "score.py").write_text(SCORER)
    program = f"'command:length={sys.executable} {tmp_path}/score.py'"
    told = (
        f"evaluation.metrics=[judge,clipscore,{program}]",
        f"evaluation.weights.clipscore={write_clip(tmp_path / 'clip')}",
    )
    cpu = (*told, "evaluation.gpus_per_scorer=0")
    here, _ = scorers(torch.device("cpu"), *told)
    driver, failed = scorers(None, *cpu, scope="mine")
    trainer, failed_there = scorers(torch.device("cpu"), *cpu, scope="mine")
    driver.start()
    wanted = here(pictures, CAPTIONS)
    assert wanted["length"] == [len(caption) for caption in CAPTIONS]
    for asked in (driver, trainer):
        assert asked(pictures, CAPTIONS) == {name: pytest.approx(values, abs=1e-4) for name, values in wanted.items()}
    actors = [each._scorers["clipscore"].actor for each in (driver, trainer)]
    assert actors[0]._actor_id == actors[1]._actor_id
    ray.kill(actors[0])
    assert set(trainer(pictures, CAPTIONS)) == {"length"}
    [(metric, reason)] = failed_there
    assert metric == "clipscore"
    assert "Actor" in reason
    assert set(trainer(pictures, CAPTIONS)) == {"clipscore", "length"}  # by another
    assert failed == []
    for each in (driver, trainer):
        each.close()


@pytest.mark.usefixtures("ray_cluster")
def test_weights_are_asked_for_on_each_node_that_may_need_them_before_anything_else(tmp_path):
    place = tmp_path / "clip"
    told = ("evaluation.metrics=[clipscore]", f"evaluation.weights.clipscore={place}")
    for more in ("evaluation.gpus_per_scorer=null", "evaluation.gpus_per_scorer=0"):
        config = load(overrides=[*told, "evaluation.metric=clipscore", "evaluation.judge=null", more])
        with pytest.raises(
            InputError, match=rf"^node .*: evaluation\.weights\.clipscore={place}: no such file or folder$"
        ):
            fetch_weights(config)
    no_room = changed(config, {"evaluation": {"gpus_per_scorer": 64}})
    fetch_weights(no_room)  # nobody could need them
    asked, failed = scorers(torch.device("cpu"), told[1])
    asked.fetch()
    assert failed == [("clipscore", f"InputError: evaluation.weights.clipscore={place}: no such file or folder")]
    place.mkdir()
    write_clip(place)
    fetch_weights(config)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_without_room_is_given_up_in_time(tmp_path, pictures):
    config = load(
        overrides=[
            "evaluation.metrics=[clipscore]", "evaluation.metric=clipscore", "evaluation.gpus_per_scorer=64",
            f"evaluation.weights.clipscore={write_clip(tmp_path)}",
        ]
    )  # fmt: skip
    failed = []
    lacking = RunScorers(config.evaluation, None, lambda *told: failed.append(told), scope="lacking", within_s=2)
    assert lacking(pictures, CAPTIONS) == {}
    assert "TimeoutError: no answer in time: its actor may find no room (evaluation.gpus_per_scorer" in failed[0][1]
    lacking.close()
