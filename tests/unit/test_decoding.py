"""Pictures that a VAE cannot make are never drawn, judged or logged; one that overflows in float16 runs in float32."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raydistill.bridge.model import Bridge
from raydistill.config.networks import BridgeConfig
from raydistill.config.reading import CONFIGS, load
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import encode_rows
from raydistill.data.vae import PairEncoder
from raydistill.driver.job import Job, run_job
from raydistill.errors import NonFiniteError
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator, draw_teacher
from raydistill.evaluation.scorers import Drawing
from raydistill.evaluation.subject import Subject
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.sampling import Painter, pictures_of
from raydistill.export.source import Export
from raydistill.export.upgrade import find_upgrade
from raydistill.spaces import load_space
from raydistill.spaces.meta import empty_part
from raydistill.spaces.published_students import load_student

CARD = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
WEIGHTS = Path("vae/diffusion_pytorch_model.safetensors")
PICTURES = pictures_of(PromptSet(["a", "b"], [1, 2]), [0])


def overflowing(folder: Path, target: Path, *, force_upcast: bool | None = None, factor: float = 1e5) -> Path:
    """A copy whose decoder passes 65504, float16's largest number, on the way to the same picture.

    Its features go through norms, so that their size does not matter in float32. `force_upcast` None: no such key.
    """
    shutil.copytree(folder, target)
    weights = load_file(target / WEIGHTS)
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        weights[name] = weights[name] * factor
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    file = target / "vae/config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "force_upcast"}
    file.write_text(json.dumps(config if force_upcast is None else config | {"force_upcast": force_upcast}))
    return target


@pytest.fixture(scope="module")
def export(sd_folder, tmp_path_factory) -> Path:
    space = load_space(sd_folder)
    folder = tmp_path_factory.mktemp("decoding") / "export"
    return export_student(space, space.load_network(), 999, folder, CARD, torch.float32)


def painter_of(folder: Path, dtype: torch.dtype, upgrade=None) -> Painter:
    space = load_space(folder)
    return Painter(space, load_student(space, folder), upgrade=upgrade, dtype=dtype)


# -- force_upcast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_upcast", [True, None])
def test_force_upcast_decodes_in_float32_as_its_files_say(force_upcast, export, tmp_path):
    """None: diffusers' class says yes where a configuration says nothing."""
    folder = overflowing(export, tmp_path / "large", force_upcast=force_upcast)
    half = painter_of(folder, torch.float16)
    assert half.decoder.vae.dtype == torch.float32
    assert half.network.dtype == torch.float16
    latents = half.latents(PICTURES)
    space = load_space(folder)
    with torch.no_grad():
        assert torch.equal(half.draw(PICTURES), space.decode(space.load_vae(), latents))
    assert painter_of(folder, torch.bfloat16).decoder.vae.dtype == torch.bfloat16  # which does not overflow


