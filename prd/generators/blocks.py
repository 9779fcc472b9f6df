"""Layers on three planes [B, 3, C, H, W]: the Triplane ConvNeXt block of AToM, which LATTE3D's U-Net is made of too.

Planes are xy, xz, yz, laid out as `prd.fields.triplane.plane_coordinates` says. What works per plane is one group
convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.utils.construction import float32_weights


class TriplaneConvNeXtBlock(nn.Module):
    """Cross-attention to the text, 3D-aware convolution, 7 x 7 depth-wise convolution, inverted feed-forward network.

    Each is a residual on x [B, 3, C, H, W] (AToM, section 3.1; its Algorithm 1 adds the block's input once more, which
    would double x in every block); the first two can be left out. All but the attention's view of the text works per
    plane, by group convolutions.
    """

    @float32_weights()
    def __init__(
        self,
        channels: int,
        text_width: int,
        heads: int,
        expansion: int,
        *,
        cross_attention: bool = True,
        plane_aware: bool = True,
    ) -> None:
        super().__init__()
        self.attention = PlaneTextAttention(channels, text_width, heads) if cross_attention else None
        self.aware = PlaneAwareConv(channels) if plane_aware else None
        self.spatial = nn.Conv2d(3 * channels, 3 * channels, 7, padding=3, groups=3 * channels)
        self.norm = PlaneNorm(channels)
        self.widen = nn.Conv2d(3 * channels, 3 * expansion * channels, 1, groups=3)
        self.narrow = nn.Conv2d(3 * expansion * channels, 3 * channels, 1, groups=3)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if self.attention is not None:
            x = x + self.attention(x, text)
        if self.aware is not None:
            x = x + F.relu(self.aware(x))
        x = x + self.spatial(x.flatten(1, 2)).view_as(x)
        hidden = F.gelu(self.widen(self.norm(x).flatten(1, 2)))
        return x + self.narrow(hidden).view_as(x)


class PlaneNorm(nn.Module):
    """Layer normalisation over the channels of each pixel of x [B, 3, C, H, W], with a scale and shift per plane."""

    @float32_weights()
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, channels, 1, 1, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(3, channels, 1, 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=2, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + 1e-6) * self.weight + self.bias


class PlaneTextAttention(nn.Module):
    """Multi-head cross-attention: every pixel of a plane is a query, every text token a key and a value.

    x [B, 3, C, H, W], text [B, L, Ct] -> [B, 3, C, H, W]. Queries and outputs have weights per plane.
    """

    @float32_weights()
    def __init__(self, channels: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = PlaneNorm(channels)
        self.to_q = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3, bias=False)
        self.to_k = nn.Linear(text_width, channels, bias=False)
        self.to_v = nn.Linear(text_width, channels, bias=False)
        self.to_out = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        batch, _, channels, height, width = x.shape
        query = self.to_q(self.norm(x).flatten(1, 2)).view(batch, 3, self.heads, -1, height * width)
        query = query.permute(0, 2, 1, 4, 3).flatten(2, 3)  # [B, heads, 3 H W, d]
        key, value = (
            to(text).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_k, self.to_v)
        )  # [B, heads, L, d]
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, 3 H W, d]
        mixed = mixed.unflatten(2, (3, -1)).permute(0, 2, 1, 4, 3).reshape(batch, 3 * channels, height, width)
        return self.to_out(mixed).view_as(x)


class PlaneAwareConv(nn.Module):
    """3D-aware convolution (Rodin, after AToM's section 3.1): a pixel sees the rows of the other planes it stands for.

    x [B, 3, C, H, H] -> the same shape. A pixel of a plane fixes two coordinates; each of the other two planes has one
    of them, and is averaged over the third. Both averages are concatenated to the plane before a 3 x 3 convolution,
    one group per plane.
    """

    @float32_weights()
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3 * 3 * channels, 3 * channels, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(along_the_axes(x).flatten(1, 2)).view_as(x)


def along_the_axes(x: Tensor) -> Tensor:
    """Each plane with what the other two hold of its pixels' coordinates: [B, 3, C, H, H] -> [B, 3, 3 C, H, H].

    xy has row x and column y; xz row -z and column -x; yz row -z and column y (`plane_coordinates`).
    """
    xy, xz, yz = x.unbind(1)  # [B, C, rows, columns]
    by_row = [plane.mean(dim=3) for plane in (xy, xz, yz)]  # of x, -z, -z: [B, C, H]
    by_column = [plane.mean(dim=2) for plane in (xy, xz, yz)]  # of y, -x, y

    def down(values: Tensor) -> Tensor:
        """The same in every column."""
        return values[..., :, None].expand_as(xy)

    def across(values: Tensor) -> Tensor:
        """The same in every row."""
        return values[..., None, :].expand_as(xy)

    return torch.stack(
        [
            torch.cat([xy, down(by_column[1].flip(-1)), across(by_column[2])], dim=1),  # x of xz, y of yz
            torch.cat([xz, across(by_row[0].flip(-1)), down(by_row[2])], dim=1),  # -x of xy, -z of yz
            torch.cat([yz, across(by_column[0]), down(by_row[1])], dim=1),  # y of xy, -z of xz
        ],
        dim=1,
    )
