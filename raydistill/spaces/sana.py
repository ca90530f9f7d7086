"""Sana and Sana 1.5: linear-attention flow transformer on latents of a 32× autoencoder, Gemma 2 text encoder.

Its conventions differ from the other flow families' in four places, all dealt with here: patches are 1×1, the autoencoder
has no posterior, the schedule is that of a DPM-Solver with flow sigmas, and prompts stand behind a long instruction, of
which the empty prompt that guidance contrasts them with has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.attention_readers import AttentionReader, Recording, Sink, first_blocks, record
from raydistill.spaces.base import Conditioning, Layout, Space
from raydistill.spaces.flow import FlowSpace
from raydistill.spaces.hub_model import HubModel, Licence

MAX_TOKENS = 300  # of the pipeline
NVIDIA = Licence(
    "NVIDIA License (NSCL v2-custom)",
    "other",
    "Its model card names this licence for the weights, for research and other non-commercial use, and Gemma's Terms of Use "
    "for the text encoder; only the code is under Apache License 2.0.",
)


def watch_linear(attention: nn.Module, sink: Sink) -> None:
    """Linear attention has no softmax: a query's weights are relu(q)·relu(k), divided by their sum.

    These are handed on as logits. Where rows are standardised (`bridge.attention.normalize`), the sum and the scale fall
    out, and what is compared is the network's own attention.
    """

    def read(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Recording:
        return Recording(*(value.unflatten(-1, (attention.heads, -1)).relu() for value in (q, k)))

    normalised = attention.norm_q is not None
    q, k = (attention.norm_q, attention.norm_k) if normalised else (attention.to_q, attention.to_k)
    record(attention, q, k, read, sink)


class ShortcutIn(nn.Module):
    """The first convolution of a DC-AE's decoder, and the latents' channels repeated beside it (arXiv 2410.10733)."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.conv_in, self.repeats = decoder.conv_in, decoder.in_shortcut_repeats if decoder.in_shortcut else 0

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(raw)
        return x + raw.repeat_interleave(self.repeats, dim=1, output_size=x.shape[1]) if self.repeats else x


