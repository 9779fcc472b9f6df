"""Files of splats, read back by their bytes as viewers read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prd.errors import ConfigError
from prd.meshes.axes import turned, turned_back
from prd.splats.files import PROPERTIES, TURNS, turned_splats
from prd.splats.project import rotation_matrices
from prd.splats.splats import Splats, SplatUp
from tests.splats.made import random_splats

UPS: tuple[SplatUp, ...] = ("-y", "y", "z")


def covariances(scales: Any, rotations: Any) -> torch.Tensor:
    axes = rotation_matrices(torch.as_tensor(np.asarray(rotations, np.float64)))
    axes = axes * torch.as_tensor(np.asarray(scales, np.float64))[:, None]
    return axes @ axes.transpose(-1, -2)


def in_file(splats: Splats, up: SplatUp) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Means and covariances in a file's axes, by the rotation alone that turns points."""
    basis = torch.as_tensor(turned_splats(np.eye(3), up)).T
    whole = covariances(splats.scales, splats.rotations)
    return turned_splats(splats.means.numpy(), up), basis @ whole @ basis.T


def read_ply(path: Path) -> tuple[str, dict[str, NDArray[np.float64]]]:
    head, _, body = path.read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(body, "<f4").reshape(-1, len(PROPERTIES)).astype(np.float64)
    return head.decode(), dict(zip(PROPERTIES, rows.T, strict=True))


@pytest.mark.parametrize("up", UPS)
def test_a_ply_holds_what_the_published_code_reads(tmp_path: Path, up: SplatUp) -> None:
    splats = random_splats(9)
    head, found = read_ply(splats.export(tmp_path / "a.ply", up=up))
    lines = head.splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"] and "element vertex 9" in lines
    assert [line.split()[-1] for line in lines if line.startswith("property float")] == list(PROPERTIES)
    means, whole = in_file(splats, up)
    columns = {name: np.stack([found[f"{name}_{i}"] for i in range(n)], 1) for name, n in
               (("f_dc", 3), ("scale", 3), ("rot", 4))}  # fmt: skip
    np.testing.assert_allclose(np.stack([found["x"], found["y"], found["z"]], 1), means, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["opacity"])), splats.opacities.numpy(), atol=1e-5)
    np.testing.assert_allclose(0.5 + 0.28209479 * columns["f_dc"], splats.colors.numpy(), atol=1e-5)
    torch.testing.assert_close(covariances(np.exp(columns["scale"]), columns["rot"]), whole, rtol=1e-4, atol=1e-6)
    assert not any(found[name].any() for name in ("nx", "ny", "nz"))


@pytest.mark.parametrize("up", UPS)
def test_a_splat_has_32_bytes_per_gaussian(tmp_path: Path, up: SplatUp) -> None:
    splats = random_splats(9)
    path = splats.export(tmp_path / "a.splat", up=up)
    assert path.stat().st_size == 9 * 32
    rows = np.frombuffer(path.read_bytes(), [("reals", "<f4", 6), ("color", "u1", 4), ("rotation", "u1", 4)])
    size = (splats.scales.prod(-1) * splats.opacities).numpy()
    order = np.argsort(-size)  # the largest first
    means, whole = in_file(splats, up)
    np.testing.assert_allclose(rows["reals"][:, :3], means[order], atol=1e-6)
    np.testing.assert_allclose(rows["color"][:, :3] / 255, splats.colors.numpy()[order], atol=0.51 / 255)
    np.testing.assert_allclose(rows["color"][:, 3] / 255, splats.opacities.numpy()[order], atol=0.51 / 255)
    rotations = (rows["rotation"].astype(np.float64) - 128) / 128
    np.testing.assert_allclose(covariances(rows["reals"][:, 3:], rotations), whole[order], atol=2e-3)


def test_ways_up_are_rotations_and_those_of_meshes() -> None:
    points = np.eye(3)
    for up in UPS:
        quaternion = torch.tensor(TURNS[up], dtype=torch.float64)
        np.testing.assert_allclose(turned_splats(points, up), rotation_matrices(quaternion).numpy().T, atol=1e-15)
    assert np.array_equal(turned_splats(points, "y"), turned(points, "y"))
    assert np.array_equal(turned_splats(points, "z"), turned(points, "z"))
    up_of_scene, front = turned_splats(np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), "-y")
    assert up_of_scene.tolist() == [0, -1, 0] and front.tolist() == [0, 0, -1]
    assert turned_back(turned_splats(points, "y"), "y").tolist() == points.tolist()


def test_an_opaque_gaussian_has_a_finite_logit(tmp_path: Path) -> None:
    splats = random_splats(2)
    splats.opacities[:] = torch.tensor([0.0, 1.0])
    _, found = read_ply(splats.export(tmp_path / "a.ply"))
    assert np.isfinite(found["opacity"]).all() and found["opacity"][1] > 9


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [("a.glb", {}, r"\.ply, \.splat"), ("a.splat", {"up": "x"}, "up='x': must be one of '-y', 'y', 'z'")],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        random_splats(2).export(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_no_gaussians_and_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    splats = random_splats(3)
    with pytest.raises(ConfigError, match="there are none"):
        Splats(*(part[:0] for part in (splats.means, splats.scales, splats.rotations, splats.opacities,
                                       splats.colors))).export(tmp_path / "a.ply")  # fmt: skip
    splats.scales[1, 2] = torch.nan
    with pytest.raises(ConfigError, match="splats.scales: holds NaN"):
        splats.export(tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())
