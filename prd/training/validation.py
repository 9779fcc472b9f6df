"""What a run shows of itself: contact sheets, meshes, galleries; in the toy box its measure against the truth."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.fields import Field, one_sample
from prd.generators.generator import Generator
from prd.generators.triplane_turbo import TriplaneTurboGenerator
from prd.mesh import extract_mesh
from prd.rendering.isosurface import EmptySurfaceError
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.views import Views
from prd.teachers.base import PromptEncoder
from prd.toybox.score import Score, score_field
from prd.toybox.world import all_captions
from prd.training.build import camera_sampling
from prd.training.config import TrainConfig
from prd.training.files import write_whole
from prd.training.pictures import save_sheet

logger = logging.getLogger(__name__)

MESH_COST = 7  # seconds for a validation prompt's mesh and row of a sheet, per second for a caption's scores


def prompt_generators(seed: int, prompts: Sequence[str]) -> list[torch.Generator]:
    """One generator a prompt, so that what a prompt gives does not depend on its company."""
    return [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(len(prompts))]


@torch.no_grad()
def generate_fields(
    student: Generator,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int = 16,
) -> list[tuple[list[str], Field]]:
    """Fields of prompts in batches, each with its prompts; sample i of the list is drawn from seed and i alone.

    num_inference_steps: K of a student that denoises; a generator of one pass has none.
    """
    generators = prompt_generators(seed, prompts)
    batches: list[tuple[list[str], Field]] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        embeds = encoder(part).to(student.device)
        field = make_fields(student, embeds, generators[start : start + batch_size], num_inference_steps)
        batches.append((part, field))
    return batches


@torch.no_grad()
def make_fields(
    student: Generator, embeds: Tensor, generators: Sequence[torch.Generator], num_inference_steps: int
) -> Field:
    """The fields of embeddings [B, L, Ct], each from its own generator."""
    if isinstance(student, TriplaneTurboGenerator):
        return student.generate(embeds, generators, num_inference_steps)
    return student.generate(embeds, generators)


def evaluation_cameras(config: TrainConfig, batch: int) -> Cameras:
    """Evenly spaced azimuths from 30 degrees (all four quarters), elevation 20, in the middle of the training range."""
    views = config.validation.views
    azimuth = (30 + torch.arange(views) * 360 / views).expand(batch, -1)
    return orbit_cameras(torch.full_like(azimuth, 20.0), azimuth, *camera_sampling(config).middle)


def sheet_views(sample: Field, config: TrainConfig, device: torch.device) -> Views | None:
    """A field of one sample from the evaluation cameras, as the contact sheet shows it; None without a surface."""
    size = config.validation.resolution
    renderer = SurfaceRenderer(resolution=config.validation.isosurface_resolution, supersample=2)
    cameras = evaluation_cameras(config, 1).to(device)
    try:
        return renderer(sample, cameras, height=size, width=size, background=config.background)
    except EmptySurfaceError:
        return None


@torch.no_grad()
def render_sheet(field: Field, batch: int, config: TrainConfig, device: torch.device) -> Tensor:
    """Pictures [B * 2 * views, 3, H, W]: for each sample its colours, then its camera normals, in a row.

    A sample without a surface is a row of background.
    """
    rows = [_row(sheet_views(one_sample(field, i, batch), config, device), config, device) for i in range(batch)]
    return torch.cat(rows)


def _row(drawn: Views | None, config: TrainConfig, device: torch.device) -> Tensor:
    """Colours and normals of one sample, [2 * views, 3, H, W]; background without a surface."""
    size, views = config.validation.resolution, config.validation.views
    if drawn is None:
        return torch.full((2 * views, 3, size, size), config.background, device=device)
    return torch.cat([drawn.rgb[0], (drawn.camera_normal()[0] + 1) / 2]).permute(0, 3, 1, 2)  # [V, H, W, 3] each


def contact_sheet(
    student: Generator, encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, path: Path
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
    _save_rows(torch.cat(pictures), prompts, config, path)


def _save_rows(pictures: Tensor, prompts: Sequence[str], config: TrainConfig, path: Path) -> None:
    """The contact sheet of pictures [prompts * 2 * views, 3, H, W]."""
    hidden = set(config.prompts.held_out)
    labels = [f"{prompt} (held out)" if prompt in hidden else prompt for prompt in prompts]
    save_sheet(pictures, path, columns=2 * config.validation.views, scale=1, labels=labels)


def mesh_names(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt: its letters and digits, numbered where two would be the same."""
    names: list[str] = []
    for prompt in prompts:
        stem = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:80] or "prompt"
        tries = (f"{stem}.glb", *(f"{stem}_{number}.glb" for number in range(2, len(prompts) + 2)))
        names.append(next(name for name in tries if name not in names))
    return names


