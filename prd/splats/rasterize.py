"""Drawing of 3D Gaussians: ellipses, sorted by depth, composited front to back; one function, three backends.

A pixel's value is sum_i T_i alpha_i f_i with alpha_i = o_i exp(-d_i^T C_i d_i / 2) at its centre and T_i the product of
(1 - alpha_j) over the nearer ones (Kerbl et al. 2023, Eq. 3). Depth is that of the mean, along the viewing axis.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prd.cameras import Cameras
from prd.rendering.views import check_image_size
from prd.splats._composite_numba import composite_backward, composite_forward
from prd.splats.project import (
    LEAST_ALPHA,
    LEAST_LEFT,
    LOW_PASS,
    MOST_ALPHA,
    NEAR,
    Ellipses,
    check_one_sample,
    intrinsics,
    project,
)
from prd.splats.splats import Splats

Backend = Literal["auto", "torch", "numba", "gsplat"]
BACKENDS = ("auto", "torch", "numba", "gsplat")


def rasterize_splats(
    splats: Splats,
    features: Tensor,
    cameras: Cameras,
    height: int,
    width: int,
    *,
    antialias: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Images [V, H, W, C] of the Gaussians' features, and their opacity [V, H, W, 1] in [0, 1].

    features   [N, C], or [V, N, C] where they differ by view
    cameras    of one sample, [1, V]
    antialias  as in `project`
    backend    "torch" is the reference, on any device that has float64; "numba" the same on CPUs; "gsplat" the kernels
               of that library, on CUDA. "auto": gsplat on CUDA if it is installed, numba on the CPU, torch elsewhere

    Differentiable in the Gaussians and the features. torch and numba compute in float64; gsplat in float32, by the same
    formulas and limits (its cut-offs fall on other pixels where they are met to the last digits). What is seen: mean at
    least 0.01 before the camera; alpha at least 1 / 255 at a pixel's centre, at most 0.999; until the transmittance
    falls to 1e-4. Raises ValueError for features or cameras that do not fit and for a backend that is not there.
    """
    check_image_size(height, width)
    check_one_sample(cameras)
    device, count, views = splats.means.device, len(splats.means), cameras.views
    if features.shape[:-1] not in ((count,), (views, count)):
        raise ValueError(f"features={tuple(features.shape)}: expected [{count}, C] or [{views}, {count}, C]")
    chosen = _chosen(backend, device)
    features = features.expand(views, -1, -1) if features.ndim == 2 else features
    if chosen == "gsplat":
        return _gsplat(splats, features, cameras, height, width, antialias)
    exact, seen = splats.to(torch.float64), cameras.to(torch.float64)
    shapes = exact.means, exact.scales, exact.rotations, exact.opacities
    ellipses = project(*shapes, seen, height, width, antialias=antialias)
    composite = _composite_numba if chosen == "numba" else composite_torch
    image, opacity = composite(ellipses, features.double(), height, width)
    return image.to(features.dtype), opacity.to(features.dtype)


def _chosen(backend: str, device: torch.device) -> str:
    """The backend that draws on a device; ValueError where it cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    found = importlib.util.find_spec("gsplat") is not None
    if backend == "auto":
        return "numba" if device.type == "cpu" else "gsplat" if device.type == "cuda" and found else "torch"
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend='numba' draws on the CPU, the splats are on {device}; use 'auto' or 'torch'")
    if backend == "gsplat" and device.type != "cuda":
        raise ValueError(f"backend='gsplat' draws on CUDA, the splats are on {device}; use 'auto' or 'torch'")
    if backend == "gsplat" and not found:
        raise ValueError("backend='gsplat': gsplat is not installed; pip install gsplat, or use 'auto'")
    return backend


def front_to_back(ellipses: Ellipses, view: int) -> Tensor:
    """Numbers [n] of the Gaussians that a view draws, the nearest first; of equally near ones the lowest number."""
    drawn = (ellipses.extents[view] > 0).all(dim=-1).nonzero()[:, 0]
    return drawn[ellipses.depths[view].detach()[drawn].argsort(stable=True)]


def pixel_boxes(ellipses: Ellipses, view: int, height: int, width: int) -> Tensor:
    """Pixels whose centres lie in the boxes of a view's ellipses: first column, row, end column, row, [N, 4] int64."""
    centres, extents = ellipses.centres[view].detach(), ellipses.extents[view]
    size = centres.new_tensor([width, height])
    first = (centres - extents - 0.5).ceil().clamp_min(0)
    end = torch.minimum((centres + extents - 0.5).floor() + 1, size)
    return torch.cat([first, torch.maximum(first, end)], dim=-1).long()


