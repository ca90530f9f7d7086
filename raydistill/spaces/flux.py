"""FLUX.1: MMDiT flow transformer on 2×2-packed latents, CLIP (pooled) and T5 text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from raydistill.spaces.attention_readers import AttentionReader, first_blocks, patches, watch_rotary_norms
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import JOINT_ATTENTION, JOINT_FEED_FORWARD, FlowSpace, as_map
from raydistill.spaces.hub_model import APACHE, HubModel, Licence

NON_COMMERCIAL = (
    "Non-commercial: the weights and models distilled from them may not be used commercially without a licence from "
    "Black Forest Labs."
)
DEV = Licence("FLUX.1 [dev] Non-Commercial License", "other", NON_COMMERCIAL)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> tokens [B, (H/2)(W/2), 4C], channel-major inside a token as FluxPipeline packs."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Rotary position ids [(H/2)(W/2), 3]: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)


class FluxSpace(FlowSpace):
    """FLUX.1 teachers: [dev] takes its guidance scale as an input (`guidance_embeds`), others take true CFG."""

    pipeline_class = "FluxPipeline"
    hub_models = {
        "black-forest-labs/FLUX.1-dev": HubModel(DEV, "flux1-dev", gated=True),
        "black-forest-labs/FLUX.1-Krea-dev": HubModel(DEV, "flux1-dev", gated=True),
        "black-forest-labs/FLUX.1-schnell": HubModel(APACHE, "flux1-schnell", distilled_steps=4),
    }
    lora_targets = (*JOINT_ATTENTION, *JOINT_FEED_FORWARD, "proj_mlp", "proj_out")
    default_guidance_scale = 3.5
    block_lists = ("transformer_blocks", "single_transformer_blocks")  # double blocks, then single ones
    attention_reader = AttentionReader(
        cut=first_blocks(block_lists, "attn"), watch=watch_rotary_norms, image_tokens=patches
    )
    unused_parts = {"image_encoder": None, "feature_extractor": None}

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        channels = self.part_config("transformer").whole("in_channels") // 4
        side = self.pixels_of_vae // self.downscale
        return channels, side, side

    @property
    def distilled_sign(self) -> str | None:
        """[schnell] has no guidance input and samples on the plain schedule; both at once are its own."""
        network, schedule = self.part_config("transformer"), self.part_config("scheduler")
        plain = not schedule.get("use_dynamic_shifting") and schedule.get("shift") == 1.0
        if network["guidance_embeds"] or not plain:
            return super().distilled_sign
        return (
            f"guidance_embeds=false, and in {schedule.file} shift=1 without use_dynamic_shifting, as FLUX.1 [schnell]"
        )

    @cached_property
    def tokens_asked(self) -> Mapping[str, int]:
        """[schnell] was made with shorter texts of T5 than [dev]."""
        return {"tokenizer_2": 256 if self.distilled_sign else 512}

    @cached_property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input, in one evaluation without CFG."""
        return self.part_config("transformer")["guidance_embeds"]

    @property
    def conditioning_layout(self) -> Layout:
        config = self.part_config("transformer")
        return {
            "prompt_embeds": ((self.text_lengths["text_encoder_2"], config["joint_attention_dim"]), torch.float32),
            "pooled_prompt_embeds": ((config["pooled_projection_dim"],), torch.float32),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D] of T5, pooled_prompt_embeds [B, P] of CLIP."""
        length = min(self.tokens_asked["tokenizer_2"], text.tokenizer_2.model_max_length)
        embeds, pooled, _ = text.encode_prompt(list(prompts), None, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, network, x_t, t_B, conditioning, embedded_guidance: float = 1.0):
        """`embedded_guidance` matters to networks that embed it; 1, no guidance, is what the fake score gets."""
        height, width = x_t.shape[-2:]
        embeds = conditioning["prompt_embeds"]
        velocity = network(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t_B,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            guidance=torch.full_like(t_B, embedded_guidance) if self.embeds_guidance else None,
            img_ids=image_ids(height, width, x_t.device),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def predict_guided(self, network, x_t, t_B, conditioning, unconditional, guidance_scale, guidance_rescale=0.0):
        """One evaluation with the scale as an input where the network embeds it; `unconditional` is not used then."""
        if self.embeds_guidance:
            return self.predict(network, x_t, t_B, conditioning, guidance_scale)
        guidance = guidance_scale, guidance_rescale
        return super().predict_guided(network, x_t, t_B, conditioning, unconditional, *guidance)

    def feature_map(self, output, x_t):
        """Image tokens of a block that returns (text, image) tokens."""
        _, tokens = output
        return as_map(tokens, x_t)
