"""Attention probe against attention computed by hand in float64 from the same weights; the fidelity loss."""

from __future__ import annotations

import math

import pytest
import torch
from raydistill.config.networks import AttentionConfig
from torch import nn

from raydistill.bridge.attention import AttentionProbe, log_probabilities, sample_rows, spaced
from raydistill.bridge.losses import attention_fidelity, bridge_loss, latent_l1
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.spaces.flux import FluxSpace


def flux_case(folder):
    """A float64 FLUX, latents and conditioning."""
    space, generator = load_space(folder), torch.Generator().manual_seed(0)
    network = space.load_network(torch.float64)
    x_t = torch.randn(2, 8, 16, 16, generator=generator, dtype=torch.float64)
    conditioning = {
        "prompt_embeds": torch.randn(2, 5, 64, generator=generator, dtype=torch.float64),
        "pooled_prompt_embeds": torch.randn(2, 64, generator=generator, dtype=torch.float64),
    }
    return space, network, x_t, conditioning


def unet_case(folder):
    space, generator = load_space(folder), torch.Generator().manual_seed(0)
    network = space.load_network(torch.float64)
    x_t = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    return space, network, x_t, {"prompt_embeds": torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)}


def inputs_of(space, network, modules, x_t, t_B, conditioning):
    """hidden_states each attention module receives in a full forward of the whole network."""
    inputs, handles = {}, []
    for index, module in enumerate(modules):

        def remember(module, args, kwargs, index=index):
            inputs[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    with torch.no_grad():
        space.predict(network, x_t, t_B, conditioning)
    for handle in handles:
        handle.remove()
    return inputs


def rotate(x: torch.Tensor, axes=(8, 12, 12), side=8) -> torch.Tensor:
    """Rotary embedding of image tokens [..., K, d]: pair (2i, 2i + 1) turns by position / 10000^(2i / axis)."""
    positions = torch.stack([torch.zeros(side * side), *torch.arange(side * side).div(side, rounding_mode="floor")[None],
                             *torch.arange(side * side).remainder(side)[None]], -1).double()  # fmt: skip
    angles = torch.cat(
        [positions[:, a, None] * 10000.0 ** (-torch.arange(0, n, 2).double() / n) for a, n in enumerate(axes)], dim=-1
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def standardised_log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    return (z / temperature) - torch.logsumexp(z / temperature, -1, keepdim=True)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_flux_maps_equal_attention_by_hand(flux_folder):
    space, network, x_t, conditioning = flux_case(flux_folder)
    t_B, rows = torch.tensor([0.001, 0.4], dtype=torch.float64), sample_rows(0, 0, 10)
    probe = AttentionProbe(space, network, AttentionConfig(layers=4, depth_fraction=0.8, temperature=3.0))
    maps = probe.maps(x_t, t_B, conditioning, rows)
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks][:4]
    inputs = inputs_of(space, network, [b.attn for b in blocks], x_t, t_B, conditioning)
    assert len(maps) == 4
    assert all(m.shape == (2, 3, 10, 64) for m in maps)
    for layer, (block, log_p) in enumerate(zip(blocks, maps, strict=True)):
        tokens = inputs[layer][:, -64:]  # single blocks see text first
        q, k = (
            rotate(rms((tokens @ linear.weight.T + linear.bias).unflatten(-1, (3, 32)), norm.weight).transpose(1, 2))
            for linear, norm in ((block.attn.to_q, block.attn.norm_q), (block.attn.to_k, block.attn.norm_k))
        )
        expected = standardised_log_softmax(q[:, :, rows(layer, 64)] @ k.transpose(2, 3), 3.0)
        # diffusers rotates in float32
        assert torch.allclose(log_p, expected, atol=2e-5)
        assert expected.std() > 0.1


@pytest.mark.parametrize(("depth_fraction", "count"), [(0.1, 1), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_unet_maps_equal_attention_by_hand_at_every_depth(sd_folder, depth_fraction, count):
    """Cut inside the down blocks, the middle and the up blocks of a UNet with 2 + 1 + 4 self-attentions."""
    space, network, x_t, conditioning = unet_case(sd_folder)
    attentions = [m for part in (network.down_blocks, network.mid_block, network.up_blocks)
                  for name, m in part.named_modules() if name.endswith("attn1")]  # fmt: skip
    assert math.ceil(depth_fraction * len(attentions)) >= count
    t_B, rows = torch.tensor([0.001, 0.4]), sample_rows(0, 0, 7)
    probe = AttentionProbe(space, network, AttentionConfig(layers=100, depth_fraction=depth_fraction, temperature=2.0))
    maps = probe.maps(x_t, t_B, conditioning, rows)
    inputs = inputs_of(space, network, attentions, x_t, t_B, conditioning)
    assert len(maps) == math.ceil(depth_fraction * len(attentions))
    for layer, log_p in enumerate(maps):
        module = attentions[layer]
        q, k = ((inputs[layer] @ w.weight.T).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for w in (module.to_q, module.to_k))  # fmt: skip
        logits = q[:, :, rows(layer, q.shape[2])] @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        variance = logits.var(-1, correction=0, keepdim=True)
        expected = ((logits - logits.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt() / 2).log_softmax(-1)
        assert torch.allclose(log_p, expected, atol=1e-9)


def test_probe_leaves_the_network_alone_and_keeps_only_the_blocks_it_needs(flux_folder, sd_folder):
    for make, folder in ((flux_case, flux_folder), (unet_case, sd_folder)):
        space, network, x_t, conditioning = make(folder)
        t_B = torch.tensor([0.1, 0.2])
        before = space.predict(network, x_t, t_B, conditioning)
        probe = AttentionProbe(space, network, AttentionConfig(depth_fraction=0.4))
        probe.maps(x_t, t_B, conditioning, sample_rows(0, 0, 4))
        assert torch.equal(space.predict(network, x_t, t_B, conditioning), before)
        kept, whole = (sum(p.numel() for p in n.parameters()) for n in (probe.network, network))
        assert kept < 0.75 * whole
        assert not {id(p) for p in network.parameters()} & {id(p) for p in probe.network.parameters()}
        assert not any(p.requires_grad for p in probe.network.parameters())


def test_gradient_reaches_the_latents_and_equals_finite_differences(flux_folder, sd_folder):
    for make, folder, shape in ((flux_case, flux_folder, (2, 8, 16, 16)), (unet_case, sd_folder, (2, 4, 8, 8))):
        space, network, z_true, conditioning = make(folder)
        probe = AttentionProbe(space, network, AttentionConfig(layers=2, depth_fraction=0.5))
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        z_hat = (z_true + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

        def loss(z, z_true=z_true, probe=probe, noise=noise, conditioning=conditioning):
            return bridge_loss(z, z_true, 1.0, probe, noise, conditioning, sample_rows(0, 0, 6))[1]["attention"]

        loss(z_hat).backward()
        assert all(p.grad is None for p in probe.network.parameters())
        largest = z_hat.grad.abs().flatten().argsort(descending=True)[[0, 10, 100]]
        for index in largest.tolist():
            step = torch.zeros(z_hat.numel(), dtype=torch.float64)
            step[index] = 1e-3
            with torch.no_grad():
                ahead, behind = loss(z_hat + step.view(shape)), loss(z_hat - step.view(shape))
            assert float((ahead - behind) / 2e-3) == pytest.approx(float(z_hat.grad.flatten()[index]), rel=2e-3)


def test_gradient_checkpointing_of_the_teacher_changes_no_gradient(flux_folder):
    space, network, z_true, conditioning = flux_case(flux_folder)
    probe = AttentionProbe(space, network, AttentionConfig(layers=2, depth_fraction=0.8))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            probe.network.enable_gradient_checkpointing()
        z_hat = (0.9 * z_true).requires_grad_()
        loss, _ = bridge_loss(z_hat, z_true, 1.0, probe, torch.ones_like(z_true), conditioning, sample_rows(0, 0, 6))
        loss.backward()
        gradients.append(z_hat.grad)
    assert torch.equal(*gradients)


def test_equal_latents_have_no_loss_and_other_latents_some(flux_folder):
    space, network, z, conditioning = flux_case(flux_folder)
    probe = AttentionProbe(space, network, AttentionConfig())
    arguments = (1.0, probe, torch.ones_like(z), conditioning, sample_rows(0, 0, 6))
    total, parts = bridge_loss(z, z, *arguments)
    assert total == 0
    assert parts["attention"] == 0
    total, parts = bridge_loss(z + 0.3, z, *arguments)
    assert parts["attention"] > 1e-4
    assert parts["latent_l1"] == pytest.approx(0.3)
    assert float(total) == pytest.approx(float(parts["latent_l1"] + parts["attention"]))


def test_fidelity_is_the_reverse_kl_in_closed_form():
    """Two-point distributions: KL(p‖q) = p log(p/q) + (1-p) log((1-p)/(1-q)); mean over rows, sum over layers."""

    def points(*values):
        p = torch.tensor(values, dtype=torch.float64)
        return torch.stack([p, 1 - p], -1).log().reshape(1, 1, len(values), 2)

    def kl(p, q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    predicted, true = [points(0.2, 0.5), points(0.9)], [points(0.6, 0.5), points(0.1)]
    expected = 9 * ((kl(0.2, 0.6) + kl(0.5, 0.5)) / 2 + kl(0.9, 0.1))
    assert float(attention_fidelity(predicted, true, 3.0)) == pytest.approx(expected, rel=1e-12)
    assert abs(kl(0.2, 0.6) - kl(0.6, 0.2)) > 0.01  # the direction matters
    with pytest.raises(ValueError, match="2 and 1 layers"):
        attention_fidelity(predicted, true[:1], 3.0)


def test_unnormalised_logits_are_scaled_products():
    q, k = torch.randn(1, 3, 2, 4, dtype=torch.float64), torch.randn(1, 5, 2, 4, dtype=torch.float64)
    log_p = log_probabilities(q, k, 2.0, normalize=False)
    logits = torch.stack([q[0, :, h] @ k[0, :, h].T / 2 for h in range(2)])  # sqrt(d) = 2
    assert torch.allclose(log_p[0], (logits / 2.0).log_softmax(-1))
    assert log_probabilities(q.bfloat16(), k.bfloat16(), 2.0, True).dtype == torch.float32


def test_latent_l1_is_the_mean_absolute_difference():
    assert float(latent_l1(torch.tensor([1.0, -1.0]).bfloat16(), torch.tensor([0.0, 2.0]))) == 2.0


def test_rows_depend_on_seed_step_and_layer_only():
    rows = sample_rows(0, 5, 8)
    assert torch.equal(rows(1, 64), sample_rows(0, 5, 8)(1, 64))
    drawn = [rows(1, 64), rows(2, 64), sample_rows(1, 5, 8)(1, 64), sample_rows(0, 6, 8)(1, 64)]
    assert len({tuple(r.tolist()) for r in drawn}) == 4
    assert all(len(set(r.tolist())) == 8 and r.min() >= 0 and r.max() < 64 for r in drawn)
    assert torch.equal(sample_rows(0, 0, 100)(0, 16), torch.arange(16))


def test_layers_are_evenly_spaced_and_end_with_the_last():
    assert spaced(29, 4) == [7, 14, 21, 28]
    assert spaced(3, 4) == [0, 1, 2]
    assert spaced(8, 1) == [7]


def test_a_family_without_a_reader_is_told_how_to_go_without(flux_folder):
    class Unread(FluxSpace):
        attention_reader = None

    with pytest.raises(InputError, match=r"family Unread has no attention_reader; set bridge\.attention\.weight=0"):
        AttentionProbe(Unread(flux_folder), nn.Linear(2, 2), AttentionConfig())
