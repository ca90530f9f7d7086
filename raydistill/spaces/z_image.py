"""Z-Image: single-stream flow transformer on FLUX.1's latents, Qwen3 text encoder.

Its conventions differ from the other families' in three places, all dealt with here: the network counts time from
noise to data and predicts the velocity with the opposite sign, it takes lists of samples with captions of different
lengths, and its pipeline's guidance scale is one less than the usual one (c + s (c - u)).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.spaces.attention_readers import AttentionReader, Recording, Sink, first_blocks, patches, record
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import FlowSpace, as_map
from raydistill.spaces.hub_model import APACHE, HubModel


def watch_turned(attention: nn.Module, sink: Sink) -> None:
    """The positions of every token come as unit complex numbers [B, tokens, d/2]."""

    def read(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Recording:
        turn = kwargs["freqs_cis"].unsqueeze(2)
        pairs = (value.unflatten(-1, (-1, 2)) for value in (q, k))
        precise = (value.to(torch.promote_types(value.dtype, torch.float32)).contiguous() for value in pairs)
        return Recording(*(torch.view_as_real(torch.view_as_complex(value) * turn).flatten(-2) for value in precise))

    record(attention, attention.norm_q, attention.norm_k, read, sink)


class ZImageSpace(FlowSpace):
    """Z-Image, with true CFG. Z-Image-Turbo has the same layout but is step-distilled: it draws, and gives no scores."""

    pipeline_class = "ZImagePipeline"
    hub_models = {
        "Tongyi-MAI/Z-Image": HubModel(APACHE, "z-image"),
        "Tongyi-MAI/Z-Image-Turbo": HubModel(APACHE, "z-image-turbo", distilled_steps=8),
    }
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    default_guidance_scale = 5.0  # 4 in the pipeline's count
    block_lists = ("noise_refiner", "layers")  # blocks of image tokens alone, then those that see image and text
    attention_reader = AttentionReader(
        cut=first_blocks(block_lists, "attention"), watch=watch_turned, image_tokens=patches, image_first=True
    )
    tokens_asked = {"tokenizer": 512}

    @property
    def distilled_sign(self) -> str | None:
        """The two are published with other shifts of the schedule: 6 of Z-Image, 3 of Z-Image-Turbo."""
        schedule = self.part_config("scheduler")
        turbo = not schedule.get("use_dynamic_shifting") and schedule.get("shift") == 3.0
        return f"shift=3 in {schedule.file}, as Z-Image-Turbo" if turbo else super().distilled_sign

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.pixels_of_vae // self.downscale
        return self.part_config("transformer").whole("in_channels"), side, side

    @property
    def conditioning_layout(self) -> Layout:
        width = self.part_config("transformer")["cap_feat_dim"]
        return {
            "prompt_embeds": ((self.text_lengths["text_encoder"], width), torch.float32),
            "prompt_tokens": ((), torch.int64),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero behind each caption; prompt_tokens [B] int64, its length."""
        length = min(self.tokens_asked["tokenizer"], text.tokenizer.model_max_length)
        captions, _ = text.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        padded = [F.pad(caption, (0, 0, 0, length - len(caption))) for caption in captions]
        return {"prompt_embeds": torch.stack(padded), "prompt_tokens": torch.tensor([len(one) for one in captions])}

    def predict(self, network, x_t, t_B, conditioning):
        embeds, tokens = conditioning["prompt_embeds"], conditioning["prompt_tokens"].tolist()
        captions = [row[:count] for row, count in zip(embeds, tokens, strict=True)]
        samples = list(x_t.to(embeds.dtype).unsqueeze(2))  # each [C, 1, H, W]: pictures are films of one frame
        velocities = network(samples, 1 - t_B, captions, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    def feature_map(self, output, x_t):
        """Image tokens, which come first; text and padding follow."""
        height, width = x_t.shape[-2:]
        return as_map(output[:, : height // 2 * (width // 2)], x_t)
