"""Previews of meshes: a turntable as .gif, .webp or .mp4, or a sheet of views as .png, drawn unlit on white."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prd.errors import ConfigError
from prd.evaluation.drawing import draw
from prd.evaluation.pictures import sheet_of
from prd.evaluation.protocols import Pictures
from prd.meshes.files import FileMesh
from prd.meshes.mesh import Mesh
from prd.utils.arguments import check_writable_file, has_suffix
from prd.utils.files import replace_file

SUFFIXES = (".gif", ".webp", ".png", ".mp4")
FRAMES, MILLISECONDS = 36, 60  # of a turn, and of a frame
SHEET_VIEWS = 4
SIDE = 256  # pixels of a mesh's picture
COLUMNS = 4  # meshes beside each other in a turntable
SAMPLES = 2  # per pixel and axis
CAMERA = Pictures(elevation=20.0, fovy=40.0, extent=0.58, size=SIDE * SAMPLES)
FRONT = 30.0  # degrees: azimuth of the first view


def check_preview(name: str, place: str | os.PathLike[str]) -> Path:
    """Return the path of a preview to be written; ConfigError where it cannot be, as for `check_preview_format`."""
    check_preview_format(name, place)
    return check_writable_file(name, place, SUFFIXES)


def check_preview_format(name: str, place: str | os.PathLike[str]) -> None:
    """Raise ConfigError for the name of a preview with another suffix, or with .mp4 without its package."""
    if not has_suffix(place, SUFFIXES):
        raise ConfigError(f"{name}={os.fspath(place)!r}: must end in {', '.join(SUFFIXES)}")
    if has_suffix(place, ".mp4") and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ConfigError(
            f"{name}={os.fspath(place)!r}: .mp4 needs imageio-ffmpeg, which is not installed; pip install "
            "'prd-3d[video]', or write a .gif or .webp"
        )


def save_preview(meshes: Sequence[Mesh], path: Path, labels: Sequence[str] | None = None) -> None:
    """Write the preview of one or several meshes, whole or not at all: the suffix says which.

    labels  one for each mesh: over its row of the sheet, or over the row of turntables that it is in

    Raises ValueError without meshes and for one without extent.
    """
    if not meshes:
        raise ValueError("meshes=[]: give at least one mesh to draw")
    suffix = path.suffix.lower()
    if suffix == ".png":
        columns = SHEET_VIEWS
        views = [view for mesh in meshes for view in views_of(mesh, SHEET_VIEWS)]
        sheet = sheet_of(views, columns=columns, labels=labels)
        replace_file(path, lambda aside: sheet.save(aside, format="PNG"))
        return
    frames = _turn(meshes, labels)
    if suffix == ".mp4":
        replace_file(path, lambda aside: _write_video(frames, aside))
        return
    options: dict[str, Any] = {"loop": 0, "duration": MILLISECONDS, "save_all": True}
    options |= {"format": suffix[1:].upper()} | ({"quality": 85} if suffix == ".webp" else {})
    first = next(frames)
    replace_file(path, lambda aside: first.save(aside, append_images=frames, **options))


def to_file_mesh(mesh: Mesh) -> FileMesh:
    """Return a mesh as `prd.evaluation.drawing` draws it: of its texture's colours, or of its vertices'."""
    vertices, faces = mesh.vertices.astype(np.float64), mesh.faces
    if mesh.uv is None or mesh.texture is None:
        uv, none = np.full((len(vertices), 2), np.nan, np.float32), np.full(len(faces), -1, np.int64)
        return FileMesh(vertices, faces, mesh.vertex_colors, uv, none, ())
    white = np.ones_like(mesh.vertex_colors)
    return FileMesh(vertices, faces, white, mesh.uv, np.zeros(len(faces), np.int64), (mesh.texture,))


def views_of(mesh: Mesh, count: int) -> Iterator[Image.Image]:
    """Yield pictures of a mesh from `count` sides around it."""
    azimuths = tuple(FRONT + 360 * k / count for k in range(count))
    for picture in draw(to_file_mesh(mesh), replace(CAMERA, azimuths=azimuths)):
        yield Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)


def _turn(meshes: Sequence[Mesh], labels: Sequence[str] | None) -> Iterator[Image.Image]:
    """The frames of a turn, the meshes side by side in rows of COLUMNS."""
    columns = min(COLUMNS, len(meshes))
    rows = None
    if labels is not None:
        rows = [", ".join(labels[k : k + columns]) for k in range(0, len(labels), columns)]
    for pictures in zip(*(views_of(mesh, FRAMES) for mesh in meshes), strict=True):
        yield sheet_of(pictures, columns=columns, gap=0, labels=rows)


def _write_video(frames: Iterator[Image.Image], path: Path) -> None:
    from imageio_ffmpeg import write_frames

    writer = None
    for frame in frames:
        pixels = _even(np.asarray(frame))
        if writer is None:
            size, params = (pixels.shape[1], pixels.shape[0]), ["-f", "mp4"]
            writer = write_frames(
                str(path), size, fps=1000 / MILLISECONDS, macro_block_size=2, quality=8, output_params=params
            )
            writer.send(None)
        writer.send(pixels)
    assert writer is not None  # a turn has frames
    writer.close()


def _even(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels whose sides are even, as video needs them."""
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255))
