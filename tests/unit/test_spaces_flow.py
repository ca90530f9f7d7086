"""SD 3.5, FLUX.1 [dev], FLUX.2 [klein], Z-Image, Chroma, Sana and Qwen-Image against diffusers' own pipelines, and as a fake score."""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
from lanes import full_but
from tiny_flow_pipelines import CHANNELS, LATENT_SIDE, PIXELS, SAVE, SHORT, save_flux2

from raydistill.config.networks import FakeScoreConfig
from raydistill.data.encode import TextEncoder
from raydistill.diffusion.path import to_x0
from raydistill.diffusion.timesteps import shift
from raydistill.distillation.fake_score import FakeScore
from raydistill.errors import InputError
from raydistill.planning.counting import count_text
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder
from raydistill.spaces.flow import as_map
from raydistill.spaces.flux import pack, unpack
from raydistill.spaces.loaded import vae_fingerprint
from raydistill.spaces.meta import open_space

PROMPTS = ["a small red circle at the left on a white background", "a large blue square"]
STEPS = 4
FAMILIES, SHORTER = list(SAVE), full_but(SAVE, *SHORT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


def noise(rows: int = 2) -> torch.Tensor:
    """The same noise in every row, so that only prompts tell the rows apart."""
    one = torch.randn(1, CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(4))
    return one.expand(rows, -1, -1, -1).clone()


@torch.no_grad()
def ours(space, guidance_scale):
    text = space.load_text()
    conditioning, empty = space.encode_prompts(text, PROMPTS), space.encode_prompts(text, [""])
    return space.sample(space.load_network(), noise(), conditioning, space.unconditional(empty), STEPS, guidance_scale)


def theirs(name, folder, guidance_scale, output_type):
    """The pipeline's pictures or latents, as it returns them, from the same noise."""
    pipe = getattr(diffusers, load_space(folder).pipeline_class).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    start, length = {
        "sd3": (noise(), 20),
        "flux-dev": (pack(noise()), 20),
        "flux2": (F.pixel_unshuffle(noise(), 2), 160),
        "z-image": (noise(), 160),
        "chroma": (pack(noise()), 20),
        "sana": (noise(), 300),
        "qwen-image": (pack(noise()), 320),
    }[name]
    given = masked_text(pipe) if name == "chroma" else {"prompt": list(PROMPTS)}
    if name == "sana":
        given |= {"use_resolution_binning": False}
    if name == "qwen-image":  # its guidance_scale is another thing
        given |= {"true_cfg_scale": guidance_scale, "negative_prompt": [" "] * len(PROMPTS)}
        guidance_scale = None
    images = pipe(
        **given,
        guidance_scale=guidance_scale - 1 if name == "z-image" else guidance_scale,  # it counts from 0
        num_inference_steps=STEPS,
        latents=start,
        max_sequence_length=length,
        height=PIXELS,
        width=PIXELS,
        output_type=output_type,
    ).images
    packed = name in ("flux-dev", "chroma", "qwen-image") and output_type == "latent"
    return unpack(images, LATENT_SIDE, LATENT_SIDE) if packed else images


def masked_text(pipe):
    """What Chroma's pipeline makes of the prompts, with masks that mask."""
    embeds, _, mask, empty, _, empty_mask = pipe.encode_prompt(list(PROMPTS), max_sequence_length=20)
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": empty,
        "negative_prompt_attention_mask": empty_mask.bool(),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_equals_the_pipeline(name, folders):
    space = load_space(folders[name])
    assert space.latent_shape == (CHANNELS, LATENT_SIDE, LATENT_SIDE)
    assert space.resolution == PIXELS
    latents = ours(space, 3.0)
    expected = theirs(name, folders[name], 3.0, "latent")
    # FLUX.2's pipeline returns latents that are ready for the VAE
    found = space.denormalise(latents) if name == "flux2" else latents
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        pictures = space.decode(space.load_vae(), latents)
    torch.testing.assert_close(pictures, theirs(name, folders[name], 3.0, "pt") * 2 - 1, rtol=0, atol=1e-3)
    # The test could not tell a wrong prompt or scale if these did not matter.
    assert (latents[0] - latents[1]).abs().max() > 0.02
    assert (latents - ours(space, 1.0)).abs().max() > 0.02
    assert pictures.std() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_encoding_equals_the_pipeline(name, folders):
    space = load_space(folders[name])
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(6)) * 2 - 1
    vae = space.load_vae()
    with torch.no_grad():
        latents = space.encode(vae, images)
        if name == "sana":  # whose autoencoder has no posterior
            raw = vae.encode(images).latent
            torch.testing.assert_close(latents, raw * vae.config.scaling_factor)
            torch.testing.assert_close(space.posterior(vae, images)[0], raw)
            assert not space.posterior(vae, images)[1].any()
            return
        frames = images[:, :, None] if name == "qwen-image" else images
        posterior = vae.encode(frames).latent_dist
        mean, deviation = (v[:, :, 0] if name == "qwen-image" else v for v in (posterior.mean, posterior.std))
        torch.testing.assert_close(space.denormalise(latents), mean)
        for ours, theirs in zip(space.posterior(vae, images), (mean, deviation), strict=True):
            assert torch.equal(ours, theirs)
        if name == "qwen-image":
            pipe = diffusers.QwenImageImg2ImgPipeline.from_pretrained(folders[name])
            expected = pipe._encode_vae_image(frames, torch.Generator().manual_seed(7))[:, :, 0]
            drawn = torch.randn(
                frames.shape[0], CHANNELS, 1, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(7)
            )
            torch.testing.assert_close(space.normalise(mean + deviation * drawn[:, :, 0]), expected)
            return
        sampled = space.normalise(posterior.sample(torch.Generator().manual_seed(7)))
        generator = torch.Generator().manual_seed(7)
        if name == "flux2":
            pipe = diffusers.Flux2KleinPipeline.from_pretrained(folders[name])
            torch.testing.assert_close(F.pixel_unshuffle(latents, 2), pipe._encode_vae_image(images, generator))
        elif name != "z-image":  # has no such part of its own
            other = {
                "sd3": "StableDiffusion3InpaintPipeline",
                "flux-dev": "FluxImg2ImgPipeline",
                "chroma": "ChromaImg2ImgPipeline",
            }[name]
            pipe = getattr(diffusers, other).from_pretrained(folders[name])
            torch.testing.assert_close(sampled, pipe._encode_vae_image(images, generator))
    assert (latents - mean).abs().max() > 0.05  # the map does something


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_encoded_alike_in_any_company(name, folders):
    """Conditioning has one shape whatever the prompts, so that rows of different batches fit together."""
    space = load_space(folders[name])
    alone, together = (TextEncoder(space, chunk=2).encode(prompts) for prompts in (PROMPTS[:1], PROMPTS))
    for key, value in together.items():
        assert torch.equal(value[:1], alone[key])
        assert not torch.equal(value[0], value[1])


