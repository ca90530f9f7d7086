"""Students whose network is no plain SD UNet: SDXL's small relatives, PixArt-alpha and -Sigma, Sana.

Tiny random pipelines of the real classes. References: diffusers' own network called by hand in float64, and its pipeline.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import tiny_diffusion_pipelines as tiny
import tiny_flow_pipelines as flow
import torch
from export_students import ONE_STEP
from lanes import full_but
from student_updates import PROMPTS, distiller, stepped

from raydistill.bridge.model import reach
from raydistill.config.reading import load
from raydistill.data.encode import TextEncoder
from raydistill.diffusion.noise import normal
from raydistill.distillation.networks import adapted
from raydistill.errors import InputError
from raydistill.evaluation.subject import find_subject, load_painter
from raydistill.export.lora import write_lora
from raydistill.export.merge import merge_students, open_sources, shares_of
from raydistill.export.pipeline import ModelCard, export_student, how_to_draw
from raydistill.export.source import Export, open_one_step
from raydistill.pictures.picture import Picture
from raydistill.planning.counting import count_trainer
from raydistill.spaces import load_space, load_student_space
from raydistill.spaces.adapter import add_lora, merged_state
from raydistill.spaces.meta import open_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.spaces.published_students import load_student, open_student
from raydistill.spaces.settings import Settings
from raydistill.spaces.starts import check_lora, load_start

SAVERS = {
    "ssd_1b": tiny.save_ssd_1b,
    "vega": tiny.save_vega,
    "pixart_sigma": tiny.save_pixart,
    "pixart_alpha": tiny.save_pixart_alpha,
    "sana": flow.save_sana,
}
STARTS = {"ssd_1b": 999, "vega": 399, "pixart_sigma": 400, "pixart_alpha": 400, "sana": 999}


@pytest.fixture(scope="module", params=full_but(SAVERS, "pixart_alpha", "sana"))
def made(request, tmp_path_factory):
    """A student of the family, and its export."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    space = load_student_space(SAVERS[name](root / "base"))
    network, start = space.load_network(), STARTS[name]
    card = ModelCard(
        teacher="shapes:flux", teacher_class="FluxPipeline", student="base", student_class=space.pipeline_class, steps=1
    )
    folder = export_student(space, network, start, root / "mine" / "export", card, torch.float32)
    noise = torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(5))
    text = TextEncoder(space).encode(PROMPTS)
    with torch.no_grad():
        latents = one_step_x0(space, network, noise, text, start)
    return SimpleNamespace(name=name, space=space, network=network, start=start, noise=noise, text=text,
                           latents=latents, card=card, export=Export(folder, "mine"))  # fmt: skip


def prediction_by_hand(space, network, noise, start):
    """diffusers' pipeline encodes the prompts and its network predicts, in float64, from plain noise."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(space.folder)
    side, plain = space.resolution, {"do_classifier_free_guidance": False}
    t_B = torch.full((2,), start)
    if space.network_name == "unet":
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", **plain)
        sizes = {"text_embeds": pooled.double(), "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * 2)}
        return network(noise, start, embeds.double(), added_cond_kwargs=sizes).sample
    embeds, mask, _, _ = pipe.encode_prompt(PROMPTS, device="cpu", **plain, **_instruction(space))
    none = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if "PixArt" in space.pipeline_class else {}
    given = {"encoder_hidden_states": embeds.double(), "encoder_attention_mask": mask, "timestep": t_B}
    return network(noise, **given, **none).sample[:, : noise.shape[1]]


def _instruction(space):
    """Sana's pipeline puts it before a prompt when it is called, and `encode_prompt` alone does not."""
    call = inspect.signature(getattr(diffusers, space.pipeline_class).__call__).parameters
    return {n: call[n].default for n in ("complex_human_instruction", "max_sequence_length") if n in call}


