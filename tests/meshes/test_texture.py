"""Charts lie in the texture apart, none of them mirrored, and the texture is as large as its colours need."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import trimesh

from prd.meshes.charts import charts_of, flattened, join_small
from prd.meshes.packing import pack
from prd.meshes.texture import texture_size, unwrap, used_area


def shape(name: str) -> tuple[np.ndarray, np.ndarray]:
    made = {
        "box": trimesh.creation.box(extents=(1.0, 0.8, 0.6)).subdivide().subdivide().subdivide(),
        "ball": trimesh.creation.icosphere(4, 0.7),
        "torus": trimesh.creation.torus(0.6, 0.2, major_sections=48, minor_sections=24),
        "cylinder": trimesh.creation.cylinder(0.4, 1.2, sections=48),
    }[name]
    return np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64)


def signed_areas(uv: np.ndarray, faces: np.ndarray) -> np.ndarray:
    (a, b), (c, d) = ((uv[faces[:, k]] - uv[faces[:, 0]]).T.astype(float) for k in (1, 2))
    return (a * d - b * c) / 2


USED = {"box": 0.7, "ball": 0.6, "torus": 0.45, "cylinder": 0.65}  # of the texture, at least


@pytest.mark.parametrize("name", USED)
def test_charts_are_few_apart_and_not_mirrored(name: str) -> None:
    vertices, faces = shape(name)
    source, charted, uv = unwrap(vertices, faces, 256)
    np.testing.assert_array_equal(source[charted], faces)
    assert uv.min() >= 0 and uv.max() <= 1
    areas = signed_areas(uv, charted)
    assert areas.min() > -1e-7
    count, label = charts_of(charted, len(uv))
    assert count <= 12 and used_area(charted, uv) > USED[name]
    owner = np.full((256, 256), -1)  # of each texel: the chart that has its middle
    for chart in range(count):
        mine = charted[label[charted[:, 0]] == chart]
        inside = covered(uv, mine, 256)
        assert (owner[inside] == -1).all()
        owner[inside] = chart


def patch(bent: float, side: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """A sheet rolled up by so many turns."""
    across, along = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    radius, angle = 0.3, 2 * np.pi * bent * along
    points = np.stack([across, radius * np.sin(angle), radius * np.cos(angle)], axis=-1).reshape(-1, 3)
    cell = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1, 1)
    faces = np.concatenate([cell + [0, 1, side], cell + [1, side + 1, side]])
    return points, faces if bent > 0 else faces[:, ::-1]


def test_a_rolled_sheet_is_flattened_without_stretch() -> None:
    points, faces = patch(0.7)
    flat = flattened(points, faces)
    assert flat is not None
    areas = signed_areas(flat, faces)
    assert areas.min() > 0 and areas.max() / areas.min() < 1.01
    assert np.ptp(flat, axis=0).prod() > 0.99 * areas.sum()


def test_a_chart_that_overlaps_or_stretches_is_refused() -> None:
    ball = trimesh.creation.icosphere(3)
    most = ball.faces[ball.triangles_center[:, 2] < 0.9]  # closed but for a small hole
    used, faces = np.unique(most, return_inverse=True)
    assert flattened(np.asarray(ball.vertices)[used], faces.reshape(-1, 3)) is None


def test_crumbs_are_joined_to_the_chart_around_them() -> None:
    """A flat sheet, of which some triangles are charts of their own, far away in the texture."""
    side = 9
    across, along = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side))
    points = np.stack([across, along, 0 * across], axis=-1).reshape(-1, 3)
    cell = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1, 1)
    faces = np.concatenate([cell + [0, 1, side], cell + [1, side + 1, side]])
    source, uv, split = list(range(len(points))), list(points[:, :2]), faces.copy()
    for number, face in enumerate((5, 40, 41, 90)):
        split[face] = len(source) + np.arange(3)
        source += faces[face].tolist()
        uv += list(points[faces[face], :2] + 3 * (number + 1))
    of = np.array(source)
    joined, flat = join_small(points[of], of, split, np.array(uv))
    np.testing.assert_array_equal(of[joined], faces)
    used = np.unique(joined)
    assert charts_of(np.searchsorted(used, joined), len(used))[0] == 1
    assert signed_areas(flat, joined).min() > 0 and used_area(joined, flat) == pytest.approx(1, rel=1e-4)


def covered(uv: np.ndarray, faces: np.ndarray, size: int) -> np.ndarray:
    """Texels [size, size] whose middles lie in one of the triangles."""
    out = np.zeros((size, size), bool)
    for corners in uv[faces].astype(float) * size:
        low, high = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
        x, y = np.meshgrid(np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5)
        sides = []
        for k in range(3):
            (ax, ay), (bx, by) = corners[k], corners[(k + 1) % 3]
            sides.append((bx - ax) * (y - ay) - (by - ay) * (x - ax) > 1e-6)
        out[low[1] : high[1], low[0] : high[0]] |= np.logical_and.reduce(sides)
    return out


def test_all_charts_have_one_scale() -> None:
    """Squares of two sizes: their sides keep their ratio, however they are turned."""
    uv = np.array([[0, 0], [2, 0], [2, 2], [0, 2], [0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    packed = pack(uv, faces, 128, 1)
    areas = signed_areas(packed, faces)
    assert areas[:2].sum() == pytest.approx(4 * areas[2:].sum(), rel=1e-4) and areas.min() > 0


def test_too_many_charts_for_a_small_texture_are_named() -> None:
    count = 3000
    uv = np.tile(np.array([[0, 0], [1, 0], [0, 1]], np.float32), (count, 1))
    with pytest.raises(ValueError, match="texture_size=16: too small for 3000 charts of 3000 faces; take a larger one"):
        pack(uv, np.arange(3 * count).reshape(-1, 3), 16, 1)


def waves(frequency: float, points: np.ndarray) -> np.ndarray:
    return (np.sin(frequency * points) * 0.5 + 0.5).astype(np.float32)


def test_the_texture_is_as_large_as_its_detail() -> None:
    ball = shape("ball")
    assert texture_size(*ball, lambda points: points * 0.5 + 0.5) == 256
    assert texture_size(*ball, partial(waves, 150)) == 1024
    assert texture_size(*ball, partial(waves, 40)) in (512, 1024)
