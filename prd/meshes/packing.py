"""Pack the charts of an unwrapped surface into a square: turned, never mirrored, at one scale.

A chart is placed where it lies lowest in a strip of cells, one chart after the other. The cells of the strip are the
bits of one long integer, so that all places where a chart would overlap others are found by a few shifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from prd.meshes.charts import charts_of, upright
from prd.meshes.edges import border_of

SLANTS = 4  # parts of a quarter turn, by which charts are turned from where their smallest box stands upright
SIDES = ((0, 1, 2, 3), (0, 2), (1, 3))  # quarter turns beside it, from which a chart's is chosen
NARROW = 0.55  # between the sides of what is in use, at least: the texture is not stretched more than that
WIDTHS = (0.74, 1.35)  # of strips that are tried
WIDER = 0.05  # of a strip's width, in a change of it
FILLED = 0.75  # of the texture, that charts are taken to cover at first
SHUFFLE = 0.25  # of the logarithm of a chart's extent, in orders other than the largest first
COARSE = 3  # cells of the finer grid to one of the coarse one, which needs no gap: a touched cell is one
PLACED = 1200  # charts, at most, in all trials on the coarse grid together
TRIALS = 120  # there, at most
FINALISTS = 3  # packings of the coarse grid that are tried on the finer one
FITS = 5  # of the scale to the grid
ALIKE = 0.96  # of the area that charts covered on the coarse grid, from which on a packing is like it
MOST_FITS = 150  # of it, where no packing of the coarse grid fits
SHRINK = 0.97  # of the scale, from one of these to the next
STEP = 0.25  # cells between the points of a chart's border whose cells count as touched
TALL = 4  # times the columns of a strip: its rows
NEIGHBOURS = np.ones((3, 3), bool)


def pack(uv: NDArray[np.float32], faces: NDArray[np.int64], cells: int, gap: int) -> NDArray[np.float32]:
    """Return texture coordinates [V, 2] in [0, 1], the charts as large as they fit at one scale.

    uv [V, 2] of each chart at the scale and handedness that all have, faces [F, 3]; cells: side of the grid on which
    the charts are placed; gap: cells between charts, at least, also where the texture repeats itself. Rows that stay
    empty are left out: then the texture is stretched that much upwards. Raises ValueError where the grid is too small.
    """
    count, label = charts_of(faces, len(uv))
    exact = uv.astype(np.float64)
    order = np.argsort(label[faces[:, 0]], kind="stable")
    bounds = np.searchsorted(label[faces[order, 0]], np.arange(count + 1))
    charts = [_Chart(exact, faces[order[bounds[i] : bounds[i + 1]]]) for i in range(count)]
    if not sum(chart.area for chart in charts) > 0:
        raise ValueError(f"faces={faces.shape}: the surface has no area; drop degenerate faces")
    found = _packed(charts, cells, gap)
    if found is None:
        raise ValueError(f"texture_size={cells}: too small for {count} charts of {len(faces)} faces; take a larger one")
    out = np.zeros((len(uv), 2))
    for chart, side, quarters, corner in zip(charts, found.plan.sides, found.quarters, found.corners, strict=True):
        out[chart.vertices] = (chart.turned(side // len(SIDES), quarters, found.scale) + corner) / found.size
    return out.clip(0, 1).astype(np.float32)


class _Chart:
    """One chart: its vertices, their points [V, 2] in lengths of the surface, and the edges [E, 2] around it."""

    def __init__(self, uv: NDArray[np.float64], faces: NDArray[np.int64]) -> None:
        self.vertices, local = np.unique(faces, return_inverse=True)
        self.border = border_of(local.reshape(-1, 3))
        self.upright = upright(uv[self.vertices])
        (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T for k in (1, 2))
        self.area = float(np.abs(a * d - b * c).sum() / 2)
        self.extent = float(np.ptp(self.upright, axis=0).max())

    @cached_property
    def slanted(self) -> list[NDArray[np.float64]]:
        """The points [V, 2] turned by parts of a quarter, their lowest corner at the origin."""
        angles = [math.pi / 2 * k / SLANTS for k in range(SLANTS)]
        turns = [np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in angles]
        return [points - points.min(axis=0) for points in (self.upright @ turn for turn in turns)]

    def box(self, slant: int, scale: float) -> tuple[int, int]:
        """Return the columns and rows of cells that the chart takes at a scale."""
        sides = self.slanted[slant].max(axis=0).tolist()
        width, height = (max(1, math.ceil(side * scale + 1e-9)) for side in sides)
        return width, height

    def turned(self, slant: int, quarters: int, scale: float) -> NDArray[np.float64]:
        """Return the points [V, 2] in cells, turned by so many quarters together with the box of cells around them."""
        points, (width, height) = self.slanted[slant] * scale, self.box(slant, scale)
        for _ in range(quarters):
            points, width, height = np.stack([height - points[:, 1], points[:, 0]], axis=1), height, width
        return points

    def mask(self, slant: int, scale: float) -> NDArray[np.bool_]:
        """Return the cells [rows, columns] that the chart touches at a scale."""
        width, height = self.box(slant, scale)
        mask = np.zeros((height, width), bool)
        begins, ends = (self.slanted[slant][self.border[:, k]] * scale for k in (0, 1))
        along = ends - begins
        steps = np.ceil(np.linalg.norm(along, axis=1) / STEP).astype(np.int64) + 1
        at = np.repeat(np.arange(len(steps)), steps)
        part = (np.arange(len(at)) - (np.cumsum(steps) - steps)[at]) / steps[at]
        touched = (begins[at] + part[:, None] * along[at]).astype(np.int64)
        mask[touched[:, 1].clip(max=height - 1), touched[:, 0].clip(max=width - 1)] = True
        return mask | self._inside(begins, along, height, width)

    @staticmethod
    def _inside(begins: NDArray[np.float64], along: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
        """Return the cells [height, width] whose middles lie inside of segments, by the parity of what is crossed."""
        low, high = (
            np.minimum(begins[:, 1], begins[:, 1] + along[:, 1]),
            np.maximum(begins[:, 1], begins[:, 1] + along[:, 1]),
        )
        first, last = np.ceil(low - 0.5).astype(np.int64), np.ceil(high - 0.5).astype(np.int64)  # rows, exclusive
        at = np.repeat(np.arange(len(first)), last - first)
        row = np.arange(len(at)) - (np.cumsum(last - first) - (last - first))[at] + first[at]
        x = begins[at, 0] + along[at, 0] * (row + 0.5 - begins[at, 1]) / along[at, 1]
        crossed = np.zeros((height, width + 1), np.int64)
        np.add.at(crossed, (row, np.ceil(x - 0.5).astype(np.int64).clip(0, width)), 1)
        return (crossed.cumsum(axis=1)[:, :width] & 1).astype(bool)


@dataclass(frozen=True)
class _Way:
    """A chart's cells at a turn: rows, columns, the runs of its cells with the margin around, its own cells in bits."""

    quarters: int
    rows: int
    columns: int
    runs: list[tuple[int, int]]
    bits: int