def test_the_step_is_diffusers_network_by_hand(made):
    with torch.no_grad():
        own = made.space.load_network().double()
        noise = made.noise.double()
        prediction = prediction_by_hand(made.space, own, noise, made.start)
    if made.name == "sana":
        wanted = noise - made.start / 1000 * prediction
    else:
        config = json.loads(Path(made.space.folder, "scheduler", "scheduler_config.json").read_text())
        first, last = config["beta_start"], config["beta_end"]
        if config["beta_schedule"] == "scaled_linear":
            betas = [(first**0.5 + (last**0.5 - first**0.5) * i / 999) ** 2 for i in range(made.start + 1)]
        else:
            betas = [first + (last - first) * i / 999 for i in range(made.start + 1)]
        alpha_bar = math.prod(1 - beta for beta in betas)
        wanted = (noise - math.sqrt(1 - alpha_bar) * prediction) / math.sqrt(alpha_bar)
    assert prediction.std() > 0.05
    assert (made.latents - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def drawn(folder, made):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"latents": made.noise, "output_type": "latent"} | ONE_STEP | dict(made.space.call_arguments)
    return pipe, pipe(PROMPTS, **call).images


def test_the_export_is_the_familys_own_folder_and_draws_the_latents(made):
    pipe, latents = drawn(made.export.folder, made)
    assert type(pipe).__name__ == made.space.pipeline_class
    assert pipe.scheduler.timesteps.tolist() == [made.start]
    torch.testing.assert_close(latents, made.latents, rtol=1e-4, atol=1e-4 * made.latents.abs().max().item())
    assert open_one_step(made.export)[1] == made.start
    assert not load_space(made.space.folder).draws_at_once
    words = made.space.student_noun
    card = (made.export.folder / "README.md").read_text()
    assert f"A {words} that draws in **one** network evaluation" in card
    assert f"from diffusers import {made.space.pipeline_class}\n" in card
    assert all(f"{name}={value}" in card for name, value in made.space.call_arguments.items())
    assert ("UNet" in card.partition("## Licence")[0]) == words.endswith("UNet")
    assert how_to_draw(made.export.folder).startswith("num_inference_steps=1, guidance_scale=0")
    assert ("clean_caption=False" in how_to_draw(made.export.folder)) == made.name.startswith("pixart")
    left = {part.name for part in made.export.folder.iterdir() if part.is_dir()}
    assert left == {*made.space.student_parts, made.space.network_name, "scheduler"}


def test_a_sana_student_may_start_anywhere():
    """Its single sigma is start / N, which the export's scheduler says of itself."""
    space = open_space("Efficient-Large-Model/Sana_600M_512px_diffusers")
    x_t, velocity = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for start in (1, 250, 613, 998, 999):
        scheduler = space.one_step_scheduler(start)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [start]
        x0 = scheduler.step(velocity, scheduler.timesteps[0], x_t).prev_sample
        torch.testing.assert_close(x0, x_t - start / 1000 * velocity, rtol=1e-5, atol=1e-5)
        assert space.start_of(Settings(scheduler.config)) == start
    for outside in (0, 1000):
        with pytest.raises(InputError, match=r"is outside 1 … 999"):
            space.one_step_scheduler(outside)


def test_its_weights_are_a_start_with_every_buffer(made):
    found = load_student(made.space, made.export.folder)
    assert type(found) is type(made.network)
    checkpoint = open_student(made.space, made.export.folder)
    assert (checkpoint.start_timestep, checkpoint.start_source) == (made.start, "its scheduler")
    assert open_student(made.space, Path(made.space.folder)).start_timestep is None
    wanted = dict(made.network.state_dict()) | dict(made.network.named_buffers())
    held = dict(found.state_dict()) | dict(found.named_buffers())
    assert held.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in held.items())