def test_no_library_warns_of_a_dtype(export, tmp_path, caplog, monkeypatch):
    """diffusers' `to` speaks of modules that should stay in float32, and lists none."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to what pytest listens to
    caplog.set_level(logging.WARNING, "diffusers")  # its own, where it is imported before this package
    space = load_space(export)
    plain = load_space(overflowing(export, tmp_path / "plain", force_upcast=False, factor=1.0))
    wanted = space.load_vae()
    for dtype in (torch.float16, torch.bfloat16):
        vae = plain.load_vae(dtype)
        assert vae.dtype == dtype
        for name, value in space.load_vae(torch.bfloat16).state_dict().items():
            assert torch.equal(value, wanted.state_dict()[name].bfloat16())
        export_student(space, space.load_network(), 999, tmp_path / str(dtype), CARD, torch.float16)
        painter_of(export, dtype)
        empty_part(space, "vae", dtype)
    assert not [line for line in caplog.messages if "kept in float32" in line]


def test_without_force_upcast_a_vae_runs_as_it_is_asked_to(export, tmp_path):
    folder = overflowing(export, tmp_path / "plain", force_upcast=False, factor=1.0)
    painter = painter_of(folder, torch.float16)
    assert painter.decoder.vae.dtype == torch.float16
    assert painter.draw(PICTURES).isfinite().all()


# -- pictures that are not finite -----------------------------------------------------------------------------


def test_a_picture_that_overflows_is_named_with_the_remedy(export, tmp_path, run_script):
    folder = overflowing(export, tmp_path / "large", force_upcast=False)
    said = (
        r"00001-seed0.png \('a'\): .*large/vae: the decoded pictures are not finite \(2 of 2 in float16\); use --dtype"
    )
    with pytest.raises(NonFiniteError, match=said):
        painter_of(folder, torch.float16).draw(PICTURES)
    common = (folder, "--prompt", "a", "--device", "cpu", "--out", tmp_path / "out")
    code, _, error = run_script("sample", *common, "--dtype", "float16")
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert code == 1
    assert "use --dtype float32" in line
    assert not (tmp_path / "out").exists()
    assert run_script("sample", *common)[0] == 0


def test_infinity_is_not_clamped_to_white(export, tmp_path):
    """The last layer alone overflows: no NaN anywhere."""
    folder = overflowing(export, tmp_path / "white", force_upcast=False, factor=1.0)
    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_out.bias"][:] = 7e4
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(NonFiniteError, match="the decoded pictures are not finite"):
        painter_of(folder, torch.float16).draw(PICTURES)
    assert painter_of(folder, torch.float32).draw(PICTURES).eq(1).all()


@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_teachers_vae_of_an_upgrade_is_watched_too(force_upcast, export, sd_folder, flux_folder, tmp_path):
    teacher = overflowing(flux_folder, tmp_path / "teacher", force_upcast=force_upcast)
    spaces = load_space(sd_folder), load_space(teacher)
    bridge = Bridge.create(*spaces, BridgeConfig(projector="mlp", embed_dim=8)).save(tmp_path / "bridge")
    upgrade = find_upgrade(Export(export, "x"), str(bridge), str(teacher), str(sd_folder))
    painter = painter_of(export, torch.float16, upgrade)
    if force_upcast:
        assert painter.draw(PICTURES).std() > 0.01
    else:
        with pytest.raises(NonFiniteError, match="teacher/vae: the decoded pictures are not finite"):
            painter.draw(PICTURES)


def test_an_evaluation_draws_nothing_of_it(export, tmp_path):
    folder = overflowing(export, tmp_path / "large", force_upcast=False)
    drawing = Drawing(Subject(name="large", folder=str(folder), start_timestep=999), "cpu", "float16")
    files = [str(tmp_path / "pictures" / picture.file_name) for picture in PICTURES]
    with pytest.raises(NonFiniteError, match="00001-seed0.png"):
        drawing(PICTURES, files)
    assert not any(Path(file).exists() for file in files)


@pytest.fixture(scope="module")
def damaged(sd_folder, flux_folder, tmp_path_factory) -> dict[str, Path]:
    """Copies of a student and a teacher whose decoder makes NaN in any precision."""
    root = tmp_path_factory.mktemp("damaged")
    folders = {"student": sd_folder, "teacher": flux_folder}
    return {role: overflowing(folder, root / role, factor=float("nan")) for role, folder in folders.items()}


def test_what_a_run_draws_is_watched(damaged):
    """Its curves, alarms, grids and tables; its VAEs run in float32, so no other precision is advised."""
    config = load(CONFIGS / "shapes.yaml", ["evaluation.judge=null", "evaluation.grid=2"])
    fixed = FixedPrompts(PromptSet(["a", "b"], [1, 2]), 2, 0)
    student, teacher = load_space(damaged["student"]), load_space(damaged["teacher"])
    evaluator = StudentEvaluator(student, fixed, config.evaluation, "cpu")
    with pytest.raises(
        NonFiniteError, match=r"student/vae: .* \(2 of 2 in float32\); its weights are damaged"
    ) as found:
        evaluator.draw(student.load_network(), 999)
    assert found.value.count == 2

    class Drawn:
        def __init__(self, noise, *_):
            self.noise = noise

        def result(self, check_finite):
            return self.noise

    with pytest.raises(NonFiniteError, match="teacher/vae: .*its weights are damaged"):
        draw_teacher(Drawn, teacher, fixed, config, 1.0)


def test_latents_are_blamed_where_they_are_the_cause(sd_folder):
    space, latents = load_space(sd_folder), torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"the latents that go into .*/vae are not finite \(1 of 3 in") as found:
        space.decode(space.load_vae(), latents)
    assert found.value.rows == [1]


def test_a_row_whose_picture_is_not_finite_fails_alone(sd_folder, flux_folder):
    """The others are what they are without it, to the bit; no preview of it counts."""
    teacher, student = load_space(flux_folder), load_space(sd_folder)
    encoder = PairEncoder(teacher, student)
    latents = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    batch = {"row": np.arange(3), "latents": latents.numpy(), "failure": np.array(["", "", "no text"], dtype=object)}
    good = encode_rows(encoder, batch)
    latents = latents.clone()
    latents[1:] = 3e38  # finite, but what the decoder makes of it is not
    found = encode_rows(encoder, batch | {"latents": latents.numpy()})
    assert found["failure"].tolist() == ["", "the decoded picture is not finite", "no text"]
    for name in ("z_T", "z_S"):
        assert np.array_equal(found[name][0], good[name][0])
        assert np.isfinite(found[name]).all()


@pytest.mark.full
def test_a_job_that_meets_it_ends_with_one_line(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("raydistill.driver.cluster.connected", contextlib.nullcontext)  # no Ray is needed
    monkeypatch.setattr("raydistill.driver.room.check_cluster", lambda *_: None)

    def stages(*_):
        raise NonFiniteError("x/vae: the decoded pictures are not finite (1 of 1 in float32); its weights are damaged")

    overrides = [f"storage={tmp_path}", "run.name=mine"]
    assert run_job("purpose", Job(run=stages, result="summary.json"), overrides) == 1
    error = capfd.readouterr().err
    assert "error: x/vae: the decoded pictures are not finite (1 of 1 in float32); its weights are damaged\n" in error
    assert "Traceback" not in error
