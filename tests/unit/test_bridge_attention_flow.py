"""Attention probe of SD 3.5, FLUX.1 [dev], FLUX.2, Z-Image, Chroma, Sana and Qwen-Image against attention by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from lanes import full_but
from test_bridge_attention import inputs_of, standardised_log_softmax
from tiny_flow_pipelines import CHANNELS, LATENT_SIDE, SAVE, SHORT, sd3_transformer

from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.losses import bridge_loss
from raydistill.config.networks import AttentionConfig
from raydistill.spaces import load_space

TOKENS = 16  # of the image: 4×4 patches
CAPTIONS = (7, 40)  # tokens of each Z-Image caption; padded to 32 and 64
TEXT = {
    "sd3": 64,
    "flux-dev": 64,
    "flux2": 48,
    "z-image": 16,
    "chroma": 64,
    "sana": 16,
    "qwen-image": 16,
}  # width of the text embeddings
POOLED = {"sd3": 56, "flux-dev": 64}
EVERY = full_but(SAVE, *SHORT)
SHAPE = (2, CHANNELS, LATENT_SIDE, LATENT_SIDE)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """name -> (space, float64 network, latents, conditioning)."""
    return {name: case(name, save(tmp_path_factory.mktemp(name))) for name, save in SAVE.items()}


def case(name, folder):
    space, generator = load_space(folder), torch.Generator().manual_seed(0)
    network = space.load_network(torch.float64)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    conditioning = {"prompt_embeds": normal(2, 48, TEXT[name])}
    if name in POOLED:
        conditioning["pooled_prompt_embeds"] = normal(2, POOLED[name])
    if name == "z-image":
        conditioning["prompt_tokens"] = torch.tensor(CAPTIONS)
    masks = {"chroma": "prompt_attention_mask", "sana": "prompt_attention_mask", "qwen-image": "prompt_embeds_mask"}
    if name in masks:
        conditioning[masks[name]] = (torch.arange(48) < torch.tensor([[9], [30]])).long()
    return space, network, normal(*SHAPE), conditioning


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, frame: int, axes: tuple[int, ...], theta: float, middle: int = 0) -> torch.Tensor:
    """Rotary embedding of image tokens [h, K, d] at (frame, row, column, 0): pairs (2i, 2i + 1) turn.

    `middle`: the row and column that are 0.
    """
    row = torch.arange(TOKENS).div(4, rounding_mode="floor") - middle
    positions = [torch.full((TOKENS,), frame), row, torch.arange(TOKENS) % 4 - middle, torch.zeros(TOKENS)][: len(axes)]
    angles = torch.cat(
        [
            place.double()[:, None] * theta ** (-torch.arange(0, n, 2).double() / n)
            for place, n in zip(positions, axes, strict=True)
        ],
        dim=-1,
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def by_hand(name: str, attention: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits [B, h, K, K] between image tokens, from the module's own weights and its input [B, tokens, D]."""
    image = inputs[:, :TOKENS] if name in ("sd3", "z-image", "sana") else inputs[:, -TOKENS:]
    if hasattr(attention, "to_qkv_mlp_proj"):  # FLUX.2's single blocks
        width = attention.inner_dim
        weights = attention.to_qkv_mlp_proj.weight[:width], attention.to_qkv_mlp_proj.weight[width : 2 * width]
        biases = 0, 0
    else:
        weights = attention.to_q.weight, attention.to_k.weight
        biases = (0, 0) if attention.to_q.bias is None else (attention.to_q.bias, attention.to_k.bias)
    heads, eps = attention.heads, 1e-5 if name == "z-image" else 1e-6
    if name == "sana":  # all heads are normalised together, and there is no softmax
        q, k = (
            rms(image @ w.T, norm.weight, 1e-5)
            for w, norm in zip(weights, (attention.norm_q, attention.norm_k), strict=True)
        )
        q, k = (value.clamp(min=0).unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k))
        return q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    q, k = ((image @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in zip(weights, biases, strict=True))
    if attention.norm_q is not None:
        q, k = rms(q, attention.norm_q.weight, eps), rms(k, attention.norm_k.weight, eps)

    def turned(x):
        if name == "sd3":
            return x
        if name == "z-image":  # the picture follows the padded caption, which starts at 1
            frames = [32 * math.ceil(length / 32) + 1 for length in CAPTIONS]
            return torch.stack([rotate(one, frame, (4, 6, 6), 256.0) for one, frame in zip(x, frames, strict=True)])
        if name == "qwen-image":
            return torch.stack([rotate(one, 0, (8, 12, 12), 1e4, middle=2) for one in x])
        axes, theta = {"flux-dev": ((8, 12, 12), 1e4), "chroma": ((8, 12, 12), 1e4), "flux2": ((8, 8, 8, 8), 2e3)}[name]
        return torch.stack([rotate(one, 0, axes, theta) for one in x])

    return turned(q) @ turned(k).transpose(2, 3) / math.sqrt(q.shape[-1])


def attentions(name, network):
    if name in ("sd3", "qwen-image"):
        return [block.attn for block in network.transformer_blocks]
    if name == "sana":
        return [block.attn1 for block in network.transformer_blocks]
    if name == "z-image":
        return [block.attention for block in (*network.noise_refiner, *network.layers)]
    return [block.attn for block in (*network.transformer_blocks, *network.single_transformer_blocks)]


def compare(name, space, network, x_t, conditioning, depth_fraction):
    t_B, rows = torch.tensor([0.001, 0.4], dtype=torch.float64), sample_rows(0, 0, 10)
    probe = AttentionProbe(space, network, AttentionConfig(layers=100, depth_fraction=depth_fraction, temperature=3.0))
    maps = probe.maps(x_t, t_B, conditioning, rows)
    modules = attentions(name, network)
    inputs = inputs_of(space, network, modules, x_t, t_B, conditioning)
    assert len(maps) == math.ceil(depth_fraction * len(modules))
    for layer, log_p in enumerate(maps):
        logits = by_hand(name, modules[layer], inputs[layer])
        expected = standardised_log_softmax(logits[:, :, rows(layer, TOKENS)], 3.0)
        # diffusers normalises and rotates in float32; Sana's logits vary so little that the variance's eps is seen
        assert torch.allclose(log_p, expected, atol=2e-4 if name == "sana" else 2e-5), (
            layer,
            (log_p - expected).abs().max(),
        )
        assert expected.std() > 0.1


@pytest.mark.parametrize("depth_fraction", [0.2, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("name", EVERY)
def test_maps_equal_attention_by_hand_at_every_depth(name, depth_fraction, cases):
    """Cuts inside the first kind of blocks, between both kinds, inside the second, and none."""
    space, network, x_t, conditioning = cases[name]
    compare(name, space, network, x_t, conditioning, depth_fraction)


def test_sd3_without_normalised_queries_is_read_too(cases):
    """SD 3 has neither the norms nor the second attention of SD 3.5."""
    space, _, x_t, conditioning = cases["sd3"]
    torch.manual_seed(1)
    network = sd3_transformer(qk_norm=None, dual_attention_layers=()).double()
    compare("sd3", space, network, x_t, conditioning, 0.5)


@pytest.mark.parametrize("name", EVERY)
def test_probe_leaves_the_network_alone_and_keeps_only_the_blocks_it_needs(name, cases):
    space, network, x_t, conditioning = cases[name]
    t_B = torch.tensor([0.1, 0.2], dtype=torch.float64)
    before = space.predict(network, x_t, t_B, conditioning)
    probe = AttentionProbe(space, network, AttentionConfig(depth_fraction=0.4))
    probe.maps(x_t, t_B, conditioning, sample_rows(0, 0, 4))
    assert torch.equal(space.predict(network, x_t, t_B, conditioning), before)
    kept, whole = (sum(p.numel() for p in n.parameters()) for n in (probe.network, network))
    dropped = space.blocks(network)[math.ceil(0.4 * len(space.blocks(network))) :]
    assert whole - kept == sum(p.numel() for block in dropped for p in block.parameters()) > 0.15 * whole
    assert not {id(p) for p in network.parameters()} & {id(p) for p in probe.network.parameters()}
    assert not any(p.requires_grad for p in probe.network.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_gradient_reaches_the_latents_and_equals_finite_differences(name, cases):
    space, network, z_true, conditioning = cases[name]
    probe = AttentionProbe(space, network, AttentionConfig(layers=2, depth_fraction=0.8))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    z_hat = (z_true + 0.5 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)).requires_grad_()

    def loss(z):
        return bridge_loss(z, z_true, 1.0, probe, noise, conditioning, sample_rows(0, 0, 6))[1]["attention"]

    loss(z_hat).backward()
    assert all(p.grad is None for p in probe.network.parameters())
    largest = z_hat.grad.abs().flatten().argsort(descending=True)[[0, 10, 100]]
    for index in largest.tolist():
        step = torch.zeros(z_hat.numel(), dtype=torch.float64)
        step[index] = 1e-3
        with torch.no_grad():
            ahead, behind = loss(z_hat + step.view(SHAPE)), loss(z_hat - step.view(SHAPE))
        assert float((ahead - behind) / 2e-3) == pytest.approx(float(z_hat.grad.flatten()[index]), rel=2e-3)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_of_the_teacher_changes_no_gradient(name, cases):
    space, network, z_true, conditioning = cases[name]
    probe = AttentionProbe(space, network, AttentionConfig(layers=2, depth_fraction=0.8))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            space.recompute_activations(probe.network)
        z_hat = (0.9 * z_true).requires_grad_()
        loss, _ = bridge_loss(z_hat, z_true, 1.0, probe, torch.ones_like(z_true), conditioning, sample_rows(0, 0, 6))
        loss.backward()
        gradients.append(z_hat.grad)
    assert torch.equal(*gradients)
