"""Z-Image: single-stream flow transformer on FLUX.1's latents, Qwen3 text encoder.

Its conventions differ from the other families' in three places, all dealt with here: the network counts time from
noise to data and predicts the velocity with the opposite sign, it takes lists of samples with captions of different
lengths, and its pipeline's guidance scale is one less than the usual one (c + s (c - u)).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from raydistill.spaces.base import Conditioning
from raydistill.spaces.flow import FlowSpace, as_map


class ZImageSpace(FlowSpace):
    """Z-Image teachers, with true CFG. Z-Image-Turbo has the same layout but is step-distilled: it gives no scores."""

    pipeline_class = "ZImagePipeline"
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

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.vae_config["sample_size"] // self.downscale
        return self.part_config("transformer")["in_channels"], side, side

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero behind each caption; prompt_tokens [B] int64, its length."""
        length = min(512, text.tokenizer.model_max_length)
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
