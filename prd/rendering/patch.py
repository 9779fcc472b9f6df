"""Volume rendering in two resolutions: all of the image coarsely, one patch of it finely (TriplaneTurbo's patch mode).

Memory and time go with the number of rays: H W / downsample^2 + patch^2 of them instead of H W.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import Cameras
from prd.fields.protocol import Field
from prd.rendering.views import Views, background_like, check_image_size
from prd.rendering.volume import GradientSamples, VolumeRenderer


@dataclass(frozen=True)
class PatchRenderer:
    """A volume renderer whose images are enlarged from a coarse render, but for a square of their own resolution.

    The coarse rays are the image's own, resampled bilinearly and not made unit vectors again, as published: whatever
    the size's remainder by `downsample`, the object keeps its place and proportions.
    """

    renderer: VolumeRenderer
    patch: int = 64  # side of the square, pixels; its place is drawn anew for every render
    downsample: int = 4  # the coarse render has floor(size / downsample) pixels a side

    def __post_init__(self) -> None:
        if self.patch < 2 or self.downsample < 1:
            raise ValueError(f"patch={self.patch}, downsample={self.downsample}: need at least 2 pixels and at least 1")

    def __call__(
        self,
        field: Field,
        cameras: Cameras,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
        generator: torch.Generator | None = None,
    ) -> Views:
        """Views [B, V, height, width, .]; arguments as in `render_with_samples`."""
        return self.render_with_samples(
            field, cameras, height=height, width=width, background=background, generator=generator
        )[0]

    def render_with_samples(
        self,
        field: Field,
        cameras: Cameras,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
        generator: torch.Generator | None = None,
    ) -> tuple[Views, GradientSamples]:
        """Views [B, V, height, width, .] and the coarse render's gradients for the eikonal loss.

        background  number or tensor broadcastable to [B, V, height, width, 3]
        generator   draws the patch's corner, the same in all views, and the jitter; None: the middle, no jitter
        """
        low = height // self.downsample, width // self.downsample
        check_image_size(*low)
        if self.patch > min(height, width):
            raise ValueError(f"patch={self.patch}: does not fit into {height} x {width} pixels")
        origins, directions = cameras.rays(height, width)
        back = background_like(background, directions).expand_as(directions)
        coarse_rays = self.renderer.bundle(  # resampled as images are, so that enlarging puts all where it was
            resize(origins, *low), resize(directions, *low), self.renderer.offsets(cameras, *low, generator)
        )
        coarse, gradient = self.renderer.render_rays(
            field, cameras, coarse_rays, height=low[0], width=low[1], background=resize(back, *low)
        )
        row, column = (self._place(size, generator) for size in (height, width))
        offsets = self.renderer.offsets(cameras, self.patch, self.patch, generator)
        rays = self.renderer.bundle(self.crop(origins, row, column), self.crop(directions, row, column), offsets)
        square = self.crop(back, row, column)
        fine, _ = self.renderer.render_rays(
            field, cameras, rays, height=self.patch, width=self.patch, background=square
        )
        images = {
            part.name: paste(getattr(coarse, part.name), getattr(fine, part.name), row, column, height, width)
            for part in fields(Views)
            if part.name != "cameras"
        }
        return Views(cameras=cameras, **images), gradient

    def crop(self, image: Tensor, row: int, column: int) -> Tensor:
        """The square of [B, V, H, W, C] whose corner is (row, column)."""
        return image[:, :, row : row + self.patch, column : column + self.patch]

    def _place(self, size: int, generator: torch.Generator | None) -> int:
        last = size - self.patch
        if generator is None:
            return last // 2
        return int(torch.randint(last + 1, (), generator=generator, device=generator.device))


def paste(coarse: Tensor, fine: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """A coarse image [B, V, h, w, C] enlarged to height x width, with fine [B, V, p, q, C] at (row, column) on top."""
    image = resize(coarse, height, width).clone()
    image[:, :, row : row + fine.shape[2], column : column + fine.shape[3]] = fine
    return image


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing, pixel centres at half-integers: [B, V, h, w, C] to [B, V, height, width, C]."""
    if image.shape[2:4] == (height, width):
        return image
    flat = image.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
    return out.permute(0, 2, 3, 1).unflatten(0, image.shape[:2])
