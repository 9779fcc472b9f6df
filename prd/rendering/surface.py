"""The mesh renderer: field -> isosurface -> rasteriser -> images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field as Setting
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.cameras import HALF_DIAGONAL, Cameras
from prd.errors import PrdError
from prd.fields.checks import expect
from prd.fields.fast import evaluate_grid
from prd.fields.protocol import Field
from prd.isosurface.extract import OnEmpty, ensure_surface, grid_to_meshes
from prd.isosurface.marching_cubes import Surface, marching_cubes
from prd.isosurface.marching_tetrahedra import marching_tetrahedra
from prd.rendering.alpha import AlphaModel
from prd.rendering.antialias import antialias
from prd.rendering.protocol import Draws, Rendered, Renderer
from prd.rendering.rasterize import Fragments, interpolate_covered, rasterize
from prd.rendering.views import (
    Disparity,
    Views,
    background_like,
    check_image_size,
    disparity_from_depth,
    published_disparity,
    published_mesh_depth,
)
from prd.utils.checked_types import CHECKS, Count, Int, Schedule, number
from prd.utils.gradients import scale_gradient

NORMAL_EPS = 1e-12  # a shorter sum of face normals, in scene units squared, gives no direction
NEAR = 0.1  # scene units before a camera; what is nearer is cut away


@dataclass(frozen=True)
class PackedMeshes:
    """B meshes as one: vertices [N, 3], faces [F, 3] that index them, ranges [B, 2] of faces, vertices of each."""

    vertices: Tensor
    faces: Tensor
    ranges: Tensor
    sizes: list[int]

    @classmethod
    def pack(cls, meshes: list[Surface]) -> PackedMeshes:
        faces, ranges, offset, first = [], [], 0, 0
        for vertices, triangles in meshes:
            faces.append(triangles + offset)
            ranges.append((first, first + len(triangles)))
            offset, first = offset + len(vertices), first + len(triangles)
        packed = torch.cat(faces)
        limits = torch.tensor(ranges, dtype=torch.int64, device=packed.device)
        return cls(torch.cat([vertices for vertices, _ in meshes]), packed, limits, [len(v) for v, _ in meshes])

    def clip(self, cameras: Cameras, aspect: float) -> Tensor:
        """Clip-space vertices [V, N, 4], each mesh as its own cameras see it.

        The near and far planes enclose the scene's cube and the meshes, however far the camera is; only what is nearer
        to it than `NEAR`, or behind it, is cut away.
        """
        reach = self.vertices.new_tensor(HALF_DIAGONAL)  # from the origin, of whatever is drawn
        if len(self.vertices):
            reach = torch.maximum(reach, self.vertices.detach().norm(dim=-1).max())
        near = (cameras.distance - 1.01 * reach).clamp(min=NEAR)
        matrices = (
            cameras.projection(aspect, near, torch.maximum(cameras.distance, near) + 1.01 * reach)
            @ cameras.world_to_camera()
        )  # [B, V, 4, 4]
        parts = [
            vertices @ matrix[..., :3].transpose(1, 2) + matrix[..., 3][:, None]
            for vertices, matrix in zip(self.vertices.split(self.sizes), matrices, strict=True)
        ]
        return torch.cat(parts, dim=1)


class MeshError(PrdError, ValueError):
    """A mesh that cannot be drawn: of a wrong shape or type, not finite, with faces out of range or without area."""


def check_meshes(meshes: list[Surface], cameras: Cameras) -> None:
    if len(meshes) != cameras.batch:
        raise MeshError(f"meshes: {len(meshes)} for the cameras of {cameras.batch} samples")
    for index, (vertices, faces) in enumerate(meshes):
        _check_mesh(index, vertices, faces)


def _check_mesh(index: int, vertices: Tensor, faces: Tensor) -> None:
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not vertices.is_floating_point():
        raise MeshError(f"meshes[{index}]: vertices are {vertices.dtype} {tuple(vertices.shape)}, not floats [N, 3]")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.is_floating_point():
        raise MeshError(f"meshes[{index}]: faces are {faces.dtype} {tuple(faces.shape)}, not integers [F, 3]")
    if not bool(torch.isfinite(vertices).all()):
        raise MeshError(f"meshes[{index}]: vertices hold NaN or infinity; look for a diverged field or a bad file")
    if not len(faces):
        return
    low, high = (int(value) for value in torch.aminmax(faces))
    if low < 0 or high >= len(vertices):
        raise MeshError(f"meshes[{index}]: faces name vertices {low}..{high} of {len(vertices)}; they count from 0")
    a, b, c = (vertices.detach()[corner] for corner in faces.unbind(1))
    if not bool((torch.linalg.cross(b - a, c - a) != 0).any()):
        raise MeshError(f"meshes[{index}]: none of its {len(faces)} faces has an area; there is nothing to draw")


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [N, 3]: the area-weighted mean of the faces around a vertex (0 where that cancels)."""
    a, b, c = (vertices.index_select(0, corner) for corner in faces.unbind(1))
    normals = torch.linalg.cross(b - a, c - a)  # twice the area long
    total = torch.zeros_like(vertices).index_add(0, faces.t().reshape(-1), normals.repeat(3, 1))
    return F.normalize(total, dim=-1, eps=NORMAL_EPS)


