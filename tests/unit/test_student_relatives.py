"""Students with fewer blocks than SD 1.5 (BK-SDM's layouts): drawn, exported, adapted, cut and read as SD 1.5 is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_diffusion_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline
from export_students import ONE_STEP
from lanes import full_but

from raydistill.config.networks import FakeScoreConfig
from raydistill.data.encode import TextEncoder
from raydistill.distillation.fake_score import FakeScore
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.single_file import load_single_file, write_single_file
from raydistill.export.source import Export
from raydistill.spaces import load_space
from raydistill.spaces.adapter import add_lora, trained
from raydistill.spaces.one_step import one_step_x0
from raydistill.spaces.published_students import load_student

PROMPT = "two blue squares"


@pytest.fixture(scope="module", params=full_but(tiny.RELATIVES, "small", "tiny"))
def student(request, tmp_path_factory):
    """A relative, its export, and the latents of one step."""
    root = tmp_path_factory.mktemp(request.param)
    space = load_space(tiny.save_relative(root / "base", request.param))
    unet = space.load_network()
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="nota-ai/bk-sdm-small", steps=1)
    folder = export_student(space, unet, 999, root / "mine" / "export", card, torch.float32)
    noise = torch.randn(1, *space.latent_shape, generator=torch.Generator().manual_seed(3))
    text = TextEncoder(space).encode([PROMPT])
    with torch.no_grad():
        latents = one_step_x0(space, unet, noise, text, 999)
    return SimpleNamespace(space=space, export=Export(folder, "mine"), noise=noise, text=text, latents=latents)


def drawn(pipe, student):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, latents=student.noise, output_type="latent", **ONE_STEP).images


def test_the_export_and_its_single_file_draw_the_students_latents(student, tmp_path):
    own = StableDiffusionPipeline.from_pretrained(student.export.folder)
    torch.testing.assert_close(drawn(own, student), student.latents, rtol=1e-4, atol=1e-3)
    assert write_single_file(student.export, tmp_path) <= 0.01
    one_file, read = load_single_file(tmp_path / "mine.safetensors"), load_student(student.space, student.export.folder)
    torch.testing.assert_close(drawn(one_file, student), student.latents, rtol=1e-4, atol=1e-3)
    for unet in (one_file.unet, read):
        found = unet.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in own.unet.state_dict().items())


def test_it_is_adapted_cut_and_read_as_a_teacher_of_the_shared_space(student):
    space, unet = student.space, student.space.load_network()
    parts = space.large_blocks(unet)
    assert None not in parts
    t_B = torch.full((1,), 0.5)
    fake = FakeScore(space, space.load_network(), FakeScoreConfig(rank=2), [1.0])
    with torch.no_grad():
        prediction, (features,) = fake(student.noise, t_B, student.text)
        torch.testing.assert_close(prediction, space.predict(unet, student.noise, t_B, student.text))
    assert features.shape[1] == unet.config["block_out_channels"][-1]
    cut, attentions = space.attention_reader.cut(unet, 0.5)
    assert 0 < len(attentions) < sum(name.endswith("attn1") for name, _ in unet.named_modules())
    seen = []
    for attention in attentions:
        space.attention_reader.watch(attention, seen.append)
    space.predict(cut, student.noise, t_B, student.text)
    assert len(seen) == len(attentions)
    add_lora(unet, 2, space.lora_targets)
    assert trained(unet)
