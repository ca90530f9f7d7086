"""PixArt-Sigma and PixArt-alpha: transformer with cross-attention to T5, on the discrete path, with a learned variance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from raydistill.errors import InputError
from raydistill.spaces.attention_readers import AttentionReader, first_blocks, watch_projections
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.discrete import DiscreteSpace
from raydistill.spaces.hub_model import OPEN_RAIL_PLUS, HubModel
from raydistill.spaces.settings import Settings


class PixArtSigmaSpace(DiscreteSpace):
    """PixArt-Sigma teachers and students.

    PixArt-DMD, a one-step student of this family, sees plain noise at t = 400 (app/app_pixart_dmd.py of
    github.com/PixArt-alpha/PixArt-sigma). At t = 999 its schedule leaves 0.6 % of a picture, and x_0 multiplies an error 157 times.
    """

    pipeline_class = "PixArtSigmaPipeline"
    hub_models = {
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": HubModel(OPEN_RAIL_PLUS, "pixart-sigma-1024"),
        # the transformer alone: the other parts are those of the 1024 px model
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": HubModel(OPEN_RAIL_PLUS, "pixart-sigma-512"),
    }
    network_name = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out")
    default_guidance_scale = 4.5
    block_lists = ("transformer_blocks",)
    # attn1 sees image tokens only; the cross-attention, attn2, is not read.
    attention_reader = AttentionReader(cut=first_blocks(block_lists, "attn1"), watch=watch_projections)
    network_settings = {"norm_type": "ada_norm_single"}
    tokens_padded = 300  # what it was trained with
    student_parts = ("vae", "text_encoder", "tokenizer")
    student_noun = "PixArt transformer"
    last_layer = "proj_out"
    plain_start = True
    call_arguments = {"clean_caption": False, "use_resolution_binning": False}  # as its prompts and its size were

    @cached_property
    def network_config(self) -> Settings:
        config = super().network_config
        channels, outputs = config.whole("in_channels"), config["out_channels"]
        if outputs not in (None, channels, 2 * channels):
            raise InputError(
                f"{self.folder}/transformer/config.json: out_channels is {outputs}, but must be {channels} "
                f"or, with a learned variance, {2 * channels}"
            )
        return config

    @property
    def takes_sizes(self) -> bool:
        """Whether the transformer is conditioned on resolution and aspect ratio; left open, it is at 1024 px."""
        asked = self.network_config.get("use_additional_conditions")
        return self.network_config.side() == 128 if asked is None else asked

    @property
    def conditioning_layout(self) -> Layout:
        length = self.text_lengths["text_encoder"]
        layout: Layout = {
            "prompt_embeds": ((length, self.network_config["caption_channels"]), torch.float32),
            "prompt_attention_mask": ((length,), torch.int64),
        }
        sizes: Layout = {"resolution": ((2,), torch.int64), "aspect_ratio": ((1,), torch.float32)}
        return layout | (sizes if self.takes_sizes else {})

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D] and prompt_attention_mask [B, L] of T5.

        If the transformer takes sizes: also resolution [B, 2] (height and width in pixels) and aspect_ratio [B, 1].
        Captions are lowered and stripped, not cleaned: the pipeline cleans them only where optional packages are there.
        """
        embeds, mask, _, _ = text.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=text.device,
            clean_caption=False,
            max_sequence_length=self.tokens_padded,
        )
        conditioning = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if self.takes_sizes:
            ones = torch.ones(len(prompts), 1, device=embeds.device)
            conditioning |= {"resolution": self.resolution * ones.long().repeat(1, 2), "aspect_ratio": ones}
        return conditioning

    def predict(self, network, x_t, t_B, conditioning):
        """The learned variance, which comes as further channels, is dropped."""
        output = network(
            x_t.to(conditioning["prompt_embeds"].dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=self.path.timestep(t_B),
            added_cond_kwargs={name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def feature_map(self, output, x_t):
        """Tokens [B, hw, D] of a block, one a patch, row by row."""
        patch = self.network_config["patch_size"]
        return output.transpose(1, 2).unflatten(2, (x_t.shape[-2] // patch, x_t.shape[-1] // patch))


class PixArtAlphaSpace(PixArtSigmaSpace):
    """PixArt-alpha teachers and students: fewer text tokens, and the VAE of SD 1.5's layout."""

    pipeline_class = "PixArtAlphaPipeline"
    hub_models = {"PixArt-alpha/PixArt-XL-2-512x512": HubModel(OPEN_RAIL_PLUS, "pixart-alpha-512")}
    tokens_padded = 120
