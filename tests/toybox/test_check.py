"""The checks themselves: an untrained ControlNet fails, and the outline tells one object from another."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from prd.teachers.stable_diffusion import StableDiffusionTeacher, encode_latents
from prd.toybox import asset
from prd.toybox.check import REQUIRED_DEPTH_RATIO, depth_ratios, silhouette_iou
from prd.toybox.data import ViewPool
from prd.toybox.models import make_controlnet
from prd.toybox.world import SHAPES


@pytest.fixture(scope="module")
def pool():
    return ViewPool(1, torch.Generator().manual_seed(0), [(shape, 0) for shape in SHAPES])


def test_a_controlnet_that_adds_nothing_fails(pool):
    teacher = StableDiffusionTeacher.from_pretrained(asset("stable_diffusion"))
    ratios = depth_ratios(
        teacher.unet,
        make_controlnet(teacher.unet),
        teacher.text_encoder,
        teacher.prompt_encoder.tokenizer,
        pool,
        lambda batch: encode_latents(teacher.vae, batch.rgb.flatten(0, 1) * 2 - 1),
        generator=torch.Generator().manual_seed(1),
        count=1,
        scheduler=DDIMScheduler.from_pretrained(asset("stable_diffusion"), subfolder="scheduler"),
    )
    assert set(ratios) == set(SHAPES)
    assert {ratio for by_time in ratios.values() for ratio in by_time.values()} == {1.0}
    assert REQUIRED_DEPTH_RATIO > 1


def test_the_outline_is_the_objects_own(pool):
    batches = [pool.draw(6, torch.Generator().manual_seed(seed), only=(shape, 0)) for seed, shape in enumerate(SHAPES)]
    rgb = torch.cat([batch.rgb.flatten(0, 1) for batch in batches])  # every colour, [192, 3, H, W]
    disparity = torch.cat([batch.disparity.flatten(0, 1) for batch in batches])
    assert float(silhouette_iou(rgb, disparity).min()) > 0.93
    assert float(silhouette_iou(rgb, disparity.roll(24, dims=0)).mean()) < 0.75
    empty = torch.zeros_like(disparity)
    assert float(silhouette_iou(rgb, empty).max()) == 0
    assert float(silhouette_iou(torch.full_like(rgb, 0.5), empty).max()) == 0  # nothing in nothing: no division by zero
