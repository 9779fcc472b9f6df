"""Faster ways of asking a field, where it has them: the optional methods, and one function for each with its fallback.

A field must answer the four methods of `Field` only. Renderers, isosurfaces and pipelines ask through the functions of
this module, which take a field's own faster method if it has one and check what it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from prd.fields.checks import check_numbers, expect, several
from prd.fields.protocol import Field, FieldSamples

Geometry = tuple[Tensor, Tensor | None]  # sdf [B, X, Y, Z], deformation [B, X, Y, Z, 3] or None
Nodes = tuple[Tensor, Tensor, Tensor | None]  # sdf [B, R, R, R]; rgb, deformation [B, R, R, R, 3], the latter or None

SPLAT_CHANNELS = 13  # position, scales, rotation, colour, opacity
NODES_PER_CHUNK = 1 << 18  # points of one query where the field has no grid of its own


class FastField(Field, Protocol):
    """Optional methods of a field. Each may be left out; a field that has one is asked by it.

    node_gradient  [B, R, R, R, 3] of a field that is a grid itself: gradient of the signed distance at its nodes, which
                   the eikonal loss takes instead of that at the samples of the rays
    """

    node_gradient: Tensor

    def sample(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signed distance [B, N, 1], its gradient [B, N, 3] and colour [B, N, 3] at points [B, N, 3], at once."""
        ...

    def sdf_along(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Signed distance [B, M, S] at distances t [B, M, S] along rays [B, M, 3]; need not carry a gradient."""
        ...

    def grid(self, resolution: int) -> Nodes:
        """Values at the nodes of `grid_points(R)`: sdf [B, R, R, R], rgb and deformation or None [B, R, R, R, 3]."""
        ...

    def geometry_grid(self, resolution: int, first: int, last: int) -> Geometry:
        """The planes x[first], ..., x[last - 1] of the nodes: sdf [B, n, R, R], deformation [B, n, R, R, 3] or None."""
        ...

    def surface_grid(self, resolution: int, first: int, last: int, level: float) -> Geometry:
        """`geometry_grid` without gradient, the deformation right at the nodes of cells that a level cuts alone."""
        ...

    def select(self, index: int | Sequence[int]) -> Field:
        """One of the B samples, or some, as a field of their own."""
        ...

    def splat_residuals(self, points: Tensor) -> Tensor | None:
        """Return what trained heads say of Gaussians at surface points [B, N, 3], [B, N, 13]; None without heads.

        Their position, scales, rotation, colour (3 each) and opacity, as `prd.splats.splats.splats_on` adds them; 0
        changes nothing.
        """
        ...


def _method(field: Field, name: str) -> Any:
    """A field's own faster method, None if it has none."""
    return getattr(field, name, None)


# -- at points ---------------------------------------------------------------------------------------------------------


def sdf_and_gradient(field: Field, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance [B, N, 1] and its gradient [B, N, 3] at points [B, N, 3], checked for their shapes."""
    sdf, gradient = several("sdf_and_gradient", field.sdf_and_gradient(points), 2)
    return expect("sdf_and_gradient", sdf, points, 1), expect("sdf_and_gradient", gradient, points, 3)


def sample(field: Field, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance [B, N, 1], its gradient [B, N, 3] and colour [B, N, 3] at points [B, N, 3].

    By the field's own `sample`, else by `sdf_and_gradient` and `rgb`.
    """
    own: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = _method(field, "sample")
    if own is None:
        return *sdf_and_gradient(field, points), expect("rgb", field.rgb(points), points, 3)
    sdf, gradient, rgb = several("sample", own(points), 3)
    return expect("sample", sdf, points, 1), expect("sample", gradient, points, 3), expect("sample", rgb, points, 3)


def splat_residuals(field: Field, points: Tensor) -> Tensor | None:
    """A field's own `splat_residuals` [B, N, 13] at points [B, N, 3]; None without splat heads."""
    own: Callable[[Tensor], Tensor | None] | None = _method(field, "splat_residuals")
    found = None if own is None else own(points)
    return None if found is None else expect("splat_residuals", found, points, SPLAT_CHANNELS)


def sdf_along(field: Field, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
    """Signed distance [B, M, S] at distances t [B, M, S] along rays [B, M, 3]; ValueError for NaN.

    By the field's own `sdf_along`, else by `sdf` at the points.
    """
    own: Callable[[Tensor, Tensor, Tensor], Tensor] | None = _method(field, "sdf_along")
    if own is not None:
        sdf = expect("sdf_along", own(origins, directions, t), t, t.shape[2])
    else:
        points = (origins[:, :, None] + t[..., None] * directions[:, :, None]).flatten(1, 2)
        sdf = expect("sdf", field.sdf(points), points, 1).view(t.shape)
    check_numbers("sdf", sdf)
    return sdf


def node_gradient(field: Field) -> Tensor | None:
    """Gradient [B, R, R, R, 3] at all nodes of a field that is a grid; None for any other."""
    return _method(field, "node_gradient")


# -- some of the samples -----------------------------------------------------------------------------------------------


def one_sample(field: Field, index: int, batch: int) -> Field:
    """Sample `index` of a field of `batch` samples, by the field's own `select(index)` if it has one."""
    select = _method(field, "select")
    return select(index) if select is not None else FieldSamples(field, [index], batch)


def some_samples(field: Field, indices: Sequence[int], batch: int) -> Field:
    """Samples `indices` of a field of `batch` samples, by the field's own `select(indices)` if it has one."""
    if list(indices) == list(range(batch)):
        return field
    select = _method(field, "select")
    return select(indices) if select is not None else FieldSamples(field, indices, batch)


# -- at the nodes of a grid --------------------------------------------------------------------------------------------


def grid_points(resolution: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Nodes [R, R, R, 3] of the scene's cube, from -1 to 1 along each axis, indexed [x, y, z]."""
    if resolution < 2:
        raise ValueError(f"resolution={resolution}: must be at least 2 nodes per axis")
    axis = torch.linspace(-1, 1, resolution, device=device, dtype=dtype)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def evaluate_nodes(field: Field, resolution: int, batch: int = 1, device: torch.device | str = "cpu") -> Nodes:
    """Signed distance, colour and deformation at the nodes of the cube, by the field's own `grid(R)` if it has one.

    `batch` and `device` say how many samples and where, for a field without it. Raises ValueError for a field that
    answers in the wrong shape.
    """
    own: Callable[[int], Nodes] | None = _method(field, "grid")
    if own is not None:
        sdf, rgb, deformation = several("grid", own(resolution), 3)
        shape = (len(sdf) if isinstance(sdf, Tensor) else batch, resolution, resolution, resolution)
        for name, values, channels in (("sdf", sdf, ()), ("rgb", rgb, (3,)), ("deformation", deformation, (3,))):
            if name == "deformation" and values is None:
                continue
            if not isinstance(values, Tensor):
                raise TypeError(f"field: {name} of its grid is {type(values).__name__}; expected a tensor")
            if values.shape != (*shape, *channels):
                raise ValueError(f"field: {name} of its grid is {tuple(values.shape)}; expected {(*shape, *channels)}")
        return sdf, rgb, deformation
    points = grid_points(resolution, device).view(-1, 3)
    sdf, deformation = values_at(field, points, batch, NODES_PER_CHUNK)
    chunks = [chunk.expand(batch, -1, -1) for chunk in points.split(NODES_PER_CHUNK)]
    colours = [expect("rgb", field.rgb(chunk), chunk, 3) for chunk in chunks]
    shape = (batch, resolution, resolution, resolution)
    offset = None if deformation is None else deformation.view(*shape, 3)
    return sdf.view(shape), torch.cat(colours, dim=1).view(*shape, 3), offset


def evaluate_grid(
    field: Field, resolution: int, batch: int = 1, device: torch.device | str = "cpu", chunk: int = NODES_PER_CHUNK
) -> Geometry:
    """Signed distance [B, R, R, R] and deformation [B, R, R, R, 3] (or None) at the nodes of `grid_points`.

    Uses the field's own `geometry_grid` or `grid` if it has one, else `sdf_and_deformation` on chunks of that many
    points; `batch` and `device` say for which points then. Raises ValueError for fewer than 2 nodes per axis and for a
    field that answers in the wrong shape or for another number of samples than a `batch` beyond 1, TypeError for one
    that answers in something else.
    """
    return next(grid_slabs(field, resolution, resolution, batch=batch, device=device, chunk=chunk))


def grid_slabs(
    field: Field,
    resolution: int,
    planes: int,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    chunk: int = NODES_PER_CHUNK,
    level: float | None = None,
) -> Iterator[Geometry]:
    """`evaluate_grid` in slabs along x of that many planes: sdf [B, n, R, R], deformation [B, n, R, R, 3] or None.

    level  of the surface, near which alone the deformation is wanted, without gradient; None: it is wanted everywhere
    """
    if resolution < 2:
        raise ValueError(f"resolution={resolution}: must be at least 2 nodes per axis")
    geometry: Callable[[int, int, int], Geometry] | None = _method(field, "geometry_grid")
    whole: Callable[[int], Nodes] | None = _method(field, "grid")
    if level is not None and (surface := _method(field, "surface_grid")) is not None:
        geometry = partial(surface, level=level)
    if geometry is None and whole is not None:
        sdf, _, deformation = several("grid", whole(resolution), 3)
        _checked((sdf, deformation), resolution, resolution, batch)
    axis = torch.linspace(-1, 1, resolution, dtype=torch.float32, device=device)
    for first in range(0, resolution, planes):
        last = min(first + planes, resolution)
        if geometry is not None:
            slab = several("geometry_grid", geometry(resolution, first, last), 2)
        elif whole is not None:
            slab = sdf[:, first:last], None if deformation is None else deformation[:, first:last]
        else:
            slab = values_at(field, torch.cartesian_prod(axis[first:last], axis, axis), batch, chunk)
            slab = _shaped(slab, last - first, resolution)
        yield _checked(slab, last - first, resolution, batch)


def values_at(field: Field, points: Tensor, batch: int, chunk: int) -> Geometry:
    """Signed distance [B, N] and deformation [B, N, 3] or None at points [N, 3] shared by all samples."""
    name = "sdf_and_deformation"
    parts = [several(name, field.sdf_and_deformation(p.expand(batch, -1, -1)), 2) for p in points.split(chunk)]
    for (sdf, deformation), p in zip(parts, points.split(chunk), strict=True):
        found = _shape(sdf), _shape(deformation)
        if found[0] != (batch, len(p), 1) or found[1] not in (None, (batch, len(p), 3)):
            raise ValueError(
                f"field: {name} of points [{batch}, {len(p)}, 3] gave {found[0]} and {found[1]}; "
                "expected [B, N, 1] and [B, N, 3] or None (batch says how many samples the field has)"
            )
    sdf = torch.cat([sdf[..., 0] for sdf, _ in parts], dim=1)
    offsets = [deformation for _, deformation in parts if deformation is not None]
    return sdf, torch.cat(offsets, dim=1) if offsets else None


def _shaped(grid: Geometry, planes: int, resolution: int) -> Geometry:
    shape = (planes, resolution, resolution)
    sdf, deformation = grid
    return sdf.unflatten(1, shape), None if deformation is None else deformation.unflatten(1, shape)


def _checked(grid: Geometry, planes: int, resolution: int, batch: int) -> Geometry:
    """The grid of a field that makes its own: of its own number of samples where `batch` is 1, the default."""
    sdf, deformation = _shape(grid[0]), _shape(grid[1])
    shape = (planes, resolution, resolution)
    if sdf is None or len(sdf) != 4 or sdf[1:] != shape or deformation not in (None, (*sdf, 3)):
        raise ValueError(f"field: its grid gave {sdf} and {deformation}; expected [B, *{shape}] and one more 3")
    if batch not in (1, sdf[0]):
        raise ValueError(f"batch={batch}: the field holds {sdf[0]} sample(s)")
    return grid


def _shape(values: Tensor | None) -> tuple[int, ...] | None:
    """Its shape, None for None; TypeError for what is neither."""
    if values is not None and not isinstance(values, Tensor):
        raise TypeError(f"field: a value of its grid is {type(values).__name__}; expected a tensor")
    return None if values is None else tuple(values.shape)
