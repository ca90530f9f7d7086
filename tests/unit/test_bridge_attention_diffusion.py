"""Attention probe of SDXL, Kolors and PixArt-Sigma against attention by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from raydistill.config.networks import AttentionConfig
from test_bridge_attention import inputs_of

from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.losses import bridge_loss
from raydistill.spaces import load_space

FAMILIES = ["sdxl", "kolors", "pixart"]
TEXT_WIDTH = {"sdxl": 104, "kolors": 32, "pixart": 64}
POOLED_WIDTH = {"sdxl": 24, "kolors": 32}


def case(family, folders):
    """(space, float64 network, latents, conditioning)."""
    space, generator = load_space(folders[family]), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    conditioning = {"prompt_embeds": normal(2, 6, TEXT_WIDTH[family])}
    if family == "pixart":
        conditioning["prompt_attention_mask"] = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    else:
        conditioning["pooled_prompt_embeds"] = normal(2, POOLED_WIDTH[family])
        conditioning["time_ids"] = space.time_ids.repeat(2, 1)
    return space, space.load_network(torch.float64), normal(2, *space.latent_shape), conditioning


def self_attentions(network):
    """In order of execution."""
    if hasattr(network, "transformer_blocks"):
        return [block.attn1 for block in network.transformer_blocks]
    return [
        module
        for part in (network.down_blocks, network.mid_block, network.up_blocks)
        for name, module in part.named_modules()
        if name.endswith("attn1")
    ]


def projected(module, tokens, name):
    """[B, h, K, d] from the module's own weights."""
    linear = getattr(module, name)
    value = tokens @ linear.weight.T
    value = value if linear.bias is None else value + linear.bias
    return value.unflatten(-1, (module.heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth_fraction", [0.3, 0.5, 1.0])
def test_maps_equal_attention_by_hand_at_every_depth(family, depth_fraction, diffusion_folders):
    """Transformers of one and two layers at two resolutions in the UNets; four blocks in PixArt."""
    space, network, x_t, conditioning = case(family, diffusion_folders)
    modules = self_attentions(network)
    t_B, rows = torch.tensor([0.001, 0.4]), sample_rows(0, 0, 3)
    probe = AttentionProbe(space, network, AttentionConfig(layers=100, depth_fraction=depth_fraction, temperature=2.0))
    maps = probe.maps(x_t, t_B, conditioning, rows)
    inputs = inputs_of(space, network, modules, x_t, t_B, conditioning)
    assert len(maps) == math.ceil(depth_fraction * len(modules))
    for layer, log_p in enumerate(maps):
        module = modules[layer]
        q, k, v = (projected(module, inputs[layer], name) for name in ("to_q", "to_k", "to_v"))
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        # The logits are those that the module itself attends with.
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        output = attended @ module.to_out[0].weight.T + module.to_out[0].bias
        torch.testing.assert_close(module(inputs[layer]), output, rtol=0, atol=1e-12)
        picked = logits[:, :, rows(layer, logits.shape[2])]
        variance = picked.var(-1, correction=0, keepdim=True)
        standardised = (picked - picked.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        torch.testing.assert_close(log_p, (standardised / 2).log_softmax(-1), rtol=0, atol=1e-9)
        assert log_p.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_latents_and_equals_finite_differences(family, diffusion_folders):
    space, network, z_true, conditioning = case(family, diffusion_folders)
    probe = AttentionProbe(space, network, AttentionConfig(layers=2, depth_fraction=0.5))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(z_true.shape, generator=generator, dtype=torch.float64)
    z_hat = z_true + 0.5 * torch.randn(z_true.shape, generator=generator, dtype=torch.float64)
    z_hat.requires_grad_()

    def loss(z):
        return bridge_loss(z, z_true, 1.0, probe, noise, conditioning, sample_rows(0, 0, 6))[1]["attention"]

    loss(z_hat).backward()
    assert all(p.grad is None for p in probe.network.parameters())
    for index in z_hat.grad.abs().flatten().argsort(descending=True)[[0, 10, 100]].tolist():
        step = torch.zeros(z_hat.numel(), dtype=torch.float64)
        step[index] = 1e-3
        with torch.no_grad():
            ahead, behind = loss(z_hat + step.view_as(z_hat)), loss(z_hat - step.view_as(z_hat))
        assert float((ahead - behind) / 2e-3) == pytest.approx(float(z_hat.grad.flatten()[index]), rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_leaves_the_network_alone_and_keeps_only_the_blocks_it_needs(family, diffusion_folders):
    space, network, x_t, conditioning = case(family, diffusion_folders)
    t_B = torch.tensor([0.1, 0.2])
    before = space.predict(network, x_t, t_B, conditioning)
    probe = AttentionProbe(space, network, AttentionConfig(depth_fraction=0.3))
    probe.maps(x_t, t_B, conditioning, sample_rows(0, 0, 4))
    assert torch.equal(space.predict(network, x_t, t_B, conditioning), before)
    kept, whole = (sum(p.numel() for p in n.parameters()) for n in (probe.network, network))
    assert kept < 0.75 * whole
    assert not {id(p) for p in network.parameters()} & {id(p) for p in probe.network.parameters()}
