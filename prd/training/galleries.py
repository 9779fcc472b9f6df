"""Pictures and meshes of what a model makes while it is trained: contact sheets, galleries, .glb files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prd.cameras import Cameras, orbit_cameras
from prd.data.prompts import held_out_prompts
from prd.evaluation.benchmark import Benchmark
from prd.evaluation.pictures import save_sheet
from prd.fields.fast import one_sample
from prd.fields.protocol import Field
from prd.generators.protocol import Model
from prd.isosurface.extract import EmptySurfaceError
from prd.meshes.mesh import extract_mesh
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.views import Views
from prd.teachers.base import PromptEncoder
from prd.training.precision import autocast
from prd.utils.arguments import MAX_SEED
from prd.utils.files import file_stem, write_atomic

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)


def prompt_generators(seed: int, prompts: Sequence[str]) -> list[torch.Generator]:
    """One generator per prompt, so that what a prompt gives does not depend on the others."""
    return [torch.Generator().manual_seed((seed * 100_003 + i) % (MAX_SEED + 1)) for i in range(len(prompts))]


@torch.no_grad()
def generate_fields(
    model: Model,
    text_encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int = 16,
    mixed_precision: str = "no",
) -> list[tuple[list[str], Field]]:
    """Fields of prompts in batches, each with its prompts; sample i of the list is drawn from seed and i alone.

    num_inference_steps: K of a model that denoises; a single-pass model has none. mixed_precision: as a config's, "no",
    "bf16" or "fp16"; the text encoder and the field compute in their own precision, as in training.
    """
    generators = prompt_generators(seed, prompts)
    batches: list[tuple[list[str], Field]] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        embeds = text_encoder(part).to(model.device)
        draws = generators[start : start + batch_size]
        field = make_fields(model, embeds, draws, num_inference_steps, mixed_precision)
        batches.append((part, field))
    return batches


@torch.no_grad()
def make_fields(
    model: Model,
    embeds: Tensor,
    generators: Sequence[torch.Generator],
    num_inference_steps: int,
    mixed_precision: str = "no",
) -> Field:
    """The fields of embeddings [B, L, Ct], each from its own generator; arguments as in `generate_fields`."""
    with autocast(mixed_precision, model.device):
        return model.generate(embeds, generators, num_inference_steps=num_inference_steps)


def evaluation_cameras(config: TrainConfig, batch: int) -> Cameras:
    """Cameras [batch, views] of what is shown: evenly spaced azimuths at one elevation, as `validation` says.

    They are of the projection of `cameras`.
    """
    own = config.validation
    turns = torch.arange(own.views, dtype=torch.float32, device="cpu") / own.views
    azimuth, (distance, fovy) = (own.azimuth + 360 * turns).expand(batch, -1), config.cameras.middle
    elevation = torch.full_like(azimuth, own.elevation)
    parallel = config.cameras.projection == "orthographic"
    return orbit_cameras(elevation, azimuth, own.distance or distance, own.fovy or fovy, orthographic=parallel)


def shown_background(config: TrainConfig) -> float:
    """Grey level behind what is shown."""
    return config.background if config.validation.background is None else config.validation.background


def sheet_views(sample: Field, config: TrainConfig, device: torch.device) -> Views | None:
    """A field of one sample from the evaluation cameras, as the contact sheet shows it; None without a surface."""
    size = config.validation.resolution
    renderer = SurfaceRenderer(SurfaceConfig(grid_resolution=config.validation.isosurface_resolution, supersample=2))
    cameras = evaluation_cameras(config, 1).to(device)
    try:
        return renderer(sample, cameras, height=size, width=size, background=shown_background(config))
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
        return torch.full((2 * views, 3, size, size), shown_background(config), dtype=torch.float32, device=device)
    return torch.cat([drawn.rgb[0], (drawn.camera_normal()[0] + 1) / 2]).permute(0, 3, 1, 2)  # [V, H, W, 3] each


def contact_sheet(
    model: Model, text_encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, path: Path
) -> None:
    """One row per prompt: colours and normals from `validation.views` sides; no file without prompts."""
    if not prompts:
        return
    pictures = []
    for part, field in generate_fields(
        model,
        text_encoder,
        prompts,
        seed=config.seed,
        num_inference_steps=config.validation.num_inference_steps,
        mixed_precision=config.mixed_precision,
    ):
        pictures.append(render_sheet(field, len(part), config, model.device))
    _save_rows(torch.cat(pictures), prompts, config, path)


def _save_rows(pictures: Tensor, prompts: Sequence[str], config: TrainConfig, path: Path) -> None:
    """The contact sheet of pictures [prompts * 2 * views, 3, H, W]."""
    hidden = set(held_out_prompts(config.prompts))
    labels = [f"{prompt} (held out)" if prompt in hidden else prompt for prompt in prompts]
    save_sheet(pictures, path, columns=2 * config.validation.views, scale=1, labels=labels)


def mesh_names(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt: its letters and digits (`file_stem`), numbered where two would be the same."""
    names: list[str] = []
    for prompt in prompts:
        stem = file_stem(prompt, "prompt")
        tries = (f"{stem}.glb", *(f"{stem}_{number}.glb" for number in range(2, len(prompts) + 2)))
        names.append(next(name for name in tries if name not in names))
    return names


