"""An evaluation's run: batches that are missing, scorer commands, the job's own mistakes, references."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_folders import folder_of, items_of

from raydistill.commands.evaluate import arguments_of, evaluation_of
from raydistill.data.stage_error import StageError
from raydistill.errors import InputError
from raydistill.evaluation.command import parse_command, read_answer, run_command
from raydistill.evaluation.folder import DRAW, BatchActor, EvaluationFolder
from raydistill.evaluation.results import ALL, mean_table, mlflow_names, write_columns
from raydistill.pictures.files import save_png
from raydistill.pictures.grids import to_pil
from raydistill.shapes.captions import parse
from raydistill.shapes.render import render
from raydistill.storage.json_lines import lines_of

SINGLE = "a large red circle at the left on a white background"


@pytest.fixture
def job(run_script):
    """`job(*arguments)` -> (exit code, stdout, stderr) of jobs/evaluate.py."""
    return partial(run_script, "evaluate")


def created(evaluation) -> EvaluationFolder:
    return EvaluationFolder.create(evaluation.folder, evaluation.pictures, evaluation.settings)


# -- what is kept -----------------------------------------------------------------------------------------


class Counting:
    """A scorer that notes what it was asked."""

    asked: list[str] = []

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def __call__(self, files, prompts):
        if self.fail:
            raise RuntimeError("out of luck")
        Counting.asked += prompts
        return {"length": [len(p) for p in prompts], "odd": [None if len(p) % 2 else 1.0 for p in prompts]}


def rows(*batches):
    return {"batch": np.array(batches)}


def test_a_stage_makes_only_what_is_missing(tmp_path):
    items = items_of(["a", "bb", "ccc", "dddd", "eeeee"])
    folder = folder_of(tmp_path, items)
    Counting.asked = []
    stage = BatchActor(str(folder), 2, "length", Counting, {})
    assert EvaluationFolder(folder, 2).missing("length") == [0, 1, 2]
    stage(rows(1))
    assert EvaluationFolder(folder, 2).missing("length") == [0, 2]
    again = BatchActor(str(folder), 2, "length", Counting, {})
    for batch in range(3):
        again(rows(batch))
    assert Counting.asked == ["ccc", "dddd", "a", "bb", "eeeee"]
    assert EvaluationFolder(folder, 2).read("length") == {"length": [1, 2, 3, 4, 5], "odd": [None, 1, None, 1, None]}
    # complete: nothing is loaded, or this would raise
    BatchActor(str(folder), 2, "length", Counting, {"no_such_argument": 1})(rows(0, 1, 2))


def test_a_batch_without_all_its_pictures_is_drawn_again(tmp_path):
    items = items_of(["a", "bb", "ccc"])
    folder = folder_of(tmp_path, items, torch.zeros(3, 3, 8, 8))
    parts = EvaluationFolder(folder, 2)
    assert parts.missing(DRAW) == []
    (folder / "pictures" / items[1].file_name).unlink()
    assert parts.missing(DRAW) == [0]


def test_a_failing_stage_names_its_metric(tmp_path):
    folder = folder_of(tmp_path, items_of(["a"]))
    with pytest.raises(StageError, match="length: out of luck"):
        BatchActor(str(folder), 2, "length", Counting, {"fail": True})(rows(0))


def test_a_metric_must_answer_for_every_picture(tmp_path):
    parts = EvaluationFolder(folder_of(tmp_path, items_of(["a", "b"])), 2)
    with pytest.raises(ValueError, match="1 values of x for 2 pictures"):
        parts.write("m", 0, {"x": [1.0]})
    parts.write("m", 0, {"x": [1.0, float("nan")]})
    assert parts.read("m") == {"x": [1.0, None]}


# -- results ----------------------------------------------------------------------------------------------


def test_means_in_all_and_by_category(tmp_path):
    items = items_of(["a", "b", "c", "d"], ["Animals", "Abstract", "Animals", ""])
    columns = {"x": [1.0, 2.0, 4.0, 9.0], "y": [None, 3.0, None, 5.0]}
    table = mean_table(items, columns)
    assert table == {ALL: {"x": 4.0, "y": 4.0}, "Animals": {"x": 2.5}, "Abstract": {"x": 2.0, "y": 3.0}}
    assert mlflow_names(table) == {
        "eval/x": 4.0, "eval/y": 4.0, "eval/Animals/x": 2.5, "eval/Abstract/x": 2.0, "eval/Abstract/y": 3.0,
    }  # fmt: skip
    write_columns(tmp_path / "scores.parquet", items, columns)
    stored = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert stored["prompt"] == ["a", "b", "c", "d"]
    assert stored["category"] == ["Animals", "Abstract", "Animals", None]
    assert (stored["prompt_id"], stored["seed"]) == ([1, 2, 3, 4], [0] * 4)
    assert (stored["x"], stored["y"]) == (columns["x"], columns["y"])
    assert stored["file"][0] == "pictures/00001-seed0.png"


# -- scorer commands --------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from PIL import Image
asked = [json.loads(line) for line in open(sys.argv[-2])]
with open("asked.txt", "a") as log:
    log.write(" ".join(str(row["id"]) for row in asked) + "\\n")
stop = int(sys.argv[1])
with open(sys.argv[-1], "a") as answer:
    for row in reversed(asked):
        if row["id"] == stop:
            answer.write('{"id": 9')
            answer.flush()
            sys.exit("the scorer lost its way")
        red = Image.open(row["image"]).getpixel((0, 0))[0]
        scores = {"red": red, "length": len(row["prompt"]), "category": None if row["category"] else 1}
        answer.write(json.dumps({"id": row["id"], "scores": scores}) + "\\n")
"""


