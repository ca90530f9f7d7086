"""Constructors of the miniature models: real diffusers and transformers classes with small numbers.

Weights are random here; `build_shapes/` trains them and writes them into ordinary diffusers folders.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from raydistill.shapes.captions import WORDS

TEACHER_PIXELS, STUDENT_PIXELS = 64, 32
TEXT_LENGTH = 20  # tokens that a text encoder reads: the longest caption, 19 words of two objects, and T5's end token
TEXT_WIDTH = 64
GEMMA_WIDTH = 48


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which every word of the grammar is one token; other text falls back to bytes.

    A caption of two objects has 21 tokens with CLIP's two marks, one more than `TEXT_LENGTH`. The word that does not fit
    is always "background", and it says nothing that the colour before it does not. The encoders were trained on captions
    cut in this way. The tokenizer says so (`trained_without_ending`), for those who count cut prompts.
    """
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    pieces, merges = [*alphabet, *(c + "</w>" for c in alphabet)], []
    for word in sorted(WORDS, key=lambda w: (-len(w), w)):  # longest first, or a shorter word's merge splits it
        letters = [*word[:-1], word[-1] + "</w>"]
        piece = letters[0]
        for letter in letters[1:]:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
                pieces.append(piece + letter)
            piece += letter
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH, trained_without_ending="background")


def t5_tokenizer() -> T5Tokenizer:
    """Unigram tokenizer: one token a word of the grammar, letters for anything else."""
    letters = [(chr(c), -20.0) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((f"▁{w}", -1.0) for w in WORDS), *letters]
    vocab = list({piece: (piece, log_p) for piece, log_p in reversed(vocab)}.values())[::-1]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_text_encoder(tokenizer: CLIPTokenizer, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """`projected`: with the projection that makes pooled embeddings (SDXL's second encoder, both CLIPs of SD 3)."""
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model_class(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def with_identity_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder, whose pooled output is also its projected one."""
    projected = CLIPTextModelWithProjection(encoder.config)
    projected.text_model.load_state_dict(encoder.state_dict())
    torch.nn.init.eye_(projected.text_projection.weight)
    return projected


def without_projection(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same encoder for a pipeline that reads its tokens only."""
    plain = CLIPTextModel(encoder.config)
    plain.load_state_dict(encoder.text_model.state_dict())
    return plain


def t5_text_encoder(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def sana_instruction() -> str:
    """What a SanaPipeline puts in front of every prompt but the empty one."""
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def gemma_tokenizer() -> GemmaTokenizer:
    """BPE with one token a word of the grammar and of the pipeline's instruction, letters for anything else.

    Every merge puts one letter to the beginning of a word, so that their order decides nothing.
    """
    pieces, merges = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "▁", *map(chr, range(33, 127))], []
    for word in sorted({*WORDS, *sana_instruction().split()}):
        piece = "▁"
        for letter in word:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
                pieces.append(piece + letter)
            piece += letter
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def gemma_text_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Two layers of grouped queries; 512 tokens hold the pipeline's instruction and the 300 that it keeps."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=GEMMA_WIDTH,
            intermediate_size=2 * GEMMA_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            max_position_embeddings=512,
            sliding_window=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _vae(widths: tuple[int, int, int], channels: int, pixels: int, **settings: bool) -> AutoencoderKL:
    """Latents of a quarter of the picture's side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=pixels,
        **settings,
    )


def teacher_vae() -> AutoencoderKL:
    """64 px -> 8 x 16 x 16, without the 1x1 quantisation convolutions, as in FLUX.1."""
    return _vae((16, 32, 48), 8, TEACHER_PIXELS, use_quant_conv=False, use_post_quant_conv=False)


def student_vae() -> AutoencoderKL:
    """32 px -> 4 x 8 x 8, in the layout of SD 1.5."""
    return _vae((24, 32, 48), 4, STUDENT_PIXELS)


def flux_transformer() -> FluxTransformer2DModel:
    """2 double and 3 single blocks, 96 wide; no guidance embedding, so true CFG."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * 8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def sdxl_vae() -> AutoencoderKL:
    """64 px -> 4 x 16 x 16, as SDXL's on the teachers' common grid."""
    return _vae((16, 24, 40), 4, TEACHER_PIXELS)


def sd3_transformer() -> SD3Transformer2DModel:
    """4 joint blocks, 84 wide, with RMS-normalised queries and keys and one dual attention, as SD 3.5 Medium."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=28,
        num_attention_heads=3,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=84,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def sdxl_unet() -> UNet2DConditionModel:
    """16 x 16 without and 8 x 8 with cross-attention, picture sizes and pooled text added to the time, as SDXL."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(4, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 16,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def sana_vae() -> AutoencoderDC:
    """64 px -> 16 x 4 x 4: a deep-compression autoencoder of 16 times, a grid coarser than the students'."""
    blocks = ("ResBlock",) * 4 + ("EfficientViTBlock",)
    widths, layers, scales = (16, 16, 32, 32, 32), (0, 1, 1, 1, 1), ((), (), (), (), (5,))
    return AutoencoderDC(
        latent_channels=16,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


def sana_transformer() -> SanaTransformer2DModel:
    """4 blocks of linear attention, 64 wide, patches of 1 x 1, with RMS-normalised queries and keys, as Sana 1.5."""
    return SanaTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=GEMMA_WIDTH,
        sample_size=4,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
    )


def _student_unet(**settings: Any) -> UNet2DConditionModel:
    """Two cross-attention levels: 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=STUDENT_PIXELS // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        **settings,
    )


def student_unet() -> UNet2DConditionModel:
    """In the layout of SD 1.5."""
    return _student_unet(block_out_channels=(40, 72), attention_head_dim=4)


def sd21_unet() -> UNet2DConditionModel:
    """As `student_unet`, with SD 2.1's heads by level and linear projections."""
    return _student_unet(block_out_channels=(32, 56), attention_head_dim=(4, 7), use_linear_projection=True)


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)


def sana_scheduler() -> DPMSolverMultistepScheduler:
    """Sana's: a DPM-Solver of second order on flow sigmas."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )


SD_NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def student_scheduler() -> DDIMScheduler:
    """The noise schedule of SD 1.5."""
    return DDIMScheduler(**SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """The noise schedule of SDXL, which is SD 1.5's; trailing, so that few steps start from pure noise."""
    return EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="trailing")