class SanaSpace(FlowSpace):
    """Sana and Sana 1.5: teachers, with true CFG, and students."""

    pipeline_class = "SanaPipeline"
    hub_models = {
        "Efficient-Large-Model/Sana_600M_512px_diffusers": HubModel(NVIDIA, "sana-0.6b-512"),
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": HubModel(NVIDIA, "sana1.5-1.6b"),
        "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": HubModel(NVIDIA, "sana1.5-4.8b"),
    }
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_out")  # the feed-forwards are convolutions
    default_guidance_scale = 4.5
    block_lists = ("transformer_blocks",)
    # attn1 sees image tokens only; the cross-attention, attn2, is not read.
    attention_reader = AttentionReader(cut=first_blocks(block_lists, "attn1"), watch=watch_linear)
    tokens_padded = MAX_TOKENS
    tokens_in_front = 230  # estimated: the instruction has 205 words and signs
    student_parts = ("vae", "text_encoder", "tokenizer")
    student_noun = "Sana transformer"
    last_layer = "proj_out"
    plain_start = True
    call_arguments = {"use_resolution_binning": False}

    # -- latents -----------------------------------------------------------------------------------
    @cached_property
    def downscale(self) -> int:
        return 2 ** (len(self.vae_config.several("encoder_block_out_channels")) - 1)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.part_config("transformer")
        return config.whole("in_channels"), config.side(), config.side()

    def posterior(self, vae, images):
        """The autoencoder's latents, without deviation."""
        latents = vae.encode(images.to(vae.dtype)).latent
        return latents, torch.zeros_like(latents)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The deepest stage of a DC-AE's decoder keeps the grid, and every other doubles it."""
        return tuple(self.vae_config.several("decoder_block_out_channels")[::-1])

    def decoder_prefix(self, vae, doublings):
        return [ShortcutIn(vae.decoder), *list(vae.decoder.up_blocks)[::-1][: doublings + 1]]

    # -- schedule ----------------------------------------------------------------------------------
    @cached_property
    def default_shift(self) -> float:
        config = self.scheduler.config
        return config.get("flow_shift") or config.shift  # of DPM-Solver, or of the Euler scheduler

    def start_sampling(self, steps: int):
        return Space.start_sampling(self, steps)

    # -- students ----------------------------------------------------------------------------------
    def one_step_scheduler(self, start_timestep: int) -> SchedulerMixin:
        """The pipeline's own DPM-Solver, of first order: from sigma = start / N to 0 its step is x_0 = x_t - sigma v.

        Its single sigma is 1 - 1/N, shifted as sigma' = k sigma / (1 + (k - 1) sigma); k puts it where the student starts.

        Raises:
            InputError: the start timestep is not on the path.
        """
        steps = self.path.num_train_timesteps
        if not 0 < start_timestep < steps:
            raise InputError(f"start_timestep {start_timestep} is outside 1 … {steps - 1}, the steps of {self.folder}")
        own, wanted = 1 - 1 / steps, start_timestep / steps
        shift = 1.0 if start_timestep == steps - 1 else wanted * (1 - own) / (own * (1 - wanted))
        return DPMSolverMultistepScheduler(
            num_train_timesteps=steps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift * (1 + 1e-9),  # timesteps are cut to whole numbers
            solver_order=1,
        )

    @property
    def draws_at_once(self) -> bool:
        """By a DPM-Solver as `one_step_scheduler` makes it; the published ones are of second order."""
        config = self.scheduler.config
        return bool(config.get("use_flow_sigmas")) and config.get("solver_order") == 1

    def start_of(self, scheduler):
        """Of a DPM-Solver as `one_step_scheduler` makes it."""
        shift, steps = scheduler.get("flow_shift"), scheduler.get("num_train_timesteps")
        if scheduler.get("solver_order") != 1 or not shift or not isinstance(steps, int):
            return None
        sigma = 1 - 1 / steps
        return int(steps * shift * sigma / (1 + (shift - 1) * sigma))

    # -- text and network --------------------------------------------------------------------------
    @property
    def conditioning_layout(self) -> Layout:
        length = self.text_lengths["text_encoder"]
        return {
            "prompt_embeds": ((length, self.part_config("transformer")["caption_channels"]), torch.float32),
            "prompt_attention_mask": ((length,), torch.int64),
        }

    @torch.no_grad()
    def encode_prompts(self, text, prompts: Sequence[str]) -> Conditioning:
        """prompt_embeds [B, L, D] and prompt_attention_mask [B, L] of Gemma 2.

        A prompt stands behind the pipeline's instruction, whose first and last tokens are kept. An empty one stands alone.
        Captions are lowered and stripped, not cleaned.
        """
        instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
        rows: list[tuple[torch.Tensor, torch.Tensor]] = [None] * len(prompts)
        for lead in (instruction, None):
            chosen = [i for i, prompt in enumerate(prompts) if bool(prompt) == bool(lead)]
            if chosen:
                embeds, mask, *_ = text.encode_prompt(
                    [prompts[i] for i in chosen],
                    do_classifier_free_guidance=False,
                    max_sequence_length=MAX_TOKENS,
                    complex_human_instruction=lead,
                )
                for i, *row in zip(chosen, embeds, mask, strict=True):
                    rows[i] = tuple(row)
        embeds, masks = zip(*rows, strict=True)
        return {"prompt_embeds": torch.stack(embeds), "prompt_attention_mask": torch.stack(masks)}

    def predict(self, network, x_t, t_B, conditioning):
        embeds = conditioning["prompt_embeds"]
        return network(
            x_t.to(embeds.dtype),
            encoder_hidden_states=embeds,
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=self.path.timestep(t_B) * self.part_config("transformer")["timestep_scale"],
            return_dict=False,
        )[0][:, : x_t.shape[1]]

    def feature_map(self, output, x_t):
        """Tokens [B, hw, D] of a block, one a patch, row by row."""
        patch = self.part_config("transformer")["patch_size"]
        return output.transpose(1, 2).unflatten(2, (x_t.shape[-2] // patch, x_t.shape[-1] // patch))