def test_a_start_is_told_by_its_class_also_under_the_older_name(made, tmp_path):
    """PixArt's published transformers are named Transformer2DModel, which diffusers maps to their class."""
    part = made.space.network_name
    folder = Path(shutil.copytree(made.export.folder / part, tmp_path / part))
    config = json.loads((folder / "config.json").read_text())
    if "pixart" in made.name:
        (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
        assert open_student(made.space, folder).start_timestep is None
    other = "UNet2DConditionModel" if part == "transformer" else "SanaTransformer2DModel"
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": other}))
    with pytest.raises(InputError, match=f"is a {other}, but a {type(made.network).__name__} is needed"):
        open_student(made.space, folder)


@pytest.mark.full
@pytest.mark.parametrize("made", ["pixart_alpha", "sana"], indirect=True)
def test_a_plan_counts_it_without_weights(made, diffusion_folders):
    config = load(overrides=[f"student.start_timestep={made.start}", "distill.batch_size=2", "bridge.embed_dim=16",
                             "bridge.depths=[1]", "bridge.heads=2", "distill.micro_batches=1"])  # fmt: skip
    student, teacher = open_space(made.space.folder), open_space(str(diffusion_folders["sdxl"]))
    counted = count_trainer(config, student, teacher)
    assert counted.gradients["student"] == 4 * sum(p.numel() for p in made.network.parameters())
    assert counted.weights.student == 2 * counted.gradients["student"]  # with its average
    assert 0 < counted.make.flops < counted.student.flops


def test_means_and_painters_read_the_export(made, tmp_path):
    subject = find_subject(str(made.export.folder), tmp_path)
    painter = load_painter(subject, "cpu", torch.float32)
    ours = painter.latents([Picture(i, i, prompt, 3) for i, prompt in enumerate(PROMPTS)])
    noise = torch.cat([normal(3, [i], made.space.latent_shape, "sample") for i in range(2)])
    with torch.no_grad():
        wanted = one_step_x0(made.space, made.network, noise, made.text, made.start)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    other = made.space.load_network()
    name, weight = next((n, p) for n, p in other.named_parameters() if n.endswith("to_q.weight"))
    weight.data += 1
    export_student(made.space, other, made.start, tmp_path / "other", made.card, torch.float32)
    merge_students(open_sources([made.export, Export(tmp_path / "other", "b")]), shares_of(None, 2), tmp_path / "mean")
    mean = load_student(made.space, tmp_path / "mean").state_dict()
    torch.testing.assert_close(mean[name], made.network.state_dict()[name] + 0.5)
    assert made.space.student_noun in (tmp_path / "mean" / "README.md").read_text()


# -- a run's updates --------------------------------------------------------------------------------------------


def test_updates_move_all_of_it_and_a_resumed_run_has_the_same_bits(made, diffusion_folders):
    teacher = load_space(diffusion_folders["sdxl"])
    assert reach(made.space, teacher, prior=True) == (0, 1)
    settings = (f"student.start_timestep={made.start}", "student.lr=1e-3", "distill.gradient_checkpointing=true")
    first = stepped(distiller(made.space, teacher, *settings), teacher, 1)
    kept = copy.deepcopy(first.state_dict())
    stepped(first, teacher, 1)
    later = distiller(made.space, teacher, *settings)
    for _ in range(2):  # what the first update took: a batch of the fake score, and the student's
        next(later.batches.source)
    later.load_state_dict(kept)
    stepped(later, teacher, 1)
    begun = made.space.load_network().state_dict()
    ours, theirs = (worker.networks.student.state_dict() for worker in (first, later))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    still = [name for name, p in made.network.named_parameters() if torch.equal(ours[name], begun[name])]
    assert not still, still


# -- LoRAs ------------------------------------------------------------------------------------------------------


def test_a_lora_is_exported_as_one_or_refused_where_diffusers_loads_none(made, tmp_path):
    config = load(overrides=["student.kind=lora", "student.rank=2"])
    if not made.space.takes_lora:
        for act in (
            lambda: adapted(config, made.space, made.space.load_network()),
            lambda: write_lora(made.export, made.space, "base", 0.99, tmp_path),
        ):
            with pytest.raises(InputError, match=f"diffusers' {made.space.pipeline_class} loads no LoRA"):
                act()
        return
    network = made.space.load_network()
    add_lora(network, 2, made.space.lora_targets)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    folder = export_student(made.space, network, made.start, tmp_path / "export", made.card, torch.float32)
    _, merged = drawn(folder, made)
    with torch.no_grad():
        wanted = one_step_x0(made.space, network, made.noise, made.text, made.start)
    assert (wanted - made.latents).abs().mean() > 1e-3
    torch.testing.assert_close(merged, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    pipe, _ = drawn(made.export.folder, made)
    pipe.load_lora_weights(folder / "lora")
    call = {"latents": made.noise, "output_type": "latent"} | ONE_STEP | dict(made.space.call_arguments)
    torch.testing.assert_close(pipe(PROMPTS, **call).images, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert "merged into" in check_lora(made.space, str(folder / "lora"))
    start = load_start(made.space, None, str(folder / "lora")).state_dict()
    torch.testing.assert_close(dict(start), merged_state(network), rtol=1e-5, atol=1e-5)
