"""Tiny random pipelines of the rectified-flow families: the real diffusers and transformers classes.

Pictures are 32 px, latents 8×8, image tokens 4×4. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_diffusion_pipelines import randomised
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from raydistill.shapes import miniatures

PIXELS, LATENT_SIDE, TEXT_LENGTH = 32, 8, 160
CHANNELS = 6  # of latents

VAE_LAYOUT = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 4,
    "sample_size": PIXELS,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def vae() -> AutoencoderKL:
    """The layout of SD 3 and FLUX.1: no 1×1 convolutions, a scale and a shift."""
    return randomised(
        AutoencoderKL(
            **VAE_LAYOUT, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7, shift_factor=0.2
        )
    )


def flux2_vae() -> AutoencoderKLFlux2:
    """FLUX.2's layout, with statistics that a forgotten square root, eps or order of channels would show up in."""
    model = AutoencoderKLFlux2(**VAE_LAYOUT, batch_norm_eps=0.03)
    generator = torch.Generator().manual_seed(5)
    model.bn.running_mean.normal_(std=0.5, generator=generator)
    model.bn.running_var.uniform_(0.2, 3.0, generator=generator)
    return randomised(model)


def scheduler(dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """SD 3.5's (a constant shift of 3) or FLUX's (a shift that depends on the resolution)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=dynamic)


def clip_with_projection(tokenizer, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=miniatures.TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def qwen_tokenizer(longest: int = TEXT_LENGTH) -> Qwen2Tokenizer:
    """One token a byte, and the chat template of Qwen3 without its tools."""
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:], model_max_length=longest)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,  # the outputs of prompts would hardly differ at 0.02
    )


def sd3_transformer(**settings) -> SD3Transformer2DModel:
    """Four blocks, the first two with SD 3.5 Medium's second attention."""
    settings = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} | settings
    return randomised(
        SD3Transformer2DModel(
            sample_size=LATENT_SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=miniatures.TEXT_WIDTH,
            caption_projection_dim=48,
            pooled_projection_dim=24 + 32,
            pos_embed_max_size=12,
            **settings,
        )
    )


def save_sd3(folder: Path) -> Path:
    """A StableDiffusion3Pipeline folder in the layout of SD 3.5 Medium."""
    torch.manual_seed(20)
    clip, t5 = miniatures.clip_tokenizer(), miniatures.t5_tokenizer()
    StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=scheduler(dynamic=False),
        vae=vae(),
        text_encoder=clip_with_projection(clip, 24),
        tokenizer=clip,
        text_encoder_2=clip_with_projection(clip, 32),
        tokenizer_2=miniatures.clip_tokenizer(),
        text_encoder_3=miniatures.t5_text_encoder(t5).eval(),
        tokenizer_3=t5,
    ).save_pretrained(folder)
    return folder


def save_flux_dev(folder: Path) -> Path:
    """A FluxPipeline folder in the layout of FLUX.1 [dev]: embedded guidance, dynamic shifting."""
    torch.manual_seed(21)
    clip, t5 = miniatures.clip_tokenizer(), miniatures.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=miniatures.TEXT_WIDTH,
        pooled_projection_dim=miniatures.TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    FluxPipeline(
        scheduler=scheduler(dynamic=True),
        vae=vae(),
        text_encoder=miniatures.clip_text_encoder(clip).eval(),
        tokenizer=clip,
        text_encoder_2=miniatures.t5_text_encoder(t5).eval(),
        tokenizer_2=t5,
        transformer=randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_flux2(folder: Path, **index) -> Path:
    """A Flux2KleinPipeline folder in the layout of FLUX.2 [klein] base; `index` goes into model_index.json.

    The text encoder has the 28 layers that the pipeline's choice of hidden states (9, 18, 27) needs.
    """
    torch.manual_seed(22)
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    Flux2KleinPipeline(
        scheduler=scheduler(dynamic=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, 28)).eval(),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
        **index,
    ).save_pretrained(folder)
    return folder


def save_z_image(folder: Path) -> Path:
    """A ZImagePipeline folder; its 16 image tokens are padded to 32, as are captions of other lengths."""
    torch.manual_seed(23)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=48,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[TEXT_LENGTH + 64, 16, 16],
    )
    ZImagePipeline(
        scheduler=scheduler(dynamic=False),
        vae=vae(),
        text_encoder=Qwen3Model(qwen_config(tokenizer, 3)).eval(),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_chroma(folder: Path) -> Path:
    """A ChromaPipeline folder in the layout of Chroma1-HD."""
    torch.manual_seed(24)
    t5 = miniatures.t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=miniatures.TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    ChromaPipeline(
        scheduler=scheduler(dynamic=False),
        vae=vae(),
        text_encoder=miniatures.t5_text_encoder(t5).eval(),
        tokenizer=t5,
        transformer=randomised(transformer),
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a character."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return Gemma2Model(config).eval()


def save_sana(folder: Path) -> Path:
    """A SanaPipeline folder in the layout of Sana 1.5, with patches of 2×2 and an autoencoder of 4×."""
    torch.manual_seed(25)
    tokenizer = gemma_tokenizer()
    blocks, widths = ("ResBlock", "ResBlock", "EfficientViTBlock"), (12, 12, 12)
    codec = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.4,
    )
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=16,
        sample_size=LATENT_SIDE,
        patch_size=2,
        qk_norm="rms_norm_across_heads",
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=randomised(codec),
        transformer=randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    ).save_pretrained(folder)
    return folder


def save_qwen_image(folder: Path) -> Path:
    """A QwenImagePipeline folder; its VAE's configuration states the pixels, as published ones do not."""
    torch.manual_seed(26)
    tokenizer = qwen_tokenizer(longest=2 * TEXT_LENGTH)
    text = Qwen2_5_VLConfig(
        text_config=qwen_config(tokenizer, 2).to_dict()
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "fullatt_block_indexes": [0]},
    )  # fmt: skip
    statistics = torch.linspace(0.5, 2.0, CHANNELS).tolist()
    film = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=statistics[::-1],
        latents_std=statistics,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 12, 12),
    )
    schedule = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, use_dynamic_shifting=True)
    QwenImagePipeline(
        scheduler=schedule,
        vae=randomised(film),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text).eval(),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    ).save_pretrained(folder)
    file = folder / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": PIXELS}))
    return folder


SAVE = {
    "sd3": save_sd3,
    "flux-dev": save_flux_dev,
    "flux2": save_flux2,
    "z-image": save_z_image,
    "chroma": save_chroma,
    "sana": save_sana,
    "qwen-image": save_qwen_image,
}
SHORT = (
    "sd3",
    "flux-dev",
    "flux2",
    "z-image",
)  # families of which tests that many families share run in the short lane
