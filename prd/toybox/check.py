"""Checks that a toy teacher must pass before anything is distilled from it: it uses its cameras, or its depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.teachers.base import epsilon_from
from prd.teachers.depth_control import control_images, run_controlled
from prd.teachers.multiview import camera_vector
from prd.toybox.data import BACKGROUND, ViewPool, ViewSets
from prd.toybox.diffusion import controlled, decode_images, plain, sample
from prd.toybox.models import make_scheduler
from prd.toybox.world import ASYMMETRIC_SHAPES, SHAPES

REQUIRED_RATIO = 1.5
REQUIRED_DEPTH_RATIO = 1.5
CHECKED_TIMESTEPS = (500, 800)
OBJECT_CONTRAST = 0.14  # from the background, of a pixel half covered by the palest colour
OBJECT_DISPARITY = 0.2  # of a pixel half covered by an object at the middle distance


def turned(cameras: Cameras, degrees: float) -> Cameras:
    """Turn cameras about the world's z axis."""
    turn = torch.eye(4, dtype=cameras.fovy.dtype, device=cameras.fovy.device)
    a = torch.deg2rad(turn.new_tensor(degrees))
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = a.cos(), -a.sin(), a.sin(), a.cos()
    return Cameras(turn @ cameras.camera_to_world, cameras.fovy)


@torch.no_grad()
def camera_ratios(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pool: ViewPool,
    encode: Callable[[ViewSets], Tensor],
    *,
    generator: torch.Generator,
    device: str = "cpu",
    count: int = 12,
    scheduler: DDIMScheduler | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the denoising error with cameras turned by 90 degrees over that with the right ones.

    Returns the ratios by shape and timestep.

    encode turns `count` four-view sets into the U-Net's input [4 * count, C, h, w]; scheduler is the U-Net's, by
    default the one that the toy box trains with. Below `REQUIRED_RATIO` on an asymmetric shape the teacher does not
    know where it looks from.
    """

    def predict(x_t: Tensor, t: int, text: Tensor, labels: Tensor) -> Tensor:
        return unet(x_t, t, text, class_labels=labels).sample

    ratios: dict[str, dict[str, float]] = {}
    for shape in ASYMMETRIC_SHAPES:
        batch = pool.draw(count, generator, only=(shape, 0))
        x = encode(batch)
        text = _encode_text(text_encoder, tokenizer, batch.captions, device)
        right, wrong = (camera_vector(turned(batch.cameras, turn), "fourier").to(device) for turn in (0.0, 90.0))
        ratios[shape] = _error_ratios(predict, x, text, right, wrong, generator, scheduler or make_scheduler())
    return ratios


@torch.no_grad()
def depth_ratios(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pool: ViewPool,
    encode: Callable[[ViewSets], Tensor],
    *,
    generator: torch.Generator,
    device: str = "cpu",
    count: int = 12,
    scheduler: DDIMScheduler | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the denoising error with the depth of another shape over that with the right one.

    Returns the ratios by shape and timestep.

    The other is the next of `SHAPES`, seen from cameras of its own; the caption stays. encode and scheduler are those
    of `camera_ratios`. Below `REQUIRED_DEPTH_RATIO` on a shape the ControlNet does not use what it is shown.
    """

    def predict(x_t: Tensor, t: int, text: Tensor, control: Tensor) -> Tensor:
        return run_controlled(unet, controlnet, x_t, t, text, control)

    batches = {shape: pool.draw(count, generator, only=(shape, 0)) for shape in SHAPES}
    controls = {shape: control_images(batch.disparity.flatten(0, 1)).to(device) for shape, batch in batches.items()}
    ratios: dict[str, dict[str, float]] = {}
    noise = scheduler or make_scheduler()
    for shape, other in zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True):
        x = encode(batches[shape])
        text = _encode_text(text_encoder, tokenizer, batches[shape].captions, device)
        ratios[shape] = _error_ratios(predict, x, text, controls[shape], controls[other], generator, noise)
    return ratios


def depth_images(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    batch: ViewSets,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Return images of a batch's n captions and views, each [4 * n, 3, H, W] in about [0, 1].

    "rendering" is the batch's own, "controlled" is made with the depth that it has, "plain" without.
    """
    disparity, rgb = (images.flatten(0, 1).to(unet.device) for images in (batch.disparity, batch.rgb))
    captions = [caption for caption in batch.captions for _ in range(4)]
    images = {"rendering": rgb}
    for name, predict in (("controlled", controlled(unet, controlnet, disparity)), ("plain", plain(unet))):
        latents = sample(predict, text_encoder, tokenizer, captions, size=unet.config.sample_size, seed=seed)
        images[name] = decode_images(vae, latents)
    return images


def _encode_text(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str], device: str) -> Tensor:
    """The text [4 * n, L, Ct] of n captions, one row for each of four views."""
    ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(device)).last_hidden_state.repeat_interleave(4, dim=0)


def _error_ratios(
    predict: Callable[[Tensor, int, Tensor, Tensor], Tensor],
    x: Tensor,
    text: Tensor,
    right: Tensor,
    wrong: Tensor,
    generator: torch.Generator,
    scheduler: DDIMScheduler,
) -> dict[str, float]:
    """Mean squared error of x [n, C, h, w], denoised under the wrong condition, over that under the right one, by t.

    predict(x_t, t, text, condition) is what the scheduler's `prediction_type` says.
    """
    ratios = {}
    kind = scheduler.config.prediction_type
    for t in CHECKED_TIMESTEPS:
        a = scheduler.alphas_cumprod[t]
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=generator.device).to(x.device)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        good, bad = (
            float((epsilon_from(predict(noisy, t, text, condition), noisy, a, kind) - noise).square().mean())
            for condition in (right, wrong)
        )
        ratios[str(t)] = round(bad / good, 2)
    return ratios


def silhouette_iou(rgb: Tensor, disparity: Tensor) -> Tensor:
    """Return the IoU [n] of the object in images [n, 3, H, W] in [0, 1] and in disparities [n, 1, H, W].

    In an image the object is what differs from the background in a channel; renderings reach 0.99 with their own depth.
    """
    seen = (rgb - BACKGROUND).abs().amax(dim=1) > OBJECT_CONTRAST
    shown = disparity[:, 0] > OBJECT_DISPARITY
    return (seen & shown).sum(dim=(1, 2)) / (seen | shown).sum(dim=(1, 2)).clamp(min=1)
