"""Variety of the shapes that a model makes of one prompt: how much they overlap, two by two.

    result = pipe("a red cube", num_meshes_per_prompt=3, output_type="field")
    mean_pairwise_iou(occupancy(result.field, batch=3))        # 1: all alike

Shapes are compared where they are, without turning or moving them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prd.fields.fast import evaluate_grid
from prd.fields.protocol import Field

RESOLUTION = 64  # nodes per axis of the scene's cube


@torch.no_grad()
def occupancy(
    field: Field, *, batch: int = 1, device: torch.device | str = "cpu", resolution: int = RESOLUTION
) -> NDArray[np.uint8]:
    """Return which of R^3 nodes of the scene's cube lie inside each of a field's B shapes, as packed bits [B, R^3 / 8].

    batch, device  of a field that does not tell by itself
    """
    sdf, _ = evaluate_grid(field, resolution, batch, device)
    return np.packbits((sdf < 0).flatten(1).cpu().numpy(), axis=1)


def pairwise_iou(occupied: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the intersection over union [n, n] of n shapes of `occupancy`, in [0, 1]; 1 for two empty ones."""
    shapes = np.asarray(occupied)
    count = len(shapes)
    iou = np.ones((count, count))
    for i in range(count - 1):
        shared = np.bitwise_count(shapes[i] & shapes[i + 1 :]).sum(axis=1, dtype=np.int64)
        either = np.bitwise_count(shapes[i] | shapes[i + 1 :]).sum(axis=1, dtype=np.int64)
        iou[i, i + 1 :] = iou[i + 1 :, i] = np.where(either > 0, shared / np.maximum(either, 1), 1.0)
    return iou


def mean_pairwise_iou(occupied: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> float | None:
    """Return the mean of `pairwise_iou` over all pairs of different shapes; None for fewer than two."""
    count = len(occupied)
    if count < 2:
        return None
    return round(float(pairwise_iou(occupied)[np.triu_indices(count, 1)].mean()), 4)
