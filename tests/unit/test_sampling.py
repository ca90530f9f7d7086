"""Pictures of exported students: our x_0 of counter-based noise, whatever the batch; wrong input is refused first."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import raydistill
from raydistill.bridge.model import Bridge
from raydistill.config.networks import BridgeConfig
from raydistill.config.reading import load, to_yaml
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.noise import normal
from raydistill.errors import InputError, NonFiniteError
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.sampling import Album, Painter, pictures_of, typed_prompts
from raydistill.export.source import Export, find_export, open_one_step
from raydistill.export.upgrade import find_upgrade
from raydistill.pictures.picture import Picture
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.spaces.published_students import load_student

ROOT = Path(__file__).resolve().parents[2]
CARD = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
PROMPTS = PromptSet(["a red circle", "a large blue square on a green background", "ein roter Kreis – grün"], [1, 2, 7])
TINY = BridgeConfig(projector="swinir", embed_dim=8, depths=[1], heads=2, window=4)


@pytest.fixture(scope="module")
def space(sd_folder):
    return load_space(sd_folder)


@pytest.fixture(scope="module")
def exports(space, tmp_path_factory):
    """Start timestep -> folder of a float32 export; "half" -> a float16 one."""
    root = tmp_path_factory.mktemp("sampling")
    unet = space.load_network()
    folders = {
        start: export_student(space, unet, start, root / f"t{start}", CARD, torch.float32) for start in (999, 625)
    }
    return folders | {"half": export_student(space, unet, 999, root / "half", CARD, torch.float16)}


@pytest.fixture(scope="module")
def bridge(space, flux_folder, tmp_path_factory):
    """A Bridge with random weights between the two miniature spaces."""
    torch.manual_seed(4)
    made = Bridge.create(space, load_space(flux_folder), TINY)
    for parameter in made.trainable_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.save(tmp_path_factory.mktemp("bridge") / "bridge")


@pytest.fixture(scope="module")
def run(space, sd_folder, flux_folder, bridge, exports, tmp_path_factory):
    """A finished run's folder, as `jobs/distill.py` leaves it: configuration, MLflow ids and export."""
    folder = tmp_path_factory.mktemp("storage") / "mine"
    shutil.copytree(exports[999], folder / "export")
    keys = {"student.model": sd_folder, "teacher.model": flux_folder, "bridge.checkpoint": bridge}
    config = load(overrides=[f"{key}={value}" for key, value in keys.items()])
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"mlflow": {"pipeline": "a" * 32, "distill": "b" * 32}}))
    return folder


@pytest.fixture
def job(run_script):
    """`job(*arguments)` -> (exit code, stdout, stderr) of jobs/sample.py."""
    return partial(run_script, "sample")


def painter_of(space, upgrade=None) -> Painter:
    return Painter(space, load_student(space, Path(space.folder)), upgrade=upgrade)


# -- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [999, 625])
def test_latents_are_our_x0_of_noise_by_seed_and_number(start, space, exports):
    export_space, found = open_one_step(Export(exports[start], "x"))
    assert found == start
    pictures = pictures_of(PROMPTS, [3, 11])
    assert [(p.prompt_id, p.seed) for p in pictures] == [(1, 3), (1, 11), (2, 3), (2, 11), (7, 3), (7, 11)]
    latents = painter_of(export_space).latents(pictures)
    noise = torch.cat([normal(p.seed, [p.prompt_id], space.latent_shape, "sample") for p in pictures])
    conditioning = space.encode_prompts(space.load_text(), [p.prompt for p in pictures])
    with torch.no_grad():
        ours = one_step_x0(space, space.load_network(), noise, conditioning, start)
    assert ours.std() > 0.1
    assert (latents - ours).abs().max() <= 2e-5 * ours.abs().max()


def drawn(painter, pictures, batch_size):
    """(picture, image) in order."""
    batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
    return [pair for batch in batches for pair in zip(batch, painter.draw(batch), strict=True)]


