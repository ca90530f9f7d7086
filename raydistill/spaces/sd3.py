"""Stable Diffusion 3 and 3.5: MMDiT flow transformer that packs by itself; two CLIP and one T5 text encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from raydistill.spaces.attention_readers import AttentionReader, Recording, Sink, first_blocks, record
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import JOINT_ATTENTION, JOINT_FEED_FORWARD, FlowSpace, as_map
from raydistill.spaces.hub_model import HubModel, Licence

T5_TOKENS = 256  # of the pipeline; also of the zeros where a folder has no T5
STABILITY = Licence(
    "Stability AI Community License",
    "other",
    "Free below 1 million US dollars of annual revenue, an enterprise licence above; derivatives carry the licence "
    "and the notice 'Powered by Stability AI'.",
)


def watch_image_tokens(attention: nn.Module, sink: Sink) -> None:
    """Image tokens have projections and norms of their own: [B, h, tokens, d] behind the norms, which SD 3 lacks."""
    normalised = attention.norm_q is not None

    def read(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Recording:
        if normalised:
            return Recording(q.transpose(1, 2), k.transpose(1, 2))
        return Recording(q.unflatten(-1, (attention.heads, -1)), k.unflatten(-1, (attention.heads, -1)))

    q, k = (attention.norm_q, attention.norm_k) if normalised else (attention.to_q, attention.to_k)
    record(attention, q, k, read, sink)


class StableDiffusion3Space(FlowSpace):
    """SD 3.5 Medium and Large (and SD 3) teachers, with true CFG."""

    pipeline_class = "StableDiffusion3Pipeline"
    hub_models = {
        "stabilityai/stable-diffusion-3.5-medium": HubModel(STABILITY, "sd3.5-medium", gated=True),
        "stabilityai/stable-diffusion-3.5-large": HubModel(STABILITY, "sd3.5-large", gated=True),
        "stabilityai/stable-diffusion-3.5-large-turbo": HubModel(
            STABILITY, "sd3.5-large", gated=True, distilled_steps=4
        ),
    }
    lora_targets = (
        *JOINT_ATTENTION,
        *(f"attn2.to_{name}" for name in ("q", "k", "v", "out.0")),
        *JOINT_FEED_FORWARD,
    )
    default_guidance_scale = 4.5
    block_lists = ("transformer_blocks",)
    # Joint attention of image and text is in every block; the second attention of some (attn2) is not read.
    attention_reader = AttentionReader(cut=first_blocks(block_lists, "attn"), watch=watch_image_tokens)
    tokens_asked = {"tokenizer_3": T5_TOKENS}
    unused_parts = {"image_encoder": None, "feature_extractor": None}

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.part_config("transformer")
        return config.whole("in_channels"), config.side(), config.side()

    @property
    def has_t5(self) -> bool:
        """Whether the folder keeps T5, most of its memory. Without it the network gets zeros in its place."""
        return "text_encoder_3" in self.parts("text_encoder")

    def text_pipeline(self, encoders: Mapping[str, nn.Module]) -> diffusers.DiffusionPipeline:
        """As of every folder; diffusers asks its transformer, which is not loaded, how wide T5's zeros are."""
        text = super().text_pipeline(encoders)
        if not self.has_t5:
            width = self.part_config("transformer")["joint_attention_dim"]
            text.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        return text

    @property
    def conditioning_layout(self) -> Layout:
        config, lengths = self.part_config("transformer"), self.text_lengths
        length = lengths["text_encoder"] + (lengths["text_encoder_3"] if self.has_t5 else T5_TOKENS)
        return {
            "prompt_embeds": ((length, config["joint_attention_dim"]), torch.float32),
            "pooled_prompt_embeds": ((config["pooled_projection_dim"],), torch.float32),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D]: tokens of both CLIPs side by side, then those of T5 or zeros; pooled_prompt_embeds [B, P]."""
        embeds, _, pooled, _ = text.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_lengths["text_encoder_3"] if self.has_t5 else T5_TOKENS,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, network, x_t, t_B, conditioning):
        embeds = conditioning["prompt_embeds"]
        return network(
            hidden_states=x_t.to(embeds.dtype),
            timestep=self.path.timestep(t_B),
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def feature_map(self, output, x_t):
        """Image tokens of a block that returns (text, image) tokens; the last one returns no text."""
        _, tokens = output
        return as_map(tokens, x_t)

    def start_sampling(self, steps: int):
        """The scheduler's own sigmas, unlike FLUX."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, **self.shift_arguments(steps))
        return scheduler
