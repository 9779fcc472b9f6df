"""ATT3D: a hypernetwork from text to the parameters of a multi-resolution grid (Lorraine et al. 2023).

embeddings [B, L, Ct] --flatten, spectral-normalised linear, SiLU, spectral-normalised linear--> w [B, parameters]
points --grid with parameters w--> features --NeRF head--> density and colour

No momentum in its optimiser, no suffix of the view in its text: those belong to training (`configs/att3d_*.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from prd.fields.hash_grid import FeatureGrids
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import colour_from_features
from prd.generators.single_pass import SinglePassModel
from prd.rendering.alpha import AlphaModel, DensityAlpha
from prd.utils.arguments import one_or_more
from prd.utils.checked_types import CHECKS, Count, Positive, Radius, SavedPlace, Size
from prd.utils.construction import float32_weights


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Att3dConfig:
    """The sizes of ATT3D. Those of the paper are in its appendix, which is not at hand: these are ours."""

    text_encoder: SavedPlace = (
        "toybox"  # folder or Hub id of the text encoder and its tokenizer; "toybox": the shipped one
    )
    text_length: Count | None = None  # tokens per prompt; null: as the text encoder gives them
    text_width: Count | None = None  # channels of a token; null: as the text encoder gives them
    hidden_width: Count = 32  # of the vector v between the two linear maps (Eq. 4)
    resolutions: tuple[Size, ...] = (9, 14, 22, 36, 58)  # nodes per axis of the grid's levels
    features: Count = 4  # channels of a level
    table_size: Count = 1 << 19  # entries from which a level is hashed
    feature_gain: Positive | None = None  # factor of w; null: that which makes its entries as large as those of v
    head_width: Count = 64  # hidden width of the NeRF head
    representation: Literal["density", "sdf"] = "density"  # the paper's, or a signed distance, to compare encodings
    density_scale: Positive = 25.0  # density = density_scale * softplus(head + blob), 1 / scene units
    blob: Positive = 5.0  # the head's output is added to blob * (1 - |p| / sphere_radius), a ball at the start
    sphere_radius: Radius = 0.5  # of that ball, scene units; of "sdf", whose output is added to |p| - sphere_radius


class Att3dModel(SinglePassModel):
    """Mapping network and NeRF head (ATT3D, section 3.1)."""

    class_name = "ATT3D"
    config_class = Att3dConfig

    @float32_weights()
    def __init__(self, config: Att3dConfig) -> None:
        super().__init__(config)
        self.grids = FeatureGrids(config.resolutions, config.features, config.table_size)
        inputs = (config.text_length or 0) * (config.text_width or 0)
        self.first = spectral_norm(nn.Linear(inputs, config.hidden_width))
        self.second = spectral_norm(nn.Linear(config.hidden_width, self.grids.num_parameters, bias=False))
        # a map of spectral norm 1 keeps the length of a vector: the entries of a long one are small, 1e-3 of a million
        self.feature_gain = config.feature_gain or math.sqrt(self.grids.num_parameters / config.hidden_width)
        self.head = nn.Sequential(
            nn.Linear(self.grids.channels, config.head_width), nn.ReLU(), nn.Linear(config.head_width, 4)
        )
        with torch.no_grad():
            self.head.get_parameter("2.bias").zero_()

    def mapping(self, prompt_embeds: Tensor) -> Tensor:
        """m(c): the grid's parameters w [B, num_parameters] of embeddings [B, L, Ct] (Eq. 4 and 5)."""
        self.check_embeds(prompt_embeds)
        v = F.silu(self.first(prompt_embeds.flatten(1)))
        return self.feature_gain * self.second(v)

    def generate(
        self, prompt_embeds: Tensor, generator: Any = None, *, num_inference_steps: int | None = None
    ) -> HyperField:
        """Return the field of each prompt, prompt_embeds [B, L, Ct]; nothing is drawn, and there is one step."""
        return HyperField(self.mapping(prompt_embeds.to(self.dtype)), self.grids, self.head, self.config)

    def interpolate(self, first: Tensor, second: Tensor, alphas: Sequence[float] | Tensor) -> HyperField:
        """The fields of m((1 - alpha) c1 + alpha c2) (Eq. 6), one for each of alphas [N].

        first, second: embeddings [L, Ct] of two prompts. Interpolating from `second` with 1 - alphas gives the same.
        """
        share = torch.as_tensor(alphas, dtype=first.dtype, device=first.device).view(-1, 1, 1)
        return self.generate((1 - share) * first + share * second)

    def alpha(self) -> AlphaModel | None:
        return DensityAlpha(threshold(self.config)) if self.config.representation == "density" else None