def _ways(chart: _Chart, slant: int, scale: float, columns: int, gap: int) -> list[_Way]:
    """Return a chart's cells at a scale, at each quarter turn at which they fit into a strip of so many columns."""
    width, height = chart.box(slant, scale)
    inner = np.zeros((height + 2 * gap, width + 2 * gap), bool)
    inner[gap : gap + height, gap : gap + width] = chart.mask(slant, scale)
    outer = binary_dilation(inner, NEIGHBOURS, iterations=gap) if gap else inner
    ways = []
    for quarters, (own, mask) in enumerate(zip(_turns(inner), _turns(outer), strict=True)):
        if mask.shape[1] <= columns:
            wide = np.zeros((2, len(mask), columns), np.int8)
            wide[0, :, : mask.shape[1]], wide[1, :, : mask.shape[1]] = mask, own
            ends = np.flatnonzero(np.diff(wide[0].reshape(-1), prepend=0, append=0)).reshape(-1, 2)
            bits = int.from_bytes(np.packbits(wide[1], bitorder="little").tobytes(), "little")
            runs = [(begin, end - begin) for begin, end in ends.tolist()]
            ways.append(_Way(quarters, mask.shape[0], mask.shape[1], runs, bits))
    return ways


def _turns(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
    """Return a mask as `_Chart.turned` turns it by 0 to 3 quarters."""
    return mask, mask.T[:, ::-1], mask[::-1, ::-1], mask.T[::-1]


@dataclass(frozen=True)
class _Plan:
    """The order [N] in which charts are placed, the slant and side of each chart [N], and how wide the strip is.

    sides  of each chart: number of `SIDES` + number of sides * slant

    width  as a part of the side of a square of which the charts cover `FILLED`
    """

    order: tuple[int, ...]
    sides: tuple[int, ...]
    width: float

    def changed(self, draw: np.random.Generator) -> _Plan:
        """Return a plan that is a little different."""
        i, j = draw.integers(len(self.order), size=2).tolist()
        match int(draw.integers(3)):
            case 0:
                rest = [*self.order[:i], *self.order[i + 1 :]]
                return replace(self, order=(*rest[:j], self.order[i], *rest[j:]))
            case 1:
                side = int(draw.integers(SLANTS * len(SIDES)))
                return replace(self, sides=(*self.sides[:i], side, *self.sides[i + 1 :]))
            case _:
                return replace(self, width=float(np.clip(self.width * draw.normal(1, WIDER), *WIDTHS)))


@dataclass
class _Packing:
    """Charts in their places: quarter turns and lowest corner (column, row) of each; columns, rows in use.

    area  of the charts, square cells
    """

    plan: _Plan
    scale: float
    area: float
    quarters: list[int]
    corners: list[tuple[int, int]]
    columns: int = 0
    rows: int = 0

    @property
    def longest(self) -> int:
        """Columns or rows in use, whichever are more."""
        return max(self.columns, self.rows)

    @property
    def size(self) -> tuple[float, float]:
        """Columns and rows of the texture."""
        return max(self.columns, NARROW * self.longest), max(self.rows, NARROW * self.longest)

    @property
    def filled(self) -> float:
        """Part of the texture that the charts cover."""
        return self.area / math.prod(self.size)


def _packed(charts: list[_Chart], cells: int, gap: int) -> _Packing | None:
    """Return the fullest packing found: by many plans on a coarse grid, by the best of them on the finer one."""
    found = [packing for coarse in _tried(charts, cells // COARSE) if (packing := _refined(charts, coarse, cells, gap))]
    if not found:
        scale, plan = cells / math.sqrt(sum(chart.area for chart in charts)), _plans(charts, 1)[0]
        sizes = (scale * SHRINK**k for k in range(MOST_FITS))
        tried = (_Strip(charts, size, cells + gap, gap).place(plan, cells + gap) for size in sizes)
        found = [packing for packing in tried if packing and packing.longest <= cells][:1]
    return max(found, key=lambda packing: packing.filled, default=None)


def _refined(charts: list[_Chart], coarse: _Packing, cells: int, gap: int) -> _Packing | None:
    """Return a packing by the plan of one on a coarse grid; None where none as large as the grid was found."""
    best = None
    scale = coarse.scale * cells / coarse.longest
    width = math.ceil(coarse.columns * cells / coarse.longest) + gap
    for _ in range(FITS):  # smaller, until the charts find their places again; then as large as there is room
        packing = _Strip(charts, scale, cells + gap, gap).place(coarse.plan, width)
        if packing and packing.longest <= cells and packing.filled > (best.filled if best else 0):
            best = packing
        if packing and packing.filled > ALIKE * coarse.filled:
            if packing.longest == cells:
                break
            scale *= cells / packing.longest
        else:
            scale *= SHRINK
    return best


def _tried(charts: list[_Chart], cells: int) -> list[_Packing]:
    """Return the fullest packings on a coarse grid: by plans drawn at random, and by changes of the best of these."""
    scale = math.sqrt(FILLED / sum(chart.area for chart in charts)) * cells
    trials = min(TRIALS, PLACED // len(charts))
    plans, draw = _plans(charts, -(-trials // 3)), np.random.default_rng(0)
    best: list[_Packing] = []
    strip = _Strip(charts, scale, int(WIDTHS[1] * cells) + 1, 0)
    for k in range(trials if cells > 1 else 0):
        plan = plans[k] if k < len(plans) or not best else best[k % len(best)].plan.changed(draw)
        packing = strip.place(plan, round(plan.width * cells))
        if packing and all(packing.corners != other.corners for other in best):
            best = sorted([*best, packing], key=lambda packing: -packing.filled)[:FINALISTS]
    return best


def _plans(charts: list[_Chart], count: int) -> list[_Plan]:
    """Return plans, the same for the same charts: the first places the largest first, the others about so."""
    extents, draw = np.array([chart.extent for chart in charts]), np.random.default_rng(0)
    plans = []
    for k in range(count):
        noise, sides = draw.normal(0, SHUFFLE, len(charts)), draw.integers(len(SIDES), size=len(charts))
        order = np.argsort(-extents * np.exp(noise if k else 0), kind="stable")
        plans.append(_Plan(tuple(order.tolist()), tuple((sides if k else 0 * sides).tolist()), draw.uniform(*WIDTHS)))
    return plans


class _Strip:
    """A strip of so many columns of cells in which charts are placed at one scale."""

    def __init__(self, charts: list[_Chart], scale: float, columns: int, gap: int) -> None:
        self.scale, self.columns, self.gap = scale, columns, gap
        self.area = sum(chart.area for chart in charts) * scale**2
        self.charts = charts
        self.ways: dict[tuple[int, int], list[_Way]] = {}  # by chart and slant

    def place(self, plan: _Plan, width: int) -> _Packing | None:
        """Return charts placed by a plan in the first columns, each where it ends in the lowest row.

        None where one finds no room.
        """
        count = len(self.charts)
        packing = _Packing(plan, self.scale, self.area, [0] * count, [(0, 0)] * count)
        taken = 0
        for i in plan.order:
            slant, side = divmod(plan.sides[i], len(SIDES))
            if (i, slant) not in self.ways:
                self.ways[i, slant] = _ways(self.charts[i], slant, self.scale, self.columns, self.gap)
            ways = [way for way in self.ways[i, slant] if way.columns <= width]
            found = self._lowest([way for way in ways if way.quarters in SIDES[side]] or ways, _Spans(taken), width)
            if found is None:
                return None
            place, way = found
            row, column = divmod(place, self.columns)
            packing.quarters[i], packing.corners[i] = way.quarters, (column + self.gap, row + self.gap)
            packing.rows = max(packing.rows, row + way.rows - self.gap)
            packing.columns = max(packing.columns, column + way.columns - self.gap)
            taken |= way.bits << place
        return packing

    def _lowest(self, ways: list[_Way], spans: _Spans, width: int) -> tuple[int, _Way] | None:
        """Return the cell and the way in which a chart ends in the lowest row."""
        found, known = None, spans.known
        for way in ways:
            blocked = 0
            for start, length in way.runs:
                blocked |= (known.get(length) or spans.of(length)) >> start
            free = _starts(self.columns, width - way.columns + 1, TALL * self.columns) & ~blocked
            if free:
                place = (free & -free).bit_length() - 1
                row, column = divmod(place, self.columns)
                if found is None or (row + way.rows, column) < found[0]:
                    found = (row + way.rows, column), place, way
        return found and found[1:]


class _Spans:
    """The cells of a strip from which on one of the next so many is taken, in bits."""

    def __init__(self, taken: int) -> None:
        self.powers, self.known = [taken], {1: taken}

    def of(self, length: int) -> int:
        """Return the cells of which one of the `length` cells from them on is taken."""
        if length not in self.known:
            power = length.bit_length() - 1
            while len(self.powers) <= power:
                self.powers.append(self.powers[-1] | self.powers[-1] >> (1 << len(self.powers) - 1))
            self.known[length] = self.powers[power] | self.powers[power] >> (length - (1 << power))
        return self.known[length]


@lru_cache(maxsize=4096)
def _starts(columns: int, width: int, rows: int) -> int:
    """Return the first `width` cells of each row of a strip, in bits."""
    row = np.arange(columns) < width
    return int.from_bytes(np.packbits(np.tile(row, rows), bitorder="little").tobytes(), "little")
