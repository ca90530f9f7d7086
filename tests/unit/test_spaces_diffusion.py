"""SDXL, Kolors and PixArt-Sigma against diffusers' own pipelines, on tiny random networks of the real classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_diffusion_pipelines as tiny
import torch

from raydistill.config.networks import FakeScoreConfig
from raydistill.data.encode import PromptEncoder, TextEncoder, conditioning
from raydistill.diffusion.path import add_noise
from raydistill.distillation.discriminator import Discriminator
from raydistill.distillation.fake_score import FakeScore
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder
from raydistill.spaces.settings import diffusers_class

FAMILIES = ["sdxl", "kolors", "pixart"]
PROMPTS = ["a small red circle at the left on a white background", "two blue squares"]
# PixArt's pipeline knows the bins of public resolutions only, and cleans captions where optional packages are there.
ARGUMENTS = {"pixart": {"use_resolution_binning": False, "clean_caption": False}}


def noise_for(space, count=2):
    return torch.randn(count, *space.latent_shape, generator=torch.Generator().manual_seed(4))


def pipeline_of(folder):
    pipe = getattr(diffusers, load_space(folder).pipeline_class).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def ours(space, guidance_scale, prompts=PROMPTS, steps=4):
    encoded, empty = TextEncoder(space).encode(prompts), TextEncoder(space).encode_unconditional()
    return space.sample(space.load_network(), noise_for(space), encoded, empty, steps, guidance_scale)


def theirs(folder, guidance_scale, output_type="latent", **arguments):
    space, pipe = load_space(folder), pipeline_of(folder)
    return pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance_scale, latents=noise_for(space),
        output_type=output_type, **arguments,
    ).images  # fmt: skip


def changed_copy(folder, target: Path, file: str, **values) -> Path:
    """A copy of a pipeline folder in which one JSON file says something else."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


# -- against the pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 5.0])  # 0 is no guidance, not the empty prompt
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_equals_the_pipeline(family, guidance_scale, diffusion_folders):
    folder = diffusion_folders[family]
    space, arguments = load_space(folder), ARGUMENTS.get(family, {})
    latents = ours(space, guidance_scale)
    torch.testing.assert_close(latents, theirs(folder, guidance_scale, **arguments), rtol=0, atol=1e-4)
    picture = theirs(folder, guidance_scale, "pt", **arguments) * 2 - 1
    torch.testing.assert_close(space.decode(space.load_vae(), latents), picture, rtol=0, atol=1e-4)
    assert (picture.abs() < 1).float().mean() > 0.8  # clamping hides little


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_guidance_change_the_result(family, diffusion_folders):
    """Otherwise equal latents would prove nothing."""
    space = load_space(diffusion_folders[family])
    latents = ours(space, 5.0)
    assert (latents - ours(space, 5.0, PROMPTS[::-1])).abs().amax(dim=(1, 2, 3)).min() > 1
    assert (latents - ours(space, 1.0)).abs().amax(dim=(1, 2, 3)).min() > 1


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"force_zeros_for_empty_prompt": False}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ],
)
def test_sdxl_folders_that_say_otherwise_still_equal_the_pipeline(file, values, diffusion_folders, tmp_path):
    folder = changed_copy(diffusion_folders["sdxl"], tmp_path / "sdxl", file, **values)
    space = load_space(folder)
    latents, before = ours(space, 5.0), ours(load_space(diffusion_folders["sdxl"]), 5.0)
    torch.testing.assert_close(latents, theirs(folder, 5.0), rtol=0, atol=1e-4)
    picture = theirs(folder, 5.0, "pt") * 2 - 1
    torch.testing.assert_close(space.decode(space.load_vae(), latents), picture, rtol=0, atol=1e-4)
    if not file.startswith("vae"):
        assert (latents - before).abs().max() > 0.1


