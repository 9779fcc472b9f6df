"""The CPU backend of `rasterize_splats`: compositing compiled by numba, a hand-written gradient with it.

Gaussians are taken front to back, each over the pixels of its box, with the transmittance of every pixel kept beside
the image: no list per pixel or tile is made. The backward pass goes the same way: what lies behind a Gaussian is the
finished image less what has been passed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prd.splats.project import LEAST_ALPHA, LEAST_LEFT, MOST_ALPHA
from prd.utils.jit import jit
from prd.utils.threads import share


@jit
def _forward(
    centres: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    features: np.ndarray,
    order: np.ndarray,
    boxes: np.ndarray,
    image: np.ndarray,
) -> None:
    """Draw one view's Gaussians `order` into image [H, W, C + 1], which is 0; arguments of that view, float64."""
    channels = features.shape[1]
    left = np.ones(image.shape[:2])
    closed = np.zeros(image.shape[:2], dtype=np.bool_)
    for i in order:
        a, b, c, opacity = conics[i, 0], conics[i, 1], conics[i, 2], opacities[i]
        limit = 2.0 * np.log(opacity / LEAST_ALPHA)
        for row in range(boxes[i, 1], boxes[i, 3]):
            y = row + 0.5 - centres[i, 1]
            for column in range(boxes[i, 0], boxes[i, 2]):
                if closed[row, column]:
                    continue
                x = column + 0.5 - centres[i, 0]
                distance = a * x * x + 2.0 * b * x * y + c * y * y
                if distance > limit:
                    continue
                alpha = min(opacity * np.exp(-0.5 * distance), MOST_ALPHA)
                behind = left[row, column] * (1.0 - alpha)
                if behind <= LEAST_LEFT:
                    closed[row, column] = True
                    continue
                weight = left[row, column] * alpha
                for k in range(channels):
                    image[row, column, k] += weight * features[i, k]
                image[row, column, channels] += weight
                left[row, column] = behind


@jit
def _backward(
    centres: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    features: np.ndarray,
    order: np.ndarray,
    boxes: np.ndarray,
    image: np.ndarray,
    grad: np.ndarray,
    grad_centres: np.ndarray,
    grad_conics: np.ndarray,
    grad_opacities: np.ndarray,
    grad_features: np.ndarray,
) -> None:
    """Gradients of one view's Gaussians from that of its image, grad [H, W, C + 1]; the last four are 0 before.

    With v_i = grad . f_i: d / d alpha_i = T_i v_i - (sum over those behind of T_j alpha_j v_j) / (1 - alpha_i).
    """
    channels = features.shape[1]
    left = np.ones(image.shape[:2])
    closed = np.zeros(image.shape[:2], dtype=np.bool_)
    behind = (image * grad).sum(axis=2)  # of the Gaussians not yet passed: sum of T_j alpha_j v_j
    for i in order:
        a, b, c, opacity = conics[i, 0], conics[i, 1], conics[i, 2], opacities[i]
        limit = 2.0 * np.log(opacity / LEAST_ALPHA)
        for row in range(boxes[i, 1], boxes[i, 3]):
            y = row + 0.5 - centres[i, 1]
            for column in range(boxes[i, 0], boxes[i, 2]):
                if closed[row, column]:
                    continue
                x = column + 0.5 - centres[i, 0]
                distance = a * x * x + 2.0 * b * x * y + c * y * y
                if distance > limit:
                    continue
                shape = np.exp(-0.5 * distance)
                alpha = min(opacity * shape, MOST_ALPHA)
                before = left[row, column]
                if before * (1.0 - alpha) <= LEAST_LEFT:
                    closed[row, column] = True
                    continue
                weight = before * alpha
                value = grad[row, column, channels]
                for k in range(channels):
                    value += grad[row, column, k] * features[i, k]
                    grad_features[i, k] += weight * grad[row, column, k]
                behind[row, column] -= weight * value
                left[row, column] = before * (1.0 - alpha)
                if opacity * shape > MOST_ALPHA:
                    continue
                slope = before * value - behind[row, column] / (1.0 - alpha)
                grad_opacities[i] += slope * shape
                slope *= -0.5 * alpha
                grad_conics[i, 0] += slope * x * x
                grad_conics[i, 1] += slope * 2.0 * x * y
                grad_conics[i, 2] += slope * y * y
                grad_centres[i, 0] -= slope * 2.0 * (a * x + b * y)
                grad_centres[i, 1] -= slope * 2.0 * (b * x + c * y)


def composite_forward(
    drawn: Sequence[np.ndarray], orders: Sequence[np.ndarray], boxes: Sequence[np.ndarray], size: tuple[int, int]
) -> Tensor:
    """Images [V, H, W, C + 1], the opacity last, on torch.get_num_threads() threads, a view each.

    drawn   centres [V, N, 2], conics [V, N, 3], opacities [V, N] and features [V, N, C], float64
    orders  numbers of the Gaussians that each view draws, the nearest first
    boxes   [N, 4] of each view: first column and row, end column and row
    size    (height, width)
    """
    views, _, channels = drawn[3].shape
    image = torch.zeros(views, *size, channels + 1, dtype=torch.float64, device="cpu")
    out = image.numpy()

    def draw(view: int) -> None:
        _forward(*(array[view] for array in drawn), orders[view], boxes[view], out[view])

    share(draw, views, torch.get_num_threads())
    return image


def composite_backward(
    drawn: Sequence[np.ndarray],
    orders: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    image: np.ndarray,
    grad: np.ndarray,
) -> tuple[Tensor, ...]:
    """Gradients of centres, conics, opacities and features from that of the image; arguments of the forward pass."""
    grads = tuple(torch.zeros(array.shape, dtype=torch.float64, device="cpu") for array in drawn)
    out = [gradient.numpy() for gradient in grads]

    def draw(view: int) -> None:
        own = [array[view] for array in drawn], orders[view], boxes[view], image[view], grad[view]
        _backward(*own[0], *own[1:], *(array[view] for array in out))

    share(draw, len(image), torch.get_num_threads())
    return grads
