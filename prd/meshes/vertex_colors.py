"""Colours per vertex: those that, interpolated over the triangles, are nearest to the surface's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, eye_array
from scipy.sparse.linalg import cg

SAMPLES = 6  # per triangle
PULL = 1e-2  # of a vertex's mean weight, to the colour at the vertex itself: none goes astray
PRECISE = 1e-4  # of the right side, that is left over of it
Colors = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def fitted_colors(vertices: NDArray[np.float32], faces: NDArray[np.int64], rgb: Colors) -> NDArray[np.float32]:
    """Return vertex colours [V, 3] in [0, 1], by least squares over the surface.

    vertices [V, 3], faces [F, 3]; rgb: the colours [N, 3] at points [N, 3]. The colour at a vertex alone is that of one
    side of an edge, or of neither; no colour leaves the range of those on the triangles around its vertex.
    """
    at_vertices = rgb(vertices)
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), (len(faces), SAMPLES)).astype(np.float32)  # [F, S, 3]
    corners = vertices[faces]
    wanted = rgb(np.einsum("fsk,fkx->fsx", weights, corners).reshape(-1, 3))
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    root = np.sqrt(np.repeat(area, SAMPLES))  # of the weight of each sample
    of = np.repeat(faces, SAMPLES, axis=0)  # [F S, 3]
    rows = np.repeat(np.arange(len(of)), 3)
    values = (weights.reshape(-1, 3) * root[:, None]).reshape(-1)
    system = coo_array((values, (rows, of.reshape(-1))), shape=(len(of), len(vertices))).tocsr()
    normal = system.T @ system
    pull = PULL * float(normal.diagonal().mean())
    right = system.T @ (wanted * root[:, None]) + pull * at_vertices
    matrix = (normal + pull * eye_array(len(vertices))).tocsr()
    fitted = np.stack(
        [cg(matrix, b, x0=start, rtol=PRECISE)[0] for b, start in zip(right.T, at_vertices.T, strict=True)], axis=1
    )
    low, high = at_vertices.copy(), at_vertices.copy()
    for column in of.T:
        np.minimum.at(low, column, wanted)
        np.maximum.at(high, column, wanted)
    return fitted.clip(low, high).astype(np.float32)
