"""Backgrounds: a colour for every direction of sight, made from the text.

The volume renderer and the mesh renderer composite over a tensor [B, V, H, W, 3]; this is one way of making it:

    back = background.image(cameras, height, width, text)      # text [B, D]: the prompts' pooled embeddings
    views = renderer(field, cameras, height=height, width=width, background=back)

The gradient of the images reaches the background where the object is transparent. Training composites over it so that
the object need not paint a backdrop (the published TriplaneTurbo); evaluation uses a plain colour.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.cameras import Cameras
from prd.utils.construction import float32_weights

HARMONICS = 16  # real spherical harmonics of degree 0 to 3


def spherical_harmonics(directions: Tensor) -> Tensor:
    """Real spherical harmonics of degrees 0 to 3: unit directions [..., 3] to [..., 16], orthonormal on the sphere.

    Polynomials in x, y, z: they run on every device, and a background made of them is smooth.
    """
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    root = math.sqrt
    basis = [
        torch.full_like(x, root(1 / math.pi) / 2),
        *(root(3 / math.pi) / 2 * axis for axis in (y, z, x)),
        root(15 / math.pi) / 2 * x * y,
        root(15 / math.pi) / 2 * y * z,
        root(5 / math.pi) / 4 * (3 * zz - 1),
        root(15 / math.pi) / 2 * x * z,
        root(15 / math.pi) / 4 * (xx - yy),
        root(35 / (2 * math.pi)) / 4 * y * (3 * xx - yy),
        root(105 / math.pi) / 2 * x * y * z,
        root(21 / (2 * math.pi)) / 4 * y * (5 * zz - 1),
        root(7 / math.pi) / 4 * z * (5 * zz - 3),
        root(21 / (2 * math.pi)) / 4 * x * (5 * zz - 1),
        root(105 / math.pi) / 4 * z * (xx - yy),
        root(35 / (2 * math.pi)) / 4 * x * (xx - 3 * yy),
    ]
    return torch.stack(basis, dim=-1)


class HyperHead(nn.Module):
    """An MLP features -> width (ReLU) -> RGB without biases, whose weights a second network makes from the text.

    That network is Linear (no bias), LayerNorm, SiLU, Linear (after the published TriplaneTurbo).
    """

    @float32_weights()
    def __init__(self, text_dim: int, features: int = HARMONICS, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        for name, value in (("text_dim", text_dim), ("features", features), ("width", width), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be positive")
        self.text_dim, self.features, self.width = text_dim, features, width
        self.layers = nn.Sequential(
            nn.Linear(text_dim, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, features * width + width * 3),
        )

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """Colours [B, N, 3] in [0, 1] (up to 0.001) of encoded directions [B, N, features]; text [B, text_dim]."""
        if features.ndim != 3 or features.shape[2] != self.features:
            raise ValueError(f"features={tuple(features.shape)}: expected [B, N, {self.features}]")
        if text.shape != (len(features), self.text_dim):
            raise ValueError(f"text={tuple(text.shape)}: expected [{len(features)}, {self.text_dim}]")
        weights = self.layers(text)
        first, second = weights.split([self.features * self.width, self.width * 3], dim=-1)
        hidden = F.relu(features @ first.view(-1, self.features, self.width))  # [B, N, width]
        colour = torch.sigmoid(hidden @ second.view(-1, self.width, 3))
        return colour * 1.002 - 0.001  # as the object's colours


class TextBackground(nn.Module):
    """An environment map for every prompt: direction and text embedding to colour."""

    @float32_weights()
    def __init__(self, text_dim: int, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.head = HyperHead(text_dim, HARMONICS, width, hidden)

    def forward(self, directions: Tensor, text: Tensor) -> Tensor:
        """Colours [B, ..., 3] in [0, 1] of unit directions [B, ..., 3], world space; text [B, text_dim]."""
        if directions.ndim < 2 or directions.shape[-1] != 3:
            raise ValueError(f"directions={tuple(directions.shape)}: expected [B, ..., 3]")
        features = spherical_harmonics(directions).reshape(len(directions), -1, HARMONICS)
        return self.head(features, text).clamp(0, 1).view(directions.shape)

    def image(self, cameras: Cameras, height: int, width: int, text: Tensor) -> Tensor:
        """The background [B, V, height, width, 3] that the cameras see; text [B, text_dim], one row per prompt."""
        return self(cameras.rays(height, width)[1], text)
