"""The Bridge's objective: alpha L1 + beta attention fidelity (arXiv 2606.32020).

Shapes: B samples, C×H×W teacher latents, h heads, R sampled query rows, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raydistill.bridge.attention import AttentionProbe, RowSampler
from raydistill.diffusion.path import add_noise
from raydistill.spaces.base import Conditioning


def latent_l1(z_hat: torch.Tensor, z_true: torch.Tensor) -> torch.Tensor:
    """mean |z_T - ẑ_T| over everything, a scalar in float32."""
    return (z_true.float() - z_hat.float()).abs().mean()


def attention_fidelity(
    log_p_hat: Sequence[torch.Tensor], log_p_true: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """Σ_l τ² KL(P_l(ẑ_T) ‖ P_l(z_T)): reverse KL, summed over keys, mean over batch, heads and rows; a scalar.

    Args:
        log_p_hat, log_p_true: log-probabilities of predicted and true latents, one [B, h, R, K] a layer.
        temperature: τ of the softmax that made them.

    Raises:
        ValueError: another number of layers on both sides, or none.
    """
    if not log_p_hat or len(log_p_hat) != len(log_p_true):
        raise ValueError(f"attention maps of {len(log_p_hat)} and {len(log_p_true)} layers cannot be compared")
    divergences = [(p.exp() * (p - q)).sum(dim=-1).mean() for p, q in zip(log_p_hat, log_p_true, strict=True)]
    return temperature**2 * torch.stack(divergences).sum()


def bridge_loss(
    z_hat: torch.Tensor,
    z_true: torch.Tensor,
    attention_weight: float = 0.0,
    probe: AttentionProbe | None = None,
    noise: torch.Tensor | None = None,
    conditioning: Conditioning | None = None,
    rows: RowSampler | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Total loss and its terms, `latent_l1` and (with a probe) `attention`, as scalars.

    Both latents are noised at step 1 of the teacher's path with the same noise, and read at the same rows.

    Args:
        z_hat, z_true: [B, C, H, W] in the teacher's normalised space; gradients flow into `z_hat`.
        attention_weight: β; 0 skips the teacher.
        probe, noise, conditioning, rows: needed where β is not 0; noise like `z_true`, rows as `AttentionProbe.maps`.
    """
    l1 = latent_l1(z_hat, z_true)
    if attention_weight == 0:
        return l1, {"latent_l1": l1}
    if probe is None or noise is None or conditioning is None or rows is None:
        raise ValueError("the attention fidelity needs a probe, noise, conditioning and rows")
    path = probe.space.path
    t_B = path.t_of_timestep(torch.ones(len(z_true), device=z_true.device))
    with torch.no_grad():
        log_p_true = probe.maps(add_noise(path, z_true, noise, t_B), t_B, conditioning, rows)
    log_p_hat = probe.maps(add_noise(path, z_hat, noise, t_B), t_B, conditioning, rows)
    attention = attention_fidelity(log_p_hat, log_p_true, probe.temperature)
    return l1 + attention_weight * attention, {"latent_l1": l1, "attention": attention}
