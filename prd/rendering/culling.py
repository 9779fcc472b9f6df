"""Selection of the ray segments that can matter: opaque, and reached by light. The field is not asked at others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.fields.fast import sdf_along, sdf_and_gradient
from prd.fields.protocol import Field
from prd.rendering.alpha import AlphaModel, transmittance
from prd.rendering.rays import RayBundle

CULLED_AT_ONCE = 1 << 17  # segments of a sample whose gradient is asked for at a time to tell which of them matter
NORMAL_EPS = 1e-6  # length under which a vector is not stretched to a unit normal


@torch.no_grad()
def relevant_segments(
    field: Field,
    alpha: AlphaModel,
    rays: RayBundle,
    edges: Tensor,
    cull_below: float,
    guide: Field | None = None,
    error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Find the segments that are opaque and reached by light: their index among M * S and 1 where it counts, [B, K].

    edges [B, M, S + 1] of the segments. `cull_below` is the least opacity, and the least share of the light that gets
    there: behind, less than that share is lost altogether; 0 keeps all. K is the most any sample of the batch needs (at
    least 1); the rest is padding. Where the opacity depends on the normal, the gradient is asked for at all segments
    that may be opaque: differences of the signed distance would not tell what is absorbed, unless its slope is 1.

    guide  says in the field's place which segments may be opaque; None: the field
    error  by which the guide's signed distances may be wrong, scene units
    """
    widths, middles = edges.diff(dim=-1), (edges[..., 1:] + edges[..., :-1]) / 2
    if cull_below == 0:
        everything = torch.arange(widths[0].numel(), dtype=torch.long, device=widths.device).expand(len(widths), -1)
        return everything, torch.ones_like(everything, dtype=widths.dtype)
    sdf = sdf_along(field if guide is None else guide, rays.origins, rays.directions, middles)
    opaque = alpha.may_reach(sdf - error, widths, cull_below)
    if not alpha.uses_normal:
        reached = transmittance(alpha(sdf + error, sdf, widths)) >= cull_below
        return _gathered((opaque & reached).flatten(1), widths.dtype)
    index, valid = _gathered(opaque.flatten(1), widths.dtype)
    found = torch.zeros_like(widths).flatten(1)
    for some, counts in zip(index.split(CULLED_AT_ONCE, 1), valid.split(CULLED_AT_ONCE, 1), strict=True):
        directions, dt, points = segments(rays, edges, some)
        values, gradient = sdf_and_gradient(field, points)
        found.scatter_add_(1, some, alpha(values[..., 0], facing(directions, gradient)[0], dt) * counts)
    reached = transmittance(found.view(widths.shape)).flatten(1) >= cull_below
    return _gathered(reached & (found > 0), widths.dtype)


def segments(rays: RayBundle, edges: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Direction [B, K, 3], length [B, K] and middle [B, K, 3] of the segments index [B, K] of edges [B, M, S + 1]."""
    ray = index // (edges.shape[2] - 1)
    directions = rays.directions.gather(1, _to3(ray))
    begin, end = (edges.flatten(1).gather(1, index + ray + side) for side in (0, 1))  # a ray has S + 1 edges
    return directions, end - begin, rays.origins.gather(1, _to3(ray)) + ((end + begin) / 2)[..., None] * directions


def facing(directions: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """direction . normal, <= 0 [B, K], and the unit normal [B, K, 3]."""
    normal = F.normalize(gradient.contiguous(), dim=-1, eps=NORMAL_EPS)  # of a grid's lookup it is channels first
    return (directions * normal).sum(-1).clamp(max=0), normal


def _gathered(chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find where chosen [B, N] holds: indices [B, K], ascending, and which of them count, [B, K] of 0 and 1.

    K is the most of any row and at least 1; the others are padded with index 0.
    """
    counts = chosen.sum(dim=1, keepdim=True)
    size = max(int(counts.max()), 1)
    slots = torch.arange(size, dtype=torch.long, device=chosen.device) < counts  # [B, K]
    index = torch.zeros_like(slots, dtype=torch.int64)
    index[slots] = chosen.nonzero()[:, 1]  # both row by row
    return index, slots.to(dtype)


def _to3(index: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, 3)
