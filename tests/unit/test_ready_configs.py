"""The configurations of real pairs: composed without copies, valid, and of models that fit each other. No network."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hollow_folders import write_model
from lanes import full_but
from tiny_clip import write_clip

from raydistill.bridge.model import reach
from raydistill.bridge.resampling import power_of_two
from raydistill.config.reading import CONFIGS, draws_pairs, draws_samples, flatten, load, stages_of
from raydistill.driver.preflight import check_inputs
from raydistill.driver.room import needs
from raydistill.evaluation.metrics import check_chosen
from raydistill.evaluation.rewards import WEIGHTS as WEIGHTS_OF
from raydistill.planning.memory import check_launch
from raydistill.shapes import WEIGHTS
from raydistill.spaces import hub_models
from raydistill.spaces.meta import open_space
from raydistill.spaces.one_step import x0_gain
from raydistill.storage.hub import is_hub_file, is_hub_id

TEACHERS = {
    "sdxl": (4, "epsilon"),
    "kolors": (4, "epsilon"),
    "pixart_sigma": (4, "epsilon"),
    "sd35_medium": (16, "velocity"),
    "sd35_large": (16, "velocity"),
    "flux1_dev": (16, "velocity"),
    "flux1_krea": (16, "velocity"),
    "flux2_klein": (32, "velocity"),
    "chroma": (16, "velocity"),
    "sana15": (32, "velocity"),
    "qwen_image": (16, "velocity"),
}
STUDENTS = {"sd15": (999, 3000), "sd21_base": (625, 3000), "sd15_raw": (999, 9000)}  # start timestep, updates
STUDENTS |= dict.fromkeys(("bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny", "small_sd", "tiny_sd"), (999, 9000))
STUDENTS |= dict.fromkeys(("sd15_lcm", "sd15_hyper"), (999, 3000))
STUDENTS |= {"sdxl": (399, 3000), "sdxl_raw": (999, 9000), "sdxl_hyper": (999, 3000)}
STUDENTS |= dict.fromkeys(("ssd_1b", "segmind_vega", "sana_600m_512"), (999, 9000)) | {"pixart_alpha_512": (400, 3000)}
OF_1024 = ("sdxl", "sdxl_raw", "sdxl_hyper", "ssd_1b", "segmind_vega")  # pixels; the others have 512
SHAPES = {name: (4, 128, 128) if name in OF_1024 else (4, 64, 64) for name in STUDENTS} | {
    "sana_600m_512": (32, 16, 16)
}
PIPELINES = dict.fromkeys(OF_1024, "StableDiffusionXLPipeline")
PIPELINES |= {"pixart_alpha_512": "PixArtAlphaPipeline", "sana_600m_512": "SanaPipeline"}
SIDES = {"sana15": 32}  # of latents, where it is not 128
OF_SD15_ALONE = ("flux1_krea", "chroma", "sana15", "qwen_image")  # other students: a file of one line
PAIRS = [(t, s) for t in TEACHERS for s in ("sd15", *(() if t in OF_SD15_ALONE else ("sd21_base",)))]
PAIRS.append(("sd35_medium", "sd15_raw"))  # the paper's only row of a raw start
PAIRS += [(teacher, "sdxl") for teacher in ("sd35_medium", "chroma", "qwen_image")]
PAIRS.append(("sd35_medium", "pixart_alpha_512"))
PAPER = {
    "student.lr": 1e-6,
    "fake_score.lr": 5e-4,
    "discriminator.lr": 5e-7,
    "discriminator.weight": 0.5,
    "discriminator.standardize": True,  # this project's: the paper does not say how its head reads a transformer
    "vsd.weight": 1.0,
    "vsd.t_min": 0.02,
    "vsd.t_max": 0.98,
    "distill.workers": 8,
    "bridge.lr": 1e-4,
    "bridge.batch_size": 32 * 8,
    "bridge.projector": "swinir",
    "bridge.prior": True,
    "bridge.attention.weight": 1.0,
    "bridge.attention.temperature": 3.0,
    "bridge.attention.normalize": True,
    "bridge.attention.layers": 4,  # this project's reading of the paper, as the next
    "bridge.attention.depth_fraction": 0.5,
    "bridge.trainable": False,
    "synthesis.count": 2_000_000,
}


def test_there_is_one_file_for_every_pair_of_parts():
    assert {file.stem for file in (CONFIGS / "teachers").iterdir()} == set(TEACHERS)
    assert {file.stem for file in (CONFIGS / "students").iterdir()} == set(STUDENTS)
    real = {file.stem for file in CONFIGS.glob("*.yaml") if "\nextends: [paper" in f"\n{file.read_text()}"}
    assert real == {f"{teacher}_{student}" for teacher, student in PAIRS}


@pytest.mark.parametrize("student", sorted(set(STUDENTS) - {student for _, student in PAIRS}))
def test_any_student_makes_a_pair_with_any_teacher(student, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"extends": ["paper.yaml", "teachers/sdxl.yaml", f"students/{student}.yaml"]}))
    config = load(own)
    space_S, space_T = open_space(config.student.model), open_space(config.teacher.model)
    assert (config.student.start_timestep, config.distill.steps) == STUDENTS[student]
    assert config.student.unet is None
    shape = SHAPES[student]
    assert space_S.latent_shape == shape
    assert space_S.prediction == ("velocity" if student.startswith("sana") else "epsilon")
    assert reach(space_S, space_T, prior=True) == (power_of_two(Fraction(128, shape[1])), 1)
    assert config.student.lora_start is None or is_hub_file(config.student.lora_start)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_only_lists_what_it_extends(teacher, student):
    tree = yaml.safe_load((CONFIGS / f"{teacher}_{student}.yaml").read_text())
    assert tree == {"extends": ["paper.yaml", f"teachers/{teacher}.yaml", f"students/{student}.yaml"]}


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_has_the_hyperparameters_of_the_paper(teacher, student):
    config = load(CONFIGS / f"{teacher}_{student}.yaml")
    values = flatten(config)
    own = {"student.lr": 5e-5} if config.student.kind == "lora" else {}
    own |= {"vsd.t_max": 0.71} if teacher == "pixart_sigma" else {}
    assert {key: values[key] for key in PAPER} == PAPER | own
    assert config.distill.batch_size == (16 if teacher == "flux2_klein" else 32)
    assert (config.student.start_timestep, config.distill.steps) == STUDENTS[student]
    assert (config.student.unet is None) == student.endswith("_raw")


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_knows_whether_its_student_gets_better(teacher, student):
    """By metrics without packages of their own, which the trainers compute; their weights are of the hub."""
    evaluation = load(CONFIGS / f"{teacher}_{student}.yaml").evaluation
    assert evaluation.measured == ["clipscore", "pickscore"]
    assert evaluation.metric == "pickscore"
    assert evaluation.gpus_per_scorer is None
    check_chosen(evaluation)
    needed = {weights.option: weights.repo for name in evaluation.measured for weights in WEIGHTS_OF[name]}
    assert evaluation.weights == needed
    assert all(map(is_hub_id, needed.values()))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_models_of_a_pair_fit_each_other(teacher, student):
    config = load(CONFIGS / f"{teacher}_{student}.yaml")
    channels, prediction = TEACHERS[teacher]
    space_S, space_T = open_space(config.student.model), open_space(config.teacher.model)
    assert space_S.pipeline_class == PIPELINES.get(student, "StableDiffusionPipeline")
    assert space_S.latent_shape == SHAPES[student]
    assert space_S.prediction == "epsilon"
    assert 0 < config.student.start_timestep < space_S.path.num_train_timesteps
    side = SIDES.get(teacher, 128)
    assert space_T.latent_shape == (channels, side, side)
    assert space_T.prediction == prediction
    assert space_T.resolution == 1024
    if prediction == "epsilon":  # both scores are in bfloat16, whose rounding x0 multiplies
        last = round(config.vsd.t_max * (space_T.path.num_train_timesteps - 1))
        assert x0_gain(space_T, last) < 25
    ratio = Fraction(side, space_S.latent_shape[1])
    assert reach(space_S, space_T, prior=True) == ((1, 1) if ratio == 2 else (0, ratio))
    assert config.bridge.batch_size % config.distill.workers == 0


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_needs_nothing_of_the_miniature_world(teacher, student):
    values = flatten(load(CONFIGS / f"{teacher}_{student}.yaml"))
    assert [key for key, value in values.items() if isinstance(value, str) and value.startswith("shapes:")] == []
    for role in ("teacher", "student"):
        assert is_hub_id(values[f"{role}.model"])
        assert values[f"{role}.model"] in hub_models()


PARTS = [file for kind in ("teachers", "students") for file in sorted((CONFIGS / kind).glob("*.yaml"))]


RECIPES = [CONFIGS / f"{name}.yaml" for name in ("paper", "fast", "first", "24gb")]
FAST = sorted(CONFIGS.glob("*_fast.yaml"))
FIRST = sorted(CONFIGS.glob("*_first.yaml"))


@pytest.mark.parametrize("file", [*RECIPES, *PARTS, *FAST, *FIRST], ids=lambda f: f.stem)
def test_every_value_is_explained_on_its_line(file):
    lines = [line for line in file.read_text().splitlines() if re.match(r"\s*\w+:\s+[^#\s]", line)]
    assert lines
    assert [line for line in lines if " # " not in line and not line.startswith("extends:")] == []


# -- the fast recipe, and the rehearsal ---------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_any_pair_by_the_fast_recipe_differs_from_the_paper_s_in_what_costs(teacher, student, tmp_path):
    parts = [f"teachers/{teacher}.yaml", f"students/{student}.yaml"]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"extends": ["fast.yaml", *parts]}))
    fast, paper = load(own), load(CONFIGS / f"{teacher}_{student}.yaml")
    assert stages_of(fast) == ["synthesis", "samples", "bridge", "distill"]
    assert (draws_pairs(fast), draws_samples(fast)) == (False, True)
    assert 200_000 <= fast.synthesis.image_count <= 400_000
    assert fast.distill.warmup_steps > 0
    assert (fast.evaluation.prompts, fast.evaluation.holdout) == (None, 0.001), "one file of prompts is enough"
    evaluations = fast.distill.steps // fast.distill.evaluate_every
    assert 2 <= fast.distill.stop_on_plateau < evaluations, "it ends where the score no longer rises"
    now, before = flatten(fast), flatten(paper)
    assert {key for key in now if now[key] != before[key]} - CHEAPER == set()
    same = {
        "student.lr",
        "fake_score.lr",
        "discriminator.lr",
        "vsd.weight",
        "discriminator.weight",
        "distill.batch_size",
    }
    assert all(now[key] == before[key] for key in same)


CHEAPER = {
    "bridge.steps", "synthesis.images", "synthesis.image_count", "synthesis.min_pixels", "synthesis.count", "synthesis.max_failed_rows",
    "synthesis.encoders", "synthesis.in_flight", "fake_score.updates", "discriminator.real_source", "distill.steps",
    "distill.warmup_steps", "distill.schedule", "distill.stop_on_plateau", "evaluation.prompts", "evaluation.holdout",
}  # fmt: skip


def test_the_ready_fast_pairs_are_compositions_of_parts():
    names = {file.stem.removesuffix("_fast") for file in FAST}
    assert {"sd35_medium_sd15", "flux1_dev_sd15", "sdxl_sd15"} <= names <= {f"{t}_{s}" for t, s in PAIRS}
    for file in FAST:
        teacher, student = file.stem.removesuffix("_fast").rsplit("_sd", 1)
        tree = yaml.safe_load(file.read_text())
        assert tree["extends"] == ["fast.yaml", f"teachers/{teacher}.yaml", f"students/sd{student}.yaml"]
        assert tree.keys() <= {"extends", "synthesis", "teachers"}


@pytest.mark.parametrize("file", FIRST, ids=lambda f: f.stem)
def test_a_rehearsal_has_every_stage_on_one_gpu(file):
    config = load(file)
    assert stages_of(config) == ["synthesis", "samples", "bridge", "distill"]
    assert (config.synthesis.image_count, config.distill.steps, config.distill.workers) == (200, 50, 1)
    drawing = config.teachers.gpus_per_rank + 2 * config.synthesis.gpus_per_encoder
    training = config.distill.gpus_per_worker + config.teachers.gpus_per_rank + config.prompts.gpus_per_encoder
    assert max(drawing, training) <= 1
    assert config.teachers.replicas * config.teachers.shards == 1
    labels = (config.teachers, config.synthesis, config.distill, config.prompts)
    assert [section.node_labels for section in labels] == [{}] * 4
    needed = [sum(need.count * need.amounts["CPU"] for need in together) for together in needs(config)]
    assert max(needed) <= 8
    assert config.bridge.batch_size % config.bridge.micro_batches == 0
    assert config.distill.batch_size % config.distill.micro_batches == 0


@pytest.mark.parametrize("teacher", full_but(["flux", "sd3", "sdxl", "sana"], "sdxl"))
@pytest.mark.parametrize(("student", "start"), [("sd15", 999), ("sd21", 625)])
def test_a_miniature_pair_passes_the_checks_of_a_job(teacher, student, start, tmp_path):
    config = load(CONFIGS / f"shapes_{teacher}_{student}.yaml", [f"storage={tmp_path}"])
    inputs = check_inputs(config)
    assert (inputs.teacher.folder, inputs.student.folder) == (str(WEIGHTS / teacher), str(WEIGHTS / student))
    assert config.student.start_timestep == start
    assert not [note for note in inputs.notes if "start_timestep" in note]


def test_the_sdxl_style_miniature_is_a_student_that_trains_its_bridge_first(tmp_path):
    config = load(CONFIGS / "shapes_flux_sdxl.yaml", [f"storage={tmp_path}"])
    inputs = check_inputs(config)
    assert (inputs.teacher.folder, inputs.student.folder) == (str(WEIGHTS / "flux"), str(WEIGHTS / "sdxl"))
    assert (config.student.unet, config.student.start_timestep) == (None, 399)
    assert stages_of(config)[:3] == ["synthesis", "bridge", "distill"]
    assert inputs.student.latent_shape[1:] == inputs.teacher.latent_shape[1:]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The folder of a hub model with the published configurations and weights without numbers; made once."""
    made: dict[str, Path] = {}

    def folder(hub_id: str) -> Path:
        if hub_id not in made:
            sizes = hub_models()[hub_id].sizes
            made[hub_id] = write_model(sizes, tmp_path_factory.mktemp("model") / sizes)
        return made[hub_id]

    return folder


