"""Files of splats that viewers read: the .ply of 3D Gaussian Splatting's published code, and .splat.

.ply    binary little-endian, one vertex per Gaussian, float32: x y z, nx ny nz (0), f_dc_0..2 (the colour's
        coefficients of spherical harmonics, band 0 alone), opacity (its logit), scale_0..2 (natural logarithms),
        rot_0..3 (w, x, y, z): Kerbl et al. 2023
.splat  32 bytes per Gaussian, largest first: position and scale float32 x 3 each, colour and opacity uint8 x 4,
        rotation uint8 x 4 (w, x, y, z; 128 + 128 q)
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from prd.errors import ConfigError
from prd.meshes.axes import turned
from prd.meshes.options import check_one_of
from prd.splats.splats import Splats, SplatUp, quaternion_product
from prd.utils.arguments import check_writable_file
from prd.utils.files import replace_file

SUFFIXES = (".ply", ".splat")
NOTES: dict[SplatUp, str] = {"-y": "prd: +Y down, front -Z", "y": "prd: +Y up, front +Z", "z": "prd: +Z up, front -Y"}
HALF = 0.5**0.5
TURNS: dict[SplatUp, tuple[float, float, float, float]] = {  # of the scene's axes to a file's, (w, x, y, z)
    "y": (0.5, -0.5, -0.5, -0.5),
    "-y": (0.5, 0.5, 0.5, -0.5),
    "z": (HALF, 0.0, 0.0, -HALF),
}
BAND_0 = 0.28209479177387814  # 1 / (2 sqrt(pi)): a colour is 0.5 + BAND_0 f_dc
OPACITIES = (1e-4, 1 - 1e-4)  # whose logits are finite
PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def write_splats(splats: Splats, path: str | os.PathLike[str], *, up: SplatUp = "-y") -> Path:
    """Write splats to a .ply or a .splat, whole or not at all; returns the path.

    up  "-y": +Y down, front -Z, as scenes of 3D Gaussian Splatting are (COLMAP's cameras) and as viewers expect them;
        "y": +Y up, front +Z, as this library's mesh files; "z": +Z up, front -Y

    Raises ConfigError for another suffix, an `up` that there is not and splats that are none or not finite.
    """
    path = check_splats_file("path", path, up)
    if not len(splats):
        raise ConfigError("splats: there are none, the surface was empty; there is nothing to write")
    own = splats.detach().to("cpu").to(torch.float64)
    for part in fields(own):
        if not bool(torch.isfinite(getattr(own, part.name)).all()):
            raise ConfigError(f"splats.{part.name}: holds NaN or infinity; check the field they were made from")
    turn = torch.tensor(TURNS[up], dtype=torch.float64, device="cpu")
    rotations = torch.nn.functional.normalize(quaternion_product(turn.expand(len(own), 4), own.rotations), dim=-1)
    own = replace(own, means=torch.from_numpy(turned_splats(own.means.numpy(), up)), rotations=rotations)
    data = ply(own, NOTES[up]) if path.suffix.lower() == ".ply" else splat(own)
    replace_file(path, lambda aside: aside.write_bytes(data))
    return path


def check_splats_file(name: str, path: str | os.PathLike[str], up: str) -> Path:
    """The path, if splats can be written there; `name` of its argument, for the ConfigError if not."""
    path = check_writable_file(name, path, SUFFIXES)
    check_one_of("up", up, tuple(NOTES))
    return path


def turned_splats(points: NDArray[np.float64], up: SplatUp) -> NDArray[np.float64]:
    """The scene's points [N, 3] in a file's axes."""
    if up == "-y":
        return turned(points, "y") * np.array([1.0, -1.0, -1.0])
    return turned(points, "z" if up == "z" else "y")


def ply(splats: Splats, note: str) -> bytes:
    """A .ply's bytes of splats in the file's axes, float64 on the CPU."""
    means, scales, rotations, opacities, colors = _arrays(splats)
    opacity = opacities.clip(*OPACITIES)[:, None]
    columns = [means, np.zeros_like(means), (colors - 0.5) / BAND_0, np.log(opacity / (1 - opacity))]
    rows = np.concatenate([*columns, np.log(scales), rotations], axis=1).astype("<f4")
    header = ["ply", "format binary_little_endian 1.0", f"comment {note}", f"element vertex {len(rows)}"]
    header += [*(f"property float {name}" for name in PROPERTIES), "end_header\n"]
    return "\n".join(header).encode() + rows.tobytes()


def splat(splats: Splats) -> bytes:
    """A .splat's bytes, as for `ply`; the Gaussians of the largest volume times opacity first."""
    means, scales, rotations, opacities, colors = _arrays(splats)
    rows = np.zeros(len(means), np.dtype([("reals", "<f4", 6), ("color", "u1", 4), ("rotation", "u1", 4)]))
    rows["reals"] = np.concatenate([means, scales], axis=1)
    rows["color"] = (np.concatenate([colors, opacities[:, None]], axis=1) * 255).round().clip(0, 255)
    rows["rotation"] = (rotations * 128 + 128).round().clip(0, 255)
    return rows[np.argsort(-scales.prod(axis=1) * opacities, kind="stable")].tobytes()


def _arrays(splats: Splats) -> tuple[NDArray[np.float64], ...]:
    """Means, scales, rotations, opacities and colours."""
    parts = splats.means, splats.scales, splats.rotations, splats.opacities, splats.colors
    return tuple(part.numpy() for part in parts)
