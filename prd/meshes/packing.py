"""Pack the charts of an unwrapped surface into a square: turned, never mirrored, at one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.fft import irfft2, rfft2
from scipy.ndimage import binary_dilation
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TURNS = 4  # of a quarter, that are tried for each chart, whose smallest box stands upright first
ANGLES = 32  # of a quarter turn, among which the smallest box is found
USED = tuple(0.8 - 0.025 * k for k in range(17))  # parts of the grid's area that charts may cover
MORE = (0.09, 0.07, 0.05, 0.03, 0.01, -0.02)  # on the finer grid
FEW = tuple(0.4 * 0.7**k for k in range(20))  # where nothing else has room
FINER = 2  # pixels per cell, at least, in which a chart's outline is kept
NEIGHBOURS = np.ones((3, 3), bool)


def charts_of(faces: NDArray[np.int64], count: int) -> tuple[int, NDArray[np.int64]]:
    """Return the number of charts and, for each of `count` vertices of an unwrapped surface, its chart [V]."""
    pairs = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    found, label = connected_components(graph.tocsr(), directed=False)
    return int(found), label.astype(np.int64)


def pack(uv: NDArray[np.float32], faces: NDArray[np.int64], cells: int, gap: int) -> NDArray[np.float32]:
    """Return texture coordinates [V, 2] in [0, 1], the charts as large as they fit at one scale.

    uv [V, 2] of each chart at the scale and handedness that all have, faces [F, 3]; cells: side of the grid on which
    the charts are placed; gap: cells between charts, at least. Rows that stay empty are left out: then the texture is
    stretched that much upwards. Raises ValueError where the grid is too small.
    """
    count, label = charts_of(faces, len(uv))
    exact = uv.astype(np.float64)
    charts = [_Chart(exact, np.flatnonzero(label == i), faces[label[faces[:, 0]] == i]) for i in range(count)]
    charts.sort(key=lambda chart: -chart.extent)
    found = _best(charts, cells // 2, gap, USED)  # about how much has room, on a coarser grid
    if found is None:
        found = _best(charts, cells, gap, FEW)
    elif finer := _best(charts, cells, gap, [found.used + more for more in MORE]):
        found = max(found, finer, key=lambda packing: packing.filled)
    if found is None:
        raise ValueError(f"texture_size={cells}: too small for {count} charts of {len(faces)} faces; take a larger one")
    out = np.zeros((len(uv), 2))
    for chart, turn, corner in zip(charts, found.turns, found.corners, strict=True):
        out[chart.vertices] = (chart.turned(turn) * found.scale + corner) / [found.cells, found.rows]
    return out.clip(0, 1).astype(np.float32)


class _Chart:
    """One chart: its vertices, its points in lengths of the surface, and its outline at each angle."""

    def __init__(self, uv: NDArray[np.float64], vertices: NDArray[np.int64], faces: NDArray[np.int64]) -> None:
        self.vertices, self.points = vertices, _upright(uv[vertices])
        self.triangles = np.searchsorted(vertices, faces)
        (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T for k in (1, 2))
        self.area = float(np.abs(a * d - b * c).sum() / 2)
        self.extent = float(np.ptp(self.points, axis=0).max())
        self.touched: dict[int, NDArray[np.float64]] = {}  # by angle: middles of pixels that the chart touches
        self.fine = 0.0  # pixels per unit of length there

    def turned(self, turn: int) -> NDArray[np.float64]:
        """Return the points [V, 2] turned by so many quarters, their lowest corner at the origin."""
        points = self.points @ np.linalg.matrix_power(np.array([[0.0, 1.0], [-1.0, 0.0]]), turn)
        return np.asarray(points - points.min(axis=0))

    def mask(self, turn: int, scale: float, gap: int) -> NDArray[np.bool_]:
        """Return the cells [H, W] that the turned chart touches at a scale, with a margin of `gap` cells around it."""
        if scale * FINER > self.fine:
            self.fine, self.touched = 1.5 * scale * FINER, {}
        if turn not in self.touched:
            points = self.turned(turn) * self.fine
            width, height = (int(side) + 2 for side in points.max(axis=0))
            picture = Image.new("1", (width, height))
            draw = ImageDraw.Draw(picture)
            for corners in (points[self.triangles] - 0.5).reshape(-1, 6).tolist():  # a pixel's middle is its number
                draw.polygon(corners, fill=1, outline=1)
            self.touched[turn] = np.argwhere(np.asarray(picture)).astype(np.float64) + 0.5
        cells = (self.touched[turn] * (scale / self.fine)).astype(np.int64) + gap
        mask = np.zeros(cells.max(axis=0) + gap + 1, bool)
        mask[tuple(cells.T)] = True
        return binary_dilation(mask, NEIGHBOURS, iterations=gap) if gap else mask


def _upright(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points [V, 2] turned so that the box around them is the smallest."""
    angles = np.arange(ANGLES) * (math.pi / 2 / ANGLES)
    cos, sin = np.cos(angles), np.sin(angles)
    rotations = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)  # [A, 2, 2]
    turned = points @ rotations  # [A, V, 2]
    return np.asarray(turned[int(np.ptp(turned, axis=1).prod(axis=1).argmin())])


@dataclass
class _Packing:
    """Charts in their places: the turn of each and its lowest corner (column, row), cells.

    used   part of the whole grid that the charts cover
    scale  cells per unit of length
    cells  side of the grid
    rows   of it that are in use
    """

    used: float
    scale: float
    cells: int
    turns: list[int] = field(default_factory=list)
    corners: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0

    @property
    def filled(self) -> float:
        """Part of the rows in use that the charts cover."""
        return self.used * self.cells / self.rows


def _best(charts: list[_Chart], cells: int, gap: int, parts: Sequence[float]) -> _Packing | None:
    """Return the fullest packing for which charts cover one of these parts of the grid; None if no part has room."""
    area = sum(chart.area for chart in charts)
    tried = [_placed(charts, _Packing(used, math.sqrt(used / area) * cells, cells), gap) for used in parts]
    return max((packing for packing in tried if packing), key=lambda packing: packing.filled, default=None)


def _placed(charts: list[_Chart], packing: _Packing, gap: int) -> _Packing | None:
    """Return a packing with its charts; None where they find no room.

    Each is put as near to the first row as it goes, where it overlaps nothing before it.
    """
    cells = packing.cells
    taken = np.zeros((cells, cells), np.float32)
    for chart in charts:
        before = rfft2(taken)
        best: tuple[int, int, int] | None = None  # top row, column, turn
        for turn in range(TURNS):
            mask = chart.mask(turn, packing.scale, gap)
            height, width = mask.shape
            if height > cells or width > cells:
                continue
            overlap = irfft2(before * np.conj(rfft2(mask.astype(np.float32), (cells, cells))), (cells, cells))
            free = np.flatnonzero(overlap[: cells - height + 1, : cells - width + 1].reshape(-1) < 0.5)
            if len(free):
                row, column = divmod(int(free[0]), cells - width + 1)
                best = min(best or (cells + 1, 0, 0), (row + height, column, turn))
        if best is None:
            return None
        top, column, turn = best
        inner = chart.mask(turn, packing.scale, 0)
        row = top - inner.shape[0] - gap
        taken[row : top - gap, column + gap : column + gap + inner.shape[1]] += inner
        packing.turns.append(turn)
        packing.corners.append((column + gap, row))
        packing.rows = max(packing.rows, top)
    return packing