def _with_folders(name, model_folder, tmp_path, *more):
    """A ready configuration whose models, prompts and start lie here."""
    config = load(CONFIGS / f"{name}.yaml")
    student, teacher = (model_folder(model) for model in (config.student.model, config.teacher.model))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "heldout.txt").write_text("a blue square\n")
    here = [f"student.model={student}", f"teacher.model={teacher}", f"storage={tmp_path}"]
    here += [f"prompts.path={tmp_path / 'prompts.txt'}", f"evaluation.prompts={tmp_path / 'heldout.txt'}"]
    clip = tmp_path / "clip"
    if not clip.exists():
        clip.mkdir()
        write_clip(clip)
    here += [f"evaluation.weights={{clipscore: {clip}, pickscore: {clip}, pickscore.processor: {clip}}}"]
    part = "unet" if (student / "unet").exists() else "transformer"
    here += [f"student.unet={student / part}"] if config.student.unet else []
    return load(CONFIGS / f"{name}.yaml", [*here, *more])


@pytest.mark.full
@pytest.mark.parametrize("pair", [f"{teacher}_{student}" for teacher, student in PAIRS])
def test_a_ready_pair_passes_the_whole_check_of_its_folders(pair, model_folder, tmp_path):
    """PixArt's public folder, for one, names its transformer by a class that diffusers maps to another."""
    config = _with_folders(pair, model_folder, tmp_path)
    inputs = check_inputs(config)
    teacher, student = next(one for one in PAIRS if "_".join(one) == pair)
    assert inputs.student.latent_shape == SHAPES[student]
    side = SIDES.get(teacher, 128)
    assert inputs.teacher.latent_shape == (TEACHERS[teacher][0], side, side)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_role_of_a_ready_pair_fits_its_gpus(model_folder, tmp_path):
    """At full size and one sample a worker; `test_planning_roles` counts every teacher at its width with few blocks."""
    small = ("distill.batch_size=1", "distill.micro_batches=1", "bridge.batch_size=8", "bridge.micro_batches=1")
    lines = check_launch(
        _with_folders("pixart_sigma_sd15", model_folder, tmp_path, *small, "fake_score.updates=1", "teachers.slice=1")
    )
    assert len(lines) == 6
    assert all(line.startswith("fits: ") for line in lines)


