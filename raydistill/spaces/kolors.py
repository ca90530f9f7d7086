"""Kolors: SDXL's UNet on the hidden states of ChatGLM3; its tokenizer needs the sentencepiece package."""

from __future__ import annotations

import torch

from raydistill.spaces.sdxl import SDXLSpace

MAX_TOKENS = 256  # what Kolors was trained with


class KolorsSpace(SDXLSpace):
    """Kolors teachers."""

    pipeline_class = "KolorsPipeline"
    default_guidance_scale = 5.0
    network_settings = {"addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"}
    zeros_for_empty_prompt = False

    def _encode_text(self, text, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L, D] of the last layer but one, and [B, P]: the last layer's last token."""
        embeds, _, pooled, _ = text.encode_prompt(
            prompts,
            device=text.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        return embeds, pooled
