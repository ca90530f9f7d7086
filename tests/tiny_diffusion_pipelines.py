"""Tiny random pipelines of the families on the discrete path: the real diffusers and transformers classes.

Networks are given weights large enough for prompt and guidance to matter; nothing is downloaded.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from raydistill.shapes import miniatures
from raydistill.shapes.captions import WORDS

LATENT_SIDE = 8  # 32 px


def randomised(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Move parameters that are constant at initialisation (zero output layers, norms) off their constants."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.min() == parameter.max():
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def vae(scaling_factor: float = 0.13025) -> AutoencoderKL:
    """32 px -> 4 x 8 x 8 in SDXL's layout."""
    return randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=LATENT_SIDE * 4,
            scaling_factor=scaling_factor,
            force_upcast=False,
        )
    )


def sdxl_unet(cross_attention_dim: int, pooled_dim: int, **settings) -> UNet2DConditionModel:
    """SDXL's layout: no attention at the first level, transformers of one and two layers at the next two."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        attention_head_dim=(2, 4, 6),  # diffusers' name for the number of heads
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled_dim + 6 * 8,
        norm_num_groups=8,
        **({"transformer_layers_per_block": (1, 1, 2)} | settings),
    )
    # At its initial scale a prompt hardly reaches the output.
    for name, parameter in unet.named_parameters():
        if "attn2" in name and name.endswith("weight"):
            parameter.data *= 4
    return randomised(unet)


def clip_with_projection(tokenizer) -> CLIPTextModelWithProjection:
    """SDXL's second text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=48,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=miniatures.TEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


OF_INDEX = ("force_zeros_for_empty_prompt",)


def save_sdxl(folder: Path, **settings) -> Path:
    """A StableDiffusionXLPipeline folder with SDXL base's scheduler.

    `settings` go to the UNet, those of OF_INDEX into model_index.json.
    """
    index = {key: settings.pop(key) for key in OF_INDEX if key in settings}
    torch.manual_seed(10)
    tokenizer = miniatures.clip_tokenizer()
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=miniatures.clip_text_encoder(tokenizer).eval(),
        text_encoder_2=clip_with_projection(tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=miniatures.clip_tokenizer(),
        unet=sdxl_unet(cross_attention_dim=64 + 40, pooled_dim=24, **settings),
        scheduler=EulerDiscreteScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
        **index,
    ).save_pretrained(folder)
    return folder


def sd21_unet(latent_side: int, **settings) -> UNet2DConditionModel:
    """Stable Diffusion 2.1's layout: linear projections, a number of heads for each level, none at the last."""
    defaults = {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": (2, 4, 4),  # diffusers' name for the number of heads
        "use_linear_projection": True,
    }
    unet = UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        cross_attention_dim=miniatures.TEXT_WIDTH,
        norm_num_groups=8,
        **(defaults | settings),
    )
    for name, parameter in unet.named_parameters():
        if "attn2" in name and name.endswith("weight"):
            parameter.data *= 4
    return randomised(unet)


# UNets of SD 1.5's layout with blocks left out, as BK-SDM's: fewer layers; no middle block; no deepest level. And one
# whose middle block has no attention.
RELATIVES = {
    "base": {},
    "bare": {"mid_block_type": "UNetMidBlock2D"},
    "small": {"mid_block_type": None},
    "tiny": {
        "mid_block_type": None,
        "block_out_channels": (16, 32),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
}


def save_relative(folder: Path, name: str) -> Path:
    """A StableDiffusionPipeline folder with one of RELATIVES."""
    sd15 = {"attention_head_dim": 4, "use_linear_projection": False}
    return save_sd21(folder, "epsilon", **(sd15 | RELATIVES[name]))


def save_sd21(folder: Path, prediction_type: str, **settings) -> Path:
    """A StableDiffusionPipeline folder: SD 2.1-base (epsilon, PNDM, 32 px) or SD 2.1 (v-prediction, DDIM, 48 px).

    The pixels stand in the ratio of 512 to 768; schedulers are the published ones. `settings` go to the UNet.
    """
    torch.manual_seed(13)
    tokenizer = miniatures.clip_tokenizer()
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    is_base = prediction_type == "epsilon"
    StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=miniatures.clip_text_encoder(tokenizer).eval(),
        tokenizer=tokenizer,
        unet=sd21_unet(LATENT_SIDE if is_base else LATENT_SIDE * 3 // 2, **settings),
        scheduler=PNDMScheduler(skip_prk_steps=True, **common)
        if is_base
        else DDIMScheduler(clip_sample=False, **common),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def chatglm_tokenizer(folder: Path):
    """ChatGLM's tokenizer on a small BPE of the grammar's words."""
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]),
        model_writer=model,
        model_type="bpe",
        vocab_size=80,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(file))


def chatglm(vocabulary: int):
    """ChatGLM3's layout: RMS norms, rotary positions, grouped keys and values."""
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=vocabulary,
        hidden_size=32,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
    )
    model = ChatGLMModel(config, empty_init=False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # left uninitialised by the class
            parameter.data.normal_(1.0, 0.1)
    return model.eval()


def save_kolors(folder: Path) -> Path:
    """A KolorsPipeline folder with the scheduler of Kolors: 1,100 steps."""
    from diffusers import KolorsPipeline

    torch.manual_seed(11)
    tokenizer = chatglm_tokenizer(folder)
    KolorsPipeline(
        vae=vae(),
        text_encoder=chatglm(tokenizer.vocab_size),
        tokenizer=tokenizer,
        unet=sdxl_unet(cross_attention_dim=40, pooled_dim=32, encoder_hid_dim=32, encoder_hid_dim_type="text_proj"),
        scheduler=EulerDiscreteScheduler(
            num_train_timesteps=1100,
            beta_start=0.00085,
            beta_end=0.014,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ).save_pretrained(folder)
    return folder


def pixart_transformer(**settings) -> PixArtTransformer2DModel:
    """Four blocks, with a learned variance."""
    defaults = {"sample_size": LATENT_SIDE, "num_layers": 4, "out_channels": 8, "use_additional_conditions": False}
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        cross_attention_dim=48,
        patch_size=2,
        caption_channels=miniatures.TEXT_WIDTH,
        **(defaults | settings),
    )
    return randomised(transformer)


def save_pixart(folder: Path, **settings) -> Path:
    """A PixArtSigmaPipeline folder with PixArt-Sigma's scheduler; `settings` go to the transformer."""
    torch.manual_seed(12)
    tokenizer = miniatures.t5_tokenizer()
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=miniatures.t5_text_encoder(tokenizer).eval(),
        vae=vae(),
        transformer=pixart_transformer(**settings),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)
    return folder


def save_pixart_alpha(folder: Path) -> Path:
    """A PixArtAlphaPipeline folder in the layout of its 512 px model: no sizes, SD 1.5's scale of latents."""
    torch.manual_seed(14)
    tokenizer = miniatures.t5_tokenizer()
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=miniatures.t5_text_encoder(tokenizer).eval(),
        vae=vae(0.18215),
        transformer=pixart_transformer(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)
    return folder


def save_ssd_1b(folder: Path) -> Path:
    """SSD-1B's layout: no attention in the middle, transformers of other depths on the way up."""
    return save_sdxl(folder, reverse_transformer_layers_per_block=[[1, 2], [2, 1], 1], mid_block_type="UNetMidBlock2D")


def save_vega(folder: Path) -> Path:
    """Segmind-Vega's layout: no attention in the middle, shallow transformers."""
    return save_sdxl(folder, transformer_layers_per_block=(1, 1, 1), mid_block_type="UNetMidBlock2D")
