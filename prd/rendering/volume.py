"""The volume renderer: from a field to images through rays; NeuS unless the settings or the model say otherwise.

After Wang et al., "NeuS: Learning Neural Implicit Surfaces by Volume Rendering" (2021), with the sampling of the
published TriplaneTurbo (uniform, or a uniform proposal refined where its opacity lies).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field as Setting
from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prd.cameras import HALF_DIAGONAL, Cameras
from prd.fields.checks import check_numbers
from prd.fields.fast import node_gradient, sample, sdf_along
from prd.fields.grid import GridField
from prd.fields.protocol import Field
from prd.rendering.alpha import AlphaModel, DensityAlpha, NeusAlpha, VolSDFAlpha, render_weights
from prd.rendering.culling import NORMAL_EPS, facing, relevant_segments, segments
from prd.rendering.protocol import Draws, GradientSamples, Rendered, Renderer
from prd.rendering.rays import RayBundle, cube_near_far, edges_around, jittered_shares, sample_pdf
from prd.rendering.views import (
    Disparity,
    Views,
    background_like,
    check_image_size,
    disparity_from_depth,
    published_disparity,
)
from prd.utils.checked_types import (
    CHECKS,
    Count,
    Float,
    Int,
    NonNegative,
    Positive,
    PositiveSchedule,
    Schedule,
    Size,
    number,
)
from prd.utils.gradients import scale_gradient

AS_FLOAT32 = "render with cameras.to(torch.float32), or with a field of float64"


@settings(frozen=True, kw_only=True, config=CHECKS)
class VolumeConfig:
    """Settings of the volume renderer."""

    height: Count = 128  # image height, pixels
    width: Count = 128  # image width, pixels
    num_samples: Size = 64  # uniform samples per ray; the proposal's fine samples if there is importance sampling
    num_importance_samples: Annotated[Int, Setting(ge=0)] = 128  # proposal samples per ray; 0: none
    density: Literal["neus", "volsdf"] = "neus"  # from signed distance to opacity, unless the model says it itself
    inv_std: PositiveSchedule = 100.0  # s of NeuS's logistic density, 1 / scene units (published: exp(10 * 0.4605))
    beta: PositiveSchedule = 0.01  # width of VolSDF's Laplace density, scene units
    near: NonNegative | None = None  # scene units along the ray (published: 0.1); null: where it enters the cube
    far: Positive | None = None  # scene units along the ray (published: 4); null: where it leaves the cube
    cull_below: Annotated[Float, Setting(ge=0, lt=1)] = 1e-4  # less opaque or less lit segments are left out; 0: none
    alpha_floor: NonNegative = 0.0  # 1e-5 reproduces the published images: empty segments absorb that much
    proposal_step: Positive | None = None  # scene units, of the proposal's density; null: 2 sqrt(3) / num_samples
    grid_resolution: Size | None = None  # evaluate the field once on a grid of this resolution; null: at every sample
    proposal_grid: Size | None = None  # nodes per axis of a grid that proposes and culls samples; null: the field does
    max_rays: Count | None = None  # rays per sample at a time, made again in the backward pass; null: all at once
    disparity: Disparity = "camera"  # of the depth along the viewing axis; triplane_turbo: along the ray, as published
    rgb_gradient_scale: Schedule = 1.0  # scale of the images' gradient to the colours
    rgb_weight_gradient_scale: Schedule = 1.0  # scale of the RGB images' gradient to the compositing weights (geometry)

    @field_validator("inv_std", "beta", mode="before")
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        if isinstance(value, Tensor):  # which would be taken as a number, without its gradient
            raise ValueError("is a tensor; for a learned one give the renderer alpha=NeusAlpha(inv_std)")
        return value

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


class RayOutputs(NamedTuple):
    """Outputs of volume rendering along M rays of each sample.

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


