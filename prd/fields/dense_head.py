"""A small MLP at the R^3 nodes of a grid, whose activations never exist together: forward and backward by tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NODES_PER_TILE = 1 << 12  # nodes the dense grid handles at a time: their activations stay in a processor's cache
NODES_PER_TILE_GPU = 1 << 18  # there the launches count, not the cache; 64 MB a layer of 64; not measured
SPARSE = 0.5  # share of its nodes with a gradient below which these are gathered for the backward pass


def dense_head(hidden: Sequence[Tensor], second: Tensor, third: Tensor) -> Tensor:
    """w3 relu(w2 relu(sum)) at R^3 nodes, [B, X, R, R, out], of the sum of three lattices of hidden features.

    hidden  xy [B, X, R, width], xz [B, X, R, width], yz [B, R, R, width]: the first layer's output, plane by plane
    second  w2 [width, width]; third  w3 [out, width]
    """
    return _DenseHead.apply(*hidden, second, third)


@torch.no_grad()
def head_at(hidden: Sequence[Tensor], second: Tensor, third: Tensor, nodes: Tensor) -> Tensor:
    """`dense_head` at nodes [n, 4] (b, x, y, z) alone, [n, out], without gradient."""
    parts = [_hidden_at(hidden, some) for some in nodes.split(nodes_per_tile(nodes))]
    return torch.cat([F.linear(F.relu_(F.linear(part, second)), third) for part in parts])


def _hidden_at(hidden: Sequence[Tensor], nodes: Tensor) -> Tensor:
    """The first layer's output [n, width] at nodes [n, 4] (b, x, y, z)."""
    rows = [h.flatten(0, 2).index_select(0, place) for h, place in zip(hidden, _places(hidden, nodes), strict=True)]
    return F.relu_(rows[0].add_(rows[1]).add_(rows[2]))


def _places(hidden: Sequence[Tensor], nodes: Tensor) -> list[Tensor]:
    """Rows [n] of each lattice, its leading dimensions flattened, that nodes [n, 4] (b, x, y, z) take."""
    b, x, y, z = nodes.unbind(1)
    return [
        (b * tensor.shape[1] + row) * tensor.shape[2] + column
        for tensor, row, column in zip(hidden, (x, x, y), (y, z, z), strict=True)
    ]


class _DenseHead(torch.autograd.Function):
    """out[b, x, y, z] = w3 relu(w2 relu(xy[b, x, y] + xz[b, x, z] + yz[b, y, z])), made tile by tile.

    xy and xz may hold a part of the x axis alone. The R^3 activations never exist together: the backward pass makes
    each tile's again while it is in the cache. Where few nodes receive a gradient (renderers look at those near the
    surface) it makes those alone.
    """

    @staticmethod
    def forward(ctx: Any, xy: Tensor, xz: Tensor, yz: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        ctx.save_for_backward(xy, xz, yz, w2, w3)
        batch, resolution = yz.shape[:2]
        out = xy.new_empty(batch, xy.shape[1], resolution, resolution, len(w3))
        for tile in _tiles(xy):
            out[tile] = F.linear(F.relu_(F.linear(_first_hidden(xy, xz, yz, *tile), w2)), w3)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        *hidden, w2, w3 = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (*hidden, w2, w3)]
        nodes = (grad_out != 0).any(dim=-1).nonzero()  # [n, 4] b, x, y, z; NaN counts
        if len(nodes) < SPARSE * grad_out[..., 0].numel():
            _some_backward(hidden, w2, w3, grad_out, nodes, grads)
        else:
            _whole_backward(hidden, w2, w3, grad_out, grads)
        return tuple(grads)


def _whole_backward(hidden: list[Tensor], w2: Tensor, w3: Tensor, grad_out: Tensor, grads: list[Tensor]) -> None:
    """Add the gradients of `_DenseHead`'s arguments to `grads`, tile by tile."""
    xy, xz, yz = hidden
    grad_xy, grad_xz, grad_yz, *grad_weights = grads
    for b, x, y in _tiles(xy):
        h1 = _first_hidden(xy, xz, yz, b, x, y)
        grad = grad_out[b, x, y].reshape(-1, len(w3))
        grad1 = _head_backward(h1.view(-1, h1.shape[-1]), w2, w3, grad, *grad_weights).view_as(h1)
        grad_xy[b, x, y] = grad1.sum(3)
        grad_xz[b, x] += grad1.sum(2)
        grad_yz[b, y] += grad1.sum(1)


def _some_backward(
    hidden: list[Tensor], w2: Tensor, w3: Tensor, grad_out: Tensor, nodes: Tensor, grads: list[Tensor]
) -> None:
    """`_whole_backward` of nodes [n, 4] (b, x, y, z) alone, outside of which grad_out is zero."""
    *grad_hidden, grad_w2, grad_w3 = grads
    for some in nodes.split(nodes_per_tile(nodes)):
        places, h1 = _places(hidden, some), _hidden_at(hidden, some)
        grad1 = _head_backward(h1, w2, w3, grad_out[tuple(some.unbind(1))], grad_w2, grad_w3)
        for grad, place in zip(grad_hidden, places, strict=True):
            grad.flatten(0, 2).index_add_(0, place, grad1)


def _head_backward(h1: Tensor, w2: Tensor, w3: Tensor, grad: Tensor, grad_w2: Tensor, grad_w3: Tensor) -> Tensor:
    """Take grad [n, out] back to the gradient [n, width] before the first ReLU, whose output is h1 [n, width].

    Adds the weights' gradients to grad_w2 and grad_w3.
    """
    h2 = F.relu_(F.linear(h1, w2))
    grad_w3.addmm_(grad.T, h2)
    grad2 = torch.ops.aten.threshold_backward(grad @ w3, h2, 0)
    grad_w2.addmm_(grad2.T, h1)
    return torch.ops.aten.threshold_backward(grad2 @ w2, h1, 0)


def nodes_per_tile(tensor: Tensor) -> int:
    return NODES_PER_TILE if tensor.device.type == "cpu" else NODES_PER_TILE_GPU


def _tiles(xy: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of the samples, x and y axes of xy [B, x, y, C] that hold about `nodes_per_tile` nodes with all of z.

    All of y comes before more of x, and that before more samples: so the least is left to add up between tiles.
    """
    batch, planes, resolution, _ = xy.shape
    nodes = nodes_per_tile(xy)
    rows = min(resolution, max(1, nodes // resolution))
    size = min(planes, max(1, nodes // resolution**2))
    samples = max(1, nodes // (planes * resolution**2))
    for b, x, y in product(range(0, batch, samples), range(0, planes, size), range(0, resolution, rows)):
        yield slice(b, b + samples), slice(x, x + size), slice(y, y + rows)


def _first_hidden(xy: Tensor, xz: Tensor, yz: Tensor, b: slice, x: slice, y: slice) -> Tensor:
    """[B, x, y, z, width] of the tile."""
    return F.relu_((xy[b, x, y, None] + xz[b, x, None]).add_(yz[b, None, y]))
