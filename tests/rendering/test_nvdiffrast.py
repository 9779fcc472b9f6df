"""The CUDA backend against the reference: what is seen, its gradient, and the antialiasing against nvdiffrast's own.

nvdiffrast snaps vertices to a fraction of a pixel and breaks ties its own way: a few pixels on edges may differ.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.isosurface.marching_cubes import marching_cubes
from prd.rendering.antialias import antialias
from prd.rendering.rasterize import Fragments, interpolate, rasterize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("nvdiffrast") is None,
        reason="nvdiffrast is not installed; it is built from https://github.com/NVlabs/nvdiffrast",
    ),
]
SIZE = 64


def scene(resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bumpy ball on the GPU from four views: clip [4, N, 4], faces [F, 3], colours [N, 3]."""
    axis = torch.linspace(-1, 1, resolution)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    bumps = torch.sin(5 * grid[..., 0]) * torch.sin(4 * grid[..., 1]) * torch.sin(3 * grid[..., 2])
    vertices, faces = marching_cubes(grid.norm(dim=-1) - 0.6 + 0.1 * bumps)
    vertices = vertices * (2 / (resolution - 1)) - 1
    cams = orbit_cameras(torch.full((1, 4), 20.0), torch.arange(4)[None] * 90.0 + 10, 2.4, 50.0)
    matrices = (cams.projection(1.0) @ cams.world_to_camera())[0]
    clip = vertices @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
    return clip.cuda(), faces.cuda(), torch.sigmoid(3 * vertices).cuda()


def image_and_gradients(clip: Tensor, faces: Tensor, colours: Tensor, backend: Any) -> tuple[Fragments, list[Tensor]]:
    clip, colours = clip.clone().requires_grad_(), colours.clone().requires_grad_()
    fragments = rasterize(clip, faces, SIZE, SIZE, backend=backend)
    image = antialias(interpolate(colours, faces, fragments), fragments, clip, faces)
    weight = torch.linspace(0, 1, SIZE, device="cuda")[:, None, None] * torch.tensor([1.0, 2.0, 3.0], device="cuda")
    return fragments, [image, *torch.autograd.grad((image * weight).sum(), (clip, colours))]


def alike(one: Tensor, two: Tensor, tolerance: float) -> None:
    """Equal in direction and length to `tolerance`."""
    assert (one - two).norm() <= tolerance * one.norm()


def test_torch_on_cuda_equals_numba_on_the_cpu() -> None:
    clip, faces, _ = scene(24)
    here = rasterize(clip, faces, SIZE, SIZE, backend="torch")
    there = rasterize(clip.cpu(), faces.cpu(), SIZE, SIZE, backend="numba")
    assert (here.face_index.cpu() != there.face_index).float().mean() < 1e-3


@pytest.mark.parametrize("resolution", [10, 40])
def test_the_backend_sees_what_the_reference_sees(resolution: int) -> None:
    clip, faces, colours = scene(resolution)
    (ours, one), (theirs, two) = (image_and_gradients(clip, faces, colours, b) for b in ("torch", "nvdiffrast"))
    assert (ours.face_index != theirs.face_index).float().mean() < 0.01
    assert ((ours.face_index >= 0) != (theirs.face_index >= 0)).float().mean() < 1e-3
    assert ((one[0] - two[0]).abs().amax(dim=-1) > 0.02).float().mean() < 0.01
    for a, b in zip(one[1:], two[1:], strict=True):
        alike(a, b, 0.05)


def test_packed_meshes_are_drawn_apart() -> None:
    clip, faces, _ = scene(16)
    ranges = torch.tensor([[0, len(faces) // 3], [len(faces) // 3, len(faces)], [5, 5]], device="cuda")
    ours, theirs = (
        rasterize(clip, faces, SIZE, SIZE, ranges=ranges, backend=b).face_index for b in ("torch", "nvdiffrast")
    )
    assert (ours != theirs).float().mean() < 0.01 and (theirs[2] == -1).all()


def test_near_plane_and_what_lies_behind() -> None:
    far, near = 100.0, 0.1
    x, depth = torch.tensor([-50.0, 50, 0]), torch.tensor([-20.0, -20, 90])
    z = (far + near) / (far - near) * depth - 2 * far * near / (far - near)
    floor = torch.stack([x, torch.full((3,), -1.0), z, depth], dim=-1)[None].cuda()
    face = torch.tensor([[0, 1, 2]], device="cuda")
    ours, theirs = (rasterize(floor, face, 32, 32, backend=b).face_index for b in ("torch", "nvdiffrast"))
    assert (ours != theirs).float().mean() < 0.01
    behind = floor * torch.tensor([1.0, 1, -1, -1], device="cuda")
    behind[..., 3] = -behind[..., 3].abs()
    assert (rasterize(behind, face, 32, 32, backend="nvdiffrast").face_index == -1).all()


def test_antialiasing_equals_nvdiffrasts_on_triangles_larger_than_pixels() -> None:
    """Forward and backward, from the same colours: there its search for the edge finds the one we walk to."""
    import nvdiffrast.torch as nvdiffrast

    clip, faces, colours = scene(8)
    fragments, (image, grad_clip, _) = image_and_gradients(clip, faces, colours, "nvdiffrast")
    hard = interpolate(colours, faces, fragments).detach()
    context, triangles = nvdiffrast.RasterizeCudaContext(device=clip.device), faces.int()
    position = clip.clone().requires_grad_()
    buffer, _ = nvdiffrast.rasterize(context, position, triangles, (SIZE, SIZE))
    theirs = nvdiffrast.antialias(hard.flip(1).contiguous(), buffer.detach(), position, triangles).flip(1)
    ours_at = clip.clone().requires_grad_()
    ours = antialias(hard, fragments, ours_at, faces)
    assert ((ours - theirs).abs().amax(dim=-1) > 0.02).float().mean() < 0.01
    weight = torch.linspace(0, 1, SIZE, device="cuda")[:, None, None]
    one = torch.autograd.grad((ours * weight).sum(), ours_at)[0]
    two = torch.autograd.grad((theirs * weight).sum(), position)[0]
    alike(two, one, 0.1)
    assert image.isfinite().all() and grad_clip.isfinite().all()