@dataclass(frozen=True)
class VolumeRenderer(Renderer):
    """Volume rendering of a Field, by rays with `num_samples` segments each.

    config  its settings
    alpha   from signed distance to opacity (NeusAlpha with a learned inv_std, DensityAlpha, ...) in the place of what
            `density`, `inv_std` and `beta` of the settings say; None: as they say

    Rays are sampled where they cross the cube [-1, 1]^3, or between `near` and `far` if these are set. A field is asked
    by its faster methods where it has them (`prd.fields.fast`). With `max_rays` the backward pass makes every chunk's
    activations again, so that one chunk's exist at a time.
    """

    config_class: ClassVar[type] = VolumeConfig

    config: VolumeConfig = field(default_factory=VolumeConfig)
    alpha: AlphaModel | None = None

    def __post_init__(self) -> None:
        floor = self.alpha.floor if isinstance(self.alpha, NeusAlpha) else 0.0
        if floor > 0 and self.config.cull_below > 0:
            raise ValueError(
                f"cull_below={self.config.cull_below}: must be 0 with alpha={self.alpha}, whose floor gives empty "
                "segments an opacity"
            )
        if self.config.proposal_grid is not None and isinstance(self.alpha, DensityAlpha):
            raise ValueError(
                f"proposal_grid={self.config.proposal_grid}: must be null with alpha={self.alpha}, whose field answers "
                "a density, which says nothing of what lies between nodes"
            )

    @classmethod
    def from_config(cls, config: VolumeConfig) -> VolumeRenderer:
        """The renderer of some settings."""
        return cls(config)

    def with_config(self, config: VolumeConfig, alpha: AlphaModel | None = None) -> VolumeRenderer:
        """This renderer with other settings, and with the model's own way from signed distance to opacity if given."""
        return replace(self, config=config, alpha=self.alpha if alpha is None else alpha)

    @property
    def model(self) -> AlphaModel:
        """Model of the opacity of a segment. TypeError if a schedule of the settings still spans steps."""
        if self.alpha is not None:
            return self.alpha
        if self.config.density == "volsdf":
            return VolSDFAlpha(number(self.config.beta))
        return NeusAlpha(number(self.config.inv_std), self.config.alpha_floor)

    @property
    def passes(self) -> int:
        """Jitter offsets per ray: one per sampling pass."""
        return 2 if self.config.num_importance_samples else 1

    @property
    def field_grid(self) -> int | None:
        """Resolution of the grid on which training samples the field beforehand; None: asked at every sample."""
        return self.config.grid_resolution

    def render(
        self,
        field: Field,
        cameras: Cameras,
        size: tuple[int, int],
        background: float | Tensor,
        draws: Draws | None = None,
    ) -> Rendered:
        """Views [B, V, height, width, .] and gradients of the signed distance for the eikonal loss.

        size        (height, width), pixels
        background  number or tensor broadcastable to [B, V, height, width, 3]
        draws       the jitter, one offset per ray and pass; None: no jitter (offsets of half a segment)

        The gradients are those at the segments looked at, or those of the nodes of a field that is a grid. Culling
        leaves only segments near the surface, while the published eikonal loss covers all samples of all rays:
        cull_below=0 gives that one.
        """
        check_image_size(*size)
        rays = self.bundle(*cameras.rays(*size), self.offsets(cameras, size, draws))
        return self.render_rays(field, cameras, rays, size, background)

    def render_rays(
        self,
        field: Field,
        cameras: Cameras,
        rays: RayBundle,
        size: tuple[int, int],
        background: float | Tensor = 0.5,
    ) -> Rendered:
        """`render` for rays [B, V * height * width] that may be any of the cameras' (a patch, say)."""
        shape = (cameras.batch, cameras.views, *size)
        _check_precision(field, rays.origins[:, :1])
        step, guide = self.config.max_rays or rays.origins.shape[1], self._guide(field, rays)
        parts = [self._chunk(field, *guide, rays.rows(i, i + step)) for i in range(0, rays.origins.shape[1], step)]

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
        if self.config.disparity == "triplane_turbo":
            disparity = published_disparity(image("distance"), opacity, cameras)
        views = Views(rgb, normal, depth, disparity, opacity, cameras, image("variance"))
        nodes = node_gradient(field)
        samples = _samples(parts) if nodes is None else GradientSamples(nodes.flatten(1, -2), None)
        return Rendered(views, samples=samples, stats={"opacity": opacity.detach().mean()})

    def bundle(self, origins: Tensor, directions: Tensor, jitter: Tensor) -> RayBundle:
        """Rays [B, V, H, W, 3] with their range, flattened; jitter [passes, B, V, H, W] in [0, 1)."""
        origins, directions = origins.flatten(1, 3), directions.flatten(1, 3)
        shape = (*origins.shape[:2], 1)
        if self.config.near is None or self.config.far is None:
            near, far = cube_near_far(origins, directions)
        else:
            near, far = origins.new_full(shape, self.config.near), origins.new_full(shape, self.config.far)
        return RayBundle(origins, directions, near, far, jitter.flatten(2)[..., None])

    def offsets(self, cameras: Cameras, size: tuple[int, int], draws: Draws | None = None) -> Tensor:
        """The jitter [passes, B, V, height, width] in [0, 1): drawn, or half a segment."""
        like = cameras.fovy
        if draws is None:
            return like.new_full((self.passes, cameras.batch, cameras.views, *size), 0.5)
        return draws.uniform((cameras.batch, self.passes, cameras.views, *size)).transpose(0, 1).to(like)

    @torch.no_grad()
    def sample_edges(self, field: Field, rays: RayBundle) -> Tensor:
        """Ends of the segments along each ray, ascending: [B, M, S + 1]. The field is asked for its sdf alone.

        Uniform between near and far; with importance sampling these are a proposal, whose density comes from a frontal
        surface (cos = -1) over a step of 2 sqrt(3) / num_samples (`proposal_step`), as published; the fine ones are
        added to it.
        """
        fine_count, proposed = self.config.num_samples, self.config.num_importance_samples
        middles = rays.near + (rays.far - rays.near) * jittered_shares(proposed or fine_count, rays.jitter[0])
        edges = edges_around(middles, rays.near, rays.far)
        if not proposed:
            return edges
        widths, middles = edges.diff(dim=-1), (edges[..., 1:] + edges[..., :-1]) / 2
        step = torch.full_like(widths, self.config.proposal_step or 2 * HALF_DIAGONAL / fine_count)
        sdf = sdf_along(field, rays.origins, rays.directions, middles)
        alpha = self.model(sdf, -torch.ones_like(sdf), step)
        transmittance = torch.exp(-torch.cumsum(alpha / step * widths, dim=-1))
        cdf = F.pad(1 - transmittance[..., :-1], (1, 0), value=0.0)  # at the edges but the last
        cdf = F.pad(cdf, (0, 1), value=1.0)  # what is left lies at the end
        fine = sample_pdf(edges, cdf, jittered_shares(fine_count, rays.jitter[1]))
        fine = edges_around(fine, edges[..., :1], edges[..., -1:])
        return torch.cat([edges, fine], dim=-1).sort(dim=-1).values

    def march(self, field: Field, rays: RayBundle, edges: Tensor) -> RayOutputs:
        """Opacity, colour and normals along rays whose segments end at edges [B, M, S + 1].

        Only segments that can matter are asked for gradient and colour: they are gathered to [B, K] and their opacity
        is put back among the others'.
        """
        index, valid = relevant_segments(field, self.model, rays, edges, self.config.cull_below)
        return self._march(field, rays, edges, index, valid)

    @torch.no_grad()
    def _guide(self, field: Field, rays: RayBundle) -> tuple[Field, float]:
        """Return what proposes and culls samples, and by how much its signed distances may be wrong, scene units.

        It is the field itself, or its values on the grid of `proposal_grid`. Between nodes these are wrong by half the
        diagonal of a cell at most where the slope is at most 1; a steeper or thinner part may be lost there. A field
        that is a grid already, and rays of float64, are their own guide.
        """
        nodes, origins = self.config.proposal_grid, rays.origins
        if nodes is None or node_gradient(field) is not None or origins.dtype != torch.float32:
            return field, 0.0
        return GridField(field, nodes, len(origins), origins.device), HALF_DIAGONAL / (nodes - 1)

    def _chunk(self, field: Field, guide: Field, error: float, rays: RayBundle) -> RayOutputs:
        """Some rays' colours. Where there are several chunks, the graph of one is made again when it is needed."""
        edges = self.sample_edges(guide, rays)
        index, valid = relevant_segments(field, self.model, rays, edges, self.config.cull_below, guide, error)
        if self.config.max_rays is None or not torch.is_grad_enabled():
            return self._march(field, rays, edges, index, valid)
        return checkpoint(self._march, field, rays, edges, index, valid, use_reentrant=False, preserve_rng_state=False)

    def _march(self, field: Field, rays: RayBundle, edges: Tensor, index: Tensor, valid: Tensor) -> RayOutputs:
        """`march` at the segments index [B, K] of M * S, of which those with valid [B, K] = 1 count."""
        middles = (edges[..., 1:] + edges[..., :-1]) / 2  # [B, M, S]
        batch, count, per_ray = middles.shape
        directions, dt, points = segments(rays, edges, index)
        sdf, gradient, colour = sample(field, points)
        cos, normal = facing(directions, gradient)
        some = self.model(sdf[..., 0], cos, dt) * valid
        alpha = torch.zeros_like(middles).flatten(1).scatter_add(1, index, some).view(middles.shape)
        weights = render_weights(alpha)
        w = (weights.flatten(1).gather(1, index) * valid)[..., None]  # [B, K, 1]
        colour_w = scale_gradient(w, number(self.config.rgb_weight_gradient_scale))
        colour = scale_gradient(colour, number(self.config.rgb_gradient_scale))
        parts = torch.cat([colour_w * colour, colour_w, w * normal], dim=-1)  # [B, K, 7]
        row = (index // per_ray + torch.arange(batch, dtype=torch.long, device=index.device)[:, None] * count).flatten()
        sums = parts.new_zeros(batch * count, 7).index_add(0, row, parts.flatten(0, 1)).view(batch, count, 7)
        rgb, rgb_opacity, normals = sums.split([3, 1, 3], dim=-1)
        distance = (weights * middles).sum(-1, keepdim=True)
        variance = torch.linalg.vecdot(weights, (middles - distance).square())[..., None]
        return RayOutputs(edges, alpha, weights, rgb, rgb_opacity, normals, distance, variance, gradient, valid)


def _samples(parts: list[RayOutputs]) -> GradientSamples:
    """The gradients of all chunks, without their padding."""
    real = [part.valid > 0 for part in parts]
    gradient = torch.cat([part.gradient[rows] for part, rows in zip(parts, real, strict=True)])
    counts = torch.stack([rows.sum(dim=1) for rows in real]).sum(dim=0).clamp(min=1)  # [B]
    sample = torch.cat([rows.nonzero()[:, 0] for rows in real])
    return GradientSamples(gradient, 1 / (len(counts) * counts[sample]).to(gradient.dtype))


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
