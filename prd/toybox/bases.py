"""Other bases of the toy box: a tiny Stable Diffusion XL, PixArt-Sigma and Stable Diffusion 3, of the real classes.

They are trained from scratch on the world's single views (`examples/train_toybox.py --stages sdxl pixart vae16 sd3`),
saved in diffusers' layout, and given to a student as `--model.base FOLDER`. What differs between the real ones differs
here: two CLIPs and a pooled embedding; a transformer with a T5 whose padding is masked; a transformer of text and image
in one sequence that predicts a flow of 16 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from prd.text.encoders import PromptEncoder
from prd.text.pixart import MaskedT5PromptEncoder
from prd.text.sd3 import Sd3PromptEncoder, ThreeTextEncoders
from prd.text.sdxl import SdxlPromptEncoder, TwoTextEncoders
from prd.toybox.diffusion import GREATEST_WEIGHT, captions_left_out
from prd.toybox.models import IMAGE_SIZE, TEXT_LENGTH, TEXT_WIDTH, make_scheduler, make_text_encoder, make_tokenizer

HEADS, HEAD_WIDTH, BLOCKS = 6, 16, 4  # of both transformers
FLOW_CHANNELS = 16
PICTURE = (1024, 1024, 0, 0, 1024, 1024)  # what Stable Diffusion XL is told: a whole picture
SIZE_WIDTH = 8  # channels per number of it

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # prediction [n, C, h, w] of x_t, t [n] and text [n, L, Ct]


@dataclass(frozen=True)
class ToyBase:
    """A base before or after training.

    pipeline  of diffusers: its parts, and how it is saved
    network   the part that denoises
    encoder   its text encoders as one
    predict   the network's prediction, as `prd.adapters` calls it for one image in the place of six planes
    flow      the network predicts noise - x of a flow, not a diffusion's noise
    """

    pipeline: DiffusionPipeline
    network: Any
    encoder: PromptEncoder
    predict: Network
    flow: bool = False

    @property
    def trained(self) -> list[Any]:
        """The modules that are trained: the network and its text encoders."""
        return [self.network, self.encoder.model]


def make_sdxl(vae: AutoencoderKL) -> ToyBase:
    """Make a Stable Diffusion XL on latents [B, 4, 8, 8]: attention on the inner level alone, two CLIPs."""
    tokenizer = make_tokenizer()
    first = make_text_encoder(tokenizer)
    second = CLIPTextModelWithProjection(first.config)
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + len(PICTURE) * SIZE_WIDTH,
    )

    def predict(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        sizes = torch.tensor(PICTURE, dtype=text.dtype, device=text.device).expand(len(text), -1)
        added = {"text_embeds": text[:, -1, :TEXT_WIDTH], "time_ids": sizes}
        return unet(x_t, t, text[:, :-1], added_cond_kwargs=added).sample

    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=False,  # an empty caption is a text here, as in training
    )
    encoder = SdxlPromptEncoder((tokenizer, tokenizer), TwoTextEncoders(first, second))
    return ToyBase(pipeline, unet, encoder, predict)


def make_t5(tokenizer: CLIPTokenizer, width: int) -> T5EncoderModel:
    """Make the encoder of a T5 with two layers, which reads CLIP's tokens here."""
    heads = 4
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=2,
            num_heads=heads,
            n_positions=TEXT_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            dropout_rate=0.0,
        )
    )


def make_pixart(vae: AutoencoderKL) -> ToyBase:
    """Make a PixArt-Sigma on latents [B, 4, 8, 8] in patches of 2x2, with PixArt's own noise schedule."""
    tokenizer = make_tokenizer()
    text_encoder = make_t5(tokenizer, TEXT_WIDTH)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        num_layers=BLOCKS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=IMAGE_SIZE // 4,
        use_additional_conditions=False,
    )

    def predict(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        mask = text[:, -1, : text.shape[1] - 1]
        sizes = {"resolution": None, "aspect_ratio": None}
        given = {"encoder_attention_mask": mask, "added_cond_kwargs": sizes}
        return transformer(x_t, encoder_hidden_states=text[:, :-1], timestep=t, **given).sample

    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon"
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    return ToyBase(pipeline, transformer, MaskedT5PromptEncoder(tokenizer, text_encoder), predict)


def make_sd3(vae: AutoencoderKL) -> ToyBase:
    """Make a Stable Diffusion 3 on latents [B, 16, 8, 8] in patches of 2x2: three text encoders, a flow of shift 3."""
    tokenizer = make_tokenizer()
    first = CLIPTextModelWithProjection(make_text_encoder(tokenizer).config)
    second, third = CLIPTextModelWithProjection(first.config), make_t5(tokenizer, 2 * TEXT_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=FLOW_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        out_channels=FLOW_CHANNELS,
        pos_embed_max_size=IMAGE_SIZE // 8,
    )

    def predict(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        given = {"encoder_hidden_states": text[:, :-1], "pooled_projections": text[:, -1]}
        return transformer(hidden_states=x_t, timestep=t, **given).sample

    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer,
    )
    encoder = Sd3PromptEncoder((tokenizer,) * 3, ThreeTextEncoders(first, second, third, 2 * TEXT_WIDTH))
    return ToyBase(pipeline, transformer, encoder, predict, flow=True)


BASES: dict[str, Callable[[AutoencoderKL], ToyBase]] = {"sdxl": make_sdxl, "pixart": make_pixart, "sd3": make_sd3}


def base_loss(base: ToyBase, x: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
    """Return the loss a base is trained with on latents [n, C, h, w] of captions, a scalar with gradient.

    Of a diffusion the error of the noise, weighted as in `prd.toybox.diffusion.diffusion_loss`; of a flow that of
    noise - x at x_t = (1 - s) x + s noise, s the logistic function of a normal draw (Esser et al. 2024, section 3.1).
    """
    text = base.encoder.encode(captions_left_out(captions, generator))
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    if base.flow:
        s = torch.randn(len(x), generator=generator, dtype=torch.float32, device="cpu").sigmoid().to(x.device)
        x_t = (1 - s.view(-1, 1, 1, 1)) * x + s.view(-1, 1, 1, 1) * noise
        return (base.predict(x_t, 1000 * s, text) - (noise - x)).square().mean()
    drawn = torch.rand(len(x), generator=generator, dtype=torch.float32, device="cpu")
    t = (1000 * drawn**0.75).long().to(x.device)
    a = base.pipeline.scheduler.alphas_cumprod.to(x.device)[t].view(-1, 1, 1, 1)
    weight = (1 / a).clamp(max=GREATEST_WEIGHT)
    return (weight * (base.predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, text) - noise).square()).mean()


@torch.no_grad()
def sample_base(base: ToyBase, captions: list[str], *, seed: int, steps: int = 25, scale: float = 2.5) -> Tensor:
    """Return samples [n, C, h, w] with classifier-free guidance by the base's own scheduler, latents as trained."""
    device = base.encoder.device
    scheduler: Any = base.pipeline.scheduler
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    channels, size = base.network.config["in_channels"], IMAGE_SIZE // 4
    shape = (len(captions), channels, size, size)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    texts = [base.encoder.encode(c) for c in (captions, [""] * len(captions))]
    for t in scheduler.timesteps:
        told = t.to(device).expand(len(x))
        guided, empty = (base.predict(x, told, text) for text in texts)
        x = scheduler.step(empty + scale * (guided - empty), t, x).prev_sample
    return x
