"""LATTE3D: a geometry and a texture network from a point cloud and text to planes (Xie et al. 2024).

cloud [B, N, 3] --PointNet, local pooling--> planes --U-Net that looks at the text--> geometry planes --> sdf
                                                                                  `--> texture planes, twice the size

At inference the cloud is a dummy: training anneals from a library's shapes to it, so that the text alone decides. Every
choice that the paper's summary leaves open is listed with its reason in `docs/latte3d.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from prd.fields.positional_triplane import PositionalHeads, PositionalTriplaneField
from prd.generators.blocks import TriplaneConvNeXtBlock
from prd.generators.point_encoder import PointEncoder, dummy_cloud
from prd.generators.single_pass import SinglePassModel
from prd.utils.checked_types import CHECKS, Count, Positive, Radius, SavedPlace
from prd.utils.construction import float32_weights


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Latte3dConfig:
    """The sizes of LATTE3D; ours (docs/latte3d.md)."""

    text_encoder: SavedPlace = (
        "toybox"  # folder or Hub id of the text encoder and its tokenizer; "toybox": the shipped one
    )
    text_length: Count | None = None  # tokens per prompt; null: as the text encoder gives them
    text_width: Count | None = None  # channels of a token; null: as the text encoder gives them
    num_points: Count = 2048  # of a point cloud
    point_width: Count = 64  # of the PointNet's features
    plane_size: Count = 64  # height and width of the encoder's and the geometry planes
    channels: tuple[Count, ...] = (64, 128, 256)  # of the U-Net's levels, each half the size of the one before
    plane_channels: Count = 32  # of the geometry and texture planes
    attention_heads: Count = 4  # of the U-Net's cross-attention to the text
    expansion: Count = 4  # of its feed-forward networks
    head_width: Count = 64  # hidden width of the signed distance, deformation and colour networks
    frequencies: Count = 6  # of the sinusoidal encoding of positions
    sphere_radius: Radius = 0.5  # the signed distance is the network's output plus |p| - sphere_radius, scene units
    sdf_init_scale: Positive = 1.0  # of the sdf network's last layer at the start; below 1 it starts near the sphere

    @model_validator(mode="after")
    def _check(self) -> Latte3dConfig:
        shrink = 2 ** (len(self.channels) - 1)
        if not self.channels or self.plane_size % shrink:
            raise ValueError(
                f"plane_size={self.plane_size}: must be divisible by {shrink}, of {len(self.channels)} levels"
            )
        if any(width % self.attention_heads for width in self.channels):
            raise ValueError(f"attention_heads={self.attention_heads}: must divide channels={list(self.channels)}")
        return self


class Latte3dModel(SinglePassModel):
    """Geometry network and texture network. Their encoders are one until a stage trains the texture alone."""

    class_name = "LATTE3D"
    config_class = Latte3dConfig
    takes_shapes = True

    @float32_weights()
    def __init__(self, config: Latte3dConfig) -> None:
        super().__init__(config)
        self.geometry_encoder = TextUNet(config)
        self.texture_encoder = copy.deepcopy(self.geometry_encoder)
        first, channels = config.channels[0], config.plane_channels
        self.geometry_out = nn.Conv2d(3 * first, 3 * channels, 1, groups=3)
        self.texture_out = nn.Conv2d(3 * first, 3 * channels, 3, padding=1, groups=3)
        self.heads = PositionalHeads(
            channels, config.head_width, config.frequencies, sdf_init_scale=config.sdf_init_scale
        )
        self.register_buffer("dummy", dummy_cloud(config.num_points), persistent=False)
        self.dummy: Tensor
        self.register_buffer("encoder_is_shared", torch.tensor(True, dtype=torch.bool))
        self.encoder_is_shared: Tensor

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """ "geometry" and "texture"; while the encoder is shared it belongs to the geometry."""
        geometry = [self.geometry_encoder, self.geometry_out, self.heads.sdf, self.heads.deformation]
        texture = [self.texture_encoder, self.texture_out, self.heads.rgb]
        return {
            name: [parameter for module in modules for parameter in module.parameters()]
            for name, modules in (("geometry", geometry), ("texture", texture))
        }

    def begin_stage(self, trainable: Sequence[str] | None) -> None:
        """Give the texture an encoder of its own, as the shared one is now, where it is to be trained alone."""
        if trainable is not None and "geometry" not in trainable and bool(self.encoder_is_shared):
            self.texture_encoder.load_state_dict(self.geometry_encoder.state_dict())
            self.encoder_is_shared.fill_(False)

    def generate(
        self,
        prompt_embeds: Tensor,
        generator: Any = None,
        *,
        num_inference_steps: int | None = None,
        points: Tensor | None = None,
    ) -> PositionalTriplaneField:
        """Return the field of each prompt, prompt_embeds [B, L, Ct]; nothing is drawn, and there is one step.

        points  clouds [B, N, 3] in the cube [-1, 1]^3 that the shape may follow; None: the dummy, the text alone
        """
        self.check_embeds(prompt_embeds)
        text = prompt_embeds.to(self.dtype)
        cloud = self.dummy.expand(len(text), -1, -1) if points is None else points.to(text)
        if cloud.ndim != 3 or len(cloud) != len(text) or cloud.shape[2] != 3:
            raise ValueError(f"points={tuple(cloud.shape)}: expected [{len(text)}, N, 3]")
        features = self.geometry_encoder(cloud, text)
        geometry = self.geometry_out(features.flatten(1, 2)).unflatten(1, (3, -1))
        if not bool(self.encoder_is_shared):
            features = self.texture_encoder(cloud, text)
        large = F.interpolate(features.flatten(1, 2), scale_factor=2, mode="bilinear", align_corners=False)
        texture = self.texture_out(large).unflatten(1, (3, -1))
        return PositionalTriplaneField(geometry, texture, self.heads, self.config.sphere_radius)


class TextUNet(nn.Module):
    """Network from a cloud [B, N, 3] and text [B, L, Ct] to planes [B, 3, channels[0], H, H].

    A PointNet, then a U-Net with a Triplane ConvNeXt block (cross-attention to the text among its modules) at each
    level on the way down and up, skips added.
    """

    @float32_weights()
    def __init__(self, config: Latte3dConfig) -> None:
        super().__init__()
        widths = config.channels

        def block(width: int) -> TriplaneConvNeXtBlock:
            return TriplaneConvNeXtBlock(width, config.text_width or 0, config.attention_heads, config.expansion)

        pairs = list(pairwise(widths))
        self.points = PointEncoder(config.point_width, widths[0], config.plane_size)
        self.down = nn.ModuleList(block(width) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(3 * a, 3 * b, 2, stride=2, groups=3) for a, b in pairs)
        self.grow = nn.ModuleList(nn.Conv2d(3 * b, 3 * a, 1, groups=3) for a, b in pairs)
        self.up = nn.ModuleList(block(width) for width in widths[:-1])

    def forward(self, cloud: Tensor, text: Tensor) -> Tensor:
        x = self.down[0](self.points(cloud), text)
        skips = []
        for shrink, block in zip(self.shrink, self.down[1:], strict=True):
            skips.append(x)
            x = block(shrink(x.flatten(1, 2)).unflatten(1, (3, -1)), text)
        for grow, block, skip in zip(reversed(self.grow), reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(grow(x.flatten(1, 2)), scale_factor=2, mode="nearest").unflatten(1, (3, -1))
            x = block(x + skip, text)
        return x
