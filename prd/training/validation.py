"""What a run shows of itself: contact sheets, meshes on disk, and in the toy box its measure against the truth."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.fields import Field, one_sample
from prd.generators.triplane_turbo import TriplaneTurboGenerator
from prd.mesh import extract_mesh
from prd.rendering.isosurface import EmptySurfaceError
from prd.rendering.surface import SurfaceRenderer
from prd.teachers.base import PromptEncoder
from prd.toybox.score import Score, score_field
from prd.toybox.world import all_captions
from prd.training.config import TrainConfig
from prd.training.pictures import save_sheet

logger = logging.getLogger(__name__)


def prompt_generators(seed: int, prompts: Sequence[str]) -> list[torch.Generator]:
    """One generator a prompt, so that what a prompt gives does not depend on its company."""
    return [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(len(prompts))]


@torch.no_grad()
def generate_fields(
    student: TriplaneTurboGenerator,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int = 16,
) -> list[tuple[list[str], Field]]:
    """Fields of prompts in batches, each with its prompts; sample i of the list is drawn from seed and i alone."""
    generators = prompt_generators(seed, prompts)
    batches: list[tuple[list[str], Field]] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        embeds = encoder(part).to(student.device)
        field = student.generate(embeds, generators[start : start + batch_size], num_inference_steps)
        batches.append((part, field))
    return batches


def evaluation_cameras(config: TrainConfig, batch: int) -> Cameras:
    """Evenly spaced azimuths from 30 degrees (all four quarters), elevation 20, at the middle training distance."""
    views = config.validation.views
    azimuth = (30 + torch.arange(views) * 360 / views).expand(batch, -1)
    relative = sum(config.cameras.relative_distance) / 2
    fovy = config.cameras.fovy
    distance = relative / torch.tan(torch.deg2rad(torch.tensor(fovy / 2)))
    return orbit_cameras(torch.full_like(azimuth, 20.0), azimuth, float(distance), fovy)


@torch.no_grad()
def render_sheet(field: Field, batch: int, config: TrainConfig, device: torch.device) -> Tensor:
    """Pictures [B * 2 * views, 3, H, W]: for each sample its colours, then its camera normals, in a row.

    A sample without a surface is a row of background.
    """
    size, views = config.validation.resolution, config.validation.views
    renderer = SurfaceRenderer(resolution=config.validation.isosurface_resolution, supersample=2)
    rows = []
    for i in range(batch):
        cameras = evaluation_cameras(config, 1).to(device)
        sample = one_sample(field, i, batch)
        try:
            drawn = renderer(sample, cameras, height=size, width=size, background=config.background)
            rows += [drawn.rgb[0], (drawn.camera_normal()[0] + 1) / 2]  # [V, H, W, 3] each
        except EmptySurfaceError:
            rows.append(torch.full((2 * views, size, size, 3), config.background, device=device))
    return torch.cat(rows).permute(0, 3, 1, 2)


def contact_sheet(
    student: TriplaneTurboGenerator, encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, path: Path
) -> None:
    """One row a prompt: colours and normals from `validation.views` sides; no file without prompts."""
    if not prompts:
        return
    pictures = []
    for part, field in generate_fields(
        student,
        encoder,
        prompts,
        seed=config.seed,
        num_inference_steps=config.validation.num_inference_steps,
    ):
        pictures.append(render_sheet(field, len(part), config, student.device))
    hidden = set(config.prompts.held_out)
    labels = [f"{prompt} (held out)" if prompt in hidden else prompt for prompt in prompts]
    save_sheet(torch.cat(pictures), path, columns=2 * config.validation.views, scale=1, labels=labels)


def export_meshes(
    student: TriplaneTurboGenerator, encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, folder: Path
) -> list[Path]:
    """A .glb for each prompt; one without a surface is named in the log and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, prompt in enumerate(prompts):
        generator = prompt_generators(config.seed, prompts)[i]
        embeds = encoder([prompt]).to(student.device)
        field = student.generate(embeds, [generator], config.validation.num_inference_steps)
        try:
            (mesh,) = extract_mesh(field, config.validation.isosurface_resolution, keep="all")
        except EmptySurfaceError:
            logger.warning("%r has no surface: no mesh was written for it", prompt)
            continue
        path = folder / (re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_") + ".glb")
        mesh.export(path)
        written.append(path)
    return written


def measure(
    student: TriplaneTurboGenerator,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int,
) -> list[Score]:
    """Scores of the toy box's captions against their exact fields; for reports alone, no choice is made by them."""
    batches = generate_fields(student, encoder, prompts, seed=seed, num_inference_steps=num_inference_steps)
    return [score for part, field in batches for score in score_field(field, part, device=student.device)]


def toybox_splits(held_out: Sequence[str], stacks: int) -> dict[str, list[str]]:
    """Captions to measure: all single objects and `stacks` evenly spread stacks, each seen or held out."""
    hidden = set(held_out)
    splits: dict[str, list[str]] = {}
    for kind, is_stack in (("single", False), ("stack", True)):
        for name, wanted in (("seen", False), ("held_out", True)):
            captions = [c.text for c in all_captions() if c.is_stack == is_stack and (c.text in hidden) == wanted]
            if is_stack and len(captions) > stacks:
                captions = [captions[int((i + 0.5) * len(captions) / stacks)] for i in range(stacks)]
            if captions:
                splits[f"{kind}_{name}"] = captions
    return splits
