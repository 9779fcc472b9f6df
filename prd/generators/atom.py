"""AToM: a triplane from a text embedding, refined by Triplane ConvNeXt blocks (Qian et al. 2024).

embeddings [B, L, Ct] --mean, linear--> triplane [B, 3, C, H, W] --N blocks that look at every token--> Field

Without blocks two spectral-normalised linear layers make the triplane (the paper's "w/o ConvNeXt", section 5).

The Field serves both stages of the paper's training: volume rendering reads its signed distance and colour, the mesh
stage its deformation too. Planes are xy, xz, yz, laid out as `prd.fields.triplane.plane_coordinates` says.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from prd.fields.positional_triplane import PositionalHeads, PositionalTriplaneField
from prd.generators.blocks import TriplaneConvNeXtBlock
from prd.generators.single_pass import SinglePassModel
from prd.rendering.alpha import AlphaModel, LearnedInvStd, NeusAlpha
from prd.utils.checked_types import CHECKS, Count, Int, Positive, Radius, SavedPlace
from prd.utils.construction import float32_weights


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class AtomConfig:
    """The sizes of AToM; the paper gives those of its heads, the others are ours."""

    text_encoder: SavedPlace = (
        "toybox"  # folder or Hub id of the text encoder and its tokenizer; "toybox": the shipped one
    )
    text_length: Count | None = None  # tokens per prompt; null: as the text encoder gives them
    text_width: Count | None = None  # channels of a token; null: as the text encoder gives them
    plane_channels: Count = 32  # C_T
    plane_size: Count = 64  # H_T = W_T
    num_blocks: Annotated[Int, Field(ge=0)] = 4  # N Triplane ConvNeXt blocks; 0: two linear layers alone
    cross_attention: bool = True  # to the text, in each block
    plane_aware: bool = True  # the 3D-aware convolution, in each block
    attention_heads: Count = 4  # of the cross-attention to the text
    expansion: Count = 4  # of the inverted feed-forward network
    head_width: Count = 64  # hidden width of the three networks (paper, appendix A.1)
    frequencies: Count = 6  # of the sinusoidal encoding of positions
    sphere_radius: Radius = 0.5  # the signed distance is the network's output plus |p| - sphere_radius, scene units
    sdf_init_scale: Positive = 1.0  # of the sdf network's last layer at the start; below 1 it starts near the sphere
    inv_std: Positive | None = None  # s of NeuS at the start, learnt on (paper, Eq. 1); null: the renderer's

    @model_validator(mode="after")
    def _check(self) -> AtomConfig:
        if self.plane_channels % self.attention_heads:
            raise ValueError(
                f"attention_heads={self.attention_heads}: must divide plane_channels={self.plane_channels}"
            )
        return self


class AtomModel(SinglePassModel):
    """Text-to-triplane network and the three networks of the triplane-to-mesh generator (AToM, section 3.1)."""

    class_name = "AToM"
    config_class = AtomConfig

    @float32_weights()
    def __init__(self, config: AtomConfig) -> None:
        super().__init__(config)
        size, channels, width = config.plane_size, config.plane_channels, config.text_width or 0
        entries = 3 * channels * size * size
        self.linear: nn.Module = nn.Linear(width, entries)
        if config.num_blocks == 0:
            second = spectral_norm(nn.Linear(width, entries, bias=False))
            # a map of spectral norm 1 keeps the length of a vector: its entries become as large as those it is given
            self.linear = nn.Sequential(
                spectral_norm(nn.Linear(width, width)), nn.SiLU(), second, Gain(math.sqrt(entries / max(width, 1)))
            )
        self.blocks = nn.ModuleList(
            TriplaneConvNeXtBlock(
                channels,
                width,
                config.attention_heads,
                config.expansion,
                cross_attention=config.cross_attention,
                plane_aware=config.plane_aware,
            )
            for _ in range(config.num_blocks)
        )
        self.heads = PositionalHeads(
            channels, config.head_width, config.frequencies, sdf_init_scale=config.sdf_init_scale
        )
        self.inv_std = None if config.inv_std is None else LearnedInvStd.of(config.inv_std)

    def planes(self, prompt_embeds: Tensor) -> Tensor:
        """The triplane [B, 3, C, H, W] of text embeddings [B, L, Ct]."""
        self.check_embeds(prompt_embeds)
        size, channels = self.config.plane_size, self.config.plane_channels
        x = self.linear(prompt_embeds.mean(dim=1)).view(-1, 3, channels, size, size)
        for block in self.blocks:
            x = block(x, prompt_embeds)
        return x

    def generate(
        self, prompt_embeds: Tensor, generator: Any = None, *, num_inference_steps: int | None = None
    ) -> PositionalTriplaneField:
        """Return the field of each prompt, prompt_embeds [B, L, Ct]; nothing is drawn, and there is one step."""
        planes = self.planes(prompt_embeds.to(self.dtype))
        return PositionalTriplaneField(planes, planes, self.heads, self.config.sphere_radius)

    def alpha(self) -> AlphaModel | None:
        return None if self.inv_std is None else NeusAlpha(self.inv_std())


class Gain(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
