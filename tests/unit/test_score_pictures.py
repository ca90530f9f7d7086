"""Pictures of what teacher and fake score make of the student's: of one noised latent, and without touching a number."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet
from raydistill.distillation.local import LocalScores
from raydistill.distillation.networks import load_unet
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.evaluation.consistency import TeacherDecoder
from raydistill.evaluation.evaluator import FixedPrompts
from raydistill.evaluation.score_pictures import ROWS, ScorePictures
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.workers.distill import DistillationRun

CAPTIONS = [f"a {color} circle" for color in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def spaces():
    student, teacher = load_space(WEIGHTS / "sd15"), load_space(WEIGHTS / "flux")
    return student, teacher, [PromptTable(space, [*CAPTIONS, ""]) for space in (student, teacher)]


@pytest.fixture
def build(spaces):
    """A Distiller of the shipped models without a GAN, its teacher, and the pictures of three prompts."""
    return lambda: build_one(*spaces)


@pytest.fixture
def built(build):
    return build()


def build_one(student, teacher, tables):
    config = load(
        overrides=["discriminator.weight=0", "distill.batch_size=4", "distill.micro_batches=2", "fake_score.updates=1"]
    )

    def batches():
        for slot in itertools.count():
            ids = range(4 * slot, 4 * slot + 4)
            texts = [CAPTIONS[i % 3] for i in ids]
            yield {"sample_id": list(ids)} | {
                f"{role}.{name}": value.numpy()
                for role, table in zip(("student", "teacher"), tables, strict=True)
                for name, value in table(texts).items()
            }

    distiller = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=load_unet(student, config.student.unet),
        bridge=Bridge.load(WEIGHTS / "bridge" / "sd15-flux", student, teacher),
        fake_network=teacher.load_network(),
        source=batches(),
    )
    scores = LocalScores(teacher, teacher.load_network(), tables[1]([""]), 3.0)
    fixed = FixedPrompts(PromptSet(CAPTIONS), 3, seed=5)
    conditioning = [table(fixed.captions) for table in tables]
    decoder = TeacherDecoder(teacher, distiller.networks.device)
    pictures = ScorePictures(
        config, distiller.networks, fixed, decoder, student=conditioning[0], teacher=conditioning[1]
    )
    return distiller, scores, pictures


def rows_of(pictures, scores, networks):
    parts = pictures.make()
    fake = [networks.x0_fake(part.x_t, part.t_B, part.teacher_conditioning) for _, part in parts]
    return [torch.cat(row) for row in ([x for x, _ in parts], [scores(part).result() for _, part in parts], fake)]


def test_a_fake_score_that_has_learned_nothing_is_the_teacher_without_guidance(built):
    """So the two rows are of one noised latent, time and caption each; a new fake score is the teacher's copy."""
    distiller, scores, pictures = built
    unguided = LocalScores(scores.space, scores.network, scores.unconditional, 1.0)
    x, real, fake = rows_of(pictures, unguided, distiller.networks)
    torch.testing.assert_close(real, fake, rtol=1e-4, atol=1e-4)
    guided = rows_of(pictures, scores, distiller.networks)[1]
    assert (guided - fake).abs().mean() > 1e-3
    least = (real - x).abs().mean((1, 2, 3))
    assert least[0] < least[-1], "with less noise, more of the student's picture is left"


def test_the_pictures_are_drawn_in_columns_with_their_times(built):
    distiller, scores, pictures = built
    t = pictures.t_B
    assert len(t) == 3
    assert (t.diff() > 0).all()
    vsd = distiller.config.vsd
    assert vsd.t_min < t[0]
    assert t[-1] < vsd.t_max
    sheet = pictures.picture(rows_of(pictures, scores, distiller.networks), step=7)
    assert sheet.width > 3 * 128
    assert sheet.height > len(ROWS) * 128
    assert next(pictures.decoder._vae.parameters()).device.type == "cpu", "it waits in main memory"


def test_they_are_the_same_at_every_evaluation_and_change_no_number(build):
    trained = []
    for shows in (False, True):
        distiller, scores, pictures = build()
        for _ in range(2):
            distillation_step(distiller, scores, 1, overlap=True)
            if shows:
                first, again = (rows_of(pictures, scores, distiller.networks) for _ in range(2))
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
                pictures.picture(first, step=1)
        trained.append(distiller.networks.state_dict())
    for part in ("student", "fake"):
        for name, value in trained[0][part].items():
            assert torch.equal(value, trained[1][part][name]), name


def test_no_update_is_blamed_for_what_is_not_finite_in_a_picture(built):
    """They are shown, black where they must be, and the notes of the updates are as they were."""
    distiller, scores, pictures = built
    run, shown = object.__new__(DistillationRun), []
    run.config, run.distiller, run.teachers = distiller.config, distiller, scores
    run.observer = SimpleNamespace(score_pictures=pictures, show_scores=lambda step, rows: shown.append(rows))
    for network in (distiller.networks.student, distiller.networks.fake.network):
        next(network.parameters()).data.fill_(float("nan"))
    distiller.finite.note(torch.ones(1), "what an update has noted")
    run._show_scores(distiller.config.distill.steps)
    assert shown
    assert not shown[0][2].isfinite().all()
    assert distiller.finite.look() == []


def test_a_gpu_without_room_leaves_the_decoding_to_the_processor(built, capsys, monkeypatch):
    distiller, _, pictures = built
    space, decode, asked = distiller.networks.teacher_space, type(distiller.networks.teacher_space).decode_each, []

    def full_at_first(vae, latents):
        asked.append(len(latents))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(space, vae, latents)

    monkeypatch.setattr(space, "decode_each", full_at_first)
    latents = torch.zeros(3, *space.latent_shape)
    assert pictures.decoder(latents).shape == (3, 3, space.resolution, space.resolution)
    assert asked == [1] * 5
    assert "evaluation: the teacher's VAE has no room on the GPU" in capsys.readouterr().out
    pictures.decoder(latents)
    assert capsys.readouterr().out == ""