@torch.no_grad()
def save_gallery(
    model: Model,
    text_encoder: PromptEncoder,
    config: TrainConfig,
    folder: Path,
    benchmark: Benchmark | None = None,
) -> dict[str, float]:
    """Write what the validation prompts give from their fixed noise: `sheet.png`, a coloured .glb each, `metrics.json`.

    benchmark  measures each shape; None: none does

    Returns the means of what is measured: the share of pixels covered, prompts without a surface, triangles and volume
    of the meshes, and the figures of the benchmark's scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, settings = config.validation.prompts, config.validation
    pictures: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    batches = generate_fields(
        model,
        text_encoder,
        prompts,
        seed=config.seed,
        num_inference_steps=settings.num_inference_steps,
        mixed_precision=config.mixed_precision,
    )
    names = iter(mesh_names(prompts))
    for part, field in batches:
        scores = None if benchmark is None else benchmark.score(field, part, device=model.device)
        for i, prompt in enumerate(part):
            sample, name = one_sample(field, i, len(part)), next(names)
            drawn = sheet_views(sample, config, model.device)
            pictures.append(_row(drawn, config, model.device))
            row: dict[str, Any] = {"prompt": prompt, "mesh": None, "coverage": 0.0, "empty": drawn is None}
            if drawn is not None:
                resolution = settings.isosurface_resolution
                (mesh,) = extract_mesh(sample, isosurface_resolution=resolution, texture_size=None, close_handles=0)
                assert mesh is not None  # on_empty="raise"
                replace(mesh, metadata=_metadata(model, prompt, config)).export(folder / name)
                row |= {"mesh": name, "coverage": float(drawn.opacity.mean())}
                row |= {"triangles": len(mesh.faces), "volume": mesh.volume}
            if scores is not None:
                row |= scores[i].figures()
            rows.append(row)
    _save_rows(torch.cat(pictures), prompts, config, folder / "sheet.png")
    write_atomic(folder / "metrics.json", json.dumps(rows, indent=1) + "\n")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    values = {key: [float(row[key]) for row in rows if key in row] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()}


def export_meshes(
    model: Model, text_encoder: PromptEncoder, prompts: Sequence[str], config: TrainConfig, folder: Path
) -> list[Path]:
    """A .glb for each prompt; one without a surface is named in the log and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, (prompt, name) in enumerate(zip(prompts, mesh_names(prompts), strict=True)):
        generator = prompt_generators(config.seed, prompts)[i]
        embeds = text_encoder([prompt]).to(model.device)
        steps = config.validation.num_inference_steps
        field = make_fields(model, embeds, [generator], steps, config.mixed_precision)
        resolution = config.validation.isosurface_resolution
        (mesh,) = extract_mesh(field, isosurface_resolution=resolution, on_empty="flag", close_handles=0)
        if mesh is None:
            logger.warning("%r has no surface: no mesh was written for it", prompt)
            continue
        path = folder / name
        replace(mesh, metadata=_metadata(model, prompt, config)).export(path)
        written.append(path)
    return written


def _metadata(model: Model, prompt: str, config: TrainConfig) -> dict[str, Any]:
    """Return what the file of a mesh says of its making."""
    return {"prompt": prompt, "seed": config.seed, "model": type(model).__name__, "licence": "that of the model"}