@settings(frozen=True, kw_only=True, config=CHECKS)
class SurfaceConfig:
    """Settings of the mesh renderer."""

    height: Count = 512  # image height, pixels
    width: Count = 512  # image width, pixels
    grid_resolution: Annotated[Int, Setting(ge=3)] = (
        128  # nodes of the isosurface grid along each axis (the paper's in training)
    )
    sdf_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the sdf (the paper's recipe)
    deformation_gradient_scale: Schedule = 0.001  # scale of the images' gradient to the deformation
    isosurface: Literal["cubes", "tetrahedra"] = "cubes"  # marching cubes, or DMTet's marching tetrahedra
    antialias: bool = True  # blend silhouettes analytically: what lets images move the outline
    supersample: Count = 1  # rendered at this multiple of the size and averaged
    disparity: Disparity = "camera"  # of the depth along the viewing axis; triplane_turbo: in clip space, as published
    detach_corrected: bool = False  # keep images of a corrected surface from moving it (InstantMesh)


@dataclass(frozen=True)
class SurfaceRenderer(Renderer):
    """Renders a Field through its isosurface.

    config    its settings
    on_empty  what becomes of a sample without a surface: "raise" EmptySurfaceError; "flag" it in the stats and render
              it as background; "correct" it, for training: `ensure_surface` gives it one, which the stats count
              (`from_config` makes a renderer that corrects)

    Colours are the field's, asked at the surface points that the pixels see.
    """

    config_class: ClassVar[type] = SurfaceConfig

    config: SurfaceConfig = field(default_factory=SurfaceConfig)
    on_empty: Literal["correct", "raise", "flag"] = "raise"

    def __post_init__(self) -> None:
        if self.on_empty not in ("correct", "raise", "flag"):
            raise ValueError(f"on_empty={self.on_empty!r}: must be 'correct', 'raise' or 'flag'")

    @classmethod
    def from_config(cls, config: SurfaceConfig) -> SurfaceRenderer:
        """The renderer for training, which gives every sample a surface."""
        return cls(config, on_empty="correct")

    def with_config(self, config: SurfaceConfig, alpha: AlphaModel | None = None) -> SurfaceRenderer:
        """This renderer with other settings; a surface has no opacity to be read from a distance."""
        return replace(self, config=config)

    def accepts_grid(self, resolution: int) -> bool:
        """True if the grid's nodes are those of the isosurface."""
        return resolution == self.config.grid_resolution

    def render(
        self,
        field: Field,
        cameras: Cameras,
        size: tuple[int, int],
        background: float | Tensor,
        draws: Draws | None = None,
    ) -> Rendered:
        """Views [B, V, height, width, .] of a field of B samples, its meshes, and what was met on the way.

        size        (height, width), pixels
        background  number or tensor broadcastable to [B, V, height, width, 3], in [0, 1]
        draws       not used: this renderer draws nothing

        The stats are 0 or 1 per sample [B]: "surfaces_corrected", and with on_empty="flag" "surfaces_empty". A surface
        behind a camera leaves that view empty, with zero gradient.
        """
        check_image_size(*size)
        meshes, corrected = self.meshes(field, cameras)
        cameras = cameras.to(meshes[0][0].dtype) if cameras.fovy.dtype == torch.float64 else cameras  # as the grid is
        views = self._views(field, meshes, cameras, size, background)
        stats = {"surfaces_corrected": corrected.float()}
        if self.on_empty == "flag":
            stats["surfaces_empty"] = corrected.new_tensor([not len(faces) for _, faces in meshes]).float()
        return Rendered(views, meshes=meshes, stats=stats)

    def draw_views(
        self,
        field: Field,
        meshes: list[Surface],
        cameras: Cameras,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
    ) -> Views:
        """Views [B, V, height, width, .] of any B meshes, coloured by the field; see `draw` for what is refused."""
        check_image_size(height, width)
        check_meshes(meshes, cameras)
        return self._views(field, meshes, cameras, (height, width), background)

    def _views(
        self, field: Field, meshes: list[Surface], cameras: Cameras, size: tuple[int, int], background: float | Tensor
    ) -> Views:
        factor = self.config.supersample
        images = self._draw(field, meshes, cameras, size[0] * factor, size[1] * factor)
        views = composite(_average(images, factor), cameras, background)
        if self.config.disparity == "triplane_turbo":
            depth = published_mesh_depth(views.depth, views.opacity)
            views = replace(views, disparity=published_disparity(depth, views.opacity, cameras))
        return views

    def meshes(self, field: Field, cameras: Cameras) -> tuple[list[Surface], Tensor]:
        """The field's B surfaces, and which of them had to be forced, bool [B]."""
        config = self.config
        sdf, deformation = evaluate_grid(field, config.grid_resolution, cameras.batch, cameras.fovy.device)
        if len(sdf) != cameras.batch:
            raise ValueError(f"cameras: of {cameras.batch} sample(s), but the field holds {len(sdf)}")
        sdf = scale_gradient(sdf, number(config.sdf_gradient_scale))
        if deformation is not None:
            deformation = scale_gradient(deformation, number(config.deformation_gradient_scale))
        corrected = torch.zeros(len(sdf), dtype=torch.bool, device=sdf.device)
        if self.on_empty == "correct":
            sdf, corrected = ensure_surface(sdf, detach=config.detach_corrected)
            if config.detach_corrected and deformation is not None:
                deformation = torch.where(corrected[:, None, None, None, None], deformation.detach(), deformation)
        missing: OnEmpty = "flag" if self.on_empty == "flag" else "raise"
        isosurface = marching_tetrahedra if config.isosurface == "tetrahedra" else marching_cubes
        return grid_to_meshes(sdf, deformation, isosurface=isosurface, on_empty=missing), corrected

    def draw(self, field: Field, meshes: list[Surface], cameras: Cameras, height: int, width: int) -> Tensor:
        """Images [B, V, H, W, 8] of any B meshes: rgb, normal, far - depth and opacity, all 0 where nothing is seen.

        A mesh without faces is seen nowhere. Raises MeshError for one that is malformed or has no area.
        """
        check_meshes(meshes, cameras)
        return self._draw(field, meshes, cameras, height, width)

    def _draw(self, field: Field, meshes: list[Surface], cameras: Cameras, height: int, width: int) -> Tensor:
        packed = PackedMeshes.pack(meshes)
        clip = packed.clip(cameras, width / height)
        fragments = rasterize(clip, packed.faces, height, width, ranges=packed.ranges)
        images = shade(field, packed, fragments, cameras)
        return antialias(images, fragments, clip, packed.faces) if self.config.antialias else images


def shade(field: Field, packed: PackedMeshes, fragments: Fragments, cameras: Cameras) -> Tensor:
    """Images [B, V, H, W, 8] of what the fragments see: rgb, normal, far - depth and opacity; all 0 elsewhere."""
    height, width = fragments.face_index.shape[-2:]
    pixels = fragments.covered()
    attributes = torch.cat([packed.vertices, vertex_normals(packed.vertices, packed.faces)], dim=-1)
    position, normal = interpolate_covered(attributes, packed.faces, fragments, pixels).split(3, dim=-1)
    normal = F.normalize(normal, dim=-1, eps=NORMAL_EPS)
    camera = pixels // (height * width)  # flat index into [B, V]
    forward = -cameras.camera_to_world[..., :3, 2].reshape(-1, 3)[camera]
    depth = ((position - cameras.position.reshape(-1, 3)[camera]) * forward).sum(-1, keepdim=True)
    shortfall = cameras.near_far[1].reshape(-1, 1)[camera] - depth
    rgb = _colours(field, position, camera // cameras.views, cameras.batch)
    seen = torch.cat([rgb, normal, shortfall, torch.ones_like(shortfall)], dim=-1)
    images = seen.new_zeros(fragments.face_index.numel(), 8).index_copy(0, pixels, seen)
    return images.view(*fragments.face_index.shape, 8)


def composite(images: Tensor, cameras: Cameras, background: float | Tensor) -> Views:
    """Views of the images [B, V, H, W, 8] of `shade`, over a background broadcastable to [B, V, H, W, 3]."""
    rgb, normal, shortfall, opacity = images.split([3, 3, 1, 1], dim=-1)
    back = background_like(background, rgb)
    depth = cameras.near_far[1][:, :, None, None, None] - shortfall
    return Views(rgb + (1 - opacity) * back, normal, depth, disparity_from_depth(depth, cameras), opacity, cameras)


def _colours(field: Field, points: Tensor, sample: Tensor, batch: int) -> Tensor:
    """The field's colour at points [P, 3] that belong to `sample` [P] (ascending), asked as one padded [B, N, 3]."""
    counts = torch.bincount(sample, minlength=batch)
    place = torch.arange(len(points), dtype=torch.long, device=points.device) - (counts.cumsum(0) - counts)[sample]
    size = max(int(counts.max()), 1)
    slot = sample * size + place
    padded = points.new_zeros(batch * size, 3).index_copy(0, slot, points).view(batch, size, 3)
    colours = expect("rgb", field.rgb(padded), padded, 3)
    return colours.reshape(-1, 3).index_select(0, slot)


def _average(images: Tensor, factor: int) -> Tensor:
    """Means over factor x factor pixels: [B, V, H f, W f, C] -> [B, V, H, W, C]."""
    if factor == 1:
        return images
    batch, views, height, width, channels = images.shape
    split = images.view(batch, views, height // factor, factor, width // factor, factor, channels)
    return split.mean(dim=(3, 5))
