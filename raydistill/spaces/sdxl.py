"""SDXL: UNet, two CLIP text encoders, and micro-conditioning on picture sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.hub_model import APACHE, OPEN_RAIL_PLUS, HubModel
from raydistill.spaces.sd import StableDiffusionSpace


class SDXLSpace(StableDiffusionSpace):
    """SDXL teachers and students. The default guidance is what DMD2 distils SDXL with (arXiv 2405.14867).

    DMD2's one-step SDXL sees plain noise at t = 399 (demo/text_to_image_sdxl.py of github.com/tianweiy/DMD2).
    """

    pipeline_class = "StableDiffusionXLPipeline"
    hub_models = {
        "stabilityai/stable-diffusion-xl-base-1.0": HubModel(OPEN_RAIL_PLUS, "sdxl-base"),
        # UNets of SDXL with blocks left out (arXiv 2401.02677)
        "segmind/SSD-1B": HubModel(APACHE, "ssd-1b"),
        "segmind/Segmind-Vega": HubModel(APACHE, "segmind-vega"),
    }
    default_guidance_scale = 8.0
    unused_parts = {"image_encoder": None, "feature_extractor": None}
    network_settings = {"addition_embed_type": "text_time"}
    student_parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    plain_start = True
    original_layout = False
    runtimes = {}

    @property
    def distilled_sign(self) -> str | None:
        """SDXL-Turbo is published with a scheduler that adds noise at every step, on trailing timesteps."""
        schedule = self.part_config("scheduler")
        ancestral = schedule["_class_name"] == "EulerAncestralDiscreteScheduler"
        if ancestral and schedule.get("timestep_spacing") == "trailing":
            return f"EulerAncestralDiscreteScheduler with trailing timesteps in {schedule.file}, as SDXL-Turbo"
        return super().distilled_sign

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text embedding that the UNet was made for."""
        config = self.network_config
        return config.whole("projection_class_embeddings_input_dim") - 6 * config.whole("addition_time_embed_dim")

    @property
    def conditioning_layout(self) -> Layout:
        width = self.network_config.get("encoder_hid_dim") or self.network_config["cross_attention_dim"]
        return {
            "prompt_embeds": ((self.text_lengths["text_encoder"], width), torch.float32),
            "pooled_prompt_embeds": ((self.pooled_width,), torch.float32),
            "time_ids": ((6,), torch.int64),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], pooled_prompt_embeds [B, P] and time_ids [B, 6] (see `time_ids`).

        Raises:
            InputError: the text encoders are not those that the UNet was made for.
        """
        embeds, pooled = self._encode_text(text, list(prompts))
        if pooled.shape[1] != self.pooled_width:
            raise InputError(
                f"{self.folder}: the text encoder pools to {pooled.shape[1]} channels, but the UNet takes "
                f"{self.pooled_width}"
            )
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": self.time_ids.to(embeds.device).repeat(len(prompts), 1),
        }

    def _encode_text(self, text, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L, D] of both encoders side by side, and [B, P] pooled by the second."""
        embeds, _, pooled, _ = text.encode_prompt(prompts, device=text.device, do_classifier_free_guidance=False)
        return embeds, pooled

    @property
    def time_ids(self) -> torch.Tensor:
        """Original size, top-left corner of the crop and target size in pixels, [1, 6]: an uncropped picture.

        Integers, since half precision would round sizes such as 1,344.
        """
        side = self.resolution
        return torch.tensor([[side, side, 0, 0, side, side]])

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """Zeros instead of the empty prompt's embeddings where `force_zeros_for_empty_prompt` says so."""
        if not self.index["force_zeros_for_empty_prompt"]:
            return empty
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in empty.items()}

    def predict(self, network, x_t, t_B, conditioning):
        return network(
            x_t.to(conditioning["prompt_embeds"].dtype),
            self.path.timestep(t_B),
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": conditioning["time_ids"],
            },
            return_dict=False,
        )[0]