def inputs(space, rows=2):
    """Noised latents, times and conditioning."""
    conditioning = space.encode_prompts(space.load_text(), PROMPTS[:rows])
    generator = torch.Generator().manual_seed(8)
    x_t = torch.randn(rows, *space.latent_shape, generator=generator)
    return x_t, torch.tensor([0.3, 0.8])[:rows], conditioning


@pytest.mark.parametrize("name", SHORTER)
def test_lora_starts_as_the_teacher_and_alone_is_trained(name, folders):
    space = load_space(folders[name])
    x_t, t_B, conditioning = inputs(space)
    network = space.load_network()
    modules = [module for module, _ in network.named_modules()]
    for target in space.lora_targets:
        assert any(module == target or module.endswith(f".{target}") for module in modules), f"{target} matches nothing"
    with torch.no_grad():
        teacher = space.predict(network, x_t, t_B, conditioning)
    fake = FakeScore(space, network, FakeScoreConfig(rank=4), [0.5])
    assert all(".lora_A." in key or ".lora_B." in key for key in fake.trainable())
    prediction, _ = fake(x_t, t_B, conditioning)
    torch.testing.assert_close(prediction, teacher, rtol=0, atol=1e-6)
    frozen = {key: copy.deepcopy(p) for key, p in fake.network.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(fake.trainable().values(), lr=0.01)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        optimizer.zero_grad()
        fake(x_t, t_B, conditioning)[0].square().mean().backward()
        optimizer.step()
    idle = {key for key, p in fake.trainable().items() if p.grad is None or not p.grad.any()}
    assert not {key for key in idle if not unused(key)}
    for key, p in fake.network.named_parameters():
        assert key not in frozen or (p.grad is None and torch.equal(p, frozen[key])), key
    with torch.no_grad():
        assert (fake(x_t, t_B, conditioning)[0] - teacher).abs().max() > 1e-4


def unused(key: str) -> bool:
    """The text side of the last block of SD 3 and Qwen-Image asks nothing: only its keys and values reach the image."""
    text = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")
    return any(f"transformer_blocks.3.{part}" in key for part in text)


@pytest.mark.parametrize("name", SHORTER)
def test_features_are_the_image_tokens_of_their_block(name, folders):
    space = load_space(folders[name])
    x_t, t_B, conditioning = inputs(space)
    network = space.load_network()
    last = FakeScore(space, copy.deepcopy(network), FakeScoreConfig(rank=2), [1.0])
    seen = {}
    output = last.network.all_final_layer["2-1"] if name == "z-image" else last.network.norm_out
    output.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    with torch.no_grad():
        prediction, (features,) = last(x_t, t_B, conditioning)
        assert torch.equal(features.flatten(2).transpose(1, 2), seen["tokens"][:, :16])
        assert prediction.shape == x_t.shape
        found = [features]
        for depth in (0.01, 0.5):
            fake = FakeScore(space, copy.deepcopy(network), FakeScoreConfig(rank=2), [depth])
            found += fake.features(x_t, t_B, conditioning)
            assert torch.equal(found[-1], fake(x_t, t_B, conditioning)[1][0])
    assert all(f.shape == found[0].shape and f.shape[2:] == (4, 4) for f in found)
    assert len({float(f.sum()) for f in found}) == 3


@pytest.mark.parametrize("left_out", [None, [None, None]])
def test_sd3_without_t5_samples_as_the_pipeline_does(left_out, folders, tmp_path):
    """People leave T5 out to save memory: diffusers puts zeros in its place."""
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder_3", *(("tokenizer_3",) if left_out else ())):
        shutil.rmtree(folder / part)
        index[part] = left_out
    (folder / "model_index.json").write_text(json.dumps(index))
    space = load_space(folder)
    check_folder(space)
    text = TextEncoder(space)
    encoded, empty = text.encode(PROMPTS[:1]), text.encode([""])
    layout = {name: (tuple(value.shape[1:]), value.dtype) for name, value in encoded.items()}
    assert layout == space.conditioning_layout
    assert set(count_text(open_space(str(folder)))) == {"text_encoder", "text_encoder_2"}
    x_t = torch.randn(1, *space.latent_shape, generator=torch.Generator().manual_seed(8))
    found = space.sample(space.load_network(), x_t, encoded, empty, 3, 3.0)
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]  # diffusers opens no null
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    side = PIXELS
    expected = pipe(
        PROMPTS[0], negative_prompt="", guidance_scale=3.0, num_inference_steps=3, latents=x_t, height=side, width=side,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    long = "a circle " * 100  # more than both CLIPs read
    assert text.are_cut([PROMPTS[0], long]).tolist() == [False, True]


def test_tokens_lie_row_by_row():
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(as_map(pack(x), x), F.pixel_unshuffle(x, 2))


def test_embedded_guidance_reaches_the_teacher_and_the_fake_score_sees_one(folders):
    space = load_space(folders["flux-dev"])
    assert space.embeds_guidance
    x_t, t_B, conditioning = inputs(space)
    network = space.load_network()
    seen = []
    network.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[1] / 1000))

    def take():
        values = torch.stack(seen)
        seen.clear()
        assert values.shape[1] == 2  # one evaluation a sample: no second half for CFG
        return values.unique().tolist()

    with torch.no_grad():
        guided = space.predict_x0(network, x_t, t_B, conditioning, None, space.default_guidance_scale)
        assert take() == [3.5]
        unguided = space.predict_x0(network, x_t, t_B, conditioning)
        assert take() == [1.0]
        assert (guided - unguided).abs().max() > 1e-3
        space.sample(network, noise(), conditioning, conditioning, STEPS, 2.0)
        assert len(seen) == STEPS
        assert take() == [2.0]
        fake = FakeScore(space, network, FakeScoreConfig(rank=2), [0.5])
        prediction, _ = fake(x_t, t_B, conditioning)
        assert take() == [1.0]
        torch.testing.assert_close(to_x0(space.path, space.prediction, x_t, prediction, t_B), unguided)
        fake.features(x_t, t_B, conditioning)
        assert take() == [1.0]