def test_parts_of_one_kind_decide_the_same_keys():
    def keys(tree, prefix=""):
        for key, value in tree.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    more = {"flux2_klein": {"distill.batch_size"}, "sd15_raw": {"distill.steps"}}
    more |= dict.fromkeys(("bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny", "small_sd", "tiny_sd"), {"distill.steps"})
    more |= dict.fromkeys(("sd15_lcm", "sd15_hyper"), {"student.lora_start"})
    share = {"prompts.gpus_per_encoder"}  # of large text encoders
    more |= {"sana_600m_512": share | {"distill.steps"}, "pixart_alpha_512": share}
    keeps = {"distill.gradient_checkpointing", "distill.micro_batches"}  # activations: they fit 80 GB
    more |= dict.fromkeys(("sd35_medium", "sdxl"), keeps)
    of_sdxl = {"teachers": keeps, "students": {"student.kind", "student.rank", "student.lr", *keeps, *share}}
    more["sdxl_raw"] = of_sdxl["students"] | {"distill.steps"}
    more["sdxl_hyper"] = of_sdxl["students"] | {"student.lora_start"}
    more |= dict.fromkeys(("ssd_1b", "segmind_vega"), keeps | share | {"distill.steps"})
    more["flux1_dev"] = {"teachers.slice", "bridge.micro_batches"}  # for its size
    more["pixart_sigma"] = {"vsd.t_max"}  # its schedule
    more["chroma"] = {"bridge.micro_batches"}
    more["flux1_krea"] = more["flux1_dev"]
    more["qwen_image"] = more["flux1_dev"] | share | {"fake_score.shard"}
    for kind in ("teachers", "students"):
        decided = {f.stem: set(keys(yaml.safe_load(f.read_text()))) for f in (CONFIGS / kind).iterdir()}
        common = set.intersection(*decided.values())
        extras = {name: found - common for name, found in decided.items()}
        assert extras == {name: (more | {"sdxl": of_sdxl[kind]}).get(name, set()) for name in decided}
