"""Pack the charts of an unwrapped surface into a square: turned, never mirrored, at one scale.

Many plans (an order, turns, a width) are tried on a coarse grid, where one chart after the other is placed as low as it
goes. The charts of the best ones are moved closer together on a finer grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prd.meshes.charts import charts_of
from prd.meshes.strips import SIDES, SLANTS, Chart, Placed, Strip

WIDTHS = (0.74, 1.35)  # of strips that are tried
WIDER = 0.05  # of a strip's width, in a change of it
FILLED = 0.75  # of the texture, that charts are taken to cover at first
SHUFFLE = 0.25  # of the logarithm of a chart's extent, in orders other than the largest first
COARSE = 3  # cells of the finer grid to one of the coarse one, which needs no gap: a touched cell is one
PLACED = 2400  # charts, at most, in all trials on the coarse grid together
TRIALS = 240  # there, at most
BEST = 3  # packings that are changed further: on the coarse grid, and those on the finer one
FINALISTS = 10  # of the coarse grid, that are tried on the finer one
WIDEST = 1.35  # of the cells of the finer grid: the columns in which charts find their places
SPREADS = (1.0, 1.01, 1.02, 1.035, 1.05, 1.07, 1.1, 1.15, 1.25)  # of places, until charts lie apart on the finer grid
FITS = 5  # of the scale to the grid
MOST_FITS = 150  # of it, where no packing of the coarse grid fits
SHRINK = 0.97  # of the scale, from one of these to the next


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
    charts = [Chart(exact, faces[order[bounds[i] : bounds[i + 1]]]) for i in range(count)]
    if not sum(chart.area for chart in charts) > 0:
        raise ValueError(f"faces={faces.shape}: the surface has no area; drop degenerate faces")
    found = _packed(charts, cells, gap)
    if found is None:
        raise ValueError(f"texture_size={cells}: too small for {count} charts of {len(faces)} faces; take a larger one")
    out = np.zeros((len(uv), 2))
    for chart, slant, quarters, corner in zip(charts, found.slants, found.quarters, found.corners, strict=True):
        out[chart.vertices] = (chart.turned(slant, quarters, found.scale) + corner) / found.size
    return out.clip(0, 1).astype(np.float32)


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


def _packed(charts: list[Chart], cells: int, gap: int) -> Placed | None:
    """Return the fullest packing found: by many plans on a coarse grid, the best drawn together on the finer one."""
    drawn = [placed for coarse in _tried(charts, cells // COARSE) if (placed := _drawn(charts, coarse, cells, gap))]
    fullest = sorted(drawn, key=lambda placed: -placed.filled)[:BEST]
    found = [placed for start in fullest if (placed := _fitted(charts, start, cells, gap))]
    if not found:  # the first scale at which there is room
        scale, plan = _roomiest(charts, cells, gap), _plans(charts, 1)[0]
        sizes = (scale * SHRINK**k for k in range(MOST_FITS))
        tried = (Strip(charts, size, cells + gap, gap).place(plan.order, plan.sides, cells + gap) for size in sizes)
        return next((placed for placed in tried if placed and placed.longest <= cells), None)
    return max(found, key=lambda placed: placed.filled)


def _roomiest(charts: list[Chart], cells: int, gap: int) -> float:
    """Return a scale at which charts with half a gap, and half a touched cell, around them have the grid's area."""
    area, around = sum(chart.area for chart in charts), (gap + 1) / 2 * sum(chart.outline for chart in charts)
    return (math.sqrt(around**2 + 4 * area * cells**2) - around) / (2 * area)


def _drawn(charts: list[Chart], start: Placed, cells: int, gap: int) -> Placed | None:
    """Return the charts of a packing drawn together at the scale at which its longer side has so many cells."""
    scale = start.scale * cells / start.longest
    strip = Strip(charts, scale, math.ceil(WIDEST * cells), gap)
    tried = (strip.settled(start, scale / start.scale * spread) for spread in SPREADS)
    return next((placed for placed in tried if placed), None)


def _fitted(charts: list[Chart], start: Placed, cells: int, gap: int) -> Placed | None:
    """Return the charts of a packing as large as they fit into so many cells; None where they never did."""
    best, placed = None, start
    for _ in range(FITS):
        if placed.longest <= cells and placed.filled > (best.filled if best else 0):
            best = placed
        if placed.longest == cells or (next_one := _drawn(charts, placed, cells, gap)) is None:
            break
        placed = next_one
    return best


def _tried(charts: list[Chart], cells: int) -> list[Placed]:
    """Return the fullest packings on a coarse grid: by plans drawn at random, and by changes of the best of these."""
    scale = math.sqrt(FILLED / sum(chart.area for chart in charts)) * cells
    trials = min(TRIALS, PLACED // len(charts))
    plans, draw = _plans(charts, -(-trials // 3)), np.random.default_rng(0)
    best: list[tuple[_Plan, Placed]] = []
    strip = Strip(charts, scale, int(WIDTHS[1] * cells) + 1, 0)
    for k in range(trials if cells > 1 else 0):
        plan = plans[k] if k < len(plans) or not best else best[k % min(len(best), BEST)][0].changed(draw)
        least = best[-1][1].filled if len(best) == FINALISTS else 0.0
        placed = strip.place(plan.order, plan.sides, round(plan.width * cells), least)
        if placed and all(placed.size != other.size for _, other in best):
            best = sorted([*best, (plan, placed)], key=lambda pair: -pair[1].filled)[:FINALISTS]
    return [placed for _, placed in best]


def _plans(charts: list[Chart], count: int) -> list[_Plan]:
    """Return plans, the same for the same charts: the first places the largest first, the others about so."""
    extents, draw = np.array([chart.extent for chart in charts]), np.random.default_rng(0)
    plans = []
    for k in range(count):
        noise, sides = draw.normal(0, SHUFFLE, len(charts)), draw.integers(len(SIDES), size=len(charts))
        order = np.argsort(-extents * np.exp(noise if k else 0), kind="stable")
        plans.append(_Plan(tuple(order.tolist()), tuple((sides if k else 0 * sides).tolist()), draw.uniform(*WIDTHS)))
    return plans
