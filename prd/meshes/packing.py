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

from prd.meshes.charts import charts_of, upright

TURNS = 4  # of a quarter, that are tried for each chart, whose smallest box stands upright first
USED = tuple(0.8 - 0.04 * k for k in range(16))  # parts of the grid's area that charts may cover
MORE = 0.16  # of the area, at most, that has room on the finer grid and not on the coarse one
STEPS = 5  # of the bisection there
FEW = tuple(0.4 * 0.7**k for k in range(20))  # where nothing else has room
NARROW = 0.55  # of the grid's rows, at least, that are in use: the texture is not stretched more than that
ORDERS = 6  # in which the charts are placed, the largest about first
SHUFFLE = 0.25  # of the logarithm of a chart's extent, in these orders
FINALISTS = 2  # packings of the coarse grid that are tried on the finer one
MANY = 64  # charts, above which one order must do
REACH = 3  # cells, within which charts touch
FINER = 2  # pixels per cell, at least, in which a chart's outline is kept
NEIGHBOURS = np.ones((3, 3), bool)


def pack(uv: NDArray[np.float32], faces: NDArray[np.int64], cells: int, gap: int) -> NDArray[np.float32]:
    """Return texture coordinates [V, 2] in [0, 1], the charts as large as they fit at one scale.

    uv [V, 2] of each chart at the scale and handedness that all have, faces [F, 3]; cells: side of the grid on which
    the charts are placed; gap: cells between charts, at least. Rows that stay empty are left out: then the texture is
    stretched that much upwards. Raises ValueError where the grid is too small.
    """
    count, label = charts_of(faces, len(uv))
    exact = uv.astype(np.float64)
    charts = [_Chart(exact, np.flatnonzero(label == i), faces[label[faces[:, 0]] == i]) for i in range(count)]
    found = _packed(charts, cells, gap)
    if found is None:
        raise ValueError(f"texture_size={cells}: too small for {count} charts of {len(faces)} faces; take a larger one")
    out = np.zeros((len(uv), 2))
    for i, turn, corner in zip(found.plan.order, found.turns, found.corners, strict=True):
        out[charts[i].vertices] = (charts[i].turned(turn) * found.scale + corner) / [found.cells, found.rows]
    return out.clip(0, 1).astype(np.float32)


class _Chart:
    """One chart: its vertices, its points in lengths of the surface, and its outline at each angle."""

    def __init__(self, uv: NDArray[np.float64], vertices: NDArray[np.int64], faces: NDArray[np.int64]) -> None:
        self.vertices, self.points = vertices, upright(uv[vertices])
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


@dataclass(frozen=True)
class _Plan:
    """A way to place charts: one after the other in an order, each as near to the first row as it goes.

    touching  where it touches others and the sides of the grid most, instead
    """

    order: tuple[int, ...]
    touching: bool = False


@dataclass
class _Packing:
    """Charts in their places: the turn of each and its lowest corner (column, row), cells, in the order of the plan.

    used   part of the whole grid that the charts cover
    scale  cells per unit of length
    cells  side of the grid
    rows   of it that are in use
    """

    plan: _Plan
    used: float
    scale: float
    cells: int
    turns: list[int] = field(default_factory=list)
    corners: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0

    @property
    def filled(self) -> float:
        """Part of the rows in use that the charts cover."""
        return self.used * self.cells / max(self.rows, NARROW * self.cells)


