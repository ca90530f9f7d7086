"""Qwen-Image: MMDiT flow transformer on 2×2-packed latents of a film autoencoder, Qwen2.5-VL text encoder.

A picture is a film of one frame to the autoencoder, whose latents are shifted and scaled by channel. Guidance keeps the
length that each token's prediction has without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.attention_readers import AttentionReader, Recording, Sink, first_blocks, record
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import JOINT_ATTENTION, FlowSpace, as_map
from raydistill.spaces.flux import pack, unpack
from raydistill.spaces.hub_model import APACHE, HubModel

SIDE = 128  # of latents: the pipeline's own, for its configuration files name none
EMPTY = " "  # in place of an empty prompt: the negative prompt of the model's card


def watch_image_turned(attention: nn.Module, sink: Sink) -> None:
    """norm_q and norm_k see image tokens alone, whose positions come as unit complex numbers [tokens, d/2]."""

    def read(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Recording:
        turn = kwargs["image_rotary_emb"][0][:, None]
        precise = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (q, k))
        pairs = (torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) for value in precise)
        return Recording(*(torch.view_as_real(pair * turn).flatten(-2) for pair in pairs))

    record(attention, attention.norm_q, attention.norm_k, read, sink)


class QwenImageSpace(FlowSpace):
    """Qwen-Image teachers, with true CFG."""

    pipeline_class = "QwenImagePipeline"
    hub_models = {"Qwen/Qwen-Image": HubModel(APACHE, "qwen-image")}
    lora_targets = (
        *JOINT_ATTENTION,
        *(f"{side}_mlp.net.{layer}" for side in ("img", "txt") for layer in ("0.proj", "2")),
    )
    default_guidance_scale = 4.0
    block_lists = ("transformer_blocks",)
    attention_reader = AttentionReader(cut=first_blocks(block_lists, "attn"), watch=watch_image_turned)
    tokens_asked = {"tokenizer": 512}
    tokens_in_front = 34  # of the template

    # -- latents -----------------------------------------------------------------------------------
    @cached_property
    def downscale(self) -> int:
        return 2 ** len(self.vae_config.several("temperal_downsample"))

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """1024 px; another resolution where `vae/config.json` states `sample_size`, pixels a side."""
        side = self.vae_config.side() // self.downscale if "sample_size" in self.vae_config.stated else SIDE
        return self.part_config("transformer").whole("in_channels") // 4, side, side

    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [C, 1, 1] of raw latents. Raises InputError where they are not one a channel."""
        config, found = self.vae_config, []
        for key in ("latents_mean", "latents_std"):
            values = torch.tensor(config.several(key))
            if values.shape != (config.whole("z_dim"),) or not values.isfinite().all():
                raise config.wrong(key, f"{config['z_dim']} finite numbers")
            found.append(values[:, None, None])
        if not (found[1] > 0).all():
            raise InputError(f"{config.file}: latents_std must be above 0")
        return found[0], found[1]

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        mean, deviation = (value.to(raw) for value in self.statistics)
        return (raw - mean) / deviation

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = (value.to(latents) for value in self.statistics)
        return latents * deviation + mean

    def posterior(self, vae, images):
        found = vae.encode(images.to(vae.dtype).unsqueeze(2)).latent_dist
        return found.mean[:, :, 0], found.std[:, :, 0]

    def decode_raw(self, vae, raw):
        return vae.decode(raw.unsqueeze(2)).sample[:, :, 0]

    # -- text and network --------------------------------------------------------------------------
    @property
    def conditioning_layout(self) -> Layout:
        length = self.text_lengths["text_encoder"]
        return {
            "prompt_embeds": ((length, self.part_config("transformer")["joint_attention_dim"]), torch.float32),
            "prompt_embeds_mask": ((length,), torch.int64),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D], zero behind each prompt; prompt_embeds_mask [B, L], 1 at its tokens.

        The pipeline's template goes around each prompt, and the template's first tokens are dropped behind the encoder.
        All prompts are padded alike, at the right, which changes no token's states in a causal encoder.
        """
        start, length = text.prompt_template_encode_start_idx, self.text_lengths["text_encoder"]
        tokens = text.tokenizer(
            [text.prompt_template_encode.format(prompt or EMPTY) for prompt in prompts],
            max_length=start + length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(text.text_encoder.device)
        states = text.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        mask = tokens.attention_mask[:, start:]
        return {"prompt_embeds": states[:, start:] * mask[:, :, None].to(states.dtype), "prompt_embeds_mask": mask}

    def predict(self, network, x_t, t_B, conditioning):
        height, width = x_t.shape[-2:]
        embeds = conditioning["prompt_embeds"]
        velocity = network(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t_B,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def guided(self, conditional, unconditional, guidance_scale):
        """Each token's guided prediction, of the length that its conditional one has."""
        combined = super().guided(conditional, unconditional, guidance_scale)
        lengths = (F.pixel_unshuffle(one.float(), 2).norm(dim=1, keepdim=True) for one in (conditional, combined))
        before, after = lengths
        return combined * (before / after).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def feature_map(self, output, x_t):
        """Image tokens of a block that returns (text, image) tokens."""
        _, tokens = output
        return as_map(tokens, x_t)
