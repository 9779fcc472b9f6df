"""Ways up of mesh files, and the words in a file that say which it has.

The scene is +Z up, front +X. Each way is a rotation: an order of the scene's axes, and their signs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Up = Literal["y", "z"]

Y_UP = [1, 2, 0]  # scene X -> Z, Y -> X, Z -> Y: +Y up, front +Z (glTF 2.0, section 3.4)
NOTES: dict[Up, str] = {"y": "prd: +Y up, front +Z", "z": "prd: +Z up, front -Y"}
HEAD = 1024  # bytes of a file among which its note stands


def turned(points: NDArray[Any], up: Up) -> NDArray[Any]:
    """Return the scene's points or directions [N, 3] in a file's axes.

    up  "y": +Y up, front +Z. "z": +Z up, front -Y, as slicers and Blender see a file of the former
    """
    if up == "y":
        return points[:, Y_UP]
    return np.stack([points[:, 1], -points[:, 0], points[:, 2]], axis=1)


def turned_back(points: NDArray[Any], up: Up) -> NDArray[Any]:
    """Return a file's points or directions [N, 3] in the scene's axes: the inverse of `turned`."""
    if up == "y":
        return points[:, [2, 0, 1]]
    return np.stack([-points[:, 1], points[:, 0], points[:, 2]], axis=1)


def noted_up(path: Path) -> Up | None:
    """Return which way up a file says that it is; None without a note of this library's."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return next((up for up, note in NOTES.items() if note.encode() in head), None)
