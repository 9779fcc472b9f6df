"""The camera check: a multi-view teacher must heed its cameras before anything is distilled from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.teachers.multiview import camera_vector
from prd.toybox.data import Batch, ViewPool
from prd.toybox.models import make_scheduler
from prd.toybox.world import ASYMMETRIC_SHAPES

REQUIRED_RATIO = 1.5
CHECKED_TIMESTEPS = (500, 800)


def turned(cameras: Cameras, degrees: float) -> Cameras:
    """The same cameras, moved about the world's z axis."""
    a = torch.deg2rad(torch.tensor(degrees))
    turn = torch.eye(4)
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = a.cos(), -a.sin(), a.sin(), a.cos()
    return Cameras(turn @ cameras.camera_to_world, cameras.fovy)


@torch.no_grad()
def camera_ratios(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pool: ViewPool,
    encode: Callable[[Batch], Tensor],
    *,
    generator: torch.Generator,
    device: str = "cpu",
    count: int = 12,
) -> dict[str, dict[str, float]]:
    """Denoising error with cameras turned by 90 degrees over that with the right ones, by shape and timestep.

    encode turns `count` four-view sets into the U-Net's input [4 * count, C, h, w]. Below `REQUIRED_RATIO` on an
    asymmetric shape the teacher does not know where it looks from.
    """
    alphas = make_scheduler().alphas_cumprod
    ratios: dict[str, dict[str, float]] = {}
    for shape in ASYMMETRIC_SHAPES:
        batch = pool.draw(count, generator, only=(shape, 0))
        x = encode(batch)
        ids = tokenizer(batch.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = text_encoder(ids.to(device)).last_hidden_state.repeat_interleave(4, dim=0)
        ratios[shape] = {}
        for t in CHECKED_TIMESTEPS:
            a = alphas[t]
            noise = torch.randn(x.shape, generator=generator).to(device)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            errors = []
            for degrees in (0.0, 90.0):
                labels = camera_vector(turned(batch.cameras, degrees), "fourier").to(device)
                v = unet(noisy, t, text, class_labels=labels).sample
                errors.append(float((a.sqrt() * noisy - (1 - a).sqrt() * v - x).square().mean()))
            ratios[shape][str(t)] = round(errors[1] / errors[0], 2)
    return ratios
