"""The volume renderer: from a field to images through rays; NeuS unless another `alpha` is given.

After Wang et al., "NeuS: Learning Neural Implicit Surfaces by Volume Rendering" (2021), with the sampling of the
published TriplaneTurbo (uniform, or a uniform proposal refined where its opacity lies).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field as Setting
from pydantic import model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prd.cameras import HALF_DIAGONAL, Cameras
from prd.fields.checks import check_numbers, expect, several
from prd.fields.protocol import Field
from prd.rendering.alpha import PUBLISHED_ALPHA_FLOOR, AlphaModel, NeusAlpha, neus_alpha, render_weights, transmittance
from prd.rendering.views import Views, background_like, check_image_size, disparity_from_depth
from prd.utils.checked_types import CHECKS, Count, NonNegative, Positive, PositiveSchedule, Schedule, Size

__all__ = [
    "PUBLISHED_ALPHA_FLOOR",
    "GradientSamples",
    "RayBundle",
    "RayOutputs",
    "VolumeRenderer",
    "neus_alpha",
    "render_weights",
]

CULLED_AT_ONCE = 1 << 17  # segments of a sample whose gradient is asked for at a time to tell which of them matter
INV_STD = 100.0  # 1 / scene units
AS_FLOAT32 = "render with cameras.to(torch.float32), or with a field of float64"
NORMAL_EPS = 1e-6  # length under which a vector is not stretched to a unit normal


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is multiplied by `scale` on the way back."""
    return x if scale == 1 else scale * x + (1 - scale) * x.detach()


