"""A library of 3D shapes beside the prompts: LATTE3D's point clouds, and the masks that regularise its shapes.

A folder of meshes is a library by its `library.jsonl`, a line per shape:

    {"file": "chairs/a.glb", "captions": ["a wooden chair", "a chair with four legs"]}

A prompt has the shape of its caption; one that is no caption has that of the nearest, by the cosine between the mean
text embeddings. Files are read when they are first needed, scaled into the cube and kept as points and triangles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import model_validator
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from prd.cameras import Cameras
from prd.data.text_files import lines_of
from prd.data.worlds import World, find_world
from prd.errors import ConfigError
from prd.fields.protocol import AutogradGradient
from prd.isosurface.marching_cubes import Surface
from prd.meshes.read import read_mesh
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.views import Views
from prd.text.encoders import PromptEncoder
from prd.utils.arguments import expanded_path
from prd.utils.checked_types import CHECKS, Place, Positive, Schedule

INDEX = "library.jsonl"
KEPT = 512  # shapes in memory


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class LibraryConfig:
    """Settings of a library of 3D shapes, for models that take point clouds (LATTE3D)."""

    source: Place | None = None  # a benchmark, or a folder of meshes with its library.jsonl; null: none
    annealing: Schedule = 1.0  # share of a cloud's points that are the dummy's, from 0 to 1
    alpha: Schedule = 0.0  # a of (1 - a) distillation + a mask loss
    mask_weight: Positive = 1.0  # of the mask loss beside the distillation, which is a sum over pixels
    reconstruction: Schedule = 0.0  # weight of the loss of opacity, normals and disparity against the shape's

    @model_validator(mode="after")
    def _check(self) -> LibraryConfig:
        for name in ("annealing", "alpha"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}={given}: must lie in 0..1")
        return self


class LibraryError(ConfigError):
    """A library that cannot be used: without an index, or with a file that holds no mesh."""


class ShapeLibrary(Protocol):
    """3D shapes by prompt."""

    def mesh(self, prompt: str) -> Surface:
        """Return the shape for a prompt, (vertices [V, 3] in scene units, faces [F, 3]), on the CPU."""
        ...


@dataclass(frozen=True)
class WorldLibrary:
    """The exact shapes of a world, without their colours."""

    world: World

    def mesh(self, prompt: str) -> Surface:
        """See `ShapeLibrary.mesh`; ValueError for a prompt that is no caption."""
        return self.world.mesh(prompt)


class MeshLibrary:
    """A folder of meshes with its `library.jsonl`; `embed` gives the mean text embeddings [n, C] of n captions.

    Raises LibraryError, naming the line or file, for an index that cannot be used.
    """

    def __init__(self, folder: str | Path, embed: Callable[[Sequence[str]], Tensor]) -> None:
        self.folder, self.embed = expanded_path(folder, "library.source"), embed
        self.files: dict[str, Path] = {}  # by caption
        index = self.folder / INDEX
        if not index.is_file():
            raise LibraryError(
                f"library.source={str(folder)!r}: holds no {INDEX}, which has a line per shape: "
                '{"file": "chair.glb", "captions": ["a wooden chair"]}'
            )
        for number, line in lines_of(index, LibraryError):
            if line.strip():
                self._add(number, line)
        if not self.files:
            raise LibraryError(f"{index}: lists no shape")
        self.captions = list(self.files)
        self._keys: Tensor | None = None
        self._read = lru_cache(maxsize=KEPT)(read_mesh)

    def _add(self, number: int, line: str) -> None:
        where = f"{self.folder / INDEX}, line {number}"
        try:
            row: Any = json.loads(line)
            path, captions = self.folder / row["file"], list(row["captions"])
        except (ValueError, KeyError, TypeError) as error:
            raise LibraryError(f'{where}: must be {{"file": ..., "captions": [...]}} ({error!r})') from None
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise LibraryError(f"{where}: captions={captions!r}: must be texts, at least one")
        if not path.is_file():
            raise LibraryError(f"{where}: {path} is not there")
        self.files.update(dict.fromkeys(captions, path))

    def mesh(self, prompt: str) -> Surface:
        """See `ShapeLibrary.mesh`."""
        return self._read(self.files[prompt if prompt in self.files else self.nearest(prompt)])

    @torch.no_grad()
    def nearest(self, prompt: str) -> str:
        """Return the caption nearest to a prompt."""
        if self._keys is None:
            parts = [self.embed(self.captions[i : i + 256]) for i in range(0, len(self.captions), 256)]
            self._keys = F.normalize(torch.cat(parts).float(), dim=1)
        asked = F.normalize(self.embed([prompt]).float(), dim=1)
        return self.captions[int((self._keys @ asked[0]).argmax())]


@dataclass(frozen=True)
class Shapes:
    """The library's shapes for the prompts of a batch.

    meshes  [B]; clouds [B, N, 3] points on their surfaces, scene units
    """

    meshes: list[Surface]
    clouds: Tensor

    def repeat(self, count: int) -> Shapes:
        """Repeat them for `count` estimates of the prompts, one after the other."""
        return Shapes(self.meshes * count, self.clouds.repeat(count, 1, 1))

    @torch.no_grad()
    def views(self, cameras: Cameras, height: int, width: int) -> Views:
        """Render views [B, V, height, width, .] without colours: opacity, normals and disparity."""
        device = cameras.fovy.device
        moved = [(vertices.to(device), faces.to(device)) for vertices, faces in self.meshes]
        renderer = SurfaceRenderer(SurfaceConfig(antialias=False, supersample=2))
        return renderer.draw_views(_COLOURLESS, moved, cameras, height=height, width=width)


class _Colourless(AutogradGradient):
    def rgb(self, points: Tensor) -> Tensor:
        return torch.zeros_like(points)


_COLOURLESS = _Colourless()


def open_library(config: LibraryConfig, encoder: PromptEncoder, generator: object) -> ShapeLibrary | None:
    """Open the library that a config names, None for none; LibraryError for a model that takes no shapes."""
    if config.source is None:
        return None
    if not getattr(generator, "takes_shapes", False):
        raise LibraryError(f"library.source={config.source!r}: this model takes no shapes; leave the library out")
    if (world := find_world(config.source, "library.source")) is not None:
        return WorldLibrary(world)
    return MeshLibrary(config.source, lambda texts: encoder(texts).mean(dim=1))
