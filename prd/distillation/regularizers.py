"""Losses on the geometry alone: pure functions of what a renderer or an isosurface gives, and each as a regulariser.

The paper's recipe (supplement B) has eikonal and sparsity; the others belong to DreamFusion, Magic3D and their kin.
Each function returns a scalar, and raises ValueError for what has not the shape it takes. A regulariser takes what a
renderer gave for B samples; `REGULARIZERS` has those that a recipe may name, and a function of one's own,
`my_loss(rendered: Rendered) -> Tensor`, is one as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.rendering.protocol import Rendered
from prd.utils.checked_types import CHECKS, NonNegativeSchedule

NORMAL_EPS = 1e-12  # a shorter vector has no direction


@settings(frozen=True, kw_only=True, config=CHECKS)
class RegularizerConfig:
    """Settings of a regulariser; a class of the user's own with more settings has a subclass."""

    weight: NonNegativeSchedule = 1.0  # of its loss


def eikonal_loss(gradient: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """Mean of (|grad sdf| - 1)^2: a signed distance changes by one unit per unit (Gropp et al., 2020).

    gradient [..., 3] of the signed distance with respect to the point, or what the volume renderer returns: such
    gradients and the weights [...] of their mean, None: all alike. Returns a scalar.
    """
    gradient, weights = (gradient, None) if isinstance(gradient, Tensor) else gradient
    if gradient.shape[-1:] != (3,) or (weights is not None and weights.shape != gradient.shape[:-1]):
        found = None if weights is None else tuple(weights.shape)
        raise ValueError(f"gradient={tuple(gradient.shape)}, weights={found}: expected [..., 3] and [...] or None")
    if weights is None:
        _check_some("gradient", gradient)
    error = (gradient.norm(dim=-1) - 1).square()
    return error.mean() if weights is None else (weights * error).sum()


def sparsity_loss(opacity: Tensor) -> Tensor:
    """Mean of sqrt(opacity^2 + 0.01): empty space where nothing is asked for (DreamFusion's, Poole et al., 2022).

    opacity [...] in [0, 1]. Returns a scalar.
    """
    _check_some("opacity", opacity)
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean binary entropy in nats of the opacity: a pixel is hit or missed, nothing between.

    opacity [...] in [0, 1]; it is clamped to [eps, 1 - eps], beyond which there is no gradient. Returns a scalar.
    """
    _check_some("opacity", opacity)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps={eps}: must lie between 0 and 0.5")
    p = opacity.clamp(eps, 1 - eps)
    return -(p * torch.log(p) + (1 - p) * torch.log1p(-p)).mean()


def orientation_loss(weights: Tensor, normal: Tensor, direction: Tensor) -> Tensor:
    """Mean over rays of sum_i w_i max(0, n_i . d)^2: what is seen faces the camera (Ref-NeRF, Verbin et al., Eq. 11).

    weights [..., N] of the segments of a ray, taken as constants; normal [..., N, 3] unit; direction [..., 3] unit.
    Of an image: weights = opacity [..., 1], normal [..., 1, 3].
    """
    _check_some("weights", weights)
    if normal.shape != (*weights.shape, 3) or direction.shape != (*weights.shape[:-1], 3):
        raise ValueError(
            f"weights={tuple(weights.shape)}, normal={tuple(normal.shape)}, direction={tuple(direction.shape)}: "
            "expected [..., N], [..., N, 3] and [..., 3]"
        )
    away = (normal * direction[..., None, :]).sum(-1).clamp(min=0)  # [..., N]
    return (weights.detach() * away.square()).sum(-1).mean()


def z_variance_loss(z_variance: Tensor, opacity: Tensor, above: float = 0.5) -> Tensor:
    """Mean variance of the distance along the rays that hit: a thin surface (HiFA, Zhu et al., 2023).

    z_variance, opacity [...]: of Views; only pixels with opacity > `above` count, 0 if there is none.
    """
    if z_variance.shape != opacity.shape:
        raise ValueError(f"z_variance={tuple(z_variance.shape)}, opacity={tuple(opacity.shape)}: must be alike")
    hit = (opacity.detach() > above).to(z_variance.dtype)
    return (z_variance * hit).sum() / hit.sum().clamp(min=1)


def normal_consistency_loss(vertices: Tensor, faces: Tensor) -> Tensor:
    """Mean of 1 - cos of the angle between the normals of faces that share an edge; 0 for a flat mesh.

    vertices [N, 3]; faces [F, 3] wound alike. An edge counts once if exactly two faces share it, and not at all if one
    of them has no area, hence no normal.
    """
    _check_mesh(vertices, faces)
    a, b, c = (vertices[corner] for corner in faces.unbind(1))
    cross = torch.linalg.cross(b - a, c - a)
    normal = F.normalize(cross, dim=-1, eps=NORMAL_EPS)
    first, second = _face_pairs(faces)
    has_area = cross.detach().norm(dim=-1) > NORMAL_EPS
    both = has_area[first] & has_area[second]
    first, second = first[both], second[both]
    if not len(first):
        return vertices.sum() * 0
    return (1 - (normal[first] * normal[second]).sum(-1)).mean()


def laplacian_loss(vertices: Tensor, faces: Tensor) -> Tensor:
    """Mean distance of a vertex from the mean of its neighbours (uniform Laplacian, Nealen et al., 2006).

    vertices [N, 3]; faces [F, 3]. Vertices without a face do not count.
    """
    _check_mesh(vertices, faces)
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = edges.sort(dim=1).values.unique(dim=0)
    tail, head = torch.cat([edges, edges.flip(1)]).unbind(1)  # each edge both ways
    total = torch.zeros_like(vertices).index_add(0, tail, vertices[head])
    degree = vertices.new_zeros(len(vertices)).index_add(0, tail, vertices.new_ones(len(tail)))
    used = degree > 0
    if not bool(used.any()):
        return vertices.sum() * 0
    offset = total[used] / degree[used, None] - vertices[used]
    return _length(offset).mean()


def _check_some(name: str, values: Tensor) -> None:
    if not values.numel():
        raise ValueError(f"{name}={tuple(values.shape)}: holds nothing to take the mean of")


def _check_mesh(vertices: Tensor, faces: Tensor) -> None:
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not vertices.is_floating_point():
        raise ValueError(f"vertices={vertices.dtype} {tuple(vertices.shape)}: expected floats [N, 3]")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"faces={faces.dtype} {tuple(faces.shape)}: expected int32 or int64 [F, 3]")
    if not len(faces):
        return
    low, high = (int(value) for value in torch.aminmax(faces))
    if low < 0 or high >= len(vertices):
        raise ValueError(f"faces: name vertices {low}..{high} of {len(vertices)}; they count from 0")


def _length(vectors: Tensor) -> Tensor:
    """Norms [...] of [..., 3], whose gradient at 0 is 0."""
    squared = vectors.square().sum(-1)
    return torch.where(squared > 0, squared.clamp(min=torch.finfo(vectors.dtype).tiny).sqrt(), 0.0)


def _face_pairs(faces: Tensor) -> tuple[Tensor, Tensor]:
    """The faces [P], [P] that share an edge with exactly one other."""
    edges = torch.stack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]], dim=1).flatten(0, 1)  # face-major
    _, key, count = edges.sort(dim=1).values.unique(dim=0, return_inverse=True, return_counts=True)
    order = torch.argsort(key, stable=True)
    shared = order[count[key[order]] == 2] // 3
    return shared[0::2], shared[1::2]


Needs = Literal["views", "samples", "meshes"]


class Regularizer(Protocol):
    """A loss on what a renderer gave: a scalar, a mean over the samples.

    One with an attribute `needs` is asked of some renders only: "samples", those of volumes, which have gradients along
    the rays; "meshes", those of surfaces. Without it, or with "views", it is asked of every render.
    """

    def __call__(self, rendered: Rendered) -> Tensor: ...


@dataclass(frozen=True)
class BuiltinRegularizer:
    """A loss of this module as a regulariser of the renders that it needs."""

    loss: Callable[[Rendered], Tensor]
    needs: Needs

    def __call__(self, rendered: Rendered) -> Tensor:
        return self.loss(rendered)


def applies(regularizer: Regularizer, rendered: Rendered) -> bool:
    """True if a render has what the regulariser needs; ValueError for a need that there is not."""
    needs = getattr(regularizer, "needs", "views")
    if needs not in ("views", "samples", "meshes"):
        raise ValueError(f"needs={needs!r} of {regularizer}: must be 'views', 'samples' or 'meshes'")
    return getattr(rendered, needs) is not None


def regularize(
    rendered: Rendered, regularizers: Mapping[str, tuple[Regularizer, float]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the regularisers that apply to a render, and the value of each, detached.

    regularizers  name -> (regulariser, weight); one of weight 0 is only measured
    """
    total = rendered.views.opacity.new_zeros(())
    values = {}
    for name, (regularizer, weight) in regularizers.items():
        if applies(regularizer, rendered):
            value = regularizer(rendered)
            total = total + weight * value
            values[name] = value.detach()
    return total, values


def _eikonal(rendered: Rendered) -> Tensor:
    assert rendered.samples is not None
    return eikonal_loss(rendered.samples)


def _orientation(rendered: Rendered) -> Tensor:
    views = rendered.views
    directions = views.cameras.rays(*views.opacity.shape[2:4])[1]
    normal = F.normalize(views.normal, dim=-1, eps=NORMAL_EPS)
    return orientation_loss(views.opacity, normal[..., None, :], directions)


def _mean_over_meshes(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Rendered], Tensor]:
    def mean(rendered: Rendered) -> Tensor:
        assert rendered.meshes is not None
        return torch.stack([loss(vertices, faces) for vertices, faces in rendered.meshes]).mean()

    return mean


REGULARIZERS: dict[str, Regularizer] = {
    "eikonal": BuiltinRegularizer(_eikonal, "samples"),
    "sparsity": BuiltinRegularizer(lambda rendered: sparsity_loss(rendered.views.opacity), "samples"),
    "opaque": BuiltinRegularizer(lambda rendered: opaque_loss(rendered.views.opacity), "samples"),
    "orientation": BuiltinRegularizer(_orientation, "samples"),
    "z_variance": BuiltinRegularizer(
        lambda rendered: z_variance_loss(rendered.views.z_variance, rendered.views.opacity), "samples"
    ),
    "normal_consistency": BuiltinRegularizer(_mean_over_meshes(normal_consistency_loss), "meshes"),
    "laplacian": BuiltinRegularizer(_mean_over_meshes(laplacian_loss), "meshes"),
}
