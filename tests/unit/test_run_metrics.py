"""Metrics of a run beside its judge: what is refused before a launch, and a trainer that computes them between updates."""

from __future__ import annotations

import stat
import sys

import pytest
import torch
from evaluation_folders import folder_of, items_of
from tiny_clip import write_clip

from raydistill.config.reading import load
from raydistill.data.prompts import PromptSet
from raydistill.driver.binding import _fingerprints
from raydistill.driver.preflight import Inputs, _check_metrics, check_inputs
from raydistill.errors import InputError
from raydistill.evaluation.evaluator import Measured, measure
from raydistill.evaluation.metrics import metrics_of_run
from raydistill.evaluation.scorers import ClipScorer, PickScorer
from raydistill.shapes import WEIGHTS
from raydistill.shapes.captions import evaluation_captions
from raydistill.shapes.judge import Judge
from raydistill.workers.scorers import TRIES, RunScorers

CPU = torch.device("cpu")
CAPTIONS = evaluation_captions(5)
PROMPTS = PromptSet(CAPTIONS)
SCORER = """
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    scores = {"words": len(row["prompt"].split()), "even": 1.0 if row["id"] % 2 == 0 else None}
    open(sys.argv[2], "a").write(json.dumps({"id": row["id"], "scores": scores}) + "\\n")
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def configure(tmp_path):
    return lambda *overrides: load(overrides=[f"storage={tmp_path / 'storage'}", *overrides])


@pytest.fixture
def pictures():
    return torch.rand(len(CAPTIONS), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def weights(place):
    return f"evaluation.weights={{clipscore: {place}, pickscore: {place}, pickscore.processor: {place}}}"


# -- before a launch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluation.metrics=[judge,clipscor]"], r"^evaluation\.metrics clipscor: unknown; metrics: judge, clipscore, pickscore"),
        (["evaluation.metrics=[fid]", "evaluation.metric=fid"], r"^evaluation\.metrics fid: it compares whole sets .*evaluate\.py"),
        (["evaluation.metrics=[judge,hpsv2]"], r"^evaluation\.metrics hpsv2: .*environment of its own.*gpus_per_scorer"),
        (["evaluation.metrics=[judge,clipscore,clipscore]"], r"^evaluation\.metrics: clipscore is named twice"),
        (["evaluation.metrics=[judge,'command:mean=ls']"], r"^evaluation\.metrics command:mean=ls: mean is a metric already"),
        (["evaluation.metrics=[judge,'command:x=no-such-program']"], r"there is no program no-such-program"),
        (["evaluation.metric=clipscore"], r"^evaluation\.metric: the judge gives mean, all, .*; not 'clipscore'"),
        (["evaluation.metrics=[clipscore]"], r"^evaluation\.metric: evaluation\.metrics gives clipscore; not 'mean'"),
        (["evaluation.weights.clip=/x"], r"^evaluation\.weights\.clip: no metric has such weights; names: clipscore, pickscore"),
        (["distill.stop_on_plateau=3", "evaluation.judge=null"], r"^distill\.stop_on_plateau: nothing is measured"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_measure_is_refused_in_one_line(configure, clip, overrides, told):
    named = [] if any("weights" in text for text in overrides) else [weights(clip)]
    with pytest.raises(InputError, match=told) as refused:
        _check_metrics(configure(*overrides, *named), PROMPTS, PROMPTS)
    assert "\n" not in str(refused.value)


def test_missing_weights_are_refused_with_how_to_get_them(configure, clip, tmp_path, monkeypatch):
    asked = ["evaluation.metrics=[judge,pickscore]"]
    with pytest.raises(InputError, match=r"^evaluation\.weights\.pickscore=/nowhere: no such file or folder"):
        check_inputs(configure(*asked, "evaluation.weights.pickscore=/nowhere"))
    assert not (tmp_path / "storage").exists()
    other = write_clip(tmp_path)
    (other / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InputError, match=r"^evaluation\.weights\.pickscore=.*: not a CLIP model .*'siglip'"):
        metrics_of_run(configure(*asked, weights(other)).evaluation)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json that names a model"):
        metrics_of_run(configure(*asked, weights(other)).evaluation)

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError) as refused:
        metrics_of_run(
            configure("evaluation.metrics=[judge,clipscore]", "evaluation.weights.clipscore=org/clip@abc").evaluation
        )
    text = str(refused.value)
    assert text.startswith("metric clipscore: its weights org/clip (1.7 GB): ")
    assert "hf download org/clip" in text
    assert text.endswith("or name a copy: evaluation.weights.clipscore=FOLDER")


def test_weights_of_a_run_are_a_part_of_what_it_is_bound_to(configure, clip, tmp_path):
    config = configure("evaluation.metrics=[judge,clipscore]", weights(clip))
    inputs = Inputs(None, None, PROMPTS, PROMPTS)
    before = _fingerprints(config, inputs)
    other = write_clip(tmp_path)
    (other / "config.json").write_text((clip / "config.json").read_text().replace("quick_gelu", "gelu"))
    moved = _fingerprints(configure("evaluation.metrics=[judge,clipscore]", weights(other)), inputs)
    assert {key for key in before if before[key] != moved[key]} == {"evaluation.weights.clipscore"}
    assert "evaluation.weights.pickscore" not in before


def test_a_chosen_column_of_a_program_is_taken(configure):
    program = f"'command:mine={sys.executable} x.py'"
    config = configure(f"evaluation.metrics=[judge,{program}]", "evaluation.metric=mine.words")
    _check_metrics(config, PROMPTS, PROMPTS)


# -- a trainer between two updates ------------------------------------------------------------------------


def test_a_trainer_gives_the_numbers_of_jobs_evaluate(configure, clip, pictures, tmp_path):
    """Those of the same pictures as files; in whatever batches."""
    config = configure("evaluation.metrics=[judge,clipscore,pickscore]", weights(clip), "evaluation.batch_size=2")
    failed = []
    columns = RunScorers(config.evaluation, CPU, lambda *told: failed.append(told))(pictures, CAPTIONS)
    folder = folder_of(tmp_path, items_of(CAPTIONS), pictures)
    files = [str(folder / "pictures" / item.file_name) for item in items_of(CAPTIONS)]
    wanted = ClipScorer(str(clip))(files, CAPTIONS) | PickScorer(str(clip))(files, CAPTIONS)
    assert failed == []
    assert set(columns) == {"clipscore", "pickscore"}
    for name, values in columns.items():
        assert values == pytest.approx(wanted[name], abs=1e-4)
    judge = Judge.load(WEIGHTS / "judge")
    measured = measure(pictures, CAPTIONS, judge, lambda *_: columns)
    assert measured.table == judge.accuracy(pictures, CAPTIONS) | {
        name: pytest.approx(sum(values) / len(values)) for name, values in columns.items()
    }
    assert measured.each["pickscore"] == columns["pickscore"]


def test_a_program_scores_a_run(configure, pictures, tmp_path):
    (tmp_path / "score.py").write_text(SCORER)
    config = configure(
        f"evaluation.metrics=['command:mine={sys.executable} {tmp_path}/score.py']", "evaluation.metric=mine.words"
    )
    columns = RunScorers(config.evaluation, CPU, pytest.fail)(pictures, CAPTIONS)
    assert columns["mine.words"] == [len(caption.split()) for caption in CAPTIONS]
    assert columns["mine.even"] == [1, None, 1, None, 1]
    assert Measured().with_columns(columns).table["mine.even"] == 1


def test_a_metric_that_fails_is_said_once_left_out_and_tried_again(configure, clip, pictures, tmp_path):
    program = tmp_path / "score.sh"
    program.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    config = configure(
        f"evaluation.metrics=['command:bad={program}',clipscore]", "evaluation.metric=clipscore", weights(clip)
    )
    failed = []
    scorers = RunScorers(config.evaluation, CPU, lambda *told: failed.append(told))
    for _ in range(TRIES + 1):
        assert set(scorers(pictures, CAPTIONS)) == {"clipscore"}
    [(metric, reason)] = failed
    assert metric == f"command:bad={program}"
    assert "ended with code 3 and said: no luck" in reason
    program.write_text(f"#!{sys.executable}\n{SCORER}")
    assert set(scorers(pictures, CAPTIONS)) == {"clipscore"}  # given up
    again = RunScorers(config.evaluation, CPU, pytest.fail)
    assert set(again(pictures, CAPTIONS)) == {"clipscore", "bad.words", "bad.even"}


def test_weights_that_a_node_lacks_cost_the_metric_alone(configure, pictures, clip):
    config = configure("evaluation.metrics=[judge,clipscore]", "evaluation.weights.clipscore=/nowhere")
    failed = []
    assert RunScorers(config.evaluation, CPU, lambda *told: failed.append(told))(pictures, CAPTIONS) == {}
    assert failed == [("clipscore", "InputError: evaluation.weights.clipscore=/nowhere: no such file or folder")]
    with pytest.raises(InputError):
        metrics_of_run(config.evaluation)
