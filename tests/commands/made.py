"""A generator of balls whose size its noise decides, for tests of what is done with meshes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trimesh import creation

from prd.commands.many import Job
from prd.meshes.mesh import Mesh
from prd.meshes.options import MeshOptions

EMPTY, BROKEN = "nothing", "a field that is not finite"


def ball(radius: float) -> Mesh:
    shape = creation.icosphere(subdivisions=1, radius=radius)
    vertices = np.asarray(shape.vertices, np.float32)
    colors = np.full_like(vertices, 0.5)
    return Mesh(vertices, np.asarray(shape.faces, np.int64), vertices / np.float32(radius), colors)


class Balls:
    """A field of one ball per radius."""

    def __init__(self, radii: Sequence[float]) -> None:
        self.radii = torch.tensor(radii)[:, None, None]

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radii

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, None]:
        return self.sdf(points), None


class Pipe:
    """A pipeline that makes a ball of each generator's first number."""

    draws_noise, device = True, "cpu"
    model = SimpleNamespace(timesteps=lambda steps: [])

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        self.calls.append(prompts)
        assert options["on_empty"] == "flag" and len(options["generator"]) == len(prompts)
        if BROKEN in prompts:
            raise FloatingPointError("the planes hold NaN")
        radii = [0.2 + 0.5 * float(torch.rand((), generator=one)) for one in options["generator"]]
        meshes = [None if text == EMPTY else ball(radius) for text, radius in zip(prompts, radii, strict=True)]
        return SimpleNamespace(meshes=meshes, field=Balls(radii))


def make_job(folder: Path, prompts: Sequence[str], **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "output": folder,
        "prompts": tuple(prompts),
        "model": "a/b",
        "seed": 0,
        "per_prompt": 1,
        "batch_size": 1,
        "steps": None,
        "options": MeshOptions(on_empty="flag", texture_size=None),
        "format": "ply",
    }
    return Job(**{**settings, **changes})
