"""FLUX.2 [klein] base: flow transformer on 2×2-packed, BatchNorm-normalised latents, Qwen3 text encoder.

Latents are exposed on the VAE grid (32×128×128 at 1024 px): packed 2×2, normalised with the VAE's BatchNorm
statistics, and unpacked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import JOINT_ATTENTION, FlowSpace, image_tokens_behind_text
from raydistill.spaces.flux import NON_COMMERCIAL, FluxSpace, pack, unpack
from raydistill.spaces.folder import NETWORK_WEIGHTS, weight_files
from raydistill.spaces.hub_model import APACHE, HubModel, Licence
from raydistill.spaces.weights import read_tensors


def position_ids(frames: int, height: int, width: int, length: int, device: torch.device) -> torch.Tensor:
    """Rotary position ids [frames·height·width·length, 4]: frame, row, column, place in the text."""
    axes = (torch.arange(count, device=device) for count in (frames, height, width, length))
    return torch.cartesian_prod(*axes)


class Flux2KleinSpace(FlowSpace):
    """FLUX.2 [klein]: base models with true CFG, and the step-distilled ones, which draw without guidance."""

    pipeline_class = "Flux2KleinPipeline"
    hub_models = {
        "black-forest-labs/FLUX.2-klein-base-4B": HubModel(APACHE, "flux2-klein-base-4b"),
        "black-forest-labs/FLUX.2-klein-base-9B": HubModel(
            Licence("FLUX Non-Commercial License", "other", NON_COMMERCIAL)
        ),
        "black-forest-labs/FLUX.2-klein-4B": HubModel(APACHE, "flux2-klein-4b", distilled_steps=4),
        "black-forest-labs/FLUX.2-klein-9B": HubModel(
            Licence("FLUX Non-Commercial License", "other", NON_COMMERCIAL), distilled_steps=4
        ),
    }
    default_guidance_scale = 4.0
    default_shift = 3.0  # SD 3's: the pipeline's fit, for 50 steps, puts 41 % of the times above 0.9
    block_lists, attention_reader = FluxSpace.block_lists, FluxSpace.attention_reader
    tokens_asked = {"tokenizer": 512}

    @property
    def distilled_sign(self) -> str | None:
        return f"is_distilled=true in {self.index.file}" if self.index.get("is_distilled") else super().distilled_sign

    @cached_property
    def lora_targets(self) -> tuple[str, ...]:
        """`to_out` is a list in double blocks and a linear layer in single ones, so those are named one by one."""
        single = range(self.part_config("transformer").whole("num_single_layers"))
        return (
            *JOINT_ATTENTION,
            *(f"{name}.linear_{end}" for name in ("ff", "ff_context") for end in ("in", "out")),
            "attn.to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in single),
        )

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.pixels_of_vae // self.downscale
        return self.vae_config.whole("latent_channels"), side, side

    # -- the latent affine map ---------------------------------------------------------------------
    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [4C, 1, 1] of 2×2-packed raw latents, from the VAE's BatchNorm layer."""
        names = {f"bn.running_{name}" for name in ("mean", "var")}
        files = weight_files(Path(self.folder, "vae"), NETWORK_WEIGHTS)
        found = dict(pair for file in files for pair in read_tensors(file, names.__contains__))
        if found.keys() != names:
            raise InputError(f"{self.folder}/vae: its weights lack {', '.join(sorted(names - found.keys()))}")
        mean, variance = (found[f"bn.running_{name}"] for name in ("mean", "var"))
        deviation = (variance + self.vae_config.number("batch_norm_eps")).sqrt()
        return mean[:, None, None], deviation[:, None, None]

    def assume_values(self) -> None:
        channels = 4 * self.vae_config["latent_channels"]
        self.statistics = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        mean, deviation = (value.to(raw) for value in self.statistics)
        return F.pixel_shuffle((F.pixel_unshuffle(raw, 2) - mean) / deviation, 2)

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = (value.to(latents) for value in self.statistics)
        return F.pixel_shuffle(F.pixel_unshuffle(latents, 2) * deviation + mean, 2)

    # -- text and network --------------------------------------------------------------------------
    @property
    def conditioning_layout(self) -> Layout:
        width = self.part_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": ((self.text_lengths["text_encoder"], width), torch.float32)}

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, 3D]: three hidden layers of Qwen3 side by side; padding is part of what was trained."""
        length = min(self.tokens_asked["tokenizer"], text.tokenizer.model_max_length)
        embeds, _ = text.encode_prompt(list(prompts), max_sequence_length=length)
        return {"prompt_embeds": embeds}

    def predict(self, network, x_t, t_B, conditioning):
        height, width = x_t.shape[-2:]
        embeds = conditioning["prompt_embeds"]
        velocity = network(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t_B,
            guidance=None,
            encoder_hidden_states=embeds,
            img_ids=position_ids(1, height // 2, width // 2, 1, x_t.device),
            txt_ids=position_ids(1, 1, 1, embeds.shape[1], x_t.device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def feature_map(self, output, x_t):
        return image_tokens_behind_text(output, x_t)

    def mu(self, steps: int) -> float:
        """The pipeline's own fit, in the number of image tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # slow: transformers' models

        return compute_empirical_mu(self.image_tokens, steps)
