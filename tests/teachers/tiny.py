"""Tiny random teachers and renderings, and the folders they are saved in."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from prd.cameras import orbit_cameras
from prd.rendering.views import Views
from prd.teachers import MVDreamTeacher, RichDreamerTeacher, StableDiffusionTeacher

TEXT_LENGTH, TEXT_WIDTH = 8, 16


def random_views(batch: int, views: int, size: int = 16, seed: int = 0) -> Views:
    """Renderings of noise with plausible ranges."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, views, size, size)
    opacity = torch.rand(*shape, 1, generator=g)
    normal = torch.nn.functional.normalize(torch.randn(*shape, 3, generator=g), dim=-1) * opacity
    azimuth = torch.arange(views)[None] * 90.0 + torch.arange(batch)[:, None] * 10.0
    cameras = orbit_cameras(torch.full((batch, views), 20.0), azimuth, 2.4, 50.0)
    rgb, depth, disparity = (torch.rand(*shape, c, generator=g) for c in (3, 1, 1))
    return Views(rgb, normal, depth, disparity, opacity, cameras)


def save_teacher(folder: Path, kind: str, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A tiny random teacher in the diffusers layout; kind "stable_diffusion", "mvdream" or "richdreamer"."""
    torch.manual_seed(seed)
    cameras = kind != "stable_diffusion"
    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16} if cameras else {}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **extra,
    )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    vocabulary = {token: i for i, token in enumerate([*"abcde", *(f"{c}</w>" for c in "abcde"), "<s>", "</s>"])}
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir()
    (tokenizer_folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tokenizer_folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
    (tokenizer_folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", **special}), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    if kind != "richdreamer":
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).save_pretrained(folder / "vae")
    if cameras:
        (folder / "teacher_config.json").write_text(json.dumps({"camera_encoding": "fourier"}), encoding="utf-8")
    return folder


def save_deepfloyd(folder: Path) -> Path:
    """A tiny random DeepFloyd IF of its own classes: 16 pixels, T5 of width 16, a learned variance."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=TEXT_WIDTH,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="epsilon"
    ).save_pretrained(folder / "scheduler")
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "bad", ",", "front", "view"]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    ).save_pretrained(folder / "tokenizer")
    config = T5Config(vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def save_controlnet(folder: Path, unet: Path) -> Path:
    """A tiny random ControlNet for the U-Net in the folder `unet`: images of 16 pixels for latents of 8."""
    control = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(unet), conditioning_embedding_out_channels=(8, 16)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in control.parameters():  # its ends are zero before training
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    control.save_pretrained(folder)
    return folder


TEACHERS = {
    "stable_diffusion": StableDiffusionTeacher,
    "mvdream": MVDreamTeacher,
    "richdreamer": RichDreamerTeacher,
}


def tiny_teacher(folder: Path, kind: str, prediction_type: str = "epsilon"):
    """A tiny random teacher that went through its folder."""
    return TEACHERS[kind].from_pretrained(save_teacher(folder, kind, prediction_type))