@torch.no_grad()
def save_gallery(student: Generator, encoder: PromptEncoder, config: TrainConfig, folder: Path) -> dict[str, float]:
    """The validation prompts from their fixed noise: `sheet.png`, a .glb with a colour a vertex each, `metrics.json`.

    Returns the means of what is measured: the share of pixels covered, prompts without a surface, triangles and volume
    of the meshes; in the toy box R@1, IoU and colour error too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, settings = config.validation.prompts, config.validation
    pictures: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    batches = generate_fields(
        student, encoder, prompts, seed=config.seed, num_inference_steps=settings.num_inference_steps
    )
    names = iter(mesh_names(prompts))
    for part, field in batches:
        scores = score_field(field, part, device=student.device) if config.prompts.source == "toybox" else None
        for i, prompt in enumerate(part):
            sample, name = one_sample(field, i, len(part)), next(names)
            drawn = sheet_views(sample, config, student.device)
            pictures.append(_row(drawn, config, student.device))
            row: dict[str, Any] = {"prompt": prompt, "mesh": None, "coverage": 0.0, "empty": drawn is None}
            if drawn is not None:
                (mesh,) = extract_mesh(sample, settings.isosurface_resolution, texture_size=None, keep="all")
                mesh.export(folder / name)
                row |= {"mesh": name, "coverage": float(drawn.opacity.mean())}
                row |= {"triangles": len(mesh.faces), "volume": mesh.volume}
            if scores is not None:
                score = scores[i]
                row |= {"r_at_1": score.recognised, "iou": score.iou, "color_error": score.color_error}
            rows.append(row)
    _save_rows(torch.cat(pictures), prompts, config, folder / "sheet.png")
    write_whole(folder / "metrics.json", json.dumps(rows, indent=1) + "\n")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    values = {key: [float(row[key]) for row in rows if key in row] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()}


def export_meshes(
    student: Generator, encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, folder: Path
) -> list[Path]:
    """A .glb for each prompt; one without a surface is named in the log and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (prompt, name) in enumerate(zip(prompts, mesh_names(prompts), strict=True)):
        generator = prompt_generators(config.seed, prompts)[i]
        embeds = encoder([prompt]).to(student.device)
        field = make_fields(student, embeds, [generator], config.validation.num_inference_steps)
        try:
            (mesh,) = extract_mesh(field, config.validation.isosurface_resolution, keep="all")
        except EmptySurfaceError:
            logger.warning("%r has no surface: no mesh was written for it", prompt)
            continue
        path = folder / name
        mesh.export(path)
        written.append(path)
    return written


def measure(
    student: Generator,
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


def time_end(student: Generator, encoder: PromptEncoder, config: TrainConfig) -> float:
    """Seconds that sheet, meshes and scores at the end of a run on the toy box take, by timing three captions."""
    splits = toybox_splits(config.prompts.held_out, config.validation.stacks)
    captions = [caption for split in splits.values() for caption in split]
    seconds = 0.0
    for some in (captions[:1], captions[1:4]):  # the first one warms up
        begun = time.monotonic()
        k = config.validation.num_inference_steps
        measure(student, encoder, some, seed=config.seed, num_inference_steps=k)
        seconds = (time.monotonic() - begun) / len(some)
    return seconds * (len(captions) + MESH_COST * len(config.validation.prompts))
