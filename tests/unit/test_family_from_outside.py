"""A family from outside the package: registered by one call, then planned, checked, sampled, bridged and distilled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from aura_flow_family import AuraFlowSpace
from pair_sets import load_pairs
from raydistill.config.networks import AttentionConfig
from test_bridge_attention import inputs_of
from tiny_aura_flow import CHANNELS, PIXELS, SIDE, install, save_aura_flow

from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.trainer import build_trainer
from raydistill.config.reading import load
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.distillation.local import local_distillation
from raydistill.distillation.schedule import distillation_step
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError
from raydistill.export.licences import licence_of
from raydistill.planning.counting import count_run
from raydistill.planning.gpus import known_gpus
from raydistill.planning.memory import check_launch
from raydistill.planning.report import details
from raydistill.spaces import FAMILIES, Space, load_space, register
from raydistill.spaces.flow import FlowSpace

TESTS = Path(__file__).parents[1]
PROMPTS = ["a small red circle at the left on a white background", "a large blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_aura_flow(tmp_path_factory.mktemp("aura"))


@pytest.fixture(scope="module")
def configure(folder, sd_folder):
    """`configure(*overrides)`: the pair of this teacher and a small SD 1.5."""

    def configure(*overrides: str):
        small = [
            "bridge.embed_dim=16",
            "bridge.depths=[1]",
            "bridge.heads=2",
            "fake_score.rank=2",
            "teachers.dtype=float32",
        ]
        sizes = ["bridge.batch_size=4", "distill.batch_size=2", "discriminator.width=8"]
        return load(overrides=[f"teacher.model={folder}", f"student.model={sd_folder}", "student.unet=null", *small, *sizes, *overrides])  # fmt: skip

    return configure


def noise(rows: int = 2) -> torch.Tensor:
    """The same noise in every row, so that only prompts tell the rows apart."""
    return torch.randn(1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(4)).repeat(rows, 1, 1, 1)


def test_sampling_equals_the_pipeline(folder):
    space = load_space(folder)
    assert type(space) is AuraFlowSpace
    text = space.load_text()
    with torch.no_grad():
        conditioning, empty = space.encode_prompts(text, PROMPTS), space.encode_prompts(text, [""])
        latents = space.sample(space.load_network(), noise(), conditioning, space.unconditional(empty), 4, 3.0)
        pictures = space.decode(space.load_vae(), latents)
    pipe = diffusers.AuraFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def theirs(output_type):
        return pipe(
            PROMPTS, guidance_scale=3.0, num_inference_steps=4, latents=noise(), height=PIXELS, width=PIXELS,
            output_type=output_type,
        ).images  # fmt: skip

    torch.testing.assert_close(latents, theirs("latent"), rtol=0, atol=1e-4)
    torch.testing.assert_close(pictures, theirs("pt") * 2 - 1, rtol=0, atol=1e-3)
    assert (latents[0] - latents[1]).abs().max() > 0.02  # the prompt matters
    assert {name: (value.shape[1:], value.dtype) for name, value in conditioning.items()} == space.conditioning_layout


def test_attention_maps_equal_attention_by_hand(folder):
    """In joint blocks, which norm image tokens alone, and in single ones, which see text first."""
    space, generator = load_space(folder), torch.Generator().manual_seed(0)
    network = space.load_network(torch.float64)
    x_t = torch.randn(2, CHANNELS, SIDE, SIDE, generator=generator, dtype=torch.float64)
    conditioning = {"prompt_embeds": torch.randn(2, 7, 64, generator=generator, dtype=torch.float64)}
    t_B, rows = torch.tensor([0.001, 0.4], dtype=torch.float64), sample_rows(0, 0, 10)
    probe = AttentionProbe(space, network, AttentionConfig(layers=100, depth_fraction=0.6, temperature=3.0))
    maps = probe.maps(x_t, t_B, conditioning, rows)
    modules = [block.attn for block in space.blocks(network)]
    inputs = inputs_of(space, network, modules, x_t, t_B, conditioning)
    assert len(maps) == 3
    assert len(space.blocks(probe.network)) == 3
    for layer, log_p in enumerate(maps):
        image = inputs[layer][:, -16:]
        q, k = (
            torch.nn.functional.layer_norm((image @ w.weight.T).unflatten(-1, (2, 16)), (16,), eps=1e-5).transpose(1, 2)
            for w in (modules[layer].to_q, modules[layer].to_k)
        )
        logits = q[:, :, rows(layer, 16)] @ k.transpose(2, 3) / 4
        variance, mean = torch.var_mean(logits, -1, correction=0, keepdim=True)
        expected = ((logits - mean) / (variance + 1e-6).sqrt() / 3).log_softmax(-1)
        assert torch.allclose(log_p, expected, atol=2e-5)  # diffusers normalises in float32
        assert expected.std() > 0.1


def test_a_plan_counts_it(configure):
    config = configure("bridge.checkpoint=null", "distill.gradient_checkpointing=true")
    text = details(count_run(config), config, known_gpus(config))
    assert "AuraFlowPipeline teaches" in text
    parameters = sum(p.numel() for p in load_space(config.teacher.model).load_network().parameters())
    assert re.search(rf"^  teacher +{parameters:,}$", text, re.MULTILINE)
    assert licence_of("fal/AuraFlow-v0.3", "AuraFlowPipeline").name == "Apache License 2.0"


def test_a_launch_check_with_gpus_counts_it(configure):
    gpus = ["teachers.gpus_per_rank=1", "distill.gpus_per_worker=1", "prompts.gpus_per_encoder=1"]
    lines = check_launch(configure("bridge.checkpoint=null", *gpus))
    assert all(line.startswith("fits: ") for line in lines)
    assert {line.split(":")[1].strip() for line in lines} == {
        "trainer", "teacher rank", "Bridge training", "text encoder",
    }  # fmt: skip


def test_synthesis_a_bridge_with_attention_and_an_update(configure, folder, sd_folder, tmp_path):
    teacher, student, pairs, bridge = load_space(folder), load_space(sd_folder), tmp_path / "pairs", tmp_path / "bridge"
    recipe = Recipe(
        teacher=teacher, student=student, source=PromptSet(PROMPTS),
        count=12, batch_size=6, shard_size=12, steps=2, guidance_scale=2.0, seed=0,
    )  # fmt: skip
    made = synthesise(recipe, pairs, LocalTeacher(teacher, teacher.load_network()), progress=False)
    assert made == 12
    assert load_pairs(pairs).z_teacher.std() > 0.01

    trainer = build_trainer(
        configure("bridge.attention.weight=1", "bridge.lr=1e-3", "bridge.validation_share=0.3"), pairs
    )
    losses = [trainer.step(trainer.objective.batch(step)) for step in range(3)]
    assert all(values["loss/attention"] > 0 for values in losses)
    trainer.bridge.save(bridge, {"step": 3})

    distiller, scores = local_distillation(configure(f"bridge.checkpoint={bridge}", f"discriminator.real_data={pairs}"))
    networks = distiller.networks
    parts = {"student": networks.student, "fake score": networks.fake, "discriminator": networks.discriminator}
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    distillation_step(distiller, scores, fake_updates=1, overlap=False)
    for name, part in parts.items():
        after = list(part.parameters())
        assert all(p.isfinite().all() for p in after), name
        assert any(not torch.equal(p, q) for p, q in zip(after, before[name], strict=True)), name


# -- how processes learn of it -----------------------------------------------------------------------------


def test_a_process_that_never_registered_it_finds_the_installed_package(folder, tmp_path):
    code = (
        "import sys; from raydistill.spaces import InputError, load_space\n"
        "try: load_space(sys.argv[1])\n"
        "except InputError as error: print(error)\n"
        "sys.path.append(sys.argv[2]); print(type(load_space(sys.argv[1])).__name__)\n"
    )
    site = install(tmp_path / "site")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(site)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    unknown, found = done.stdout.splitlines()
    assert "AuraFlowPipeline is not a known family" in unknown
    assert "entry point AuraFlowPipeline in the group raydistill.families" in unknown
    assert found == "AuraFlowSpace"


def test_a_run_refuses_a_family_that_only_the_driver_knows(configure, tmp_path, monkeypatch):
    """Before a GPU is held: the teacher's ranks could not open the folder."""
    config = configure(f"storage={tmp_path}", "bridge.checkpoint=null", "evaluation.judge=null")
    message = r"AuraFlowPipeline is registered in this process alone.*is aura_flow_family:AuraFlowSpace"
    with pytest.raises(InputError, match=message):
        check_inputs(config)
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    with pytest.raises(InputError, match=r"column z_T has shape"):  # the embedded FLUX's samples: a later check
        check_inputs(config)


def test_an_incomplete_or_a_second_family_is_refused():
    with pytest.raises(TypeError, match=r"Half: a family must say its conditioning_layout, .*pipeline_class"):

        @register
        class Half(FlowSpace):
            pass

    with pytest.raises(
        ValueError, match=r"AuraFlowPipeline: .*Other cannot be registered, since aura_flow_family\.AuraFlow"
    ):

        @register
        class Other(AuraFlowSpace):
            pass

    assert FAMILIES["AuraFlowPipeline"] is AuraFlowSpace
    assert issubclass(AuraFlowSpace, Space)


def test_an_entry_point_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    site = install(tmp_path / "site")
    entries = site / "aura_flow_family-1.0.dist-info" / "entry_points.txt"
    entries.write_text(
        entries.read_text().replace("AuraFlowPipeline = aura_flow_family", "LostPipeline = no_such_module")
    )
    (tmp_path / "model_index.json").write_text('{"_class_name": "LostPipeline"}')
    monkeypatch.syspath_prepend(site)
    with pytest.raises(InputError, match=r"^entry point LostPipeline = no_such_module:AuraFlowSpace .*No module named"):
        load_space(tmp_path)