def test_pixart_with_size_conditions_equals_the_alpha_pipeline(tmp_path):
    """PixArt-Sigma's pipeline passes no sizes; PixArt-Alpha's does at 1024 px, where the transformer asks for them."""
    folder = tiny.save_pixart(tmp_path, sample_size=128, num_layers=1, use_additional_conditions=None)
    space = load_space(folder)
    encoded, empty = TextEncoder(space).encode(PROMPTS[:1]), TextEncoder(space).encode_unconditional()
    assert encoded["resolution"].tolist() == [[512, 512]]
    assert encoded["aspect_ratio"].tolist() == [[1.0]]
    network = space.load_network()
    latents = space.sample(network, noise_for(space, 1), encoded, empty, 2, 4.5)
    pipe = diffusers.PixArtAlphaPipeline(**pipeline_of(folder).components)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS[0], num_inference_steps=2, guidance_scale=4.5, latents=noise_for(space, 1), output_type="latent",
        use_resolution_binning=False, clean_caption=False, max_sequence_length=300,
    ).images  # fmt: skip
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    encoded["resolution"] = encoded["resolution"] // 2
    assert (space.sample(network, noise_for(space, 1), encoded, empty, 2, 4.5) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_the_vaes_own_scaled_by_its_config(family, diffusion_folders):
    space, pipe = load_space(diffusion_folders[family]), pipeline_of(diffusion_folders[family])
    images = torch.rand(2, 3, space.resolution, space.resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = space.encode(space.load_vae(), images)
        there_and_back = pipe.vae(images).sample  # decodes the posterior's mode
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert latents.shape == (2, *space.latent_shape)
    torch.testing.assert_close(decoded, there_and_back, rtol=0, atol=1e-5)
    torch.testing.assert_close(space.decode(space.load_vae(), latents), there_and_back.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_x0_estimates_are_the_schedulers(family, diffusion_folders):
    """Euler and DDIM report pred_original_sample; DPM-Solver++ computes it inside. Over the whole range of times."""
    space = load_space(diffusion_folders[family])
    network, encoded, empty = (
        space.load_network(),
        TextEncoder(space).encode(PROMPTS),
        TextEncoder(space).encode_unconditional(),
    )
    own = space.start_sampling(5)
    ddim = diffusers.DDIMScheduler.from_config(own.config, clip_sample=False)
    ddim.set_timesteps(5)
    x_0, noise = noise_for(space), noise_for(space).flip(0)
    for timestep in own.timesteps:
        t_B = space.path.t_of_timestep(timestep.double()).float().expand(2)
        x_t = add_noise(space.path, x_0, noise, t_B)
        with torch.no_grad():
            prediction = space.predict_guided(network, x_t, t_B, encoded, empty, 3.0)
            estimate = space.predict_x0(network, x_t, t_B, encoded, empty, 3.0)
        expected = [ddim.step(prediction, int(timestep), x_t).pred_original_sample]
        if isinstance(own, diffusers.EulerDiscreteScheduler):
            own._init_step_index(timestep)
            x_sigma = x_t * (own.sigmas[own.step_index] ** 2 + 1).sqrt()  # its latents are x_0 + sigma eps
            expected.append(own.step(prediction, timestep, x_sigma).pred_original_sample)
        else:
            own._init_step_index(timestep)
            expected.append(own.convert_model_output(prediction, sample=x_t))
        for x0 in expected:
            torch.testing.assert_close(estimate, x0, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))


# -- conditioning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_is_what_the_pipeline_encodes(family, diffusion_folders):
    space, pipe = load_space(diffusion_folders[family]), pipeline_of(diffusion_folders[family])
    encoded, empty = TextEncoder(space).encode(PROMPTS), TextEncoder(space).encode_unconditional()
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    if family == "pixart":
        expected = {"prompt_embeds": embeds[0], "prompt_attention_mask": embeds[1]}
        expected_empty = {"prompt_embeds": embeds[2], "prompt_attention_mask": embeds[3]}
    else:
        time_ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.int64, embeds[2].shape[1])
        expected = {"prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[2], "time_ids": time_ids.repeat(2, 1)}
        expected_empty = {"prompt_embeds": embeds[1], "pooled_prompt_embeds": embeds[3], "time_ids": time_ids}
    assert set(encoded) == set(empty) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(encoded[name], value)
        assert empty[name].shape == (1, *value.shape[1:])
        torch.testing.assert_close(empty[name], expected_empty[name][:1])
    assert bool((empty["prompt_embeds"] == 0).all()) == (family == "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_the_conditioning_reaches_the_prediction(family, diffusion_folders):
    space = load_space(diffusion_folders[family])
    network, x_t, t_B = space.load_network(), noise_for(space, 1), torch.tensor([0.6])
    encoded = TextEncoder(space).encode(PROMPTS[:1])
    before = space.predict(network, x_t, t_B, encoded)
    for name, value in encoded.items():
        other = (value + 1) % 2 if name == "prompt_attention_mask" else value * 2
        assert (space.predict(network, x_t, t_B, encoded | {name: other}) - before).abs().max() > 1e-3, name
    assert (space.predict(network, x_t, torch.tensor([0.3]), encoded) - before).abs().max() > 1e-3


def test_conditioning_travels_as_columns(diffusion_folders):
    """Integers stay integers: half precision would round a picture's size."""
    encoder = PromptEncoder({"teacher": str(diffusion_folders["sdxl"])}, dtype="bfloat16")
    batch = encoder({"prompt": np.array(PROMPTS, dtype=object)})
    assert batch["teacher.time_ids"].dtype == np.int64
    arrived = conditioning(batch, "teacher")
    assert arrived["prompt_embeds"].dtype == torch.bfloat16
    assert arrived["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_families_without_a_rule_of_their_own_contrast_with_the_empty_prompt(flux_folder, sd_folder, diffusion_folders):
    for folder in (flux_folder, sd_folder, diffusion_folders["pixart"]):
        text = TextEncoder(load_space(folder))
        for name, value in text.encode([""]).items():
            assert torch.equal(text.encode_unconditional()[name], value)


# -- the network's parts ------------------------------------------------------------------------------------


def test_pixarts_learned_variance_is_dropped(diffusion_folders, tmp_path):
    space = load_space(diffusion_folders["pixart"])
    network, x_t, encoded = space.load_network(), noise_for(space), TextEncoder(space).encode(PROMPTS)
    raw = []
    network.register_forward_hook(lambda module, args, output: raw.append(output[0]))
    prediction = space.predict(network, x_t, torch.full((2,), 0.5), encoded)
    assert raw[0].shape == (2, 8, 8, 8)
    assert torch.equal(prediction, raw[0][:, :4])
    plain = load_space(tiny.save_pixart(tmp_path, out_channels=4))  # an option of the class
    assert plain.predict(plain.load_network(), x_t, torch.full((2,), 0.5), encoded).shape == x_t.shape


def test_pixart_loads_under_the_class_name_of_the_public_folders(diffusion_folders, tmp_path):
    """Their config.json was written before the class had a name of its own."""
    folder = changed_copy(
        diffusion_folders["pixart"], tmp_path / "p", "transformer/config.json", _class_name="Transformer2DModel"
    )
    check_folder(load_space(folder))
    assert diffusers_class(load_space(folder).part_config("transformer")) is diffusers.PixArtTransformer2DModel
    network = load_space(folder).load_network()
    assert type(network) is diffusers.PixArtTransformer2DModel
    original = load_space(diffusion_folders["pixart"]).load_network()
    for name, value in original.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_named_layer_and_trains_alone(family, diffusion_folders):
    space = load_space(diffusion_folders[family])
    encoded = TextEncoder(space).encode(PROMPTS)
    x_t, t_B = noise_for(space), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        teacher = space.predict(space.load_network(), x_t, t_B, encoded)
    fake = FakeScore(space, space.load_network(), FakeScoreConfig(rank=4), [0.5])
    trainable = fake.trainable()
    assert trainable
    assert all(".lora_" in name for name in trainable)
    for target in space.lora_targets:
        assert any(f".{target}.lora_" in f".{name}" for name in trainable), target
    if family == "pixart":
        assert any("attn1.to_q" in name for name in trainable)
        assert any("attn2.to_q" in name for name in trainable)
    frozen = {name: p.clone() for name, p in fake.network.named_parameters() if name not in trainable}
    optimizer = torch.optim.SGD(fake.trainable().values(), lr=0.1)
    prediction, _ = fake(x_t, t_B, encoded)
    torch.testing.assert_close(prediction, teacher)  # a new LoRA is zero
    prediction.square().mean().backward()
    assert all(p.grad is not None for p in trainable.values())
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in fake.network.named_parameters() if name in frozen)
    with torch.no_grad():
        assert (fake(x_t, t_B, encoded)[0] - teacher).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth_fraction", [0.0, 0.5, 1.0])
def test_features_are_pictures_that_a_discriminator_can_follow(family, depth_fraction, diffusion_folders):
    space = load_space(diffusion_folders[family])
    fake = FakeScore(space, space.load_network(), FakeScoreConfig(rank=4), [depth_fraction])
    x_t = noise_for(space).requires_grad_()
    (features,) = fake.features(x_t, torch.tensor([0.3, 0.8]), TextEncoder(space).encode(PROMPTS))
    assert features.ndim == 4
    assert features.shape[-2:] == ((4, 4) if family == "pixart" or depth_fraction == 0 else (2, 2))
    Discriminator([features.shape[1]], 64)([features])[0].sum().backward()
    assert x_t.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_pixarts_feature_map_puts_tokens_where_their_patches_are(diffusion_folders):
    space = load_space(diffusion_folders["pixart"])
    embed = space.load_network().pos_embed  # tokens before any mixing
    x_t = noise_for(space, 1)
    changed = x_t.clone()
    changed[:, :, 2:4, 6:8] += 1  # the patch in row 1, column 3
    difference = space.feature_map(embed(changed), x_t) - space.feature_map(embed(x_t), x_t)
    assert difference.abs().sum(dim=(0, 1)).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(("family", "depth_fraction", "index"), [("sdxl", 0.5, 3), ("sdxl", 0.25, 1),
                                                                 ("pixart", 0.5, 1), ("pixart", 1.0, 3)])  # fmt: skip
def test_depth_counts_down_blocks_then_the_middle_and_transformer_blocks(
    family, depth_fraction, index, diffusion_folders
):
    space = load_space(diffusion_folders[family])
    network = space.load_network()
    blocks = network.transformer_blocks if family == "pixart" else [*network.down_blocks, network.mid_block]
    assert space.feature_block(network, depth_fraction) is blocks[index]


# -- folders that are not right ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("missing", "load", "message"),
    [
        ("text_encoder", "load_text", "model_index.json names text_encoder, but there is no such folder"),
        ("tokenizer", "load_text", "model_index.json names tokenizer, but there is no such folder"),
        ("tokenizer/*", "load_text", "tokenizer: no vocabulary"),
        ("text_encoder/model.safetensors", "load_text", "model.safetensors"),
        ("NETWORK/diffusion_pytorch_model.safetensors", "load_network", "diffusion_pytorch_model.safetensors"),
        ("NETWORK", "load_network", "config.json; is it a complete"),
        ("vae", "load_vae", "no vae/config.json"),
        ("scheduler", "scheduler", "no scheduler/config.json"),
    ],
)
def test_missing_parts_are_named(family, missing, load, message, diffusion_folders, tmp_path):
    folder = tmp_path / family
    shutil.copytree(diffusion_folders[family], folder)
    space = load_space(folder)
    for path in list(folder.glob(missing.replace("NETWORK", space.network_name))):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message) as caught:
        _ = space.scheduler if load == "scheduler" else getattr(space, load)()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        ("sdxl", "unet/config.json", {"addition_embed_type": None}, "addition_embed_type is None.*'text_time'"),
        ("kolors", "unet/config.json", {"encoder_hid_dim_type": None}, "encoder_hid_dim_type is None.*'text_proj'"),
        ("pixart", "transformer/config.json", {"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ("pixart", "transformer/config.json", {"out_channels": 5}, "out_channels is 5, but must be 4 or.* 8"),
        ("sdxl", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("sdxl", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr is not supported"),
        ("sdxl", "vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
    ],
)
def test_parts_of_another_family_are_named(family, file, values, message, diffusion_folders, tmp_path):
    space = load_space(changed_copy(diffusion_folders[family], tmp_path / family, file, **values))
    with pytest.raises(InputError, match=message):
        _ = space.latent_shape, space.prediction, space.path, space.scaling


def test_a_flow_scheduler_is_refused(diffusion_folders, tmp_path):
    folder = tmp_path / "sdxl"
    shutil.copytree(diffusion_folders["sdxl"], folder)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        _ = load_space(folder).path


def test_text_encoders_of_another_unet_are_named(diffusion_folders, tmp_path):
    folder = changed_copy(
        diffusion_folders["sdxl"], tmp_path / "sdxl", "unet/config.json", projection_class_embeddings_input_dim=100
    )
    with pytest.raises(InputError, match="pools to 24 channels, but the UNet takes 52"):
        TextEncoder(load_space(folder)).encode(PROMPTS)
