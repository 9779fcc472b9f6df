"""A strip of cells in which the charts of an unwrapped surface are placed.

The cells of the strip are the bits of one long integer, so that all places where a chart would overlap others are found
by a few shifts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from prd.meshes.charts import upright
from prd.meshes.edges import border_of

SLANTS = 4  # parts of a quarter turn, by which charts are turned from where their smallest box stands upright
SIDES = ((0, 1, 2, 3), (0, 2), (1, 3))  # quarter turns beside it, from which a chart's is chosen
NARROW = 0.55  # between the sides of what is in use, at least: the texture is not stretched more than that
STEP = 0.25  # cells between the points of a chart's border whose cells count as touched
TALL = 4  # times the columns of a strip: its rows
ROUNDS = 4  # of moving charts down and left, at most
NEIGHBOURS = np.ones((3, 3), bool)


class Chart:
    """One chart: its vertices, their points [V, 2] in lengths of the surface, and the edges [E, 2] around it."""

    def __init__(self, uv: NDArray[np.float64], faces: NDArray[np.int64]) -> None:
        self.vertices, local = np.unique(faces, return_inverse=True)
        self.border = border_of(local.reshape(-1, 3))
        self.upright = upright(uv[self.vertices])
        (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T for k in (1, 2))
        self.area = float(np.abs(a * d - b * c).sum() / 2)
        self.extent = float(np.ptp(self.upright, axis=0).max())
        self.outline = float(np.linalg.norm(np.subtract(*self.upright[self.border.T]), axis=1).sum())

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
class Way:
    """A chart's cells at a turn, the gap around them added to the rows and columns that they take.

    runs   begin and length of the runs of cells that others' cells may not take: the chart's own and the gap around
    bits   the chart's own cells
    reach  those and the gap around
    """

    quarters: int
    rows: int
    columns: int
    runs: list[tuple[int, int]]
    bits: int
    reach: int


def ways_of(chart: Chart, slant: int, scale: float, columns: int, gap: int) -> list[Way]:
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
            reach, bits = (int.from_bytes(np.packbits(cells, bitorder="little").tobytes(), "little") for cells in wide)
            runs = [(begin, end - begin) for begin, end in ends.tolist()]
            ways.append(Way(quarters, mask.shape[0], mask.shape[1], runs, bits, reach))
    return ways


def _turns(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
    """Return a mask as `Chart.turned` turns it by 0 to 3 quarters."""
    return mask, mask.T[:, ::-1], mask[::-1, ::-1], mask.T[::-1]


@dataclass(frozen=True)
class Placed:
    """Charts in their places in a strip.

    slants, quarters  [N]  turns of each chart
    corners           [N]  lowest column and row of each
    scale                  cells per length of the surface
    area                   of the charts, square cells
    columns, rows          in use, the gap on one side of them included
    """

    slants: tuple[int, ...]
    quarters: tuple[int, ...]
    corners: tuple[tuple[int, int], ...]
    scale: float
    area: float
    columns: int
    rows: int

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


class Strip:
    """A strip of so many columns of cells in which charts are placed at one scale, so many cells apart."""

    def __init__(self, charts: list[Chart], scale: float, columns: int, gap: int) -> None:
        self.scale, self.columns, self.gap = scale, columns, gap
        self.area = sum(chart.area for chart in charts) * scale**2
        self.charts = charts
        self.ways: dict[tuple[int, int], list[Way]] = {}  # by chart and slant

    def ways_of(self, chart: int, slant: int) -> list[Way]:
        """Return the ways in which a chart, by its number, lies in the strip at a slant."""
        if (chart, slant) not in self.ways:
            self.ways[chart, slant] = ways_of(self.charts[chart], slant, self.scale, self.columns, self.gap)
        return self.ways[chart, slant]

    def place(self, order: tuple[int, ...], sides: tuple[int, ...], width: int, least: float = 0.0) -> Placed | None:
        """Return charts placed in an order in the first columns, each where it ends in the lowest row.

        sides  of each chart: the number of `SIDES` + their number * slant
        least  part of the texture that charts must cover

        None where a chart finds no room, or the charts cover less.
        """
        found: dict[int, tuple[int, Way]] = {}
        taken = columns = rows = 0
        for i in order:
            slant, side = divmod(sides[i], len(SIDES))
            ways = [way for way in self.ways_of(i, slant) if way.columns <= width]
            lowest = self._lowest([way for way in ways if way.quarters in SIDES[side]] or ways, _Spans(taken), width)
            if lowest is None:
                return None
            found[i], (row, column) = lowest, divmod(lowest[0], self.columns)
            rows, columns = max(rows, row + lowest[1].rows), max(columns, column + lowest[1].columns)
            if least * (rows - self.gap) * (columns - self.gap) > self.area:
                return None
            taken |= lowest[1].bits << lowest[0]
        return self._placed([side // len(SIDES) for side in sides], [found[i] for i in range(len(found))])

    def settled(self, placed: Placed, growth: float) -> Placed | None:
        """Return charts moved down and left from their places at another scale, as far as they go.

        growth  of their distances from the corner; None where charts overlap there
        """
        found: list[tuple[int, Way]] = []
        taken = 0
        for i, (slant, quarters, corner) in enumerate(zip(placed.slants, placed.quarters, placed.corners, strict=True)):
            column, row = (round(growth * at) for at in corner)
            way = next((way for way in self.ways_of(i, slant) if way.quarters == quarters), None)
            if way is None or column + way.columns > self.columns:
                return None
            found.append((row * self.columns + column, way))
            if taken & way.reach << found[-1][0]:
                return None
            taken |= way.bits << found[-1][0]
        for _ in range(ROUNDS):
            before = [place for place, _ in found]
            taken = self._slid(found, self._slid(found, taken, self.columns), 1)
            if before == [place for place, _ in found]:
                break
        return self._placed(placed.slants, found)

    def _slid(self, found: list[tuple[int, Way]], taken: int, step: int) -> int:
        """Move charts down (step: columns) or left (step: 1), in place, until they touch others.

        Returns the cells then taken.
        """
        for i in sorted(range(len(found)), key=lambda i: found[i][0] if step > 1 else found[i][0] % self.columns):
            place, way = found[i]
            others = taken ^ way.bits << place
            room = place // step if step > 1 else place % self.columns
            while room and not others & way.reach << place - step:
                place, room = place - step, room - 1
            found[i] = place, way
            taken = others | way.bits << place
        return taken

    def _placed(self, slants: Sequence[int], found: list[tuple[int, Way]]) -> Placed:
        """Return charts by their slants, and the cell and the way of each."""
        corners, gap = [divmod(place, self.columns)[::-1] for place, _ in found], self.gap
        return Placed(
            slants=tuple(slants),
            quarters=tuple(way.quarters for _, way in found),
            corners=tuple((column + gap, row + gap) for column, row in corners),
            scale=self.scale,
            area=self.area,
            columns=max(column + way.columns - gap for (column, _), (_, way) in zip(corners, found, strict=True)),
            rows=max(row + way.rows - gap for (_, row), (_, way) in zip(corners, found, strict=True)),
        )

    def _lowest(self, ways: list[Way], spans: _Spans, width: int) -> tuple[int, Way] | None:
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
