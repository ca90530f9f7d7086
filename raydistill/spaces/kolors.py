"""Kolors: SDXL's UNet on the hidden states of ChatGLM3; its tokenizer needs the sentencepiece package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from raydistill.spaces.hub_model import HubModel, Licence
from raydistill.spaces.sdxl import SDXLSpace
from raydistill.spaces.settings import built

MAX_TOKENS = 256  # what Kolors was trained with
# What the hub page's tag says, apache-2.0, is the licence of Kolors' code.
LICENCE = Licence(
    "Kolors model licence",
    "other",
    "That of the weights (MODEL_LICENSE); only the code is under Apache License 2.0. Open for academic research; "
    "commercial use needs registration with the Kuaishou Kolors team. Models distilled from it are its derivatives: pass "
    "on the licence with its use restrictions. Its output may improve no other large model.",
)


class KolorsSpace(SDXLSpace):
    """Kolors teachers."""

    pipeline_class = "KolorsPipeline"
    hub_models = {"Kwai-Kolors/Kolors-diffusers": HubModel(LICENCE, "kolors")}
    default_guidance_scale = 5.0
    network_settings = {"addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"}
    tokens_padded = MAX_TOKENS
    student_parts = ()

    def _encode_text(self, text, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L, D] of the last layer but one, and [B, P]: the last layer's last token."""
        embeds, _, pooled, _ = text.encode_prompt(
            prompts,
            device=text.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        return embeds, pooled

    def empty_text_encoder(self, part: str) -> nn.Module:
        """ChatGLM3 is diffusers' own class; its own way of leaving weights empty (`empty_init`) would allocate them."""
        from diffusers.pipelines.kolors import text_encoder as chatglm  # slow: loads transformers' models

        network_class, config = self.text_class(part), self.part_config(part)

        def make() -> nn.Module:
            with torch.device("meta"):
                return network_class(chatglm.ChatGLMConfig(**config), empty_init=False)

        encoder = built(config, chatglm.ChatGLMConfig, make).eval().requires_grad_(False)
        encoder.forward = partial(_without_script, chatglm, encoder.forward)
        return encoder


def _without_script(chatglm: ModuleType, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward of ChatGLM3 on meta tensors, on which its rotary embedding fails, since torch.jit compiled it.

    The embedding is elementwise, and so counted nowhere; for the length of the forward it makes tensors of its shape.
    """
    compiled = chatglm.apply_rotary_pos_emb
    chatglm.apply_rotary_pos_emb = lambda x, rope_cache: torch.empty_like(x)
    try:
        return forward(*args, **kwargs)
    finally:
        chatglm.apply_rotary_pos_emb = compiled
