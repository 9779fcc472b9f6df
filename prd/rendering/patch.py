"""Volume rendering in two resolutions: all of the image coarsely, one patch of it finely (TriplaneTurbo's patch mode).

Memory and time go with the number of rays: H W / downsample^2 + patch^2 of them instead of H W.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.cameras import Cameras
from prd.fields.protocol import Field
from prd.rendering.alpha import AlphaModel
from prd.rendering.protocol import Draws, Rendered, Renderer
from prd.rendering.views import Views, background_like, check_image_size
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.utils.checked_types import CHECKS, Count, Size


@settings(frozen=True, kw_only=True, config=CHECKS)
class PatchConfig(VolumeConfig):
    """Settings of the patch renderer: those of the volume renderer and two more."""

    patch: Size = 64  # side of the square, pixels; its place is drawn anew for every render and sample
    downsample: Count = 4  # the coarse render has floor(size / downsample) pixels per side

    @model_validator(mode="after")
    def _check_sizes(self) -> PatchConfig:
        if self.patch > min(self.height, self.width):
            raise ValueError(f"patch={self.patch}: does not fit into {self.height} x {self.width} pixels")
        if min(self.height, self.width) // self.downsample < 2:
            raise ValueError(f"downsample={self.downsample}: leaves less than 2 of {self.height} x {self.width} pixels")
        return self


@dataclass(frozen=True)
class PatchRenderer(Renderer):
    """A volume renderer whose images are enlarged from a coarse render, but for a square of their own resolution.

    The coarse rays are the image's own, resampled bilinearly and not made unit vectors again, as published: whatever
    the size's remainder by `downsample`, the object keeps its place and proportions. `alpha` as in `VolumeRenderer`.
    """

    config_class: ClassVar[type] = PatchConfig

    config: PatchConfig = field(default_factory=PatchConfig)
    alpha: AlphaModel | None = None

    @classmethod
    def from_config(cls, config: PatchConfig) -> PatchRenderer:
        """The renderer of some settings."""
        return cls(config)

    def with_config(self, config: PatchConfig, alpha: AlphaModel | None = None) -> PatchRenderer:
        """This renderer with other settings, and with the model's own way from signed distance to opacity if given."""
        return replace(self, config=config, alpha=self.alpha if alpha is None else alpha)

    @property
    def volume(self) -> VolumeRenderer:
        """The renderer of both resolutions."""
        return VolumeRenderer(self.config, self.alpha)

    @property
    def passes(self) -> int:
        """Jitter offsets per ray, as the volume renderer's."""
        return self.volume.passes

    @property
    def field_grid(self) -> int | None:
        """Resolution of the grid on which training samples the field beforehand, as the volume renderer's."""
        return self.volume.field_grid

    def render(
        self,
        field: Field,
        cameras: Cameras,
        size: tuple[int, int],
        background: float | Tensor,
        draws: Draws | None = None,
    ) -> Rendered:
        """Views [B, V, height, width, .] and the coarse render's gradients for the eikonal loss.

        size        (height, width), pixels
        background  number or tensor broadcastable to [B, V, height, width, 3]
        draws       the corner of each sample's patch, the same in all of its views, and the jitter; None: the middle,
                    and no jitter
        """
        low = size[0] // self.config.downsample, size[1] // self.config.downsample
        check_image_size(*low)
        side = self.config.patch
        if side > min(size):
            raise ValueError(f"patch={side}: does not fit into {size[0]} x {size[1]} pixels")
        volume = self.volume
        origins, directions = cameras.rays(*size)
        back = background_like(background, directions).expand_as(directions)
        coarse_rays = volume.bundle(  # resampled as images are, so that enlarging puts all where it was
            resize(origins, *low), resize(directions, *low), volume.offsets(cameras, low, draws)
        )
        coarse = volume.render_rays(field, cameras, coarse_rays, low, resize(back, *low))
        corners = self.corners(cameras.batch, size, draws)
        square = side, side
        offsets = volume.offsets(cameras, square, draws)
        rays = volume.bundle(crop(origins, corners, side), crop(directions, corners, side), offsets)
        fine = volume.render_rays(field, cameras, rays, square, crop(back, corners, side))
        images = {
            part.name: paste(getattr(coarse.views, part.name), getattr(fine.views, part.name), corners, *size)
            for part in fields(Views)
            if part.name != "cameras"
        }
        views = Views(cameras=cameras, **images)
        return Rendered(views, samples=coarse.samples, stats={"opacity": views.opacity.detach().mean()})

    def corners(self, batch: int, size: tuple[int, int], draws: Draws | None) -> list[tuple[int, int]]:
        """(row, column) of each sample's patch: drawn, or that of the one in the middle."""
        last = [length - self.config.patch for length in size]
        if draws is None:
            return [(last[0] // 2, last[1] // 2)] * batch
        places = draws.uniform((batch, 2)).tolist()
        return [(int(row * (last[0] + 1)), int(column * (last[1] + 1))) for row, column in places]


def crop(image: Tensor, corners: list[tuple[int, int]], side: int) -> Tensor:
    """The square of each of [B, V, H, W, C] whose corner is (row, column): [B, V, side, side, C]."""
    rows = zip(image, corners, strict=True)
    return torch.stack([one[:, row : row + side, column : column + side] for one, (row, column) in rows])


def paste(coarse: Tensor, fine: Tensor, corners: list[tuple[int, int]], height: int, width: int) -> Tensor:
    """A coarse image [B, V, h, w, C] enlarged to height x width, with fine [B, V, p, q, C] at its corners on top."""
    image = resize(coarse, height, width).clone()
    for sample, (row, column) in enumerate(corners):
        image[sample, :, row : row + fine.shape[2], column : column + fine.shape[3]] = fine[sample]
    return image


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing, pixel centres at half-integers: [B, V, h, w, C] to [B, V, height, width, C]."""
    if image.shape[2:4] == (height, width):
        return image
    flat = image.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
    return out.permute(0, 2, 3, 1).unflatten(0, image.shape[:2])
