"""A tiny random AuraFlowPipeline, and the metadata of a package that adds its family."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from tiny_diffusion_pipelines import randomised, vae
from tiny_flow_pipelines import scheduler
from transformers import UMT5Config, UMT5EncoderModel

from raydistill.shapes import miniatures

PIXELS, SIDE, CHANNELS = 32, 8, 4  # pictures and latents


def save_aura_flow(folder: Path) -> Path:
    """Two joint blocks, three single ones."""
    torch.manual_seed(30)
    t5, width = miniatures.t5_tokenizer(), miniatures.TEXT_WIDTH
    transformer = AuraFlowTransformer2DModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=32,
        pos_embed_max_size=36,
    )
    randomised(transformer)
    for parameter in transformer.parameters():
        parameter.data *= 4  # the prompt would hardly matter to so narrow a network
    text = UMT5Config(vocab_size=len(t5), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    AuraFlowPipeline(
        tokenizer=t5,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae(),
        transformer=transformer,
        scheduler=scheduler(dynamic=False),
    ).save_pretrained(folder)
    return folder


def install(site: Path) -> Path:
    """What pip writes for a package with the entry point of `aura_flow_family`; `site` belongs on the path."""
    metadata = site / "aura_flow_family-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: aura-flow-family\nVersion: 1.0\n")
    entry = "AuraFlowPipeline = aura_flow_family:AuraFlowSpace"
    (metadata / "entry_points.txt").write_text(f"[raydistill.families]\n{entry}\n")
    return site
