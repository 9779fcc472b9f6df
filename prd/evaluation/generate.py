"""Meshes of a generator for a list of prompts: a file each, made once, so that an evaluation goes on where it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prd.evaluation.inputs import Item
from prd.meshes.options import MeshOptions
from prd.pipelines.auto import load_pipeline
from prd.utils.arguments import check_seed
from prd.utils.files import file_stem, write_atomic

MESHES = "meshes"  # of the output folder


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of what a generator makes: a model as `prd.load_pipeline` takes it, the seed, and the mesh."""

    model: str
    seed: int = 0  # of the noise, the same for each prompt
    steps: int | None = None  # denoising steps; None: as trained
    resolution: int = 160
    faces: int | None = 10_000
    texture: int | None = 1024
    device: str | None = None

    def options(self) -> MeshOptions:
        """Return the options of mesh extraction; ValueError names the one that is out of its range."""
        return MeshOptions(
            isosurface_resolution=self.resolution,
            target_faces=self.faces,
            texture_size=self.texture,
            on_empty="flag",
        )

    def digest(self, prompts: Sequence[str]) -> str:
        """Return a hash of all that decides the meshes, but the weights."""
        settings = [self.model, self.seed, self.steps, self.resolution, self.faces, self.texture, list(prompts)]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def load_generator(config: GenerationConfig) -> Any:
    """Return the pipeline of a generator; ValueError for steps that it does not take."""
    check_seed("seed", config.seed)
    config.options()
    pipe: Any = load_pipeline(config.model, device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if config.steps is not None and not pipe.draws_noise:
        raise ValueError(f"steps={config.steps}: {config.model} answers in one pass; leave it out")
    return pipe


def generate_items(
    pipe: Any, prompts: Sequence[str], config: GenerationConfig, output: Path, *, rank: int = 0, count: int = 1
) -> None:
    """Make the meshes of every `count`-th prompt, from the `rank`-th, that are not there yet."""
    (output / MESHES).mkdir(parents=True, exist_ok=True)
    missing = [
        k for k in range(rank, len(prompts), count) if not any(place.is_file() for place in _places(output, prompts, k))
    ]
    for k in tqdm(missing, desc="generate", disable=not missing or rank > 0):
        mesh_place, fault_place = _places(output, prompts, k)
        options: dict[str, Any] = vars(config.options())
        if pipe.draws_noise:
            options = options | {
                "generator": torch.Generator().manual_seed(config.seed),
                "num_inference_steps": config.steps,
            }
        try:
            mesh = pipe(prompts[k], **options).meshes[0]
        except (ValueError, ArithmeticError) as error:  # as a field that is not finite: a row that failed
            write_atomic(fault_place, " ".join(str(error).split()))
            continue
        if mesh is None:
            write_atomic(fault_place, "the model made no surface for this prompt")
        else:
            mesh.export(mesh_place)


def generated_items(prompts: Sequence[str], output: Path) -> list[Item]:
    """Return the items of prompts whose meshes were made, those without a surface among them."""
    items = []
    for k, prompt in enumerate(prompts):
        mesh, fault = _places(output, prompts, k)
        name = f"{MESHES}/{mesh.name}"
        if fault.is_file():
            items.append(Item(name, prompt, fault=fault.read_text(encoding="utf-8")))
        else:
            items.append(Item(name, prompt, mesh=mesh))
    return items


def _places(output: Path, prompts: Sequence[str], k: int) -> tuple[Path, Path]:
    """The place of a prompt's mesh, or the reason why there is none."""
    stem = f"{k:05d}_{file_stem(prompts[k], 'prompt')[:60]}"
    return output / MESHES / f"{stem}.glb", output / MESHES / f"{stem}.failed.txt"
