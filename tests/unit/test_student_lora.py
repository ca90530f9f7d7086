"""A student that is a LoRA on its frozen start: what learns and is kept, its resume, its export in two forms."""

from __future__ import annotations

import copy
import itertools
import re
import shutil

import pytest
import torch
from answers import Answer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from export_students import ONE_STEP
from safetensors.torch import load_file

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.distillation.batches import Real
from raydistill.distillation.networks import load_unet
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.export.lora import find_base, write_lora
from raydistill.export.own_lora import FILE, Begins, from_pretrained, repository, usage_of
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.planning.counting import count_trainer
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.adapter import merged_state
from raydistill.spaces.meta import open_space
from raydistill.spaces.one_step import one_step_x0

CAPTIONS = ["a small red circle at the left on a white background", "two blue squares", ""]
LORA = (
    "student.kind=lora", "student.rank=4", "student.lr=3e-3", "student.ema_decay=0.9", "fake_score.rank=4",
    "fake_score.updates=1", "distill.batch_size=2", "distill.micro_batches=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    tables = {
        role: PromptTable(space, CAPTIONS)(CAPTIONS) for role, space in {"student": student, "teacher": teacher}.items()
    }
    scores = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    return student, teacher, tables, scores


def distiller(world, *settings, skip=0):
    student, teacher, tables, _ = world
    config = load(overrides=[*LORA, *settings])

    def batches():
        for slot in itertools.count(skip):
            ids = list(range(2 * slot, 2 * slot + 2))
            yield {"sample_id": ids} | {
                f"{role}.{name}": value[[i % 2 for i in ids]].numpy()
                for role, table in tables.items()
                for name, value in table.items()
            }

    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=load_unet(student, config.student.unet),
        bridge=Bridge.load(WEIGHTS / "bridge" / "sd15-flux", student, teacher),
        fake_network=teacher.load_network(),
        real=Real(torch.randn(4, *teacher.latent_shape), tables["teacher"], torch.arange(4) % 3),
        source=batches(),
    )


def steps(worker, scores, count):
    for _ in range(count):
        distillation_step(worker, lambda made: Answer(scores), 1, overlap=True)
    return worker


@pytest.fixture(scope="module")
def learned(world):
    """A worker after three updates."""
    torch.manual_seed(0)
    return steps(distiller(world), world[3], 3)


def state_of(worker):
    return {
        f"{part}.{name}": value
        for part in ("student", "ema", "fake", "discriminator")
        for name, value in worker.state_dict()[part].items()
    }


def test_only_the_lora_learns_and_is_kept_and_the_average_shares_the_frozen_weights(world, learned):
    start, networks = load_unet(world[0], "shapes:sd15-onestep").state_dict(), learned.networks
    frozen = {n.replace(".base_layer", ""): v for n, v in networks.student.state_dict().items() if "lora_" not in n}
    assert frozen.keys() == start.keys()
    assert all(torch.equal(value, start[name]) for name, value in frozen.items())
    state = learned.state_dict()
    optimized = learned.gradients.parameters("student")
    assert {name.split(".lora_")[1][0] for name in state["student"]} == {"A", "B"}
    assert sum(v.numel() for v in state["student"].values()) == sum(p.numel() for p in optimized)
    assert state["student"].keys() == state["ema"].keys()
    assert all(v.abs().max() > 0 for v in state["student"].values())  # B too, which began at zero
    assert any(not torch.equal(v, state["ema"][name]) for name, v in state["student"].items())
    shared = {p.data_ptr() for p in networks.student.parameters()} & {p.data_ptr() for p in networks.ema.parameters()}
    assert len(shared) == len(start)


@pytest.mark.full
def test_a_student_begins_as_its_start_and_draws_no_number_that_others_would_have(world):
    """The seed decides A alone: fake score and head begin as beside a student that is trained whole."""
    lora, full = distiller(world), distiller(world, "student.kind=full")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    conditioning = {name: value[:2] for name, value in world[2]["student"].items()}
    with torch.no_grad():
        assert torch.equal(*(one.networks.z_student(noise, conditioning) for one in (lora, full)))
    ours, theirs = lora.state_dict(), full.state_dict()
    for part in ("fake", "discriminator"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    other = distiller(world, "run.seed=1").state_dict()["student"]
    assert any(not torch.equal(value, other[name]) for name, value in ours["student"].items())


def test_a_restored_run_goes_on_with_the_same_bits(world, learned):
    torch.manual_seed(0)  # of the real samples alone
    first = steps(distiller(world), world[3], 2)
    torch.manual_seed(0)
    resumed = distiller(world, skip=2 * 2)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, world[3], 1)
    whole, again = state_of(learned), state_of(resumed)
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_best_student_comes_back(world, learned):
    best = copy.deepcopy(learned.networks.best_state())
    later = copy.deepcopy(learned.networks)
    with torch.no_grad():
        for value in later.best_state()["student"].values():
            value.add_(1.0)
    later.load_best_state(best)
    assert all(torch.equal(value, best["student"][name]) for name, value in later.best_state()["student"].items())
    with pytest.raises(RuntimeError, match="missing or unknown"):
        later.load_best_state({"student": load_unet(world[0], None).state_dict()})