def composite_torch(ellipses: Ellipses, features: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The reference: every pixel of every ellipse's box as a list, sorted by pixel, then by depth.

    features [V, N, C]. Returns images [V, H, W, C] and opacity [V, H, W, 1].
    """
    views = [_composite_view(ellipses, view, own, height, width) for view, own in enumerate(features)]
    flat = torch.stack(views).unflatten(1, (height, width))
    return flat[..., :-1], flat[..., -1:]


def _composite_view(ellipses: Ellipses, view: int, features: Tensor, height: int, width: int) -> Tensor:
    """[H W, C + 1]: the features and the opacity of one view."""
    order = front_to_back(ellipses, view)
    first_column, first_row, end_column, end_row = pixel_boxes(ellipses, view, height, width)[order].unbind(-1)
    columns = end_column - first_column
    counts = columns * (end_row - first_row)
    owner = torch.arange(len(order), dtype=torch.long, device=order.device).repeat_interleave(counts)
    place = torch.arange(len(owner), dtype=torch.long, device=order.device) - (counts.cumsum(0) - counts)[owner]
    column, row = first_column[owner] + place % columns[owner], first_row[owner] + place // columns[owner]
    pixel, index = row * width + column, order[owner]
    centre = torch.stack([column, row], dim=-1).to(features.dtype) + 0.5
    with torch.no_grad():
        kept = (_alphas(ellipses, view, index, centre) >= LEAST_ALPHA).nonzero()[:, 0]
        kept = kept[pixel[kept].argsort(stable=True)]
        kept = kept[_left(_alphas(ellipses, view, index[kept], centre[kept]), pixel[kept])[1] > LEAST_LEFT]
    pixel, index = pixel[kept], index[kept]
    alpha = _alphas(ellipses, view, index, centre[kept])
    weight = _left(alpha, pixel)[0] * alpha
    seen = torch.cat([features[index], torch.ones_like(weight)[:, None]], dim=-1) * weight[:, None]
    return seen.new_zeros(height * width, seen.shape[1]).index_add(0, pixel, seen)


def _alphas(ellipses: Ellipses, view: int, index: Tensor, centre: Tensor) -> Tensor:
    """alpha [P] of the Gaussians `index` [P] at pixel centres [P, 2]."""
    x, y = (centre - ellipses.centres[view, index]).unbind(-1)
    a, b, c = ellipses.conics[view, index].unbind(-1)
    return (ellipses.opacities[view, index] * torch.exp(-(a * x * x + 2 * b * x * y + c * y * y) / 2)).clamp(
        max=MOST_ALPHA
    )


def _left(alpha: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Transmittance [P] before and behind each entry of a list that is sorted by pixel, then front to back."""
    loss = torch.log1p(-alpha)
    behind = loss.cumsum(0)
    before = behind - loss
    _, place, counts = torch.unique_consecutive(pixel, return_inverse=True, return_counts=True)
    start = before[(counts.cumsum(0) - counts)][place]
    return torch.exp(before - start), torch.exp(behind - start)


def _composite_numba(ellipses: Ellipses, features: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`composite_torch` by compiled loops."""
    orders = [front_to_back(ellipses, view).numpy() for view in range(len(features))]
    boxes = [pixel_boxes(ellipses, view, height, width).numpy() for view in range(len(features))]
    drawn = ellipses.centres, ellipses.conics, ellipses.opacities, features
    image = _Composite.apply(*drawn, (orders, boxes), (height, width))
    return image[..., :-1], image[..., -1:]


class _Composite(torch.autograd.Function):
    """Images [V, H, W, C + 1], the opacity last, of centres [V, N, 2], conics, opacities and features, float64."""

    @staticmethod
    def forward(
        ctx: Any, centres: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, lists: Any, size: Any
    ) -> Tensor:
        orders, boxes = lists
        image = composite_forward(_arrays(centres, conics, opacities, features), orders, boxes, size)
        ctx.save_for_backward(centres, conics, opacities, features, image)
        ctx.lists, ctx.size = lists, size
        return image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *drawn, image = ctx.saved_tensors
        orders, boxes = ctx.lists
        return *composite_backward(_arrays(*drawn), orders, boxes, *_arrays(image, grad)), None, None


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


def _gsplat(
    splats: Splats, features: Tensor, cameras: Cameras, height: int, width: int, antialias: bool
) -> tuple[Tensor, Tensor]:
    """gsplat's kernels (Ye et al. 2025), which need CUDA and are compiled when they are first used."""
    import gsplat

    world_to_camera, matrices = intrinsics(cameras, height, width)
    images, opacity, _ = gsplat.rasterization(
        *(splats.means.float(), splats.rotations.float(), splats.scales.float(), splats.opacities.float()),
        *(features.float(), world_to_camera.float(), matrices.float(), width, height),
        near_plane=NEAR,
        eps2d=LOW_PASS,
        packed=False,
        camera_model="ortho" if cameras.orthographic else "pinhole",
        rasterize_mode="antialiased" if antialias else "classic",
    )
    return images.to(features.dtype), opacity.to(features.dtype)
