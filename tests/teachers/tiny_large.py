"""Tiny random Stable Diffusion XL and 3 and PixArt-Sigma, saved by diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.teachers.tiny import TEXT_LENGTH, save_deepfloyd, save_teacher

POOLED = 12  # channels of each CLIP's pooled embedding


def _clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(latent_channels: int, **settings: object) -> AutoencoderKL:
    """An autoencoder of images of 16 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(save_teacher(folder / "sd", "stable_diffusion") / "tokenizer")
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def make_sdxl(folder: Path) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL; what its tokenizer is read from is written into the folder."""
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16 + 24,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4).eval(),
        text_encoder=CLIPTextModel(_clip(tokenizer, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizer, 24)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def make_sd3(folder: Path) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3; what its tokenizers are read from is written into the folder."""
    tokenizer, floyd = _tokenizer(folder), save_deepfloyd(folder / "if")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=2 * POOLED,
        out_channels=16,
        pos_embed_max_size=8,
    )
    t5 = T5Config(vocab_size=10, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False).eval(),
        text_encoder=CLIPTextModelWithProjection(_clip(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizer, 24)).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=PreTrainedTokenizerFast.from_pretrained(floyd / "tokenizer"),
    )


def make_pixart(folder: Path) -> PixArtSigmaPipeline:
    """A PixArt-Sigma; what its tokenizer is read from is written into the folder."""
    floyd = save_deepfloyd(folder / "if")
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=304,
        sample_size=8,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    t5 = T5Config(vocab_size=10, d_model=304, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return PixArtSigmaPipeline(
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        vae=_vae(4).eval(),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(floyd / "tokenizer"),
    )


def save_pixart(folder: Path) -> Path:
    """Its folder."""
    make_pixart(folder).save_pretrained(folder / "pixart")
    return folder / "pixart"


def save_sdxl(folder: Path) -> Path:
    """Its folder."""
    make_sdxl(folder).save_pretrained(folder / "sdxl")
    return folder / "sdxl"


def save_sd3(folder: Path) -> Path:
    """Its folder."""
    make_sd3(folder).save_pretrained(folder / "sd3")
    return folder / "sd3"
