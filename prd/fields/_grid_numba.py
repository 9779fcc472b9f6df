"""The CPU backend of lookups in a grid: trilinear interpolation compiled by numba.

F.grid_sample takes the channels of a point from as many places and makes a gradient for the points too. Here a node's
channels lie together, and only what is asked for is made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prd.utils.jit import jit
from prd.utils.threads import share

POINTS_PER_JOB = 1 << 14  # about 0.5 ms: less is not worth starting a thread for


@jit
def _cell(coordinate: np.floating, half: np.floating, top: np.floating) -> tuple[int, np.floating]:
    """The node before a coordinate in [-1, 1] on an axis, and the share of the way from it to the next one.

    half  half the number of cells an axis; top: the last node that has a next one. Beyond the border it is the
    border's; the share of NaN is NaN.
    """
    place = min(max(coordinate * half + half, half - half), half + half)
    node = min(np.floor(place), top)
    return min(max(int(node), 0), int(top)), place - node


@jit
def _look_up(volume: np.ndarray, points: np.ndarray, channels: tuple[int, int], out: np.ndarray) -> None:
    """Channels first to last (exclusive) of volume [x, y, z, C] at points [N, 3]: out [N, last - first]."""
    size, stride = volume.shape[0], volume.shape[3]
    half, top, one = points.dtype.type(0.5 * (size - 1)), points.dtype.type(size - 2), points.dtype.type(1)
    values, count = volume.reshape(-1), channels[1] - channels[0]
    to_x, to_y, to_z = np.uint64(size * size * stride), np.uint64(size * stride), np.uint64(stride)
    for n in range(points.shape[0]):
        (i, u), (j, v), (k, w) = (
            _cell(points[n, 0], half, top),
            _cell(points[n, 1], half, top),
            _cell(points[n, 2], half, top),
        )
        near, near_y, far, far_y = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
        node = ((i * size + j) * size + k) * stride + channels[0]
        for c in range(count):
            a = np.uint64(node + c)  # unsigned: numba takes a signed index for one that may count from the end
            b = a + to_z
            low = (
                near * values[a] + near_y * values[a + to_y] + far * values[a + to_x] + far_y * values[a + to_x + to_y]
            )
            high = (
                near * values[b] + near_y * values[b + to_y] + far * values[b + to_x] + far_y * values[b + to_x + to_y]
            )
            out[n, c] = (one - w) * low + w * high


@jit
def _put_back(grad: np.ndarray, points: np.ndarray, channels: tuple[int, int], out: np.ndarray) -> None:
    """The transpose of `_look_up`: adds grad [N, last - first] to out [x, y, z, C]."""
    size, stride = out.shape[0], out.shape[3]
    half, top, one = points.dtype.type(0.5 * (size - 1)), points.dtype.type(size - 2), points.dtype.type(1)
    values, count = out.reshape(-1), channels[1] - channels[0]
    to_x, to_y, to_z = np.uint64(size * size * stride), np.uint64(size * stride), np.uint64(stride)
    for n in range(points.shape[0]):
        (i, u), (j, v), (k, w) = (
            _cell(points[n, 0], half, top),
            _cell(points[n, 1], half, top),
            _cell(points[n, 2], half, top),
        )
        near, near_y, far, far_y = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
        node = ((i * size + j) * size + k) * stride + channels[0]
        for c in range(count):
            a = np.uint64(node + c)
            b = a + to_z
            low, high = (one - w) * grad[n, c], w * grad[n, c]
            values[a] += near * low
            values[a + to_y] += near_y * low
            values[a + to_x] += far * low
            values[a + to_x + to_y] += far_y * low
            values[b] += near * high
            values[b + to_y] += near_y * high
            values[b + to_x] += far * high
            values[b + to_x + to_y] += far_y * high


@jit
def _march(sdf: np.ndarray, origins: np.ndarray, directions: np.ndarray, t: np.ndarray, out: np.ndarray) -> None:
    """sdf [x, y, z] at distances t [M, S] along rays [M, 3], outside plus the distance to the cube: out [M, S]."""
    size = sdf.shape[0]
    half, top = t.dtype.type(0.5 * (size - 1)), t.dtype.type(size - 2)
    zero, one = t.dtype.type(0), t.dtype.type(1)
    values, to_x, to_y, to_z = sdf.reshape(-1), np.uint64(size * size), np.uint64(size), np.uint64(1)
    for m in range(t.shape[0]):
        for s in range(t.shape[1]):
            x = origins[m, 0] + t[m, s] * directions[m, 0]
            y = origins[m, 1] + t[m, s] * directions[m, 1]
            z = origins[m, 2] + t[m, s] * directions[m, 2]
            (i, u), (j, v), (k, w) = _cell(x, half, top), _cell(y, half, top), _cell(z, half, top)
            a = np.uint64((i * size + j) * size + k)
            b = a + to_z
            near, near_y, far, far_y = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
            low = (
                near * values[a] + near_y * values[a + to_y] + far * values[a + to_x] + far_y * values[a + to_x + to_y]
            )
            high = (
                near * values[b] + near_y * values[b + to_y] + far * values[b + to_x] + far_y * values[b + to_x + to_y]
            )
            x, y, z = max(abs(x) - one, zero), max(abs(y) - one, zero), max(abs(z) - one, zero)
            out[m, s] = (one - w) * low + w * high + np.sqrt(x * x + y * y + z * z)


def look_up(volume: Tensor, points: Tensor, channels: tuple[int, int]) -> Tensor:
    """Channels first to last (exclusive) of volume [B, x, y, z, C] at points [B, N, 3]: [B, N, last - first]."""
    out = volume.new_empty(*points.shape[:2], channels[1] - channels[0])
    nodes, places, values = (part.detach().numpy() for part in (volume, points, out))
    size, parts = points.shape[1], -(-points.shape[1] // POINTS_PER_JOB)

    def job(number: int) -> None:
        sample, part = divmod(number, parts)
        some = slice(part * size // parts, (part + 1) * size // parts)
        _look_up(nodes[sample], places[sample, some], channels, values[sample, some])

    share(job, len(volume) * parts, torch.get_num_threads())
    return out


def put_back(grad: Tensor, points: Tensor, channels: tuple[int, int], shape: torch.Size) -> Tensor:
    """The gradient [B, x, y, z, C], of that shape, of what `look_up` gave, from its own gradient [B, N, C']."""
    out = grad.new_zeros(shape)
    values, places, nodes = grad.contiguous().numpy(), points.detach().numpy(), out.numpy()

    def job(sample: int) -> None:  # one thread a sample: its sum has one order
        _put_back(values[sample], places[sample], channels, nodes[sample])

    share(job, len(out), torch.get_num_threads())
    return out


def march(sdf: Tensor, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
    """sdf [B, x, y, z] at distances t [B, M, S] along rays [B, M, 3], the distance to the cube added: [B, M, S]."""
    out = torch.empty_like(t)
    arrays = [part.detach().contiguous().numpy() for part in (sdf, origins, directions, t, out)]
    rays, parts = t.shape[1], -(-t[0].numel() // POINTS_PER_JOB)

    def job(number: int) -> None:
        sample, part = divmod(number, parts)
        some = slice(part * rays // parts, (part + 1) * rays // parts)
        nodes, *along = (array[sample] for array in arrays)
        _march(nodes, *(array[some] for array in along))

    share(job, len(t) * parts, torch.get_num_threads())
    return out