def threshold(config: Att3dConfig) -> float:
    """The density of the exported surface, where the head's output and the blob cancel."""
    return config.density_scale * float(F.softplus(torch.zeros((), dtype=torch.float32, device="cpu")))


class HyperField(AutogradGradient):
    """B shapes, each a grid of parameters w [B, num_parameters], and the head that reads them.

    With `representation` "density" the signed distance is threshold - density, 1 / scene units: positive outside, zero
    on the exported surface, as `DensityAlpha` reads it.
    """

    def __init__(self, parameters: Tensor, grids: FeatureGrids, head: nn.Sequential, config: Att3dConfig) -> None:
        half = parameters.dtype in (torch.float16, torch.bfloat16)
        self.parameters = parameters.float() if half else parameters
        self.grids, self.head, self.config = grids, head, config

    def select(self, index: int | Sequence[int]) -> HyperField:
        """One of the B samples, or some, as a field of their own."""
        rows = one_or_more(index)
        return HyperField(self.parameters[rows], self.grids, self.head, self.config)

    def _raw(self, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[0] != len(self.parameters) or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3] with B = {len(self.parameters)}")
        return self.head(self.grids.encode(self.parameters, points))

    def _distance(self, raw: Tensor, radius: Tensor) -> Tensor:
        """The field's signed distance of the head's first output and the distance from the centre, [...] each."""
        config = self.config
        if config.representation == "sdf":
            return raw + radius - config.sphere_radius
        blob = config.blob * (1 - radius / config.sphere_radius)
        return threshold(config) - config.density_scale * F.softplus(raw + blob)

    def sdf(self, points: Tensor) -> Tensor:
        return self._distance(self._raw(points)[..., :1], points.norm(dim=-1, keepdim=True))

    def rgb(self, points: Tensor) -> Tensor:
        return colour_from_features(self._raw(points)[..., 1:]).clamp(0, 1)

    def sample(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signed distance [B, N, 1], its gradient [B, N, 3] and colour [B, N, 3], the grid being read once."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_(True)
            raw = self._raw(points)
            sdf = self._distance(raw[..., :1], points.norm(dim=-1, keepdim=True))
            (gradient,) = torch.autograd.grad(sdf.sum(), points, create_graph=create_graph, retain_graph=True)
        colour = colour_from_features(raw[..., 1:]).clamp(0, 1)
        return (sdf, gradient, colour) if create_graph else (sdf.detach(), gradient, colour.detach())

    def grid(self, resolution: int) -> tuple[Tensor, Tensor, None]:
        """sdf [B, R, R, R] and rgb [B, R, R, R, 3] at the nodes linspace(-1, 1, R) of the cube, no deformation."""
        raw, radius = self._slab(resolution, 0, resolution)
        return self._distance(raw[..., 0], radius), colour_from_features(raw[..., 1:]).clamp(0, 1), None

    def geometry_grid(self, resolution: int, first: int, last: int) -> tuple[Tensor, None]:
        """The planes x[first], ..., x[last - 1] of `grid`: sdf [B, n, R, R]."""
        raw, radius = self._slab(resolution, first, last)
        return self._distance(raw[..., 0], radius), None

    def _slab(self, resolution: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The head's output [B, n, R, R, 4] and the distance from the centre [n, R, R] of some planes of a grid."""
        if resolution < 2 or not 0 <= first < last <= resolution:
            raise ValueError(f"resolution={resolution}, planes {first}..{last}: expected 0 <= first < last <= R, R > 1")
        nodes = torch.linspace(-1, 1, resolution, device=self.parameters.device, dtype=self.parameters.dtype)
        x = nodes[first:last]
        radius = (x[:, None, None] ** 2 + nodes[:, None] ** 2 + nodes**2).sqrt()
        return self.head(self.grids.encode_grid(self.parameters, x, nodes)), radius
