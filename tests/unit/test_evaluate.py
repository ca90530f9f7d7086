"""Evaluation without Ray: metrics by hand, prompt sets and categories, what is kept and what is made again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from evaluation_folders import folder_of, items_of
from export_students import ONE_STEP, export_of
from tiny_clip import write_clip
from transformers import CLIPImageProcessorPil, CLIPModel

from raydistill.diffusion.noise import normal
from raydistill.errors import InputError
from raydistill.evaluation.folder import EvaluationFolder
from raydistill.evaluation.promptsets import open_prompts
from raydistill.evaluation.results import ALL, mean_table
from raydistill.evaluation.scorers import ClipScorer, JudgeScorer, PickScorer, frechet_distance, judge_frechet
from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.pictures.files import load_image, save_png
from raydistill.pictures.grids import to_pil
from raydistill.pictures.picture import Picture
from raydistill.shapes import WEIGHTS
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
    return write_clip(tmp_path_factory.mktemp("clip"))


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


def test_pickscore_is_what_its_model_card_computes(tmp_path, clip_folder):
    """Softmax over its scores of two pictures gives the card's probabilities."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    images = torch.rand(2, 3, 44, 99, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = folder_of(tmp_path, items_of([SINGLE, SINGLE]), images)
    files = sorted((folder / "pictures").iterdir())
    bare = tmp_path / "pick"  # as it is published: without tokenizer and processor
    CLIPModel.from_pretrained(clip_folder).save_pretrained(bare)
    scores = PickScorer(str(bare), str(clip_folder))([str(file) for file in files], [SINGLE, SINGLE])["pickscore"]

    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    )
    told = {"padding": True, "truncation": True, "max_length": 24, "return_tensors": "pt"}
    pixels = processor(images=[Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(**pixels).pooler_output)
        text = model.text_projection(model.text_model(**processor(text=SINGLE, **told)).pooler_output)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    wanted = model.logit_scale.exp() * (text @ image.T)[0]
    assert scores == pytest.approx(wanted.tolist(), abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_a_clip_model_that_is_stored_in_half_precision_computes_in_float32(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path / "half")
    scorer = PickScorer(str(tmp_path / "half"), str(clip_folder))
    assert {value.dtype for value in scorer.model.parameters()} == {torch.float32}
    save_png(tmp_path / "one.png", to_pil(torch.zeros(3, 24, 24)), {})
    assert scorer([str(tmp_path / "one.png")], [SINGLE])["pickscore"][0] != 0


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
    found = open_prompts("hpsv2", tmp_path)
    assert found.prompts.prompts == ["a girl", "a dog"]
    assert "1 not a string (photo.json, entry 2)" in str(found.prompts.report)


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


def test_a_guidance_of_zero_draws_the_prompt(tmp_path):
    """And neither the empty prompt nor a mixture."""
    item, empty = Picture(0, 3, SINGLE, 5, ""), Picture(0, 3, "", 5, "")

    def drawn(scale, picture=item):
        subject = find_subject("shapes:flux", tmp_path, steps=2, guidance_scale=scale)
        return load_painter(subject, "cpu", torch.float32).draw([picture])

    assert torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0.5), drawn(1))
    assert not torch.equal(drawn(0), drawn(0, empty))


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_one_step_student_takes_the_guidance_that_its_card_recommends(scale, tmp_path):
    unet = {"unet": "shapes:sd15-onestep", "start_timestep": 999}
    assert find_subject("shapes:sd15", tmp_path, guidance_scale=scale, **unet).start_timestep == 999
    with pytest.raises(InputError, match=r"takes one step, without guidance \(0 to 1\)"):
        find_subject("shapes:sd15", tmp_path, guidance_scale=1 + 1.5 * (1 + scale), **unet)


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


@pytest.mark.parametrize(("model", "start"), [("sd15", 999), ("sd21", 625)])
def test_an_export_is_evaluated_by_the_step_that_it_ships(model, start, tmp_path):
    """As diffusers draws it: from t = 625 of noise times sigma, although its own schedule ends there."""
    export = export_of(model, start, tmp_path / "mine" / "export", torch.float32)
    subject = find_subject(str(export.folder), tmp_path)
    assert subject.start_timestep == start
    ours = load_painter(subject, "cpu", torch.float32).latents([Picture(0, 7, SINGLE, 3)])
    pipe = StableDiffusionPipeline.from_pretrained(export.folder)
    pipe.set_progress_bar_config(disable=True)
    noise = normal(3, [7], ours.shape[1:], "sample")
    theirs = pipe(SINGLE, latents=noise, output_type="latent", **ONE_STEP).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
