"""Chroma: FLUX.1's blocks and latents with true CFG, and T5 as its only text encoder.

Its conventions differ from FLUX.1's in three places, all dealt with here. One small network makes the modulations of all
blocks, from a table with a row for each of them: a cut network needs the rows of its own blocks. Padding of the text is
masked, but for its first token. diffusers recomputes activations of single blocks without that mask.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raydistill.spaces.attention_readers import AttentionReader, first_blocks, patches, watch_rotary_norms
from raydistill.spaces.base import Conditioning, Layout
from raydistill.spaces.flow import FlowSpace, image_tokens_behind_text
from raydistill.spaces.flux import FluxSpace, image_ids, pack, unpack
from raydistill.spaces.hub_model import APACHE, HubModel

# of diffusers 0.42, on a class that its Chroma still takes
warnings.filterwarnings("ignore", message=".*FluxPosEmbed.*", category=FutureWarning)

SEEN, UNSEEN = 0.5, -200.0  # of tokens: blocks multiply those of query and key, and attention adds that to its logits


def _keep_modulations(
    network: nn.Module, doubles: Sequence[int], singles: Sequence[int], depth: tuple[int, int]
) -> None:
    """Keep the rows of these blocks in the table from which modulations are made.

    Its order: 3 rows of each single block, 6 of each double block's image side, 6 of its text side, 2 of the output.

    Args:
        depth: double and single blocks that the table has rows for.
    """
    images = 3 * depth[1]
    texts, output = images + 6 * depth[0], images + 12 * depth[0]
    rows = [3 * i + row for i in singles for row in range(3)]
    rows += [start + 6 * i + row for start in (images, texts) for i in doubles for row in range(6)]
    rows += [output, output + 1]
    embedding = network.time_text_embed
    embedding.mod_proj = embedding.mod_proj[rows]


def _cut(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    depth = len(network.transformer_blocks), len(network.single_transformer_blocks)
    network, attentions = first_blocks(FluxSpace.block_lists, "attn")(network, depth_fraction)
    doubles, singles = len(network.transformer_blocks), len(network.single_transformer_blocks)
    _keep_modulations(network, range(doubles), range(singles), depth)
    return network, attentions


class ChromaSpace(FlowSpace):
    """Chroma1-HD and -Base teachers. Chroma1-Flash is step-distilled: it draws, and gives no scores."""

    pipeline_class = "ChromaPipeline"
    hub_models = {
        "lodestones/Chroma1-HD": HubModel(APACHE, "chroma1-hd"),
        "lodestones/Chroma1-Base": HubModel(APACHE),
        "lodestones/Chroma1-Flash": HubModel(APACHE, distilled_steps=8),
    }
    lora_targets, block_lists = FluxSpace.lora_targets, FluxSpace.block_lists
    unused_parts, latent_shape = FluxSpace.unused_parts, FluxSpace.latent_shape
    default_guidance_scale = 5.0
    attention_reader = AttentionReader(cut=_cut, watch=watch_rotary_norms, image_tokens=patches)
    tokens_asked = {"tokenizer": 512}

    @cached_property
    def default_shift(self) -> float:
        """3 where the schedule has beta sigmas instead of a shift, as Chroma1-Base's."""
        return 3.0 if self.scheduler.config.get("use_beta_sigmas") else super().default_shift

    @property
    def conditioning_layout(self) -> Layout:
        length = self.text_lengths["text_encoder"]
        return {
            "prompt_embeds": ((length, self.part_config("transformer")["joint_attention_dim"]), torch.float32),
            "prompt_attention_mask": ((length,), torch.int64),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D] of T5; prompt_attention_mask [B, L], 1 at its tokens and at the first of the padding."""
        length = min(self.tokens_asked["tokenizer"], text.tokenizer.model_max_length)
        embeds, _, mask, *_ = text.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask.long()}

    def predict(self, network, x_t, t_B, conditioning):
        """Tokens that are seen see each other: 0.25 is added to the logits of their pairs, and -100 to others'.

        So padding weighs less than 1e-43, and itself sees padding. A boolean mask, which says the same of tokens that are
        seen, would leave rows of padding without any key, whose softmax is no number in some kernels. diffusers' pipeline
        multiplies 1 and 0, which masks nothing (github.com/huggingface/diffusers/issues/13619).
        """
        height, width = x_t.shape[-2:]
        embeds, tokens = conditioning["prompt_embeds"], pack(x_t)
        mask = torch.where(conditioning["prompt_attention_mask"].bool(), SEEN, UNSEEN).to(embeds.dtype)
        velocity = network(
            hidden_states=tokens.to(embeds.dtype),
            timestep=t_B,
            encoder_hidden_states=embeds,
            img_ids=image_ids(height, width, x_t.device),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
            attention_mask=torch.cat([mask, mask.new_full(tokens.shape[:2], SEEN)], dim=1),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def truncated(self, network, first, last):
        lists = [list(getattr(network, name)) for name in self.block_lists]
        network = super().truncated(network, first, last)
        left = {id(block) for block in self.blocks(network)}
        doubles, singles = ([i for i, block in enumerate(blocks) if id(block) in left] for blocks in lists)
        _keep_modulations(network, doubles, singles, (len(lists[0]), len(lists[1])))
        return network

    def recompute_activations(self, network):
        """Block by block, with all arguments: diffusers' own way runs the single blocks without their mask."""
        for block in self.blocks(network):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def feature_map(self, output, x_t):
        return image_tokens_behind_text(output, x_t)
