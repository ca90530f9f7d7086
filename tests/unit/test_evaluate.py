"""Evaluation without Ray: metrics by hand, prompt sets and categories, what is kept and what is made again."""

from __future__ import annotations

import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from raydistill.data.stage_error import StageError
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError, StageFailed
from raydistill.evaluation.command import parse_command, run_command
from raydistill.evaluation.folder import DRAW, BatchActor, EvaluationFolder
from raydistill.evaluation.promptsets import open_prompts
from raydistill.evaluation.results import ALL, mean_table, mlflow_names, write_scores
from raydistill.evaluation.scorers import ClipScorer, JudgeScorer, frechet_distance, judge_frechet
from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.pictures.files import load_image, save_png
from raydistill.pictures.grids import to_pil
from raydistill.pictures.picture import Picture
from raydistill.shapes import WEIGHTS, miniatures
from raydistill.shapes.captions import Scene, evaluation_captions, parse
from raydistill.shapes.judge import Judge
from raydistill.shapes.render import render
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.spaces.published_students import load_student

PAIR = "a large red circle at the left and a large blue square at the right on a white background"
SINGLE = "a large red circle at the left on a white background"
# PartiPrompts.tsv as it is published: four columns, unquoted quotation marks
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    "a shiba inu\tAnimals\tBasic\t\n"
    'A robot on a wall. The words "Fly an airplane" are written on it.\tOutdoor Scenes\tComplex\t\n'
    "a fox\tAnimals\tBasic\t\n"
)


@pytest.fixture
def job(run_script):
    """`job(*arguments)` -> (exit code, stdout, stderr) of jobs/evaluate.py."""
    return partial(run_script, "evaluate")


def items_of(prompts, categories=("",)) -> list[Picture]:
    return [Picture(i, i + 1, p, 0, categories[i % len(categories)]) for i, p in enumerate(prompts)]


def folder_of(tmp_path, items, images=None) -> Path:
    """An evaluation's folder with these pictures."""
    EvaluationFolder.create(tmp_path, items, {"batch_size": 2})
    for item, image in zip(items, images if images is not None else [], strict=images is not None):
        save_png(tmp_path / "pictures" / item.file_name, to_pil(image), item.facts)
    return tmp_path


def created(evaluation) -> EvaluationFolder:
    return EvaluationFolder.create(evaluation.folder, evaluation.pictures, evaluation.settings)


# -- metrics ----------------------------------------------------------------------------------------------


def test_frechet_distance_by_hand():
    # means 1 and 2, variances 2 and 8: 1 + (sqrt 2 - sqrt 8)^2 = 3
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert frechet_distance(x, y) == pytest.approx(3.0, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 3, generator=generator).double()
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 3, generator=generator).double()
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    assert np.abs(a @ b - b @ a).max() > 0.1
    root_trace = np.sqrt(np.linalg.eigvals(a @ b).real).sum()  # of the unsymmetric product
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(float(wanted), rel=1e-9)