def _packed(charts: list[_Chart], cells: int, gap: int) -> _Packing | None:
    """Return the fullest packing found: by many plans on a coarse grid, by the best of them on the finer one."""
    plans = _plans(charts)
    tried = [packing for used in USED for packing in _placed(charts, plans, used, cells // 2, gap)]
    tried.sort(key=lambda packing: -packing.filled)
    found = tried[:1]
    for coarse in tried[:FINALISTS]:
        used, step = coarse.used, MORE
        for _ in range(STEPS):
            step /= 2
            finer = _placed(charts, [coarse.plan], used + step, cells, gap)
            found += finer
            used += step if finer else 0
    if not found:
        found = next(filter(None, (_placed(charts, plans[:1], used, cells, gap) for used in FEW)), [])
    return max(found, key=lambda packing: packing.filled, default=None)


def _plans(charts: list[_Chart]) -> list[_Plan]:
    """Return the plans to try, the same ones for the same charts."""
    extents = np.array([chart.extent for chart in charts])
    draw = np.random.default_rng(0)
    noise = np.concatenate([np.zeros((1, len(charts))), draw.normal(0, SHUFFLE, (ORDERS - 1, len(charts)))])
    orders = [tuple(np.argsort(-extents * np.exp(shift), kind="stable").tolist()) for shift in noise]
    if len(charts) > MANY:
        return [_Plan(orders[0])]
    return [_Plan(order, touching) for order in dict.fromkeys(orders) for touching in (False, True)]


def _placed(charts: list[_Chart], plans: Sequence[_Plan], used: float, cells: int, gap: int) -> list[_Packing]:
    """Return the packings of those plans for which charts that cover this part of the grid find room."""
    scale = math.sqrt(used / sum(chart.area for chart in charts)) * cells
    stamps = [_Stamps(chart, scale, cells, gap) for chart in charts]
    if not all(stamp.turns for stamp in stamps):
        return []
    packings = [_Packing(plan, used, scale, cells) for plan in plans]
    return [packing for packing in packings if _place(stamps, packing, gap)]


class _Stamps:
    """A chart's cells at each turn in which they fit on the grid, with the margin around them, and their spectra."""

    def __init__(self, chart: _Chart, scale: float, cells: int, gap: int) -> None:
        masks = [chart.mask(turn, scale, gap) for turn in range(TURNS)]
        self.turns = [turn for turn in range(TURNS) if max(masks[turn].shape) <= cells]
        self.inner = {turn: chart.mask(turn, scale, 0) for turn in self.turns}
        self.shapes = [masks[turn].shape for turn in self.turns]
        self.size = int(masks[0].sum())
        padded = np.zeros((len(self.turns), cells, cells), np.float32)
        for layer, turn in zip(padded, self.turns, strict=True):
            layer[: masks[turn].shape[0], : masks[turn].shape[1]] = masks[turn]
        self.spectra = np.conj(rfft2(padded))

    def overlaps(self, taken: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how many cells [turns, cells, cells] are taken already, of a stamp with its corner at each cell."""
        return np.asarray(irfft2(rfft2(taken) * self.spectra, taken.shape))


def _place(stamps: list[_Stamps], packing: _Packing, gap: int) -> bool:
    """Put the charts in their places by the packing's plan; False where one finds no room."""
    cells = packing.cells
    taken = np.zeros((cells, cells), np.float32)
    for i in packing.plan.order:
        stamp = stamps[i]
        overlaps = stamp.overlaps(taken)
        touch = stamp.overlaps(_near(taken)) / stamp.size if packing.plan.touching else None
        best: tuple[float, int, int, int] | None = None  # cost, row, column, number of the turn
        for k, (height, width) in enumerate(stamp.shapes):
            room = overlaps[k, : cells - height + 1, : cells - width + 1] < 0.5
            if touch is None:
                free = np.flatnonzero(room.reshape(-1))
                if not len(free):
                    continue
                row, column = divmod(int(free[0]), room.shape[1])
                cost = float(row + height) + column / cells
            else:
                top = (np.arange(room.shape[0]) + height) / cells
                costs = np.where(room, top[:, None] - touch[k, : room.shape[0], : room.shape[1]], np.inf)
                row, column = divmod(int(costs.argmin()), room.shape[1])
                cost = float(costs[row, column])
            if cost < (best[0] if best else np.inf):
                best = (cost, row, column, k)
        if best is None:
            return False
        _, row, column, k = best
        inner = stamp.inner[stamp.turns[k]]
        taken[row + gap :, column + gap :][: inner.shape[0], : inner.shape[1]] += inner
        packing.turns.append(stamp.turns[k])
        packing.corners.append((column + gap, row + gap))
        packing.rows = max(packing.rows, row + stamp.shapes[k][0])
    return True


def _near(taken: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cells [H, W] near to those that are taken or to the sides of the grid."""
    framed = np.pad(taken > 0.5, 1, constant_values=True)
    return binary_dilation(framed, NEIGHBOURS, iterations=REACH)[1:-1, 1:-1].astype(np.float32)
