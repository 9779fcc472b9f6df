"""Previews show the mesh: its colours, every side, one mesh beside the other; whole files in each format."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trimesh import creation

from prd.errors import ConfigError
from prd.evaluation.preview import FRAMES, SIDE, SUFFIXES, check_preview, save_preview
from prd.meshes.mesh import Mesh

HAS_FFMPEG = importlib.util.find_spec("imageio_ffmpeg") is not None
needs_ffmpeg = pytest.mark.skipif(not HAS_FFMPEG, reason="imageio-ffmpeg is not installed")
FORMATS = [pytest.param(suffix, marks=[needs_ffmpeg] if suffix == ".mp4" else []) for suffix in SUFFIXES]
RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def box(front: tuple[float, float, float], back: tuple[float, float, float], textured: bool = False) -> Mesh:
    """A cube, at any place and of any size, whose front half (+X) has another colour than its back."""
    shape = creation.box(extents=(0.3, 0.3, 0.3)).subdivide().subdivide()
    vertices = np.asarray(shape.vertices, np.float32)
    is_front = vertices[:, :1] > 0
    colors = np.where(is_front, front, back).astype(np.float32)
    uv = texture = None
    if textured:
        halves = np.array([[back, front]], np.float32).repeat(16, axis=0).repeat(8, axis=1)
        texture = (halves * 255).astype(np.uint8)
        uv = np.where(is_front, (0.75, 0.5), (0.25, 0.5)).astype(np.float32)
    faces, normals = np.asarray(shape.faces, np.int64), vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    return Mesh(vertices + np.float32(0.4), faces, normals, colors, uv, texture)


def share(picture: Image.Image, color: tuple[float, float, float]) -> float:
    pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    return float((np.abs(pixels - np.array(color)).max(axis=-1) < 0.25).mean())


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_turntable_shows_every_side(suffix: str, textured: bool, tmp_path: Path) -> None:
    path = tmp_path / f"turn{suffix}"
    save_preview([box(RED, BLUE, textured)], path)
    red = []
    with Image.open(path) as film:
        assert film.size == (SIDE, SIDE) and getattr(film, "n_frames", 1) == FRAMES
        for k in range(FRAMES):
            film.seek(k)
            red.append(share(film, RED) - share(film, BLUE))
            assert 0.4 < share(film, (1.0, 1.0, 1.0)) < 0.9
            assert np.asarray(film.convert("RGB"))[[0, -1]].min() > 240  # nothing is cut off
    turn = np.array([math.cos(math.radians(30 + 360 * k / FRAMES)) for k in range(FRAMES)])
    assert np.corrcoef(red, turn)[0, 1] > 0.9


def test_a_sheet_has_a_row_per_mesh_and_its_label(tmp_path: Path) -> None:
    save_preview([box(RED, RED), box(BLUE, BLUE)], tmp_path / "a.png", ["seed 1", "seed 2"])
    with Image.open(tmp_path / "a.png") as opened:
        sheet = opened.convert("RGB")
    half = sheet.height // 2
    upper, lower = sheet.crop((0, 0, sheet.width, half)), sheet.crop((0, half, sheet.width, sheet.height))
    assert share(upper, RED) > 0.1 and share(upper, BLUE) == 0
    assert share(lower, BLUE) > 0.1 and share(lower, RED) == 0
    assert share(sheet.crop((0, 0, 60, 13)), (0.0, 0.0, 0.0)) > 0.02
    with pytest.raises(ValueError, match="labels: 1 given for 2 rows"):
        save_preview([box(RED, RED), box(BLUE, BLUE)], tmp_path / "a.png", ["seed 1"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_preview_is_whole_or_not_there(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    path.write_bytes(b"before")
    flat = np.zeros((3, 3), np.float32)
    nothing = Mesh(flat, np.array([[0, 1, 2]]), flat + np.float32(1), flat)
    with pytest.raises(ValueError, match="no extent"):
        save_preview([box(RED, BLUE), nothing], path)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == [path.name]
    save_preview([box(RED, BLUE), box(BLUE, RED), box(RED, RED)], path)
    assert path.stat().st_size > 3000 and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="at least one"):
        save_preview([], path)


def test_the_format_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="preview='a.avi': must end in .gif, .webp, .png, .mp4"):
        check_preview("preview", "a.avi")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs imageio-ffmpeg.*prd-3d\[video\]"):
        check_preview("preview", tmp_path / "a.mp4")
    assert check_preview("preview", tmp_path / "a.GIF") == tmp_path / "a.GIF"