def test_frechet_distance_of_picture_files_of_any_size(tmp_path):
    captions = evaluation_captions(12)
    images = render([parse(caption) for caption in captions], 64, seed=1)
    sets = {}
    for name, some in (("one", images[:6]), ("other", images[6:])):
        (tmp_path / name).mkdir()
        sets[name] = [tmp_path / name / f"{i}.png" for i in range(6)]
        for item, file, image in zip(items_of(captions[:6]), sets[name], some, strict=True):
            save_png(file, to_pil(image), item.facts)
    tall = torch.nn.functional.interpolate(images[:1], size=(96, 64))[0]
    save_png(sets["one"][0], to_pil(tall), items_of(captions)[0].facts)
    judge = Judge.load(WEIGHTS / "judge")
    features = [torch.cat([judge.embed(load_image(file)[None]) for file in files]) for files in sets.values()]
    distance = judge_frechet(str(WEIGHTS / "judge"), sets["one"], sets["other"])
    assert distance > 1
    assert distance == pytest.approx(frechet_distance(*features))
    assert judge_frechet(str(WEIGHTS / "judge"), sets["one"], sets["one"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("x", "y"), [((1, 2), (3, 2)), ((3, 2), (3, 4)), ((3,), (3, 2))])
def test_frechet_distance_refuses_what_it_cannot_compare(x, y):
    with pytest.raises(ValueError, match="pictures|features"):
        frechet_distance(torch.zeros(x), torch.zeros(y))


def test_the_relation_of_two_objects():
    judge = Judge.load(WEIGHTS / "judge")
    pair = parse(PAIR)
    swapped = Scene(
        tuple(
            type(o)(o.size, o.color, o.shape, p.position) for o, p in zip(pair.objects, pair.objects[::-1], strict=True)
        ),
        "white",
    )
    above = parse(PAIR.replace("left", "top").replace("right", "bottom"))
    images = render([pair, swapped, above, pair], 64, seed=0, jitter=0.0)
    relation = judge.relation(images, [PAIR, PAIR, PAIR, SINGLE]).tolist()
    assert relation[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(relation[3])


def test_judge_columns_are_the_judges_own_table(tmp_path):
    captions = [*evaluation_captions(6), PAIR]
    scenes = [parse(caption) for caption in captions]
    scenes[0] = parse(captions[1])  # some are wrong
    items = items_of(captions)
    images = render(scenes, 64, seed=1)
    folder = folder_of(tmp_path, items, images)
    files = [str(folder / "pictures" / item.file_name) for item in items]
    columns = JudgeScorer(str(WEIGHTS / "judge"))(files, captions)
    stored = torch.stack([load_image(file) for file in files])
    assert (stored - images).abs().max() <= 1 / 255 + 1e-6
    table = Judge.load(WEIGHTS / "judge").accuracy(stored, captions)
    assert 0.5 < table["mean"] < 1
    means = mean_table(items, {k: [None if v != v else v for v in values] for k, values in columns.items()})[ALL]
    assert means.pop("relation") == 1.0
    assert means == pytest.approx(table)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP model of random weights."""
    tokenizer = miniatures.clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 24, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 24, "patch_size": 8, "initializer_factor": 8.0}  # fmt: skip
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def test_clipscore_is_a_hundred_cosines_of_clips_own_features(tmp_path, clip_folder):
    captions = [SINGLE, PAIR, "a small green cross at the top on a black background"]
    items = items_of(captions)
    images = (
        torch.rand(3, 3, 44, 99, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )  # 99 * (24 / 44) is a bit below 54
    folder = folder_of(tmp_path, items, images)
    files = [folder / "pictures" / item.file_name for item in items]
    scorer = ClipScorer(str(clip_folder))
    from PIL import Image
    from transformers import CLIPTokenizer

    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    wanted = []
    for file, caption in zip(files, captions, strict=True):
        pixels = processor(Image.open(file), return_tensors="pt")["pixel_values"]
        ids = CLIPTokenizer.from_pretrained(clip_folder)(caption, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            out = scorer.model(pixel_values=pixels, input_ids=ids["input_ids"])
        x, y = out.image_embeds[0].double(), out.text_embeds[0].double()
        wanted.append(float(100 * (x @ y / x.norm() / y.norm()).clamp_min(0)))
    assert max(wanted) > 1
    assert scorer([str(f) for f in files], captions)["clipscore"] == pytest.approx(wanted, abs=1e-3)


# -- prompt sets ------------------------------------------------------------------------------------------


def test_partiprompts_as_published_have_categories(tmp_path, monkeypatch):
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text(PARTI)
    found = open_prompts(str(file), tmp_path)
    assert len(found.prompts) == 4
    by_id = {item.prompt_id: (item.prompt, item.category) for item in found.pictures(None, 0)}
    assert by_id == {
        2: ("bond", "Abstract"),
        3: ("a shiba inu", "Animals"),
        4: ('A robot on a wall. The words "Fly an airplane" are written on it.', "Outdoor Scenes"),
        5: ("a fox", "Animals"),
    }
    other = open_prompts(str(file), tmp_path, category_column="Challenge")
    assert set(other.categories.values()) == {"Basic", "Complex"}
    assert open_prompts("parti", tmp_path).prompts.prompts == found.prompts.prompts  # by name, from the sets' folder
    monkeypatch.chdir(tmp_path)
    assert {open_prompts(name, tmp_path).name for name in (file.name, f"./{file.name}", str(file))} == {"PartiPrompts"}
    with pytest.raises(InputError, match=r"no column 'Kind' \(--category-column\); the file has: 'Prompt'"):
        open_prompts(str(file), tmp_path, category_column="Kind")
    with pytest.raises(InputError, match=r"no column 'text' \(--column\)"):
        open_prompts(str(file), tmp_path, column="text")


def test_a_published_set_that_is_not_here_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=f"PartiPrompts.tsv, and put it at {tmp_path}/PartiPrompts.tsv"):
        open_prompts("parti", tmp_path)
    with pytest.raises(InputError, match="no such file, and no set of that name; sets: heldout"):
        open_prompts("perti", tmp_path)


def test_folders_of_json_lists_and_of_texts(tmp_path):
    hps, dpg = tmp_path / "hpsv2", tmp_path / "dpg"
    hps.mkdir()
    dpg.mkdir()
    (hps / "photo.json").write_text(json.dumps(["a dog", "a cat"]))
    (hps / "anime.json").write_text(json.dumps([{"prompt": "a girl"}]))
    (dpg / "1.txt").write_text("a long\n")
    found = open_prompts("hpsv2", tmp_path)
    assert [(found.prompts.prompts[i - 1], found.categories[i]) for i in (1, 2, 3)] == [
        ("a girl", "anime"),
        ("a dog", "photo"),
        ("a cat", "photo"),
    ]
    assert open_prompts("dpg", tmp_path).prompts.prompts == ["a long"]
    (hps / "photo.json").write_text(json.dumps(["a dog", 3]))
    with pytest.raises(InputError, match=r"photo.json, entry 2: no prompt"):
        open_prompts("hpsv2", tmp_path)


def test_the_embedded_pairs_are_held_out_and_of_two_objects(tmp_path):
    captions = open_prompts("shapes-pairs", tmp_path).prompts.prompts
    scenes = [parse(caption) for caption in captions]
    assert len(set(captions)) == len(captions) == 128
    assert all(scene.held_out and len(scene.objects) == 2 for scene in scenes)


def test_items_go_round_with_the_next_seed_and_are_a_prefix_of_each_other(tmp_path):
    prompts = open_prompts("heldout", tmp_path)
    n = len(prompts.prompts)
    items = prompts.pictures(2 * n + 3, 7)
    assert items[:5] == prompts.pictures(5, 7)
    assert len({(i.prompt_id, i.seed) for i in items}) == len(items)
    assert [i.seed for i in items] == [7] * n + [8] * n + [9] * 3
    assert sorted(i.prompt_id for i in items[:n]) == prompts.prompts.ids.tolist()
    assert EvaluationFolder.create(tmp_path, items, {"batch_size": 2}).pictures == items


# -- drawing ----------------------------------------------------------------------------------------------


def test_pictures_are_x0_of_noise_by_seed_and_number(tmp_path):
    subject = find_subject("shapes:sd15", tmp_path, unet="shapes:sd15-onestep", start_timestep=999)
    assert (subject.steps, subject.start_timestep, subject.name) == (1, 999, "sd15-onestep")
    space = load_space(WEIGHTS / "sd15")
    items = [Picture(0, 3, SINGLE, 5, ""), Picture(1, 9, PAIR, 6, "")]
    noise = torch.cat([normal(i.seed, [i.prompt_id], space.latent_shape, "sample") for i in items])
    with torch.no_grad():
        conditioning = space.encode_prompts(space.load_text(), [i.prompt for i in items])
        unet = load_student(space, WEIGHTS / "sd15-onestep")
        wanted = space.decode(space.load_vae(), one_step_x0(space, unet, noise, conditioning, 999))
    painter = load_painter(subject, "cpu", torch.float32)
    drawn = painter.draw(items)
    assert torch.equal(drawn, wanted)
    assert (painter.draw(items[::-1]).flip(0) - wanted).abs().max() < 1e-4
    assert (painter.draw(items[1:]) - wanted[1:]).abs().max() < 1e-4


def test_a_teacher_is_sampled_with_its_familys_guidance(tmp_path):
    subject = find_subject("shapes:flux", tmp_path, steps=3)
    assert (subject.steps, subject.guidance_scale, subject.start_timestep) == (3, 3.5, None)
    space = load_space(WEIGHTS / "flux")
    item = Picture(0, 3, SINGLE, 5, "")
    with torch.no_grad():
        text = space.load_text()
        empty = space.unconditional(space.encode_prompts(text, [""]))
        noise = normal(5, [3], space.latent_shape, "sample")
        latents = space.sample(space.load_network(), noise, space.encode_prompts(text, [SINGLE]), empty, 3, 3.5)
        wanted = space.decode(space.load_vae(), latents)
    assert torch.equal(load_painter(subject, "cpu", torch.float32).draw([item]), wanted)


def test_other_weights_in_the_same_place_have_another_fingerprint(tmp_path):
    one, two = (
        find_subject("shapes:sd15", tmp_path, unet=f"shapes:{name}", start_timestep=999)
        for name in ("sd15-onestep", "sd15")
    )
    assert one.fingerprint() != two.fingerprint()
    assert (
        one.fingerprint()
        == find_subject("shapes:sd15", tmp_path, unet="shapes:sd15-onestep", start_timestep=999).fingerprint()
    )


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
    write_scores(tmp_path / "scores.parquet", items, columns)
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
        (["shapes:sd15-onestep"], "a UNet alone; name the pipeline"),
        ([*START[:3]], "does not say at which timestep it starts; name --start-timestep"),
        ([*START, "--steps", 4], "a one-step student takes one step"),
        ([*START, "--prompts", "nothing.csv"], "nothing.csv: no such file"),
        ([*START, "--metrics", "judge", "beauty"], "--metrics beauty: unknown; metrics: judge, clipscore"),
        ([*START, "--metrics", "judge", "judge"], "judge is named twice"),
        ([*START, "--metrics", "command:judge=true"], "judge is a metric already"),
        ([*START, "--metrics", "frechet"], "needs --reference FOLDER"),
        ([*START, "--reference", "."], "--reference belongs to"),
        ([*START, "--metrics", "frechet", "--reference", "tests"], "at least two pictures"),
        ([*START, "--weights", "hpsv5=x"], "write NAME=PLACE; names: clipscore, hpsv3"),
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
    namespace = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "evaluate.py"))
    arguments = [*map(str, START), "--storage", str(tmp_path), "--out", str(tmp_path / "e"), "--count", "4"]
    created(namespace["evaluation_of"](namespace["arguments_of"](arguments)))
    code, _, stderr = job(*arguments[:-1], 5)
    assert code == 2
    assert "holds an evaluation of other settings" in stderr
    assert "count was 4, now 5" in stderr
    again = namespace["evaluation_of"](namespace["arguments_of"]([*arguments, "--batch-size", "2"]))
    assert again.settings["batch_size"] == 16  # batches are what parts are kept by


def test_a_relative_storage_is_refused_under_ray_job_submit(tmp_path, job, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, _, stderr = job(*START, "--storage", "outputs")
    assert code == 2
    assert "--storage outputs: is relative" in stderr


def test_a_metric_is_added_without_drawing_and_earlier_columns_stay(tmp_path):
    from raydistill.driver.evaluation import pools_of
    from raydistill.evaluation.results import collect

    namespace = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "evaluate.py"))

    def plan(*metrics):
        arguments = [*map(str, START), "--storage", str(tmp_path), "--count", "3", "--metrics", *metrics]
        return namespace["evaluation_of"](namespace["arguments_of"](arguments))

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
    namespace = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "evaluate.py"))

    def results(*more):
        arguments = [*map(str, START), "--storage", str(tmp_path), "--count", "4", "--gpus", "0", *map(str, more)]
        plan = namespace["evaluation_of"](namespace["arguments_of"](arguments))
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


def test_stages_that_can_never_be_placed_are_refused(monkeypatch):
    from raydistill.driver import evaluation as stream

    monkeypatch.setattr(stream.placement, "autoscaler_present", lambda: False)
    stages = [
        stream.ActorPool(metric=name, make=Counting, arguments={}, gpus=gpus)
        for name, gpus in (("draw", 0.5), ("hpsv3", 1.0))
    ]
    with pytest.raises(StageFailed, match="need 1.5 GPU at once, and the cluster has 1: lower"):
        stream.check_room(stages, {"CPU": 8.0, "GPU": 1.0})
    stream.check_room(stages, {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(stream.placement, "autoscaler_present", lambda: True)
    stream.check_room(stages, {"CPU": 8.0})


def test_one_gpu_of_the_cluster_is_divided_among_the_stages():
    from raydistill.evaluation.evaluation import Resources

    assert Resources().divided(metrics=2, gpus=0.0) == Resources(gpus=0.0)
    assert Resources().divided(metrics=2, gpus=0.0).device == "cpu"
    for metrics in range(4):
        for actors in (1, 3):
            found = Resources(actors=actors).divided(metrics, gpus=8.0)
            assert found.device == "cuda"
            assert 0.9 < found.gpus * (actors + metrics) <= 1