def test_a_picture_depends_on_neither_batch_nor_neighbours(exports):
    painter = painter_of(load_space(exports[625]))
    pictures = pictures_of(PROMPTS, [0, 5])
    together = {p: image for p, image in drawn(painter, pictures, 4)}
    assert list(together) == pictures
    again = {p: image for p, image in drawn(painter, pictures, 4)}
    assert all(torch.equal(together[p], again[p]) for p in pictures)  # same batches: same bits
    for p, image in drawn(painter, pictures[::-1], 1):
        assert (image - together[p]).abs().max() <= 1e-4
    (alone,) = pictures_of(typed_prompts([" ein roter Kreis – grün "], first=7), [5])
    assert alone == pictures[-1]
    images = torch.stack(list(together.values()))
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(len(images))
    assert distances.min() > 0.5  # every seed and every number gives another picture


def test_the_upgrade_is_the_bridge_and_the_teachers_decoder(space, flux_folder, bridge, exports):
    upgrade = find_upgrade(Export(exports[999], "x"), str(bridge), str(flux_folder), None)
    pictures = pictures_of(PROMPTS, [0])
    plain, upgraded = painter_of(load_space(exports[999])), painter_of(load_space(exports[999]), upgrade)
    teacher = load_space(flux_folder)
    with torch.no_grad():
        z_teacher = Bridge.load(bridge, space, teacher)(plain.latents(pictures))
        wanted = teacher.decode(teacher.load_vae(), z_teacher)
    images = torch.stack([image for _, image in drawn(upgraded, pictures, 3)])
    assert images.shape == (3, 3, teacher.resolution, teacher.resolution)
    assert teacher.resolution == 2 * space.resolution
    assert wanted.std() > 0.01
    assert (images - wanted).abs().max() <= 1e-4
    assert drawn(plain, pictures, 3)[0][1].shape == (3, space.resolution, space.resolution)


def test_numbers_that_are_not_finite_name_their_picture(job, exports, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(exports[999], tmp_path / "broken")
    file = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"].fill_(3e38)  # finite itself
    save_file(weights, file, {"format": "pt"})
    painter = painter_of(load_space(tmp_path / "broken"))
    with pytest.raises(NonFiniteError, match=r"00002-seed4\.png \('a large blue square"):
        painter.latents(pictures_of(PROMPTS, [4])[1:])
    code, _, error = job(tmp_path / "broken", "--prompt", "a", "--out", tmp_path / "out")
    assert code == 1
    assert "00001-seed0.png ('a'): the latents are not finite" in error


# -- where a student is -----------------------------------------------------------------------------------


def test_an_export_is_found_by_folder_run_name_and_run_id(run, exports, tmp_path):
    storage, folder = run.parent, run / "export"
    assert find_export(str(exports[999]), storage) == Export(exports[999], "t999")
    for text in (str(run), "mine", str(folder), "a" * 32, "b" * 32):
        export = find_export(text, storage)
        assert (export.folder, export.name, export.run) == (folder, "mine", run), text
    (tmp_path / "half-way").mkdir()
    (tmp_path / "half-way" / "config.yaml").touch()
    for text, problem in {
        "nowhere": r"nowhere: no such folder, and no run of that name",
        "half-way": "a run that has exported no student yet",
        "c" * 32: "there is no MLflow store in .*; name --tracking-uri",
        "shapes:judge": "no diffusers pipeline",
    }.items():
        with pytest.raises(InputError, match=problem):
            find_export(text, tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "linspace"},
        {"set_alpha_to_one": False},
        {"clip_sample": True},
        {"_class_name": "PNDMScheduler"},
    ],
)
def test_a_scheduler_whose_single_step_is_not_exact_is_refused(values, exports, tmp_path):
    """Each would draw something, but not the student's x_0."""
    folder = shutil.copytree(exports[999], tmp_path / "other")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(InputError, match="not the export of a one-step student"):
        open_one_step(Export(folder, "other"))


