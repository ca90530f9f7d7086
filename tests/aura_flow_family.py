"""AuraFlow: a family that raydistill does not know, added from outside the package (see raydistill/spaces/__init__.py).

AuraFlow v0.3 (https://huggingface.co/fal/AuraFlow-v0.3): MMDiT flow transformer, and one T5 text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from raydistill.spaces import Conditioning, Space, register
from raydistill.spaces.attention_readers import AttentionReader, first_blocks, patches, watch_norms
from raydistill.spaces.base import Layout
from raydistill.spaces.flow import FlowSpace, as_map
from raydistill.spaces.hub_model import APACHE, HubModel

MAX_TOKENS = 256  # what AuraFlow was trained with


@register
class AuraFlowSpace(FlowSpace):
    """AuraFlow teachers, with true CFG."""

    pipeline_class = "AuraFlowPipeline"
    hub_models = {"fal/AuraFlow": HubModel(APACHE), "fal/AuraFlow-v0.3": HubModel(APACHE)}
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "linear_1",
        "linear_2",
        "out_projection",
    )
    default_guidance_scale = 3.5
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    attention_reader = AttentionReader(cut=first_blocks(block_lists, "attn"), watch=watch_norms, image_tokens=patches)
    start_sampling = Space.start_sampling  # the scheduler's own sigmas

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.part_config("transformer")
        return config["in_channels"], config["sample_size"], config["sample_size"]

    @property
    def text_lengths(self) -> dict[str, int]:
        """The pipeline pads to what it is asked for, whatever the tokenizer says."""
        return dict.fromkeys(super().text_lengths, MAX_TOKENS)

    @property
    def conditioning_layout(self) -> Layout:
        width = self.part_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": ((self.text_lengths["text_encoder"], width), torch.float32)}

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero behind each prompt."""
        embeds, *_ = text.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=text.device, max_sequence_length=MAX_TOKENS
        )
        return {"prompt_embeds": embeds}

    def predict(self, network, x_t, t_B, conditioning):
        embeds = conditioning["prompt_embeds"]
        return network(x_t.to(embeds.dtype), encoder_hidden_states=embeds, timestep=t_B, return_dict=False)[0]

    def feature_map(self, output, x_t):
        """Image tokens: joint blocks return (text, image) tokens, single ones text and then image tokens."""
        tokens = output[1] if isinstance(output, tuple) else output
        return as_map(tokens[:, -patches(x_t) :], x_t)