@pytest.fixture
def program(tmp_path) -> list[str]:
    (tmp_path / "score.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "score.py")]


def test_a_scorer_command_is_asked_again_only_for_what_it_did_not_answer(tmp_path, program):
    items = items_of(["a", "bb", "ccc", "dddd"], ["", "x"])
    images = torch.stack([torch.full((3, 4, 4), value / 127.5 - 1) for value in (10, 20, 30, 40)])
    folder = folder_of(tmp_path, items, images)
    with pytest.raises(InputError, match=r"mps: .* ended with code 1 and said: the scorer lost its way"):
        run_command(str(folder), 3, "mps", [*program, "1"], str(tmp_path))
    assert EvaluationFolder(folder, 3).missing("mps") == [0, 1]
    run_command(str(folder), 3, "mps", [*program, "-1"], str(tmp_path))
    assert (tmp_path / "asked.txt").read_text() == "0 1 2 3\n0 1\n"
    assert EvaluationFolder(folder, 3).read("mps") == {
        "mps.red": [10, 20, 30, 40], "mps.length": [1, 2, 3, 4], "mps.category": [1, None, 1, None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("score", "line 1: not JSON"),
        ('{"id": 0}', 'either "score" or "scores"'),
        ('{"id": 7, "score": 1}', "id 7 is not one of the request's, 0 … 1"),
        ('{"id": 0, "score": "good"}', "score is 'good', not a finite number"),
        ('{"id": 0, "score": NaN}', "score is nan, not a finite number"),
        ('{"id": 0, "score": 1}', "no line for 1 pictures, the first with id 1"),
    ],
)
def test_wrong_answers_of_a_scorer_are_refused_by_line(tmp_path, line, message):
    folder = folder_of(tmp_path, items_of(["a", "b"]), torch.zeros(2, 3, 4, 4))
    script = tmp_path / "wrong.py"
    script.write_text(f"import sys; open(sys.argv[-1], 'w').write({line!r} + chr(10))")
    with pytest.raises(InputError) as error:
        run_command(str(folder), 2, "mps", [sys.executable, str(script)], str(tmp_path))
    assert message in str(error.value)


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # where `str.splitlines` splits


def test_prompts_may_hold_line_separators(tmp_path, program):
    items = items_of([f"a cup{c}of tea" for c in SEPARATORS], [f"tea{c}cups" for c in SEPARATORS])
    folder = folder_of(tmp_path, items, torch.zeros(len(items), 3, 4, 4))
    assert EvaluationFolder(folder, 4).pictures == items
    assert EvaluationFolder.create(folder, items, {"batch_size": 4}).pictures == items  # the same command again
    run_command(str(folder), 4, "mps", [*program, "-1"], str(tmp_path))
    assert EvaluationFolder(folder, 4).read("mps")["mps.length"] == [len(item.prompt) for item in items]


def test_answers_of_a_scorer_may_repeat_prompts_with_line_separators(tmp_path):
    file = tmp_path / "answer.jsonl"
    lines = [json.dumps({"id": i, "score": i, "prompt": f"tea{SEPARATORS[:2]}"}, ensure_ascii=False) for i in range(3)]
    file.write_bytes("\n".join(lines).encode() + b' "caf\xe9"')
    assert sorted(read_answer(file, "mps", 3, whole=True)) == [0, 1]
    with pytest.raises(InputError, match=r"answer\.jsonl, line 3: not JSON"):
        read_answer(file, "mps", 3)


def test_lines_of_json_lines_end_at_newlines_alone():
    assert [lines_of(text) for text in ("", "a\n", "a", "\na\u2028b\n\nc")] == [
        [],
        ["a"],
        ["a"],
        ["", "a\u2028b", "", "c"],
    ]


@pytest.mark.parametrize("text", ["command:mps", "command:=x", "command:a b=x", "command:mps=", "command:mps='",
                                  "command:mps=no-such-program-here"])  # fmt: skip
def test_a_command_line_is_checked(text):
    with pytest.raises(InputError, match="command"):
        parse_command(text)


def test_a_command_keeps_quoted_words():
    assert parse_command("command:mps=python 'my script.py' --x=1") == ("mps", ["python", "my script.py", "--x=1"])


# -- the job's checks -------------------------------------------------------------------------------------

START = ("shapes:sd15", "--unet", "shapes:sd15-onestep", "--start-timestep", 999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder, and no run of that name"),
        (["shapes:sd15-onestep"], "a network alone; name the pipeline"),
        ([*START[:3]], "does not say at which timestep it starts; name --start-timestep"),
        ([*START, "--steps", 4], "a one-step student takes one step"),
        (["shapes:flux", "--guidance", -1], "--guidance: guidance scale -1: must lie between 0 and 100"),
        (["shapes:flux", "--guidance", "nan"], "--guidance: guidance scale nan: must lie between 0 and 100"),
        ([*START, "--guidance", 101], "--guidance: guidance scale 101: must lie between 0 and 100"),
        ([*START, "--prompts", "nothing.csv"], "nothing.csv: no such file"),
        ([*START, "--metrics", "judge", "beauty"], "--metrics beauty: unknown; metrics: judge, clipscore"),
        ([*START, "--metrics", "judge", "judge"], "judge is named twice"),
        ([*START, "--metrics", "command:judge=true"], "judge is a metric already"),
        ([*START, "--metrics", "frechet"], "needs --reference FOLDER"),
        ([*START, "--reference", "."], "--reference belongs to"),
        ([*START, "--metrics", "frechet", "--reference", "tests"], "at least two pictures"),
        ([*START, "--weights", "hpsv5=x"], "write NAME=PLACE; names: clipscore, pickscore"),
        ([*START, "--judge", "shapes:flux"], "--judge shapes:flux: no judge"),
        ([*START, "--count", 0], "a whole number of at least 1"),
        ([*START, "--out", "tests"], "exists and is no evaluation's folder"),
    ],
)
def test_wrong_input_ends_with_code_2_before_anything_starts(tmp_path, job, monkeypatch, arguments, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    code, _, stderr = job(*arguments, "--storage", tmp_path)
    assert code == 2
    assert message in stderr
    assert not list(tmp_path.iterdir())


def test_prompts_the_judge_cannot_read_are_named(tmp_path, job):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{SINGLE}\na photo of a dog\n")
    code, _, stderr = job(*START, "--prompts", file, "--storage", tmp_path)
    assert code == 2
    assert "prompt 2: not a caption of the shapes world: 'a photo of a dog'" in stderr
    assert "name others, for example --metrics clipscore" in stderr


def test_an_evaluation_of_other_settings_is_not_mixed_into_a_folder(tmp_path, job):
    arguments = [*map(str, START), "--storage", str(tmp_path), "--out", str(tmp_path / "e"), "--count", "4"]
    created(evaluation_of(arguments_of(arguments)))
    code, _, stderr = job(*arguments[:-1], 5)
    assert code == 2
    assert "holds an evaluation of other settings" in stderr
    assert "count was 4, now 5" in stderr
    again = evaluation_of(arguments_of([*arguments, "--batch-size", "2"]))
    assert again.settings["batch_size"] == 16  # batches are what parts are kept by


def test_a_relative_storage_is_refused_under_ray_job_submit(tmp_path, job, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, _, stderr = job(*START, "--storage", "outputs")
    assert code == 2
    assert "--storage outputs: is relative" in stderr


def test_a_metric_is_added_without_drawing_and_earlier_columns_stay(tmp_path):
    from raydistill.driver.evaluation import pools_of
    from raydistill.evaluation.results import collect

    def plan(*metrics):
        arguments = [*map(str, START), "--storage", str(tmp_path), "--count", "3", "--metrics", *metrics]
        return evaluation_of(arguments_of(arguments))

    first = plan("judge")
    parts = created(first)
    for stage in pools_of(first):
        BatchActor(str(parts.path), parts.batch_size, stage.metric, stage.make, stage.arguments)(rows(0))
    pictures = {f.name: f.stat().st_mtime_ns for f in (parts.path / "pictures").iterdir()}
    (tmp_path / "score.py").write_text(PROGRAM)
    second = plan(f"command:mps={sys.executable} {tmp_path}/score.py -1")
    assert second.folder == first.folder
    created(second)
    assert parts.missing(DRAW) == []
    run_command(str(second.folder), parts.batch_size, "mps", list(second.metrics[0].command), str(tmp_path))
    table, columns = collect(second, parts)
    assert {"mean", "color", "mps.red"} <= set(columns)
    assert table[ALL]["mps.length"] == pytest.approx(sum(len(i.prompt) for i in first.pictures) / 3)
    assert pictures == {f.name: f.stat().st_mtime_ns for f in (parts.path / "pictures").iterdir()}


def test_the_distance_to_a_reference_stays_when_another_metric_is_added(tmp_path, monkeypatch):
    from raydistill.driver import evaluation as stream
    from raydistill.driver.evaluation import run_evaluation

    def here(parts, stages, done=None):  # as Ray Data would, in this process
        for stage in stages:
            work = BatchActor(str(parts.path), parts.batch_size, stage.metric, stage.make, stage.arguments)
            work(rows(*parts.batches))

    monkeypatch.setattr(stream, "run_stream", here)
    monkeypatch.setattr(stream, "run_once", lambda work, *arguments, **_: work(*arguments))
    reference = tmp_path / "reference"
    reference.mkdir()
    for item, image in zip(items_of(["a"] * 4), render([parse(SINGLE)] * 4, 64, seed=0), strict=True):
        save_png(reference / item.file_name, to_pil(image), item.facts)

    def results(*more):
        arguments = [*map(str, START), "--storage", str(tmp_path), "--count", "4", "--gpus", "0", *map(str, more)]
        plan = evaluation_of(arguments_of(arguments))
        table = run_evaluation(plan)
        assert json.loads((plan.folder / "results.json").read_text())["results"] == table
        return table[ALL]

    distance = results("--metrics", "frechet", "--reference", reference)["frechet"]
    assert distance > 1
    both = results("--metrics", "judge")
    assert (both["frechet"], "mean" in both) == (distance, True)
    (reference / items_of(["a"])[0].file_name).unlink()  # another reference: computed anew
    again = results("--metrics", "frechet", "--reference", reference)
    assert again["frechet"] != distance
    assert again["mean"] == both["mean"]


def test_sheets_of_sampled_pictures_are_no_reference(tmp_path, job):
    (tmp_path / "drawn").mkdir()
    for name in ("grid.png", "sheet.png", "00001-seed0.png"):
        save_png(tmp_path / "drawn" / name, to_pil(torch.zeros(3, 8, 8)), items_of(["a"])[0].facts)
    code, _, stderr = job(
        *START, "--metrics", "frechet", "--reference", tmp_path / "drawn", "--storage", tmp_path / "s"
    )
    assert code == 2
    assert "grid.png and sheet.png, which jobs/sample.py wrote" in stderr


def test_stages_that_can_never_be_placed_are_refused():
    from raydistill.driver import evaluation as stream

    stages = [
        stream.ActorPool(metric=name, make=Counting, arguments={}, gpus=gpus)
        for name, gpus in (("draw", 0.5), ("hpsv3", 1.0))
    ]
    with pytest.raises(InputError, match="on here, the actors of hpsv3 cannot be placed: asked for 1 of .* 1 GPU each"):
        stream.check_room(stages, [({}, {"CPU": 8.0, "GPU": 1.0})], "here")
    with pytest.raises(InputError, match="actors of hpsv3"):  # no node has room for it, though two together have
        stream.check_room(stages, [({}, {"CPU": 8.0, "GPU": 0.75})] * 2, "here")
    stream.check_room(stages, [({}, {"CPU": 8.0, "GPU": 2.0})], "here")


def test_an_evaluation_waits_for_nodes_that_are_still_joining(monkeypatch, tmp_path, capsys):
    from raydistill.driver import evaluation as stream
    from raydistill.driver import room

    nodes, looks = [{"Resources": {"CPU": 0.1}}, {"Resources": {"CPU": 8.0}}], iter(range(1, 99))
    monkeypatch.setattr(room, "labelled_nodes", lambda labels: nodes[: next(looks)])
    monkeypatch.setattr(room, "autoscaler_present", lambda: False)

    class Begun(Exception):
        """The stream is started."""

    def begin(rows):
        raise Begun

    monkeypatch.setattr(stream, "dataset_of", begin)
    folder = EvaluationFolder.create(tmp_path / "e", items_of(["a"]), {"batch_size": 1})
    with pytest.raises(Begun):
        stream.run_stream(folder, [stream.ActorPool(metric="draw", make=Counting, arguments={})])
    assert next(looks) == 3
    assert "its 1 node(s) are too few" in capsys.readouterr().out


def test_one_gpu_of_the_cluster_is_divided_among_the_stages():
    from raydistill.evaluation.evaluation import Resources

    assert Resources().divided(metrics=2, gpus=0.0) == Resources(gpus=0.0)
    assert Resources().divided(metrics=2, gpus=0.0).device == "cpu"
    for metrics in range(4):
        for actors in (1, 3):
            found = Resources(actors=actors).divided(metrics, gpus=8.0)
            assert found.device == "cuda"
            assert 0.9 < found.gpus * (actors + metrics) <= 1