def cube_near_far(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays [..., 3] enter and leave the cube [-1, 1]^3, [..., 1] each, >= 0; equal where they miss it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    first, second = (-1 - origins) / safe, (1 - origins) / safe
    near = torch.minimum(first, second).amax(dim=-1, keepdim=True).clamp(min=0)
    far = torch.maximum(first, second).amin(dim=-1, keepdim=True)
    return near, torch.maximum(near, far)


def edges_around(middles: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Edges [..., S + 1] halfway between ascending middles [..., S], the outermost within low and high [..., 1]."""
    inner = (middles[..., 1:] + middles[..., :-1]) / 2
    first = torch.maximum(1.5 * middles[..., :1] - 0.5 * middles[..., 1:2], low)
    last = torch.minimum(1.5 * middles[..., -1:] - 0.5 * middles[..., -2:-1], high)
    return torch.cat([first, inner, last], dim=-1)


def sample_pdf(edges: Tensor, cdf: Tensor, shares: Tensor) -> Tensor:
    """Where a distribution reaches shares [..., S] in [0, 1) of its mass: [..., S].

    edges, cdf [..., M]: the distribution, piecewise linear between ascending `edges`.
    """
    u = cdf[..., :1] + shares * (cdf[..., -1:] - cdf[..., :1])
    right = torch.searchsorted(cdf.contiguous(), u.contiguous(), right=True).clamp(1, edges.shape[-1] - 1)
    u0, u1 = cdf.gather(-1, right - 1), cdf.gather(-1, right)
    t0, t1 = edges.gather(-1, right - 1), edges.gather(-1, right)
    width = u1 - u0
    share = torch.where(width < 1e-10, 0.5, (u - u0) / width.clamp(min=1e-10))
    return t0 + share * (t1 - t0)


class RayBundle(NamedTuple):
    """Rays of B samples, flattened over views and pixels.

    origins, directions [B, M, 3]; near, far [B, M, 1]; jitter [passes, B, M, 1] in [0, 1).
    """

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor
    jitter: Tensor

    def rows(self, start: int, stop: int) -> RayBundle:
        rays = slice(start, stop)
        origins, directions, near, far = (part[:, rays] for part in self[:4])
        return RayBundle(origins, directions, near, far, self.jitter[:, :, rays])

    def points(self, t: Tensor) -> Tensor:
        """The points at distances t [B, M, S]: [B, M * S, 3]."""
        return (self.origins[:, :, None] + t[..., None] * self.directions[:, :, None]).flatten(1, 2)


class GradientSamples(NamedTuple):
    """Gradients of the signed distance, for `eikonal_loss`.

    gradient [..., 3] at the segments that were looked at of all samples (no padding), or at a grid's nodes
    weights  [...]    of their mean, which sum to 1 where every sample has some: that over samples of the mean over a
                      sample's own segments, so that neither chunks nor batch mates change it; None: all alike
    """

    gradient: Tensor
    weights: Tensor | None


class RayOutputs(NamedTuple):
    """What volume rendering finds along M rays of each sample.

    edges    [B, M, S + 1]  the segments' ends, scene units along the ray
    alpha    [B, M, S]      opacity of a segment
    weights  [B, M, S]      its share in the ray
    rgb      [B, M, 3]      sum of w rgb, not composited; and `rgb_opacity` [B, M, 1], the weight gradient scaled alike
    normal   [B, M, 3]      sum of w n
    distance [B, M, 1]      sum of w t, t the distance along the ray
    variance [B, M, 1]      sum of w (t - distance)^2
    gradient [B, K, 3]      gradient of the signed distance at the segments that were looked at
    valid    [B, K]         1 where there was one, 0 where a sample has fewer than another
    """

    edges: Tensor
    alpha: Tensor
    weights: Tensor
    rgb: Tensor
    rgb_opacity: Tensor
    normal: Tensor
    distance: Tensor
    variance: Tensor
    gradient: Tensor
    valid: Tensor


@settings(frozen=True, kw_only=True, config=CHECKS)
class VolumeConfig:
    """Settings of the volume renderer."""

    height: Count = 128  # image height, pixels
    width: Count = 128  # image width, pixels
    num_samples: Size = 64  # uniform samples per ray; the proposal's fine samples if there is importance sampling
    num_importance_samples: Annotated[int, Setting(ge=0)] = 128  # proposal samples per ray; 0: none
    density: Literal["neus", "volsdf"] = "neus"  # from signed distance to opacity, unless the model says it itself
    inv_std: PositiveSchedule = 100.0  # s of NeuS's logistic density, 1 / scene units (published: exp(10 * 0.4605))
    beta: PositiveSchedule = 0.01  # width of VolSDF's Laplace density, scene units
    near: NonNegative | None = None  # scene units along the ray (published: 0.1); null: where it enters the cube
    far: Positive | None = None  # scene units along the ray (published: 4); null: where it leaves the cube
    cull_below: Annotated[float, Setting(ge=0, lt=1)] = 1e-4  # less opaque or less lit segments are left out; 0: none
    alpha_floor: NonNegative = 0.0  # 1e-5 reproduces the published images: empty segments absorb that much
    proposal_step: Positive | None = None  # scene units, of the proposal's density; null: 2 sqrt(3) / num_samples
    grid_resolution: Size | None = None  # evaluate the field once on a grid of this resolution; null: at every sample
    max_rays: Count | None = None  # rays of a prompt at a time, made again in the backward pass; null: all at once
    rgb_gradient_scale: Schedule = 1.0  # scale of the images' gradient to the colours
    rgb_weight_gradient_scale: Schedule = 1.0  # scale of the RGB images' gradient to the compositing weights (geometry)

    @model_validator(mode="after")
    def _check(self) -> VolumeConfig:
        if self.num_importance_samples == 1:
            raise ValueError("num_importance_samples=1: must be 0 or at least 2")
        if (self.near is None) != (self.far is None):
            raise ValueError(f"near={self.near}, far={self.far}: set both or none")
        if self.near is not None and self.far is not None and self.near >= self.far:
            raise ValueError(f"near={self.near}, far={self.far}: need near < far")
        if self.alpha_floor and (self.cull_below or self.density != "neus"):
            raise ValueError(
                f"alpha_floor={self.alpha_floor}, cull_below={self.cull_below}, density={self.density!r}: a floor is "
                "NeuS's and gives empty segments an opacity; set cull_below to 0"
            )
        return self


@dataclass(frozen=True)
class VolumeRenderer:
    """Volume rendering of a Field, by rays with `num_samples` segments each.

    Rays are sampled where they cross the cube [-1, 1]^3, or between `near` and `far` if these are set. A field with a
    method `sample(points) -> (sdf, gradient, rgb)` is asked once a point, any other by `sdf_and_gradient` and `rgb`;
    one with `sdf_along(origins, directions, t) -> sdf` by that where all segments are searched for those that matter.
    With `max_rays` the backward pass makes every chunk's activations again, so that one chunk's exist at a time.
    """

    num_samples: int = 64  # segments a ray; with importance sampling the fine ones, added to the proposal's
    num_importance_samples: int = 0  # segments of the uniform proposal (published: 128); 0: uniform sampling only
    inv_std: float | Tensor = INV_STD  # s of NeuS, 1 / scene units; a tensor is learned (published: exp(10 * 0.4605))
    near: float | None = None  # scene units along the ray (published: 0.1); None: where it enters the cube
    far: float | None = None  # scene units along the ray (published: 4); None: where it leaves the cube
    rgb_gradient_scale: float = 1.0  # scale of the RGB images' gradient to the colours
    rgb_weight_gradient_scale: float = 1.0  # scale of the RGB images' gradient to the weights, hence to geometry
    alpha_floor: float = 0.0  # see neus_alpha; PUBLISHED_ALPHA_FLOOR reproduces the published images
    cull_below: float = 1e-4  # segments less opaque, or reached by less light, are left out; 0: none is
    max_rays: int | None = None  # rays of one sample rendered at a time; None: all
    alpha: AlphaModel | None = None  # VolSDFAlpha, DensityAlpha, ...; None: NeusAlpha(inv_std, alpha_floor)
    proposal_step: float | None = None  # scene units, of the proposal's density; None: 2 sqrt(3) / num_samples

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_importance_samples"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name}={getattr(self, name)!r}: must be an int")
        if self.num_samples < 2 or self.num_importance_samples < 0 or self.num_importance_samples == 1:
            raise ValueError(
                f"num_samples={self.num_samples}, num_importance_samples={self.num_importance_samples}: "
                "need at least 2 samples a ray, and 0 or at least 2 of the proposal"
            )
        if (self.near is None) != (self.far is None):
            raise ValueError(f"near={self.near}, far={self.far}: set both or none")
        if self.near is not None and self.far is not None and not 0 <= self.near < self.far < math.inf:
            raise ValueError(f"near={self.near}, far={self.far}: need 0 <= near < far, both finite")
        own = isinstance(self.inv_std, Tensor) or self.inv_std != INV_STD or self.alpha_floor != 0
        if self.alpha is not None and own:
            raise ValueError(
                f"inv_std={self.inv_std}, alpha_floor={self.alpha_floor}: alpha={self.alpha} takes their place; "
                "give them to it, as NeusAlpha(inv_std, floor) does, or leave alpha out"
            )
        floor = getattr(self.model, "floor", 0.0)
        if not 0 <= self.cull_below < 1 or (floor > 0 and self.cull_below > 0):
            raise ValueError(
                f"cull_below={self.cull_below}, alpha_floor={floor}: cull_below lies in [0, 1), "
                "and is 0 where empty segments have an opacity (alpha_floor > 0)"
            )
        if self.max_rays is not None and self.max_rays < 1:
            raise ValueError(f"max_rays={self.max_rays}: must be positive or None")
        if self.proposal_step is not None and not self.proposal_step > 0:
            raise ValueError(f"proposal_step={self.proposal_step}: must be positive or None")

    @property
    def model(self) -> AlphaModel:
        """What turns signed distances into opacities."""
        return self.alpha if self.alpha is not None else NeusAlpha(self.inv_std, self.alpha_floor)

    @property
    def passes(self) -> int:
        """How many jitter offsets a ray takes: one a sampling pass."""
        return 2 if self.num_importance_samples else 1

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
        jitter: Tensor | None = None,
    ) -> tuple[Views, GradientSamples]:
        """Views [B, V, height, width, .] and gradients of the signed distance for the eikonal loss.

        background  number or tensor broadcastable to [B, V, height, width, 3]
        generator   draws the jitter, one offset a ray and pass; None: no jitter (offsets of half a segment)
        jitter      the offsets themselves [passes, B, V, height, width] in [0, 1), instead of a generator

        The gradients are those at the segments looked at, or those of the field's nodes if it has a `gradient` grid.
        Culling leaves only segments near the surface, while the published eikonal loss covers all samples of all rays:
        cull_below=0 gives that one.
        """
        check_image_size(height, width)
        rays = self.rays(cameras, height, width, self.offsets(cameras, height, width, generator, jitter))
        return self.render_rays(field, cameras, rays, height=height, width=width, background=background)

    def render_rays(
        self,
        field: Field,
        cameras: Cameras,
        rays: RayBundle,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
    ) -> tuple[Views, GradientSamples]:
        """`render_with_samples` for rays [B, V * height * width] that may be any of the cameras' (a patch, say)."""
        shape = (cameras.batch, cameras.views, height, width)
        _check_precision(field, rays.origins[:, :1])
        step = self.max_rays or rays.origins.shape[1]
        parts = [self._chunk(field, rays.rows(i, i + step)) for i in range(0, rays.origins.shape[1], step)]

        def image(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts], dim=1).view(*shape, -1)

        opacity = torch.cat([part.weights.sum(-1) for part in parts], dim=1).view(*shape, 1).clamp(max=1)
        forward = -cameras.camera_to_world[..., :3, 2]
        cosine = (rays.directions.view(*shape, 3) * forward[:, :, None, None]).sum(-1, keepdim=True)
        depth = image("distance") * cosine + (1 - opacity) * cameras.near_far[1][:, :, None, None, None]
        colour = image("rgb")
        check_numbers("sdf, sdf_and_gradient or rgb", opacity, colour)
        back = background_like(background, opacity)
        rgb = colour + (1 - image("rgb_opacity")) * back
        normal = F.normalize(image("normal"), dim=-1, eps=NORMAL_EPS) * opacity
        disparity = disparity_from_depth(depth, cameras)
        views = Views(rgb, normal, depth, disparity, opacity, cameras, image("variance"))
        nodes: Tensor | None = getattr(field, "gradient", None)
        return views, _samples(parts) if nodes is None else GradientSamples(nodes.flatten(1, -2), None)

    def rays(self, cameras: Cameras, height: int, width: int, jitter: Tensor) -> RayBundle:
        """The rays of all pixels with their range; jitter [passes, B, V, height, width]."""
        return self.bundle(*cameras.rays(height, width), jitter)

    def bundle(self, origins: Tensor, directions: Tensor, jitter: Tensor) -> RayBundle:
        """Rays [B, V, H, W, 3] with their range, flattened; jitter [passes, B, V, H, W]."""
        origins, directions = origins.flatten(1, 3), directions.flatten(1, 3)
        if self.near is None or self.far is None:
            near, far = cube_near_far(origins, directions)
        else:
            near, far = (origins.new_full((*origins.shape[:2], 1), plane) for plane in (self.near, self.far))
        return RayBundle(origins, directions, near, far, jitter.flatten(2)[..., None])

    def offsets(
        self,
        cameras: Cameras,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        jitter: Tensor | None = None,
    ) -> Tensor:
        """The jitter [passes, B, V, height, width] in [0, 1): given, drawn, or half a segment."""
        shape = (self.passes, cameras.batch, cameras.views, height, width)
        like = cameras.fovy
        if jitter is not None:
            if generator is not None or jitter.shape != shape:
                raise ValueError(f"jitter={tuple(jitter.shape)}: expected {shape}, and no generator beside it")
            return jitter.to(like)
        if generator is None:
            return like.new_full(shape, 0.5)
        return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)

    @torch.no_grad()
    def sample_edges(self, field: Field, rays: RayBundle) -> Tensor:
        """Ends of the segments along each ray, ascending: [B, M, S + 1].

        Uniform between near and far; with importance sampling these are a proposal, whose density comes from a frontal
        surface (cos = -1) over a step of 2 sqrt(3) / num_samples (`proposal_step`), as published; the fine ones are
        added to it.
        """

        def shares(count: int, jitter: Tensor) -> Tensor:
            return (torch.arange(count, dtype=jitter.dtype, device=jitter.device) + jitter) / count

        count = self.num_importance_samples or self.num_samples
        middles = rays.near + (rays.far - rays.near) * shares(count, rays.jitter[0])
        edges = edges_around(middles, rays.near, rays.far)
        if not self.num_importance_samples:
            return edges
        widths, middles = edges.diff(dim=-1), (edges[..., 1:] + edges[..., :-1]) / 2
        step = torch.full_like(widths, self.proposal_step or 2 * HALF_DIAGONAL / self.num_samples)
        sdf = _sdf_along(field, rays, middles)
        alpha = self.model(sdf, -torch.ones_like(sdf), step)
        transmittance = torch.exp(-torch.cumsum(alpha / step * widths, dim=-1))
        cdf = F.pad(1 - transmittance[..., :-1], (1, 0), value=0.0)  # at the edges but the last
        cdf = F.pad(cdf, (0, 1), value=1.0)  # what is left lies at the end
        fine = sample_pdf(edges, cdf, shares(self.num_samples, rays.jitter[1]))
        fine = edges_around(fine, edges[..., :1], edges[..., -1:])
        return torch.cat([edges, fine], dim=-1).sort(dim=-1).values

    def march(self, field: Field, rays: RayBundle, edges: Tensor) -> RayOutputs:
        """Opacity, colour and normals along rays whose segments end at edges [B, M, S + 1].

        Only segments that can matter are asked for gradient and colour: they are gathered to [B, K] and their opacity
        is put back among the others'.
        """
        return self._march(field, rays, edges, *self._relevant(field, rays, edges))

    def _chunk(self, field: Field, rays: RayBundle) -> RayOutputs:
        """Some rays' colours. Where there are several chunks, the graph of one is made again when it is needed."""
        edges = self.sample_edges(field, rays)
        index, valid = self._relevant(field, rays, edges)
        if self.max_rays is None or not torch.is_grad_enabled():
            return self._march(field, rays, edges, index, valid)
        return checkpoint(self._march, field, rays, edges, index, valid, use_reentrant=False, preserve_rng_state=False)

    def _march(self, field: Field, rays: RayBundle, edges: Tensor, index: Tensor, valid: Tensor) -> RayOutputs:
        """`march` at the segments index [B, K] of M * S, of which those with valid [B, K] = 1 count."""
        middles = (edges[..., 1:] + edges[..., :-1]) / 2  # [B, M, S]
        batch, count, segments = middles.shape
        directions, dt, points = _segments(rays, edges, index)
        sdf, gradient, colour = _query(field, points)
        cos, normal = _facing(directions, gradient)
        some = self.model(sdf[..., 0], cos, dt) * valid
        alpha = torch.zeros_like(middles).flatten(1).scatter_add(1, index, some).view(middles.shape)
        weights = render_weights(alpha)
        w = (weights.flatten(1).gather(1, index) * valid)[..., None]  # [B, K, 1]
        colour_w = scale_gradient(w, self.rgb_weight_gradient_scale)
        colour = scale_gradient(colour, self.rgb_gradient_scale)
        parts = torch.cat([colour_w * colour, colour_w, w * normal], dim=-1)  # [B, K, 7]
        row = (index // segments + torch.arange(batch, device=index.device)[:, None] * count).flatten()
        sums = parts.new_zeros(batch * count, 7).index_add(0, row, parts.flatten(0, 1)).view(batch, count, 7)
        rgb, rgb_opacity, normals = sums.split([3, 1, 3], dim=-1)
        distance = (weights * middles).sum(-1, keepdim=True)
        variance = torch.linalg.vecdot(weights, (middles - distance).square())[..., None]
        return RayOutputs(edges, alpha, weights, rgb, rgb_opacity, normals, distance, variance, gradient, valid)

    @torch.no_grad()
    def _relevant(self, field: Field, rays: RayBundle, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Segments that are opaque and reached by light: their index among M * S and whether it counts, [B, K] each.

        `cull_below` is the least opacity, and the least share of the light that gets there: behind, less than that
        share is lost altogether. K is the most any sample of the batch needs (at least 1); the rest is padding. Where
        the opacity depends on the normal, the gradient is asked for at all segments that may be opaque: differences of
        the signed distance would not tell what is absorbed, unless its slope is 1.
        """
        widths, middles = edges.diff(dim=-1), (edges[..., 1:] + edges[..., :-1]) / 2
        if self.cull_below == 0:
            everything = torch.arange(widths[0].numel(), device=widths.device).expand(len(widths), -1)
            return everything, torch.ones_like(everything, dtype=widths.dtype)
        sdf = _sdf_along(field, rays, middles)
        opaque = self.model.may_reach(sdf, widths, self.cull_below)
        if not self.model.uses_normal:
            reached = transmittance(self.model(sdf, sdf, widths)) >= self.cull_below
            return _gathered((opaque & reached).flatten(1), widths.dtype)
        index, valid = _gathered(opaque.flatten(1), widths.dtype)
        alpha = torch.zeros_like(widths).flatten(1)
        for some, counts in zip(index.split(CULLED_AT_ONCE, 1), valid.split(CULLED_AT_ONCE, 1), strict=True):
            directions, dt, points = _segments(rays, edges, some)
            values, gradient = _sdf_and_gradient(field, points)
            alpha.scatter_add_(1, some, self.model(values[..., 0], _facing(directions, gradient)[0], dt) * counts)
        reached = transmittance(alpha.view(widths.shape)).flatten(1) >= self.cull_below
        return _gathered(reached & (alpha > 0), widths.dtype)


def _samples(parts: list[RayOutputs]) -> GradientSamples:
    """The gradients of all chunks, without their padding."""
    real = [part.valid > 0 for part in parts]
    gradient = torch.cat([part.gradient[rows] for part, rows in zip(parts, real, strict=True)])
    counts = torch.stack([rows.sum(dim=1) for rows in real]).sum(dim=0).clamp(min=1)  # [B]
    sample = torch.cat([rows.nonzero()[:, 0] for rows in real])
    return GradientSamples(gradient, 1 / (len(counts) * counts[sample]).to(gradient.dtype))


def _gathered(chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where chosen [B, N] holds: indices [B, K], ascending, and which of them count, [B, K] of 0 and 1.

    K is the most of any row and at least 1; the others are padded with index 0.
    """
    counts = chosen.sum(dim=1, keepdim=True)
    size = max(int(counts.max()), 1)
    slots = torch.arange(size, device=chosen.device) < counts  # [B, K]
    index = torch.zeros_like(slots, dtype=torch.int64)
    index[slots] = chosen.nonzero()[:, 1]  # both row by row
    return index, slots.to(dtype)


def _segments(rays: RayBundle, edges: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Direction [B, K, 3], length [B, K] and middle [B, K, 3] of the segments index [B, K] of edges [B, M, S + 1]."""
    ray = index // (edges.shape[2] - 1)
    directions = rays.directions.gather(1, _to3(ray))
    begin, end = (edges.flatten(1).gather(1, index + ray + side) for side in (0, 1))  # a ray has S + 1 edges
    return directions, end - begin, rays.origins.gather(1, _to3(ray)) + ((end + begin) / 2)[..., None] * directions


def _facing(directions: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """direction . normal, <= 0 [B, K], and the unit normal [B, K, 3]."""
    normal = F.normalize(gradient.contiguous(), dim=-1, eps=NORMAL_EPS)  # of a grid's lookup it is channels first
    return (directions * normal).sum(-1).clamp(max=0), normal


def _to3(index: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, 3)


def _sdf_along(field: Field, rays: RayBundle, t: Tensor) -> Tensor:
    """Signed distance [B, M, S] at distances t [B, M, S] along the rays; ValueError for NaN, which would be culled.

    By the field's own `sdf_along(origins, directions, t)` if it has one.
    """
    along: Callable[[Tensor, Tensor, Tensor], Tensor] | None = getattr(field, "sdf_along", None)
    if along is not None:
        sdf = expect("sdf_along", along(rays.origins, rays.directions, t), t, t.shape[2])
    else:
        points = rays.points(t)
        sdf = expect("sdf", field.sdf(points), points, 1).view(t.shape)
    check_numbers("sdf", sdf)
    return sdf


@torch.no_grad()
def _check_precision(field: Field, points: Tensor) -> None:
    """TypeError where rays of float64 meet a field that takes or gives less."""
    if points.dtype != torch.float64:
        return
    try:
        answer = field.sdf(points).dtype
    except RuntimeError as error:  # of a network's layers
        raise TypeError(f"cameras: float64, in which field.sdf fails ({error}); {AS_FLOAT32}") from error
    if answer != torch.float64:
        raise TypeError(f"cameras: float64, but field.sdf answers {answer}; {AS_FLOAT32}")


def _sdf_and_gradient(field: Field, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance [B, K, 1] and its gradient [B, K, 3] at points [B, K, 3]."""
    sdf, gradient = several("sdf_and_gradient", field.sdf_and_gradient(points), 2)
    return expect("sdf_and_gradient", sdf, points, 1), expect("sdf_and_gradient", gradient, points, 3)


def _query(field: Field, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance [B, K, 1], gradient [B, K, 3] and colour [B, K, 3] at points [B, K, 3]."""
    at_once: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = getattr(field, "sample", None)
    if at_once is None:
        return *_sdf_and_gradient(field, points), expect("rgb", field.rgb(points), points, 3)
    sdf, gradient, rgb = several("sample", at_once(points), 3)
    return expect("sample", sdf, points, 1), expect("sample", gradient, points, 3), expect("sample", rgb, points, 3)