@pytest.mark.parametrize("name", SHORTER)
def test_bfloat16_networks_take_float32_latents(name, folders):
    """As the service runs them: weights and conditioning in bfloat16, latents, times and scores in float32."""
    space = load_space(folders[name])
    x_t, t_B, conditioning = inputs(space)
    half = {key: v.bfloat16() if v.is_floating_point() else v for key, v in conditioning.items()}
    with torch.no_grad():
        exact = space.predict_x0(space.load_network(), x_t, t_B, conditioning)
        rounded = space.predict_x0(space.load_network(torch.bfloat16), x_t, t_B, half)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_flux2_learns_at_other_times_than_it_samples_at(folders):
    """Its pipeline's own fit, for 50 steps, puts 41 % of the times above 0.9."""
    space = load_space(folders["flux2"])
    assert space.default_shift == 3.0
    assert space.mu(50) != pytest.approx(math.log(3.0), rel=0.1)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("flux2", "qwen-image")])
def test_default_shift_is_that_of_the_sampling_schedule(name, folders):
    space = load_space(folders[name])
    steps = space.pipeline_steps
    sigmas = space.start_sampling(steps).sigmas[:-1]
    # SD 3's scheduler starts from sigmas that are shifted already, and shifts them again
    even = space.scheduler.sigmas.max() if name == "sd3" else torch.tensor(1.0)
    last = space.scheduler.sigmas.min() if name == "sd3" else torch.tensor(1 / steps)
    if name == "sana":  # DPM-Solver's begin at 0.999, and leave out the last
        even, last = 0.999, 0.999 / steps
    expected = shift(torch.linspace(float(even), float(last), steps), space.default_shift)
    torch.testing.assert_close(sigmas, expected, rtol=1e-5, atol=1e-6)
    assert space.default_shift > 1.2