def test_an_mlflow_run_gives_its_export_from_the_artifacts(exports, tmp_path):
    from raydistill.tracking.store import client_of, prepare

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    prepare(uri)
    client = client_of(uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = client.create_run(experiment, run_name="mine").info.run_id
    tags = {"mlflow.parentRunId": parent, "stage": "distill"}
    child = client.create_run(experiment, tags=tags, run_name="mine/distill").info.run_id
    client.log_artifacts(child, str(exports[625]), "export")
    for run_id, name in ((parent, "mine"), (child, "mine/distill")):
        export = find_export(run_id, tmp_path)  # of the SQLite file in storage
        assert export.name == name
        assert export.folder == tmp_path / "artifacts" / child / "artifacts" / "export"  # no copy is left anywhere
        assert open_one_step(export)[1] == 625
    other = client.create_run(experiment, run_name="other").info.run_id
    with pytest.raises(InputError, match="has logged a student"):
        find_export(other, tmp_path / "elsewhere", uri)
    with pytest.raises(InputError, match="cccc: sqlite.*not found"):
        find_export("c" * 32, tmp_path, uri)


def test_a_runs_bridge_teacher_and_base_are_its_own(run, space, bridge, flux_folder, exports, tmp_path):
    upgrade = find_upgrade(find_export("mine", run.parent), None, None, None)
    assert (upgrade.bridge, upgrade.base.folder, upgrade.teacher.folder) == (bridge, space.folder, str(flux_folder))
    config = load(overrides=["bridge.checkpoint=null", f"student.model={space.folder}", f"teacher.model={flux_folder}"])
    trained = shutil.copytree(run, tmp_path / "trained")
    (trained / "config.yaml").write_text(to_yaml(config))
    export = find_export("trained", tmp_path)
    with pytest.raises(InputError, match="--bridge: .*trained/bridge does not exist"):
        find_upgrade(export, None, None, None)
    shutil.copytree(bridge, trained / "bridge")
    assert find_upgrade(export, None, None, None).bridge == trained / "bridge"
    config = load(overrides=["bridge.checkpoint=null", "bridge.projector=identity"])
    (trained / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(InputError, match="identity Bridge"):
        find_upgrade(export, None, None, None)


def test_a_half_precision_export_upgrades_with_its_base(bridge, flux_folder, sd_folder, exports, tmp_path):
    """The Bridge knows the base's decoder in float32; the export has it rounded."""
    half = Export(exports["half"], "half")
    with pytest.raises(InputError, match="half-precision copy: name the original model with --base"):
        find_upgrade(half, str(bridge), str(flux_folder), None)
    assert find_upgrade(half, str(bridge), str(flux_folder), str(sd_folder)).base.folder == str(sd_folder)
    other = shutil.copytree(exports["half"], tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2:] = b"\x00\x3c"  # the last number becomes 1.0
    file.write_bytes(raw)
    with pytest.raises(InputError, match="its VAE is not that of .* has other values"):
        find_upgrade(Export(other, "other"), str(bridge), str(flux_folder), str(sd_folder))


# -- files ------------------------------------------------------------------------------------------------


def test_pictures_say_how_they_were_made_and_sheets_stay_small(tmp_path):
    album = Album(folder=tmp_path / "new", about={"student": "mine"}, columns=2, shown=3)
    image = torch.linspace(-1, 1, 3 * 300 * 300).view(3, 300, 300)
    for seed in range(5):
        album.add(Picture(seed, 12, "ein grüner Kreis – 😀", seed), image * (seed - 2) / 2)
    files = album.finish("title")
    assert [file.name for file in files] == ["grid.png", "sheet.png"]
    with Image.open(tmp_path / "new" / "00012-seed4.png") as picture:
        said = picture.text
        assert picture.getpixel((299, 299))[2] == 255
    assert said["Software"] == f"raydistill {raydistill.__version__}"
    del said["Software"]
    assert said == {"prompt": "ein grüner Kreis – 😀", "prompt_number": "12", "seed": "4", "student": "mine"}
    with Image.open(files[0]) as whole, Image.open(tmp_path / "new" / "00012-seed2.png") as third:
        assert whole.size == (600, 600)  # three pictures in full size, and a blank
        assert whole.crop((0, 300, 300, 600)).tobytes() == third.tobytes()
        assert whole.getpixel((599, 599)) == (0, 0, 0)
    with Image.open(files[1]) as sheet:
        assert 2 * 256 < sheet.width < 600
    assert len(list((tmp_path / "new").glob("0*.png"))) == 5


# -- the job ----------------------------------------------------------------------------------------------


def test_the_job_draws_a_run_at_both_sizes_and_the_same_again(job, run, tmp_path):
    (tmp_path / "prompts.csv").write_text("text,prompt\nx,a red circle\nx,\nx,two blue squares\n")
    common = ("mine", "--storage", run.parent, "--seeds", 0, 4, "--device", "cpu")
    code, out, _ = job(*common, "--prompts", tmp_path / "prompts.csv", "--out", tmp_path / "a")
    assert code == 0
    assert "2 prompts of 3 rows; bad rows: 1 blank (row 3)" in out
    assert "4 of 32 px" in out
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == [
        "00002-seed0.png", "00002-seed4.png", "00004-seed0.png", "00004-seed4.png", "grid.png", "sheet.png",
    ]  # fmt: skip
    again = (*common, "--prompt", "two blue squares", "--number", 4, "--out", tmp_path / "b", "--batch-size", 1)
    assert job(*again)[0] == 0
    with Image.open(tmp_path / "a/00004-seed4.png") as one, Image.open(tmp_path / "b/00004-seed4.png") as other:
        differences = [abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)]
        assert max(differences) <= 1  # of 255
        assert len(set(one.tobytes())) > 10
        assert one.text == other.text
    code, out, _ = job(*common, "--prompt", "a red circle", "--upgrade", "--out", tmp_path / "c")
    assert code == 0
    assert "2 of 64 px" in out
    with Image.open(tmp_path / "c/00001-seed0.png") as picture:
        assert picture.size == (64, 64)
        assert picture.text["upgrade"].startswith("bridge, decoded by flux")


def test_wrong_input_ends_with_code_two_and_leaves_nothing(
    job, run, exports, sd_folder, flux_folder, tmp_path, monkeypatch
):
    def heavy(*_: object, **__: object):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("raydistill.export.sampling.Painter.__init__", heavy)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "empty.txt").touch()
    folder, prompt = exports[999], ("--prompt", "a")
    cases = [
        ((folder,), "one of the arguments --prompt --prompts is required"),
        (("nowhere", *prompt), "nowhere: no such folder, and no run of that name"),
        ((sd_folder, *prompt), "not the export of a one-step student: its DDIMScheduler (timestep_spacing 'leading')"),
        (
            (flux_folder, *prompt),
            "is a FluxPipeline, but a StableDiffusionPipeline or ",
        ),
        ((folder, "--prompt", " "), "prompt ' ': is blank"),
        ((folder, "--prompts", tmp_path / "none.txt"), "none.txt: no such file"),
        ((folder, "--prompts", tmp_path / "empty.txt"), "the file is empty"),
        ((folder, *prompt, "--out", tmp_path / "full"), "exists and is not an empty folder"),
        ((folder, *prompt, "--seeds", "-1"), "'-1'"),
        ((folder, *prompt, "--seeds", "1", "1"), "a seed is named twice"),
        ((folder, *prompt, "--batch-size", "0"), "a whole number of at least 1"),
        ((folder, *prompt, "--device", "quantum"), "--device quantum: "),
        ((folder, *prompt, "--bridge", "x"), "belong to --upgrade"),
        ((folder, *prompt, "--upgrade"), "name --bridge and --teacher"),
        ((folder, *prompt, "--upgrade", "--bridge", "b", "--teacher", tmp_path / "t"), "--teacher: "),
        ((folder, *prompt, "--upgrade", "--bridge", folder, "--teacher", flux_folder), "not a saved Bridge"),
        (
            (folder, *prompt, "--upgrade", "--bridge", "shapes:bridge/sd15-flux", "--teacher", flux_folder),
            "was trained for another student VAE",
        ),
    ]
    for arguments, said in cases:
        code, _, error = job(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "out")))
        assert code == 2, arguments
        assert said in error, (arguments, error)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()


def test_a_damaged_student_is_refused(job, exports, tmp_path):
    broken = shutil.copytree(exports[999], tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, _, error = job(broken, "--prompt", "a", "--out", tmp_path / "out")
    assert code == 2
    assert f"{file}: damaged" in error
    assert not (tmp_path / "out").exists()
