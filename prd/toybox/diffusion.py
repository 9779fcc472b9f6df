"""Diffusion of the toy box's teachers: their training loss, their samples, and images from and to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras, orbit_cameras
from prd.teachers.depth_control import control_images, run_controlled
from prd.teachers.multiview import camera_vector
from prd.toybox.models import make_scheduler

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # noise [n, C, h, w] of x_t, t and text [n, L, Ct]
GREATEST_WEIGHT = 25.0  # of the error in the noise
SHOWN = [
    "a red cube", "a green cone", "a blue torus", "a yellow wedge", "a purple arrow", "a cyan mug",
    "a red cube on a blue cylinder", "a yellow mug on a green cube",
]  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Return the tokens [n, L] of n captions."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def plain(unet: UNet2DConditionModel, cameras: Tensor | None = None) -> Predict:
    """Return the U-Net, told its cameras [n, D] if it knows any."""
    return lambda x_t, t, text: unet(x_t, t, text, class_labels=cameras).sample


def controlled(unet: UNet2DConditionModel, controlnet: ControlNetModel, disparity: Tensor) -> Predict:
    """Return the U-Net held to the depth in disparities [n, 1, H, W]."""
    control = control_images(disparity)
    return lambda x_t, t, text: run_controlled(unet, controlnet, x_t, t, text, control)


def captions_left_out(captions: list[str], generator: torch.Generator) -> list[str]:
    """Return captions of which a tenth is empty, for classifier-free guidance."""
    return [
        "" if float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu")) < 0.1 else caption
        for caption in captions
    ]


def diffusion_loss(
    predict: Predict,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    x: Tensor,
    captions: list[str],
    generator: torch.Generator,
    *,
    views: int = 1,
) -> Tensor:
    """Return the mean squared error of the noise, weighted by min(1 / a, 25), a scalar with gradient.

    1 / a makes it the error of v = sqrt(a) noise - sqrt(1 - a) x. Unweighted, hardly anything is learnt at high noise,
    where an error in the noise is a large one in x: four views then ignore their cameras.
    Timesteps lean to high noise, and a tenth of the captions is left out.

    x         [n * views, C, h, w] latents or images, the views of a set one after the other
    captions  n texts
    """
    sets = x.shape[0] // views
    device = x.device
    captions = captions_left_out(captions, generator)
    text = text_encoder(tokenize(tokenizer, captions, device)).last_hidden_state.repeat_interleave(views, dim=0)
    t = (
        (1000 * torch.rand(sets, generator=generator, dtype=torch.float32, device="cpu") ** 0.75)
        .long()
        .repeat_interleave(views)
        .to(device)
    )
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    a = make_scheduler().alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    weight = (1 / a).clamp(max=GREATEST_WEIGHT)
    return (weight * (predict(noisy, t, text) - noise).square()).mean()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return scaled latents [n, 4, h, w], drawn from the autoencoder's posterior, of images [n, 3, H, W] in [0, 1]."""
    posterior = vae.encode(images * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32, device="cpu").to(images.device)
    return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return images [n, 3, H, W], about [0, 1], of scaled latents [n, 4, h, w]."""
    return vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5


def shown_cameras(count: int) -> Cameras:
    """Return the four cameras [count, 4] that `sample_views` sees objects from."""
    azimuth = torch.tensor([[30.0, 120.0, 210.0, 300.0]], dtype=torch.float32, device="cpu").expand(count, -1)
    return orbit_cameras(torch.full_like(azimuth, 20.0), azimuth, 2.4, 50.0)


def sample_views(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    shown: Sequence[str] = SHOWN,
    *,
    seed: int,
) -> Tensor:
    """Return samples of n captions from four cameras, [4 * n, 4, h, w]."""
    predict = plain(unet, camera_vector(shown_cameras(len(shown)), "fourier").to(unet.device))
    captions = [caption for caption in shown for _ in range(4)]
    return sample(predict, text_encoder, tokenizer, captions, size=unet.config.sample_size, seed=seed)


@torch.no_grad()
def sample(
    predict: Predict,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    *,
    size: int,
    seed: int,
    scale: float = 2.5,
) -> Tensor:
    """Return DDIM samples with classifier-free guidance, [len(captions), 4, size, size]."""
    device = text_encoder.device
    scheduler = make_scheduler()
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), 4, size, size, generator=generator, dtype=torch.float32, device="cpu").to(device)
    texts = [text_encoder(tokenize(tokenizer, c, device)).last_hidden_state for c in (captions, [""] * len(captions))]
    for t in scheduler.timesteps:
        noise, noise_empty = (predict(x, t, text) for text in texts)
        x = scheduler.step(noise_empty + scale * (noise - noise_empty), t, x).prev_sample
    return x