@torch.no_grad()
def test_padding_of_chromas_text_is_masked_but_for_its_first_token(folders):
    space = load_space(folders["chroma"])
    x_t, t_B, conditioning = inputs(space)
    network, mask = space.load_network(), conditioning["prompt_attention_mask"]
    text = space.load_text().tokenizer(PROMPTS, padding="max_length", max_length=mask.shape[1]).attention_mask
    assert mask.sum(1).tolist() == [sum(row) + 1 for row in text]
    assert (mask.sum(1) < mask.shape[1]).all()
    expected = space.predict(network, x_t, t_B, conditioning)
    for seen in (0, 1):
        embeds = conditioning["prompt_embeds"] + 3.0 * (mask == seen)[:, :, None]
        found = space.predict(network, x_t, t_B, conditioning | {"prompt_embeds": embeds})
        assert torch.equal(found, expected) == (seen == 0)


@torch.no_grad()
def test_a_prompt_of_sana_stands_behind_its_pipelines_instruction_and_an_empty_one_alone(folders):
    space = load_space(folders["sana"])
    pipe = diffusers.SanaPipeline.from_pretrained(folders["sana"])
    lead = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    found = space.encode_prompts(space.load_text(), [PROMPTS[0], "", PROMPTS[1]])
    embeds, mask, empty, empty_mask = pipe.encode_prompt(list(PROMPTS), complex_human_instruction=lead)
    assert torch.equal(found["prompt_embeds"][[0, 2]], embeds)
    assert torch.equal(found["prompt_attention_mask"][[0, 2]], mask)
    assert torch.equal(found["prompt_embeds"][1], empty[0])
    assert torch.equal(found["prompt_attention_mask"][1], empty_mask[0])
    assert (found["prompt_embeds"][0] - pipe.encode_prompt(PROMPTS[0])[0][0]).abs().max() > 0.01  # without it


def test_guidance_of_qwen_image_keeps_each_tokens_length(folders):
    space = load_space(folders["qwen-image"])
    generator = torch.Generator().manual_seed(2)
    conditional, empty = torch.randn(2, 3, CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator)
    guided, plain = space.guided(conditional, empty, 4.0), empty + 4.0 * (conditional - empty)
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(conditional).norm(dim=-1))
    torch.testing.assert_close(F.normalize(pack(guided), dim=-1), F.normalize(pack(plain), dim=-1))


@pytest.mark.parametrize(("key", "value", "said"), [
    ("latents_mean", [0.0], "latents_mean is .*, not 6 finite numbers"), ("latents_std", [0.0] * 6, "must be above 0"),
])  # fmt: skip
def test_statistics_of_qwen_image_that_are_not_one_a_channel_are_named(key, value, said, folders, tmp_path):
    folder = shutil.copytree(folders["qwen-image"], tmp_path / "torn")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"vae/config.json.*{said}"):
        load_space(folder).normalise(torch.zeros(1, CHANNELS, 8, 8))


def test_the_fingerprint_of_qwen_images_vae_follows_its_statistics(folders, tmp_path):
    folder = shutil.copytree(folders["qwen-image"], tmp_path / "other")
    same = vae_fingerprint(load_space(folder))
    config = json.loads((folder / "vae/config.json").read_text())
    (tmp_path / "changed").symlink_to(folder)
    (folder / "vae/config.json").write_text(json.dumps(config | {"latents_mean": config["latents_std"]}))
    assert (
        same == vae_fingerprint(load_space(folders["qwen-image"])) != vae_fingerprint(load_space(tmp_path / "changed"))
    )


def test_missing_statistics_of_flux2_are_named(tmp_path):
    folder = save_flux2(tmp_path / "torn")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="vae: no diffusion_pytorch_model.safetensors"):
        load_space(folder).normalise(torch.zeros(1, CHANNELS, 8, 8))