@pytest.fixture(scope="module")
def export(world, learned, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "mine"
    card = ModelCard(
        teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=3, start="shapes:sd15-onestep"
    )
    folder = export_student(world[0], learned.networks.evaluated, 999, run / "export", card, torch.float32)
    (run / "config.yaml").write_text("student: {model: shapes:sd15, unet: shapes:sd15-onestep, kind: lora, rank: 4}\n")
    return Export(folder, "mine", run)


def test_the_card_of_a_lora_loads_the_commits_that_the_run_was_bound_to(world):
    """A name with its commit, as a run keeps it, is no name that the hub's library takes."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    begins = Begins(f"org/base@{commit}", lora=f"org/start@{commit}/one/file.safetensors")
    usage = usage_of(world[0], begins, world[0].scheduler, 999)
    assert f'from_pretrained("org/base", revision="{commit}")' in usage
    assert f'load_lora_weights("org/start", weight_name="one/file.safetensors", revision="{commit}")' in usage
    assert from_pretrained("org/base") == '"org/base"'
    assert from_pretrained("/a/folder@home") == '"/a/folder@home"'
    assert repository(f"org/base@{commit}") == "org/base"


def draw(pipe, noise):
    pipe.set_progress_bar_config(disable=True)
    return pipe(CAPTIONS[1], latents=noise, output_type="latent", **ONE_STEP).images


def test_both_forms_of_the_export_draw_the_students_own_latents(world, learned, export):
    """The merged pipeline, and base, start and LoRA put together by diffusers as the README says."""
    space, networks = world[0], learned.networks
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    conditioning = {name: value[1:2] for name, value in world[2]["student"].items()}
    with torch.no_grad():
        wanted = one_step_x0(space, networks.evaluated, noise, conditioning, 999)
        before = one_step_x0(space, load_unet(space, "shapes:sd15-onestep"), noise, conditioning, 999)
    assert (wanted - before).abs().mean() > 0.01 * before.abs().mean()  # it has learned something
    merged = StableDiffusionPipeline.from_pretrained(export.folder, dtype=torch.float32)
    torch.testing.assert_close(draw(merged, noise), wanted, rtol=1e-4, atol=1e-3)

    code = re.search(r"```python\n(.*?)```", (export.folder / "lora" / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("PATH_OF_THIS_FOLDER", str(export.folder / "lora")).replace(
        'shapes:sd15"', f'{WEIGHTS / "sd15"}"'
    )
    code = re.sub(r"# it was trained on another UNet: .*", "pipe.unet = UNET", code)
    names = {"UNET": UNet2DConditionModel.from_pretrained(WEIGHTS / "sd15-onestep" / "unet", torch_dtype=torch.float32)}
    *setup, _ = code.strip().splitlines()
    exec("\n".join(setup), names)
    names["pipe"].to(torch.float32)
    torch.testing.assert_close(draw(names["pipe"], noise), wanted, rtol=1e-4, atol=1e-3)
    assert load_file(export.folder / "lora" / FILE).keys() == {
        f"unet.{name.replace('.default', '')}" for name in learned.state_dict()["ema"]
    }


@pytest.mark.full
def test_the_export_job_gives_the_runs_own_lora(export, tmp_path):
    """Also of a copy of the export, far from the run's folder."""
    base, name = find_base(export, None)
    moved = Export(shutil.copytree(export.folder, tmp_path / "moved"), "moved")
    (tmp_path / "again").mkdir()
    assert "differs by 0.00 / 255" in write_lora(moved, base, name, 0.5, tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == load_file(export.folder / "lora" / FILE).keys()
    tmp_path = tmp_path / "own"
    tmp_path.mkdir()
    report = write_lora(export, base, name, 0.5, tmp_path)
    assert report.startswith("rank 4, as it was trained, ")
    assert float(re.search(r"differs by ([\d.]+) / 255", report)[1]) < 0.01
    assert load_file(tmp_path / FILE).keys() == load_file(export.folder / "lora" / FILE).keys()


def test_merged_weights_are_those_that_diffusers_fuses(learned):
    """In the layers that are adapted, and nowhere else."""
    fused = copy.deepcopy(learned.networks.evaluated)
    fused.fuse_lora()
    fused.unload_lora()
    wanted, found = fused.state_dict(), merged_state(learned.networks.evaluated)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.full
def test_the_plan_counts_what_learns_once_and_a_checkpoint(learned):
    config = load(overrides=list(LORA))
    counted = count_trainer(config, open_space("shapes:sd15"), open_space("shapes:flux"))
    networks = learned.networks
    trained = sum(v.nbytes for v in learned.state_dict()["student"].values())
    whole = sum(p.nbytes for p in networks.student.parameters())
    assert counted.gradients["student"] == trained
    assert counted.weights.student_frozen == whole - trained
    assert counted.weights.student == whole + trained  # the average is no second copy of the base
    kept = torch.utils._pytree.tree_leaves(learned.state_dict())
    assert counted.checkpoint == pytest.approx(sum(v.nbytes for v in kept if isinstance(v, torch.Tensor)), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["student.targets=to_q"], "student: targets: kind=full trains every layer"),
        (["student.kind=lora", "student.targets=to_q,nowhere"], "student.targets: no layer .* named 'nowhere'"),
        (["student.kind=lora", "student.targets=norm1"], "student.targets: Target module .*Norm.* is not supported"),
        (["student.kind=lora", "student.rank=0"], "student.rank: "),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(settings, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        check_inputs(load(overrides=[*settings, f"storage={tmp_path}"]))
    assert "\n" not in str(raised.value)
