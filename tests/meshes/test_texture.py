"""Charts lie in the texture apart, none of them mirrored, and the texture is as large as its colours need."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import trimesh
from scipy.ndimage import maximum_filter

from prd.meshes import packing
from prd.meshes.charts import charts_of, cut_into_charts, flattened
from prd.meshes.edges import edges_between
from prd.meshes.packing import pack
from prd.meshes.segments import segmented, smoothed
from prd.meshes.strips import Chart, Placed, Strip
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


USED = {"box": 0.8, "ball": 0.65, "torus": 0.55, "cylinder": 0.65}  # of the texture, at least


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
        near = np.pad(inside, 1, mode="wrap")  # a texture may repeat itself
        near = maximum_filter(near, 3)[1:-1, 1:-1]
        assert (owner[near] == -1).all()  # a texel between charts, at least
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


@pytest.mark.parametrize("name", USED)
def test_charts_stretch_little_and_keep_their_area(name: str) -> None:
    vertices, faces = shape(name)
    source, charted, uv = cut_into_charts(vertices, faces)
    corners = vertices[faces].astype(float)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    ratio = signed_areas(uv, charted) / area
    assert signed_areas(uv, charted).sum() == pytest.approx(area.sum(), rel=1e-4)
    assert np.quantile(ratio, 0.99) < 2.6 * np.quantile(ratio, 0.01)


def test_a_box_is_cut_along_its_edges() -> None:
    vertices, faces = shape("box")
    _, charted, uv = cut_into_charts(vertices, faces)
    count, label = charts_of(charted, len(uv))
    normal = np.round(trimesh.Trimesh(vertices, faces, process=False).face_normals).astype(int)
    assert count == 6 and len(np.unique(np.column_stack([label[charted[:, 0]], normal]), axis=0)) == 6


def test_borders_lose_their_teeth() -> None:
    """A flat sheet in two halves, some triangles along whose border belong to the other one."""
    points, faces = patch(0, 33)
    points[:, 1:] = np.meshgrid(np.linspace(0, 1, 33), np.linspace(0, 1, 33))[1].reshape(-1, 1) * [1, 0]
    middle = points[faces].mean(axis=1)[:, 1]
    label = (middle > 0.5).astype(np.int64)
    near = np.abs(middle - 0.5) < 1 / 32
    label[near] = np.random.default_rng(0).integers(2, size=int(near.sum()))

    def length(label: np.ndarray) -> float:
        pairs, edges = edges_between(faces)
        cut = edges[label[pairs[:, 0]] != label[pairs[:, 1]]]
        return float(np.linalg.norm(points[cut[:, 0]] - points[cut[:, 1]], axis=1).sum())

    assert length(smoothed(points, faces, label)) < min(1.3, 0.6 * length(label))


def test_pieces_that_are_tiny_or_open_are_unwrapped() -> None:
    tube = trimesh.creation.cylinder(0.2, 2)
    tube = trimesh.Trimesh(tube.vertices, tube.faces[np.abs(tube.face_normals[:, 2]) < 0.5])
    parts = [trimesh.creation.icosphere(3), trimesh.creation.icosahedron(), tube]
    for k, part in enumerate(parts):
        part.apply_translation((3 * k, 0, 0))
    vertices = np.concatenate([part.vertices for part in parts]).astype(np.float32)
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)]).astype(np.int64)
    source, charted, uv = unwrap(vertices, faces, 256)
    np.testing.assert_array_equal(source[charted], faces)
    assert signed_areas(uv, charted).min() > -1e-7 and used_area(charted, uv) > 0.5


def test_each_piece_is_segmented_as_if_alone() -> None:
    """So that a thousand pieces take no more memory than the largest of them."""
    ball, box = trimesh.creation.icosphere(3), trimesh.creation.box().subdivide()
    box.apply_translation((3, 0, 0))
    faces = np.concatenate([ball.faces, box.faces + len(ball.vertices)]).astype(np.int64)
    label = segmented(np.concatenate([ball.vertices, box.vertices]), faces)
    alone = [segmented(np.array(part.vertices), np.array(part.faces, np.int64)) for part in (ball, box)]
    np.testing.assert_array_equal(label, np.concatenate([alone[0], alone[1] + alone[0].max() + 1]))


def test_needles_without_area_are_unwrapped() -> None:
    """Alone, and among others."""
    ball = trimesh.creation.icosphere(2)
    vertices = np.concatenate([ball.vertices, [[2, 0, 0], [3, 0, 0], [4, 0, 0]]]).astype(np.float32)
    faces = np.concatenate([ball.faces, [[162, 163, 164]], [[0, 162, 164]]]).astype(np.int64)
    source, charted, uv = unwrap(vertices, faces, 64)
    np.testing.assert_array_equal(source[charted], faces)
    assert np.isfinite(uv).all() and signed_areas(uv, charted).min() > -1e-7


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


def squares(count: int, side: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Charts, each a square of two triangles."""
    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return np.tile(corners, (count, 1)), (4 * np.arange(count)[:, None, None] + faces).reshape(-1, 3)


def test_charts_are_drawn_together_without_touching() -> None:
    uv, faces = squares(2)
    charts = [Chart(uv.astype(float), faces[2 * k : 2 * k + 2]) for k in range(2)]
    strip = Strip(charts, 10.0, 64, gap=1)
    apart = Placed((0, 0), (0, 0), ((20, 30), (40, 5)), 10.0, 200.0, columns=60, rows=45)
    together = strip.settled(apart, 1.0)
    assert together is not None
    (a, b), (c, d) = together.corners
    assert max(abs(a - c), abs(b - d)) == 12 and min(a, c) == min(b, d) == 1  # eleven cells, and one between
    assert together.filled > 2 * apart.filled
    assert strip.settled(replace(apart, corners=((20, 30), (25, 30))), 1.0) is None  # there they overlap
    assert strip.settled(apart, 5.0) is None  # there the strip ends


def test_many_charts_end_with_the_first_scale_at_which_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def place(strip: Strip, *args: Any) -> Placed | None:
        tried.append(strip.scale)
        return place_(strip, *args)

    place_ = Strip.place
    monkeypatch.setattr(Strip, "place", place)
    monkeypatch.setattr(packing, "TRIALS", 0)  # no packing of the coarse grid
    uv, faces = squares(200)
    packed = pack(uv, faces, 128, 1)
    assert 0 < len(tried) < 20 and used_area(faces, packed) > 0.5


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


@pytest.mark.parametrize(
    ("points", "faces", "said"),
    [
        ([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], "no area"),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2], [0, 0, 1]], "three different"),
        ([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], "finite"),
        ([[0, 0, 0]], np.zeros((0, 3)), "cannot be unwrapped"),
    ],
    ids=["in a line", "repeated", "nan", "none"],
)
def test_what_has_no_surface_is_refused(points: list, faces: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unwrap(np.asarray(points, np.float32), np.asarray(faces, np.int64), 64)


def test_a_piece_without_area_beside_a_triangle_ends() -> None:
    vertices = np.asarray([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [6, 0, 0], [7, 0, 0]], np.float32)
    uv = unwrap(vertices, np.asarray([[0, 1, 2], [3, 4, 5]]), 64)[2]
    assert np.isfinite(uv).all() and uv.min() >= 0 and uv.max() <= 1
